"""Tests the gated residual against its equations, its start and its gradients."""

import pytest
import torch

from rorqual.layers.gated_residual import GatedReduction, GatedResidual
from rorqual.layers.hyper import HyperConfig
from rorqual.layers.streams import Streams
from rorqual.model import LanguageModel
from rorqual.presets import preset

CONFIG = HyperConfig(kind="gated", streams=3, rank=4, norm_eps=1e-5)
DIM = 5


def site(dtype: torch.dtype = torch.float64) -> GatedResidual:
    layer = GatedResidual(CONFIG, DIM)
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return layer.to(dtype)


def streams(dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(2, 7, 3, DIM, dtype=dtype)


def test_reading_and_writing_by_hand():
    """A naive loop over tokens and streams."""
    layer = site()
    values = streams()
    u, mapping = layer.read(Streams(values))
    out = torch.randn(2, 7, DIM, dtype=torch.float64)
    written = layer.write(out, mapping).values
    mixer = layer.mixer
    scale = 1 + mixer.hc_norm.weight.view(3, DIM)
    for b in range(2):
        for t in range(7):
            x = values[b, t]
            n = x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * scale
            flat = n.flatten()
            z = mixer.input_mix_weight_down.weight @ flat / 3
            a = (mixer.input_mix_weight_up.weight @ (z * z.sigmoid())).sigmoid().view(3, DIM)
            torch.testing.assert_close(u[b, t], (a * n).mean(0))
            post = 2 * (layer.block_inject_weight.weight @ flat / 3).sigmoid()
            torch.testing.assert_close(written[b, t], x + post[:, None] * out[b, t])


def test_the_exit_is_a_site_that_only_reads():
    layer = site()
    values = streams()
    assert torch.equal(layer.mixer(Streams(values)), layer.read(Streams(values))[0])


def test_the_last_token_of_each_sequence():
    """What a block needs of a prompt's last tokens is what it has of all."""
    layer = site()
    values = streams()
    out = torch.randn(2, 7, DIM, dtype=torch.float64)
    _, mapping = layer.read(Streams(values))
    whole = layer.write(out, mapping).values
    lengths = torch.tensor([4, 7])
    picked = out[torch.arange(2), lengths - 1][:, None]
    last = layer.write(picked, mapping.last(lengths)).values
    torch.testing.assert_close(last[:, 0], whole[torch.arange(2), lengths - 1])


def test_gradients():
    layer = site()
    values = streams()[:1, :2].clone().requires_grad_()

    def update(values, *parameters):
        u, mapping = layer.read(Streams(values))
        return layer.write(u.tanh(), mapping).values

    assert torch.autograd.gradcheck(update, (values, *layer.parameters()))


def test_initial_values():
    model = LanguageModel(preset("qwen4-tiny"), seed=2)
    layer = model.blocks[0].attention_residual
    assert isinstance(layer, GatedResidual) and isinstance(model.reduction, GatedReduction)
    assert layer.mixer.hc_norm.weight.eq(0).all()
    std = (4 * 64) ** -0.5
    for linear in (layer.block_inject_weight, layer.mixer.input_mix_weight_down):
        assert linear.weight.std().item() == pytest.approx(std, rel=0.1)
    assert isinstance(model.norm, torch.nn.Identity)
    assert isinstance(model.blocks[0].attention_norm, torch.nn.Identity)


def test_bfloat16_streams_stay_close():
    layer = site(torch.float32)
    values = streams(torch.float32)
    expected = layer.read(Streams(values))[0]
    result = layer.to(torch.bfloat16).read(Streams(values.bfloat16()))[0]
    assert result.dtype == torch.bfloat16
    assert (result.float() - expected).abs().max() < 0.05 * expected.abs().max()


def test_impossible_ranks_are_refused():
    with pytest.raises(ValueError, match=r"hyper.rank: got 0, expected at least 1"):
        HyperConfig(kind="gated", rank=0)
