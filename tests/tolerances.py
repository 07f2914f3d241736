"""One table of tolerances by dtype, for every test: scaled by the root of the reduction length."""

import numpy as np

# Largest error allowed of one operation, relative to the largest value of the array.
TOLERANCE = {"float32": 1e-6, "bfloat16": 1e-2}


def assert_close(actual, expected, *, dtype: str, reduction: int = 1, floor: float = 0.1) -> None:
  """|actual - expected| is small beside the largest |expected|, for sums of `reduction` terms.

  `floor` stands in for the largest |expected| where that is smaller: the size of what cancels.
  """
  actual, expected = (np.asarray(x, np.float64) for x in (actual, expected))
  assert actual.shape == expected.shape, f"shapes {actual.shape} and {expected.shape} differ"
  assert np.isfinite(actual).all(), "not finite"
  scale = np.abs(expected).max(initial=0.0)
  allowed = TOLERANCE[dtype] * np.sqrt(reduction) * max(scale, floor)
  worst = np.abs(actual - expected).max(initial=0.0)
  assert worst <= allowed, f"largest error {worst:.3g} is above {allowed:.3g} (scale {scale:.3g})"
