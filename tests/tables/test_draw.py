"""Tests draw.py: rows drawn in chunks, and by several ranks, are those of one draw."""

import pytest
import torch

from rorqual.tables import draw
from rorqual.tables.draw import draw_rows


@pytest.mark.parametrize(
    ("rows", "width"), [(1, 3), (5, 64), (16, 1), (100, 7), (163, 4), (200, 40)]
)
@pytest.mark.parametrize("ranks", [1, 3])
def test_chunks_are_one_draw(rows, width, ranks, monkeypatch):
    monkeypatch.setattr(draw, "DRAWN", 32 * width)
    torch.manual_seed(3)
    expected = torch.randn(rows, width) * 0.02
    after = torch.get_rng_state()
    size = -(-rows // ranks)
    for first in range(0, rows, size):
        torch.manual_seed(3)
        pieces = list(draw_rows(rows, width, 0.02, first, min(first + size, rows)))
        assert torch.equal(torch.get_rng_state(), after)
        values = torch.cat([values for _, values in pieces])
        assert torch.equal(values, expected[first : first + size])
        assert pieces[0][0] == first
