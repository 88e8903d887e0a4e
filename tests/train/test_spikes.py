"""Tests spikes.py: what jumps out of the last steps, and that its state loses no bit."""

import json

import numpy as np

from rorqual.train.spikes import SpikeDetector


def test_what_is_far_above_the_last_steps_is_a_spike():
    rng = np.random.default_rng(0)
    detector = SpikeDetector(6.0, window=16)
    noise = rng.normal(size=(40, 2)) * 0.1 + 3.0
    assert [detector.find(*values) for values in noise.tolist()] == [None] * 40
    mean = np.mean(detector.losses)
    deviation = np.std(detector.losses, ddof=1)
    for factor, spike in ((5.9, None), (6.1, "loss")):
        other = SpikeDetector(6.0, window=16)
        other.load_state_dict(detector.state_dict())
        assert other.find(mean + factor * deviation, 3.0) == spike
    assert detector.find(3.0, 30.0) == "gradient norm"
    assert detector.find(0.0, 0.0) is None, "a fall is none"


def test_nothing_is_a_spike_before_half_of_the_window():
    detector = SpikeDetector(2.0, window=8)
    assert [detector.find(loss, 1.0) for loss in (1.0, 1.1, 9.0)] == [None] * 3
    detector = SpikeDetector(2.0, window=8)
    assert [detector.find(loss, 1.0) for loss in (1.0, 1.1, 1.0, 9.0)] == [None] * 3 + ["loss"]


def test_a_lasting_level_is_soon_no_spike():
    detector = SpikeDetector(6.0)
    before = [detector.find(1.0 + 0.01 * (step % 2), 1.0) for step in range(128)]
    assert before == [None] * 128
    after = [detector.find(2.0, 1.0) for _ in range(8)]
    assert after == ["loss"] * 4 + [None] * 4


def test_a_saved_window_goes_on_to_the_last_bit():
    rng = np.random.default_rng(1)
    values = rng.normal(size=(60, 2)).astype(np.float32).tolist()
    whole = SpikeDetector(1.5, window=10)
    expected = [whole.find(*each) for each in values]
    first = SpikeDetector(1.5, window=10)
    got = [first.find(*each) for each in values[:33]]
    second = SpikeDetector(1.5, window=10)
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    got += [second.find(*each) for each in values[33:]]
    assert got == expected and "loss" in got
    assert second.state_dict() == whole.state_dict()
