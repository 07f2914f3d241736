"""Two block-diagonal products by XLA for GPUs, with results rounded before they are written.

With activations of 2 bytes a channel and token:

  forward    two products, each reads x and writes a result; bias and order: each result read,
             written                                                                     16 bytes
  backward   for each result the product for dx and that for dw, sums for db, both dx in order 30

A single product for both in float32 would be read again for bias, rounding and order, and its
gradients joined: 22 bytes and more. Here the bias is added after rounding, and the sum rounded
again.
"""

import jax
import jax.numpy as jnp


def forward(x_BTR: jax.Array, w_GI2J: jax.Array, b_G2J: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Both results, as kernels/block_diagonal says, in the dtype of x."""
  x_BTGI = _blocks_of(x_BTR, w_GI2J)

  def result(k: int) -> jax.Array:
    y_BTGJ = _product(x_BTGI, w_GI2J[:, :, k]).astype(jnp.float32) + b_G2J[:, k]
    return y_BTGJ.astype(x_BTR.dtype).reshape(x_BTR.shape)

  return result(0), result(1)


def backward(
  x_BTR: jax.Array, w_GI2J: jax.Array, dr_BTR: jax.Array, di_BTR: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """dx in the dtype of x, dw in that of w, db in float32."""
  of_r_BTGI, of_i_BTGI = (
    _product(_blocks_of(dy_BTR, w_GI2J), w_GI2J[:, :, k].swapaxes(1, 2))
    for k, dy_BTR in enumerate((dr_BTR, di_BTR))
  )
  dx_BTR = (of_r_BTGI + of_i_BTGI).reshape(x_BTR.shape)
  db_2GJ = [
    jnp.sum(_blocks_of(dy_BTR, w_GI2J), axis=(0, 1), dtype=jnp.float32)
    for dy_BTR in (dr_BTR, di_BTR)
  ]
  dw_GI2J = weight_gradients(x_BTR, w_GI2J, dr_BTR, di_BTR)
  return dx_BTR, dw_GI2J, jnp.stack(db_2GJ, axis=1)


def weight_gradients(
  x_BTR: jax.Array, w_GI2J: jax.Array, dr_BTR: jax.Array, di_BTR: jax.Array
) -> jax.Array:
  """dw in the dtype of w."""
  x_BTGI = _blocks_of(x_BTR, w_GI2J)
  dw_2GIJ = [
    jnp.einsum(
      "BTGI,BTGJ->GIJ", x_BTGI, _blocks_of(dy_BTR, w_GI2J), preferred_element_type=jnp.float32
    )
    for dy_BTR in (dr_BTR, di_BTR)
  ]
  return jnp.stack(dw_2GIJ, axis=2).astype(w_GI2J.dtype)


def _product(x_BTGI: jax.Array, w_GIJ: jax.Array) -> jax.Array:
  """The product for each block, in the dtype of both; an einsum would put time innermost."""
  y_GBTJ = jax.lax.dot_general(x_BTGI, w_GIJ, (((3,), (1,)), ((2,), (0,))))
  return jnp.moveaxis(y_GBTJ, 0, 2)


def _blocks_of(x_BTR: jax.Array, w_GI2J: jax.Array) -> jax.Array:
  return x_BTR.reshape(*x_BTR.shape[:2], *w_GI2J.shape[:2])
