"""The state that a block carries along a row: plain arrays, replaced whole, and caches.

A `Cache` is too large to be copied for each token. The decoder's loops carry the caches of all
equal blocks in one array, and a layer writes and reads its own part in place. It writes first and
then reads, because XLA copies an array that may still be read when it is written.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Cache:
  """An array [batch, size, ...], at `place` of the leading axes of `stack`."""

  stack: jax.Array
  place: tuple[Any, ...] = ()  # int32 scalars, or ints

  @property
  def size(self) -> int:
    """How many entries a row has room for."""
    return self.stack.shape[len(self.place) + 1]

  def read(self) -> jax.Array:
    """The array."""
    return at(self.stack, self.place)

  def write(self, values: jax.Array, index_BT: jax.Array) -> "Cache":
    """The cache with values [batch, count, ...] at `index_BT`, whose entries differ in each row."""
    row_B1 = jnp.arange(values.shape[0])[:, None]
    where = self.stack.at[(*self.place, row_B1, index_BT)]
    stack = where.set(values.astype(self.stack.dtype), unique_indices=True)
    return dataclasses.replace(self, stack=stack)


def at(stack: jax.Array, place: tuple[Any, ...]) -> jax.Array:
  """stack[place], for an index into each of the leading axes."""
  rest = stack.shape[len(place) :]
  sizes = (*(1 for _ in place), *rest)
  return jax.lax.dynamic_slice(stack, [*place, *(0 for _ in rest)], sizes).reshape(rest)


def put(stack: jax.Array, x: jax.Array, index: Any) -> jax.Array:
  """The stack with x at `index` of its first axis."""
  return jax.lax.dynamic_update_index_in_dim(stack, x.astype(stack.dtype), index, axis=0)


def divide(state: Any) -> tuple[Any, Any]:
  """A state with only its plain arrays, and with only its caches; None in place of the others."""

  def only(*, caches: bool) -> Any:
    return jax.tree.map(lambda x: x if _is_cache(x) == caches else None, state, is_leaf=_is_cache)

  return only(caches=False), only(caches=True)


def join(plain: Any, caches: Any) -> Any:
  """The state made of both parts: the inverse of `divide`."""
  return jax.tree.map(
    lambda x, cache: x if cache is None else cache,
    plain,
    caches,
    is_leaf=lambda x: x is None or _is_cache(x),
  )


def placed(caches: Any, place: tuple[Any, ...]) -> Any:
  """The caches, each at `place` of its stack."""
  return jax.tree.map(
    lambda cache: dataclasses.replace(cache, place=place), caches, is_leaf=_is_cache
  )


def _is_cache(x: Any) -> bool:
  return isinstance(x, Cache)
