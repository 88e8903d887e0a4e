"""Tests the grouped product against one product for each expert, forward and backward.

Sizes are odd or empty, and unused rows are poisoned.
"""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from rorqual.layers.experts import Experts, grouped_product

FLOATS = [torch.float32, torch.bfloat16, torch.float64]


def one_by_one(experts: Experts, rows: Tensor, counts: Tensor) -> Tensor:
    """Computes the experts with a plain loop."""
    out = []
    start = 0
    for expert, count in enumerate(counts.tolist()):
        ours = rows[start : start + count]
        gate, up = (ours @ experts.gate_up[expert].to(ours.dtype)).chunk(2, -1)
        out.append((F.silu(gate) * up) @ experts.down[expert].to(ours.dtype))
        start += count
    return torch.cat(out)


def close(one: Tensor, two: Tensor, dtype: torch.dtype) -> None:
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float64: 1e-12}[dtype]
    torch.testing.assert_close(
        one,
        two,
        rtol=tolerance,
        atol=tolerance * (two.detach().abs().max().item() if two.numel() else 1.0),
    )


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(
    ("dim", "width", "counts"),
    [
        (64, 32, [5, 0, 7, 1]),
        (5, 3, [2, 0, 0, 4]),
        (8, 6, [0, 3, 0]),
        (12, 8, [0, 0]),
        (24, 20, [1]),
        (33, 16, [0, 9]),
        (8, 8, [70, 0, 130, 3, 64]),
    ],
)
def test_equal_to_a_loop_over_experts(
    dim: int, width: int, counts: list[int], dtype: torch.dtype
) -> None:
    experts = Experts(len(counts), dim, width).to(dtype)
    rows = torch.randn(sum(counts), dim, dtype=dtype)
    count = torch.tensor(counts)
    weights = torch.randn_like(rows)
    results = []
    for run in (experts, lambda rows, count: one_by_one(experts, rows, count)):
        leaf = rows.clone().requires_grad_()
        experts.zero_grad()
        out = run(leaf, count)
        (out * weights).sum().backward()
        results.append((out.detach(), leaf.grad, experts.gate_up.grad, experts.down.grad))
    for one, two in zip(*results, strict=True):
        close(one, two, dtype)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(0, 6), min_size=1, max_size=5), st.integers(1, 9), st.integers(1, 9))
def test_equal_at_any_size(counts: list[int], dim: int, width: int) -> None:
    rows = torch.randn(sum(counts), dim)
    weight = torch.randn(len(counts), dim, width)
    parts = zip(rows.split(counts), weight, strict=True)
    expected = torch.cat([piece @ ours for piece, ours in parts])
    torch.testing.assert_close(grouped_product(rows, weight, torch.tensor(counts)), expected)


@pytest.mark.parametrize("dim", [4, 5])
def test_experts_without_rows_get_a_zero_gradient(dim: int) -> None:
    experts = Experts(3, dim, dim)
    experts(torch.randn(4, dim), torch.tensor([0, 4, 0])).sum().backward()
    assert experts.gate_up.grad[1].abs().sum() > 0
    assert experts.gate_up.grad[[0, 2]].abs().sum() == 0
    assert experts.down.grad[[0, 2]].abs().sum() == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("counts", [[3, 0, 70], [100, 1, 30]])
def test_what_lies_behind_the_last_expert_reaches_no_gradient(
    counts: list[int], dtype: torch.dtype
) -> None:
    """Padding leaves rows after the last expert that were never computed."""
    rows = torch.randn(sum(counts) + 40, 16).to(dtype)
    weight = torch.randn(3, 16, 8).to(dtype)
    rows[sum(counts) :] = torch.nan
    ours, alone = (weight.clone().requires_grad_() for _ in range(2))
    grouped_product(rows, ours, torch.tensor(counts))[: sum(counts)].sum().backward()
    grouped_product(rows[: sum(counts)], alone, torch.tensor(counts)).sum().backward()
    assert ours.grad.isfinite().all()
    torch.testing.assert_close(ours.grad, alone.grad)


def test_an_expanded_gradient_and_rows_that_are_a_view_are_taken() -> None:
    rows = torch.randn(16, 6).T.requires_grad_()  # not contiguous
    weight = torch.randn(2, 16, 8, requires_grad=True)
    grouped_product(rows, weight, torch.tensor([2, 4])).sum().backward()
    torch.testing.assert_close(rows.grad[0], weight.detach()[0].sum(1))


def test_gradients_are_those_of_the_formula() -> None:
    experts = Experts(3, 4, 2).double()
    rows = torch.randn(5, 4, dtype=torch.float64, requires_grad=True)
    counts = torch.tensor([2, 0, 3])
    assert torch.autograd.gradcheck(
        lambda x, *_: experts(x, counts), (rows, experts.gate_up, experts.down)
    )


def test_autocast_is_followed() -> None:
    experts = Experts(2, 16, 8)
    rows = torch.randn(6, 16)
    counts = torch.tensor([4, 2])
    expected = one_by_one(experts, rows.bfloat16(), counts)
    with torch.autocast("cpu", torch.bfloat16):
        out = experts(rows, counts)
    assert out.dtype == torch.bfloat16
    close(out, expected, torch.bfloat16)
    out.float().square().sum().backward()
    assert experts.gate_up.grad.dtype == torch.float32


@pytest.mark.compiled
@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compiles_without_a_break(dtype: torch.dtype) -> None:
    experts = Experts(4, 16, 8).to(dtype)
    rows = torch.randn(10, 16, dtype=dtype)
    counts = torch.tensor([3, 0, 6, 1])
    run = torch.compile(experts, fullgraph=True, backend="aot_eager")
    results = []
    for module in (experts, run):
        leaf = rows.clone().requires_grad_()
        experts.zero_grad()
        out = module(leaf, counts)
        out.float().square().sum().backward()
        results.append((out.detach(), leaf.grad, experts.gate_up.grad, experts.down.grad))
    for one, two in zip(*results, strict=True):
        close(two, one, dtype)
