"""Tests rotary positions against transformers and against complex multiplication."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import DeepseekV3Config
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.deepseek_v3.modeling_deepseek_v3 import (
    DeepseekV3Attention,
    DeepseekV3RotaryEmbedding,
)

from rorqual.layers.rope import (
    RopeConfig,
    YarnConfig,
    longest_context,
    rope_frequencies,
    rope_tables,
    rotate,
    softmax_factor,
)
from rorqual.model_config import (
    DynamicRopeConfig,
    LinearRopeConfig,
    Llama3RopeConfig,
    LongRopeConfig,
)


@pytest.mark.parametrize(
    "dim, base, yarn",
    [
        (64, 10000.0, YarnConfig()),  # DeepSeek-V3
        # Without its clamp, low would be -1.
        (
            8,
            10000.0,
            YarnConfig(factor=4.0, original_length=64),
        ),
        (64, 10000.0, YarnConfig(mscale=0.707, mscale_all_dim=0.707)),  # DeepSeek-V2
        (
            32,
            500.0,
            YarnConfig(
                factor=2.5, original_length=20, beta_fast=4.0, beta_slow=3.9, mscale_all_dim=0.5
            ),
        ),
    ],
)
def test_yarn_agrees_with_transformers(dim, base, yarn):
    parameters = {
        "rope_type": "yarn",
        "rope_theta": base,
        "factor": yarn.factor,
        "original_max_position_embeddings": yarn.original_length,
        "beta_fast": yarn.beta_fast,
        "beta_slow": yarn.beta_slow,
        "mscale": yarn.mscale,
        "mscale_all_dim": yarn.mscale_all_dim,
    }
    theirs = DeepseekV3Config(
        qk_rope_head_dim=dim, max_position_embeddings=10**6, rope_parameters=parameters
    )
    frequencies, factor = ROPE_INIT_FUNCTIONS["yarn"](theirs)
    config = RopeConfig(base=base, yarn=yarn)
    torch.testing.assert_close(rope_frequencies(config, dim), frequencies, rtol=1e-6, atol=0)
    positions = torch.tensor([[0, 1, 77, 1000]])
    cos, sin = rope_tables(config, dim, positions)
    torch.testing.assert_close(
        cos, (positions[..., None] * frequencies).cos() * factor, rtol=1e-5, atol=1e-4
    )
    torch.testing.assert_close(
        sin, (positions[..., None] * frequencies).sin() * factor, rtol=1e-5, atol=1e-4
    )


@settings(max_examples=80, deadline=None)
@given(
    dim=st.integers(1, 48).map(lambda pairs: 2 * pairs),
    base=st.floats(20.0, 1e7),
    factor=st.floats(1.0, 64.0),
    original=st.integers(8, 40000),
    fast=st.floats(1.5, 64.0),
    slow=st.floats(0.1, 1.4),
    mscale=st.tuples(st.floats(0.1, 2.0), st.floats(0.1, 2.0)),
    truncate=st.booleans(),
)
def test_yarn_agrees_with_transformers_everywhere(
    dim, base, factor, original, fast, slow, mscale, truncate
):
    """Tests odd numbers of pairs, ramps cut at either end or empty, and different factors."""
    yarn = YarnConfig(
        factor=factor, original_length=original, beta_fast=fast, beta_slow=slow, mscale=mscale[0],
        mscale_all_dim=mscale[1], truncate=truncate,
    )  # fmt: skip
    parameters = {
        "rope_type": "yarn", "rope_theta": base, "factor": factor,
        "original_max_position_embeddings": original,
        "beta_fast": fast, "beta_slow": slow, "mscale": mscale[0], "mscale_all_dim": mscale[1],
        "truncate": truncate,
    }  # fmt: skip
    theirs = DeepseekV3Config(
        qk_rope_head_dim=dim, max_position_embeddings=10**6, rope_parameters=parameters
    )
    frequencies, on_tables = ROPE_INIT_FUNCTIONS["yarn"](theirs)
    config = RopeConfig(base=base, yarn=yarn)
    torch.testing.assert_close(rope_frequencies(config, dim), frequencies, rtol=2e-6, atol=0)
    cos, sin = rope_tables(config, dim, torch.tensor([[0, 3]]))
    assert cos[0, 0, 0].item() == pytest.approx(on_tables, rel=1e-6) and not sin[0, 0].any()
    torch.testing.assert_close(cos[0, 1], (3 * frequencies).cos() * on_tables, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(sin[0, 1], (3 * frequencies).sin() * on_tables, rtol=1e-4, atol=1e-5)
    oracle = DeepseekV3Attention(replace_sizes(theirs, dim), layer_idx=0)
    assert softmax_factor(config) * (4 + dim) ** -0.5 == pytest.approx(oracle.scaling, rel=1e-9)


FACTORS = tuple(1 + 0.3 * n for n in range(8))
STRETCHED = {
    "linear": (RopeConfig(linear=LinearRopeConfig(factor=3.0)), {"factor": 3.0}),
    "dynamic": (
        RopeConfig(dynamic=DynamicRopeConfig(factor=2.5, original_length=40)),
        {"factor": 2.5},
    ),
    "llama3": (
        RopeConfig(
            llama3=Llama3RopeConfig(factor=6.0, low_turns=0.5, high_turns=3.0, original_length=90)
        ),
        {
            "factor": 6.0,
            "low_freq_factor": 0.5,
            "high_freq_factor": 3.0,
            "original_max_position_embeddings": 90,
        },
    ),
    "longrope": (
        RopeConfig(
            longrope=LongRopeConfig(
                short=FACTORS, long=FACTORS[::-1], factor=4.0, original_length=40
            )
        ),
        {
            "factor": 4.0,
            "short_factor": list(FACTORS),
            "long_factor": list(FACTORS[::-1]),
            "original_max_position_embeddings": 40,
        },
    ),
}


@pytest.mark.parametrize("longest", [1, 39, 40, 41, 200])
@pytest.mark.parametrize("kind", STRETCHED)
def test_other_kinds_of_rope_agree_with_transformers(kind, longest):
    """The longest position of the call is on both sides of the original length."""
    config, parameters = STRETCHED[kind]
    theirs = DeepseekV3Config(
        qk_rope_head_dim=16,
        max_position_embeddings=40,
        rope_parameters=parameters | {"rope_type": kind, "rope_theta": 10000.0},
    )
    frequencies, factor = ROPE_INIT_FUNCTIONS[kind](theirs, seq_len=longest + 1)
    length = torch.tensor(longest + 1)
    torch.testing.assert_close(rope_frequencies(config, 16, length), frequencies, rtol=1e-6, atol=0)
    positions = torch.tensor([[0, longest]])
    cos, sin = rope_tables(config, 16, positions)
    angles = positions[..., None] * frequencies
    torch.testing.assert_close(cos, angles.cos() * factor, rtol=1e-5, atol=2e-5)
    torch.testing.assert_close(sin, angles.sin() * factor, rtol=1e-5, atol=2e-5)
    oracle = DeepseekV3RotaryEmbedding(theirs)(torch.zeros(1), positions)
    torch.testing.assert_close(cos, oracle[0][..., :8], rtol=1e-5, atol=2e-5)


def test_kinds_of_rope_exclude_each_other():
    with pytest.raises(ValueError, match="got yarn and linear, expected at most one"):
        RopeConfig(yarn=YarnConfig(), linear=LinearRopeConfig())
    for make in (LinearRopeConfig, DynamicRopeConfig, Llama3RopeConfig, LongRopeConfig):
        with pytest.raises(ValueError, match=r"got factor 0.5 .* expected at least 1"):
            make(factor=0.5)
    with pytest.raises(ValueError, match="got 2 short and 1 long factors"):
        LongRopeConfig(short=(1.0, 2.0), long=(1.0,))
    with pytest.raises(ValueError, match="got 1 factors, expected one for each of the 4 pairs"):
        rope_frequencies(RopeConfig(longrope=LongRopeConfig()), 8)
    with pytest.raises(ValueError, match="low_turns 5"):
        Llama3RopeConfig(low_turns=5.0)


def replace_sizes(config, dim):
    """Keeps the positions and shrinks the attention, so that it is cheap to build often."""
    for name, value in {
        "hidden_size": 4, "num_attention_heads": 1, "num_key_value_heads": 1, "q_lora_rank": 2,
        "kv_lora_rank": 2,
        "qk_nope_head_dim": 4, "v_head_dim": 2, "qk_head_dim": 4 + dim,
    }.items():  # fmt: skip
        setattr(config, name, value)
    return config


@pytest.mark.parametrize(
    "dim, base, original, ends",
    [(8, 1e4, 64, (0, 2)), (10, 20.0, 40000, (8, 9)), (64, 1e4, 4096, (10, 23))],
)
def test_the_ramp_in_numbers(dim, base, original, ends):
    """Tests the ends of the ramp.

    low is clamped at 0, where it would be -1; high is clamped at dim - 1 with both ends past the
    last pair; and V3's.
    """
    low, high = ends
    config = RopeConfig(base=base, yarn=YarnConfig(factor=4.0, original_length=original))
    plain = base ** (-torch.arange(0, dim, 2, dtype=torch.float64) / dim)
    ramp = ((torch.arange(dim // 2, dtype=torch.float64) - low) / max(high - low, 1e-3)).clamp(0, 1)
    expected = plain * (1 - ramp) + plain / 4 * ramp
    torch.testing.assert_close(rope_frequencies(config, dim).double(), expected, rtol=1e-6, atol=0)


def test_yarn_keeps_the_fast_pairs_and_slows_the_slow_ones():
    plain = rope_frequencies(RopeConfig(), 64)
    slowed = rope_frequencies(RopeConfig(yarn=YarnConfig()), 64)
    ratio = plain / slowed
    torch.testing.assert_close(ratio[:10], torch.ones(10))
    torch.testing.assert_close(ratio[-8:], torch.full((8,), 40.0))
    assert (ratio.diff() >= -1e-5).all()


@pytest.mark.parametrize("mscale, expected", [(1.0, 1.8739), (0.707, 1.5896)])
def test_softmax_factor_of_the_releases(mscale, expected):
    yarn = YarnConfig(factor=40.0, mscale=mscale, mscale_all_dim=mscale)
    assert softmax_factor(RopeConfig(yarn=yarn)) == pytest.approx(expected, abs=5e-5)
    assert softmax_factor(RopeConfig()) == 1.0
    assert softmax_factor(RopeConfig(yarn=YarnConfig(factor=1.0))) == 1.0


def test_rotate_takes_pairs_wherever_they_lie():
    cos, sin = rope_tables(RopeConfig(), 4, torch.arange(5)[None])
    width = torch.randn(1, 5, 3, 9)
    for time in (5, 1):
        for start in (0, 1, 2, 5):
            piece = width[:, :time, 1, start : start + 4]
            result = rotate(piece, cos[:, :time], sin[:, :time], True)
            assert torch.equal(result, rotate(piece.clone(), cos[:, :time], sin[:, :time], True))


def test_rotate_interleaved_is_complex_multiplication():
    x = torch.randn(2, 5, 3, 8)
    positions = torch.randint(0, 1000, (2, 5))
    cos, sin = rope_tables(RopeConfig(), 8, positions)
    expected = torch.view_as_complex(x.unflatten(-1, (4, 2))) * torch.complex(cos, sin)[:, :, None]
    torch.testing.assert_close(rotate(x, cos, sin, True), torch.view_as_real(expected).flatten(-2))
    torch.testing.assert_close(
        rotate(x[:, :, 0], cos, sin, True), rotate(x, cos, sin, True)[:, :, 0]
    )


@pytest.mark.parametrize("interleaved", [True, False])
def test_one_vector_takes_a_gradient_wherever_it_begins(interleaved):
    """The vector follows three other values, so its gradient starts at an odd offset.

    A head's rotated part is in this place after an odd unrotated part.
    """
    x = torch.randn(1, 1, 4, requires_grad=True)
    tables = rope_tables(RopeConfig(), 4, torch.tensor([[5]]))
    pull = torch.randn(1, 1, 7)
    (torch.cat([torch.randn(1, 1, 3), rotate(x, *tables, interleaved)], -1) * pull).sum().backward()
    # The transpose of a rotation is its inverse.
    back = rotate(pull[..., 3:], tables[0], -tables[1], interleaved)
    torch.testing.assert_close(x.grad, back, atol=1e-6, rtol=0)


@pytest.mark.parametrize("interleaved", [True, False])
def test_rotation_depends_on_distance_only(interleaved):
    query, key = torch.randn(2, 1, 1, 16)
    config = RopeConfig(base=100.0, interleaved=interleaved)

    def score(offset: int, to: int) -> torch.Tensor:
        turned = [
            rotate(x[None], *rope_tables(config, 16, torch.tensor([[position]])), interleaved)
            for x, position in ((query, offset), (key, to))
        ]
        return (turned[0] * turned[1]).sum()

    torch.testing.assert_close(score(7, 3), score(104, 100), rtol=1e-4, atol=1e-5)
    assert abs(score(7, 3) - score(7, 4)) > 1e-4


def test_the_two_pairings_are_one_permutation_apart():
    x = torch.randn(1, 6, 2, 8)
    order = torch.tensor([0, 2, 4, 6, 1, 3, 5, 7])
    cos, sin = rope_tables(RopeConfig(), 8, torch.arange(6)[None])
    torch.testing.assert_close(
        rotate(x, cos, sin, True)[..., order], rotate(x[..., order], cos, sin, False)
    )
    assert (rotate(x, cos, sin, True) - rotate(x, cos, sin, False)).abs().max() > 0.1


def test_longest_context_is_half_a_turn_of_the_slowest_pair():
    assert longest_context(10000.0) == 31415
    assert longest_context(10000.0, 40.0) == 1256637
    slowest = rope_frequencies(RopeConfig(base=1e4), 4096)[-1].item()
    assert math.pi / slowest == pytest.approx(longest_context(1e4), rel=0.01)


@pytest.mark.parametrize("base, factor", [(1e4, 1.0), (1e4, 40.0), (5e5, 8.0), (50.0, 2.5)])
def test_longest_context_is_where_the_cosine_turns_back(base, factor):
    """Up to the longest context the slowest pair's cosine falls; beyond it, values repeat.

    The pair is that of a very wide table.
    """
    slowest = base ** (2 / 20000 - 1) / factor  # of 10,000 pairs
    longest = longest_context(base, factor)
    assert longest == math.floor(math.pi * base * factor)
    assert longest == pytest.approx(math.pi / slowest, rel=2e-3)
    assert math.cos(longest * slowest) < math.cos(0.99 * longest * slowest)
    assert math.cos(1.01 * longest * slowest) > math.cos(longest * slowest)


@pytest.mark.parametrize(
    "build, words",
    [
        (lambda: YarnConfig(factor=0.5), "factor 0.5"),
        (lambda: YarnConfig(beta_fast=1.0, beta_slow=2.0), "0 < slow <= fast"),
        (lambda: RopeConfig(base=1.0), "rope base 1.0"),
        (lambda: rope_frequencies(RopeConfig(), 7), "width of 7"),
    ],
)
def test_impossible_positions_are_refused(build, words):
    with pytest.raises(ValueError, match=words):
        build()
