"""Tests the chunked cross-entropy against torch's, of all logits at once."""

import math

import pytest
import torch
import torch.nn.functional as F

from rorqual.layers.cross_entropy import chunked_cross_entropy


@pytest.mark.parametrize("chunk", [1, 5, 23, 100])
def test_chunked_cross_entropy_equals_the_whole(chunk):
    hidden = torch.randn(23, 6, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(11, 6, dtype=torch.float64, requires_grad=True)
    labels = torch.randint(0, 11, (23,))
    labels[[0, 7, 22]] = -100
    ours = chunked_cross_entropy(hidden, weight, labels, chunk)
    whole = F.cross_entropy(hidden @ weight.T, labels, reduction="sum")
    torch.testing.assert_close(ours, whole)
    mine, theirs = (torch.autograd.grad(3 * loss, (hidden, weight)) for loss in (ours, whole))
    torch.testing.assert_close(mine, theirs)
    assert torch.equal(
        torch.autograd.grad(chunked_cross_entropy(hidden, weight, labels), hidden)[0][7],
        torch.zeros(6),
    )


def test_chunked_cross_entropy_gives_only_the_gradients_asked_for():
    hidden = torch.randn(9, 4)
    weight = torch.randn(7, 4, requires_grad=True)
    labels = torch.randint(0, 7, (9,))
    chunked_cross_entropy(hidden, weight, labels, 4).backward()
    assert hidden.grad is None and weight.grad is not None
    with torch.no_grad():
        assert not chunked_cross_entropy(hidden, weight, labels).requires_grad


def test_chunked_cross_entropy_in_bfloat16_sums_in_float32():
    hidden = torch.randn(400, 32).bfloat16().requires_grad_()
    weight = torch.randn(50, 32).bfloat16().requires_grad_()
    labels = torch.randint(0, 50, (400,))
    ours = chunked_cross_entropy(hidden, weight, labels, 64)
    whole = F.cross_entropy(hidden.float() @ weight.float().T, labels, reduction="sum")
    assert ours.dtype == torch.float32
    torch.testing.assert_close(ours, whole, rtol=2e-3, atol=0)
    mine = torch.autograd.grad(ours, weight)[0]
    theirs = torch.autograd.grad(whole, weight)[0]
    assert mine.dtype == torch.bfloat16
    assert (mine - theirs).float().norm() < 0.02 * theirs.float().norm()


def test_chunked_cross_entropy_of_nothing_is_zero():
    weight = torch.randn(7, 4, requires_grad=True)
    loss = chunked_cross_entropy(torch.randn(3, 4), weight, torch.full((3,), -100))
    loss.backward()
    assert loss.item() == 0 and not weight.grad.any()


@pytest.mark.parametrize("label", [7, -1, -99])
def test_impossible_labels_are_refused(label):
    with pytest.raises(IndexError):
        chunked_cross_entropy(torch.randn(3, 4), torch.randn(7, 4), torch.tensor([1, label, 2]))


@pytest.mark.parametrize("far", [30.0, 200.0, 1e4])
def test_the_loss_of_a_target_whose_probability_underflows(far):
    """It is how far its logit lies below the others', and its gradient softmax - onehot."""
    hidden = torch.tensor([[1.0]], requires_grad=True)
    weight = torch.tensor([[far], [0.0], [far]])
    loss = chunked_cross_entropy(hidden, weight, torch.tensor([1]))
    assert loss.item() == pytest.approx(far + math.log(2), rel=1e-6)
    loss.backward()
    assert hidden.grad.item() == pytest.approx(far, rel=1e-6)
