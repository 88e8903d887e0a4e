"""Draws the initial values of a table's rows, few of them in memory at a time."""

from collections.abc import Iterator

import torch
from jaxtyping import Float
from torch import Tensor

DRAWN = 1 << 20  # values drawn at a time
_TOGETHER = 16  # values that torch draws together: chunks of 16 rows are what one draw would give


def draw_rows(
    rows: int, width: int, std: float, first: int = 0, end: int | None = None
) -> Iterator[tuple[int, Float[Tensor, "N W"]]]:
    """Yields rows first..end of a table of normal numbers, as (number of the first one, values).

    They are those of one draw of the whole table, [rows, width], from torch's generator, which is
    moved on by the whole table whatever rows are asked for. So ranks that each draw their own rows
    get the table that one process draws.
    """
    end = rows if end is None else end
    step = max(_TOGETHER, DRAWN // width // _TOGETHER * _TOGETHER)
    start = 0
    while start < rows:
        left = rows - start
        # Fewer than 16 rows at the end are drawn with those before them: alone, torch would draw
        # other numbers.
        count = left if left < step + _TOGETHER else step
        values = torch.randn(count, width, dtype=torch.float32).mul_(std)
        lower = max(start, first)
        upper = min(start + count, end)
        if lower < upper:
            yield lower, values[lower - start : upper - start]
        start += count
