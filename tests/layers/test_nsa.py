"""Tests what NSA computes: its three branches, its selection, and the kernel for few tokens.

What every attention must do (causality, documents, padding, caches) is in test_attention_kinds.py.
"""

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from jaxtyping import TypeCheckError

from rorqual import kernels
from rorqual.kernels import nsa as kernel
from rorqual.layers import sparse, tiles
from rorqual.layers.attention import GQAConfig, Projected
from rorqual.layers.context import context
from rorqual.layers.nsa import NSA, Compressed, NSAConfig, attend_small_batch, importance_of
from rorqual.layers.rope import RopeConfig, rope_tables, rotate
from rorqual.layers.sparse import best_blocks

ROPE = RopeConfig(base=50.0)
BRANCHES = "compressed", "selected", "window"
SMALL = NSAConfig(block=4, stride=2, select_block=4, top_k=3, window=5)
SIZES = [
    SMALL,
    NSAConfig(block=6, stride=3, select_block=3, top_k=4, window=2),
    NSAConfig(block=4, stride=4, select_block=4, top_k=3, window=1),
    NSAConfig(block=2, stride=2, select_block=8, top_k=3, window=7),
    NSAConfig(block=8, stride=1, select_block=2, top_k=5, window=3),
]
SIZES += [replace(config, choice="tile") for config in SIZES[::2]]


@pytest.fixture(autouse=True, scope="module")
def small_tiles() -> Iterator[None]:
    """Makes tiles small, so that a few tokens fill several.

    The size 6 divides some of the blocks and is divided by others.
    """
    with pytest.MonkeyPatch.context() as patch:
        for module in (sparse, tiles):
            patch.setattr(module, "TILE", 6)
        yield


def layer(config=SMALL, heads=4, kv_heads=2, value_dim=None, dim=20):
    gqa = GQAConfig(heads=heads, kv_heads=kv_heads, head_dim=6, value_dim=value_dim)
    attention = NSA(config, gqa, dim, ROPE)
    for parameter in attention.parameters():
        torch.nn.init.normal_(parameter, std=0.4)
    return attention


def run(attention, hidden):
    return attention(hidden, context(*hidden.shape[:2], hidden.device, rope=(ROPE, 6))).out


def branches(attention, q, k, v, hidden, ctx):
    """Returns the three branches' outputs for given queries, keys and values, at a scale of 0.4."""
    outs = []
    for n in range(3):
        ours = torch.zeros(*q.shape[:2], 3, q.shape[2], dtype=q.dtype)
        ours[:, :, n] = 1.0
        outs.append(call(attention, q, k, v, hidden, ctx, lambda hidden, ours=ours: ours))
    return torch.stack(outs, 2)


def call(attention, q, k, v, hidden, ctx, gates=None):
    """Returns what the attention makes of given queries, keys and values, at a scale of 0.4."""
    copy = NSA(attention.nsa, attention.config, 20, ROPE)
    for name, module in attention.named_children():
        setattr(copy, name, module)
    copy.project = lambda hidden, ctx: Projected(q, k, v, None)
    copy.o_proj = Taken()
    copy.scale = 0.4
    if gates is not None:
        copy.gates = gates
    copy(hidden, ctx)
    return copy.o_proj.taken.unflatten(-1, (q.shape[2], -1))


class Taken(torch.nn.Module):
    """Stands for the output projection and records what it is given."""

    def forward(self, x):
        self.taken = x
        return x.new_zeros(*x.shape[:-1], 20)


def attended(q, keys, values, scale):
    """Attends from one query to these keys; zero if there are none."""
    return (keys @ q * scale).softmax(0) @ values if len(keys) else q.new_zeros(values.shape[-1])


def own_parameters(attention):
    """Returns the parameters that NSA adds to GQA's."""
    gqa = ("q_proj", "k_proj", "v_proj", "o_proj")
    return [x for name, x in attention.named_parameters() if not name.startswith(gqa)]


def own_pairs(inner, hidden):
    """Returns the rotated keys and the values of the compressed and of the window branch."""
    places = torch.arange(hidden.shape[1]).expand(len(hidden), -1)
    cos, sin = (x.to(hidden.dtype) for x in rope_tables(ROPE, inner.config.head_dim, places))
    pairs = []
    for linear in (inner.compressed_kv, inner.window_kv):
        both = linear(hidden).unflatten(-1, (inner.config.kv_heads, -1))
        key, value = both.split([inner.config.head_dim, inner.value_dim], -1)
        pairs.append((rotate(key, cos, sin, inner.interleaved), value))
    return pairs


def brute(inner, q, k, v, hidden, scale):
    """Computes the definition one query at a time, for one document that fills the sequence.

    Returns (compressed, selected, window).
    """
    c, (batch, time, heads, _) = inner.nsa, q.shape
    ours = own_pairs(inner, hidden)
    outs = [q.new_zeros(batch, time, heads, v.shape[-1]) for _ in range(3)]
    group = heads // k.shape[2]
    networks = inner.compress_key, inner.compress_value
    pair = [compress(network, x, c) for network, x in zip(networks, ours[0], strict=True)]
    for b, t, g in torch.cartesian_prod(
        *(torch.arange(n) for n in (batch, time, k.shape[2]))
    ).tolist():
        small = [x[b, :, g] for x in pair]
        of_group = slice(g * group, (g + 1) * group)
        columns = blocks_of(q[b, :, of_group], small[0], t, c, scale)
        columns = [
            s
            for j in columns
            for s in range(j * c.select_block, min((j + 1) * c.select_block, t + 1))
        ]
        past = complete(t, c)
        in_window = slice(max(0, t - c.window + 1), t + 1)
        for h in range(g * group, (g + 1) * group):
            outs[0][b, t, h] = attended(q[b, t, h], small[0][:past], small[1][:past], scale)
            outs[1][b, t, h] = attended(q[b, t, h], k[b, columns, g], v[b, columns, g], scale)
            outs[2][b, t, h] = attended(
                q[b, t, h], ours[1][0][b, in_window, g], ours[1][1][b, in_window, g], scale
            )
    return outs


def complete(t, c):
    """Returns the number of compressed blocks that a query sees."""
    return max(0, (t + 1 - c.block) // c.stride + 1)


def compress(network, x, c):
    """Compresses [B, L, G, P] to [B, M, G, P], one block at a time."""
    starts = [i * c.stride for i in range(complete(x.shape[1] - 1, c))]
    made = [network(x[:, s : s + c.block].transpose(1, 2)[:, None]) for s in starts]
    return torch.cat(made, dim=1) if made else x[:, :0]


def blocks_of(queries, small, t, c, scale):
    """Selects the selection blocks of token t, for queries [T, heads of a group, P].

    Scores are compared in float32, and of equal ones the later is taken.
    """
    chooser = t // tiles.TILE * tiles.TILE if c.choice == "tile" else t
    ours = chooser // c.select_block
    past = complete(chooser, c)
    score = dict.fromkeys(range(ours + 1), 0.0)
    for query in queries[chooser]:
        for i, weight in enumerate(
            (small[:past] @ query * scale).softmax(0).tolist() if past else []
        ):
            for piece in range(i * c.stride, i * c.stride + c.block, c.stride):
                score[piece // c.select_block] = score.get(piece // c.select_block, 0.0) + weight
    forced = {0, ours, max(0, ours - 1)}
    free = sorted(
        (j for j in range(ours) if j not in forced),
        key=lambda j: (torch.tensor(score[j]).float().item(), j),
    )
    cached = forced | set(
        free[len(free) - (c.top_k - len(forced)) :] if len(free) > c.top_k - len(forced) else free
    )
    return sorted(cached | set(range(ours, t // c.select_block + 1)))


@pytest.mark.parametrize("config", SIZES, ids=str)
@settings(max_examples=3, deadline=None, derandomize=True)
@given(
    time=st.integers(1, 23),
    heads=st.sampled_from([(1, 1), (3, 1), (4, 2), (2, 2)]),
    value_dim=st.sampled_from([None, 5]),
)
def test_is_its_definition(config, time, heads, value_dim):
    # In float32, rounding decides between nearly equal blocks.
    inner = layer(config, *heads, value_dim).double()
    torch.set_default_dtype(torch.float64)
    try:
        _compare(inner, config, time, heads, value_dim)
    finally:
        torch.set_default_dtype(torch.float32)


def _compare(inner, config, time, heads, value_dim):
    q = torch.randn(1, time, heads[0], 6)
    k = torch.randn(1, time, heads[1], 6)
    v = torch.randn(1, time, heads[1], value_dim or 6)
    hidden = torch.randn(1, time, 20)
    got = branches(inner, q, k, v, hidden, context(1, time, "cpu", rope=(ROPE, 6)))
    for name, ours, expected in zip(
        BRANCHES, got.unbind(2), brute(inner, q, k, v, hidden, 0.4), strict=True
    ):
        torch.testing.assert_close(
            ours, expected, atol=2e-5, rtol=0, msg=lambda text, name=name: f"{name}: {text}"
        )


@pytest.mark.parametrize("choice", ["token", "tile"])
def test_gradients_are_the_definitions(choice):
    inner, (time, heads, groups) = layer(replace(SMALL, choice=choice)), (18, 4, 2)
    q, k, v = (torch.randn(1, time, n, 6, requires_grad=True) for n in (heads, groups, groups))
    hidden = torch.randn(1, time, 20, requires_grad=True)
    where = context(1, time, "cpu", rope=(ROPE, 6))
    ours = call(inner, q, k, v, hidden, where)
    gates = torch.sigmoid(inner.gate_down(F.silu(inner.gate_up(hidden)))).unflatten(-1, (3, heads))
    expected = sum(
        gates[:, :, n, :, None] * x for n, x in enumerate(brute(inner, q, k, v, hidden, 0.4))
    )
    torch.testing.assert_close(ours, expected, atol=2e-5, rtol=0)
    pull = torch.randn_like(expected)
    inputs = [q, k, v, hidden, *own_parameters(inner)]
    for a, b in zip(
        *(torch.autograd.grad((y * pull).sum(), inputs) for y in (ours, expected)), strict=True
    ):
        torch.testing.assert_close(a, b, atol=5e-5 * max(1.0, b.abs().max().item()), rtol=0)


@pytest.mark.parametrize("choice", ["token", "tile"])
@pytest.mark.parametrize("heads", [(4, 2), (3, 1), (16, 1)])
@pytest.mark.parametrize("time", [1, 3, 16, 29])
def test_choosing_everything_is_full_attention(time, heads, choice):
    inner = layer(
        NSAConfig(block=4, stride=2, select_block=4, top_k=8, window=32, choice=choice), *heads
    )
    q, k, v = (
        torch.randn(2, time, n, 6, requires_grad=True) for n in (heads[0], heads[1], heads[1])
    )
    hidden = torch.randn(2, time, 20)
    where = context(2, time, "cpu", rope=(ROPE, 6))

    def full(key, value):
        three = (x.transpose(1, 2) for x in (q, key, value))
        return F.scaled_dot_product_attention(
            *three, is_causal=True, scale=0.4, enable_gqa=True
        ).transpose(1, 2)

    got = branches(inner, q, k, v, hidden, where)
    _, selected, window = got.unbind(2)
    torch.testing.assert_close(selected, full(k, v), atol=1e-5, rtol=0)
    ours = own_pairs(inner, hidden)[1]
    torch.testing.assert_close(window, full(*ours), atol=1e-5, rtol=0)
    pull = torch.randn_like(selected)
    grads = (torch.autograd.grad((y * pull).sum(), (q, k, v)) for y in (selected, full(k, v)))
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=0)


@pytest.mark.parametrize("heads", [(16, 1), (6, 2), (3, 3)])
@pytest.mark.parametrize("time", [5, 8, 45])
def test_is_the_naive_code_of_flash_linear_attention(heads, time):
    """Compares forward and backward.

    Their code has l = d = l' and means; the incomplete block at the end is one that no query sees.
    """
    naive = pytest.importorskip(
        "fla.ops.nsa.naive", reason="fla-core is not installed", exc_type=ImportError
    )
    inner = layer(NSAConfig(block=8, stride=8, select_block=8, top_k=4, window=1), *heads)
    for network in (inner.compress_key, inner.compress_value):
        torch.nn.init.zeros_(network.down.weight)
    q, k, v = (
        torch.randn(2, time, n, 6, requires_grad=True) for n in (heads[0], heads[1], heads[1])
    )
    hidden = torch.randn(2, time, 20, requires_grad=True)
    where = context(2, time, "cpu", rope=(ROPE, 6))
    ours = branches(inner, q, k, v, hidden, where)[:, :, :2]
    pairs = own_pairs(inner, hidden)[0]
    small = [torch.stack([piece.mean(1) for piece in x.split(8, 1)], 1) for x in pairs]
    compressed, _ = naive.naive_nsa_compression(q, *small, 8, 0.4)
    selected = naive.naive_nsa_selection(
        q, k, v, naive.naive_nsa_topk(q, small[0], 4, 8, 0.4), 8, 0.4
    )
    theirs = torch.stack([compressed, selected], 2)
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)
    pull = torch.randn_like(theirs)
    grads = (
        torch.autograd.grad((y * pull).sum(), (q, k, v, hidden), retain_graph=True)
        for y in (ours, theirs)
    )
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, atol=2e-5, rtol=0)


def test_importance_weights_of_the_paper():
    share = importance_of(torch.eye(31), 8, NSAConfig())  # [M, J] of 512 keys
    for j in range(1, 7):
        assert share[4 * j - 1 : 4 * j + 4, j].tolist() == [1, 2, 2, 2, 1]
        assert share[:, j].sum() == 8


@pytest.mark.parametrize("config", SIZES, ids=str)
@pytest.mark.parametrize("time", [1, 5, 9, 24, 31])
def test_importance_is_the_count_of_pieces(config, time):
    """Compares the sums over strides, used without documents and padding, with W written out."""
    count = -(-time // config.select_block)
    blocks = max(0, (time - config.block) // config.stride + 1)
    share = torch.zeros(blocks, count)
    for i in range(blocks):
        for key in range(i * config.stride, i * config.stride + config.block, config.stride):
            share[i, key // config.select_block] += 1
    probabilities = torch.rand(2, blocks)
    torch.testing.assert_close(
        importance_of(probabilities, count, config), probabilities @ share, atol=1e-5, rtol=0
    )


def test_a_query_before_the_first_complete_block_gets_nothing_from_the_compressed():
    inner = layer()
    q = torch.randn(1, 9, 4, 6)
    k = torch.randn(1, 9, 2, 6)
    v = torch.randn(1, 9, 2, 6)
    hidden = torch.randn(1, 9, 20)
    compressed = branches(inner, q, k, v, hidden, context(1, 9, "cpu", rope=(ROPE, 6)))[:, :, 0]
    assert (compressed[:, :3] == 0).all()
    assert (compressed[:, 3:] != 0).all()


@pytest.mark.parametrize("choice", ["token", "tile"])
def test_each_branch_and_gate_learns(choice):
    attention = layer(replace(SMALL, choice=choice))
    run(attention, torch.randn(2, 20, 20)).square().sum().backward()
    for name, parameter in attention.named_parameters():
        assert parameter.grad.abs().max() > 0, name


@pytest.mark.parametrize("choice", ["token", "tile"])
def test_the_choice_carries_no_gradient(choice):
    inner = layer(replace(SMALL, choice=choice))
    q, k, v = (torch.randn(1, 20, n, 6) for n in (4, 2, 2))
    hidden = torch.randn(1, 20, 20)
    got = branches(inner, q, k.requires_grad_(), v, hidden, context(1, 20, "cpu", rope=(ROPE, 6)))
    got[:, :, 1].sum().backward()
    assert not any(
        parameter.grad.any() for parameter in inner.parameters() if parameter.grad is not None
    )


@pytest.mark.parametrize("choice", ["token", "tile"])
def test_runs_of_queries_change_nothing(monkeypatch, choice):
    attention = layer(replace(SMALL, choice=choice))
    hidden = torch.randn(2, 23, 20)
    whole = run(attention, hidden)
    monkeypatch.setattr(sparse, "QUERIES", 5)
    torch.testing.assert_close(run(attention, hidden), whole, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"block": 24}, "block: got 24, expected a multiple of the stride, 16"),
        ({"select_block": 40}, "select_block: got 40, expected a multiple of the stride, 16"),
        ({"top_k": 2}, "top_k: got 2, expected at least 3"),
        ({"window": 0}, "window: got 0, expected at least 1"),
        ({"stride": 0}, "stride: got 0, expected at least 1"),
    ],
)
def test_bad_configs_say_so(wrong, message):
    with pytest.raises(ValueError, match=message):
        NSAConfig(**wrong)


def test_an_unknown_choice_says_so():
    with pytest.raises((ValueError, TypeCheckError), match="choice"):
        NSAConfig(choice="block")


def compressed_means(key, document_ids, config):
    """Compresses every document of equally packed rows, whose values are not needed, to means."""
    ctx = context(*document_ids.shape, "cpu", document_ids=document_ids)
    segment = sparse.segments(ctx, config.select_block)
    keys = []
    ends = []
    pieces = []
    for document in document_ids[0].unique():
        columns = (document_ids[0] == document).nonzero().flatten()
        for first in range(0, len(columns) - config.block + 1, config.stride):
            block = columns[first : first + config.block]
            keys.append(key[:, block].mean(1))
            ends.append(block[-1])
            pieces.append(segment[0, block[:: config.stride]])
    ends, pieces = (torch.stack(x).expand(len(key), -1, *x[0].shape) for x in (ends, pieces))
    ends = ends.reshape(len(key), -1)
    keys = torch.stack(keys, 1)
    return Compressed(keys, keys, ends, pieces, torch.ones_like(ends, dtype=torch.bool), segment)


def selection_of(attention, query, blocks, ctx):
    """Returns the selection of every query, or of the first of each tile."""
    if attention.tiles:
        return attention.select(query, blocks, ctx)
    _, selection = attention.attend_compressed(query, blocks, ctx)
    return selection


@pytest.mark.parametrize("choice", ["token", "tile"])
@pytest.mark.parametrize("packed", [False, True])
def test_autocast_changes_no_choice(choice, packed):
    """In bfloat16, scores of neighbouring blocks would be equal."""
    inner = layer(replace(SMALL, top_k=6, choice=choice))
    query = torch.randn(2, 90, 4, 6)
    key = torch.randn(2, 90, 2, 6)
    document_ids = (torch.arange(90) // 70).expand(2, -1)
    ctx = context(2, 90, "cpu", document_ids=document_ids if packed else None)
    if packed:
        blocks = compressed_means(key, document_ids, SMALL)
    else:
        means = sparse.windows(key, SMALL.block, SMALL.stride).mean(-2)
        blocks = Compressed(means, means)
    expected = selection_of(inner, query, blocks, ctx)
    with torch.autocast("cpu", torch.bfloat16):
        result = selection_of(inner, query, blocks, ctx)
    assert torch.equal(result.blocks, expected.blocks)


@pytest.fixture
def references(monkeypatch):
    """Makes the functions of layers the references; the kernel is called by its own name."""
    monkeypatch.setenv(kernels.VARIABLE, "reference")


def small_batch(config, batch, time, heads, groups, widths, length, shorter=(0, 0, 0), top_k=None):
    """Builds the arguments of `attend_small_batch` for the last `time` of `length` tokens.

    A row has as many fewer as `shorter` says, and keys are in longer buffers.
    """
    positions = length - torch.tensor(shorter)[:batch, None] - time + torch.arange(time)
    blocks = complete(length - 1, config)
    shapes = [
        (length, widths[0]),
        (length, widths[1]),
        (blocks, widths[0]),
        (blocks, widths[1]),
    ] + [(length, width) for width in widths]
    pairs = [torch.randn(batch, count + 3, groups, width)[:, :count] for count, width in shapes]
    index = None
    if top_k is not None:
        scores = torch.rand(batch, time, groups, -(-length // config.select_block))
        index = best_blocks(
            scores, positions // config.select_block, torch.zeros_like(positions), top_k
        )
    query = torch.randn(batch, time, heads, widths[0])
    return query, *pairs, index, positions, config, 0.4


@pytest.mark.parametrize(
    "way", [kernel.attend_small_batch, attend_small_batch], ids=["kernel", "reference"]
)
def test_few_tokens_read_their_blocks_and_window_only(way, references):
    """NaN replaces the selected branch's other keys, and those outside of the window."""
    arguments = small_batch(SMALL, 2, 2, 4, 2, (6, 5), 41, (0, 7), top_k=3)
    expected = attend_small_batch(*arguments)
    _, key, value, _, _, window_key, window_value, index, positions, *_ = arguments
    read = torch.zeros(2, 41, 2, 2, dtype=torch.bool)  # of each group: its blocks, its window
    for b, t, g, k in torch.cartesian_prod(*map(torch.arange, index.shape)).tolist():
        first = 4 * max(0, int(index[b, t, g, k]))
        end = int(positions[b, t]) + 1
        read[b, first : first + 4, g, 0] = True
        read[b, max(0, end - SMALL.window) : end, g, 1] = True
    for n, pair in enumerate([(key, value), (window_key, window_value)]):
        for x in pair:
            x[~read[..., n]] = torch.nan
    torch.testing.assert_close(way(*arguments), expected, atol=5e-6, rtol=0)


def test_of_equally_important_blocks_the_later(references):
    """All keys have equal scores, so every block of the sequence is equally important."""
    config = NSAConfig(block=4, stride=2, select_block=4, top_k=5, window=1)
    arguments = list(small_batch(config, 1, 1, 2, 1, (3, 1), 40))
    arguments[3] = torch.zeros_like(arguments[3])  # compressed keys
    arguments[2] = torch.zeros(1, 40, 1, 1).scatter_(
        1, torch.tensor([0, 12, 24, 28, 32, 36]).view(1, -1, 1, 1), 1.0
    )
    arguments[1] = torch.zeros_like(arguments[1])
    for way in (kernel.attend_small_batch, attend_small_batch):
        # Blocks 0, 6, 7, 8 and 9 are selected.
        torch.testing.assert_close(way(*arguments)[0, 0, 1, :, 0], torch.tensor([5 / 20, 5 / 20]))
        arguments[2][0, 8:20] = 9.0
        torch.testing.assert_close(way(*arguments)[0, 0, 1, :, 0], torch.tensor([5 / 20, 5 / 20]))


def test_blocks_are_selected_by_what_no_sum_shows(references):
    """exp(-50) next to 1 changes no mean of values and still is more than exp(-60)."""
    config = NSAConfig(block=4, stride=4, select_block=4, top_k=4, window=1)
    arguments = list(small_batch(config, 1, 1, 2, 1, (1, 1), 40))
    arguments[0], arguments[1] = torch.ones_like(arguments[0]), torch.zeros_like(arguments[1])
    arguments[2] = (torch.arange(40.0) // 4).view(1, 40, 1, 1)
    arguments[3] = (
        torch.tensor([0.0, -60, -50, -52, -54, -56, -58, -62, -64, 0]).view(1, 10, 1, 1) / 0.4
    )
    for way in (kernel.attend_small_batch, attend_small_batch):
        out = way(*arguments)[0, 0, 1, :, 0]
        torch.testing.assert_close(out, torch.full((2,), (0 + 2 + 8 + 9) / 4))


@pytest.mark.parametrize("batch", [0, 1])
def test_the_kernel_takes_an_empty_batch_and_fewer_blocks_than_may_be_selected(batch, references):
    arguments = list(small_batch(NSAConfig(), batch, 2, 4, 2, (6, 5), 300))
    torch.testing.assert_close(
        kernel.attend_small_batch(*arguments), attend_small_batch(*arguments), atol=5e-6, rtol=0
    )
    arguments[7] = torch.tensor([4, 0]).expand(batch, 2, 2, 2)
    for _ in range(20):
        freed = [torch.ones(n, dtype=torch.long) for n in range(8, 48)]
        del freed  # the memory that is allocated next contains block 1
        torch.testing.assert_close(
            kernel.attend_small_batch(*arguments), attend_small_batch(*arguments), atol=5e-6, rtol=0
        )
