"""Tests which languages needle_config.py refuses."""

import pytest

from rorqual.config import from_dict
from rorqual.data.needle_config import NeedleConfig


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"keys": 0}, "needles.keys: got 0"),
        ({"questions": -1}, "needles.questions"),
        ({"drill": -1}, "needles.drill: got -1"),
        ({"alone": -1}, "needles.alone: got -1"),
        ({"needles": 1}, "got 1 pairs, expected 2..12"),
        ({"needles": 33}, "got 33 pairs, expected 2..12"),
        ({"asked": 9}, "got 4 pairs, expected 9..12"),
        ({"pairs": 9}, "pairs"),
    ],
)
def test_a_wrong_language_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        from_dict(NeedleConfig, change)
