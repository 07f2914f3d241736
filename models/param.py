"""A trainable array whose dimensions say what they are."""

import dataclasses
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from flax import nnx

Initializer = Callable[[jax.Array, Sequence[int]], jax.Array]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Declared:
  """What `param` was given besides the values."""

  axes: tuple[str, ...]
  float32: bool
  decays: bool


def param(
  init: Initializer,
  shape: Sequence[int],
  axes: Sequence[str],
  *,
  float32: bool = False,
  decays: bool = True,
  rngs: nnx.Rngs,
) -> nnx.Param:
  """A parameter of `shape`; `axes` names what each dimension is (see sharding/rules.py).

  float32: stored and read in float32 whatever the model's dtypes. It is for norms, biases and
  decays, which are few and read where bfloat16 is too coarse. decays: whether weight decay applies.
  """
  assert len(shape) == len(axes), f"shape {tuple(shape)} and axes {tuple(axes)} differ in length"
  declared = Declared(axes=tuple(axes), float32=float32, decays=decays)
  return nnx.Param(init(rngs.params(), shape), declared=declared)


def declared_of(variable: nnx.Variable) -> Declared:
  """What the `param` of this variable was given."""
  return variable.get_metadata("declared")


def normal(variance: float) -> Initializer:
  """Untruncated normal of the given variance, float32."""

  def init(key: jax.Array, shape: Sequence[int]) -> jax.Array:
    return jnp.sqrt(jnp.float32(variance)) * jax.random.normal(key, shape, jnp.float32)

  return init


def ones(key: jax.Array, shape: Sequence[int]) -> jax.Array:
  """Float32 ones; the key is not used."""
  del key
  return jnp.ones(shape, jnp.float32)


def zeros(key: jax.Array, shape: Sequence[int]) -> jax.Array:
  """Float32 zeros; the key is not used."""
  del key
  return jnp.zeros(shape, jnp.float32)
