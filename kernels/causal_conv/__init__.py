"""The short causal convolution of a recurrent block: depthwise, over one document only.

  y_BTR, y_BTR = convolve(x_BTR, b_in_R, w_KR, b_R, document_BT, implementation="auto")

  z_t = x_t + b_in, rounded to the dtype of x
  y_t = b + sum_k w_k z_{t-(K-1-k)}, over the taps whose token is of the document of token t

so tap K-1 is on the token itself. Sums are float32: those of the outputs and, over all tokens, the
gradients of w, b and b_in. A row usually has no tokens before it. If it has, they are in
`before_BHR` (H = K-1 tokens of z) and `before_document_BH`.

y is returned twice, because two kernels read it: the backward pass here then adds up the gradients
of both, which costs no extra pass over memory.

  shifts      plain JAX. XLA for GPUs computes the K + 2 sums over tokens of the backward pass two
              at a time, and reads their inputs again each time; on TPUs moving tokens costs it
              several times what the bytes do
  pallas_gpu  Triton kernels that read and write every activation once: 4 bytes a channel and token
              forward and 8 backward where XLA's passes move 4 and 16, for activations of 2 bytes
  pallas_tpu  the same for TPUs, at most 17 taps

"auto" is the kernel on TPUs and on GPUs that run the RG-LRU's kernel, and shifts elsewhere. Rows
with tokens before them always use shifts: prompts and single tokens, and the shards of rows that
are split over devices.
"""

import functools
from typing import cast

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from kernels import dispatch, shapes
from kernels.causal_conv import pallas_gpu, pallas_tpu
from kernels.varying import varying_alike

_FUSED = {"pallas_gpu": pallas_gpu, "pallas_tpu": pallas_tpu}
IMPLEMENTATIONS = ("shifts", *_FUSED)
_DEFAULTS = {"cpu": "shifts", "tpu": "pallas_tpu", "gpu": "pallas_gpu"}


def resolve(requested: str) -> str:
  """The implementation that `requested` stands for on this platform; see kernels/dispatch.py."""
  defaults = dispatch.gpu_defaults(_DEFAULTS, otherwise="shifts")
  return dispatch.resolve("causal_conv", requested, available=IMPLEMENTATIONS, defaults=defaults)


def tracks_varying(implementation: str) -> bool:
  """Whether jax.shard_map can check over which axes its arrays vary (check_vma)."""
  return implementation != "pallas_gpu"


def convolve(
  x_BTR: jax.Array,
  b_in_R: jax.Array,
  w_KR: jax.Array,
  b_R: jax.Array,
  document_BT: jax.Array,
  before_BHR: jax.Array | None = None,
  before_document_BH: jax.Array | None = None,
  *,
  implementation: str,
) -> tuple[jax.Array, jax.Array]:
  """The convolution, twice, in the dtype of x; see the module."""
  if x_BTR.ndim != 3 or w_KR.ndim != 2 or not w_KR.shape[0]:
    raise ValueError(
      f"causal_conv: x {x_BTR.shape} and w {w_KR.shape} must be [batch, time, R] and [taps, R], "
      "with at least one tap"
    )
  batch, time, width = x_BTR.shape
  expected = {
    "b_in": (b_in_R.shape, (width,)),
    "w": (w_KR.shape[1:], (width,)),
    "b": (b_R.shape, (width,)),
    "document": (document_BT.shape, (batch, time)),
  }
  shapes.check("causal_conv", f"x {x_BTR.shape}", expected)
  implementation = resolve(implementation)
  b_in_R, w_KR, b_R = (z.astype(jnp.float32) for z in (b_in_R, w_KR, b_R))
  if implementation == "shifts" or before_BHR is not None:
    y_BTR = _shifts(x_BTR, b_in_R, w_KR, b_R, document_BT, before_BHR, before_document_BH)
    return y_BTR, y_BTR
  arrays = (x_BTR, b_in_R, w_KR, b_R, document_BT)
  if tracks_varying(implementation):
    arrays = varying_alike(*arrays)
  results = _fused(implementation, *arrays)
  return cast(tuple[jax.Array, jax.Array], results)


def _shifts(x_BTR, b_in_R, w_KR, b_R, document_BT, before_BHR=None, before_document_BH=None):
  history, time = w_KR.shape[0] - 1, x_BTR.shape[1]
  z_BTR = (x_BTR.astype(jnp.float32) + b_in_R).astype(x_BTR.dtype)
  if before_BHR is None:
    z_BSR = jnp.pad(z_BTR, ((0, 0), (history, 0), (0, 0)))
  else:
    z_BSR = jnp.concatenate([before_BHR, z_BTR], axis=1)
  y_BTR = z_BTR.astype(jnp.float32) * w_KR[history] + b_R
  for distance in range(1, history + 1):
    same_BT1 = _same(document_BT, distance, before_document_BH)[..., None]
    tap_BTR = jnp.where(same_BT1, z_BSR[:, history - distance :][:, :time], 0)
    y_BTR += tap_BTR.astype(jnp.float32) * w_KR[history - distance]
  return y_BTR.astype(x_BTR.dtype)


def _same(document_BT, distance, before_document_BH=None):
  """Whether the token `distance` before each exists and belongs to the same document."""
  time = document_BT.shape[1]
  if before_document_BH is None:
    same_BT = document_BT[:, distance:] == document_BT[:, : max(0, time - distance)]
    return jnp.pad(same_BT, ((0, 0), (min(distance, time), 0)))
  document_BS = jnp.concatenate([before_document_BH, document_BT], axis=1)
  first = before_document_BH.shape[1] - distance
  return document_BS[:, first : first + time] == document_BT


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _fused(implementation, x_BTR, b_in_R, w_KR, b_R, document_BT):
  y_BTR = _forward(implementation, x_BTR, b_in_R, w_KR, b_R, document_BT)
  return y_BTR, y_BTR


def _forward(implementation, x_BTR, b_in_R, w_KR, b_R, document_BT):
  same = _all_same(document_BT, w_KR)
  return _FUSED[implementation].forward(x_BTR, b_in_R, w_KR, b_R, same)


def _fused_forward(implementation, x_BTR, b_in_R, w_KR, b_R, document_BT):
  y_BTR = _forward(implementation, x_BTR, b_in_R, w_KR, b_R, document_BT)
  # Named, so that a remat policy can keep it instead of computing it again.
  y_BTR = checkpoint_name(y_BTR, "conv")
  return (y_BTR, y_BTR), (x_BTR, b_in_R, w_KR, document_BT)


def _fused_backward(implementation, kept, cotangents):
  x_BTR, b_in_R, w_KR, document_BT = kept
  same = _all_same(document_BT, w_KR)
  return *_FUSED[implementation].backward(x_BTR, b_in_R, w_KR, same, *cotangents), None


def _all_same(document_BT, w_KR):
  return [_same(document_BT, distance) for distance in range(1, w_KR.shape[0])]


_fused.defvjp(_fused_forward, _fused_backward)
