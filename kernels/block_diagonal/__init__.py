"""Two block-diagonal products of one input, with biases: the pre-activations of an RG-LRU's gates.

  r_BTR, i_BTR = products(x_BTR, w_GI2J, b_G2J, implementation="auto")

The R = G x I channels of x are G blocks, and block g of result k is x_g @ w[g, :, k] + b[g, k]. The
sums are float32.

  einsum          XLA's batched product, and results in float32. On TPU the compiler swaps time and
                  channels: it copies x before the product, and both results after it. A CPU does so
                  once instead of for every product where batch and time can be merged (`is_whole`)
  einsum_rounded  the same with results in the dtype of x, rounded by the product
  pallas_tpu      rows of channels in and out, nothing copied; results, and the gradients of x and
                  w, rounded once to x's dtype
  pallas_gpu      the same by Triton, for activations of 2 bytes; dw as einsum_rounded. On an H100
                  0.12 ms forward and 0.31 backward at [8, 2048, 2560], einsum_rounded 0.29 and 0.45

"auto" is pallas_tpu on TPU from v4 on. On GPUs that run the RG-LRU's kernel, which takes rounded
results, it is pallas_gpu, or einsum_rounded for float32. Elsewhere it is einsum. The Pallas kernels
run on whole arrays, or inside jax.shard_map with check_vma=False, where each shard has whole
blocks. The compiler's partitioner can split the others (`is_partitioned`).
"""

import functools
from typing import cast

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from kernels import dispatch
from kernels.block_diagonal import einsum_rounded, pallas_gpu, pallas_tpu

# Those with a backward pass of their own: forward(x, w, b), backward(x, w, dr, di).
_FUSED = {"einsum_rounded": einsum_rounded, "pallas_tpu": pallas_tpu, "pallas_gpu": pallas_gpu}
IMPLEMENTATIONS = ("einsum", *_FUSED)
# Pallas kernels cannot use bfloat16 in the matrix units of these.
_WITHOUT_BFLOAT16 = ("TPU v2", "TPU v3")
_DEFAULTS = {"cpu": "einsum", "tpu": "pallas_tpu", "gpu": "pallas_gpu"}


def resolve(requested: str, *, itemsize: int = 2) -> str:
  """The implementation that `requested` stands for on this platform, for activations of `itemsize`
  bytes; see kernels/dispatch.py."""
  defaults = dispatch.gpu_defaults(_DEFAULTS, otherwise="einsum")
  if dispatch.target_kind() in _WITHOUT_BFLOAT16:
    defaults = {**defaults, "tpu": "einsum"}
  if defaults["gpu"] == "pallas_gpu" and itemsize != 2:
    defaults = {**defaults, "gpu": "einsum_rounded"}
  kernel = "block_diagonal" if itemsize == 2 else "block_diagonal, float32"
  return dispatch.resolve(kernel, requested, available=IMPLEMENTATIONS, defaults=defaults)


def is_partitioned(implementation: str) -> bool:
  """Whether the compiler's partitioner splits it over devices, without jax.shard_map."""
  return not implementation.startswith("pallas")


def products(
  x_BTR: jax.Array,
  w_GI2J: jax.Array,
  b_G2J: jax.Array,
  *,
  implementation: str,
  is_whole: bool = True,
) -> tuple[jax.Array, jax.Array]:
  """Both products, [batch, time, R] each; w in the dtype of x, and blocks are square.

  `is_whole`: no dimension is split by the compiler's partitioner.
  """
  if x_BTR.ndim != 3 or w_GI2J.ndim != 4 or not x_BTR.shape[1]:
    raise ValueError(
      f"block_diagonal: x {x_BTR.shape} must be [batch, time, R], with at least one token, and w "
      f"{w_GI2J.shape} [blocks, R / blocks, 2, R / blocks]"
    )
  blocks, size = w_GI2J.shape[:2]
  expected = (blocks, size, 2, size)
  is_b_right = b_G2J.shape == (blocks, 2, size)
  if w_GI2J.shape != expected or x_BTR.shape[-1] != blocks * size or not is_b_right:
    raise ValueError(
      f"block_diagonal: x {x_BTR.shape}, w {w_GI2J.shape} and b {b_G2J.shape} must be "
      f"[batch, time, {blocks * size}], {expected} and {(blocks, 2, size)}"
    )
  b_G2J = b_G2J.astype(jnp.float32)
  implementation = resolve(implementation, itemsize=x_BTR.dtype.itemsize)
  if implementation in _FUSED:
    results = _fused(implementation, x_BTR, w_GI2J, b_G2J)
    return cast(tuple[jax.Array, jax.Array], results)
  y_BTG2J = (_merged if is_whole else _batched)(x_BTR, w_GI2J) + b_G2J
  return y_BTG2J[..., 0, :].reshape(x_BTR.shape), y_BTG2J[..., 1, :].reshape(x_BTR.shape)


def _batched(x_BTR, w_GI2J):
  x_BTGI = x_BTR.reshape(*x_BTR.shape[:2], *w_GI2J.shape[:2])
  return jnp.einsum("BTGI,GIKJ->BTGKJ", x_BTGI, w_GI2J, preferred_element_type=jnp.float32)


def _merged(x_BTR, w_GI2J):
  batch, time, _ = x_BTR.shape
  blocks, size, results, _ = w_GI2J.shape
  x_GNI = x_BTR.reshape(batch * time, blocks, size).swapaxes(0, 1)
  w_GIO = w_GI2J.reshape(blocks, size, results * size)
  y_GNO = jnp.matmul(x_GNI, w_GIO, preferred_element_type=jnp.float32)
  return y_GNO.swapaxes(0, 1).reshape(batch, time, blocks, results, size)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _fused(implementation, x_BTR, w_GI2J, b_G2J):
  return _FUSED[implementation].forward(x_BTR, w_GI2J, b_G2J)


def _fused_forward(implementation, x_BTR, w_GI2J, b_G2J):
  results = _FUSED[implementation].forward(x_BTR, w_GI2J, b_G2J)
  if implementation == "pallas_gpu":
    # Named, so that a remat policy can keep them: a GPU has the memory, and to compute them again
    # is to read and write three arrays.
    results = checkpoint_name(results, "gates")
  return results, (x_BTR, w_GI2J)


def _fused_backward(implementation, residuals, cotangents):
  return _FUSED[implementation].backward(*residuals, *cotangents)


_fused.defvjp(_fused_forward, _fused_backward)
