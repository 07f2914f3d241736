"""The short convolution on TPU, which reads and writes every activation once.

Letters of this file: R, inside the kernels, is the ROWS = 16 tokens computed at a time, and L the
128 lanes of a block of channels; elsewhere R is the width of the recurrence.

The grid and the tiles are those of kernels/linear_scan/pallas_tpu.py. A kernel takes 128 channels
at a time, and their tokens in groups of 16. The tokens d away are the same rows rotated by d; rows
that come around the edge are replaced by those of the 16 tokens before (backward: after).

Bytes per element, for activations of 2 bytes:

  forward    reads x; writes y                              4
  backward   reads x and two gradients of y; writes dx      8

The sums over the tokens of a row are float32 and stay in VMEM. With m_d the gradients of the tokens
whose token d before belongs to their document, and u_d the same moved d tokens back,

  dz = sum_d w_{K-1-d} u_d      dw_{K-1-d} = sum_t z_t u_d,t

so the backward pass needs only the z of its own tokens. The bits of a word say which taps of a
token belong to its document.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernels.causal_conv.links import link_words
from kernels.linear_scan import pallas_tpu as rows
from kernels.linear_scan.pallas_tpu import LANES, ROWS, Tiles
from kernels.varying import shaped_alike

# Taps must be among the 16 tokens before.
_MOST_TAPS = ROWS + 1
# Blocks of channels in one turn of the loop: more would take too many registers.
_FORWARD_BESIDE, _BACKWARD_BESIDE = 4, 2
# Rows over which a sum stays spread: those of a register.
_SUBLANES = 8


def forward(
  x_BTR: jax.Array,
  b_in_R: jax.Array,
  w_KR: jax.Array,
  b_R: jax.Array,
  same: list[jax.Array],
  *,
  tile: tuple[int, int] | None = None,
) -> jax.Array:
  """y in the dtype of x. `same[d - 1]`: whether the token d before belongs to the same document."""
  tiles = _tiles(x_BTR, tile, arrays=2, reverse=False)
  taps = w_KR.shape[0]

  def call(interpret: bool, *arrays: jax.Array):
    return pl.pallas_call(
      functools.partial(_forward_kernel, tiles=tiles, taps=taps),
      grid=tiles.grid,
      in_specs=[
        tiles.token_row(),
        tiles.tokens(),
        tiles.channel_row(),
        _taps(tiles, taps),
        tiles.channel_row(),
      ],
      out_specs=tiles.tokens(),
      out_shape=shaped_alike(x_BTR.shape, x_BTR.dtype, x_BTR),
      scratch_shapes=[_words(tiles), _neighbours(tiles, taps)],
      compiler_params=rows.COMPILER_PARAMS,
      interpret=interpret,
      name="causal_conv_forward",
    )(*arrays)

  words_B1T = link_words(same, x_BTR.shape, "pallas_tpu", _MOST_TAPS)[:, None]
  return rows.on_tpu_or_interpreted(call, words_B1T, x_BTR, b_in_R[None], w_KR, b_R[None])


def backward(
  x_BTR: jax.Array,
  b_in_R: jax.Array,
  w_KR: jax.Array,
  same: list[jax.Array],
  dy_BTR: jax.Array,
  more_dy_BTR: jax.Array,
  *,
  tile: tuple[int, int] | None = None,
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
  """dx in the dtype of x; those of b_in, w and b in float32."""
  tiles = _tiles(x_BTR, tile, arrays=4, reverse=True)
  (batch, _, width), taps = x_BTR.shape, w_KR.shape[0]
  sums = pltpu.VMEM(((taps + 2) * _SUBLANES, tiles.tile_width), jnp.float32)
  sums_spec = pl.BlockSpec(
    (1, taps + 2, tiles.tile_width), lambda row, column, step: (row, 0, column)
  )

  def call(interpret: bool, *arrays: jax.Array):
    return pl.pallas_call(
      functools.partial(_backward_kernel, tiles=tiles, taps=taps),
      grid=tiles.grid,
      in_specs=[
        tiles.token_row(),
        *[tiles.tokens()] * 3,
        tiles.channel_row(),
        _taps(tiles, taps),
      ],
      out_specs=[tiles.tokens(), sums_spec],
      out_shape=[
        shaped_alike(x_BTR.shape, x_BTR.dtype, x_BTR),
        shaped_alike((batch, taps + 2, width), jnp.float32, x_BTR),
      ],
      scratch_shapes=[_words(tiles), _neighbours(tiles, taps), sums],
      compiler_params=rows.COMPILER_PARAMS,
      interpret=interpret,
      name="causal_conv_backward",
    )(*arrays)

  words_B1T = link_words(same, x_BTR.shape, "pallas_tpu", _MOST_TAPS)[:, None]
  dx_BTR, sums_BSR = rows.on_tpu_or_interpreted(
    call, words_B1T, x_BTR, dy_BTR, more_dy_BTR, b_in_R[None], w_KR
  )
  sums_SR = jnp.sum(sums_BSR, axis=0)
  return dx_BTR, sums_SR[taps + 1], sums_SR[:taps], sums_SR[taps]


def _tiles(x_BTR, tile, *, arrays: int, reverse: bool) -> Tiles:
  token_bytes = arrays * x_BTR.dtype.itemsize
  return Tiles(x_BTR.shape, tile or rows.tile_of(x_BTR.shape, token_bytes), reverse=reverse)


def _taps(tiles: Tiles, taps: int) -> pl.BlockSpec:
  return pl.BlockSpec((taps, tiles.tile_width), lambda row, column, step: (0, column))


def _words(tiles: Tiles):
  return pltpu.VMEM((tiles.row_lanes, LANES), jnp.int32)


def _neighbours(tiles: Tiles, taps: int):
  """The last ROWS tokens of the tile before, rotated, for each distance and all channels."""
  return pltpu.VMEM((max(1, taps - 1) * ROWS, tiles.tile_width), jnp.float32)


def _forward_kernel(
  words_ref, x_ref, b_in_ref, w_ref, b_ref, y_ref, turned_ref, before_ref, *, tiles, taps
):
  rows.lanes_to_rows(words_ref, turned_ref)

  @pl.when(pl.program_id(2) == 0)
  def _():
    before_ref[...] = jnp.zeros(before_ref.shape, jnp.float32)

  row_RL = jax.lax.broadcasted_iota(jnp.int32, (ROWS, LANES), 0)

  def rows_of(row, channels, before):
    tap, b_in_1L, b_1L = _taps_of(w_ref, channels), b_in_ref[:, channels], b_ref[:, channels]
    at = (0, pl.ds(row, ROWS), channels)
    z_RL = _rounded(x_ref[at].astype(jnp.float32) + b_in_1L, x_ref.dtype)
    word_RL = turned_ref[pl.ds(row, ROWS), :]
    y_RL = b_1L + z_RL * tap[taps - 1]
    turned = []
    for distance in range(1, taps):
      turned_RL = pltpu.roll(z_RL, distance % ROWS, 0)
      moved_RL = jnp.where(row_RL < distance, before[distance - 1], turned_RL)
      y_RL += _of_document(word_RL, distance, moved_RL) * tap[taps - 1 - distance]
      turned.append(turned_RL)
    y_ref[at] = y_RL.astype(y_ref.dtype)
    return turned

  _for_rows(tiles, rows_of, [(before_ref, ROWS, taps - 1)], beside=_FORWARD_BESIDE)


def _backward_kernel(
  words_ref,
  x_ref,
  dy_ref,
  more_dy_ref,
  b_in_ref,
  w_ref,
  dx_ref,
  sums_out_ref,
  turned_ref,
  behind_ref,
  sums_ref,
  *,
  tiles,
  taps,
):
  first_token = tiles.first_token()
  rows.lanes_to_rows(words_ref, turned_ref)

  @pl.when(pl.program_id(2) == 0)
  def _():
    behind_ref[...] = jnp.zeros(behind_ref.shape, jnp.float32)
    sums_ref[...] = jnp.zeros(sums_ref.shape, jnp.float32)

  row_RL = jax.lax.broadcasted_iota(jnp.int32, (ROWS, LANES), 0)

  def rows_of(row, channels, carry):
    behind, sums = carry[: taps - 1], list(carry[taps - 1 :])
    tap, b_in_1L = _taps_of(w_ref, channels), b_in_ref[:, channels]
    at = (0, pl.ds(row, ROWS), channels)
    past_RL = tiles.past(first_token + row)
    z_RL = _rounded(x_ref[at].astype(jnp.float32) + b_in_1L, x_ref.dtype)
    z_RL = tiles.unless(past_RL, z_RL, 0.0)
    dy_RL = dy_ref[at].astype(jnp.float32) + more_dy_ref[at].astype(jnp.float32)
    dy_RL = tiles.unless(past_RL, dy_RL, 0.0)
    word_RL = turned_ref[pl.ds(row, ROWS), :]
    dz_RL = dy_RL * tap[taps - 1]
    terms = {taps - 1: z_RL * dy_RL, taps: dy_RL}
    turned = []
    for distance in range(1, taps):
      turned_RL = pltpu.roll(_of_document(word_RL, distance, dy_RL), (ROWS - distance) % ROWS, 0)
      moved_RL = jnp.where(row_RL < ROWS - distance, turned_RL, behind[distance - 1])
      dz_RL += moved_RL * tap[taps - 1 - distance]
      terms[taps - 1 - distance] = z_RL * moved_RL
      turned.append(turned_RL)
    dx_ref[at] = dz_RL.astype(dx_ref.dtype)
    terms[taps + 1] = dz_RL
    for index, term_RL in terms.items():
      sums[index] += term_RL[:_SUBLANES] + term_RL[_SUBLANES:]
    return [*turned, *sums]

  carries = [(behind_ref, ROWS, taps - 1), (sums_ref, _SUBLANES, taps + 2)]
  _for_rows(tiles, rows_of, carries, beside=_BACKWARD_BESIDE)

  @pl.when(pl.program_id(2) == pl.num_programs(2) - 1)
  def _():
    for index in range(taps + 2):
      of_sum = slice(index * _SUBLANES, (index + 1) * _SUBLANES)
      sums_out_ref[0, index : index + 1, :] = jnp.sum(sums_ref[of_sum, :], axis=0, keepdims=True)


def _for_rows(tiles: Tiles, rows_of, carries, *, beside: int) -> None:
  """carry = rows_of(row, channels, carry) for every ROWS tokens of the tile, in its order.

  `carries` are (reference, rows of one, how many): what is passed from one group of tokens to the
  next, for all channels. `beside` blocks of channels run side by side: some wait while others are
  computed.
  """
  count = tiles.rows_of_tile(tiles.first_token())
  at = [
    (ref, slice(i * size, (i + 1) * size)) for ref, size, number in carries for i in range(number)
  ]
  num_blocks = tiles.tile_width // LANES
  for first in range(0, num_blocks, beside):
    blocks = [rows.lanes(block) for block in range(first, min(first + beside, num_blocks))]

    def body(step, carry, blocks=blocks):
      index = count - 1 - step if tiles.reverse else step
      row = pl.multiple_of(index * ROWS, ROWS)
      return [rows_of(row, channels, one) for channels, one in zip(blocks, carry, strict=True)]

    carry = [[ref[place, channels] for ref, place in at] for channels in blocks]
    carry = jax.lax.fori_loop(0, count, body, carry)
    for channels, one in zip(blocks, carry, strict=True):
      for (ref, place), value in zip(at, one, strict=True):
        ref[place, channels] = value


def _taps_of(w_ref, channels: slice) -> list:
  return [w_ref[tap : tap + 1, channels] for tap in range(w_ref.shape[0])]


def _rounded(value_RL, dtype):
  return value_RL.astype(dtype).astype(jnp.float32)


def _of_document(word_RL, distance: int, value_RL):
  """`value`, or 0 where the token `distance` before is of another document."""
  return jnp.where((word_RL & (1 << distance)) != 0, value_RL, 0.0)
