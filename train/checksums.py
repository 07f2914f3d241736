"""A number for every array of a state, by name, that changes when a bit of the array does.

The file format notices that a file is cut off, but not that a bit in it has changed. The sums here
are over all elements of the global array modulo 2^32, so they do not depend on how it is laid out.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


def named_leaves(tree: Any) -> dict[str, Any]:
  """The leaves of a tree by path: TrainState(params={"w_DF": x}) has "params/w_DF"."""
  return {
    jax.tree_util.keystr(path, simple=True, separator="/"): leaf
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
  }


def checksums(named: dict[str, jax.Array]) -> dict[str, str]:
  """The checksum of each array as 8 hex digits; the arrays stay where they are.

  Every process of a job has to call it, with the same names in the same order.
  """
  for name, x in named.items():
    if not any(jnp.issubdtype(x.dtype, kind) for kind in (jnp.floating, jnp.integer, jnp.bool_)):
      raise ValueError(
        f"checksums: {name} has dtype {x.dtype}, which has no plain bits; keep real numbers, "
        "integers or jax.random.key_data in the state"
      )
  sums = {name: _checksum(x) for name, x in named.items()}
  return {name: f"{int(np.asarray(x)):08x}" for name, x in sums.items()}


@jax.jit
def _checksum(x: jax.Array) -> jax.Array:
  """Sum over elements of mix(bits ^ index * odd), uint32."""
  if x.dtype == jnp.bool_:
    bits = x.astype(jnp.uint32)
  elif x.dtype.itemsize == 8:
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32)
  else:
    bits = jax.lax.bitcast_convert_type(x, jnp.dtype(f"uint{8 * x.dtype.itemsize}"))
    bits = bits.astype(jnp.uint32)
  index = jnp.zeros(bits.shape, jnp.uint32)
  for dimension, size in enumerate(bits.shape):
    row = jax.lax.broadcasted_iota(jnp.uint32, bits.shape, dimension)
    # Modulo 2^32 on purpose: arrays may have more elements than that.
    index = index * np.uint32(size % 2**32) + row
  return jnp.sum(_mix(bits ^ (index * np.uint32(0x9E3779B1))), dtype=jnp.uint32)


def _mix(x: jax.Array) -> jax.Array:
  """A bijection of uint32 (the end of MurmurHash3), so that no single change cancels out."""
  x = (x ^ (x >> 16)) * np.uint32(0x85EBCA6B)
  x = (x ^ (x >> 13)) * np.uint32(0xC2B2AE35)
  return x ^ (x >> 16)
