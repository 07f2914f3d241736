"""The RG-LRU as Triton kernels, for Hopper and Ampere; they have not run on either yet.

Letters of this file: K channels of a program, N chunks of a row. Programs, chunks and loads ahead
are those of kernels/linear_scan/pallas_gpu.py; here the gates' nonlinearities, the decay, the
input's scale and the resets happen between the loads and the state, in float32, and are never
written. The backward pass makes them again, and h_{t-1} it reads from y.

With c_t = a_{t+1} g_{t+1} (the last c is dhT), u_t = scale_t i_t x_t, and z = 1 - a^2:

  g_t = dy_t + c_t    c_{t-1} = a_t g_t    dh0 = c_0
  dlog_a_t = a_t g_t h_{t-1} - 2 a_t^2 g_t i_t x_t / (2 sqrt(z)),   0 where a document starts
  dr_t = -8 softplus(decay) r_t (1 - r_t) dlog_a_t
  ddecay = -8 sigmoid(decay) sum_t r_t dlog_a_t, summed over the rows outside the kernel

Bytes per element, for activations of 2 bytes; "plain" is the least that gates.py and a scan in XLA
move, with their float32 r, i, a and gradients of these:

                                      one pass   chunks (batch 1)   plain
  forward     x r i -> y                     8                 14      24
  backward    x r i y dy -> dx dr di        16                 20      42

No product of decays and no float32 copy of an activation is written; the summaries of chunks and
the partial sums of ddecay are [rows, chunks, R].

What is known without a GPU (2026-11-25, jax 0.10.2, compiled ahead of time for H100 and A100 by
ptxas 13.5): 142 registers forward and 137 backward for sm_90a, nothing spilled; a step is about 80
machine instructions forward and 130 backward. At [8, 2048, 2560] on an H100 at copy bandwidth a
warp has 83 and 166 cycles for them, one warp to a scheduler: memory binds, if narrowly.
`python -m kernels.rg_lru.measure 8,2048,2560 1,65536,2560` on a GPU settles it.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax.experimental.pallas import triton as plgpu

from kernels.linear_scan.pallas_gpu import (
  CHANNELS,
  Channels,
  Tiles,
  is_last_chunk,
  join,
  keep,
  launch,
  walk,
)
from kernels.rg_lru.gates import LEAST_ONE_MINUS_A2, C

# Steps whose loads are issued together: three arrays are read forward, five backward, and two
# groups of a thread's loads have to fit its 255 registers.
_FORWARD_STEPS = 16
_BACKWARD_STEPS = 8
_LOG2_E = math.log2(math.e)


def forward(
  x_BTR: jax.Array,
  r_BTR: jax.Array,
  i_BTR: jax.Array,
  decay_R: jax.Array,
  is_start_BT: jax.Array,
  h0_BR: jax.Array,
) -> tuple[jax.Array, jax.Array]:
  """All states (in x's dtype) and the last one (float32), as kernels/rg_lru says."""
  tiles = Tiles.of(x_BTR.shape, steps=_FORWARD_STEPS)
  run = functools.partial(launch, tiles=tiles, reverse=False)
  inputs = (x_BTR, r_BTR, i_BTR, decay_R.astype(jnp.float32), is_start_BT.astype(jnp.int8))
  summaries = ()
  if tiles.num_chunks > 1:
    summaries = run(
      _summarise_forward, inputs, (tiles.summary, tiles.summary), name="rg_lru_forward_summaries"
    )
  y = jax.ShapeDtypeStruct(x_BTR.shape, x_BTR.dtype)
  y_BTR, hT_BR = run(
    _forward, (*inputs, h0_BR, *summaries), (y, tiles.state), name="rg_lru_forward"
  )
  return y_BTR, hT_BR


def backward(
  x_BTR: jax.Array,
  r_BTR: jax.Array,
  i_BTR: jax.Array,
  decay_R: jax.Array,
  is_start_BT: jax.Array,
  h0_BR: jax.Array,
  y_BTR: jax.Array,
  dy_BTR: jax.Array,
  dhT_BR: jax.Array,
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array, jax.Array]:
  """The gradients of x, r and i (in their dtypes), and of decay and h0 (float32)."""
  tiles = Tiles.of(x_BTR.shape, steps=_BACKWARD_STEPS)
  run = functools.partial(launch, tiles=tiles, reverse=True)
  decay_R, is_start_BT = decay_R.astype(jnp.float32), is_start_BT.astype(jnp.int8)
  summaries = ()
  if tiles.num_chunks > 1:
    summaries = run(
      _summarise_backward,
      (r_BTR, dy_BTR, decay_R, is_start_BT),
      (tiles.summary, tiles.summary),
      name="rg_lru_backward_summaries",
    )
  gradients = (jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (x_BTR, r_BTR, i_BTR))
  dx_BTR, dr_BTR, di_BTR, sum_BNR, dh0_BR = run(
    _backward,
    (x_BTR, r_BTR, i_BTR, decay_R, is_start_BT, h0_BR, y_BTR, dy_BTR, dhT_BR, *summaries),
    (*gradients, tiles.summary, tiles.state),
    name="rg_lru_backward",
  )
  ddecay_R = -C * jax.nn.sigmoid(decay_R) * jnp.sum(sum_BNR, axis=(0, 1))
  return dx_BTR, dr_BTR, di_BTR, ddecay_R, dh0_BR


def _rate(decay_ref, channels):
  """-8 softplus(decay) [K]: log a where the recurrence gate is 1."""
  decay_K = plgpu.load(decay_ref.at[channels.columns], mask=channels.is_real_K, other=0.0)
  return -C * (jnp.maximum(decay_K, 0.0) + jnp.log1p(jnp.exp(-jnp.abs(decay_K))))


def _sigmoid(x_K):
  # exp2 and rsqrt are one instruction each; exp takes eight, a division as many.
  root_K = jax.lax.rsqrt(1.0 + jnp.exp2(-_LOG2_E * x_K))
  return root_K * root_K


def _decay(r_K, rate_K, is_start):
  """The recurrence gate, the decay a, and z = 1 - a^2 (without cancellation: gates.py)."""
  gate_K = _sigmoid(r_K)
  e_K = jnp.expm1(rate_K * gate_K)
  return gate_K, jnp.where(is_start, 0.0, 1.0 + e_K), -e_K * (2.0 + e_K)


def _loader(refs, is_start_ref, channels):
  """Loads one step: the channels of each array, and whether a document starts."""

  def load(t, is_inside):
    is_start = plgpu.load(is_start_ref.at[channels.row, t], mask=is_inside) != 0
    return *channels.load_steps(refs, t, is_inside), is_start

  return load


def _forward_step(values, rate_K):
  """What enters the state, and the decay that the state meets."""
  x_K, r_K, i_K, is_start = values
  _, a_K, z_K = _decay(r_K, rate_K, is_start)
  scale_K = jnp.where(is_start, 1.0, jnp.sqrt(z_K))
  return scale_K * _sigmoid(i_K) * x_K, a_K


def _summarise_forward(
  x_ref, r_ref, i_ref, decay_ref, is_start_ref, product_ref, last_ref, *, tiles, reverse
):
  channels = Channels.of(tiles)
  rate_K = _rate(decay_ref, channels)

  def step(_, is_inside, values, carry):
    product_K, h_K = carry
    in_K, a_K = _forward_step(values, rate_K)
    return keep(is_inside, (a_K * product_K, a_K * h_K + in_K), carry)

  zeros_K = jnp.zeros((CHANNELS,), jnp.float32)
  load = _loader((x_ref, r_ref, i_ref), is_start_ref, channels)
  summary = walk(load, step, (zeros_K + 1.0, zeros_K), tiles, reverse=reverse)
  channels.store_summary((product_ref, last_ref), summary)


def _forward(x_ref, r_ref, i_ref, decay_ref, is_start_ref, h0_ref, *refs, tiles, reverse):
  *summary_refs, y_ref, hT_ref = refs
  channels = Channels.of(tiles)
  rate_K = _rate(decay_ref, channels)

  def step(t, is_inside, values, h_K):
    in_K, a_K = _forward_step(values, rate_K)
    (h_K,) = keep(is_inside, (a_K * h_K + in_K,), (h_K,))
    channels.store(y_ref, t, is_inside, h_K)
    return h_K

  h_K = channels.load_state(h0_ref)
  if summary_refs:
    h_K = join(summary_refs, h_K, channels, tiles, reverse=reverse)
  load = _loader((x_ref, r_ref, i_ref), is_start_ref, channels)
  h_K = walk(load, step, h_K, tiles, reverse=reverse)
  channels.store_state(hT_ref, h_K, is_last_chunk(tiles, reverse=reverse))


def _summarise_backward(
  r_ref, dy_ref, decay_ref, is_start_ref, product_ref, last_ref, *, tiles, reverse
):
  channels = Channels.of(tiles)
  rate_K = _rate(decay_ref, channels)

  def step(_, is_inside, values, carry):
    r_K, dy_K, is_start = values
    product_K, c_K = carry
    _, a_K, _ = _decay(r_K, rate_K, is_start)
    return keep(is_inside, (a_K * product_K, a_K * (dy_K + c_K)), carry)

  zeros_K = jnp.zeros((CHANNELS,), jnp.float32)
  load = _loader((r_ref, dy_ref), is_start_ref, channels)
  summary = walk(load, step, (zeros_K + 1.0, zeros_K), tiles, reverse=reverse)
  channels.store_summary((product_ref, last_ref), summary)


def _backward(
  x_ref, r_ref, i_ref, decay_ref, is_start_ref, h0_ref, y_ref, dy_ref, dhT_ref, *refs, tiles,
  reverse,
):  # fmt: skip
  *summary_refs, dx_ref, dr_ref, di_ref, sum_ref, dh0_ref = refs
  channels = Channels.of(tiles)
  rate_K, h0_K = _rate(decay_ref, channels), channels.load_state(h0_ref)
  load_most = _loader((x_ref, r_ref, i_ref, dy_ref), is_start_ref, channels)

  def load(t, is_inside):
    has_before = is_inside & (t > 0)
    before_K = channels.load(y_ref, jnp.maximum(t - 1, 0), has_before)
    return load_most(t, is_inside), before_K

  def step(t, is_inside, values, carry):
    (x_K, r_K, i_K, dy_K, is_start), before_K = values
    c_K, sum_K = carry
    before_K = jnp.where(t > 0, before_K, h0_K)
    gate_K, a_K, z_K = _decay(r_K, rate_K, is_start)
    open_K = _sigmoid(i_K)
    scale_K = jnp.where(is_start, 1.0, jnp.sqrt(z_K))
    g_K = dy_K + c_K
    slope_K = 0.5 * jax.lax.rsqrt(jnp.maximum(z_K, LEAST_ONE_MINUS_A2))
    dz_K = g_K * open_K * x_K * slope_K
    # a is 0 at a start, and so is all of this.
    dlog_a_K = a_K * (g_K * before_K - 2.0 * a_K * dz_K)
    dopen_K = g_K * scale_K * x_K
    channels.store(dx_ref, t, is_inside, g_K * scale_K * open_K)
    channels.store(dr_ref, t, is_inside, dlog_a_K * rate_K * gate_K * (1.0 - gate_K))
    channels.store(di_ref, t, is_inside, dopen_K * open_K * (1.0 - open_K))
    return keep(is_inside, (a_K * g_K, sum_K + gate_K * dlog_a_K), carry)

  c_K = channels.load_state(dhT_ref)
  if summary_refs:
    c_K = join(summary_refs, c_K, channels, tiles, reverse=reverse)
  c_K, sum_K = walk(load, step, (c_K, jnp.zeros_like(c_K)), tiles, reverse=reverse)
  channels.store_summary((sum_ref,), (sum_K,))
  channels.store_state(dh0_ref, c_K, is_last_chunk(tiles, reverse=reverse))
