"""Reads the fields of a config.json that several families have.

They are numbers and flags, which an error names if they are none; quantization_config; and the
number of blocks of multi-token prediction.
"""

from collections.abc import Mapping
from math import isfinite
from typing import Any

MTP_LAYERS = ("num_nextn_predict_layers", "num_mtp_layers", "mtp_num_hidden_layers")


def number(fields: Mapping[str, Any], key: str, within: str = "") -> float:
    """Returns a number of a config.json; ValueError, naming the field, for anything else."""
    value = fields.get(key)
    if isinstance(value, bool) or not isinstance(value, int | float) or not isfinite(value):
        raise ValueError(f"config.json: {within}{key}: got {value!r}, expected a number")
    return float(value)


def whole(fields: Mapping[str, Any], key: str, within: str = "") -> int:
    """Returns a whole number of a config.json; ValueError for anything else."""
    value: Any = fields.get(key)
    number = isinstance(value, int | float) and not isinstance(value, bool) and isfinite(value)
    if not number or value != value // 1:
        raise ValueError(f"config.json: {within}{key}: got {value!r}, expected a whole number")
    return int(value)


def flag(fields: Mapping[str, Any], key: str, within: str = "") -> bool:
    """Returns whether a field of a config.json is true; ValueError for what is no boolean.

    0, 1 and null are taken as the libraries take them that read such files.
    """
    value = fields.get(key)
    if value not in (True, False, None):
        raise ValueError(f"config.json: {within}{key}: got {value!r}, expected true or false")
    return bool(value)


def quantisation(description: Mapping[str, Any]) -> Mapping[str, Any]:
    """Returns the fields of quantization_config, none if nothing is quantised.

    ValueError for another method than float8.
    """
    quantised = description.get("quantization_config") or {}
    if not isinstance(quantised, Mapping):
        raise ValueError(
            f"config.json: quantization_config: got {quantised!r}, expected its fields"
        )
    if (method := quantised.get("quant_method", "fp8")) != "fp8":
        raise ValueError(
            f"quantization_config.quant_method: got {method!r}, expected 'fp8' or none"
        )
    return quantised


def scale_block(description: Mapping[str, Any]) -> tuple[int, int] | None:
    """Returns the rows and columns that share a scale of float8 weights.

    None where a whole tensor has one scale.
    """
    block = quantisation(description).get("weight_block_size", [128, 128])
    if block is None:
        return None
    sizes = isinstance(block, list) and len(block) == 2
    if not sizes or not all(type(size) is int and size > 0 for size in block):
        raise ValueError(
            f"config.json: weight_block_size: got {block!r}, expected two sizes such as [128, 128]"
        )
    return block[0], block[1]


def mtp_layers(description: Mapping[str, Any]) -> int:
    """Returns the number of blocks of multi-token prediction that a config.json names."""
    key = next((key for key in MTP_LAYERS if description.get(key) is not None), None)
    return 0 if key is None else whole(description, key)
