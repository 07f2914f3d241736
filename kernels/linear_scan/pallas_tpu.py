"""The recurrence on TPU: one pass over x and a, blocked over time, the carry in VMEM.

Letters of this file: N blocks of 128 channels (a vector register is 8 sublanes of 128 lanes);
inside the kernel R is ROWS = 16 tokens, and L the 128 lanes.

A program of the grid has one row, a tile of channels and a tile of time. The tiles of time run one
after the other, so the carry stays in VMEM. Inside, 16 tokens at a time:

  In x, tokens lie over the sublanes, but a step of the recurrence needs a register full of channels
  of the same token. So 8 blocks of channels are written below each other, block n from row 17 n on,
  and every 17th row is read: 1024 channels of one token. It is 17 and not 16 because rows that are
  a multiple of 8 apart are in the same sublane, and the compiler counts them as read one by one.
  Each step depends on the one before; steps of other blocks of channels fill the waiting time.

Per state of a bfloat16 x and float32 a: 6 bytes read, 2 written. Any time and any width: the last
tiles reach over the edge of the arrays, and tokens past the end only pass the state on (a = 1,
x = 0). On CPU the same kernel runs in Pallas' interpreter, slowly, for tests.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernels.varying import shaped_alike

LANES = 128
# Tokens in a step of the loop: a register of bfloat16 holds 16 rows.
ROWS = 16
# Blocks of channels in one register, all of one token.
GROUP = 8
_PITCH = ROWS + 1
# Bytes of the tiles of all arrays, each twice (one in use, one being copied). TPU v3 and v4 have 16
# MiB of VMEM, and the rest of the kernel needs a little.
_TILE_BYTES = 11 * 2**20
_TILE_TIME = 256


def scan(
  x_BTD: jax.Array,
  a_BTD: jax.Array,
  h0_BD: jax.Array,
  *,
  reverse: bool,
  tile: tuple[int, int] | None = None,
) -> tuple[jax.Array, jax.Array]:
  """h_t = a_t h_{t-1} + x_t in float32; states in x's dtype, the last one float32."""
  batch, _, width = x_BTD.shape
  token_bytes = 2 * x_BTD.dtype.itemsize + a_BTD.dtype.itemsize
  tiles = Tiles(x_BTD.shape, tile or tile_of(x_BTD.shape, token_bytes), reverse=reverse)
  kernel = functools.partial(_kernel, tiles=tiles)

  def call(interpret: bool, *arrays: jax.Array):
    return pl.pallas_call(
      kernel,
      grid=tiles.grid,
      in_specs=[tiles.tokens(), tiles.tokens(), tiles.edge()],
      out_specs=[tiles.tokens(), tiles.edge()],
      out_shape=[
        shaped_alike(x_BTD.shape, x_BTD.dtype, x_BTD),
        shaped_alike((batch, 1, width), jnp.float32, x_BTD),
      ],
      scratch_shapes=[tiles.carry(), *tiles.columns(3)],
      compiler_params=COMPILER_PARAMS,
      interpret=interpret,
      name="linear_scan",
    )(*arrays)

  y_BTD, hT_B1D = on_tpu_or_interpreted(call, x_BTD, a_BTD, h0_BD[:, None])
  return y_BTD, hT_B1D[:, 0]


def _kernel(x_ref, a_ref, h0_ref, y_ref, hT_ref, carry_ref, *columns, tiles: "Tiles"):
  first_token = tiles.first_token()

  @pl.when(pl.program_id(2) == 0)
  def _():
    channels_to_rows(h0_ref, carry_ref, tiles)

  def rows_of(row, states):
    past_RL = tiles.past(first_token + row)
    states = list(states)
    for group, blocks in enumerate(tiles.groups):
      a_column, x_column, y_column = columns[3 * group : 3 * group + 3]
      for slot, block in enumerate(blocks):
        at = (0, pl.ds(row, ROWS), lanes(block))
        write_rows(a_column, slot, tiles.unless(past_RL, a_ref[at].astype(jnp.float32), 1.0))
        write_rows(x_column, slot, tiles.unless(past_RL, x_ref[at].astype(jnp.float32), 0.0))
      states[group] = recur(a_column, x_column, y_column, states[group], reverse=tiles.reverse)
      for slot, block in enumerate(blocks):
        y_ref[0, pl.ds(row, ROWS), lanes(block)] = read_rows(y_column, slot).astype(y_ref.dtype)
    return tuple(states)

  tiles.for_rows(first_token, rows_of, carry_ref)

  @pl.when(pl.program_id(2) == pl.num_programs(2) - 1)
  def _():
    rows_to_channels(carry_ref, hT_ref, tiles)


COMPILER_PARAMS = pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "arbitrary"))


def on_tpu_or_interpreted(call, *arrays: jax.Array):
  """call(interpret, *arrays): compiled where the program is for TPU, interpreted on CPU.

  The platform that the program is lowered for decides, not the one that traces it: a program for
  TPU that is compiled ahead of time on a CPU has the kernel. On other platforms lowering fails.
  """
  return jax.lax.platform_dependent(
    *arrays, cpu=functools.partial(call, True), tpu=functools.partial(call, False)
  )


def tile_of(shape: tuple[int, ...], token_bytes: int) -> tuple[int, int]:
  """(tokens, channels) of a tile; a token of all arrays takes `token_bytes` per channel."""
  batch, time, width = shape
  num_blocks = pl.cdiv(width, LANES)
  fitting_blocks = max(GROUP, _TILE_BYTES // (2 * token_bytes * LANES * _TILE_TIME))
  # Two cores of a v4 or v5p share the rows and the tiles of channels: a single row needs two tiles.
  num_tiles = max(pl.cdiv(num_blocks, fitting_blocks), min(2, num_blocks) if batch == 1 else 1)
  tile_width = LANES * pl.cdiv(num_blocks, num_tiles)
  # Document starts lie over lanes, so a tile that is not the whole row has a multiple of 128
  # tokens.
  fitting = min(512, _TILE_BYTES // (2 * token_bytes * tile_width) // LANES * LANES)
  if time <= max(fitting, LANES):
    return ROWS * pl.cdiv(time, ROWS), tile_width
  sizes = range(LANES, max(fitting, LANES) + 1, LANES)
  # Preferably without a last tile that is partly empty.
  return max(sizes, key=lambda size: (time % size == 0, size)), tile_width


class Tiles:
  """How the programs of a grid (row, tile of channels, tile of time) divide [batch, time, width].

  Tiles of time come in the order of the recurrence: from the last to the first if `reverse`.
  """

  def __init__(self, shape: tuple[int, ...], tile: tuple[int, int], *, reverse: bool):
    self.batch, self.time, self.width = shape
    self.tile_time, self.tile_width = tile
    self.reverse = reverse
    self.num_times = pl.cdiv(self.time, self.tile_time)
    self.grid = (self.batch, pl.cdiv(self.width, self.tile_width), self.num_times)
    blocks = range(self.tile_width // LANES)
    size = pl.cdiv(len(blocks), pl.cdiv(len(blocks), GROUP))
    self.groups = [blocks[first : first + size] for first in blocks[::size]]

  def _time(self, step):
    return self.num_times - 1 - step if self.reverse else step

  def tokens(self) -> pl.BlockSpec:
    """The block of an array [batch, time, width]."""
    shape = (1, self.tile_time, self.tile_width)
    return pl.BlockSpec(shape, lambda row, column, step: (row, self._time(step), column))

  def tokens_before(self) -> pl.BlockSpec:
    """The block of the ROWS tokens before the tile, or the row's first ones."""
    ratio = self.tile_time // ROWS

    def index(row, column, step):
      return row, jnp.maximum(self._time(step) * ratio - 1, 0), column

    return pl.BlockSpec((1, ROWS, self.tile_width), index)

  def token_row(self) -> pl.BlockSpec:
    """The block of an array [batch, 1, time]: tokens over the lanes."""
    shape = (1, 1, self.row_lanes)
    return pl.BlockSpec(shape, lambda row, column, step: (row, 0, self._time(step)))

  @property
  def row_lanes(self) -> int:
    return LANES * pl.cdiv(self.tile_time, LANES)

  def edge(self) -> pl.BlockSpec:
    """The block of an array [batch, 1, width]."""
    return pl.BlockSpec((1, 1, self.tile_width), lambda row, column, step: (row, 0, column))

  def channel_row(self) -> pl.BlockSpec:
    """The block of an array [1, width]."""
    return pl.BlockSpec((1, self.tile_width), lambda row, column, step: (0, column))

  def carry(self):
    """VMEM for the states after a token: a block of channels in each row."""
    return pltpu.VMEM((len(self.groups) * GROUP, LANES), jnp.float32)

  def columns(self, count: int) -> list:
    """VMEM for `count` columns of ROWS tokens for each group, its blocks _PITCH rows apart."""
    column = pltpu.VMEM((GROUP * _PITCH + 7, LANES), jnp.float32)
    return [column] * (count * len(self.groups))

  def first_token(self):
    return self._time(pl.program_id(2)) * self.tile_time

  def past(self, token):
    """Which of ROWS tokens from `token` on are past the end, over all lanes; None if none is."""
    if self.time % ROWS == 0:
      return None
    row_RL = jax.lax.broadcasted_iota(jnp.int32, (ROWS, LANES), 0)
    return row_RL + token >= self.time

  def unless(self, past_RL, value_RL, otherwise: float):
    return value_RL if past_RL is None else jnp.where(past_RL, otherwise, value_RL)

  def rows_of_tile(self, first_token):
    """How many groups of ROWS tokens there are in the tile that starts at `first_token`."""
    count = self.tile_time // ROWS
    if self.time % self.tile_time:
      count = jnp.minimum(count, jax.lax.div(self.time - first_token + (ROWS - 1), ROWS))
    return count

  def for_rows(self, first_token, rows_of, carry_ref) -> None:
    """carry = rows_of(row, carry) for every ROWS tokens of the tile, in the recurrence's order."""
    count = self.rows_of_tile(first_token)

    def body(step, states):
      index = count - 1 - step if self.reverse else step
      return rows_of(pl.multiple_of(index * ROWS, ROWS), states)

    at = [pl.ds(group * GROUP, GROUP) for group in range(len(self.groups))]
    states = jax.lax.fori_loop(0, count, body, tuple(carry_ref[rows, :] for rows in at))
    for rows, state_NL in zip(at, states, strict=True):
      carry_ref[rows, :] = state_NL


def lanes(block: int) -> slice:
  return slice(block * LANES, (block + 1) * LANES)


def lanes_to_rows(lanes_ref, rows_ref) -> None:
  """Values of a tile's tokens, [1, 1, tokens], moved from lanes to rows and repeated over all
  lanes; done once for all channels of a tile."""
  shape = rows_ref.shape
  rows_ref[...] = jnp.transpose(jnp.broadcast_to(lanes_ref[...][0], shape[::-1]))


def channels_to_rows(channels_ref, rows_ref, tiles: Tiles) -> None:
  """[1, 1, width] -> a block in each row; every group starts at a multiple of GROUP."""
  for row, block in _rows_and_blocks(tiles):
    rows_ref[row : row + 1, :] = channels_ref[0, :, lanes(block)]


def rows_to_channels(rows_ref, channels_ref, tiles: Tiles) -> None:
  for row, block in _rows_and_blocks(tiles):
    channels_ref[0, :, lanes(block)] = rows_ref[row : row + 1, :]


def _rows_and_blocks(tiles: Tiles):
  for group, blocks in enumerate(tiles.groups):
    yield from ((group * GROUP + slot, block) for slot, block in enumerate(blocks))


def write_rows(column_ref, slot: int, value_RL, offset: int = 0) -> None:
  column_ref[slot * _PITCH + offset : slot * _PITCH + offset + value_RL.shape[0], :] = value_RL


def read_rows(column_ref, slot: int, offset: int = 0):
  return column_ref[slot * _PITCH + offset : slot * _PITCH + offset + ROWS, :]


def token(row: int):
  """Token `row` of a column's ROWS tokens, for all blocks: [GROUP, LANES]."""
  return pl.ds(row, GROUP, stride=_PITCH), slice(None)


def recur(a_column, x_column, h_column, h_NL, *, reverse: bool):
  """h = a h + x over the ROWS tokens of the columns, into `h_column`; the last h."""
  for row in range(ROWS)[::-1] if reverse else range(ROWS):
    h_NL = a_column[token(row)] * h_NL + x_column[token(row)]
    h_column[token(row)] = h_NL
  return h_NL
