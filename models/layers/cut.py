"""Cuts a weight into parts, and joins the gradients of the parts.

Autodiff would add the parts' gradients up, each with zeros around it, and XLA would evaluate all of
them for every element. An unrolled model has 24 or 48 such parts: that took 65 of the 332 ms of a
step of the 1b Transformer on an H100 (docs/benchmarks.md).
"""

import functools
from typing import Any, cast

import jax
import jax.numpy as jnp

from kernels import dispatch
from sharding import logical


def cut(x: jax.Array, axis: int) -> list[jax.Array]:
  """The slices of x along `axis`, each without that axis."""
  return cast(list[jax.Array], _cut(x, axis))


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def _cut(x: jax.Array, axis: int) -> list[jax.Array]:
  return [jax.lax.index_in_dim(x, index, axis, keepdims=False) for index in range(x.shape[axis])]


def _forward(x, axis):
  return _cut(x, axis), None


def _backward(axis, _, gradients):
  return (_joined(gradients, axis),)


_cut.defvjp(_forward, _backward)


def _joined(parts: list[jax.Array], axis: int) -> jax.Array:
  """jnp.stack(parts, axis). XLA's kernel for GPUs moves one element at a time, so two of 16 bits go
  as one word. Only where arrays are not split: over `tensor`, it took griffin-400m 5 GB more."""
  shape, dtype = parts[0].shape, parts[0].dtype
  in_words = dtype.itemsize == 2 and axis < len(shape) and shape[-1] % 2 == 0
  if not in_words or dispatch.target_platform() != "gpu" or logical.is_split():
    return jnp.stack(parts, axis)
  pairs = (part.reshape(*shape[:-1], -1, 2) for part in parts)
  words = [jax.lax.bitcast_convert_type(pair, jnp.uint32) for pair in pairs]
  joined = jax.lax.bitcast_convert_type(jnp.stack(words, axis), dtype)
  return joined.reshape(*shape[:axis], len(parts), *shape[axis:])


def cut_steps(xs: Any) -> list[Any]:
  """The tree at every index of its leaves' first axis. Gradients are joined before anything reads
  the whole; otherwise XLA would join them again, by element, in each operation that reads it."""
  leaves, tree = jax.tree.flatten(xs)
  cut_leaves = [
    cut(_joined_first(x), 0) if jnp.issubdtype(x.dtype, jnp.inexact) else list(x) for x in leaves
  ]
  return [tree.unflatten(parts) for parts in zip(*cut_leaves, strict=True)]


@jax.custom_vjp
def _joined_first(x: jax.Array) -> jax.Array:
  return x


_joined_first.defvjp(
  lambda x: (x, None), lambda _, gradient: (jax.lax.optimization_barrier(gradient),)
)
