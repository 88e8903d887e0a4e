"""Tests that Triton's block-sparse attention has the numbers and gradients of layers.sparse."""

import pytest
import torch

from rorqual import kernels
from rorqual.layers.sparse import best_blocks, selected_attention

pytestmark = pytest.mark.nsa

CASES = [  # batch, queries, keys, heads, groups, selections, width, depth, keys a block, blocks
    (2, 9, 9, 4, 2, 2, 5, 3, 4, 2),
    (1, 7, 23, 6, 2, 6, 8, 8, 5, 3),
    (1, 3, 70, 3, 1, 1, 17, 20, 33, 2),
    (1, 2, 200, 2, 2, 2, 16, 16, 130, 2),
    (1, 33, 33, 20, 1, 1, 6, 7, 8, 9),
]


def chosen(
    batch: int, time: int, keys: int, choices: int, block: int, count: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns random blocks, some of them empty, and the queries' columns.

    The first query sees nothing.
    """
    positions = (torch.arange(time) + keys - time).expand(batch, time).contiguous()
    scores = torch.rand(batch, time, choices, -(-keys // block))
    index = best_blocks(scores, positions // block, torch.zeros_like(positions), count)
    index = index.masked_fill(torch.rand(index.shape) < 0.15, -1)
    index[0, 0] = -1
    return index, positions


def outcome(function, given, pull, *rest):
    given = [x.detach().requires_grad_() for x in given]
    made = function(*given, *rest)
    return [made, *torch.autograd.grad((made.float() * pull).sum(), given)]


@pytest.mark.interpreted
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tiles_attend_as_the_gathered_form(
    dtype: torch.dtype, tiled: torch.device, poisoned: None
) -> None:
    for batch, time, keys, heads, groups, choices, width, depth, block, count in CASES:
        index, positions = (x.to(tiled) for x in chosen(batch, time, keys, choices, block, count))
        query = torch.randn(batch, time, heads, width).to(dtype)
        # A cache's buffer is longer than its keys.
        key = torch.full((batch, keys + 3, groups, width), torch.nan).to(dtype)
        value = torch.full((batch, keys + 5, groups, depth), torch.nan).to(dtype)
        key[:, :keys], value[:, :keys] = (
            torch.randn(batch, keys, groups, width),
            torch.randn(batch, keys, groups, depth),
        )
        given = [x.to(tiled) for x in (query, key[:, :keys], value[:, :keys])]
        pull, rest = (
            torch.randn(batch, time, heads, depth).to(tiled),
            (index, positions, block, width**-0.5),
        )
        ours = outcome(selected_attention.choice.load("triton"), given, pull, *rest)
        expected = outcome(selected_attention.reference, [x.float() for x in given], pull, *rest)
        assert ours[0][0, 0].abs().max() == 0
        for a, b in zip(ours, expected, strict=True):
            assert a.dtype == dtype
            tolerance = (2**-5 if dtype == torch.bfloat16 else 3e-6) * b.abs().max().item()
            torch.testing.assert_close(a.float(), b, atol=tolerance, rtol=0)


@pytest.mark.interpreted
def test_tiles_take_keys_in_any_layout_and_none_at_all(tiled: torch.device) -> None:
    index, positions = chosen(1, 6, 11, 2, 4, 3)
    # The last axis is not contiguous, and the query has another dtype.
    strided = torch.randn(1, 2, 8, 11).permute(0, 3, 1, 2).to(tiled)
    query = torch.randn(1, 6, 4, 8, dtype=torch.bfloat16).to(tiled)
    rest = (index.to(tiled), positions.to(tiled), 4, 0.3)
    ours = selected_attention.choice.load("triton")(query, strided, strided, *rest)
    torch.testing.assert_close(
        ours, selected_attention.reference(query, strided, strided, *rest), atol=2e-2, rtol=0
    )
    # Columns beyond a row are never read.
    longer = torch.cat([strided, torch.full_like(strided[:, :3], torch.nan)], 1)
    torch.testing.assert_close(
        selected_attention.choice.load("triton")(query, longer, longer, *rest), ours
    )
    empty = torch.empty(1, 0, 4, 8).to(tiled)
    none = selected_attention.choice.load("triton")(
        empty, strided, strided, rest[0][:, :0], rest[1][:, :0], 4, 0.3
    )
    assert none.shape == empty.shape


@pytest.mark.interpreted
def test_picked_with_gradients_where_asked_for(
    tiled: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(kernels.VARIABLE, "selected_attention=triton")
    where = torch.ones(1, requires_grad=True, device=tiled)
    assert selected_attention.choose(where) is selected_attention.choice.load("triton")
