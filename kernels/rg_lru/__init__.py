"""The RG-LRU (arXiv:2402.19427, eqs. 1 to 4), from its gates' pre-activations to its states.

  y_BTR, hT_BR = rg_lru(x_BTR, r_BTR, i_BTR, decay_R, is_start_BT, h0_BR, implementation="auto")

With x, r and i of token t (r and i as they enter the sigmoid, [batch, time, R] like x):

  r_t = sigmoid(r)      i_t = sigmoid(i)
  a_t = exp(-8 softplus(decay) r_t)
  h_t = a_t h_{t-1} + sqrt(1 - a_t^2) (i_t x_t)

`decay` is minus the paper's Lambda. Where `is_start`, a_t is 0 and the square root 1: the state is
reset and the first token enters whole. y_t = h_t in the dtype of x; gates, decay and state are
float32, as are h0 and the last state hT. The square root's derivative is at most 1000.

An implementation with the name of one of kernels/linear_scan computes a_t and the recurrence's
input in plain JAX, and runs that scan. The input, and its gradient, are rounded to the dtype of x
on the way. A fused one does everything in one pass over x, r and i, which it takes in the dtype of
x, and rounds nothing in between. It consists of two functions (all arrays as above; ddecay and dh0
are float32), which the one custom gradient here combines:

  forward(x, r, i, decay, is_start, h0) -> (y_BTR, hT_BR)
  backward(x, r, i, decay, is_start, h0, y, dy_BTR, dhT_BR) -> (dx, dr, di, ddecay_R, dh0_BR)

Inside jax.shard_map with the time of every row split over the mesh axis `axis_name`, x, r, i and
is_start are a shard's own tokens; h0 and hT are the row's, and shards send the same as in
kernels/linear_scan. A fused backend then runs twice in each direction: once for the shard's effect
on the state (forward: hT from zero; backward: dh0 for a dhT of zero), once from the right state.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple, cast

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from kernels import dispatch, linear_scan, shapes
from kernels.linear_scan import sequence_parallel
from kernels.rg_lru import gates, pallas_gpu, pallas_tpu
from kernels.varying import varying_alike


class Fused(NamedTuple):
  """A backend with one pass from pre-activations to states, and one for all gradients."""

  forward: Callable[..., tuple[jax.Array, jax.Array]]
  backward: Callable[..., tuple[jax.Array, jax.Array, jax.Array, jax.Array, jax.Array]]


_FUSED = {
  "pallas_tpu": Fused(pallas_tpu.forward, pallas_tpu.backward),
  "pallas_gpu": Fused(pallas_gpu.forward, pallas_gpu.backward),
}
IMPLEMENTATIONS = tuple(dict.fromkeys((*linear_scan.IMPLEMENTATIONS, *_FUSED)))
# gpu: the fastest by far on an H100 (docs/h100_rg_lru.jsonl). tpu: by the bytes that it moves
# (pallas_tpu.py), not measured.
_DEFAULTS = {"cpu": "reference", "tpu": "pallas_tpu", "gpu": "pallas_gpu"}


def resolve(requested: str) -> str:
  """The implementation that `requested` stands for on this platform; see kernels/dispatch.py."""
  defaults = dispatch.gpu_defaults(_DEFAULTS, otherwise="chunked")
  return dispatch.resolve("rg_lru", requested, available=IMPLEMENTATIONS, defaults=defaults)


def tracks_varying(implementation: str) -> bool:
  """Whether jax.shard_map can check over which axes its arrays vary (check_vma)."""
  return implementation != "pallas_gpu"


def rg_lru(
  x_BTR: jax.Array,
  r_BTR: jax.Array,
  i_BTR: jax.Array,
  decay_R: jax.Array,
  is_start_BT: jax.Array,
  h0_BR: jax.Array,
  *,
  implementation: str,
  axis_name: str | tuple[str, ...] | None = None,
) -> tuple[jax.Array, jax.Array]:
  """All states (in x's dtype) and the last one (float32) of the recurrence; see the module."""
  if x_BTR.ndim != 3 or not x_BTR.shape[1]:
    raise ValueError(
      f"rg_lru: x {x_BTR.shape} must be [batch, time, width], with at least one token"
    )
  batch, time, width = x_BTR.shape
  expected = {
    "r": (r_BTR.shape, (batch, time, width)),
    "i": (i_BTR.shape, (batch, time, width)),
    "decay": (decay_R.shape, (width,)),
    "is_start": (is_start_BT.shape, (batch, time)),
    "h0": (h0_BR.shape, (batch, width)),
  }
  shapes.check("rg_lru", f"x {x_BTR.shape}", expected)
  implementation = resolve(implementation)
  if implementation in _FUSED:
    # The gates' product rounds its results before writing: no float32 activation is in memory.
    r_BTR, i_BTR = r_BTR.astype(x_BTR.dtype), i_BTR.astype(x_BTR.dtype)
    arrays = varying_alike(
      x_BTR, r_BTR, i_BTR, decay_R.astype(jnp.float32), is_start_BT, h0_BR.astype(jnp.float32)
    )
    with jax.named_scope("scan"):
      results = _fused(implementation, axis_name, *arrays)
    y_BTR, hT_BR = cast(tuple[jax.Array, jax.Array], results)
    return y_BTR, hT_BR
  with jax.named_scope("gates"):
    in_BTR, a_BTR = gates.gated_input(x_BTR, r_BTR, i_BTR, decay_R, is_start_BT)
  with jax.named_scope("scan"):
    return linear_scan.linear_scan(
      in_BTR, a_BTR, h0_BR, implementation=implementation, axis_name=axis_name
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _fused(implementation, axis_name, *arrays):
  y_BTR, hT_BR, _ = _run(implementation, axis_name, *arrays)
  return y_BTR, hT_BR


def _run(implementation, axis_name, x_BTR, r_BTR, i_BTR, decay_R, is_start_BT, h0_BR):
  """All states, the row's last one, and the one before the tokens given."""
  forward = _FUSED[implementation].forward
  inputs = (x_BTR, r_BTR, i_BTR, decay_R, is_start_BT)
  if axis_name is None:
    return *forward(*inputs, h0_BR), h0_BR
  along = {"reverse": False, "axis_name": axis_name}
  _, last_BR = forward(*inputs, sequence_parallel.start_of_shard(h0_BR, **along))
  product_BR = gates.product_of_decays(r_BTR, decay_R, is_start_BT)
  before_BR, hT_BR = sequence_parallel.joined(last_BR, product_BR, h0_BR, **along)
  y_BTR, _ = forward(*inputs, before_BR)
  return y_BTR, hT_BR, before_BR


def _fused_forward(implementation, axis_name, *arrays):
  y_BTR, hT_BR, before_BR = _run(implementation, axis_name, *arrays)
  # Named, so that a remat policy can keep the states instead of running the recurrence again.
  y_BTR = checkpoint_name(y_BTR, "scan")
  if axis_name is not None:
    before_BR = checkpoint_name(before_BR, "scan")
  return (y_BTR, hT_BR), (*arrays[:-1], before_BR, y_BTR)


def _fused_backward(implementation, axis_name, residuals, cotangents):
  backward, (dy_BTR, dhT_BR) = _FUSED[implementation].backward, cotangents
  if axis_name is not None:
    # The gradient runs backward along the row: the gradient of a shard's last state comes from the
    # shards after it, as the state before its first token came from the shards before.
    _, r_BTR, _, decay_R, is_start_BT, _, _ = residuals
    along = {"reverse": True, "axis_name": axis_name}
    dhT_BR = jax.lax.psum(dhT_BR, axis_name)
    start_BR = sequence_parallel.start_of_shard(dhT_BR, **along)
    *_, dbefore_BR = backward(*residuals, dy_BTR, start_BR)
    product_BR = gates.product_of_decays(r_BTR, decay_R, is_start_BT)
    dhT_BR, _ = sequence_parallel.joined(dbefore_BR, product_BR, dhT_BR, **along)
  dx_BTR, dr_BTR, di_BTR, ddecay_R, dh0_BR = backward(*residuals, dy_BTR, dhT_BR)
  if axis_name is not None:
    starts_row = sequence_parallel.is_first(reverse=False, axis_name=axis_name)
    dh0_BR = jnp.where(starts_row, dh0_BR, 0.0)
  return dx_BTR, dr_BTR, di_BTR, ddecay_R, None, dh0_BR  # None: of is_start, which is bool


_fused.defvjp(_fused_forward, _fused_backward)
