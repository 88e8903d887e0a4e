"""Tests one selection for many queries.

The loop over tiles and FlexAttention are compared with a mask over all keys.
"""

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from rorqual.layers import sparse
from rorqual.layers.attention import GQAConfig
from rorqual.layers.cache import Past
from rorqual.layers.context import context
from rorqual.layers.moba import MoBA, MoBAConfig
from rorqual.layers.nsa import NSA, NSAConfig
from rorqual.layers.rope import RopeConfig
from rorqual.layers.sparse import tile_queries
from rorqual.layers.tiles import TILE, block_mask, flex_tiles, loop_tiles

pytestmark = pytest.mark.nsa

SIZES = [  # queries, heads, groups, choices, chosen, block
    (300, 4, 2, 2, 3, 64),
    (257, 6, 2, 6, 4, 16),
    (384, 3, 1, 1, 9, 48),
    (129, 4, 4, 4, 1, 200),
    (128, 2, 1, 2, 2, 256),
    (40, 2, 2, 2, 2, 7),
]


def choice_of_tiles(time, choices, top_k, block, batch=2, tile=TILE):
    """Builds selections: own block first, then others before it; -1 where there are fewer.

    It is the format of best_blocks.
    """
    index = torch.full((batch, -(-time // tile), choices, top_k), -1)
    for b, n, j in torch.cartesian_prod(*map(torch.arange, index.shape[:3])).tolist():
        ours = n * tile // block
        picked = torch.tensor([ours, *torch.randperm(ours)[: top_k - 1].tolist()])
        index[b, n, j, : len(picked)] = picked
    return index


def mask_of(index, time, heads, block, tile=TILE):
    """Builds the mask, bool [B, H, T, T], with plain loops."""
    batch, _, choices, _ = index.shape
    mask = torch.zeros(batch, heads, time, time, dtype=torch.bool)
    for b, h, t in torch.cartesian_prod(
        torch.arange(batch), torch.arange(heads), torch.arange(time)
    ).tolist():
        first = t // tile * tile
        selected = [
            *index[b, t // tile, h * choices // heads].tolist(),
            *range(first // block, t // block + 1),
        ]
        for j in set(selected) - {-1}:
            mask[b, h, t, j * block : min((j + 1) * block, t + 1)] = True
    return mask


def tensors(time, heads, groups, batch=2, width=6, **kind):
    return [torch.randn(batch, time, n, width, **kind) for n in (heads, groups, groups)]


def masked(query, key, value, mask, scale):
    three = (x.transpose(1, 2) for x in (query, key, value))
    return F.scaled_dot_product_attention(
        *three, attn_mask=mask, scale=scale, enable_gqa=True
    ).transpose(1, 2)


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_the_loop_is_a_mask(size):
    """Compares forward and backward."""
    time, heads, groups, choices, top_k, block = size
    arguments = tensors(time, heads, groups, dtype=torch.float64, requires_grad=True)
    index = choice_of_tiles(time, choices, top_k, block)
    ours = loop_tiles(*arguments, index, 0, block, 0.4)
    expected = masked(*arguments, mask_of(index, time, heads, block), 0.4)
    torch.testing.assert_close(ours, expected, atol=1e-12, rtol=0)
    pull = torch.randn_like(ours)
    grads = (torch.autograd.grad((y * pull).sum(), arguments) for y in (ours, expected))
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, atol=1e-11, rtol=0)


@pytest.mark.parametrize("past", [1, 127, 128, 200])
def test_the_loop_behind_a_cache(past):
    time, heads, groups, choices, top_k, block = SIZES[0]
    query, key, value = tensors(time, heads, groups)
    index = choice_of_tiles(time, choices, top_k, block)
    whole = loop_tiles(query, key, value, index, 0, block, 0.4)
    piece = loop_tiles(query[:, past:], key, value, index[:, past // TILE :], past, block, 0.4)
    torch.testing.assert_close(piece, whole[:, past:], atol=1e-6, rtol=0)


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_the_blocks_for_flex_attention(size):
    """Tests which blocks the mask of FlexAttention includes."""
    time, heads, _, choices, top_k, block = size
    index = choice_of_tiles(time, choices, top_k, block)
    mask = mask_of(index, time, heads, block)
    width = -(-time // block)
    dense = block_mask(index, time, heads, block).to_dense()
    for b, h, n in torch.cartesian_prod(
        torch.arange(2), torch.arange(heads), torch.arange(index.shape[1])
    ).tolist():
        seen = mask[b, h, n * TILE : (n + 1) * TILE].any(0)
        expected = [int(seen[j * block : (j + 1) * block].any()) for j in range(width)]
        assert dense[b, h, n].tolist() == expected


@pytest.mark.slow
@pytest.mark.compiled
def test_flex_attention_is_the_loop():
    """Tests one size only, because compiling takes most of a minute."""
    time = 300
    heads = 4
    groups = 2
    choices = 4
    top_k = 3
    block = 32
    arguments = tensors(time, heads, groups, width=16)
    index = choice_of_tiles(time, choices, top_k, block)
    with torch.no_grad():
        ours = flex_tiles(*arguments, index, block, 0.4)
        expected = loop_tiles(*arguments, index, 0, block, 0.4)
    torch.testing.assert_close(ours, expected, atol=1e-5, rtol=0)


@pytest.mark.slow
@pytest.mark.compiled
def test_a_compiled_call_is_one_graph():
    """Compiles forward, backward and a prompt, for NSA and MoBA, with packed documents, too."""
    gqa = GQAConfig(heads=4, kv_heads=2, head_dim=8)
    rope = RopeConfig()
    hidden = torch.randn(2, 150, 32)
    nsa = NSAConfig(block=4, stride=2, select_block=4, top_k=3, window=5)
    packed = (torch.arange(150) // torch.tensor([[40], [7]])).long()
    tile = MoBA(MoBAConfig(block=4, top_k=2, choice="tile"), gqa, 32, rope)
    kinds = NSA(nsa, gqa, 32, rope), tile
    for attention, document_ids in itertools.product(kinds, (None, packed)):

        def call(x, attention=attention, document_ids=document_ids):
            return attention(
                x, context(*x.shape[:2], "cpu", document_ids=document_ids, rope=(rope, 8))
            )[0]

        compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
        ours, theirs = (hidden.clone().requires_grad_() for _ in range(2))
        out = compiled(ours)
        expected = call(theirs)
        torch.testing.assert_close(out, expected, atol=1e-5, rtol=0)
        for y in (out, expected):
            y.square().sum().backward()
        torch.testing.assert_close(ours.grad, theirs.grad, atol=1e-4, rtol=0)
        with torch.no_grad():
            torch.testing.assert_close(compiled(hidden), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("starts", "time", "expected"),
    [
        ([0, 0], 300, [0, 128, 256]),
        ([130, 130], 127, [126]),
        ([130, 130], 126, []),
        ([256, 256], 1, [0]),
        ([130, 140], 100, []),
        ([130, 200], 60, [*range(60)]),  # a tile starts in the second row alone
    ],
    ids=str,
)
def test_only_the_first_query_of_a_tile_selects(starts, time, expected):
    past = Past(2)
    past.append(starts)
    assert tile_queries(context(2, time, "cpu", past=past)).tolist() == expected


class Largest(TorchDispatchMode):
    """Records the number of elements of the largest tensor that is created."""

    elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for x in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(x, torch.Tensor):
                self.elements = max(self.elements, x.untyped_storage().nbytes() // x.element_size())
        return out


@pytest.mark.parametrize("choice", ["token", "tile"])
@pytest.mark.parametrize("kind", ["nsa", "moba", "full"])
@pytest.mark.parametrize("kernels", ["", "reference"])
def test_prefill_forms_no_square(kind, choice, kernels, monkeypatch):
    monkeypatch.setattr(sparse, "QUERIES", 64)
    monkeypatch.setenv("RORQUAL_KERNELS", kernels)
    gqa = GQAConfig(heads=2, kv_heads=1, head_dim=4)
    rope = RopeConfig()
    time = 2048
    attention = MoBA(MoBAConfig(block=64, top_k=3, choice=choice), gqa, 8, rope)
    if kind == "nsa":
        attention = NSA(NSAConfig(top_k=3, window=64, choice=choice), gqa, 8, rope)
    elif kind == "full":
        attention.full = True
    with torch.no_grad(), Largest() as largest:
        attention(torch.randn(1, time, 8), context(1, time, "cpu", rope=(rope, 4)))
    assert largest.elements <= 2 * 64 * time
