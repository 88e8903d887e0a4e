"""Tests the rows that configs and ids address, and what is saved and refused.

The rows are compared with the authors' code and with a plain loop.
"""

import copy
import hashlib
import json
import math
import pathlib
import pickle
from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers import DynamicCache
from transformers.models.qwen4_exp import modeling_qwen4_exp
from transformers.models.qwen4_exp.configuration_qwen4_exp import Qwen4ExpTextConfig
from transformers.models.qwen4_exp.modeling_qwen4_exp import Qwen4ExpTextNGramEmbedding

from rorqual import kernels
from rorqual.config import from_dict
from rorqual.layers.addresses import (
    WORTH_KEEPING,
    Addresses,
    EngramConfig,
    draw_multipliers,
    hash_rows,
    head_primes,
    row_totals,
)
from rorqual.layers.cache import Past
from rorqual.layers.context import context

pytestmark = pytest.mark.engram


def kernels_on_the_cpu(operation: kernels.Operation) -> dict[str, Callable]:
    reasons = operation.choice.reasons(torch.device("cpu"))
    return {kind: operation.choice.load(kind) for kind, reason in reasons.items() if not reason}


GOLDEN = pathlib.Path(__file__).resolve().parents[1] / "golden"
HASHES = json.loads((GOLDEN / "engram_hash.json").read_text(encoding="utf-8"))


KERNELS = kernels_on_the_cpu(hash_rows)
EVERY = pytest.mark.parametrize(
    "rows_of", [hash_rows.reference, *KERNELS.values()], ids=["reference", *KERNELS]
)


def golden_config(case: dict) -> EngramConfig:
    names = ("rows_per_head", "heads", "seed", "pad_id")
    return EngramConfig(
        layers=tuple(case["layer_ids"]), **{name: _tuple(case[name]) for name in names}
    )


def _tuple(value: object) -> object:
    return tuple(value) if isinstance(value, list) else value


def by_hand(
    ids: list[int], reach: list[int], config: EngramConfig, canonical: int, pad: int
) -> list:
    """Computes the rows by the spec, one token at a time, in Python's unbounded integers.

    The result is indexed [layer][token][head].
    """
    multipliers = draw_multipliers(config, canonical).tolist()
    primes = head_primes(config)
    layers = []
    for layer in range(len(config.layers)):
        tokens = []
        for t in range(len(ids)):
            seen = [ids[t - k] if k <= min(reach[t], t) else pad for k in range(config.ngram)]
            rows = []
            offset = 0
            for order in range(2, config.ngram + 1):
                mix = 0
                for k in range(order):
                    product = seen[k] * multipliers[layer][k]
                    assert 0 <= product < 2**63
                    mix ^= product
                for prime in primes[layer][order - 2]:
                    rows.append(offset + mix % prime)
                    offset += prime
            tokens.append(rows)
        layers.append(tokens)
    return layers


@pytest.mark.parametrize("case", HASHES, ids=lambda case: case["tokenizer"])
@pytest.mark.parametrize("kind", ["reference", *KERNELS])
def test_rows_are_the_authors(case: dict, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(kernels.VARIABLE, f"hash_rows={kind},follow_rows={kind}")
    # These ids are canonical already, so the identity map is enough and no tokenizer is needed.
    addresses = Addresses(golden_config(case), None, case["compressed_vocab_size"])
    assert addresses.fingerprint()["multipliers"] == list(case["multipliers"].values())
    assert addresses.fingerprint()["primes"] == list(case["primes"].values())
    for text in case["cases"]:
        ids = torch.tensor([text["compressed"]])
        local = addresses(ids, context(*ids.shape, "cpu")) - addresses.offsets[:, None, None]
        for index, layer in enumerate(map(str, case["layer_ids"])):
            got = local[index, 0].numpy().astype("<i8")
            assert got[0].tolist() == text["hash_first"][layer]
            assert got[-1].tolist() == text["hash_last"][layer]
            assert got.sum() == text["hash_sum"][layer]
            assert hashlib.sha256(got.tobytes()).hexdigest() == text["hash_sha256_i64le"][layer]


class Rows(nn.Module):
    """Replaces an embedding; returns the row ids themselves."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.empty(0)

    def forward(self, rows: Tensor) -> Tensor:
        return rows[..., None]


def qwen_layers(config: EngramConfig, vocab_size: int) -> list[Qwen4ExpTextNGramEmbedding]:
    """Builds transformers' own modules of this memory; they return row ids in place of rows."""
    text = Qwen4ExpTextConfig(
        vocab_size=vocab_size,
        eos_token_id=config.eos_id,
        ple_layer_ids=[layer + 1 for layer in config.layers],
        ple_embed_dim=config.memory_width,
        ngram_size=config.ngram,
        heads_per_ngram=config.heads,
        ngram_vocab_size_base=config.rows_per_head[0],
        seed=config.seed,
        num_hidden_layers=4,
        hidden_size=48,
    )
    results = []
    for index, layer in enumerate(config.layers):
        with torch.device("meta"):  # the table would not fit
            module = Qwen4ExpTextNGramEmbedding(text, config.memory_width, layer, index)
        drawn = modeling_qwen4_exp._build_layer_multipliers(
            vocab_size, config.ngram, index, config.seed
        )
        module.layer_multipliers = nn.Buffer(drawn)
        module.ngram_heads_vocab_sizes = nn.Buffer(torch.tensor(module.head_vocab_sizes))
        module.ngram_heads_offsets = nn.Buffer(torch.tensor(module.head_offsets))
        module.ngram_embedding = Rows()
        module.ids = text
        results.append(module)
    return results


def qwen_rows(modules: list[Qwen4ExpTextNGramEmbedding], ids: Tensor, splits: list[int]) -> Tensor:
    """Computes the rows [Lm, B, T, R] with transformers, in pieces after one cache.

    `splits` are the lengths of the pieces.
    """
    cache = DynamicCache(config=modules[0].ids) if len(splits) > 1 else None
    parts = [
        torch.stack([module(piece, cache) for module in modules]) for piece in ids.split(splits, 1)
    ]
    return torch.cat(parts, 2)


QWEN = json.loads((GOLDEN / "qwen4_exp_rows.json").read_text(encoding="utf-8"))


def qwen_config(case: dict) -> tuple[EngramConfig, int]:
    text = {name: _tuple(value) for name, value in case["config"].items()}
    return EngramConfig(**text, generator="splitmix64", canonical=False), case["vocabulary"]


QWENS = pytest.mark.parametrize("case", QWEN, ids=lambda case: case["name"])


@QWENS
@pytest.mark.parametrize("kind", ["reference", *KERNELS])
def test_rows_are_those_of_qwen(case: dict, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Compares with rows recorded from transformers, and with transformers today.

    The ids come whole, and in two pieces split at every position.
    """
    monkeypatch.setenv(kernels.VARIABLE, f"hash_rows={kind},follow_rows={kind}")
    config, vocab_size = qwen_config(case)
    ours = Addresses(config, None, vocab_size)
    theirs = qwen_layers(config, vocab_size)
    assert ours.fingerprint()["multipliers"] == case["multipliers"]
    assert ours.primes.flatten(1).tolist() == [module.head_vocab_sizes for module in theirs]
    for recorded in case["cases"]:
        ids = torch.tensor([recorded["ids"]])
        rows = torch.tensor(recorded["rows"])[:, None]
        length = ids.shape[1]
        assert torch.equal(ours(ids, context(*ids.shape, "cpu")), rows)
        assert torch.equal(qwen_rows(theirs, ids, [length]), rows)
        for start in range(1, length):
            history = ours.new_cache(1, 0, torch.float32, torch.device("cpu"))
            past = Past()
            pieces = [
                ours(piece, context(*piece.shape, "cpu", past=past), history)
                for piece in ids.split([start, length - start], 1)
            ]
            assert torch.equal(torch.cat(pieces, 2), rows)
            assert torch.equal(qwen_rows(theirs, ids, [start, length - start]), rows)


@QWENS
@pytest.mark.parametrize("kind", ["reference", *KERNELS])
def test_rows_of_padded_batches_are_those_of_qwen(
    case: dict, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Compares texts of different lengths that contain end ids.

    They come whole and token by token, and once more from the start.
    """
    monkeypatch.setenv(kernels.VARIABLE, f"hash_rows={kind},follow_rows={kind}")
    config, vocab_size = qwen_config(case)
    ours = Addresses(config, None, vocab_size)
    theirs = qwen_layers(config, vocab_size)
    ids = torch.randint(vocab_size, (7, 40))
    ids[torch.rand(ids.shape) < 0.25] = config.eos_id
    lengths = [40, 39, 38, 37, 23, 1, 35]
    valid = torch.arange(40) < torch.tensor(lengths)[:, None]
    rows = qwen_rows(theirs, ids, [40])
    junk = ids.masked_fill(~valid, -100)
    result = ours(junk, context(7, 40, "cpu", lengths=lengths))
    assert torch.equal(result[:, valid], rows[:, valid])
    history = ours.new_cache(7, 0, torch.float32, torch.device("cpu"))
    past = Past(7)
    for t in range(40):
        ctx = context(7, 1, "cpu", lengths=valid[:, t].long(), past=past)
        result = ours(junk[:, t : t + 1], ctx, history)
        assert torch.equal(result[:, valid[:, t], 0], rows[:, valid[:, t], t])
    assert torch.equal(ours(ids, context(7, 40, "cpu"), history), qwen_rows(theirs, ids, [40]))


@pytest.mark.parametrize("generator", ["numpy", "splitmix64"])
def test_an_end_of_text_hides_what_came_before(generator: str) -> None:
    """Rows after an end id are those of a text that begins there.

    Canonical ids are on, with documents and dead tokens.
    """
    config = EngramConfig(
        layers=(2, 0),
        rows_per_head=(97, 89),
        eos_id=4,
        pad_id=9,
        dead_tokens=(5,),
        generator=generator,
    )
    ours = Addresses(config, torch.arange(30) // 2, 30)
    ids = torch.tensor([[11, 12, 4, 13, 14, 5, 15, 4, 4, 16]])
    rows = ours(ids, context(1, 10, "cpu"))
    for start, end in ((3, 6), (6, 8), (8, 9), (9, 10)):
        alone = ours(ids[:, start:end], context(1, end - start, "cpu"))
        assert torch.equal(alone, rows[:, :, start:end])
    document_ids = torch.tensor([[0, 1, 1, 1, 1, 1, 1, 1, 1, 1]])
    assert torch.equal(
        ours(ids, context(1, 10, "cpu", document_ids=document_ids))[:, :, 1:],
        ours(ids[:, 1:], context(1, 9, "cpu")),
    )
    assert torch.equal(ours.lookup_mask(ids, context(1, 10, "cpu")), ids != 5)


def test_another_generator_is_another_model() -> None:
    """Configs from before the field existed have no generator and mean numpy's."""
    plain = Addresses(EngramConfig(), None, 30)
    other = Addresses(EngramConfig(generator="splitmix64"), None, 30)
    assert from_dict(EngramConfig, {"layers": [1]}) == EngramConfig(generator="numpy", eos_id=None)
    with pytest.raises(ValueError, match=r"other multipliers than .* seed and generator"):
        other.load_state_dict(plain.state_dict())


def test_row_totals_and_parameters_of_the_published_models() -> None:
    v41 = EngramConfig(layers=(1, 14), rows_per_head=(16_000_000,) * 3, heads=8, head_dim=256)
    assert row_totals(v41) == (384_006_168, 384_016_682)
    for rows, billions in ((2_262_400, 5.79), (7_239_680, 18.53)):
        paper = EngramConfig(layers=(1, 14), rows_per_head=(rows, rows), heads=8, head_dim=80)
        assert paper.memory_width == 1280
        assert round(sum(row_totals(paper)) * paper.head_dim / 1e9, 2) == billions


def test_primes_are_prime_different_and_next() -> None:
    config = EngramConfig(layers=(0, 3), rows_per_head=(2, 50), heads=3)
    assert head_primes(config) == [[[2, 3, 5], [53, 59, 61]], [[7, 11, 13], [67, 71, 73]]]


@EVERY
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_rows_are_those_of_a_plain_loop(rows_of, data: st.DataObject) -> None:
    orders = data.draw(st.integers(1, 4))
    sizes = data.draw(
        st.lists(
            st.sampled_from([2, 97, 4096, 8192, 646_400, 16_000_000]),
            min_size=orders,
            max_size=orders,
        )
    )
    config = EngramConfig(
        layers=data.draw(st.sampled_from([(0,), (1, 14), (29, 2)])),
        rows_per_head=tuple(sizes),
        heads=data.draw(st.integers(1, 9)),
        seed=data.draw(st.integers(0, 2**31)),
    )
    canonical = data.draw(st.sampled_from([1, 2, 100, 98_627, 2**31 - 1]))
    ids = data.draw(st.lists(st.integers(0, min(canonical, 100_000) - 1), min_size=1, max_size=20))
    reach = [data.draw(st.integers(0, orders)) for _ in ids]
    primes = np.array(head_primes(config))
    flat = primes.reshape(len(primes), -1)
    numbers = torch.arange(min(canonical, 100_000), dtype=torch.int32)
    exact = (torch.from_numpy(draw_multipliers(config, canonical)), torch.from_numpy(primes))
    window = F.pad(torch.tensor([ids]), (orders, 0))
    got = rows_of(
        window, torch.tensor([reach]), numbers, *exact, torch.from_numpy(flat.cumsum(1) - flat), 0
    )
    assert got[:, 0].tolist() == by_hand(ids, reach, config, canonical, 0)
    assert (got < torch.from_numpy(flat.sum(1))[:, None, None, None]).all()


@pytest.mark.parametrize("kind", KERNELS)
@pytest.mark.parametrize("prime", [8_209, 646_403, 2_262_413, 16_000_057, 2**31 - 1, 2**31 + 11])
def test_remainder_without_a_division_is_exact(kind: str, prime: int) -> None:
    """Tests mixes around multiples of the prime, up to the largest int64.

    The id is 1, so that the mix is the multiplier.
    """
    edges = [0, 1, prime - 1, prime, prime + 1, (2**63 - 1) // prime * prime]
    mixes = [m for edge in edges for m in (edge - 1, edge, edge + 1) if 0 <= m < 2**63] + [
        2**63 - 1,
        2**62,
        2**53 + 1,
    ]
    mixes += np.random.default_rng(0).integers(0, 2**63 - 1, 300).tolist()
    exact = torch.tensor([[m, 0] for m in mixes]), torch.full((len(mixes), 1, 1), prime)
    offsets = torch.zeros(len(mixes), 1, dtype=torch.int64)
    got = KERNELS[kind](
        torch.tensor([[0, 1]]), None, torch.arange(2, dtype=torch.int32), *exact, offsets, 0
    )
    assert got.flatten().tolist() == [m % prime for m in mixes]


def test_two_mixes_share_few_heads() -> None:
    """Bounds the number of heads that two mixes can share.

    A shared head's prime divides the difference of the mixes, which is below 2^63, so primes with a
    larger product cannot all be shared.
    """
    for rows, largest in ((650_000, 3), (2_300_000, 2)):
        config = EngramConfig(layers=(1, 14), rows_per_head=(rows, rows), heads=8)
        primes = np.array(head_primes(config)).flatten().tolist()
        assert (
            math.prod(sorted(primes)[: largest + 1]) > 2**63 > math.prod(sorted(primes)[:largest])
        )
    first, second = (
        np.random.default_rng(seed).integers(0, 2**63 - 1, (500_000, 1)) for seed in (1, 2)
    )
    tops = np.array(head_primes(EngramConfig(rows_per_head=(650_000,), heads=8))).reshape(1, 8)
    assert ((first % tops == second % tops).sum(1) <= 3).all()


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_two_n_grams_share_few_heads(data: st.DataObject) -> None:
    """Tests the worst case that exists.

    The mixes differ by a multiple of as many primes as stay below 2^63.
    """
    rows, largest = data.draw(st.sampled_from([(650_000, 3), (2_300_000, 2), (16_000_000, 2)]))
    primes = np.array(head_primes(EngramConfig(rows_per_head=(rows,), heads=8))).flatten()
    shared = math.prod(data.draw(st.permutations(primes.tolist()))[:largest])
    first = data.draw(st.integers(0, 2**63 - 1 - shared))
    second = first + shared * data.draw(st.integers(1, (2**63 - 1 - first) // shared))
    mixes = torch.tensor([[first, 0], [second, 0]])  # as multipliers of the id 1, two layers
    exact = (
        mixes,
        torch.from_numpy(primes).expand(2, 1, 8).contiguous(),
        torch.zeros(2, 8, dtype=torch.int64),
    )
    got = hash_rows.reference(
        torch.tensor([[0, 1]]), None, torch.arange(2, dtype=torch.int32), *exact, 0
    )
    assert largest <= (got[0] == got[1]).sum() <= largest


def test_no_pair_of_many_n_grams_shares_more_than_three_heads() -> None:
    """Tests all pairs of 1,500 trigrams and all 262,144 bigrams.

    The bigrams are tested by groups of four heads.
    """
    addresses = Addresses(
        EngramConfig(rows_per_head=(646_400, 646_400), heads=8, seed=5), None, 512
    )
    local = addresses(torch.randint(512, (1, 1502)), context(1, 1502, "cpu"))[0, 0, 2:, 8:]
    alike = sum(
        (local[:, None, head] == local[None, :, head]).byte() for head in range(8)
    ).fill_diagonal_(0)
    assert alike.max() <= 3
    pairs = torch.cartesian_prod(torch.arange(512), torch.arange(512))
    bigrams = addresses(pairs, context(*pairs.shape, "cpu"))[0, :, 1, :8]
    for four in ((0, 1, 2, 3), (4, 5, 6, 7), (0, 2, 4, 6), (1, 3, 5, 7)):
        assert len(torch.unique(bigrams[:, four], dim=0)) == len(bigrams)


@EVERY
def test_rows_are_written_where_memory_is_given(rows_of) -> None:
    ours = Addresses(EngramConfig(layers=(1, 5), rows_per_head=(9001, 77), heads=5), None, 50)
    exact = (ours.canonical_map, ours.multipliers, ours.primes, ours.offsets, 7)
    ids = torch.randint(50, (3, 9))
    out = torch.full((2, 3, 7, 10), -1)
    got = rows_of(ids, None, *exact, out=out)
    assert got.data_ptr() == out.data_ptr()
    assert torch.equal(out, hash_rows.reference(ids, None, *exact))


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "move", "assign", "replace the data"])
def test_what_a_kernel_noted_of_one_model_is_never_used_for_another(how: str) -> None:
    """A kernel's stored values of one model are not used for another.

    The first model's tensors are overwritten, so that a stale read returns other rows.
    """
    names = ("canonical_map", "multipliers", "primes", "offsets")
    first = Addresses(EngramConfig(layers=(1, 5), rows_per_head=(9001, 77), heads=5), None, 50)
    ids = torch.randint(50, (3, 4))
    first(ids, context(3, 4, "cpu"))
    before = {name: getattr(first, name) for name in names}
    expected = hash_rows.reference(
        F.pad(ids, (2, 0)), None, *(x.clone() for x in before.values()), 0
    )
    second = {"deepcopy": copy.deepcopy, "pickle": lambda x: pickle.loads(pickle.dumps(x))}.get(
        how, lambda x: x
    )(first)
    if how == "move":
        second.share_memory()
    elif how == "assign":
        second.load_state_dict(
            {name: x.clone() for name, x in first.state_dict().items()}, assign=True
        )
        second.offsets = first.offsets.clone()
    elif how == "replace the data":
        before = {name: x.detach() for name, x in before.items()}
        for name in names:
            getattr(second, name).data = getattr(second, name).clone()
    if how != "move":
        for x in before.values():
            x.fill_(1)
    assert torch.equal(second(ids, context(3, 4, "cpu")), expected)
    assert torch.equal(
        second(
            ids[:, :1],
            context(3, 1, "cpu"),
            second.new_cache(3, 8, torch.float32, torch.device("cpu")),
        ),
        expected[:, :, :1],
    )


def test_ids_of_32_bits_are_remembered_as_any_others() -> None:
    """The history began with padding and is used again without it."""
    ours = Addresses(EngramConfig(layers=(1,), rows_per_head=(9001, 77), heads=2), None, 50)
    ids = torch.randint(50, (2, 6), dtype=torch.int32)
    history = ours.new_cache(2, 8, torch.float32, torch.device("cpu"))
    ours(ids, context(2, 6, "cpu", lengths=[6, 4]), history)
    assert torch.equal(
        ours(ids, context(2, 6, "cpu"), history), ours(ids.long(), context(2, 6, "cpu"))
    )


def test_memory_of_long_calls_is_taken_again_only_when_nobody_holds_it() -> None:
    """Tests calls with and without a history, and after a call whose id was refused."""
    ours = Addresses(EngramConfig(layers=(1, 5), rows_per_head=(9001, 77), heads=5), None, 50)
    first, second, third = torch.randint(50, (3, 2, WORTH_KEEPING))
    where = context(*first.shape, "cpu")
    names = ("canonical_map", "multipliers", "primes", "offsets")
    with pytest.raises(ValueError, match="got id 50"):
        ours(torch.full_like(first, 50), where)
    cached = [
        ours(first, where),
        ours(second, where, ours.new_cache(2, 0, torch.float32, torch.device("cpu"))),
    ]
    dropped = ours(third, where).data_ptr()
    assert len({*(rows.data_ptr() for rows in cached), dropped}) == 3
    for ids, rows in zip((first, second), cached, strict=True):
        assert torch.equal(
            rows,
            hash_rows.reference(
                F.pad(ids, (2, 0)), None, *(getattr(ours, name) for name in names), 0
            ),
        )
    again = cached.pop(0).data_ptr()
    assert ours(third, where).data_ptr() == again


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_ids_that_follow_others_in_any_pieces(data: st.DataObject) -> None:
    """The ids come whole, in chunks, token by token, and as a view of a wider tensor.

    Chunks are longer and shorter than what the history stores.
    """
    layers = data.draw(st.sampled_from([(1,), (1, 14)]))
    sizes = data.draw(st.sampled_from([(97,), (8193, 31), (9001, 9001, 20_011)]))
    addresses = Addresses(
        EngramConfig(layers=layers, rows_per_head=sizes, heads=3, pad_id=7), torch.arange(50) // 3
    )
    batch = data.draw(st.integers(1, 4))
    lengths = data.draw(st.lists(st.sampled_from([1, 2, 5, 64, 65, 200])))
    ids = torch.randint(50, (batch, 2 * sum(lengths) + 1))[:, ::2]
    whole = addresses(ids, context(*ids.shape, "cpu"))
    plain = F.pad(ids, (len(sizes), 0), value=7)
    names = ("canonical_map", "multipliers", "primes", "offsets")
    assert torch.equal(
        whole, hash_rows.reference(plain, None, *(getattr(addresses, name) for name in names), 0)
    )
    history = addresses.new_cache(1, 0, torch.float32, torch.device("cpu"))
    past = Past()
    offset = 0
    for length in [*lengths, 1]:
        piece = ids[:, offset : offset + length]
        got = addresses(piece, context(*piece.shape, "cpu", past=past), history)
        assert torch.equal(got, whole[:, :, offset : offset + length])
        offset += length
    alone = addresses(ids[-1:], context(1, ids.shape[1], "cpu"))
    assert torch.equal(alone, whole[:, -1:])


@pytest.mark.parametrize("kind", ["reference", *KERNELS])
def test_a_refused_id_is_named_behind_a_history(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(kernels.VARIABLE, f"hash_rows={kind},follow_rows={kind}")
    addresses = Addresses(EngramConfig(), torch.arange(20), 25)
    for length in (1, 300):
        history = addresses.new_cache(1, 0, torch.float32, torch.device("cpu"))
        addresses(torch.zeros(2, 3, dtype=torch.int64), context(2, 3, "cpu"), history)
        ids = torch.zeros(2, length, dtype=torch.int64)
        ids[1, -1] = 22
        with pytest.raises(ValueError, match="got id 22, expected one of the 20"):
            addresses(ids, context(2, length, "cpu"), history)


@pytest.mark.parametrize("kind", ["reference", *KERNELS])
@pytest.mark.parametrize("bad", [-1, -100, 20, 25, 2**40])
def test_ids_outside_the_tokenizer_are_refused(
    kind: str, bad: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(kernels.VARIABLE, f"hash_rows={kind},follow_rows={kind}")
    # A tokenizer of 20 ids, a model vocabulary of 25.
    addresses = Addresses(EngramConfig(), torch.arange(20), 25)
    ids = torch.tensor([[3, 19, bad, 4]])
    with pytest.raises(ValueError, match=f"got id {bad}, expected one of the 20"):
        addresses(ids, context(1, 4, "cpu"))
    # Ids at padding are not checked.
    rows = addresses(ids, context(1, 4, "cpu", lengths=[2]))
    assert torch.equal(rows[:, :, :2], addresses(ids[:, :2], context(1, 2, "cpu")))


def test_saved_addresses_load_and_bring_the_map() -> None:
    canonical = torch.randperm(30)
    saved = Addresses(EngramConfig(seed=3), canonical, 32)
    assert "offsets" not in saved.state_dict()
    untold = Addresses(EngramConfig(seed=3), None, 32)
    untold.load_state_dict(saved.state_dict())
    ids = torch.randint(30, (2, 9))
    assert torch.equal(untold(ids, context(2, 9, "cpu")), saved(ids, context(2, 9, "cpu")))
    assert untold.fingerprint() == saved.fingerprint()
    digest = hashlib.sha256(canonical.numpy().astype("<i4").tobytes()).hexdigest()
    assert json.loads(json.dumps(saved.fingerprint()))["canonical_sha256"] == digest


@pytest.mark.parametrize("message", [True, False])
@pytest.mark.parametrize(
    ("config", "canonical", "names"),
    [
        (EngramConfig(seed=1), torch.arange(30), "other multipliers than"),
        (EngramConfig(rows_per_head=(4000, 4096)), torch.arange(30), "other primes than"),
        (
            EngramConfig(seed=1, rows_per_head=(4000, 4096)),
            torch.arange(30),
            "other multipliers and other primes than",
        ),
        (EngramConfig(), torch.arange(30).flip(0), "other canonical map than"),
    ],
)
def test_another_models_addresses_are_refused(
    message: bool, config: EngramConfig, canonical: Tensor, names: str
) -> None:
    saved = Addresses(config, canonical, 30)
    ours = Addresses(EngramConfig(), torch.arange(30) if message else None, 30)
    if not message and "canonical" in names:
        ours.load_state_dict(saved.state_dict())  # a model without a map takes the saved one
        return
    with pytest.raises(ValueError, match=names):
        ours.load_state_dict(saved.state_dict())


@pytest.mark.parametrize(
    ("name", "message"),
    [("multipliers", "multipliers"), ("primes", "primes"), ("canonical_sha256", "canonical map")],
)
def test_each_of_the_three_is_named_when_it_alone_differs(name: str, message: str) -> None:
    state = Addresses(EngramConfig(), torch.arange(30), 30).state_dict()
    state[name] = state[name].clone()
    state[name].view(-1)[-1] ^= 2
    with pytest.raises(
        ValueError,
        match=rf"got a checkpoint with other {message} than this model's, .* take its tokenizer",
    ):
        Addresses(EngramConfig(), torch.arange(30), 30).load_state_dict(state)


@pytest.mark.parametrize("vocab_size", [29, 31])
def test_a_checkpoint_of_another_vocab_size_is_refused(vocab_size: int) -> None:
    state = Addresses(EngramConfig(), torch.arange(30), 30).state_dict()
    for canonical in (None, torch.arange(29)):
        with pytest.raises(ValueError, match=r"other canonical map than .* take its tokenizer"):
            Addresses(EngramConfig(), canonical, vocab_size).load_state_dict(state)


def test_a_damaged_map_is_refused_by_its_digest() -> None:
    state = Addresses(EngramConfig(), torch.arange(30), 30).state_dict()
    state["canonical_map"] = state["canonical_map"].flip(0)
    for canonical in (None, torch.arange(30), torch.arange(30).flip(0)):
        with pytest.raises(ValueError, match="canonical map"):
            Addresses(EngramConfig(), canonical, 30).load_state_dict(state)
    # The checkpoint has a canonical map, and the model hashes raw ids.
    with pytest.raises(ValueError, match="canonical map"):
        Addresses(EngramConfig(canonical=False), None, 30).load_state_dict(
            Addresses(EngramConfig(), torch.arange(30).flip(0), 30).state_dict()
        )


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"layers": ()}, r"layers: got \(\)"),
        ({"layers": (1, 1)}, "different block indices"),
        ({"layers": (-1,)}, "from 0"),
        ({"rows_per_head": ()}, "2 or more"),
        ({"rows_per_head": (4096, 1)}, "2 or more"),
        ({"heads": 0}, "heads: got 0"),
        ({"head_dim": 0}, "head_dim: got 0"),
        ({"kernel": 0}, "kernel: got 0"),
        ({"dilation": 0}, "dilation: got 0"),
        ({"seed": -1}, "seed -1"),
        ({"pad_id": -1}, "pad_id -1"),
        ({"dead_tokens": (-3,)}, "none negative"),
        ({"eos_id": -1}, "eos_id: got -1, expected an id of the tokenizer"),
    ],
)
def test_bad_configs_are_refused(changes: dict, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        EngramConfig(**changes)
    config = EngramConfig()
    # This bypasses beartype, which checks the annotation in tests.
    object.__setattr__(config, "sign", "plus")
    with pytest.raises(ValueError, match="expected sign or copysign"):
        config.__post_init__()
    object.__setattr__(config, "sign", "sign")
    object.__setattr__(config, "generator", "mt19937")
    with pytest.raises(ValueError, match="got 'mt19937', expected numpy or splitmix64"):
        config.__post_init__()
    object.__setattr__(config, "generator", "numpy")
    object.__setattr__(config, "gating", "none")
    with pytest.raises(ValueError, match="got 'none', expected streams, shared or open"):
        config.__post_init__()


@pytest.mark.parametrize(("gating", "gates"), [("streams", 3), ("shared", 1), ("open", 0)])
def test_keys_a_token_has(gating: str, gates: int) -> None:
    assert EngramConfig(gating=gating).gates(3) == gates


@pytest.mark.parametrize(
    ("config", "canonical", "vocab_size", "reason"),
    [
        ({}, torch.arange(9), 8, "got 9 ids, expected at most"),
        ({}, torch.tensor([0, 2]), 2, "got gaps"),
        ({}, torch.tensor([-2, 0]), 2, "negative"),
        ({}, None, None, "neither"),
        (
            {"eos_id": 8},
            torch.arange(8),
            9,
            "eos_id: got 8, expected an id of the tokenizer, below 8",
        ),
        (
            {"pad_id": 8},
            torch.arange(8),
            9,
            "pad_id: got 8, expected an id of the tokenizer, below 8",
        ),
    ],
)
def test_bad_maps_are_refused(
    config: dict, canonical: Tensor | None, vocab_size: int | None, reason: str
) -> None:
    with pytest.raises(ValueError, match=reason):
        Addresses(EngramConfig(**config), canonical, vocab_size)


@pytest.mark.slow
@pytest.mark.interpreted
def test_tiles_refuse_ids_outside_the_tokenizer(tiled: torch.device) -> None:
    # On an accelerator a failed device assertion makes it unusable for the process.
    if tiled.type == "cpu":
        ours = Addresses(EngramConfig(), None, 9)
        exact = ours.canonical_map, ours.multipliers, ours.primes, ours.offsets, ours.pad
        for bad in (-1, -100, 9, 2**40):
            with pytest.raises(IndexError, match="no canonical id"):
                hash_rows.choice.load("triton")(torch.tensor([[3, bad, 0, 1, 2]]), None, *exact)
