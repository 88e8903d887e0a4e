"""Tests the indices of the largest scores against a sort, where many scores are equal."""

import pytest
import torch

from rorqual.layers.top_k import largest


@pytest.mark.parametrize("count", [1, 3, 8, 20])
def test_of_equal_scores_the_last_is_taken(count):
    values = torch.tensor([-torch.inf, -2.0, -0.0, 0.0, 1e-30, 3.0, torch.inf])
    scores = values[torch.randint(len(values), (5, 4, 8))]
    expected = [
        sorted(sorted(range(8), key=lambda i: (row[i], i))[-count:])
        for row in scores.flatten(0, 1).tolist()
    ]
    result = largest(scores, count).sort(-1).values
    assert result.flatten(0, 1).tolist() == expected
