"""Rotary position embedding, held to complex numbers in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models.layers.rope import apply_rope
from tests.draws import Draws

SHAPE = (2, 7, 3, 16)
POSITION = np.array([[0, 1, 2, 3, 0, 1, 2], [5, 6, 1000, 1001, 0, 0, 1]], np.int32)


def _rotated(x, *, back=False):
  """Pairs (i, i + P/2) of the first P = H/2 dimensions as complex numbers, turned."""
  half = x.shape[-1] // 4
  angle = POSITION[:, :, None, None] * 10_000.0 ** (-np.arange(half) / half)
  x = np.asarray(x, np.float64)
  z = (x[..., :half] + 1j * x[..., half : 2 * half]) * np.exp(-1j * angle if back else 1j * angle)
  return np.concatenate([z.real, z.imag, x[..., 2 * half :]], axis=-1)


def test_pairs_of_the_first_half_turn_and_the_rest_passes():
  x = Draws().normal(*SHAPE)
  np.testing.assert_allclose(apply_rope(x, POSITION), _rotated(x), atol=1e-4)


@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_in_bfloat16_a_result_and_a_gradient_are_rounded_once(direction):
  """Each of the two terms of a gradient was rounded before, and their sum again."""
  x = Draws().normal(*SHAPE, dtype="bfloat16")
  turned, pull_back = jax.vjp(lambda x: apply_rope(x, POSITION), x)
  if direction == "forward":
    actual, wanted = turned, _rotated(x)
  else:
    [actual], wanted = pull_back(x), _rotated(x, back=True)
  assert actual.dtype == jnp.bfloat16
  actual = np.asarray(actual, np.float64)
  # Half a unit in the last place of 8 bits, and what the angle is rounded by.
  assert np.all(np.abs(actual - wanted) <= 2.0**-8 * np.abs(actual) + 5e-4)
