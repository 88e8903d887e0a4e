"""Tests attend.py against softmax(scale q k) v in float64, written out."""

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from rorqual.layers.attend import attend, attend_shared

pytestmark = pytest.mark.dsa


def exactly(query, key, value, scale, mask):
    """Computes the sum directly; every key head serves the same number of adjacent query heads."""
    group = query.shape[2] // key.shape[2]
    key, value = (x.repeat_interleave(group, dim=2).double() for x in (key, value))
    logits = scale * torch.einsum("bthp,blhp->bhtl", query.double(), key).masked_fill(
        ~mask, -torch.inf
    )
    return torch.einsum("bhtl,blhq->bthq", logits.softmax(-1), value).float()


@pytest.mark.parametrize("widths", [(12, 8), (5, 5), (4, 9)])
@pytest.mark.parametrize("time", [1, 2, 63, 64, 65, 200, 512, 513])
def test_blocks_of_queries_give_what_the_fused_path_gives(time, widths, poisoned):
    query, key = torch.randn(2, 2, time, 3, widths[0])
    value = torch.randn(2, time, 3, widths[1])
    fused = attend(query, key, value, 0.4, causal=True)
    with torch.no_grad():
        blocks = attend(query, key, value, 0.4, causal=True)
        with sdpa_kernel(SDPBackend.MATH):
            exact = attend(query.double(), key.double(), value.double(), 0.4, causal=True).float()
    torch.testing.assert_close(blocks, exact, rtol=0, atol=1e-6 * exact.abs().max().item())
    torch.testing.assert_close(blocks, fused, rtol=0, atol=2e-6 * exact.abs().max().item())


@pytest.mark.parametrize("widths", [(12, 12), (12, 5), (5, 12)])
def test_attend_takes_any_two_widths_on_the_fused_path(widths, poisoned):
    query = torch.randn(2, 7, 6, widths[0], requires_grad=True)
    key = torch.randn(2, 9, 3, widths[0])
    value = torch.randn(2, 9, 3, widths[1])
    mask = torch.rand(2, 1, 7, 9) < 0.5
    mask[..., 0] = True
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        out = attend(query, key, value, 0.3, mask)
    torch.testing.assert_close(out, exactly(query, key, value, 0.3, mask))


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("heads", "groups", "length"), [(1, 1, 1), (6, 2, 1), (6, 2, 13), (16, 1, 40), (3, 3, 13)]
)
def test_one_query_a_sequence_by_groups(heads, groups, length, dtype, masked, poisoned):
    """Compares outputs and gradients."""
    shapes = (2, 1, heads, 6), (2, length, groups, 6), (2, length, groups, 5)
    arguments = [torch.randn(shape).to(dtype).requires_grad_() for shape in shapes]
    mask = (
        torch.rand(2, 1, 1, length) < 0.5
        if masked
        else torch.ones(2, 1, 1, length, dtype=torch.bool)
    )
    mask[..., 0] = True
    out = attend(*arguments, 0.3, mask if masked else None)
    expected = exactly(*arguments, 0.3, mask).to(dtype)
    close = {"rtol": 0, "atol": 1e-5 if dtype == torch.float32 else 2e-2}
    torch.testing.assert_close(out, expected, **close)
    pull = torch.randn_like(out)
    both = (torch.autograd.grad(each, arguments, pull) for each in (out, expected))
    for ours, theirs in zip(*both, strict=True):
        torch.testing.assert_close(ours, theirs, **close)


def test_a_query_that_sees_nothing_gets_zeros_and_no_gradient(poisoned):
    query, key, value = (torch.randn(1, 4, 2, 6, requires_grad=True) for _ in range(3))
    mask = torch.ones(1, 1, 4, 4, dtype=torch.bool).tril()
    mask[..., 2, :] = False
    out = attend(query, key, value, 1.0, mask)
    assert not out[:, 2].any() and out[:, [0, 1, 3]].all()
    out.sum().backward()
    assert not query.grad[:, 2].any() and key.grad.isfinite().all() and value.grad.isfinite().all()


@pytest.mark.parametrize("masked", ["none", "by row", "by token"])
@pytest.mark.parametrize(("time", "heads"), [(1, 5), (3, 2), (4, 1)])
def test_keys_that_all_heads_share_are_the_values_too(time, heads, masked, poisoned):
    query = torch.randn(2, time, heads, 6, requires_grad=True)
    key = torch.randn(2, 11, 6, requires_grad=True)
    mask = torch.rand(2, 1, {"none": 1, "by row": 1, "by token": time}[masked], 11) < (
        2.0 if masked == "none" else 0.5
    )
    mask[..., 0] = True
    out = attend_shared(query, key, 0.3, None if masked == "none" else mask)
    expected = exactly(query, key[:, :, None], key[:, :, None], 0.3, mask)
    torch.testing.assert_close(out, expected)
    toward = torch.randn_like(out)
    pairs = (torch.autograd.grad(x, (query, key), toward) for x in (out, expected))
    for mine, theirs in zip(*pairs, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)
