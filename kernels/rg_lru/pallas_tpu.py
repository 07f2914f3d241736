"""The RG-LRU on TPU: pre-activations to states in one pass, and all gradients in another.

Letters of this file: outside the kernels R is the width of the recurrence, as everywhere. Inside
them R is the ROWS = 16 tokens that are computed at a time, and L the 128 lanes of a block of
channels: x_RL is [16 tokens, 128 channels], and sum_1L one number for each channel.

The grid, the tiles and the recurrence are those of kernels/linear_scan/pallas_tpu.py. Sigmoids,
decay, input scale and resets are computed beside it, in float32, and never leave VMEM.

  forward    reads x, r, i; writes y                       8 bytes per bfloat16 state
  backward   reads x, r, i, y, dy; writes dx, dr, di      16 bytes per bfloat16 state

and 16 tokens of y again for every tile of time. The backward pass recomputes gates and decays from
x, r and i. Without this kernel, gates by XLA and then a scan of bfloat16 x and float32 a move:

  forward    reads x, r, i (float32: 10); writes in, a (6); reads in, a (6); writes y (2)       24
  backward   the gates again (16); reads dy, the shifted a, and writes g (8); reads g, y and writes
             da (8); reads x, r, i, g, da and writes dx, dr, di (26)                            58

With the carry c_t = a_t g_t, where g is the gradient of h, the backward recurrence needs no decay
of another token, so tiles join in the same way as in the forward pass:

  c_t = a_t c_{t+1} + a_t dy_t      c_{T+1} = dhT      dh0 = c_1
  g_t = dy_t + c_{t+1}              dlog_a_t = c_t h_{t-1} - g_t i_t x_t a_t^2 / sqrt(1 - a_t^2)

h_{t-1} is the stored y. Where a document starts, a is 0 and so is dlog_a.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernels.linear_scan import pallas_tpu as rows
from kernels.linear_scan.pallas_tpu import LANES, ROWS, Tiles
from kernels.rg_lru.gates import LEAST_ONE_MINUS_A2, C
from kernels.varying import shaped_alike

# Keeps sqrt(z) = z rsqrt(z) at 0 for z = 0.
_TINY = 1e-30
# Where log2 a is nearer to 0 than this, 1 - exp2 would cancel, and 1 - a is a polynomial: Taylor's
# with its fourth term replaced by the nearest quadratic (Chebyshev), within 3.2e-7 of 1 - a.
_NEAR = 1 / 16 / math.log(2)
_NEAR_1 = -math.log(2) * (1 - (1 / 16) ** 3 / 768)
_NEAR_2 = -(math.log(2) ** 2) * (1 / 2 - 9 / 384 * (1 / 16) ** 2)
_NEAR_3 = -(math.log(2) ** 3) * (1 / 6 - (1 / 16) / 16)


def forward(
  x_BTR: jax.Array,
  r_BTR: jax.Array,
  i_BTR: jax.Array,
  decay_R: jax.Array,
  is_start_BT: jax.Array,
  h0_BR: jax.Array,
  *,
  tile: tuple[int, int] | None = None,
) -> tuple[jax.Array, jax.Array]:
  """All states (in x's dtype) and the last one (float32); kernels/rg_lru has the specification."""
  batch, _, width = x_BTR.shape
  token_bytes = 4 * x_BTR.dtype.itemsize
  tiles = Tiles(x_BTR.shape, tile or rows.tile_of(x_BTR.shape, token_bytes), reverse=False)

  def call(interpret: bool, *arrays: jax.Array):
    return pl.pallas_call(
      functools.partial(_forward_kernel, tiles=tiles),
      grid=tiles.grid,
      in_specs=[tiles.token_row(), *[tiles.tokens()] * 3, tiles.channel_row(), tiles.edge()],
      out_specs=[tiles.tokens(), tiles.edge()],
      out_shape=[
        shaped_alike(x_BTR.shape, x_BTR.dtype, x_BTR),
        shaped_alike((batch, 1, width), jnp.float32, x_BTR),
      ],
      scratch_shapes=[_starts(tiles), tiles.carry(), *tiles.columns(3)],
      compiler_params=rows.COMPILER_PARAMS,
      interpret=interpret,
      name="rg_lru_forward",
    )(*arrays)

  y_BTR, hT_B1R = rows.on_tpu_or_interpreted(
    call, _over_lanes(is_start_BT), x_BTR, r_BTR, i_BTR, _half_log2_a(decay_R), h0_BR[:, None]
  )
  return y_BTR, hT_B1R[:, 0]


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
  *,
  tile: tuple[int, int] | None = None,
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array, jax.Array]:
  """Gradients of x, r, i (in x's dtype), decay and h0 (float32)."""
  batch, _, width = x_BTR.shape
  token_bytes = 8 * x_BTR.dtype.itemsize
  tiles = Tiles(x_BTR.shape, tile or rows.tile_of(x_BTR.shape, token_bytes), reverse=True)
  sums = pltpu.VMEM((tiles.tile_width // LANES * 8, LANES), jnp.float32)

  def call(interpret: bool, *arrays: jax.Array):
    return pl.pallas_call(
      functools.partial(_backward_kernel, tiles=tiles),
      grid=tiles.grid,
      in_specs=[
        tiles.token_row(),
        *[tiles.tokens()] * 5,
        tiles.tokens_before(),
        tiles.channel_row(),
        *[tiles.edge()] * 2,
      ],
      out_specs=[*[tiles.tokens()] * 3, *[tiles.edge()] * 2],
      out_shape=[
        *[shaped_alike(x_BTR.shape, x_BTR.dtype, x_BTR)] * 3,
        *[shaped_alike((batch, 1, width), jnp.float32, x_BTR)] * 2,
      ],
      scratch_shapes=[_starts(tiles), sums, tiles.carry(), *tiles.columns(4)],
      compiler_params=rows.COMPILER_PARAMS,
      interpret=interpret,
      name="rg_lru_backward",
    )(*arrays)

  dx_BTR, dr_BTR, di_BTR, sum_B1R, dh0_B1R = rows.on_tpu_or_interpreted(
    call,
    _over_lanes(is_start_BT),
    *(x_BTR, r_BTR, i_BTR, dy_BTR, y_BTR, y_BTR),
    _half_log2_a(decay_R),
    *(h0_BR[:, None], dhT_BR[:, None]),
  )
  # log a = -8 softplus(decay) sigmoid(r), and the sum is of dlog_a (2 sigmoid(r)).
  ddecay_R = -0.5 * C * jax.nn.sigmoid(decay_R) * jnp.sum(sum_B1R, axis=(0, 1))
  return dx_BTR, dr_BTR, di_BTR, ddecay_R, dh0_B1R[:, 0]


def _over_lanes(is_start_BT: jax.Array) -> jax.Array:
  """[batch, 1, time] float32. As [batch, time, 1] every token would fill 128 lanes of memory."""
  return is_start_BT.astype(jnp.float32)[:, None]


def _half_log2_a(decay_R: jax.Array) -> jax.Array:
  """[1, R]: half of log2 a where the gate is fully open."""
  return (-0.5 * C / math.log(2) * jax.nn.softplus(decay_R))[None]


def _starts(tiles: Tiles):
  return pltpu.VMEM((tiles.row_lanes, LANES), jnp.float32)


def _decay(r_RL, half_log2_a_1L):
  """tanh(r / 2), and a and 1 - a^2 without cancellation; sigmoid(r) = (1 + tanh(r / 2)) / 2."""
  tanh_RL = jnp.tanh(0.5 * r_RL)
  log2_a_RL = half_log2_a_1L * tanh_RL + half_log2_a_1L
  near_RL = log2_a_RL * (_NEAR_1 + log2_a_RL * (_NEAR_2 + log2_a_RL * _NEAR_3))
  one_minus_a_RL = jnp.where(log2_a_RL > -_NEAR, near_RL, 1 - jnp.exp2(log2_a_RL))
  a_RL = 1 - one_minus_a_RL
  return tanh_RL, a_RL, one_minus_a_RL * (1 + a_RL)


def _forward_kernel(
  start_ref,
  x_ref,
  r_ref,
  i_ref,
  half_log2_a_ref,
  h0_ref,
  y_ref,
  hT_ref,
  starts_ref,
  carry_ref,
  *columns,
  tiles: Tiles,
):
  first_token = tiles.first_token()
  rows.lanes_to_rows(start_ref, starts_ref)

  @pl.when(pl.program_id(2) == 0)
  def _():
    rows.channels_to_rows(h0_ref, carry_ref, tiles)

  def rows_of(row, states):
    past_RL = tiles.past(first_token + row)
    start_RL = starts_ref[pl.ds(row, ROWS), :] != 0.0
    states = list(states)
    for group, blocks in enumerate(tiles.groups):
      a_column, in_column, y_column = columns[3 * group : 3 * group + 3]
      for slot, block in enumerate(blocks):
        at = (0, pl.ds(row, ROWS), rows.lanes(block))
        x_RL, r_RL, i_RL = (ref[at].astype(jnp.float32) for ref in (x_ref, r_ref, i_ref))
        _, a_RL, one_minus_a2_RL = _decay(r_RL, half_log2_a_ref[:, rows.lanes(block)])
        rsqrt_RL = jax.lax.rsqrt(jnp.maximum(one_minus_a2_RL, _TINY))
        scale_RL = jnp.where(start_RL, 1.0, one_minus_a2_RL * rsqrt_RL)
        in_RL = scale_RL * ((0.5 * jnp.tanh(0.5 * i_RL) + 0.5) * x_RL)
        a_RL = jnp.where(start_RL, 0.0, a_RL)
        rows.write_rows(a_column, slot, tiles.unless(past_RL, a_RL, 1.0))
        rows.write_rows(in_column, slot, tiles.unless(past_RL, in_RL, 0.0))
      states[group] = rows.recur(a_column, in_column, y_column, states[group], reverse=False)
      for slot, block in enumerate(blocks):
        y_RL = rows.read_rows(y_column, slot)
        y_ref[0, pl.ds(row, ROWS), rows.lanes(block)] = y_RL.astype(y_ref.dtype)
    return tuple(states)

  tiles.for_rows(first_token, rows_of, carry_ref)

  @pl.when(pl.program_id(2) == pl.num_programs(2) - 1)
  def _():
    rows.rows_to_channels(carry_ref, hT_ref, tiles)


def _backward_kernel(
  start_ref,
  x_ref,
  r_ref,
  i_ref,
  dy_ref,
  y_ref,
  y_before_ref,
  half_log2_a_ref,
  h0_ref,
  dhT_ref,
  dx_ref,
  dr_ref,
  di_ref,
  sum_ref,
  dh0_ref,
  starts_ref,
  sums_ref,
  carry_ref,
  *columns,
  tiles: Tiles,
):
  first_token = tiles.first_token()
  rows.lanes_to_rows(start_ref, starts_ref)

  @pl.when(pl.program_id(2) == 0)
  def _():
    rows.channels_to_rows(dhT_ref, carry_ref, tiles)
    sums_ref[...] = jnp.zeros(sums_ref.shape, jnp.float32)

  def state_before(row, block):
    """The state before the token of the tile's row `row`: [1, LANES]."""
    at = (0, pl.ds(pl.multiple_of(jnp.maximum(row - ROWS, 0), ROWS), ROWS), rows.lanes(block))
    in_tile_1L = y_ref[at].astype(jnp.float32)[-1:]
    tile_before_1L = y_before_ref[0, :, rows.lanes(block)].astype(jnp.float32)[-1:]
    before_1L = jnp.where(first_token > 0, tile_before_1L, h0_ref[0, :, rows.lanes(block)])
    return jnp.where(row > 0, in_tile_1L, before_1L)

  def rows_of(row, carries):
    past_RL = tiles.past(first_token + row)
    start_RL = starts_ref[pl.ds(row, ROWS), :] != 0.0
    carries = list(carries)
    for group, blocks in enumerate(tiles.groups):
      a_column, in_column, c_column, h_column = columns[4 * group : 4 * group + 4]
      kept = []
      for slot, block in enumerate(blocks):
        at = (0, pl.ds(row, ROWS), rows.lanes(block))
        x_RL, r_RL, i_RL, dy_RL, y_RL = (
          ref[at].astype(jnp.float32) for ref in (x_ref, r_ref, i_ref, dy_ref, y_ref)
        )
        tanh_r_RL, a_RL, one_minus_a2_RL = _decay(r_RL, half_log2_a_ref[:, rows.lanes(block)])
        a_RL = jnp.where(start_RL, 0.0, a_RL)
        rows.write_rows(a_column, slot, tiles.unless(past_RL, a_RL, 1.0))
        rows.write_rows(in_column, slot, tiles.unless(past_RL, a_RL * dy_RL, 0.0))
        rows.write_rows(h_column, slot, state_before(row, block))
        rows.write_rows(h_column, slot, y_RL, 1)
        rsqrt_RL = jax.lax.rsqrt(jnp.maximum(one_minus_a2_RL, _TINY))
        scale_RL = jnp.where(start_RL, 1.0, one_minus_a2_RL * rsqrt_RL)
        slope_RL = jnp.minimum(rsqrt_RL, LEAST_ONE_MINUS_A2**-0.5)
        open_RL = 0.5 * jnp.tanh(0.5 * i_RL) + 0.5
        opened_RL = open_RL * x_RL
        through_a_RL = opened_RL * (a_RL * a_RL) * slope_RL
        kept.append((tanh_r_RL, scale_RL * open_RL, x_RL - opened_RL, through_a_RL))
      # The incoming carry is stored one row after that of the last token.
      c_column[rows.token(ROWS)] = carries[group]
      carries[group] = rows.recur(a_column, in_column, c_column, carries[group], reverse=True)
      for slot, block in enumerate(blocks):
        at = (0, pl.ds(row, ROWS), rows.lanes(block))
        tanh_r_RL, into_x_RL, closed_RL, through_a_RL = kept[slot]
        g_RL = dy_ref[at].astype(jnp.float32) + rows.read_rows(c_column, slot, 1)
        from_h_RL = rows.read_rows(c_column, slot) * rows.read_rows(h_column, slot)
        dx_RL = g_RL * into_x_RL
        dx_ref[at] = dx_RL.astype(dx_ref.dtype)
        di_ref[at] = (dx_RL * closed_RL).astype(di_ref.dtype)
        term_RL = (from_h_RL - g_RL * through_a_RL) * (1 + tanh_r_RL)
        slope_1L = 0.5 * math.log(2) * half_log2_a_ref[:, rows.lanes(block)]
        dr_ref[at] = (term_RL * (slope_1L - slope_1L * tanh_r_RL)).astype(dr_ref.dtype)
        term_RL = tiles.unless(past_RL, term_RL, 0.0)
        sums_ref[block * 8 : block * 8 + 8, :] += term_RL[:8] + term_RL[8:]
    return tuple(carries)

  tiles.for_rows(first_token, rows_of, carry_ref)

  @pl.when(pl.program_id(2) == pl.num_programs(2) - 1)
  def _():
    rows.rows_to_channels(carry_ref, dh0_ref, tiles)
    for block in range(tiles.tile_width // LANES):
      sum_1L = jnp.sum(sums_ref[block * 8 : block * 8 + 8, :], axis=0, keepdims=True)
      sum_ref[0, :, rows.lanes(block)] = sum_1L
