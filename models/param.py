"""A trainable array whose dimensions say what they are."""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from flax import nnx

Initializer = Callable[[jax.Array, Sequence[int]], jax.Array]


def param(
  init: Initializer, shape: Sequence[int], axes: Sequence[str], *, rngs: nnx.Rngs
) -> nnx.Param:
  """A float32 parameter of `shape`; `axes` names what each dimension is (see sharding/rules.py)."""
  assert len(shape) == len(axes), f"shape {tuple(shape)} and axes {tuple(axes)} differ in length"
  return nnx.Param(init(rngs.params(), shape), axes=tuple(axes))


def axes_of(variable: nnx.Variable) -> tuple[str, ...]:
  """The names of the dimensions of one parameter."""
  return variable.get_metadata("axes")


def normal(variance: float) -> Initializer:
  """Untruncated normal of the given variance, float32."""

  def init(key: jax.Array, shape: Sequence[int]) -> jax.Array:
    return jnp.sqrt(jnp.float32(variance)) * jax.random.normal(key, shape, jnp.float32)

  return init


def zeros(key: jax.Array, shape: Sequence[int]) -> jax.Array:
  """Float32 zeros; the key is not used."""
  del key
  return jnp.zeros(shape, jnp.float32)
