"""Tests that taps record outputs and leave no trace."""

import pytest
import torch
from torch import nn

from rorqual.analyze.taps import Taps, quiet


def _model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))


def test_taps_see_outputs_and_are_gone_afterwards():
    model = _model()
    x = torch.randn(5, 4)
    with Taps(model, "0", "2") as taps:
        y = model(x)
        model(x)
    assert len(taps["0"]) == 2 and torch.equal(taps["2"][0], y) and not taps["0"][0].requires_grad
    model(x)
    assert len(taps["0"]) == 2
    assert not any(module._forward_hooks for module in model.modules())


def test_taps_are_gone_after_an_error():
    model = _model()
    with pytest.raises(RuntimeError), Taps(model, "*"):
        model(torch.randn(5, 3))
    assert not any(module._forward_hooks for module in model.modules())


def test_an_unknown_name_is_refused_with_the_known_ones():
    with pytest.raises(
        ValueError, match="got 'blocks', which matches no module; expected one of 0, 1, 2"
    ):
        Taps(_model(), "blocks")


def test_quiet_gives_every_mode_back():
    """A frozen part of a model in training stays frozen, also after an error inside the block."""
    model = _model().train()
    model[0].eval()
    with quiet(model):
        assert (
            not any(module.training for module in model.modules()) and not torch.is_grad_enabled()
        )
    with pytest.raises(RuntimeError), quiet(model):
        model(torch.randn(5, 3))
    assert [module.training for module in model.modules()] == [
        True,
        False,
        True,
        True,
    ] and torch.is_grad_enabled()


def test_what_was_tapped_is_not_written_over():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 3), nn.ReLU(inplace=True))
    x = torch.randn(5, 4)
    with Taps(model, "0") as taps, torch.no_grad():
        model(x)
    assert torch.equal(taps["0"][0], model[0](x)) and (taps["0"][0] < 0).any()


@pytest.mark.parametrize("kind", ["gpt2", "llama", "qwen3"])
def test_any_module_of_a_host_is_tapped_and_cut_from_the_graph(kind):
    transformers = pytest.importorskip("transformers")
    small = {"vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    width = {"intermediate_size": 24, "num_key_value_heads": 1, "head_dim": 8}
    arguments = (
        {"vocab_size": 40, "n_embd": 16, "n_layer": 2, "n_head": 2}
        if kind == "gpt2"
        else small | width
    )
    model = transformers.AutoModelForCausalLM.from_config(
        transformers.AutoConfig.for_model(kind, **arguments)
    ).eval()
    body = model.base_model_prefix
    with Taps(model, body, f"{body}.*") as taps:
        out = model(input_ids=torch.tensor([[1, 2, 3]]))
    assert out.logits.requires_grad
    left = taps[body][0]
    assert "Output" in type(left).__name__
    assert not left.last_hidden_state.requires_grad and torch.equal(
        left["last_hidden_state"], left.last_hidden_state
    )
    cached = [
        value
        for name, values in taps.seen.items()
        for value in values
        if isinstance(value, torch.Tensor)
    ]
    assert len(cached) > 8 and not any(value.requires_grad for value in cached)
    assert not any(module._forward_hooks for module in model.modules())
