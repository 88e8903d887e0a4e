"""Configs, ids and weights in -> the rows, gates and outputs that the authors' code or a plain loop gives."""

import hashlib
import json
import math
import pathlib

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from torch import Tensor, nn

from rorqual import kernels
from rorqual.layers import engram
from rorqual.layers.basics import layout
from rorqual.layers.cache import Bundle, Past
from rorqual.layers.engram import Addresses, Engram, EngramConfig, draw_multipliers, find_primes, hash_rows, row_totals

GOLDEN = pathlib.Path(__file__).resolve().parents[1] / "golden"
HASHES = json.loads((GOLDEN / "engram_hash.json").read_text(encoding="utf-8"))
# The canonical ids of input.ids in engram_forward.safetensors, by the map that tests/data/test_tokenizer.py checks.
CANONICAL = [
    "46845 8066 74351 93553 3771 14812 81003 93377 25178 31255 10156 42016 27492 18291 25919 40657 32131 7304 9005",
    "586 85187 74193 82477 53180 80477 32974 44865 9824 2274 30407 12847 44953 96169 13803 38175 40077 21783 15886",
]
TWINS = {twin.kind: twin.function for twin in kernels.TWINS["engram_rows"] if not twin.usable(torch.device("cpu"))}
EVERY = pytest.mark.parametrize("rows_of", [hash_rows, *TWINS.values()], ids=["reference", *TWINS])


def golden_config(case: dict) -> EngramConfig:
    names = ("rows_per_head", "heads", "seed", "pad_id")
    return EngramConfig(layers=tuple(case["layer_ids"]), **{name: _tuple(case[name]) for name in names})


def _tuple(value: object) -> object:
    return tuple(value) if isinstance(value, list) else value


def by_hand(ids: list[int], reach: list[int], config: EngramConfig, canonical: int, pad: int) -> list:
    """The spec, one token at a time, in Python's unbounded integers: [layer][token][head]."""
    multipliers, primes = draw_multipliers(config, canonical).tolist(), find_primes(config).tolist()
    layers = []
    for layer in range(len(config.layers)):
        tokens = []
        for t in range(len(ids)):
            seen = [ids[t - k] if k <= min(reach[t], t) else pad for k in range(config.ngram)]
            rows, offset = [], 0
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
@pytest.mark.parametrize("kind", ["reference", *TWINS])
def test_rows_are_the_authors(case: dict, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(kernels.VARIABLE, f"engram_rows={kind}")
    # ids that are canonical already, so that no tokenizer is needed: the identity over as many
    addresses = Addresses(golden_config(case), None, case["compressed_vocab_size"])
    assert addresses.fingerprint()["multipliers"] == list(case["multipliers"].values())
    assert addresses.fingerprint()["primes"] == list(case["primes"].values())
    for text in case["cases"]:
        ids = torch.tensor([text["compressed"]])
        local = addresses(ids, layout(*ids.shape, "cpu")) - addresses.offsets[:, None, None]
        for place, layer in enumerate(map(str, case["layer_ids"])):
            got = local[place, 0].numpy().astype("<i8")
            assert got[0].tolist() == text["hash_first"][layer]
            assert got[-1].tolist() == text["hash_last"][layer]
            assert got.sum() == text["hash_sum"][layer]
            assert hashlib.sha256(got.tobytes()).hexdigest() == text["hash_sha256_i64le"][layer]


def test_row_totals_and_parameters_of_the_published_models() -> None:
    v41 = EngramConfig(layers=(1, 14), rows_per_head=(16_000_000,) * 3, heads=8, head_dim=256)
    assert row_totals(v41) == (384_006_168, 384_016_682)
    for rows, billions in ((2_262_400, 5.79), (7_239_680, 18.53)):
        paper = EngramConfig(layers=(1, 14), rows_per_head=(rows, rows), heads=8, head_dim=80)
        assert paper.memory_width == 1280
        assert round(sum(row_totals(paper)) * paper.head_dim / 1e9, 2) == billions


def test_primes_are_prime_different_and_next() -> None:
    config = EngramConfig(layers=(0, 3), rows_per_head=(2, 50), heads=3)
    assert find_primes(config).tolist() == [[[2, 3, 5], [53, 59, 61]], [[7, 11, 13], [67, 71, 73]]]


@EVERY
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_rows_are_those_of_a_plain_loop(rows_of, data: st.DataObject) -> None:
    orders = data.draw(st.integers(1, 4))
    sizes = data.draw(
        st.lists(st.sampled_from([2, 97, 4096, 8192, 646_400, 16_000_000]), min_size=orders, max_size=orders)
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
    primes = find_primes(config)
    flat = primes.reshape(len(primes), -1)
    numbers = torch.arange(min(canonical, 100_000), dtype=torch.int32)
    exact = (torch.from_numpy(draw_multipliers(config, canonical)), torch.from_numpy(primes))
    window = F.pad(torch.tensor([ids]), (orders, 0))
    got = rows_of(window, torch.tensor([reach]), numbers, *exact, torch.from_numpy(flat.cumsum(1) - flat), 0)
    assert got[:, 0].tolist() == by_hand(ids, reach, config, canonical, 0)
    assert (got < torch.from_numpy(flat.sum(1))[:, None, None, None]).all()


@pytest.mark.parametrize("kind", TWINS)
@pytest.mark.parametrize("prime", [8_209, 646_403, 2_262_413, 16_000_057, 2**31 - 1])
def test_remainder_without_a_division_is_exact(kind: str, prime: int) -> None:
    """Around multiples of the prime, up to the largest int64: the id is 1, so that the mix is the multiplier."""
    edges = [0, 1, prime - 1, prime, prime + 1, (2**63 - 1) // prime * prime]
    mixes = [m for edge in edges for m in (edge - 1, edge, edge + 1) if 0 <= m < 2**63] + [2**63 - 1, 2**62, 2**53 + 1]
    mixes += np.random.default_rng(0).integers(0, 2**63 - 1, 300).tolist()
    exact = torch.tensor([[m, 0] for m in mixes]), torch.full((len(mixes), 1, 1), prime)
    offsets = torch.zeros(len(mixes), 1, dtype=torch.int64)
    got = TWINS[kind](torch.tensor([[0, 1]]), None, torch.arange(2, dtype=torch.int32), *exact, offsets, 0)
    assert got.flatten().tolist() == [m % prime for m in mixes]


@pytest.mark.parametrize("kind", TWINS)
def test_twin_at_odd_sizes_and_on_threads(kind: str, poisoned: None) -> None:
    config = EngramConfig(layers=(1, 5), rows_per_head=(9001, 77, 70_001), heads=5)
    addresses = Addresses(config, None, 50)
    exact = (addresses.canonical_map, addresses.multipliers, addresses.primes, addresses.offsets, addresses.pad)
    for batch, time, threads in ((1, 1, 1), (3, 7, 2), (7, 301, 3), (2, 0, 1)):
        ids = torch.randint(50, (batch, time + 3))
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            assert torch.equal(TWINS[kind](ids, None, *exact), hash_rows(ids, None, *exact))
        finally:
            torch.set_num_threads(before)


def test_two_mixes_share_few_heads() -> None:
    """A shared head's prime divides the mixes' difference, below 2^63: primes with a larger product cannot all."""
    for rows, most in ((650_000, 3), (2_300_000, 2)):
        primes = find_primes(EngramConfig(layers=(1, 14), rows_per_head=(rows, rows), heads=8)).flatten().tolist()
        assert math.prod(sorted(primes)[: most + 1]) > 2**63 > math.prod(sorted(primes)[:most])
    first, second = (np.random.default_rng(seed).integers(0, 2**63 - 1, (500_000, 1)) for seed in (1, 2))
    tops = find_primes(EngramConfig(rows_per_head=(650_000,), heads=8)).reshape(1, 8)
    assert ((first % tops == second % tops).sum(1) <= 3).all()


@EVERY
@pytest.mark.parametrize("bad", [-1, -100, 20, 25, 2**40])
def test_ids_outside_the_tokenizer_are_refused(rows_of, bad: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engram, "pick", lambda name, reference, *where: rows_of)
    addresses = Addresses(EngramConfig(), torch.arange(20), 25)  # a model vocabulary of 25 for a tokenizer of 20
    ids = torch.tensor([[3, 19, bad, 4]])
    with pytest.raises(ValueError, match=f"got id {bad}, expected one of the 20"):
        addresses(ids, layout(1, 4, "cpu"))
    present = torch.tensor([[True, True, False, True]])
    rows = addresses(ids, layout(1, 4, "cpu", present=present))  # at padding nobody looks
    assert torch.equal(rows[:, :, 3], addresses(torch.tensor([[4]]), layout(1, 1, "cpu"))[:, :, 0])


class Rig(nn.Module):
    """Two Engram layers with their tables: ids and layout in, rows and the sum of both layers' outputs out."""

    def __init__(self, streams: int = 2, **changes: object) -> None:
        super().__init__()
        self.config = EngramConfig(
            **{"layers": (0, 2), "rows_per_head": (31, 67), "heads": 2, "head_dim": 3, **changes}
        )
        self.addresses = Addresses(self.config, torch.arange(40) // 2, 40)
        self.layers = nn.ModuleList(Engram(self.config, 8, streams) for _ in self.config.layers)
        self.tables = [torch.randn(rows, self.config.head_dim) for rows in row_totals(self.config)]
        self.hidden = torch.randn(40, streams, 8)
        for layer in self.layers:
            layer.reset(std=0.5)
            if self.config.conv:
                nn.init.normal_(layer.conv)

    def new_cache(self) -> Bundle:
        of = (1, 0, torch.float32, torch.device("cpu"))
        parts = {str(i): layer.new_cache(*of) for i, layer in enumerate(self.layers)}
        return Bundle(past=Past(), ids=self.addresses.new_cache(*of), **parts)

    @torch.no_grad()
    def forward(
        self, ids: Tensor, *, documents=None, present=None, cache: Bundle | None = None
    ) -> tuple[Tensor, Tensor]:
        past = cache.past if cache else None
        where = layout(*ids.shape, "cpu", documents=documents, present=present, past=past)
        rows = self.addresses(ids, where, cache.ids if cache else None)
        live, hidden = self.addresses.live(ids, where), self.hidden[ids]
        outs = [
            layer(hidden, table[rows[i]].flatten(-2), where, cache.parts[str(i)] if cache else None, live)
            for i, (layer, table) in enumerate(zip(self.layers, self.tables, strict=True))
        ]
        return rows, sum(outs)


VARIANTS = st.fixed_dictionaries(
    {
        "streams": st.integers(1, 3),
        "conv": st.booleans(),
        "bias": st.booleans(),
        "kernel": st.integers(1, 4),
        "dilation": st.sampled_from([None, 1, 5]),
        "sign": st.sampled_from(["sign", "copysign"]),
        "canonical": st.booleans(),
        "rows_per_head": st.sampled_from([(31,), (31, 67), (5, 7, 31)]),
        "pad_id": st.sampled_from([0, 7]),
        "dead_tokens": st.sampled_from([(), (3, 9)]),
        "end_of_document": st.booleans(),
    }
)


def cuts(data: st.DataObject, length: int) -> list[tuple[int, int]]:
    inner = data.draw(st.lists(st.integers(1, length), max_size=6)) if length > 1 else []
    edges = sorted({0, *inner, length})
    return list(zip(edges[:-1], edges[1:], strict=True))


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_in_chunks_of_any_size_as_at_once(data: st.DataObject) -> None:
    torch.manual_seed(0)
    rig = Rig(**data.draw(VARIANTS))
    batch, time = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 40))
    ids = torch.randint(40, (batch, time))
    documents = torch.randint(2, (batch, time)).cumsum(1) if data.draw(st.booleans()) else None
    lefts = torch.randint(time, (batch, 1))
    present = torch.arange(time) >= lefts if data.draw(st.booleans()) else None
    rows, out = rig(ids, documents=documents, present=present)
    cache = rig.new_cache()
    for start, stop in cuts(data, time):
        part = slice(start, stop)
        named = {"documents": documents, "present": present}
        given_ = {name: None if value is None else value[:, part] for name, value in named.items()}
        got_rows, got = rig(ids[:, part], cache=cache, **given_)
        assert torch.equal(got_rows, rows[:, :, part])
        torch.testing.assert_close(got, out[:, part], atol=1e-6, rtol=1e-5)
    for row in range(batch):  # alone as in a batch
        alone = {name: None if value is None else value[row : row + 1] for name, value in named.items()}
        alone_rows, alone_out = rig(ids[row : row + 1], **alone)
        assert torch.equal(alone_rows, rows[:, row : row + 1])
        torch.testing.assert_close(alone_out, out[row : row + 1], atol=1e-6, rtol=1e-5)


@settings(max_examples=30, deadline=None)
@given(data=st.data())
def test_forgotten_tokens_and_reordered_rows_leave_no_trace(data: st.DataObject) -> None:
    torch.manual_seed(0)
    rig = Rig(**data.draw(VARIANTS))
    ids, cache, held = torch.randint(40, (3, 60)), rig.new_cache(), torch.zeros(3, 0, dtype=torch.int64)
    for _ in range(data.draw(st.integers(1, 8))):
        count = data.draw(st.integers(1, 7))
        new = ids[:, held.shape[1] : held.shape[1] + count]
        if not new.shape[1]:
            break
        held = torch.cat([held, new], 1)
        rows, out = rig(new, cache=cache)
        whole_rows, whole = rig(held)
        assert torch.equal(rows, whole_rows[:, :, -new.shape[1] :])
        torch.testing.assert_close(out, whole[:, -new.shape[1] :], atol=1e-6, rtol=1e-5)
        forget = data.draw(st.integers(0, held.shape[1]))
        cache.crop(forget)
        held = held[:, : held.shape[1] - forget]
        order = torch.tensor(data.draw(st.lists(st.integers(0, 2), min_size=3, max_size=3)))
        cache.select(order)
        held, ids = held[order], torch.randint(40, (3, 60))
    cache.reset()
    assert torch.equal(rig(ids, cache=cache)[0], rig(ids)[0])


@settings(max_examples=30, deadline=None)
@given(data=st.data())
def test_packed_documents_never_see_each_other(data: st.DataObject) -> None:
    torch.manual_seed(0)
    rig = Rig(**{**data.draw(VARIANTS), "end_of_document": True})
    lengths = data.draw(st.lists(st.integers(1, 12), min_size=1, max_size=5))
    parts = [torch.randint(40, (1, length)) for length in lengths]
    documents = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))[None]
    rows, out = rig(torch.cat(parts, 1), documents=documents)
    alone = [rig(part) for part in parts]
    assert torch.equal(rows, torch.cat([each[0] for each in alone], 2))
    torch.testing.assert_close(out, torch.cat([each[1] for each in alone], 1), atol=1e-6, rtol=1e-5)


def test_without_resets_documents_do_see_each_other() -> None:
    rig = Rig(end_of_document=False)
    ids, documents = torch.arange(6)[None], torch.tensor([[0, 0, 0, 1, 1, 1]])
    assert torch.equal(rig(ids, documents=documents)[0], rig(ids)[0])


@settings(max_examples=30, deadline=None)
@given(data=st.data())
def test_left_padding_is_invisible(data: st.DataObject) -> None:
    torch.manual_seed(0)
    rig = Rig(**data.draw(VARIANTS))
    ids, left = torch.randint(40, (2, data.draw(st.integers(1, 20)))), data.draw(st.integers(1, 12))
    padded = torch.cat([torch.randint(-100, 100, (2, left)), ids], 1)
    present = (torch.arange(padded.shape[1]) >= left).expand(padded.shape)
    rows, out = rig.addresses(padded, layout(*padded.shape, "cpu", present=present)), rig(ids)
    assert torch.equal(rows[:, :, left:], out[0])
    got = rig(padded.clamp(0, 39), present=present)[1]
    torch.testing.assert_close(got[:, left:], out[1], atol=1e-6, rtol=1e-5)


def test_look_back_stops_at_a_dead_token_and_it_recalls_nothing() -> None:
    rig = Rig(dead_tokens=(9,), conv=False)
    rows, out = rig(torch.tensor([[4, 6, 9, 8, 2]]))
    after, _ = rig(torch.tensor([[8, 2]]))
    assert torch.equal(rows[:, :, 3:], after)
    assert (out[:, 2] == 0).all()
    assert (out[:, [0, 1, 3, 4]] != 0).all()


@pytest.mark.parametrize("layer", [1, 3])
def test_layer_is_the_authors(layer: int) -> None:
    with safe_open(GOLDEN / "engram_forward.safetensors", "pt") as file:
        about = json.loads(file.metadata()["config"])
        golden = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (it is no mapping)
    config = EngramConfig(
        layers=tuple(about["layer_ids"]),
        rows_per_head=tuple(about["rows_per_head"]),
        heads=about["heads"],
        head_dim=about["embed_per_ngram"] // about["heads"],
        kernel=about["kernel"],
        pad_id=about["pad_id"],
        bias=True,
    )
    prefix, streams, dim = f"layer{layer}.", about["streams"], about["hidden"]
    ours = Engram(config, dim, streams)

    def stacked(name: str) -> Tensor:
        return torch.stack([golden[prefix + name.format(s)] for s in range(streams)])

    ours.load_state_dict(
        {
            "key_proj.weight": stacked("key_projs.{}.weight").flatten(0, 1),
            "key_proj.bias": stacked("key_projs.{}.bias").flatten(),
            "value_proj.weight": golden[prefix + "value_proj.weight"],
            "value_proj.bias": golden[prefix + "value_proj.bias"],
            "gate.key_norm": stacked("norm1.{}.weight"),
            "gate.query_norm": stacked("norm2.{}.weight"),
            "conv_norm": stacked("short_conv.norms.{}.weight"),
            "conv": golden[prefix + "short_conv.conv.weight"].view(streams, dim, -1),
        }
    )
    ids = torch.tensor([[int(i) for i in row.split()] for row in CANONICAL])
    where = layout(*ids.shape, "cpu")
    rows = Addresses(config, None, 98_627)(ids, where)[config.layers.index(layer)]
    table = golden[prefix + "multi_head_embedding.embedding.weight"].clone().requires_grad_()
    hidden = golden["input.hidden"].clone().requires_grad_()
    out = ours(hidden, table[rows].flatten(-2), where)
    torch.testing.assert_close(out, golden[prefix + "out"], atol=5e-6, rtol=0)
    (out * golden[prefix + "grad_out"]).sum().backward()
    for got, name in ((hidden.grad, "hidden"), (table.grad, "embedding"), (ours.conv.grad.view(-1, 1, 4), "conv")):
        torch.testing.assert_close(got, golden[f"{prefix}grad_{name}"], atol=1e-5, rtol=0)


@pytest.mark.parametrize(("kernel", "dilation", "time"), [(1, None, 5), (2, 1, 1), (3, None, 7), (4, 2, 23)])
def test_convolution_is_torchs(kernel: int, dilation: int | None, time: int, poisoned: None) -> None:
    config = EngramConfig(kernel=kernel, dilation=dilation)
    layer = Engram(config, 6, 2)
    nn.init.normal_(layer.conv)
    x = torch.randn(3, time, 2, 6)
    step = dilation or config.ngram
    padded = F.pad(x.flatten(2).transpose(1, 2), ((kernel - 1) * step, 0))
    expected = F.conv1d(padded, layer.conv.view(12, 1, kernel), dilation=step, groups=12).transpose(1, 2)
    got = layer._convolve(x, layout(3, time, "cpu"), None)
    torch.testing.assert_close(got.flatten(2), expected, atol=1e-6, rtol=1e-5)


def test_gate_in_closed_form() -> None:
    query = torch.zeros(1, 1, 5, 4)
    query[0, 0, :, 0] = torch.tensor([0.0, -0.0, 2e-8, 8.0, -8.0])  # scores are halves of these
    key = torch.ones(1, 1, 5, 4)
    expected = torch.tensor([0.0, 0.0, 1e-3, 2.0, -2.0]).sigmoid()
    torch.testing.assert_close(engram.gate(query, key)[0, 0], expected)
    expected = torch.tensor([1e-3, 1e-3, 1e-3, 2.0, -2.0]).sigmoid()
    torch.testing.assert_close(engram.gate(query, key, "copysign")[0, 0], expected)


def test_slope_of_the_signed_root() -> None:
    scores = torch.tensor([0.5e-6, 1.1e-6, 1.0, -1.0])
    query = scores.view(1, 1, 4, 1).requires_grad_()
    engram.gate(query, torch.ones(1, 1, 4, 1)).sum().backward()
    one = torch.tensor(1.0).sigmoid().item()
    slopes = [0.0, 0.25 * 0.5 / math.sqrt(1.1e-6), one * (1 - one) / 2, one * (1 - one) / 2]
    torch.testing.assert_close(query.grad.flatten(), torch.tensor(slopes), rtol=1e-3, atol=0)


def test_reset_is_the_table_of_inits() -> None:
    layer = Engram(EngramConfig(bias=True), 16, 3)
    for parameter in layer.parameters():
        nn.init.constant_(parameter, 7.0)
    layer.reset(torch.Generator().manual_seed(1), std=0.5)
    assert (layer.conv == 0).all()
    assert (layer.key_proj.bias == 0).all()
    assert all((norm == 1).all() for norm in (layer.conv_norm, layer.gate.key_norm, layer.gate.query_norm))
    assert 0.45 < layer.key_proj.weight.std() < 0.55
    again = Engram(EngramConfig(bias=True), 16, 3)
    again.reset(torch.Generator().manual_seed(1), std=0.5)
    assert all(torch.equal(a, b) for a, b in zip(layer.parameters(), again.parameters(), strict=True))


def test_bfloat16_keeps_its_dtype_and_gates_in_float32() -> None:
    layer = Engram(EngramConfig(), 16, 2).bfloat16()
    seen: list[Tensor] = []
    layer.gate.register_forward_hook(lambda module, args, out: seen.append(out))
    hidden, memory = torch.randn(1, 5, 2, 16).bfloat16(), torch.randn(1, 5, 128)
    out = layer(hidden, memory, layout(1, 5, "cpu"))
    assert out.dtype == torch.bfloat16
    assert seen[0].dtype == torch.float32
    assert ((seen[0] > 0) & (seen[0] < 1)).all()


def test_saved_addresses_load_and_bring_the_map() -> None:
    canonical = torch.randperm(30)
    saved = Addresses(EngramConfig(seed=3), canonical, 32)
    assert "offsets" not in saved.state_dict()
    untold = Addresses(EngramConfig(seed=3), None, 32)
    untold.load_state_dict(saved.state_dict())
    ids = torch.randint(30, (2, 9))
    assert torch.equal(untold(ids, layout(2, 9, "cpu")), saved(ids, layout(2, 9, "cpu")))
    assert untold.fingerprint() == saved.fingerprint()
    digest = hashlib.sha256(canonical.numpy().astype("<i4").tobytes()).hexdigest()
    assert json.loads(json.dumps(saved.fingerprint()))["canonical_sha256"] == digest


@pytest.mark.parametrize("told", [True, False])
@pytest.mark.parametrize(
    ("config", "canonical", "names"),
    [
        (EngramConfig(seed=1), torch.arange(30), "other multipliers than"),
        (EngramConfig(rows_per_head=(4000, 4096)), torch.arange(30), "other primes than"),
        (EngramConfig(seed=1, rows_per_head=(4000, 4096)), torch.arange(30), "other multipliers and other primes than"),
        (EngramConfig(), torch.arange(30).flip(0), "other canonical map than"),
    ],
)
def test_another_models_addresses_are_refused(told: bool, config: EngramConfig, canonical: Tensor, names: str) -> None:
    saved = Addresses(config, canonical, 30)
    ours = Addresses(EngramConfig(), torch.arange(30) if told else None, 30)
    if not told and "canonical" in names:
        ours.load_state_dict(saved.state_dict())  # it had none of its own
        return
    with pytest.raises(ValueError, match=names):
        ours.load_state_dict(saved.state_dict())


def test_a_damaged_map_is_refused_by_its_digest() -> None:
    state = Addresses(EngramConfig(), torch.arange(30), 30).state_dict()
    state["canonical_map"] = state["canonical_map"].flip(0)
    for canonical in (None, torch.arange(30), torch.arange(30).flip(0)):
        with pytest.raises(ValueError, match="canonical map"):
            Addresses(EngramConfig(), canonical, 30).load_state_dict(state)
    with pytest.raises(ValueError, match="canonical map"):  # folded ids for a model of raw ones
        Addresses(EngramConfig(canonical=False), None, 30).load_state_dict(
            Addresses(EngramConfig(), torch.arange(30).flip(0), 30).state_dict()
        )


def test_built_on_no_device_and_moved_it_has_its_numbers() -> None:
    with torch.device("meta"):
        addresses = Addresses(EngramConfig(), torch.arange(30, device="cpu"), 30)
        layer = Engram(EngramConfig(), 8, 2)
    assert layer.conv.is_meta
    expected = Addresses(EngramConfig(), torch.arange(30), 30).state_dict()
    moved = addresses.to("meta").to_empty(device="cpu").bfloat16()
    for name, value in moved.state_dict().items():
        assert torch.equal(value, expected[name])
    assert torch.equal(moved.offsets, addresses.offsets)


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
    ],
)
def test_bad_configs_are_refused(changes: dict, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        EngramConfig(**changes)
    config = EngramConfig()
    object.__setattr__(config, "sign", "plus")  # past beartype, which checks the annotation in tests
    with pytest.raises(ValueError, match="expected sign or copysign"):
        config.__post_init__()


@pytest.mark.parametrize(
    ("config", "canonical", "vocabulary", "reason"),
    [
        ({}, torch.arange(9), 8, "got 9 ids, expected at most"),
        ({}, torch.tensor([0, 2]), 2, "got gaps"),
        ({}, torch.tensor([-2, 0]), 2, "negative"),
        ({}, None, None, "neither"),
        ({"pad_id": 8}, torch.arange(8), 9, "pad_id: got 8, expected an id of the tokenizer, below 8"),
    ],
)
def test_bad_maps_are_refused(config: dict, canonical: Tensor | None, vocabulary: int | None, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        Addresses(EngramConfig(**config), canonical, vocabulary)
    with pytest.raises(ValueError, match="expected at least 1 of each"):
        Engram(EngramConfig(), 0)


@pytest.mark.slow  # torch.compile takes half a minute
@pytest.mark.compiled
def test_compiled_as_eager() -> None:
    rig = Rig()
    ids, documents = torch.randint(40, (2, 17)), torch.randint(2, (2, 17)).cumsum(1)
    where = layout(2, 17, "cpu", documents=documents)
    rows = torch.compile(rig.addresses, fullgraph=True, backend="aot_eager")(ids, where)
    assert torch.equal(rows, rig.addresses(ids, where))
    hidden, memory = torch.randn(2, 17, 2, 8), torch.randn(2, 17, rig.config.memory_width)
    layer = rig.layers[0]
    out = torch.compile(layer, fullgraph=True, backend="aot_eager")(hidden, memory, where)
    torch.testing.assert_close(out, layer(hidden, memory, where))
