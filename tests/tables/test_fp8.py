"""Tests the bytes and the values of fp8 records, and the refusal of values that do not fit."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from rorqual.tables import dequantise, quantise, record_bytes
from rorqual.tables.fp8 import lookup, width_of

pytestmark = pytest.mark.engram

# e4m3 has two codes that are nan, and no infinities.
CODES = [code for code in range(256) if code & 0x7F != 0x7F]


def number(code: int) -> float:
    """Returns the value of an e4m3 code, from its definition.

    It has a sign, 4 bits of exponent with bias 7, and 3 bits of fraction.
    """
    exponent = code >> 3 & 15
    fraction = code & 7
    size = (1 + fraction / 8) * 2.0 ** (exponent - 7) if exponent else fraction / 8 * 2.0**-6
    return -size if code & 128 else size


SIZES = np.array([number(code) for code in range(0x7F)])


def expected(block: list[float]) -> tuple[float, list[float]]:
    """Returns the scale and the values of one block in exact double arithmetic.

    It searches all e4m3 numbers.
    """
    largest = max(abs(value) for value in block)
    scale = next(2.0**e for e in range(-126, 128) if largest <= 448 * 2.0**e) if largest else 1.0
    return scale, [nearest(value / scale) * scale for value in block]


def nearest(value: float) -> float:
    """Returns the e4m3 number nearest to a value of at most 448.

    Of two equally near it is the one whose last bit is 0.
    """
    distances = np.abs(SIZES - abs(value))
    codes = np.flatnonzero(distances == distances.min())
    return math.copysign(SIZES[min(codes, key=lambda code: code & 1)], value)


def test_a_record_is_a_byte_a_value_and_a_byte_every_32() -> None:
    assert [record_bytes(width) for width in (32, 64, 256)] == [33, 66, 264]
    assert [width_of(record) for record in (33, 66, 264)] == [32, 64, 256]
    assert quantise(torch.randn(5, 64)).shape == (5, 66)


@pytest.mark.parametrize("exponent", [-126, -30, 0, 1, 100, 119])
def test_every_e4m3_number_comes_back(exponent: int) -> None:
    """A block that contains 448 times its scale keeps every e4m3 number exactly."""
    values = torch.full((len(CODES), 32), 448.0)
    values[:, 1] = torch.tensor([number(code) for code in CODES])
    values = (values.double() * 2.0**exponent).float()
    records = quantise(values)
    assert records[:, 1].tolist() == CODES
    assert (records[:, 32] == exponent + 127).all()
    assert torch.equal(dequantise(records, 32), values)


def test_decoding_follows_the_definition_for_every_byte_and_scale() -> None:
    codes, scales = torch.meshgrid(torch.tensor(CODES), torch.arange(255), indexing="ij")
    records = torch.zeros(codes.numel(), 33, dtype=torch.uint8)
    records[:, 5], records[:, 32] = codes.flatten(), scales.flatten()
    exact = np.array([number(code) for code in CODES])[:, None] * 2.0 ** (np.arange(255) - 127.0)
    with np.errstate(over="ignore"):
        expected = torch.from_numpy(exact.astype(np.float32)).flatten()
    result = dequantise(records, 32)
    assert torch.equal(result[:, 5], expected)
    assert not result[:, :5].any()
    assert not result[:, 6:].any()


def test_what_is_no_number_stays_none() -> None:
    records = torch.zeros(3, 33, dtype=torch.uint8)
    records[0, 2], records[1, 3], records[2, 32] = 0x7F, 0xFF, 255
    result = dequantise(records, 32).isnan()
    assert result[0].nonzero().tolist() == [[2]]
    assert result[1].nonzero().tolist() == [[3]]
    assert result[2].all()


# The next larger number rounds to infinity.
LARGEST = float(np.nextafter(np.float32(248 * 2.0**120), np.float32(0)))
FLOATS = st.floats(-LARGEST, LARGEST, width=32)
TIES = [LARGEST, 448.0, 449.0, 464.0, 0.875, 17.0, 19.0, 2.0**-10, 3 * 2.0**-10, 2.0**-149, -0.0]
BLOCKS = st.one_of(
    st.lists(FLOATS, min_size=1, max_size=32),
    st.lists(st.sampled_from(TIES), min_size=1, max_size=8),
)


@settings(max_examples=300, deadline=None)
@given(block=BLOCKS)
def test_scale_and_rounding_are_those_of_exact_arithmetic(block: list[float]) -> None:
    """Compares ties, subnormals, zeros and the largest float with a search in double.

    The search goes through all e4m3 numbers.
    """
    block = block + [0.0] * (32 - len(block))
    scale, values = expected(block)
    records = quantise(torch.tensor([block], dtype=torch.float32))
    assert 2.0 ** (int(records[0, 32]) - 127) == scale
    assert dequantise(records, 32)[0].double().tolist() == values


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("rows", "width"), [(1, 32), (3, 96), (700, 256), (5, 65536 + 32)])
def test_error_is_bounded_at_every_size(dtype: torch.dtype, rows: int, width: int) -> None:
    """The error is at most |v| / 16 where the value is normal beside its scale, s / 1024 below.

    Blocks do not influence each other.
    """
    values = (torch.randn(rows, width) * torch.randn(rows, width).mul(8).exp2()).to(dtype)
    records = quantise(values)
    result = dequantise(records, width)
    exact = values.float()
    scale = (records[:, width:].double() - 127).exp2().repeat_interleave(32, 1)
    bound = torch.where(exact.abs() >= scale / 64, exact.abs() / 16, scale / 1024)
    assert ((result - exact).abs() <= bound).all()
    assert torch.equal(dequantise(quantise(result), width), result)
    for block in range(0, width, max(32, width // 4 // 32 * 32)):
        alone = dequantise(quantise(values[:, block : block + 32]), 32)
        assert torch.equal(alone, result[:, block : block + 32])


def test_any_shape_of_rows_into_given_memory() -> None:
    records = quantise(torch.randn(24, 64))
    flat = dequantise(records, 64)
    assert torch.equal(dequantise(records.view(2, 3, 4, 66), 64), flat.view(2, 3, 4, 64))
    assert dequantise(records[:0], 64).shape == (0, 64)
    assert torch.equal(dequantise(records[3], 64), flat[3])
    out = torch.full((24, 64), math.nan)
    assert dequantise(records, 64, out=out) is out
    assert torch.equal(out, flat)
    width = torch.zeros(24, 99, dtype=torch.uint8)
    width[:, :66] = records
    assert torch.equal(dequantise(width[::2, :66], 64), flat[::2])


@pytest.mark.parametrize("width", [1, 31, 33, 80])
def test_widths_without_whole_blocks_are_refused(width: int) -> None:
    fitting = -(-width // 32) * 32
    with pytest.raises(
        ValueError,
        match=f"got rows of width {width}, expected a multiple of 32.*zeros to {fitting}",
    ):
        quantise(torch.randn(2, width))
    with pytest.raises(ValueError, match=f"got rows of width {width}"):
        record_bytes(width)
    with pytest.raises(ValueError, match="got records of 34 bytes"):
        width_of(34)
    with pytest.raises(ValueError, match="got records of 33 bytes, expected 66"):
        dequantise(torch.zeros(2, 33, dtype=torch.uint8), 64)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, -248 * 2.0**120])
def test_values_that_are_no_numbers_are_refused(bad: float) -> None:
    values: Tensor = torch.randn(7, 64)
    values[4, 40] = bad
    with pytest.raises(
        ValueError, match=r"got a value in row 4 that is nan, infinite or beyond 3.296e\+38"
    ):
        quantise(values)


# 448 * 2^127 is inf, of which numpy warns.
@pytest.mark.slow
@pytest.mark.interpreted
@pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")
def test_tiles_look_up_every_byte_under_every_scale(
    tiled: torch.device, poisoned: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    codes = torch.arange(256, dtype=torch.uint8)
    values = codes.view(1, 8, 32).expand(256, 8, 32).reshape(-1, 32)
    records = torch.cat([values, codes.repeat_interleave(8)[:, None]], 1).to(tiled)
    from rorqual.kernels import triton_rows

    # The interpreter's time depends on the number of programs, not on the work of each.
    monkeypatch.setattr(triton_rows, "VALUES", 1 << 15)
    ids = torch.randperm(2048).to(tiled)
    ours = triton_rows.lookup(records, ids, 32)
    expected = lookup.reference(records, ids, 32)
    torch.testing.assert_close(ours, expected, rtol=0, atol=0, equal_nan=True)
