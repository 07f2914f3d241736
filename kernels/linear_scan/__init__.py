"""The linear recurrence h_t = a_t h_{t-1} + x_t, channel by channel.

  y_BTD, hT_BD = linear_scan(x_BTD, a_BTD, h0_BD, implementation="auto")

y_t = h_t in the dtype of x; the carry, a, h0 and the last state hT are float32. `reverse=True` runs
from the last token to the first (h_t = a_t h_{t+1} + x_t, hT is then h at token 0). Decays of
exactly 0 (a document starts) and 1 are exact: nothing divides by a, and no logarithms are summed,
so tokens before a 0 do not change a bit of the results after it.

The gradient is written once, here. With g the gradient that reaches h,

  g_t = dy_t + a_{t+1} g_{t+1},   g_T = dy_T + dhT     the same recurrence, reversed
  dx_t = g_t    da_t = g_t h_{t-1}    dh0 = a_1 g_1

so an implementation is a function `scan(x_BTD, a_BTD, h0_BD, *, reverse)` and nothing more:

  reference     one step at a time (jax.lax.scan): least memory traffic, T dependent steps
  chunked       all chunks of a row at once, then their carries, then all chunks again: about
                3 sqrt(T) dependent steps; x and a are read twice
  associative   a tree (jax.lax.associative_scan): log T dependent steps, several times the traffic
  pallas_tpu    one pass, tile by tile, the carry in VMEM; interpreted (slow) where named on a CPU
  pallas_gpu    one Triton kernel, or two where rows and channels are few; x and a are read once, or
                twice; inside jax.shard_map it needs check_vma=False. Interpreted (slow) where named
                on a CPU

Inside jax.shard_map with the time of every row split over the mesh axis `axis_name`, x and a are a
shard's own tokens, and the results are those of the whole row. h0 is the row's: only that of the
shard where the row begins counts. hT is the row's last state, on every shard. A row of any length
costs one all-gather of [shards, 2, batch, width] float32 forward (sequence_parallel.py). Backward
it costs another one, a decay [batch, width] from the next shard, and the sum of dhT over the
shards. This works with every implementation: it is called twice, on a shard's own tokens.
"""

import functools
from typing import cast

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from kernels import dispatch, halo
from kernels.linear_scan import (
  associative,
  chunked,
  pallas_gpu,
  pallas_tpu,
  reference,
  sequence_parallel,
)
from kernels.varying import varying_alike

_SCANS = {
  "reference": reference.scan,
  "associative": associative.scan,
  "chunked": chunked.scan,
  "pallas_tpu": pallas_tpu.scan,
  "pallas_gpu": pallas_gpu.scan,
}
IMPLEMENTATIONS = tuple(_SCANS)
# cpu: the fastest at every shape of kernels/linear_scan/measured_cpu.jsonl. tpu: not measured by
# us; sequential in one pass beat both jax.lax.scan and associative there (arXiv:2402.19427,
# appendix D). gpu: not timed alone; within an RG-LRU on an H100 associative takes 4 times as long
# as the Triton kernel, chunked 13 to 24 times, one step at a time hundreds
# (docs/h100_rg_lru.jsonl).
_DEFAULTS = {"cpu": "reference", "tpu": "pallas_tpu", "gpu": "pallas_gpu"}


def resolve(requested: str) -> str:
  """The implementation that `requested` stands for on this platform; see kernels/dispatch.py."""
  defaults = dispatch.gpu_defaults(_DEFAULTS, otherwise="chunked")
  return dispatch.resolve("linear_scan", requested, available=IMPLEMENTATIONS, defaults=defaults)


def linear_scan(
  x_BTD: jax.Array,
  a_BTD: jax.Array,
  h0_BD: jax.Array,
  *,
  implementation: str,
  reverse: bool = False,
  axis_name: str | tuple[str, ...] | None = None,
) -> tuple[jax.Array, jax.Array]:
  """All states (in x's dtype) and the last one (float32) of the recurrence; see the module."""
  if x_BTD.ndim != 3 or x_BTD.shape != a_BTD.shape or h0_BD.shape != x_BTD.shape[::2]:
    raise ValueError(
      f"linear_scan: x {x_BTD.shape} and a {a_BTD.shape} must be equal [batch, time, width], and "
      f"h0 {h0_BD.shape} [batch, width]"
    )
  if x_BTD.shape[1] == 0:
    raise ValueError("linear_scan: time is 0; give at least one token")
  arrays = varying_alike(x_BTD, a_BTD, h0_BD.astype(jnp.float32))
  results = _linear_scan(*arrays, resolve(implementation), reverse, axis_name)
  y_BTD, hT_BD = cast(tuple[jax.Array, jax.Array], results)
  return y_BTD, hT_BD


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4, 5))
def _linear_scan(
  x_BTD: jax.Array,
  a_BTD: jax.Array,
  h0_BD: jax.Array,
  implementation: str,
  reverse: bool,
  axis_name: str | tuple[str, ...] | None,
) -> tuple[jax.Array, jax.Array]:
  y_BTD, hT_BD, _ = _run(x_BTD, a_BTD, h0_BD, implementation, reverse, axis_name)
  return y_BTD, hT_BD


def _run(x_BTD, a_BTD, h0_BD, implementation, reverse, axis_name):
  """All states, the row's last one, and the one before the tokens given."""
  scan = _SCANS[implementation]
  if axis_name is None:
    return *scan(x_BTD, a_BTD, h0_BD, reverse=reverse), h0_BD
  before_BD, hT_BD = sequence_parallel.states_between(
    scan, x_BTD, a_BTD, h0_BD, reverse=reverse, axis_name=axis_name
  )
  y_BTD, _ = scan(x_BTD, a_BTD, before_BD, reverse=reverse)
  return y_BTD, hT_BD, before_BD


def _forward(x_BTD, a_BTD, h0_BD, implementation, reverse, axis_name):
  y_BTD, hT_BD, before_BD = _run(x_BTD, a_BTD, h0_BD, implementation, reverse, axis_name)
  # Named, so that a remat policy can keep the states instead of running the recurrence again.
  y_BTD = checkpoint_name(y_BTD, "scan")
  if axis_name is not None:
    before_BD = checkpoint_name(before_BD, "scan")
  return (y_BTD, hT_BD), (y_BTD, a_BTD, before_BD)


def _backward(implementation, reverse, axis_name, residuals, cotangents):
  y_BTD, a_BTD, before_BD = residuals
  dy_BTD, dhT_BD = cotangents
  first = -1 if reverse else 0
  # a_{t+1} of the gradient's recurrence; at the last token 1, so that dhT enters whole.
  edge_BD = jnp.ones_like(a_BTD[:, 0])
  if axis_name is not None:
    edge_BD = halo.from_neighbour(
      a_BTD[:, first], before=reverse, axis_name=axis_name, edge=edge_BD
    )
    dhT_BD = jax.lax.psum(dhT_BD, axis_name)
  next_a_BTD = _shifted(a_BTD, edge_BD, forward=reverse)
  g_BTD, g_BD, _ = _run(dy_BTD, next_a_BTD, dhT_BD, implementation, not reverse, axis_name)
  before_BTD = _shifted(y_BTD.astype(jnp.float32), before_BD, forward=not reverse)
  da_BTD = g_BTD.astype(jnp.float32) * before_BTD
  dh0_BD = a_BTD[:, first].astype(jnp.float32) * g_BD
  if axis_name is not None:
    starts_row = sequence_parallel.is_first(reverse=reverse, axis_name=axis_name)
    dh0_BD = jnp.where(starts_row, dh0_BD, 0.0)
  return g_BTD, da_BTD.astype(a_BTD.dtype), dh0_BD


_linear_scan.defvjp(_forward, _backward)


def _shifted(x_BTD: jax.Array, edge_BD: jax.Array, *, forward: bool) -> jax.Array:
  """x moved by one token, forward (x_{t-1} at t) or backward, with `edge` at the end of the row."""
  parts = [edge_BD[:, None], x_BTD[:, :-1]] if forward else [x_BTD[:, 1:], edge_BD[:, None]]
  return jnp.concatenate(parts, axis=1)
