"""Tests the formats of published checkpoints against transformers' and nemo-automodel's readers."""

import pytest
import torch
from transformers.integrations.finegrained_fp8 import Fp8Dequantize

from rorqual.hub import formats
from rorqual.layers.cache_formats import LEVELS, e2m1_codes, power_of_two_above

SHAPES = [(64, 96), (128, 256), (32, 32)]


def spread(*shape: int, seed: int = 0) -> torch.Tensor:
    """Returns normal numbers whose magnitudes differ by many powers of two between rows."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(shape, generator=generator)
    return values * 2.0 ** torch.randint(-30, 30, (shape[0], 1), generator=generator)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("block", [(32, 32), (1, 32), (16, 16)])
@pytest.mark.parametrize("power_of_two", [True, False])
def test_e4m3_is_read_as_transformers_reads_it(shape, block, power_of_two):
    weight, scale = formats.encode_e4m3(spread(*shape), block, power_of_two=power_of_two)
    assert scale.dtype == (torch.float8_e8m0fnu if power_of_two else torch.float32)
    ours = formats.decode(weight, scale, block)
    theirs = Fp8Dequantize(None)._dequantize_one(weight, scale, torch.float32)
    assert torch.equal(ours, theirs)
    for dtype in (torch.bfloat16, torch.float16):
        theirs = Fp8Dequantize(None)._dequantize_one(weight, scale, dtype)
        assert torch.equal(ours.to(dtype), theirs)


def test_e8m0_scales_are_read_from_bytes():
    weight, scale = formats.encode_e4m3(spread(64, 64), (32, 32), power_of_two=True)
    as_bytes = scale.view(torch.uint8)
    theirs = Fp8Dequantize(None)._dequantize_one(weight, as_bytes, torch.float32)
    assert torch.equal(formats.decode(weight, as_bytes, (32, 32)), theirs)


def test_every_byte_of_mxfp4_is_read_as_transformers_reads_it():
    packed = torch.arange(256, dtype=torch.uint8).view(torch.int8).view(4, 64)
    scale = torch.tensor([[1, 100, 127, 254]] * 4, dtype=torch.uint8).view(torch.float8_e8m0fnu)
    ours = formats.decode(packed, scale, formats.ROWS)
    theirs = Fp8Dequantize(None)._dequantize_one(packed, scale, torch.float32)
    assert torch.equal(ours, theirs)
    assert (ours[0, :2] == torch.tensor([0.0, 0.0])).all()
    assert ours[0, 2] == 0.5 * 2.0**-126, "the low half of a byte is the even column"


@pytest.mark.parametrize("shape", [(128, 128), (130, 300), (5, 7), (256, 129)])
def test_incomplete_blocks(shape):
    values = spread(*shape)
    for block in ((128, 128), (32, 32)):
        weight, scale = formats.encode_e4m3(values, block, power_of_two=True)
        assert tuple(scale.shape) == formats.scale_shape(shape, block)
        decoded = formats.decode(weight, scale, block)
        expected = torch.cat(
            [
                torch.cat(
                    [
                        weight[r : r + block[0], c : c + block[1]].float()
                        * scale[r // block[0], c // block[1]].float()
                        for c in range(0, shape[1], block[1])
                    ],
                    dim=1,
                )
                for r in range(0, shape[0], block[0])
            ]
        )
        assert torch.equal(decoded, expected)


def test_matrices_larger_than_are_decoded_at_a_time(monkeypatch):
    weight, scale = formats.encode_e4m3(spread(100, 64), (32, 32), power_of_two=True)
    whole = formats.decode(weight, scale, (32, 32))
    monkeypatch.setattr(formats, "DECODED_TOGETHER", 64)
    assert torch.equal(formats.decode(weight, scale, (32, 32)), whole)


def test_one_scale_for_all():
    weight = spread(5, 6).clamp(-400, 400).to(torch.float8_e4m3fn)
    for scale in (torch.tensor(0.5), torch.tensor([0.5]), torch.tensor([[0.5]])):
        assert torch.equal(formats.decode(weight, scale, None), weight.float() / 2)


def test_encoding_keeps_what_the_format_has():
    weight, scale = formats.encode_e4m3(spread(64, 64), (32, 32), power_of_two=True)
    values = formats.decode(weight, scale, (32, 32))
    again = formats.decode(*formats.encode_e4m3(values, (32, 32), power_of_two=True), (32, 32))
    assert torch.equal(again, values)
    values = formats.decode(*formats.encode_e2m1(spread(9, 96)), formats.ROWS)
    assert torch.equal(formats.decode(*formats.encode_e2m1(values), formats.ROWS), values)


def test_encoding_is_close():
    values = spread(64, 64, seed=3)
    decoded = formats.decode(*formats.encode_e4m3(values, (1, 32), power_of_two=True), (1, 32))
    # An e4m3 number is off by a sixteenth, or by a share of the largest where it is small.
    bound = (values.abs() / 16).maximum(values.abs().amax(1, keepdim=True) * 2.0**-15)
    assert ((decoded - values).abs() <= bound).all()
    decoded = formats.decode(*formats.encode_e2m1(values), formats.ROWS)
    assert ((decoded - values).abs() <= values.abs().amax(1, keepdim=True) / 3).all()


def test_zeros_are_encoded_as_zeros():
    for encoded, block in (
        (formats.encode_e4m3(torch.zeros(32, 32), (32, 32), power_of_two=True), (32, 32)),
        (formats.encode_e2m1(torch.zeros(2, 32)), formats.ROWS),
    ):
        assert not formats.decode(*encoded, block).any()


def test_powers_of_two_and_codes():
    x = torch.tensor([1.0, 1.0000001, 1.5, 2.0, 0.75, 2.0**-126])
    assert power_of_two_above(x).tolist() == [1.0, 2.0, 2.0, 2.0, 1.0, 2.0**-126]
    levels = torch.tensor(LEVELS)
    assert e2m1_codes(levels).tolist() == list(range(8))
    middles = (levels[1:] + levels[:-1]) / 2
    assert e2m1_codes(middles).tolist() == [0, 2, 2, 4, 4, 6, 6], "a tie to the even code"


def test_bad_input():
    weight, scale = formats.encode_e4m3(spread(64, 64), (32, 32), power_of_two=True)
    with pytest.raises(ValueError, match=r"got \(2, 2\) for 64 rows of 64 in blocks of 16 x 16"):
        formats.decode(weight, scale, (16, 16))
    with pytest.raises(ValueError, match="got rows of width 33, expected a multiple of 32"):
        formats.encode_e2m1(torch.zeros(2, 33))


def test_v41_tensors_are_read_as_the_reference_reads_them():
    adapter = pytest.importorskip(
        "nemo_automodel.components.models.deepseek_v41.state_dict_adapter",
        reason="nemo-automodel is not installed: make venv installs it",
    )
    read = adapter.dequantize_checkpoint_weight
    for shape in ((64, 96), (40, 50)):
        stored = formats.encode_e4m3(spread(*shape), (32, 32), power_of_two=True)
        assert torch.equal(formats.decode(*stored, (32, 32)), read(*stored, dtype=torch.float32))
    rows = formats.encode_e4m3(spread(50, 64), formats.ROWS, power_of_two=True)
    assert torch.equal(
        formats.decode(*rows, formats.ROWS), read(*rows, dtype=torch.float32, rowwise=True)
    )
    experts = formats.encode_e2m1(spread(50, 64))
    assert torch.equal(formats.decode(*experts, formats.ROWS), read(*experts, dtype=torch.float32))
