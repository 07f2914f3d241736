"""Checksums of the arrays of a state, by name: one changes when any bit of its array changes.

The file format notices that a file is cut off, but not that a bit in it has changed. The sums here
are over all elements of the global array modulo 2^32, so they do not depend on its sharding.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

# Arrays in host memory of at most this many elements are summed by NumPy: nothing to compile.
HOST_SIZE = 1 << 22


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
  sums = {name: (_on_host if _is_on_host(x) else _on_device)(x) for name, x in named.items()}
  return {name: f"{int(np.asarray(x)):08x}" for name, x in sums.items()}


def _is_on_host(x: jax.Array) -> bool:
  is_cpu = all(device.platform == "cpu" for device in x.sharding.device_set)
  return is_cpu and x.is_fully_addressable and x.size <= HOST_SIZE


def _on_host(x: jax.Array) -> np.uint32:
  """The sum of `_on_device`, by NumPy."""
  array = np.ascontiguousarray(np.asarray(x)).reshape(-1)
  bits = array.view(f"uint{8 * min(4, array.itemsize)}").astype(np.uint32)
  index = np.arange(bits.size, dtype=np.uint32)
  return np.sum(_mix(bits ^ (index * np.uint32(0x9E3779B1))), dtype=np.uint32)


@jax.jit
def _on_device(x: jax.Array) -> jax.Array:
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


def _mix(x: Any) -> Any:
  """A bijection of uint32 (the end of MurmurHash3), so that no single change cancels out."""
  x = (x ^ (x >> 16)) * np.uint32(0x85EBCA6B)
  x = (x ^ (x >> 13)) * np.uint32(0xC2B2AE35)
  return x ^ (x >> 16)
