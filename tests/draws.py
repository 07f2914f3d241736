"""Random inputs of tests, drawn by numpy: JAX's generator is compiled again for every shape."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np


class Draws:
  """A stream of arrays: the same for the same seed and the same draws before."""

  def __init__(self, seed: int = 0):
    self._generator = np.random.default_rng(seed)

  def normal(self, *shape: int, dtype: str = "float32") -> jax.Array:
    return jnp.asarray(self._generator.standard_normal(shape).astype(jnp.dtype(dtype)))

  def uniform(self, *shape: int, low: float = 0.0, high: float = 1.0) -> jax.Array:
    return jnp.asarray(self._generator.uniform(low, high, shape).astype(np.float32))

  def decays(self, shape: Sequence[int], *, zero: float = 0.1, one: float = 0.1) -> np.ndarray:
    """Between 0.6 and 1; of those shares exactly 0 and exactly 1, runs of both. To write to."""
    kind = self._generator.random(shape)
    between = self._generator.uniform(0.6, 1.0, shape)
    return np.where(kind < zero, 0.0, np.where(kind > 1.0 - one, 1.0, between)).astype(np.float32)
