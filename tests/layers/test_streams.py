import os

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rorqual import kernels
from rorqual.layers import streams
from rorqual.layers.hyper import Connection, HyperConfig, Streams
from rorqual.layers.streams import sinkhorn

pytestmark = pytest.mark.hyper


# Without gradients and for few tokens a kernel runs in place of the reference.
both_ways = pytest.mark.parametrize("way", ["", "reference"], indirect=True)


@pytest.fixture
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(kernels.VARIABLE, request.param)


def outcome(function, arguments, pulls, *rest):
    """Returns the results of a function of tensors and the gradients of all of its inputs."""
    arguments = [x if x is None else x.detach().clone().requires_grad_() for x in arguments]
    made = function(*arguments, *rest)
    made = made if isinstance(made, tuple) else (made,)
    total = sum((x.float() * pull.to(x.device)).sum() for x, pull in zip(made, pulls, strict=True))
    return [*made, *torch.autograd.grad(total, [x for x in arguments if x is not None])]


def alike(ours, expected):
    """Compares within rounding of the dtype, relative to the largest value."""
    for a, b in zip(ours, expected, strict=True):
        assert a.dtype == b.dtype
        assert a.shape == b.shape
        if b.numel():
            tolerance = (2**-6 if b.dtype == torch.bfloat16 else 3e-6) * max(
                1e-3, b.abs().max().item()
            )
            torch.testing.assert_close(a, b, atol=tolerance, rtol=0)


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 5), st.integers(1, 4), st.integers(0, 20), st.floats(0.01, 4.0))
def test_sinkhorn_by_autograd(streams, iterations, tokens, deviation):
    logits = (
        torch.randn(streams, streams, tokens, dtype=torch.float64) * deviation
    ).requires_grad_()
    comb = logits.softmax(1) + 1e-6
    for axis in [0] + [1, 0] * (iterations - 1):
        comb = comb / (comb.sum(axis, keepdim=True) + 1e-6)
    pull = torch.randn_like(comb)
    ours = sinkhorn(logits, iterations)
    torch.testing.assert_close(ours, comb, atol=1e-12, rtol=0)
    grads = [torch.autograd.grad((y * pull).sum(), logits)[0] for y in (ours, comb)]
    torch.testing.assert_close(*grads, atol=1e-11, rtol=1e-9)


def test_nothing_of_the_iterations_is_stored():
    saved = []
    logits = torch.randn(4, 4, 100, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
        sinkhorn(logits * 1.0, 20)
    assert sum(x.numel() for x in saved) == logits.numel()


@both_ways
@pytest.mark.parametrize("deviation", [0.01, 1.0, 2.0, 5.0])
def test_only_the_axis_normalised_last_sums_to_one(deviation, way):
    comb = sinkhorn(torch.randn(4, 4, 5000) * deviation)
    assert (comb.sum(0) - 1).abs().max() < 1e-5
    other = (comb.sum(1) - 1).abs().max()
    assert other < 1e-4 if deviation < 0.5 else other < 1.0
    if deviation >= 2:
        assert other > 1e-2


# Autograd's own divisions overflow at 40.
@pytest.mark.parametrize(("size", "eps"), [(20.0, 1e-6), (40.0, 0.0)])
def test_backward_does_not_overflow(size: float, eps: float) -> None:
    logits = (torch.randn(4, 4, 2000).sign() * size).requires_grad_()
    sinkhorn(logits, 20, eps).backward(torch.randn(4, 4, 2000) * 1e4)
    assert logits.grad.isfinite().all()
    assert logits.grad.abs().max() < 1e5


def test_without_eps_what_vanishes_is_not_divided_by_zero() -> None:
    logits = torch.zeros(3, 3, 4)
    logits[:, 1] = -300.0  # exp(-300) is 0
    logits.requires_grad_()
    comb = sinkhorn(logits, 20, 0.0)
    comb.backward(torch.randn(3, 3, 4) * 1e4)
    assert comb.isfinite().all()
    assert logits.grad.isfinite().all()
    torch.testing.assert_close(comb.sum(0), torch.ones(3, 4))


@both_ways
def test_pre_mapping_is_coefficients_and_read(way: None) -> None:
    x = torch.randn(6, 3, 5)
    m = torch.randn(15, 6)
    scale = torch.rand(3)
    base = torch.randn(15)
    made = streams.pre_mapping(x, m, scale, base, None, 4, 1e-3)
    logits = m * scale.repeat_interleave(torch.tensor([3, 3, 9]))[:, None] + base[:, None]
    torch.testing.assert_close(made.pre, logits[:3].sigmoid() + 1e-3)
    torch.testing.assert_close(made.post, 2 * logits[3:6].sigmoid())
    torch.testing.assert_close(made.comb, sinkhorn(logits[6:].view(3, 3, 6), 4, 1e-3))
    torch.testing.assert_close(made.u, torch.einsum("in,nid->nd", made.pre, x))
    handed_on = torch.rand(3, 6)
    torch.testing.assert_close(
        streams.pre_mapping(x, m, scale, base, handed_on, 4, 1e-3).u,
        torch.einsum("in,nid->nd", handed_on, x),
    )


@both_ways
def test_write_mixes_from_j_to_k(way: None) -> None:
    x = torch.randn(6, 3, 5)
    out = torch.randn(6, 5)
    post = torch.rand(3, 6)
    comb = torch.rand(3, 3, 6)
    expected = torch.einsum("jkn,njd->nkd", comb, x) + torch.einsum("kn,nd->nkd", post, out)
    torch.testing.assert_close(streams.post_mapping(x, out, post, comb), expected)
    torch.testing.assert_close(
        streams.post_mapping(x, out, post, None), x + torch.einsum("kn,nd->nkd", post, out)
    )


@pytest.mark.slow
@pytest.mark.interpreted
@pytest.mark.parametrize("kind", ["mhc", "single_pass"])
def test_a_site_of_tiles_is_a_site(
    kind: str, tiled: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tests strided gradients, a `carried` pre-mapping that is a view, and Connection's kernels."""
    sites = [
        Connection(HyperConfig(kind=kind, streams=3, iterations=3), 10, n).to(tiled)
        for n in range(2)
    ]
    start = torch.randn(2, 5, 3, 10)
    pull = torch.randn(2, 3, 5, 10).transpose(1, 2)
    result = []
    for choice in ("reference", "triton"):
        asked = ",".join(f"{name}={choice}" for name in ("pre_mapping", "post_mapping"))
        monkeypatch.setitem(os.environ, kernels.VARIABLE, asked)
        assert streams.post_mapping.choice.kind(start.to(tiled)) == choice
        arguments = start.to(tiled).requires_grad_()
        x = Streams(arguments)
        for site, sublayer in zip(sites, (torch.sin, torch.cos), strict=True):
            u, mapping = site.read(x)
            x = site.write(sublayer(u), mapping)
        made = x.values
        parameters = [p for site in sites for p in site.parameters()]
        total = (made * pull.to(tiled)).sum()
        result.append(
            [made, *torch.autograd.grad(total, [arguments, *parameters], materialize_grads=True)]
        )
    alike(*result)


@pytest.mark.compiled
@pytest.mark.slow
def test_compiled_backward_does_not_overflow():
    logits = (torch.randn(4, 4, 50).sign() * 20).requires_grad_()
    pull = torch.randn(4, 4, 50) * 1e4
    torch.compile(sinkhorn)(logits).backward(pull)
    assert logits.grad.isfinite().all()
    expected = torch.autograd.grad((sinkhorn(logits) * pull).sum(), logits)[0]
    torch.testing.assert_close(logits.grad, expected, rtol=0, atol=1e-3)
