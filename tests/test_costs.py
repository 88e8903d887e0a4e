"""Costs against the published figures, to the digit where they are published to the digit."""

from dataclasses import replace

import pytest

from rorqual.costs import costs
from rorqual.model import LanguageModel
from rorqual.presets import PRESETS, preset

PUBLISHED = {  # total, activated, with both embeddings; in the units of the reports
    "deepseek-v3": (671.026e9, 36.626e9, 37.552e9),
    "deepseek-v2": (235.741e9, 20.85e9, 21.376e9),
    "deepseek-v2-lite": (15.7065e9, 2.451e9, 2.661e9),
    "deepseekmoe-16b": (16.3757e9, 2.619e9, 2.829e9),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_deepseeks_own_figures(name):
    total, activated, both = PUBLISHED[name]
    found = costs(preset(name))
    assert found.total == pytest.approx(total, rel=1e-5)
    assert found.activated == pytest.approx(activated, rel=3e-4)
    assert found.activated_with_embedding == pytest.approx(both, rel=3e-4)


def test_v3_to_the_last_parameter():
    found = costs(preset("deepseek-v3"))
    assert found.total == 671_026_419_200
    assert found.mtp == pytest.approx(11.610e9, rel=1e-4)
    assert found.mtp_activated == pytest.approx(1.615e9, rel=1e-3)
    assert found.cache_bytes_per_token == 61 * 576 * 2


@pytest.mark.parametrize(
    ("name", "total", "memory"),
    [("dense-4b", 4.1e9, 0), ("moe-27b", 26.7e9, 0), ("engram-27b", 26.7e9, 5.79e9), ("engram-40b", 39.5e9, 18.53e9)],
)
def test_engrams_four(name, total, memory):
    found = costs(preset(name))
    assert found.total == pytest.approx(total, rel=0.005)
    assert found.memory == pytest.approx(memory, rel=1e-3)
    assert found.activated == pytest.approx(3.8e9, rel=0.03)


def test_the_classroom_model_by_hand():
    attention, experts, router, norms = 4 * 64 * 64, 4 * 3 * 64 * 8, 4 * 64, 2 * 64
    by_hand = 100 * 64 + 2 * (attention + experts + router + norms) + 64
    assert by_hand == 52_288
    assert costs(preset("classroom")).total == by_hand + 2 * 4, "and the router biases"


@pytest.mark.parametrize("name", ["tiny", "small", "classroom"])
def test_counts_are_those_of_a_real_model(name):
    config = preset(name)
    model = LanguageModel(config)
    found = costs(config)
    biases = sum(b.numel() for n, b in model.named_buffers() if n.endswith("e_score_correction_bias"))
    assert found.total + found.mtp == sum(p.numel() for p in model.parameters()) + biases


def test_flops_of_a_dense_model_by_hand():
    config = replace(preset("classroom"), moe=None, dense_width=10)
    matrices = 2 * (4 * 64 * 64 + 3 * 64 * 10) + 100 * 64
    attended = 2 * 4 * (16 + 16) * 50
    assert costs(config, context=100).flops_per_token == 2 * (matrices + attended)


def test_experts_at_rest_cost_nothing():
    tiny = preset("tiny")
    more = replace(tiny, moe=replace(tiny.moe, routed=64))
    router = 3 * 32 * 64
    assert costs(more).flops_per_token - costs(tiny).flops_per_token == 2 * router
    assert costs(more).activated - costs(tiny).activated == router + 3 * 32


def test_every_preset_is_counted_on_no_memory():
    for name in PRESETS:
        assert costs(preset(name)).total > 0
