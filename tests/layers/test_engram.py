"""Tests Engram's gates and outputs against the authors' code, whole and in pieces."""

import json
import math
import pathlib
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from rorqual import kernels
from rorqual.layers import engram
from rorqual.layers.cache import BlockCache, Cache, Past
from rorqual.layers.context import Context, context
from rorqual.layers.engram import Addresses, Engram, EngramConfig, row_totals
from rorqual.tables import Handle
from tests.hub.doubles import Doubles

GOLDEN = pathlib.Path(__file__).resolve().parents[1] / "golden"
# The canonical ids of input.ids in engram_forward.safetensors, by the map that
# tests/data/test_tokenizer.py checks.
CANONICAL = [
    "46845 8066 74351 93553 3771 14812 81003 93377 25178 31255 10156 42016 "
    "27492 18291 25919 40657 32131 7304 9005",
    "586 85187 74193 82477 53180 80477 32974 44865 9824 2274 30407 12847 "
    "44953 96169 13803 38175 40077 21783 15886",
]

CPU = torch.device("cpu")


def looked_up(
    layer: Engram, hidden: Tensor, memory: Tensor, ctx: Context, cache: BlockCache | None = None
) -> Tensor:
    """Computes what the layer adds to the streams.

    memory is [B, T, R, head_dim] or, with its rows side by side, [B, T, M].
    """
    rows = memory if memory.dim() == 4 else memory.unsqueeze(-2)
    return layer(hidden, replace(ctx, rows=Handle(lambda: rows), cache=cache))


class Rig(nn.Module):
    """Two Engram layers with their tables.

    It maps ids and layout to rows and to the sum of both layers' outputs.
    """

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

    def new_cache(self) -> Cache:
        of = (1, 0, torch.float32, torch.device("cpu"))
        layers = [BlockCache(None, layer.new_cache(*of)) for layer in self.layers]
        return Cache(layers, Past(), self.addresses.new_cache(*of))

    @torch.no_grad()
    def forward(
        self, ids: Tensor, *, document_ids=None, lengths=None, cache: Cache | None = None
    ) -> tuple[Tensor, Tensor]:
        past = cache.past if cache else None
        where = context(*ids.shape, "cpu", document_ids=document_ids, lengths=lengths, past=past)
        rows = self.addresses(ids, where, cache.ids if cache else None)
        lookup_mask = self.addresses.lookup_mask(ids, where)
        hidden = self.hidden[ids]
        outs = [
            looked_up(
                layer,
                hidden,
                table[rows[i]],
                replace(where, lookup_mask=lookup_mask),
                cache and cache.layers[i],
            )
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
        "gating": st.sampled_from(["streams", "shared", "open"]),
        "canonical": st.booleans(),
        "rows_per_head": st.sampled_from([(31,), (31, 67), (5, 7, 31)]),
        "pad_id": st.sampled_from([0, 7]),
        "dead_tokens": st.sampled_from([(), (3, 9)]),
        "end_of_document": st.booleans(),
    }
)


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_in_chunks_of_any_size_as_at_once(data: st.DataObject) -> None:
    """Tests in float64: in float32 a gate whose score is near 0 keeps few digits of it."""
    torch.manual_seed(0)
    rig = Rig(**data.draw(VARIANTS)).double()
    rig.tables = [table.double() for table in rig.tables]
    rig.hidden = rig.hidden.double()
    batch = data.draw(st.integers(1, 3))
    time = data.draw(st.integers(1, 40))
    ids = torch.randint(40, (batch, time))
    document_ids = torch.randint(2, (batch, time)).cumsum(1) if data.draw(st.booleans()) else None
    with Doubles():
        rows, out = rig(ids, document_ids=document_ids)
    cache = rig.new_cache()
    done = [0] * batch
    ragged = data.draw(st.booleans())
    # Each call extends each sequence by a number of tokens of its own.
    while min(done) < time:
        largest = data.draw(st.integers(1, 8))
        counts = [
            min(data.draw(st.integers(0, largest)) if ragged else largest, time - n) for n in done
        ]
        piece = torch.zeros(batch, max(1, *counts), dtype=torch.long)
        numbers = piece.clone()
        for b, (start, count) in enumerate(zip(done, counts, strict=True)):
            piece[b, :count] = ids[b, start : start + count]
            if document_ids is not None:
                numbers[b, :count] = document_ids[b, start : start + count]
        reference = {"document_ids": None if document_ids is None else numbers, "lengths": counts}
        with Doubles():
            got_rows, got = rig(piece, cache=cache, **reference)
        for b, (start, count) in enumerate(zip(done, counts, strict=True)):
            assert torch.equal(got_rows[:, b, :count], rows[:, b, start : start + count])
            expected = out[b, start : start + count]
            torch.testing.assert_close(got[b, :count], expected, atol=1e-11, rtol=1e-10)
        done = [start + count for start, count in zip(done, counts, strict=True)]
    # Each sequence alone gives the same result as in a batch.
    for row in range(batch):
        alone = None if document_ids is None else document_ids[row : row + 1]
        with Doubles():
            alone_rows, alone_out = rig(ids[row : row + 1], document_ids=alone)
        assert torch.equal(alone_rows, rows[:, row : row + 1])
        torch.testing.assert_close(alone_out, out[row : row + 1], atol=1e-11, rtol=1e-10)


@settings(max_examples=30, deadline=None)
@given(data=st.data())
def test_forgotten_tokens_and_reordered_sequences_leave_no_trace(data: st.DataObject) -> None:
    torch.manual_seed(0)
    rig = Rig(**data.draw(VARIANTS))
    ids = torch.randint(40, (3, 60))
    cache = rig.new_cache()
    stored = torch.zeros(3, 0, dtype=torch.int64)
    for _ in range(data.draw(st.integers(1, 8))):
        count = data.draw(st.integers(1, 7))
        new = ids[:, stored.shape[1] : stored.shape[1] + count]
        if not new.shape[1]:
            break
        stored = torch.cat([stored, new], 1)
        rows, out = rig(new, cache=cache)
        whole_rows, whole = rig(stored)
        assert torch.equal(rows, whole_rows[:, :, -new.shape[1] :])
        torch.testing.assert_close(out, whole[:, -new.shape[1] :], atol=1e-6, rtol=1e-5)
        dropped = data.draw(st.integers(0, stored.shape[1]))
        cache.crop(dropped)
        stored = stored[:, : stored.shape[1] - dropped]
        order = torch.tensor(data.draw(st.lists(st.integers(0, 2), min_size=3, max_size=3)))
        cache.select(order)
        stored = stored[order]
        ids = torch.randint(40, (3, 60))
    cache.reset()
    assert torch.equal(rig(ids, cache=cache)[0], rig(ids)[0])


@settings(max_examples=30, deadline=None)
@given(data=st.data())
def test_packed_documents_never_see_each_other(data: st.DataObject) -> None:
    torch.manual_seed(0)
    rig = Rig(**{**data.draw(VARIANTS), "end_of_document": True})
    lengths = data.draw(st.lists(st.integers(1, 12), min_size=1, max_size=5))
    parts = [torch.randint(40, (1, length)) for length in lengths]
    document_ids = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))[None]
    rows, out = rig(torch.cat(parts, 1), document_ids=document_ids)
    alone = [rig(piece) for piece in parts]
    assert torch.equal(rows, torch.cat([each[0] for each in alone], 2))
    torch.testing.assert_close(out, torch.cat([each[1] for each in alone], 1), atol=1e-6, rtol=1e-5)


def test_without_resets_documents_do_see_each_other() -> None:
    rig = Rig(end_of_document=False)
    ids = torch.arange(6)[None]
    document_ids = torch.tensor([[0, 0, 0, 1, 1, 1]])
    assert torch.equal(rig(ids, document_ids=document_ids)[0], rig(ids)[0])


@settings(max_examples=30, deadline=None)
@given(data=st.data())
def test_padding_is_invisible(data: st.DataObject) -> None:
    torch.manual_seed(0)
    rig = Rig(**data.draw(VARIANTS))
    ids = torch.randint(40, (2, data.draw(st.integers(1, 20))))
    more = data.draw(st.integers(1, 12))
    padded = torch.cat([ids, torch.randint(-100, 100, (2, more))], 1)
    time = ids.shape[1]
    ctx = context(*padded.shape, "cpu", lengths=[time, time])
    rows = rig.addresses(padded, ctx)
    out = rig(ids)
    assert torch.equal(rows[:, :, :time], out[0])
    got = rig(padded.clamp(0, 39), lengths=[time, time])[1]
    torch.testing.assert_close(got[:, :time], out[1], atol=1e-6, rtol=1e-5)


def test_look_back_stops_at_a_dead_token_and_it_looks_up_nothing() -> None:
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
        names = file.keys()
        golden = {name: file.get_tensor(name) for name in names}
    config = EngramConfig(
        layers=tuple(about["layer_ids"]),
        rows_per_head=tuple(about["rows_per_head"]),
        heads=about["heads"],
        head_dim=about["embed_per_ngram"] // about["heads"],
        kernel=about["kernel"],
        pad_id=about["pad_id"],
        bias=True,
    )
    prefix = f"layer{layer}."
    streams = about["streams"]
    dim = about["hidden"]
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
    where = context(*ids.shape, "cpu")
    rows = Addresses(config, None, 98_627)(ids, where)[config.layers.index(layer)]
    table = golden[prefix + "multi_head_embedding.embedding.weight"].clone().requires_grad_()
    hidden = golden["input.hidden"].clone().requires_grad_()
    out = looked_up(ours, hidden, table[rows], where)
    torch.testing.assert_close(out, golden[prefix + "out"], atol=5e-6, rtol=0)
    (out * golden[prefix + "grad_out"]).sum().backward()
    for got, name in (
        (hidden.grad, "hidden"),
        (table.grad, "embedding"),
        (ours.conv.grad.view(-1, 1, 4), "conv"),
    ):
        torch.testing.assert_close(got, golden[f"{prefix}grad_{name}"], atol=1e-5, rtol=0)


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


def fused_in_double(
    hidden, key, value, query_norm, key_norm, conv_norm, lookup_mask, sign, eps, conv_eps
) -> list[Tensor]:
    """Computes the layer's equations without rounding; returns [v] or [v, norm(v)]."""

    def normed(x: Tensor, weight: Tensor, least: float) -> Tensor:
        return weight * x / (x.square().mean(-1, keepdim=True) + least).sqrt()

    score = (normed(hidden, query_norm, eps) * normed(key, key_norm, eps)).sum(-1) / hidden.shape[
        -1
    ] ** 0.5
    root = torch.where(score.abs() < 1e-6, 1e-3, score.abs().clamp_min(1e-6).sqrt())
    signs = torch.where(score < 0, -1.0, 1.0) if sign == "copysign" else score.sign()
    gates = torch.sigmoid(root * signs)
    gates = gates if lookup_mask is None else gates * lookup_mask[..., None]
    gated = gates[..., None] * value[:, :, None]
    return [gated] if conv_norm is None else [gated, normed(gated, conv_norm, conv_eps)]


def given_to_fuse(
    shape, conv: bool, masked: bool, sign: str, dtype=torch.float32, device=CPU
) -> tuple:
    """Builds inputs of `fuse` whose scores are far from 0.

    Near 0 a rounded score has another slope.
    """
    hidden = torch.randn(shape)
    key = hidden * (0.5 + torch.rand(shape)) * torch.randn(shape[:3]).sign()[..., None]
    value, (query_norm, key_norm, conv_norm) = (
        torch.randn(*shape[:2], shape[3]),
        1 + 0.2 * torch.randn(3, *shape[2:]),
    )
    lookup_mask = torch.rand(shape[:2]) < 0.7 if masked else None
    floats = [x.to(device, dtype) for x in (hidden, key, value, query_norm, key_norm, conv_norm)]
    if not conv:
        floats[5] = None
    return (
        *floats,
        lookup_mask if lookup_mask is None else lookup_mask.to(device),
        sign,
        1.1920929e-7,
        1e-5,
    )


def with_gradients(function, arguments: tuple, weights: list[Tensor]) -> list[Tensor]:
    """Returns the outputs of `function` and the gradients of all of its float inputs.

    The gradients are those of the weighted sum of the outputs.
    """
    floats = [
        x.detach().requires_grad_() if isinstance(x, Tensor) and x.is_floating_point() else x
        for x in arguments
    ]
    out = [x for x in function(*floats) if x is not None]
    total = sum((x * weight.to(x)).sum() for x, weight in zip(out, weights, strict=False))
    return out + list(
        torch.autograd.grad(total, [x for x in floats if isinstance(x, Tensor) and x.requires_grad])
    )


def check_fuse(function, arguments: tuple, tolerance: float) -> None:
    """Compares outputs and gradients with the formula in double.

    Errors are relative to the largest value of each.
    """
    weights = [torch.randn(arguments[0].shape) for _ in range(2)]
    got = with_gradients(function, arguments, weights)
    exact = tuple(
        x.cpu().double() if isinstance(x, Tensor) and x.is_floating_point() else x
        for x in arguments
    )
    exact = tuple(x.cpu() if isinstance(x, Tensor) else x for x in exact)
    for ours, expected in zip(got, with_gradients(fused_in_double, exact, weights), strict=True):
        assert ours.dtype == arguments[0].dtype and ours.shape == expected.shape
        largest = expected.abs().max().item() if expected.numel() else 0.0
        torch.testing.assert_close(
            ours.cpu().double(), expected, atol=tolerance * max(largest, 1e-2), rtol=0
        )


SIZES = [(1, 1, 1, 1), (2, 7, 4, 3), (1, 7, 3, 130), (2, 1, 1, 80), (3, 2, 4, 5)]


@pytest.mark.parametrize("sign", ["sign", "copysign"])
@pytest.mark.parametrize(("conv", "masked"), [(True, True), (False, False), (True, False)])
@pytest.mark.parametrize("shape", SIZES)
def test_fusion_and_its_gradients(
    shape, conv: bool, masked: bool, sign: str, poisoned: None
) -> None:
    check_fuse(engram.fuse, given_to_fuse(shape, conv, masked, sign), 2e-5)


def check_slopes(function, device=CPU) -> None:
    """Checks the slopes with D = 1 and weights of 1.

    The score is exactly the key's norm weight; at 0 and below 1e-6 the root is flat.
    """
    scores = torch.tensor([0.0, 0.5e-6, -0.5e-6, 1.1e-6, -1.1e-6, 1.0, -4.0], device=device)
    one = torch.ones(1, 1, 7, 1, device=device)
    roots = {"sign": [0.0, 1e-3, -1e-3], "copysign": [1e-3, 1e-3, -1e-3]}
    for sign, flat in roots.items():
        weight = scores[:, None].clone().requires_grad_()
        gated, _ = function(one, one, one[:, :, 0], one[0, 0], weight, None, None, sign, 0.0, 0.0)
        gated.sum().backward()
        expected = torch.tensor([*flat, 1.1e-6**0.5, -(1.1e-6**0.5), 1.0, -2.0]).sigmoid()
        torch.testing.assert_close(gated.flatten().cpu(), expected)
        slope = torch.tensor([0.0, 0.0, 0.0, 0.5 / 1.1e-6**0.5, 0.5 / 1.1e-6**0.5, 0.5, 0.25])
        torch.testing.assert_close(
            weight.grad.flatten().cpu(), slope * expected * (1 - expected), rtol=1e-5, atol=0
        )


def test_fusion_is_flat_near_no_score() -> None:
    check_slopes(engram.fuse)


def check_the_rest(function, device=CPU) -> None:
    """Tests non-contiguous views, a value without gradient, and no tokens at all."""
    arguments = given_to_fuse((4, 3, 2, 6), True, True, "sign", device=device)
    views = (
        *(x.transpose(0, 1).contiguous().transpose(0, 1) for x in arguments[:3]),
        *arguments[3:6],
        arguments[6],
        *arguments[7:],
    )
    for ours, expected in zip(function(*views), function(*arguments), strict=True):
        assert torch.equal(ours, expected)
    alone = arguments[1].clone().requires_grad_()
    # The gradient goes through one of two results, to one of six inputs.
    function(arguments[0], alone, *arguments[2:])[1].sum().backward()
    assert alone.grad.isfinite().all() and alone.grad.any()
    for shape in ((0, 3, 2, 5), (2, 0, 2, 5)):
        check_fuse(function, given_to_fuse(shape, True, True, "sign", device=device), 0.0)


def test_fusion_of_views_and_of_nothing(poisoned: None) -> None:
    check_the_rest(engram.fuse)


@pytest.mark.parametrize("reentrant", [True, False])
def test_a_layer_that_is_computed_again_for_its_gradients(reentrant: bool) -> None:
    layer = Engram(EngramConfig(rows_per_head=(31, 67), heads=2, head_dim=3), 8, 2)
    where = context(2, 5, "cpu")
    layer.reset(std=0.5)
    nn.init.normal_(layer.conv)
    hidden = torch.randn(2, 5, 2, 8, requires_grad=True)
    memory = torch.randn(2, 5, 12, requires_grad=True)
    wanted = [hidden, memory, *layer.parameters()]

    def gradients(out: Tensor) -> list[Tensor]:
        for tensor in wanted:
            tensor.grad = None
        out.square().sum().backward()
        return [tensor.grad for tensor in wanted]

    expected = gradients(looked_up(layer, hidden, memory, where))
    again = gradients(
        checkpoint(
            lambda x, e: looked_up(layer, x, e, where), hidden, memory, use_reentrant=reentrant
        )
    )
    for ours, theirs in zip(again, expected, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5 * theirs.abs().max().item(), rtol=0)


def test_what_torch_makes_by_default_does_not_matter() -> None:
    """torch's default dtype and device do not change results.

    transformers sets another dtype while it loads; a caller may set another device.
    """
    window = torch.randn(2, 9, 3, 5)
    taps = torch.randn(3, 5, 4)
    arguments = given_to_fuse((2, 7, 3, 5), True, True, "sign")
    tokens = torch.randint(40, (2, 7))
    document_ids = torch.zeros(2, 9, dtype=torch.long)
    ctx = context(2, 7, "cpu")
    addresses = Addresses(EngramConfig(rows_per_head=(31, 67)), torch.arange(40), 40)
    weights = [torch.randn(2, 7, 3, 5) for _ in range(2)]

    def everything() -> list[Tensor]:
        result = with_gradients(engram.fuse, arguments, weights)
        for where in (None, document_ids):
            convolve = lambda *x, where=where: [engram.convolve(*x, where, 2)]  # noqa: E731
            result += with_gradients(convolve, (window, taps[..., :2]), weights)
        return [*result, addresses(tokens, ctx)]

    before = torch.get_default_dtype()
    expected = everything()
    try:
        torch.set_default_dtype(torch.float64)
        with torch.device("meta"):
            got = everything()
    finally:
        torch.set_default_dtype(before)
    for ours, theirs in zip(got, expected, strict=True):
        assert ours.dtype == theirs.dtype and torch.equal(ours, theirs)


@pytest.mark.slow
@pytest.mark.interpreted
def test_tiles_fuse_near_no_score_and_views(tiled: torch.device, poisoned: None) -> None:
    function = engram.fuse.choice.load("triton")
    check_slopes(function, tiled)
    check_the_rest(function, tiled)


@pytest.mark.slow
@pytest.mark.interpreted
def test_layer_on_tiles_is_the_layer(tiled: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    config = EngramConfig(rows_per_head=(31, 67), heads=2, head_dim=3)
    layer = Engram(config, 5, 3).to(tiled)
    where = context(2, 4, str(tiled), lengths=[2, 2])
    layer.reset(std=0.5)
    nn.init.normal_(layer.conv)
    hidden = torch.randn(2, 4, 3, 5)
    memory = torch.randn(2, 4, config.memory_width)
    weight = torch.randn(2, 4, 3, 5)
    results = []
    for kind in ("reference", "triton"):
        monkeypatch.setenv(kernels.VARIABLE, f"fuse={kind}")
        asked = [x.to(tiled).requires_grad_() for x in (hidden, memory)]
        out = looked_up(layer, *asked, where)
        wanted = [*asked, *layer.parameters()]
        results.append([out, *torch.autograd.grad((out * weight.to(tiled)).sum(), wanted)])
    for ours, expected in zip(*results, strict=True):
        torch.testing.assert_close(ours, expected, atol=2e-5, rtol=2e-4)


def test_whoever_watches_the_gate_sees_and_moves_it(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = Engram(EngramConfig(conv=False), 8, 2)
    where = context(2, 5, "cpu")
    layer.reset(std=0.5)
    hidden = torch.randn(2, 5, 2, 8)
    memory = torch.randn(2, 5, 128)
    alone = looked_up(layer, hidden, memory, where)
    seen = []
    hook = layer.gate.register_forward_hook(lambda module, args, out: seen.append(out))
    torch.testing.assert_close(looked_up(layer, hidden, memory, where), alone)
    hook.remove()
    hook = nn.modules.module.register_module_forward_hook(lambda module, args, out: None)
    monkeypatch.setattr(engram, "fuse", lambda *_: pytest.fail("fused, though somebody watches"))
    looked_up(layer, hidden, memory, where)
    hook.remove()
    hook = layer.gate.register_forward_hook(lambda module, args, out: torch.zeros_like(out))
    assert seen[0].shape == (2, 5, 2) and not looked_up(layer, hidden, memory, where).any()
    hook.remove()


@pytest.mark.parametrize(
    ("gating", "kernel", "dilation"),
    [("shared", 4, None), ("open", 4, None), ("open", 1, None), ("open", 3, 2), ("shared", 2, 1)],
)
def test_without_a_gate_a_stream(gating: str, kernel: int, dilation: int | None) -> None:
    """Compares with equations written out in double, gradients too.

    There is one gate, of the streams' mean; or none, so that v = W_v memory.
    """
    config = EngramConfig(
        rows_per_head=(31, 67), heads=2, head_dim=3, gating=gating, kernel=kernel, dilation=dilation
    )
    layer = Engram(config, 5, 3)
    dim = 5
    streams = 3
    time = 9
    valid = torch.arange(time).expand(2, time) < time - 1
    where = context(2, time, "cpu", lengths=[time - 1] * 2)
    layer.reset(std=0.5)
    nn.init.normal_(layer.conv)
    assert [name for name, _ in layer.named_parameters() if "key" in name or "query" in name] == (
        ["key_proj.weight", "gate.key_norm", "gate.query_norm"] if gating == "shared" else []
    )
    hidden = torch.randn(2, time, 3, 5)
    memory = torch.randn(2, time, config.memory_width)
    change = torch.randn(2, time, 3, 5)

    def plain(hidden: Tensor, memory: Tensor, p: dict[str, Tensor]) -> Tensor:
        gates = torch.ones(2, time, dtype=hidden.dtype)
        if gating == "shared":
            query = F.rms_norm(hidden.mean(2), (dim,), p["gate.query_norm"][0], config.eps)
            key = F.rms_norm(
                memory @ p["key_proj.weight"].T, (dim,), p["gate.key_norm"][0], config.eps
            )
            score = (query * key).sum(-1) / dim**0.5
            gates = (score.sign() * score.abs().sqrt()).sigmoid()
        gated = (gates * valid)[..., None] * (memory @ p["value_proj.weight"].T)
        gated = gated[:, :, None].expand(2, time, streams, dim)
        normed = F.rms_norm(gated, (dim,), None, config.conv_eps) * p["conv_norm"]
        step = dilation or config.ngram
        padded = F.pad(normed.flatten(2).transpose(1, 2), ((kernel - 1) * step, 0))
        taps = p["conv"].view(streams * dim, 1, kernel)
        convolved = F.conv1d(padded, taps, dilation=step, groups=streams * dim)
        return gated + F.silu(convolved.transpose(1, 2).unflatten(2, (streams, dim)))

    def run(function, dtype: torch.dtype) -> list[Tensor]:
        named = {
            name: value.detach().to(dtype).requires_grad_()
            for name, value in layer.named_parameters()
        }
        arguments = [
            hidden.to(dtype).requires_grad_(),
            memory.to(dtype).requires_grad_(),
            *named.values(),
        ]
        out = function(*arguments[:2], named)
        wanted = arguments if gating == "shared" else arguments[1:]
        return [out, *torch.autograd.grad((out * change.to(dtype)).sum(), wanted)]

    def ours_of(hidden: Tensor, memory: Tensor, named: dict[str, Tensor]) -> Tensor:
        ctx = replace(where, rows=Handle(lambda: memory.unsqueeze(-2)))
        return torch.func.functional_call(layer, named, (hidden, ctx))

    got = run(ours_of, torch.float32)
    for ours, expected in zip(got, run(plain, torch.float64), strict=True):
        torch.testing.assert_close(ours.double(), expected, atol=2e-5, rtol=2e-4)


def test_one_gate_of_equal_streams_is_a_gate_a_stream() -> None:
    whole, shared = (Engram(EngramConfig(gating=kind), 8, 3) for kind in ("streams", "shared"))
    shared.reset(std=0.5)
    ours = dict(shared.state_dict())
    ours["key_proj.weight"] = ours["key_proj.weight"].repeat(3, 1)
    whole.load_state_dict(
        {name: v.repeat(3, 1) if name.startswith("gate.") else v for name, v in ours.items()}
    )
    hidden = torch.randn(2, 5, 1, 8).expand(2, 5, 3, 8)
    memory = torch.randn(2, 5, 128)
    where = context(2, 5, "cpu")
    torch.testing.assert_close(
        looked_up(shared, hidden, memory, where), looked_up(whole, hidden, memory, where)
    )


def test_whoever_watches_sees_a_gate_a_stream_whatever_the_gating() -> None:
    for gating in ("streams", "shared", "open"):
        layer = Engram(EngramConfig(gating=gating), 8, 2).bfloat16()
        seen = []
        layer.reset(std=0.5)
        layer.gate.register_forward_hook(lambda module, args, out, seen=seen: seen.append(out))
        looked_up(
            layer, torch.randn(2, 5, 2, 8).bfloat16(), torch.randn(2, 5, 128), context(2, 5, "cpu")
        )
        assert seen[0].shape == (2, 5, 2) and seen[0].dtype == torch.float32
        assert torch.equal(seen[0][..., 0], seen[0][..., 1]) == (gating != "streams")
        assert bool((seen[0] == 1).all()) == (gating == "open")


def test_reset_is_the_table_of_inits() -> None:
    layer = Engram(EngramConfig(bias=True), 16, 3)
    for parameter in layer.parameters():
        nn.init.constant_(parameter, 7.0)
    layer.reset(torch.Generator().manual_seed(1), std=0.5)
    assert (layer.conv == 0).all()
    assert (layer.key_proj.bias == 0).all()
    assert all(
        (norm == 1).all() for norm in (layer.conv_norm, layer.gate.key_norm, layer.gate.query_norm)
    )
    assert 0.45 < layer.key_proj.weight.std() < 0.55
    again = Engram(EngramConfig(bias=True), 16, 3)
    again.reset(torch.Generator().manual_seed(1), std=0.5)
    assert all(
        torch.equal(a, b) for a, b in zip(layer.parameters(), again.parameters(), strict=True)
    )


def test_bfloat16_keeps_its_dtype_and_gates_in_float32() -> None:
    layer = Engram(EngramConfig(), 16, 2).bfloat16()
    seen: list[Tensor] = []
    layer.gate.register_forward_hook(lambda module, args, out: seen.append(out))
    hidden = torch.randn(1, 5, 2, 16).bfloat16()
    memory = torch.randn(1, 5, 128)
    out = looked_up(layer, hidden, memory, context(1, 5, "cpu"))
    assert out.dtype == torch.bfloat16
    assert seen[0].dtype == torch.float32
    assert ((seen[0] > 0) & (seen[0] < 1)).all()


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


def test_rows_of_another_width_are_refused() -> None:
    layer = Engram(EngramConfig(rows_per_head=(31, 67), heads=2, head_dim=3), 8)
    with pytest.raises(
        ValueError, match=r"got 16 numbers looked up a token, expected 12, 4 rows of 3"
    ):
        looked_up(layer, torch.zeros(1, 2, 1, 8), torch.zeros(1, 2, 16), context(1, 2, "cpu"))


def test_a_layer_of_no_width_is_refused() -> None:
    for sizes in ((0,), (8, 0)):
        with pytest.raises(ValueError, match="expected at least 1 of each"):
            Engram(EngramConfig(), *sizes)


@pytest.mark.slow  # torch.compile takes half a minute
@pytest.mark.compiled
def test_compiled_as_eager() -> None:
    rig = Rig()
    ids = torch.randint(40, (2, 17))
    document_ids = torch.randint(2, (2, 17)).cumsum(1)
    where = context(2, 17, "cpu", document_ids=document_ids)
    rows = torch.compile(rig.addresses, fullgraph=True, backend="aot_eager")(ids, where)
    assert torch.equal(rows, rig.addresses(ids, where))
    hidden = torch.randn(2, 17, 2, 8)
    memory = torch.randn(2, 17, rig.config.memory_width)
    layer = rig.layers[0]

    def call(hidden: Tensor, memory: Tensor) -> Tensor:
        return looked_up(layer, hidden, memory, where)

    out = torch.compile(call, fullgraph=True, backend="aot_eager")(hidden, memory)
    torch.testing.assert_close(out, looked_up(layer, hidden, memory, where))
