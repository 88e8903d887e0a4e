"""Tests hardware.py: peaks of GPUs by their names, and a measured one of this machine."""

import pytest
import torch

from rorqual import hardware
from rorqual.hardware import DEVICES, peak_flops, product_flops


def test_this_machines_peak_is_measured_without_random_numbers():
    before = torch.get_rng_state()
    measured = product_flops.__wrapped__(torch.float32)
    assert 1e8 < measured < 1e15, "no machine is slower or faster"
    assert torch.equal(torch.get_rng_state(), before)
    assert peak_flops(torch.device("cpu"), torch.float32) == product_flops(torch.float32)


@pytest.mark.parametrize(
    ("name", "key"),
    [
        ("NVIDIA H200", "h200"),
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA A100-SXM4-80GB", "a100"),
        ("NVIDIA GeForce RTX 4090", "rtx4090"),
        ("AMD Instinct MI300X", "mi300x"),
        ("Some other device", None),
    ],
)
def test_gpus_are_known_by_their_names(monkeypatch, name, key):
    monkeypatch.setattr(hardware.torch.cuda, "get_device_name", lambda _: name)
    device = torch.device("cuda", 0)
    expected = None if key is None else DEVICES[key].flops
    assert peak_flops(device, torch.bfloat16) == expected
    assert peak_flops(device, torch.float32) is None, "only bfloat16 is published"
