"""What attention says that it costs, counted by hand."""

import numpy as np
import pytest

from models.layers.attention_costs import visible_keys


@pytest.mark.parametrize(("row_length", "window"), [(1, None), (7, None), (9, 3), (9, 8), (5, 40)])
def test_visible_keys_are_counted_one_by_one(row_length, window):
  counts = [min(t, row_length if window is None else window) + 1 for t in range(row_length)]
  assert visible_keys(row_length, window) == pytest.approx(np.mean(counts))
