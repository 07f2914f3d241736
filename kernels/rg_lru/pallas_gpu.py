"""The RG-LRU as Triton kernels, for Hopper and Ampere.

Letters of this file: K channels of a program, N chunks of a row. Chunks, and how the state comes
along a row, are those of kernels/linear_scan/pallas_gpu.py; here the gates' nonlinearities, the
decay, the input's scale and the resets happen between the loads and the state, in float32, and are
never written. The backward pass makes them again, and h_{t-1} it reads from y.

With c_t = a_{t+1} g_{t+1} (the last c is dhT), u_t = scale_t i_t x_t, and z = 1 - a^2:

  g_t = dy_t + c_t    c_{t-1} = a_t g_t    dh0 = c_0
  dlog_a_t = a_t g_t h_{t-1} - 2 a_t^2 g_t i_t x_t / (2 sqrt(z)),   0 where a document starts
  dr_t = -8 softplus(decay) r_t (1 - r_t) dlog_a_t
  ddecay = -8 sigmoid(decay) sum_t r_t dlog_a_t, summed over chunks and rows outside the kernel

The recurrence backward needs r and dy alone: they are read first, r once more with the rest, which
by then is in the cache.

Bytes per element, for activations of 2 bytes; "plain" is the least that gates.py and a scan in XLA
move, with their float32 r, i, a and gradients of these:

                                      kernel   plain
  forward     x r i -> y                   8      24
  backward    x r i y dy -> dx dr di      16      42

No product of decays and no float32 copy of an activation is written; what programs tell each other,
and the partial sums of ddecay, are [rows, chunks, R]: another 0.8 bytes each way.

On an H100 (docs/h100_rg_lru.jsonl, docs/benchmarks.md): forward and backward 0.51 ms at [8, 2048,
2560] in bfloat16 and 2.04 ms at [1, 65536, 2560], 0.75 and 0.71 of what a copy of these bytes
takes; forward alone 0.77 ms at the latter, 0.62. That was with chunks of 64 tokens backward: with
32, backward alone is 4 % faster.
"""

import jax
import jax.numpy as jnp

from kernels.gpu_math import LOG2_E
from kernels.linear_scan.pallas_gpu import CHANNELS, STEPS, LocalStates, Tiles, launch
from kernels.rg_lru.gates import LEAST_ONE_MINUS_A2, C
from kernels.triton_call import shape_of

# Tokens of a chunk backward, where no states are kept: what is read twice stays in the cache.
_BACKWARD_STEPS = 32
# 1 - exp(y) by its series from here on: without it the difference loses digits.
_SERIES = -0.125
# 2 to this power is 0.
_FORGOTTEN = -1000.0


def forward(
  x_BTR: jax.Array,
  r_BTR: jax.Array,
  i_BTR: jax.Array,
  decay_R: jax.Array,
  is_start_BT: jax.Array,
  h0_BR: jax.Array,
) -> tuple[jax.Array, jax.Array]:
  """All states (in x's dtype) and the last one (float32), as kernels/rg_lru says."""
  tiles = Tiles.of(x_BTR.shape, steps=STEPS)
  y = shape_of(x_BTR)
  y_BTR, hT_BR = launch(
    _forward,
    (x_BTR, r_BTR, i_BTR, _rate(decay_R), tiles.packed(is_start_BT, reverse=False), h0_BR),
    (y, tiles.state),
    tiles=tiles,
    reverse=False,
    name="rg_lru_forward",
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
  starts_BN = tiles.packed(is_start_BT, reverse=True)
  gradients = map(shape_of, (x_BTR, r_BTR, i_BTR))
  dx_BTR, dr_BTR, di_BTR, sum_BNR, dh0_BR = launch(
    _backward,
    (x_BTR, r_BTR, i_BTR, _rate(decay_R), starts_BN, h0_BR, y_BTR, dy_BTR, dhT_BR),
    (*gradients, tiles.summary, tiles.state),
    tiles=tiles,
    reverse=True,
    name="rg_lru_backward",
  )
  ddecay_R = -C * jax.nn.sigmoid(decay_R.astype(jnp.float32)) * jnp.sum(sum_BNR, axis=(0, 1))
  return dx_BTR, dr_BTR, di_BTR, ddecay_R, dh0_BR


def _rate(decay_R: jax.Array) -> jax.Array:
  """log2 of the decay a where the recurrence gate is 1."""
  return -C * LOG2_E * jax.nn.softplus(decay_R.astype(jnp.float32))


# Lists are of steps side by side: each line is one instruction, or a few, of every step.


def _sigmoid(x: list, math) -> list:
  powers = [math.exp2(-LOG2_E * x_K) for x_K in x]
  return [math.reciprocal(1.0 + power_K) for power_K in powers]


def _decay(r: list, rate_K, is_start: list, math) -> tuple[list, list, list]:
  """The recurrence gate; log2 of the decay, and the decay, which a start makes 0."""
  gates = _sigmoid(r, math)
  log2s = [jnp.where(start, _FORGOTTEN, rate_K * gate) for start, gate in zip(is_start, gates)]
  return gates, log2s, [math.exp2(log2_K) for log2_K in log2s]


def _one_minus_square(log2s: list, a: list, math) -> list:
  """1 - a^2 without cancellation; 1 at a start."""
  y = [(2.0 / LOG2_E) * log2_K for log2_K in log2s]
  # -y (1 + y/2 + y^2/6 + y^3/24)
  series = [math.fma(y_K, -1.0 / 24.0, -1.0 / 6.0) for y_K in y]
  for factor in (-0.5, -1.0):
    series = [math.fma(y_K, series_K, factor) for y_K, series_K in zip(y, series)]
  differences = [math.fma(-a_K, a_K, 1.0) for a_K in a]
  return [
    jnp.where(y_K > _SERIES, y_K * series_K, difference_K)
    for y_K, series_K, difference_K in zip(y, series, differences)
  ]


def _forward(chunk, x_ref, r_ref, i_ref, rate_ref, starts_ref, h0_ref, y_ref, hT_ref):
  math, rate_K = chunk.math, chunk.load_channels(rate_ref)

  def load(times):
    return *chunk.load_all((x_ref, r_ref, i_ref), times), chunk.load_flags(starts_ref, times)

  states = LocalStates.none()
  for times, (x, r, i, is_start) in chunk.groups(load):
    _, log2s, a = _decay(r, rate_K, is_start, math)
    scales = [math.sqrt(z_K) for z_K in _one_minus_square(log2s, a, math)]
    opens = _sigmoid(i, math)
    inputs = [scale_K * open_K * x_K for scale_K, open_K, x_K in zip(scales, opens, x)]
    states.extend(chunk.keep(times, a, inputs), math)
  chunk.store_states(states, h0_ref, y_ref, hT_ref)


def _backward(
  chunk, x_ref, r_ref, i_ref, rate_ref, starts_ref, h0_ref, y_ref, dy_ref, dhT_ref,
  dx_ref, dr_ref, di_ref, sum_ref, dh0_ref,
):  # fmt: skip
  math, rate_K = chunk.math, chunk.load_channels(rate_ref)
  h0_K, ones_K = chunk.load_state(h0_ref), jnp.ones((CHANNELS,), jnp.float32)

  def load_few(times):
    return *chunk.load_all((r_ref, dy_ref), times), chunk.load_flags(starts_ref, times)

  def summarise(times, loaded, carry):
    r, dy, is_start = loaded
    product_K, c_K = carry
    _, _, a = _decay(r, rate_K, is_start, math)
    for a_K, in_K in zip(*chunk.keep(times, a, [a_K * dy_K for a_K, dy_K in zip(a, dy)])):
      product_K, c_K = a_K * product_K, math.fma(a_K, c_K, in_K)
    return product_K, c_K

  summary = chunk.walk(load_few, summarise, (ones_K, jnp.zeros_like(ones_K)))
  c_K, behind_K = chunk.join(*summary, chunk.load_state(dhT_ref))
  chunk.store_last(dh0_ref, behind_K)

  def load_all(times):
    arrays = chunk.load_all((x_ref, r_ref, i_ref, dy_ref), times)
    before = [jnp.where(t > 0, chunk.load(y_ref, jnp.maximum(t - 1, 0)), h0_K) for t in times]
    return *arrays, before, chunk.load_flags(starts_ref, times)

  def differentiate(times, loaded, carry):
    x, r, i, dy, before, is_start = loaded
    c_K, sum_K = carry
    gates, log2s, a = _decay(r, rate_K, is_start, math)
    z = _one_minus_square(log2s, a, math)
    opens = _sigmoid(i, math)
    g = []
    for a_K, dy_K in zip(chunk.keep(times, a, a)[0], dy):
      g.append(dy_K + c_K)
      c_K = a_K * g[-1]
    scaled_g = [g_K * math.sqrt(z_K) for g_K, z_K in zip(g, z)]
    dx = [g_K * open_K for g_K, open_K in zip(scaled_g, opens)]
    di = [dx_K * x_K * (1.0 - open_K) for dx_K, x_K, open_K in zip(dx, x, opens)]
    # 2 dz
    slopes = [math.rsqrt(jnp.maximum(z_K, LEAST_ONE_MINUS_A2)) for z_K in z]
    dz = [g_K * open_K * x_K * slope_K for g_K, open_K, x_K, slope_K in zip(g, opens, x, slopes)]
    # a is 0 at a start, and so is all of this.
    flows = [math.fma(-a_K, dz_K, g_K * h_K) for a_K, g_K, h_K, dz_K in zip(a, g, before, dz)]
    dlog_a = [a_K * flow_K for a_K, flow_K in zip(a, flows)]
    gated = [gate_K * dlog_a_K for gate_K, dlog_a_K in zip(gates, dlog_a)]
    dr = [gated_K * (1.0 - gate_K) * (rate_K / LOG2_E) for gated_K, gate_K in zip(gated, gates)]
    for ref, gradients in ((dx_ref, dx), (dr_ref, dr), (di_ref, di)):
      for t, gradient_K in zip(times, gradients):
        chunk.store(ref, t, gradient_K)
    for gated_K in chunk.keep(times, a, gated)[1]:
      sum_K += gated_K
    return c_K, sum_K

  _, sum_K = chunk.walk(load_all, differentiate, (c_K, jnp.zeros_like(ones_K)))
  chunk.store_summary(sum_ref, sum_K)
