"""Converts the rotary fields of a config.json, of every kind that transformers computes, and back.

    rope_theta, rope_scaling      as released
    rope_parameters               transformers 5

| kind              | RopeConfig           | note                                                |
|-------------------|----------------------|-----------------------------------------------------|
| default           |                      |                                                     |
| yarn              | yarn                 | attention_factor becomes an mscale                  |
| linear            | linear               |                                                     |
| dynamic           | dynamic              | original_length is max_position_embeddings          |
| llama3            | llama3               |                                                     |
| longrope          | longrope             | without a factor, the ratio of the two lengths      |
| any, with         | query_scale          | llama_4_scaling_beta                                |
"""

import math
from collections.abc import Mapping
from typing import Any

from rorqual.hub.fields import flag, number, whole
from rorqual.model_config import (
    ROPE_KINDS,
    DynamicRopeConfig,
    LinearRopeConfig,
    Llama3RopeConfig,
    LongRopeConfig,
    QueryScaleConfig,
    RopeConfig,
    YarnConfig,
)

ORIGINAL = "original_max_position_embeddings"
UNSTRETCHED = 4096  # the longest context of a folder whose rope is not stretched


def rope_of(
    description: Mapping[str, Any], interleaved: bool, share: tuple[int, int] | None = None
) -> RopeConfig:
    """Reads rope_theta with rope_scaling (as released), or rope_parameters (transformers 5).

    Of both, the first is read. `description` has rope_theta and max_position_embeddings. `share` is
    the rotated width and that of a head, if transformers wants their ratio in
    partial_rotary_factor.
    """
    key = "rope_scaling" if description.get("rope_scaling") else "rope_parameters"
    rope = description.get(key) or {}
    if not isinstance(rope, Mapping):
        raise ValueError(
            f"config.json: {key}: got {rope!r}, expected fields such as rope_theta, or none"
        )
    within = f"{key}."
    turned, width = share or (1, 1)
    if rope.get("partial_rotary_factor") is not None:
        rotated = number(rope, "partial_rotary_factor", within)
        if abs(width * rotated - turned) > 1e-6:
            raise ValueError(
                f"config.json: {within}partial_rotary_factor: "
                f"got {rotated}, expected {turned / width}"
            )
    base = number({"rope_theta": description["rope_theta"], **rope}, "rope_theta")
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind != "default" and kind not in ROPE_KINDS:
        raise ValueError(
            f"config.json: {within}type: got {kind!r}, "
            f"expected {', '.join(ROPE_KINDS)} or 'default'"
        )
    if kind not in ("default", "yarn") and rope.get("mscale_all_dim"):
        raise ValueError(
            f"config.json: {within}mscale_all_dim: got {rope['mscale_all_dim']} "
            f"with type {kind!r}, expected none"
        )
    lengths = {ORIGINAL: description["max_position_embeddings"]}
    lengths |= {key: value for key, value in rope.items() if value}
    # Beside the rope fields it has priority over them.
    if description.get(ORIGINAL) is not None:
        lengths[ORIGINAL] = description[ORIGINAL]
    kinds: dict[str, Any] = {}
    if kind != "default":
        kinds[kind] = _READERS[kind](description, rope, lengths, within)
    if rope.get("llama_4_scaling_beta") is not None:
        kinds["query_scale"] = QueryScaleConfig(
            beta=number(rope, "llama_4_scaling_beta", within),
            original_length=whole(lengths, ORIGINAL, within),
        )
    return RopeConfig(base=base, interleaved=interleaved, **kinds)


def tables_alone(rope: Mapping[str, Any]) -> dict[str, Any]:
    """Returns rotary fields for a family whose YaRN scales cos and sin, and the softmax never."""
    fields = {key: value for key, value in rope.items() if key not in ("mscale", "mscale_all_dim")}
    above = rope.get("mscale")
    below = rope.get("mscale_all_dim")
    if above and below and fields.get("attention_factor") is None:
        factor = number(rope, "factor")
        stretch = 0.1 * math.log(factor) if factor > 1 else 0.0
        above, below = (stretch * number(rope, key) + 1 for key in ("mscale", "mscale_all_dim"))
        fields["attention_factor"] = above / below
    return fields


def _yarn(
    description: Mapping[str, Any],
    fields: Mapping[str, Any],
    lengths: Mapping[str, Any],
    within: str,
) -> YarnConfig:
    """Reads the fields of YaRN, with transformers' defaults for those that are absent."""
    # transformers ignores 0 and null.
    yarn = {key: value for key, value in fields.items() if value}
    factor = number(fields, "factor", within)
    mscale, of_softmax = _mscales(fields, yarn, factor, within)
    return YarnConfig(
        factor=factor,
        original_length=whole(lengths, ORIGINAL, within),
        beta_fast=number({"beta_fast": 32} | yarn, "beta_fast", within),
        beta_slow=number({"beta_slow": 1} | yarn, "beta_slow", within),
        mscale=mscale,
        mscale_all_dim=of_softmax,
        truncate=flag({"truncate": True} | dict(fields), "truncate"),
    )


def _mscales(
    fields: Mapping[str, Any], yarn: Mapping[str, Any], factor: float, within: str
) -> tuple[float, float]:
    """Returns mscale and mscale_all_dim that give transformers' factor on cos and sin.

    That factor is attention_factor if it is set, else the ratio of both mscales if both are, else
    mscale(s, 1); the softmax is scaled by mscale(s, mscale_all_dim)^2.
    """
    of_softmax = number(yarn, "mscale_all_dim", within) if "mscale_all_dim" in yarn else 0.0
    if fields.get("attention_factor") is None:
        if "mscale_all_dim" not in yarn:
            return 1.0, of_softmax
        if "mscale" in yarn:
            return number(yarn, "mscale", within), of_softmax
    stretch = 0.1 * math.log(factor) if factor > 1 else 0.0
    wanted = (
        stretch + 1
        if fields.get("attention_factor") is None
        else number(fields, "attention_factor", within)
    )
    if wanted != 1 and not stretch:
        raise ValueError(
            f"config.json: {within}attention_factor: "
            f"got {wanted} with factor {factor}, expected 1 or none"
        )
    return (wanted * (stretch * of_softmax + 1) - 1) / stretch if stretch else 1.0, of_softmax


def _linear(
    description: Mapping[str, Any],
    fields: Mapping[str, Any],
    lengths: Mapping[str, Any],
    within: str,
) -> LinearRopeConfig:
    """Reads the factor of linear interpolation."""
    return LinearRopeConfig(factor=number(fields, "factor", within))


def _dynamic(
    description: Mapping[str, Any],
    fields: Mapping[str, Any],
    lengths: Mapping[str, Any],
    within: str,
) -> DynamicRopeConfig:
    """Reads the factor of dynamic NTK, which stretches beyond max_position_embeddings."""
    return DynamicRopeConfig(
        factor=number(fields, "factor", within),
        original_length=whole(description, "max_position_embeddings"),
    )


def _llama3(
    description: Mapping[str, Any],
    fields: Mapping[str, Any],
    lengths: Mapping[str, Any],
    within: str,
) -> Llama3RopeConfig:
    """Reads the fields of Llama 3's stretching, whose turns are low and high frequency factors."""
    return Llama3RopeConfig(
        factor=number(fields, "factor", within),
        low_turns=number(fields, "low_freq_factor", within),
        high_turns=number(fields, "high_freq_factor", within),
        original_length=whole(lengths, ORIGINAL, within),
    )


def _longrope(
    description: Mapping[str, Any],
    fields: Mapping[str, Any],
    lengths: Mapping[str, Any],
    within: str,
) -> LongRopeConfig:
    """Reads LongRoPE's lists of factors for short and long sequences. ValueError without them."""
    original = whole(lengths, ORIGINAL, within)
    ratio = number(description, "max_position_embeddings") / original
    factor = ratio if fields.get("factor") is None else number(fields, "factor", within)
    lists = {}
    for key in ("short_factor", "long_factor"):
        if not isinstance(value := fields.get(key), list | tuple):
            raise ValueError(f"config.json: {within}{key}: got {value!r}, expected a list")
        lists[key] = tuple(number({key: each}, key, within) for each in value)
    of_tables = fields.get("attention_factor")
    return LongRopeConfig(
        short=lists["short_factor"],
        long=lists["long_factor"],
        original_length=original,
        factor=max(factor, 1.0),  # a smaller one has no effect
        attention_factor=None if of_tables is None else number(fields, "attention_factor", within),
    )


_READERS = {
    "yarn": _yarn,
    "linear": _linear,
    "dynamic": _dynamic,
    "llama3": _llama3,
    "longrope": _longrope,
}


def published_rope(rope: RopeConfig) -> dict[str, Any]:
    """Returns the rotary fields and max_position_embeddings as released folders have them."""
    values: dict[str, Any] = {"rope_theta": rope.base}
    scaling: dict[str, Any] | None = None
    length = UNSTRETCHED
    if (yarn := rope.yarn) is not None:
        scaling = {
            "type": "yarn",
            "factor": yarn.factor,
            ORIGINAL: yarn.original_length,
            "beta_fast": yarn.beta_fast,
            "beta_slow": yarn.beta_slow,
            "mscale": yarn.mscale,
            "mscale_all_dim": yarn.mscale_all_dim,
        }
        if not yarn.truncate:
            scaling["truncate"] = False
        # transformers ignores a 0.
        if 0 in (yarn.mscale, yarn.mscale_all_dim) and yarn.mscale != 1 and yarn.factor > 1:
            stretch = 0.1 * math.log(yarn.factor)
            scaling["attention_factor"] = (stretch * yarn.mscale + 1) / (
                stretch * yarn.mscale_all_dim + 1
            )
        length = int(yarn.factor * yarn.original_length)
    elif rope.linear is not None:
        scaling = {"type": "linear", "factor": rope.linear.factor}
        length = int(rope.linear.factor * UNSTRETCHED)
    elif rope.dynamic is not None:
        scaling = {"type": "dynamic", "factor": rope.dynamic.factor}
        length = rope.dynamic.original_length
    elif (llama3 := rope.llama3) is not None:
        scaling = {
            "type": "llama3",
            "factor": llama3.factor,
            "low_freq_factor": llama3.low_turns,
            "high_freq_factor": llama3.high_turns,
            ORIGINAL: llama3.original_length,
        }
        length = int(llama3.factor * llama3.original_length)
    elif (longrope := rope.longrope) is not None:
        scaling = {
            "type": "longrope",
            "factor": longrope.factor,
            "short_factor": list(longrope.short),
            "long_factor": list(longrope.long),
            ORIGINAL: longrope.original_length,
        }
        if longrope.attention_factor is not None:
            scaling["attention_factor"] = longrope.attention_factor
        length = int(longrope.factor * longrope.original_length)
    if scaling is not None:
        scaling["rope_type"] = scaling["type"]
    return values | {"rope_scaling": scaling, "max_position_embeddings": length}
