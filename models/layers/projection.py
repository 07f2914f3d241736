"""The matrix products of the layers: rows of activations by weights of two or more dimensions.

XLA's products for CPUs read matrices in place, forward and backward, and make a transposed copy of
anything with more dimensions. So where arrays are whole, these are products of matrices. Where
arrays are split over devices they are not, because split dimensions cannot be merged in place.
"""

import functools
import math
from typing import cast

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from models.layers.cut import cut
from models.remat import SavedNames
from sharding import logical

# The names that every layer with projections declares: products, and weights cut out of one array.
SAVED = SavedNames(matmuls=frozenset({"projection"}), unrolled=frozenset({"weights"}))


def project(x_BTI: jax.Array, w_IO: jax.Array, *, inputs: int = 1) -> jax.Array:
  """y_BTO = x_BTI @ w_IO, summed over the first `inputs` dimensions of w, in the dtype of both.

  I and O each stand for one or more dimensions: [B, T, D] with [D, 2, F] gives [B, T, 2, F], and
  [B, T, N, H] with [N, H, D] and inputs=2 gives [B, T, D].
  """
  if logical.sums_are_float32():
    # Named, because a remat policy does not see products inside a custom gradient.
    return checkpoint_name(_summed_in_float32(x_BTI, w_IO, inputs), "projection")
  if logical.is_split():
    return jnp.tensordot(x_BTI, w_IO, inputs)
  size = math.prod(w_IO.shape[:inputs])
  y_RO = x_BTI.reshape(-1, size) @ w_IO.reshape(size, -1)
  return y_RO.reshape(*x_BTI.shape[:2], *w_IO.shape[inputs:])


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _summed_in_float32(x_BTI: jax.Array, w_IO: jax.Array, inputs: int) -> jax.Array:
  """The product, whose gradient dw is float32 until devices with other rows have summed theirs."""
  return jnp.tensordot(x_BTI, w_IO, inputs)


def _summed_in_float32_forward(x_BTI, w_IO, inputs):
  return _summed_in_float32(x_BTI, w_IO, inputs), (x_BTI, w_IO)


def _summed_in_float32_backward(inputs, kept, dy_BTO):
  x_BTI, w_IO = kept
  outputs = (tuple(range(2, dy_BTO.ndim)), tuple(range(inputs, w_IO.ndim)))
  dx_BTI = jnp.tensordot(dy_BTO, w_IO, axes=outputs)
  dw_IO = jnp.tensordot(x_BTI, dy_BTO, axes=((0, 1), (0, 1)), preferred_element_type=jnp.float32)
  return dx_BTI, dw_IO.astype(w_IO.dtype)


_summed_in_float32.defvjp(_summed_in_float32_forward, _summed_in_float32_backward)


def add_bias(y_BTO: jax.Array, b_O: jax.Array) -> jax.Array:
  """y + b, in the dtype of y. The gradient of b is summed over tokens and devices in float32."""
  return (y_BTO.astype(jnp.float32) + b_O.astype(jnp.float32)).astype(y_BTO.dtype)


def branches(
  x_BTD: jax.Array, w_DKF: jax.Array, b_KF: jax.Array, *, axis: str
) -> tuple[jax.Array, ...]:
  """For every k, y_BTF = x_BTD @ w_DKF[:, k] + b_KF[k]."""
  products = branch_products(x_BTD, w_DKF, axis=axis)
  return tuple(add_bias(y_BTF, b_F) for y_BTF, b_F in zip(products, b_KF, strict=True))


def branch_products(x_BTD: jax.Array, w_DKF: jax.Array, *, axis: str) -> tuple[jax.Array, ...]:
  """For every k, x_BTD @ w_DKF[:, k]. Remat keeps it as "projection", without its bias: it is
  written in any case, and the sum with the bias would be one more array.

  There is one product for each branch. With one product for all, a TPU writes the result with and
  without bias, cuts the branches out of it, and joins their gradients for every product of the
  backward pass. `axis` is the name of F in sharding/rules.py; where F is split, the branches'
  gradients with respect to x are added before they are summed over devices.
  """
  if _is_split_over(axis):
    weights = tuple(w_DKF[:, k] for k in range(w_DKF.shape[1]))
    return project_each(x_BTD, weights, axes=((axis,),) * len(weights), split=axis)
  return tuple(checkpoint_name(y_BTF, "projection") for y_BTF in _products(x_BTD, w_DKF))


def _products(x_BTD: jax.Array, w_DKF: jax.Array) -> list[jax.Array]:
  if logical.is_split():
    return [project(x_BTD, w_DKF[:, k]) for k in range(w_DKF.shape[1])]
  # Named, so that remat can keep them instead of cutting them out again.
  return [project(x_BTD, checkpoint_name(w_DF, "weights")) for w_DF in cut(w_DKF, 1)]


def project_each(
  x_BTD: jax.Array,
  weights: tuple[jax.Array, ...],
  *,
  axes: tuple[tuple[str | None, ...], ...],
  split: str,
) -> tuple[jax.Array, ...]:
  """x_BTD @ w_DO for every w_DO of `weights`; where devices hold parts of O, their gradients with
  respect to x are added before they are summed over devices.

  `axes` names the dimensions O of each weight by the table of activations (sharding/rules.py).
  `split` is the one in each of them that tensor parallelism splits.
  """
  if not _is_split_over(split):
    return tuple(project(x_BTD, w_DO) for w_DO in weights)
  products = cast(tuple[jax.Array, ...], _summed_once(x_BTD, weights, axes, split))
  return tuple(checkpoint_name(y_BTO, "projection") for y_BTO in products)


def _is_split_over(axis: str) -> bool:
  return logical.is_split() and logical.num_shards(axis) > 1


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _summed_once(x_BTD, weights, axes, split):
  """`project` by each weight where O is split; autodiff would sum dx over devices for each."""
  del axes, split
  return tuple(project(x_BTD, w_DO) for w_DO in weights)


def _summed_once_forward(x_BTD, weights, axes, split):
  return _summed_once(x_BTD, weights, axes, split), (x_BTD, weights)


def _summed_once_backward(axes, split, kept, dys):
  x_BTD, weights = kept

  def dx_of_shard(*arrays):
    of_shard = zip(arrays[: len(weights)], arrays[len(weights) :])
    dx_BTD = sum(
      jnp.tensordot(dy_BTO, w_DO, axes=(tuple(range(2, dy_BTO.ndim)), tuple(range(1, w_DO.ndim))))
      for w_DO, dy_BTO in of_shard
    )
    return jax.lax.psum(dx_BTD, logical.mesh_axis(split))

  dx = logical.on_shards(
    dx_of_shard,
    in_axes=(*((None, *outputs) for outputs in axes), *(("batch", "time", *o) for o in axes)),
    out_axes=("batch", "time", "width"),
  )
  dws = tuple(
    jax.vjp(functools.partial(project, x_BTD), w_DO)[1](dy_BTO)[0]
    for w_DO, dy_BTO in zip(weights, dys)
  )
  return dx(*weights, *dys), dws


_summed_once.defvjp(_summed_once_forward, _summed_once_backward)
