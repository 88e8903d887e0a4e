"""Tests multi-token prediction: the formula, the released order, and chained depths."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from rorqual.layers.context import Context, context
from rorqual.layers.feed_forward import SwiGLU
from rorqual.layers.mtp import MTP, MTPConfig, ahead
from rorqual.layers.streams import Streams


class Block(nn.Module):
    """A residual feed-forward with the interface of a model's block."""

    def __init__(self) -> None:
        super().__init__()
        self.ffn = SwiGLU(6, 9)

    def forward(self, x: Streams, ctx: Context) -> tuple[Streams, Context]:
        return x.add(self.ffn(x.values)), ctx


def normed(x: Tensor, weight: Tensor) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * weight


def test_is_the_formula_with_the_embedding_first() -> None:
    module = MTP(6, 1e-6, Block())
    ctx = context(2, 5, "cpu")
    module.enorm.weight.data, module.hnorm.weight.data = torch.randn(6), torch.randn(6)
    hidden = torch.randn(2, 5, 6)
    embedded = torch.randn(2, 5, 6)
    out, aux = module(hidden, embedded, ctx)
    of_embedding = module.eh_proj.weight[:, :6]
    of_hidden = module.eh_proj.weight[:, 6:]
    joined = (
        normed(embedded, module.enorm.weight) @ of_embedding.T
        + normed(hidden, module.hnorm.weight) @ of_hidden.T
    )
    torch.testing.assert_close(out, joined + module.block.ffn(joined))
    assert aux is ctx


def test_has_the_parts_that_are_published() -> None:
    """The parts are block, projection and three norms; embedding and head are the model's."""
    names = {name for name, _ in MTP(6, 1e-6, nn.Identity()).named_parameters()}
    assert names == {"enorm.weight", "hnorm.weight", "eh_proj.weight", "norm.weight"}
    assert MTP(6, 1e-6, nn.Identity()).eh_proj.weight.shape == (6, 12)


def test_depths_chain_and_every_depth_learns() -> None:
    first = MTP(6, 1e-6, Block())
    second = MTP(6, 1e-6, Block())
    ctx = context(1, 4, "cpu")
    hidden = torch.randn(1, 4, 6, requires_grad=True)
    one, _ = first(hidden, torch.randn(1, 4, 6), ctx)
    two, _ = second(one, torch.randn(1, 4, 6), ctx)
    second.norm(two).square().sum().backward()
    learning = [*first.eh_proj.parameters(), *first.block.parameters(), *second.parameters()]
    assert all(
        parameter.grad is not None and parameter.grad.abs().sum() > 0 for parameter in learning
    )
    assert first.norm.weight.grad is None  # only the first depth's logits use its norm
    assert hidden.grad is not None


@settings(max_examples=50, deadline=None)
@given(lengths=st.lists(st.integers(1, 5), min_size=1, max_size=4), times=st.integers(1, 3))
def test_ahead_never_looks_into_another_document(lengths: list[int], times: int) -> None:
    result = ids = torch.arange(1, sum(lengths) + 1)[None]
    document_ids = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))[None]
    for _ in range(times):
        result = ahead(result, document_ids, -100)
    expected = [
        [*piece[times:].tolist(), *[-100] * min(times, len(piece))]
        for piece in ids[0].split(lengths)
    ]
    assert result[0].tolist() == [value for piece in expected for value in piece]
    assert ahead(ids)[0].tolist() == [*range(2, ids.shape[1] + 1), 0]
    assert ids[0].tolist() == list(range(1, ids.shape[1] + 1))


@pytest.mark.parametrize(
    ("change", "words"), [({"depth": 0}, "mtp.depth"), ({"weight": -0.1}, "mtp.weight")]
)
def test_impossible_configs_are_refused(change: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        MTPConfig(**change)
