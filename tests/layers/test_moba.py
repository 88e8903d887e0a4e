from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from jaxtyping import TypeCheckError

from rorqual.layers import moba, selection, tiles
from rorqual.layers.attention import GQA, GQACache, GQAConfig
from rorqual.layers.basics import RopeConfig
from rorqual.layers.cache import Appended, BlockCache, Past
from rorqual.layers.context import context
from rorqual.layers.moba import MoBA, MoBAConfig, switch

ROPE = RopeConfig(base=50.0)
CHOICES = pytest.mark.parametrize("choice", ["token", "tile"])


@pytest.fixture(autouse=True, scope="module")
def small_tiles() -> Iterator[None]:
    """Makes tiles small, so that a few tokens fill several.

    The size 6 divides some of the blocks and is divided by others.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tiles, "TILE", 6)
        yield


def brute(query, key, value, scale, block, chosen, choice="token"):
    """Computes the definition one query head at a time.

    One document fills the sequence.
    """
    out = query.new_zeros(*query.shape[:3], value.shape[-1])
    for b in range(query.shape[0]):
        for t in range(query.shape[1]):
            for h in range(query.shape[2]):
                g = h * key.shape[2] // query.shape[2]
                chooser = t // tiles.TILE * tiles.TILE if choice == "tile" else t
                own, asking = chooser // block, query[b, chooser, h]
                score = {
                    i: (asking @ key[b, i * block : (i + 1) * block, g].mean(0)).float().item()
                    for i in range(own)
                }
                kept = sorted(score, key=lambda i, score=score: (score[i], i))[::-1][: chosen - 1]
                kept += range(own, t // block + 1)
                columns = [s for i in kept for s in range(i * block, min((i + 1) * block, t + 1))]
                weights = (key[b, columns, g] @ query[b, t, h] * scale).softmax(0)
                out[b, t, h] = weights @ value[b, columns, g]
    return out


def tensors(batch, time, heads=4, groups=2, width=6, value_width=6, **kind):
    shapes = (time, heads, width), (time, groups, width), (time, groups, value_width)
    return [torch.randn(batch, *shape, requires_grad=True, **kind) for shape in shapes]


def call(inner, q, k, v, cache=None, history=None, scale=0.4, **known):
    kept = BlockCache(GQACache(Appended(), Appended(), cache)) if cache is not None else None
    return inner(
        q,
        k,
        v,
        q.flatten(2),
        context(*q.shape[:2], q.device, past=history, cache=kept, **known),
        scale,
    )


def layer(block=4, chosen=2, decode="sparse", kv_heads=2, choice="token"):
    attention = GQA(
        GQAConfig(heads=4, kv_heads=kv_heads, head_dim=6),
        20,
        ROPE,
        MoBA(MoBAConfig(block=block, chosen=chosen, decode=decode, choice=choice)),
    )
    for parameter in attention.parameters():
        torch.nn.init.normal_(parameter, std=0.4)
    return attention


def run(attention, hidden, past=None, cache=None, **known):
    kept = BlockCache(cache) if cache is not None else None
    known |= {"past": past, "rope": (ROPE, attention.rope_dim), "cache": kept}
    return attention(hidden, context(*hidden.shape[:2], hidden.device, **known))[0]


@settings(max_examples=20, deadline=None, derandomize=True)
@given(
    st.integers(1, 2),
    st.integers(1, 19),
    st.integers(1, 7),
    st.integers(1, 5),
    st.sampled_from([(1, 1), (4, 1), (6, 2), (3, 3), (16, 1)]),
    st.sampled_from(["token", "tile"]),
)
def test_is_its_definition(batch, time, block, chosen, heads, choice):
    q, k, v = tensors(batch, time, *heads, value_width=5, dtype=torch.float64)
    inner = MoBA(MoBAConfig(block=block, chosen=chosen, choice=choice))
    ours, expected = call(inner, q, k, v), brute(q, k, v, 0.4, block, chosen, choice)
    torch.testing.assert_close(ours, expected, atol=1e-10, rtol=0)
    pull = torch.randn_like(expected)
    grads = [torch.autograd.grad((y * pull).sum(), (q, k, v)) for y in (ours, expected)]
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, atol=1e-10, rtol=0)


@pytest.mark.parametrize("time", [1, 3, 4, 17, 32])
def test_choosing_everything_is_full_attention(time):
    q, k, v = tensors(2, time)
    full = F.scaled_dot_product_attention(
        *(x.transpose(1, 2) for x in (q, k, v)), is_causal=True, scale=0.4, enable_gqa=True
    ).transpose(1, 2)
    pull = torch.randn_like(full)
    grads = torch.autograd.grad((full * pull).sum(), (q, k, v))
    swapped = MoBA(MoBAConfig(block=4, chosen=1))
    swapped.full = True
    every = (
        MoBAConfig(block=4, chosen=8),
        MoBAConfig(block=64, chosen=1),
        MoBAConfig(block=4, chosen=8, choice="tile"),
    )
    for inner in (*map(MoBA, every), swapped):
        ours = call(inner, q, k, v)
        torch.testing.assert_close(ours, full, atol=1e-5, rtol=0)
        for a, b in zip(torch.autograd.grad((ours * pull).sum(), (q, k, v)), grads, strict=True):
            torch.testing.assert_close(a, b, atol=1e-5, rtol=0)


def test_one_block_is_block_diagonal():
    q, k, v = tensors(1, 14)
    ours = call(MoBA(MoBAConfig(block=4, chosen=1)), q, k, v)
    pieces = [
        call(MoBA(MoBAConfig(block=4, chosen=1)), *(x[:, s : s + 4] for x in (q, k, v)))
        for s in range(0, 14, 4)
    ]
    torch.testing.assert_close(ours, torch.cat(pieces, 1), atol=1e-6, rtol=0)


@CHOICES
def test_no_query_sees_what_comes_after_it(choice):
    attention, hidden = layer(choice=choice), torch.randn(1, 19, 20)
    before = run(attention, hidden)
    for t in range(19):
        changed = hidden.clone()
        changed[:, t:] += 3.0 * torch.randn(1, 19 - t, 20)
        after = run(attention, changed)
        torch.testing.assert_close(after[:, :t], before[:, :t], atol=1e-6, rtol=0)
        assert (after[:, t] - before[:, t]).abs().max() > 1e-3


def test_the_choice_and_the_means_carry_no_gradient():
    q, k, v = tensors(1, 12, 1, 1)
    call(MoBA(MoBAConfig(block=4, chosen=2)), q, k, v)[:, -1].sum().backward()
    touched = k.grad[0].flatten(1).abs().sum(1) > 0
    # The own block and one other are read; of the third only the mean is used.
    assert touched.view(3, 4).all(1).tolist().count(True) == 2


@CHOICES
def test_packed_documents_attend_as_if_alone(choice):
    attention, lengths = layer(choice=choice), (7, 1, 13, 4)
    hidden = torch.randn(1, sum(lengths), 20)
    documents = torch.repeat_interleave(torch.arange(4), torch.tensor(lengths))[None]
    alone = torch.cat([run(attention, part) for part in hidden.split(lengths, 1)], 1)
    torch.testing.assert_close(
        run(attention, hidden, documents=documents), alone, atol=1e-5, rtol=0
    )


@CHOICES
def test_packed_documents_go_on_behind_a_cache(choice):
    """New documents begin in any call; tokens without document ids belong to the last one.

    Gradients are as if each document were alone.
    """
    attention, hidden = layer(choice=choice), torch.randn(2, 30, 20)
    documents = torch.arange(30) // torch.tensor([[11], [4]])
    whole = run(attention, hidden, documents=documents)
    past, cache, done, outs = Past(), attention.new_cache(2, 8, hidden.dtype, hidden.device), 0, []
    for count in (9, 1, 1, 6, 1, 2, 10):
        part = slice(done, done + count)
        goes_on = done > 0 and torch.equal(documents[:, done - 1], documents[:, done + count - 1])
        told = {} if goes_on else {"documents": documents[:, part]}
        outs.append(run(attention, hidden[:, part], past, cache, **told))
        done += count
    torch.testing.assert_close(torch.cat(outs, 1), whole, atol=1e-5, rtol=0)
    pull, inputs = torch.randn_like(whole), list(attention.parameters())
    alone = [
        run(attention, part)
        for row, size in ((0, 11), (1, 4))
        for part in hidden[row : row + 1].split(size, 1)
    ]
    alone = torch.cat(alone, 1).view_as(whole)
    grads = (torch.autograd.grad((y * pull).sum(), inputs) for y in (whole, alone))
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, atol=1e-4 * max(1.0, b.abs().max().item()), rtol=0)


@pytest.mark.parametrize("side", ["left", "right", "both"])
@CHOICES
def test_padding_changes_nothing(side, choice):
    attention, hidden = layer(choice=choice), torch.randn(2, 15, 20)
    left, right = 3 * (side != "right"), 5 * (side != "left")
    padded = torch.cat([torch.randn(2, left, 20), hidden, torch.randn(2, right, 20)], 1)
    present = torch.zeros(2, padded.shape[1], dtype=torch.bool)
    present[:, left : left + 15] = True
    out = run(attention, padded, present=present)
    assert out.isfinite().all()
    torch.testing.assert_close(out[:, left : left + 15], run(attention, hidden), atol=1e-5, rtol=0)


@pytest.mark.parametrize("pieces", [[1] * 40, [13] + [1] * 27, [20, 3, 1, 1, 7, 8], [40]])
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@CHOICES
def test_decoding_equals_one_call(pieces, kv_heads, choice):
    attention, hidden = layer(kv_heads=kv_heads, choice=choice), torch.randn(2, 40, 20)
    past, cache, outs = Past(), attention.new_cache(2, 8, hidden.dtype, hidden.device), []
    for part in hidden.split(pieces, 1):
        outs.append(run(attention, part, past, cache))
    torch.testing.assert_close(torch.cat(outs, 1), run(attention, hidden), atol=1e-5, rtol=0)


def test_decoding_reads_the_chosen_blocks_only():
    inner, history = MoBA(MoBAConfig(block=4, chosen=2)), Past()
    q, k, v = (x.detach() for x in tensors(1, 41, 1, 1))
    cache = inner.new_cache(1, 64, q.dtype, q.device)
    call(inner, q[:, :40], k[:, :40], v[:, :40], cache=cache, history=history)
    index = moba.choose(
        q[:, 40:], cache.means.made.buffer[:, :10], torch.tensor([[10]]), torch.tensor([[0]]), 2
    )
    spoiled = torch.full_like(v, torch.nan)
    for i in index.flatten().tolist():
        spoiled[:, 4 * i : 4 * i + 4] = v[:, 4 * i : 4 * i + 4]
    k_spoiled = torch.where(spoiled.isnan(), torch.nan, k)
    out = call(inner, q[:, 40:], k_spoiled, spoiled, cache=cache, history=history)
    torch.testing.assert_close(out, brute(q, k, v, 0.4, 4, 2)[:, 40:], atol=1e-5, rtol=0)


@CHOICES
def test_the_cache_forgets_and_reorders(choice):
    attention, hidden = layer(choice=choice), torch.randn(3, 33, 20)
    past, cache = Past(), attention.new_cache(3, 8, hidden.dtype, hidden.device)
    run(attention, hidden[:, :20], past, cache)
    run(attention, torch.randn(3, 7, 20), past, cache)
    for kept in (past, cache):
        kept.crop(7)
    index = torch.tensor([2, 0])
    for kept in (past, cache):
        kept.select(index)
    outs = [run(attention, part, past, cache) for part in hidden[index, 20:].split(1, 1)]
    torch.testing.assert_close(
        torch.cat(outs, 1), run(attention, hidden[index])[:, 20:], atol=1e-5, rtol=0
    )
    past.reset()
    cache.reset()
    torch.testing.assert_close(run(attention, hidden[:2], past, cache), run(attention, hidden[:2]))


@CHOICES
@pytest.mark.parametrize("kernels", ["", "reference"])
@pytest.mark.parametrize("decode", ["sparse", "full"])
def test_rows_of_any_length_decode_as_if_alone(choice, kernels, decode, monkeypatch):
    """Sequences of any length decode as if alone.

    They are reordered, cropped and reset on the way, and come one token and several at a time.
    Sparse attention uses no mask.
    """
    monkeypatch.setenv("RORQUAL_KERNELS", kernels)
    attention, hidden, lead = (
        layer(choice=choice, decode=decode),
        torch.randn(3, 50, 20),
        torch.tensor([0, 6, 13]),
    )
    present = torch.arange(50) >= lead[:, None]
    past, cache = Past(), attention.new_cache(3, 8, hidden.dtype, hidden.device)
    expected = {}
    for row, start in enumerate(lead.tolist()):
        alone_past, alone = Past(), attention.new_cache(1, 8, hidden.dtype, hidden.device)
        parts = hidden[row : row + 1, start:].split([14 - start, *[1] * 36], 1)
        expected[row] = torch.cat([run(attention, part, alone_past, alone) for part in parts], 1)[0]
    for index in (torch.tensor([1, 2]), torch.tensor([2, 0, 2])):
        prompt = run(attention, hidden[:, :14], past, cache, present=present[:, :14])
        for row, start in enumerate(lead.tolist()):
            torch.testing.assert_close(
                prompt[row, start:], expected[row][: 14 - start], atol=1e-5, rtol=0
            )
        # Without `present` this token would be valid, too.
        run(attention, hidden[:, 14:15], past, cache, present=present[:, 14:15])
        run(attention, torch.randn(3, 1, 20), past, cache)
        for kept in (past, cache):
            kept.crop(1)
            kept.select(index)
        late = torch.cat(
            [run(attention, part, past, cache) for part in hidden[index, 15:].split([1] * 35, 1)], 1
        )
        for place, row in enumerate(index.tolist()):
            torch.testing.assert_close(
                late[place], expected[row][15 - lead[row] :], atol=1e-5, rtol=0
            )
        for kept in (past, cache):
            kept.reset()


@CHOICES
def test_padded_rows_take_no_mask_and_no_mean_anew(choice, monkeypatch):
    attention, hidden = layer(choice=choice), torch.randn(2, 41, 20)
    present = torch.arange(41) >= torch.tensor([[0], [5]])
    expected = run(attention, hidden, present=present)[:, 40:]
    past, cache = Past(), attention.new_cache(2, 64, hidden.dtype, hidden.device)
    run(attention, hidden[:, :39], past, cache, present=present[:, :39])
    monkeypatch.setattr(moba, "block_means", None)
    run(attention, hidden[:, 39:40], past, cache)
    torch.testing.assert_close(
        run(attention, hidden[:, 40:], past, cache), expected, atol=1e-5, rtol=0
    )


@CHOICES
@pytest.mark.parametrize("lead", [[0, 0], [0, 7]])
@pytest.mark.parametrize("before", [0, 9])
def test_the_last_token_alone_gets_what_it_gets_among_all(choice, lead, before):
    attention, hidden = layer(choice=choice), torch.randn(2, 31, 20)
    present = torch.arange(31) >= torch.tensor(lead)[:, None]
    cuts = slice(before), slice(before, 30), slice(30), slice(31)
    known = [{"present": present[:, cut]} if any(lead) else {} for cut in cuts]
    past, cache = Past(), attention.new_cache(2, 8, hidden.dtype, hidden.device)
    if before:
        run(attention, hidden[:, :before], past, cache, **known[0])
    expected = run(attention, hidden[:, :30], **known[2])[:, -1:]
    found = run(attention, hidden[:, before:30], past, cache, last_only=True, **known[1])
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
    following = run(attention, hidden[:, 30:], past, cache)
    torch.testing.assert_close(
        following, run(attention, hidden, **known[3])[:, -1:], atol=1e-5, rtol=0
    )


@CHOICES
def test_the_last_of_a_prompt_is_no_single_new_token(choice):
    """The last token of a prompt attends as the others of its call, even if only it is needed.

    decode="full" begins after the prompt.
    """
    attention, hidden = layer(decode="full", choice=choice), torch.randn(2, 30, 20)
    expected = run(attention, hidden)[:, -1:]
    for cache in (None, attention.new_cache(2, 8, hidden.dtype, hidden.device)):
        found = run(attention, hidden, None, cache, last_only=True)
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


@CHOICES
def test_full_decoding_after_sparse_prefill(choice):
    """Several tokens at once are sparse again after full decoding.

    The selection of the single tokens' tile has been cached.
    """
    sparse, full, hidden = (
        layer(choice=choice),
        layer(decode="full", choice=choice),
        torch.randn(1, 34, 20),
    )
    full.load_state_dict(sparse.state_dict())
    past, cache = Past(), full.new_cache(1, 8, hidden.dtype, hidden.device)
    whole = run(sparse, hidden)
    torch.testing.assert_close(
        run(full, hidden[:, :23], past, cache), whole[:, :23], atol=1e-5, rtol=0
    )
    out = [run(full, hidden[:, t : t + 1], past, cache) for t in range(23, 26)]
    torch.testing.assert_close(
        run(full, hidden[:, 26:], past, cache), whole[:, 26:], atol=1e-5, rtol=0
    )
    full.inner.full = True
    torch.testing.assert_close(torch.cat(out, 1), run(full, hidden)[:, 23:26], atol=1e-5, rtol=0)


def test_a_layer_is_full_while_it_is_told_to_be():
    """Tests full attention in one call and in pieces after a cache; then sparse attention again."""
    attention, hidden = layer(), torch.randn(2, 23, 20)
    sparse, past, cache = (
        run(attention, hidden),
        Past(),
        attention.new_cache(2, 8, hidden.dtype, hidden.device),
    )
    attention.inner.full = True
    whole = run(attention, hidden)
    plain = GQA(attention.config, 20, ROPE)
    plain.load_state_dict(attention.state_dict())
    torch.testing.assert_close(whole, run(plain, hidden), atol=1e-5, rtol=0)
    parts = torch.cat(
        [run(attention, part, past, cache) for part in hidden.split([7, 9, 1, 6], 1)], 1
    )
    torch.testing.assert_close(parts, whole, atol=1e-5, rtol=0)
    attention.inner.full = False
    torch.testing.assert_close(run(attention, hidden), sparse)


@CHOICES
def test_runs_of_queries_change_nothing(monkeypatch, choice):
    attention, hidden = layer(choice=choice).double(), torch.randn(2, 23, 20, dtype=torch.float64)
    whole = run(attention, hidden)
    monkeypatch.setattr(selection, "QUERIES", 5)
    torch.testing.assert_close(run(attention, hidden), whole, atol=1e-12, rtol=0)


@pytest.mark.parametrize("wrong", [{"block": 0}, {"chosen": 0}])
def test_bad_sizes_say_so(wrong):
    with pytest.raises(ValueError, match="got 0, expected at least 1"):
        MoBAConfig(**wrong)


def test_unknown_words_say_so():
    for name in ("choice", "decode"):
        with pytest.raises((ValueError, TypeCheckError), match=name):
            MoBAConfig(**{name: "block"})


def test_the_last_layers_and_the_last_phase_are_full():
    model = torch.nn.ModuleList(MoBA(MoBAConfig(full_layers=2), left) for left in (3, 2, 1))
    assert [part.full for part in model] == [False, True, True]
    switch(model, True)
    assert all(part.full for part in model)
    switch(model, False)
    assert [part.full for part in model] == [False, True, True]
    # A layer that always attends fully needs no block means.
    assert model[2].new_cache(2, 8, torch.float32, torch.device("cpu")) is None
    for wrong in ({"full_layers": -1}, {"full_from": 1.1}):
        with pytest.raises(ValueError, match="moba: got full_layers"):
            MoBAConfig(**wrong)


@CHOICES
def test_autocast_changes_no_choice(choice, monkeypatch):
    """In bfloat16, scores of neighbouring blocks would be equal."""
    chosen, own = [], moba.choose
    monkeypatch.setattr(moba, "choose", lambda *given: chosen.append(own(*given)) or chosen[-1])
    inner, given = MoBA(MoBAConfig(block=2, chosen=4, choice=choice)), tensors(3, 90)
    call(inner, *given)
    with torch.autocast("cpu", torch.bfloat16):
        call(inner, *given)
    half = len(chosen) // 2
    assert half and all(map(torch.equal, chosen[:half], chosen[half:]))
