"""Inside jax.shard_map: arrays that are the same on some devices beside arrays that are not."""

import jax


def varying_alike(*arrays: jax.Array) -> tuple[jax.Array, ...]:
  """The arrays, each marked as varying over every mesh axis that one of them varies over.

  A custom gradient and the carry of a scan need that. The gradient of an array that was the same on
  several devices is then summed over them by JAX, outside the custom gradient. Outside shard_map no
  axis varies and nothing changes.
  """
  axes = frozenset().union(*(jax.typeof(x).mat.varying for x in arrays))
  marked = []
  for x in arrays:
    missing = tuple(sorted(axes - jax.typeof(x).mat.varying))
    marked.append(jax.lax.pcast(x, missing, to="varying") if missing else x)
  return tuple(marked)


def shaped_alike(shape: tuple[int, ...], dtype: jax.typing.DTypeLike, like: jax.Array):
  """The shape and dtype of a kernel's result, varying over the same mesh axes as `like`."""
  return jax.ShapeDtypeStruct(shape, dtype, manual_axis_type=jax.typeof(like).mat)
