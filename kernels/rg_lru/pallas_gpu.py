"""The RG-LRU as Triton kernels, for Hopper and Ampere.

Letters of this file: K channels of a program, N chunks of a row, S parts of a chunk. Chunks, and
the way in which the state moves along a row, are those of kernels/linear_scan/pallas_gpu.py. Here
the gates' nonlinearities, the decay, the input's scale and the resets are computed between the
loads and the state, in float32, and never written. The backward pass recomputes them, and reads
h_{t-1} from y.

With c_t = a_{t+1} g_{t+1} (the last c is dhT), u_t = scale_t i_t x_t, and z = 1 - a^2:

  g_t = dy_t + c_t    c_{t-1} = a_t g_t    dh0 = c_0
  dlog_a_t = a_t g_t h_{t-1} - 2 a_t^2 g_t i_t x_t / (2 sqrt(z)),   0 where a document starts
  dr_t = -8 softplus(decay) r_t (1 - r_t) dlog_a_t
  ddecay = -8 sigmoid(decay) sum_t r_t dlog_a_t, summed over chunks and rows outside the kernel

The backward recurrence needs only r and dy: they are read first. r is read again with the other
arrays, and is in the cache by then.

Bytes per element, for activations of 2 bytes; "plain" is the least that gates.py and a scan in XLA
move, with their float32 r, i, a and the gradients of these:

                                      kernel   plain
  forward     x r i -> y                   8      24
  backward    x r i y dy -> dx dr di      16      42

No product of decays and no float32 copy of an activation is written. What programs exchange, and
the partial sums of ddecay, are [rows, chunks, R]: another 0.4 bytes forward and 0.8 backward.

On an H100 (docs/h100_rg_lru.jsonl, docs/benchmarks.md), in bfloat16: 0.148 ms forward and 0.458
with backward at [8, 2048, 2560], 0.562 and 1.790 ms at [1, 65536, 2560]: 0.87, 0.84, 0.87 and 0.82
of the speed of a copy.
"""

import jax
import jax.numpy as jnp

from kernels.gpu_math import LOG2_E
from kernels.linear_scan.pallas_gpu import LocalStates, Tiles, launch
from kernels.rg_lru.gates import LEAST_ONE_MINUS_A2, C
from kernels.triton_call import shape_of

# Tokens of a chunk, and its parts, one for each warp: forward, where states stay in registers, and
# backward, where they do not, and where arrays that are read twice stay in the cache.
_STEPS, _WARPS = 64, 4
_BACKWARD_STEPS, _BACKWARD_WARPS = 32, 1
# 1 - exp(y) by its series above this: the difference itself would lose digits.
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
  tiles = Tiles.of(x_BTR.shape, steps=_STEPS, warps=_WARPS)
  y = shape_of(x_BTR)
  y_BTR, hT_BR = launch(
    _forward,
    (x_BTR, r_BTR, i_BTR, _rate(decay_R), tiles.packed(is_start_BT, reverse=False)),
    (y, tiles.state),
    first_BD=h0_BR,
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
  tiles = Tiles.of(x_BTR.shape, steps=_BACKWARD_STEPS, warps=_BACKWARD_WARPS)
  starts_BN = tiles.packed(is_start_BT, reverse=True)
  gradients = map(shape_of, (x_BTR, r_BTR, i_BTR))
  dx_BTR, dr_BTR, di_BTR, sum_BNR, dh0_BR = launch(
    _backward,
    (x_BTR, r_BTR, i_BTR, _rate(decay_R), starts_BN, h0_BR, y_BTR, dy_BTR),
    (*gradients, tiles.summary, tiles.state),
    first_BD=dhT_BR,
    tiles=tiles,
    reverse=True,
    name="rg_lru_backward",
  )
  ddecay_R = -C * jax.nn.sigmoid(decay_R.astype(jnp.float32)) * jnp.sum(sum_BNR, axis=(0, 1))
  return dx_BTR, dr_BTR, di_BTR, ddecay_R, dh0_BR


def _rate(decay_R: jax.Array) -> jax.Array:
  """log2 of the decay a where the recurrence gate is 1."""
  return -C * LOG2_E * jax.nn.softplus(decay_R.astype(jnp.float32))


# Lists hold steps side by side: each line is one instruction, or a few, for every step.


def _sigmoid(x: list, math) -> list:
  powers = [math.exp2(-LOG2_E * x_SK) for x_SK in x]
  return [math.reciprocal(1.0 + power_SK) for power_SK in powers]


def _decay(r: list, rate_SK, is_start: list, math) -> tuple[list, list, list]:
  """The recurrence gate, log2 of the decay, and the decay, which is 0 at a start."""
  gates = _sigmoid(r, math)
  log2s = [jnp.where(start, _FORGOTTEN, rate_SK * gate) for start, gate in zip(is_start, gates)]
  return gates, log2s, [math.exp2(log2_SK) for log2_SK in log2s]


def _one_minus_square(log2s: list, a: list, math) -> list:
  """1 - a^2 without cancellation; 1 at a start."""
  y = [(2.0 / LOG2_E) * log2_SK for log2_SK in log2s]
  # -y (1 + y/2 + y^2/6 + y^3/24)
  series = [math.fma(y_SK, -1.0 / 24.0, -1.0 / 6.0) for y_SK in y]
  for factor in (-0.5, -1.0):
    series = [math.fma(y_SK, series_SK, factor) for y_SK, series_SK in zip(y, series)]
  differences = [math.fma(-a_SK, a_SK, 1.0) for a_SK in a]
  return [
    jnp.where(y_SK > _SERIES, y_SK * series_SK, difference_SK)
    for y_SK, series_SK, difference_SK in zip(y, series, differences)
  ]


def _forward(chunk, x_ref, r_ref, i_ref, rate_ref, starts_ref, y_ref, hT_ref):
  math, rate_SK = chunk.math, chunk.load_channels(rate_ref)

  def load(times):
    return *chunk.load_all((x_ref, r_ref, i_ref), times), chunk.load_flags(starts_ref, times)

  states = LocalStates.none(chunk.zeros())
  for times, (x, r, i, is_start) in chunk.groups(load):
    _, log2s, a = _decay(r, rate_SK, is_start, math)
    scales = [math.sqrt(z_SK) for z_SK in _one_minus_square(log2s, a, math)]
    opens = _sigmoid(i, math)
    inputs = [scale_SK * open_SK * x_SK for scale_SK, open_SK, x_SK in zip(scales, opens, x)]
    states.extend(chunk.keep(times, a, inputs), math)
  chunk.store_states(states, y_ref, hT_ref)


def _backward(
  chunk, x_ref, r_ref, i_ref, rate_ref, starts_ref, h0_ref, y_ref, dy_ref,
  dx_ref, dr_ref, di_ref, sum_ref, dh0_ref,
):  # fmt: skip
  math, rate_SK = chunk.math, chunk.load_channels(rate_ref)
  h0_SK, zeros_SK = chunk.load_state(h0_ref), chunk.zeros()

  def load_few(times):
    return *chunk.load_all((r_ref, dy_ref), times), chunk.load_flags(starts_ref, times)

  def summarise(times, loaded, carry):
    r, dy, is_start = loaded
    product_SK, c_SK = carry
    _, _, a = _decay(r, rate_SK, is_start, math)
    for a_SK, in_SK in zip(*chunk.keep(times, a, [a_SK * dy_SK for a_SK, dy_SK in zip(a, dy)])):
      product_SK, c_SK = a_SK * product_SK, math.fma(a_SK, c_SK, in_SK)
    return product_SK, c_SK

  summary = chunk.walk(load_few, summarise, (zeros_SK + 1.0, zeros_SK))
  c_SK, behind_SK = chunk.join(*summary)
  chunk.store_last(dh0_ref, behind_SK)

  def load_all(times):
    arrays = chunk.load_all((x_ref, r_ref, i_ref, dy_ref), times)
    before = [jnp.where(t > 0, chunk.load(y_ref, jnp.maximum(t - 1, 0)), h0_SK) for t in times]
    return *arrays, before, chunk.load_flags(starts_ref, times)

  def differentiate(times, loaded, carry):
    x, r, i, dy, before, is_start = loaded
    c_SK, sum_SK = carry
    gates, log2s, a = _decay(r, rate_SK, is_start, math)
    z = _one_minus_square(log2s, a, math)
    opens = _sigmoid(i, math)
    g = []
    for a_SK, dy_SK in zip(chunk.keep(times, a, a)[0], dy):
      g.append(dy_SK + c_SK)
      c_SK = a_SK * g[-1]
    scaled_g = [g_SK * math.sqrt(z_SK) for g_SK, z_SK in zip(g, z)]
    dx = [g_SK * open_SK for g_SK, open_SK in zip(scaled_g, opens)]
    di = [dx_SK * x_SK * (1.0 - open_SK) for dx_SK, x_SK, open_SK in zip(dx, x, opens)]
    # 2 dz
    slopes = [math.rsqrt(jnp.maximum(z_SK, LEAST_ONE_MINUS_A2)) for z_SK in z]
    dz = [
      g_SK * open_SK * x_SK * slope_SK for g_SK, open_SK, x_SK, slope_SK in zip(g, opens, x, slopes)
    ]
    # At a start a is 0, and so are all of these.
    flows = [
      math.fma(-a_SK, dz_SK, g_SK * h_SK) for a_SK, g_SK, h_SK, dz_SK in zip(a, g, before, dz)
    ]
    dlog_a = [a_SK * flow_SK for a_SK, flow_SK in zip(a, flows)]
    gated = [gate_SK * dlog_a_SK for gate_SK, dlog_a_SK in zip(gates, dlog_a)]
    dr = [
      gated_SK * (1.0 - gate_SK) * (rate_SK / LOG2_E) for gated_SK, gate_SK in zip(gated, gates)
    ]
    for ref, gradients in ((dx_ref, dx), (dr_ref, dr), (di_ref, di)):
      for t, gradient_SK in zip(times, gradients):
        chunk.store(ref, t, gradient_SK)
    for gated_SK in chunk.keep(times, a, gated)[1]:
      sum_SK += gated_SK
    return c_SK, sum_SK

  _, sum_SK = chunk.walk(load_all, differentiate, (c_SK, zeros_SK))
  chunk.store_summary(sum_ref, sum_SK)
