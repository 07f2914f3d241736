"""Two block-diagonal products on TPU, channels over the lanes as the layers around have them.

  forward    reads x; writes r, i                 6 bytes per bfloat16 channel and token
  backward   reads x, dr, di; writes dx           8 bytes; gradients of w and b are summed in VMEM

Letters of this file: P tokens of the whole batch, L the channels of a tile, M tiles of 128 lanes.

A block of 160 channels can begin anywhere in a register of 128 lanes, so the work is cut by
registers and not by blocks. A register of 128 results is computed from the registers that hold its
blocks' inputs, by a product with a dense matrix that is zero where input and output belong to
different blocks. `Bands` lists these registers. For 4 blocks of 160 in 5 registers they are 2, 3,
3, 3 and 2: 13 products of 128 x 128 for each result, where padding each block to whole registers
would take 16. The matrices of both results lie side by side, 256 columns, below those of the
register before.

A program of the grid has the smallest number of registers that begins and ends with a block, or a
multiple of it. Any number of tokens and channels: past the edge there are zeros.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernels.linear_scan.pallas_tpu import LANES, lanes, on_tpu_or_interpreted
from kernels.varying import shaped_alike

# Bytes for the tiles of activations, each twice, in addition to the matrices: v3 and v4 have 16 MiB
# of VMEM.
_TILE_BYTES = 5 * 2**20
# Channels of a tile, if whole blocks allow it.
_TILE_WIDTH = 1024
_TILE_TOKENS = 512


class Bands:
  """How `num_blocks` blocks of `size` channels lie in tiles of `tile_width` lanes.

  bands: for each register of results in a tile, the lanes of its inputs, and the first row of its
  matrix among the tile's `num_rows`.
  """

  def __init__(self, num_blocks: int, size: int):
    self.num_blocks, self.size, self.width = num_blocks, size, num_blocks * size
    whole = LANES * pl.cdiv(self.width, LANES)
    least = math.lcm(size, LANES)
    # Two cores of a v4 or v5p share the tiles: at least one for each, if possible.
    fitting = [
      width
      for width in range(least, min(max(_TILE_WIDTH, least), whole - 1) + 1, least)
      if self.width % width == 0
    ]
    self.tile_width = max(fitting, default=min(least, whole))
    self.num_tiles = pl.cdiv(self.width, self.tile_width)
    self.bands, row = [], 0
    for first in range(0, self.tile_width, LANES):
      low = first // size * size // LANES * LANES
      high = LANES * pl.cdiv(((first + LANES - 1) // size + 1) * size, LANES)
      high = min(high, self.tile_width)
      self.bands.append((slice(low, high), slice(row, row + high - low)))
      row += high - low
    self.num_rows = row

  def packed(self, w_GI2J: jax.Array) -> jax.Array:
    """[tiles, num_rows, 256]: the dense matrices of all registers."""
    blocks = pl.cdiv(self.tile_width, self.size)
    w_GI2J = jnp.pad(w_GI2J, ((0, self.num_tiles * blocks - self.num_blocks), *[(0, 0)] * 3))
    w_MGI2J = w_GI2J.reshape(self.num_tiles, blocks, *w_GI2J.shape[1:])
    parts = []
    for register, (inputs, _) in enumerate(self.bands):
      columns = []
      for block, outputs, _ in self._pieces(register):
        before = block * self.size - inputs.start
        # Of a block that is not there, and only fills the last register, less may be needed.
        size = min(self.size, inputs.stop - block * self.size)
        after = inputs.stop - inputs.start - before - size
        piece_MI2J = w_MGI2J[:, block, :size, :, outputs]
        columns.append(jnp.pad(piece_MI2J, ((0, 0), (before, after), (0, 0), (0, 0))))
      parts.append(jnp.concatenate(columns, axis=-1).reshape(self.num_tiles, -1, 2 * LANES))
    return jnp.concatenate(parts, axis=1)

  def unpacked(self, matrices: jax.Array) -> jax.Array:
    """[G, I, 2, J]: the entries at the places where `packed` puts the weights."""
    found = [[] for _ in range(pl.cdiv(self.tile_width, self.size))]
    for register, (inputs, rows) in enumerate(self.bands):
      for block, _, columns in self._pieces(register):
        first = rows.start + block * self.size - inputs.start
        piece = matrices[:, first : first + self.size].reshape(self.num_tiles, -1, 2, LANES)
        found[block].append(piece[..., columns])
    whole = [parts for parts in found if sum(part.shape[-1] for part in parts) == self.size]
    w_MGI2J = jnp.stack([jnp.concatenate(parts, axis=-1) for parts in whole], axis=1)
    return w_MGI2J.reshape(-1, *w_MGI2J.shape[2:])[: self.num_blocks]

  def _pieces(self, register: int):
    """(block, which of its results, in which lanes) of all blocks in a register of a tile."""
    first, last = register * LANES, (register + 1) * LANES
    for block in range(first // self.size, (last - 1) // self.size + 1):
      start, stop = max(first, block * self.size), min(last, (block + 1) * self.size)
      outputs = slice(start - block * self.size, stop - block * self.size)
      yield block, outputs, slice(start - first, stop - first)

  def tile_tokens(self, tokens: int, token_bytes: int) -> int:
    """The tokens of a tile; a token of all arrays takes `token_bytes` per channel."""
    fitting = _TILE_BYTES // (2 * token_bytes * self.tile_width) // LANES * LANES
    return min(max(LANES, min(fitting, _TILE_TOKENS)), LANES * pl.cdiv(tokens, LANES))


def forward(x_BTR: jax.Array, w_GI2J: jax.Array, b_G2J: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Both products in x's dtype; kernels/block_diagonal has the specification."""
  bands = Bands(*w_GI2J.shape[:2])
  x_PR, b_2R = _flat(x_BTR), jnp.swapaxes(b_G2J, 0, 1).reshape(2, -1)
  size = bands.tile_tokens(x_PR.shape[0], 3 * x_PR.dtype.itemsize)

  def call(interpret: bool, *arrays: jax.Array):
    return pl.pallas_call(
      functools.partial(_forward_kernel, bands=bands),
      grid=(bands.num_tiles, pl.cdiv(x_PR.shape[0], size)),
      in_specs=[_tokens(size, bands), _matrices(bands), _channels(bands)],
      out_specs=[_tokens(size, bands)] * 2,
      out_shape=[shaped_alike(x_PR.shape, x_PR.dtype, x_PR)] * 2,
      compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel")),
      interpret=interpret,
      name="block_diagonal_forward",
    )(*arrays)

  r_PR, i_PR = on_tpu_or_interpreted(call, x_PR, bands.packed(w_GI2J), b_2R)
  return r_PR.reshape(x_BTR.shape), i_PR.reshape(x_BTR.shape)


def backward(
  x_BTR: jax.Array, w_GI2J: jax.Array, dr_BTR: jax.Array, di_BTR: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Gradients of x, w (in their dtypes) and b (float32)."""
  bands = Bands(*w_GI2J.shape[:2])
  arrays = [_flat(z_BTR) for z_BTR in (x_BTR, dr_BTR, di_BTR)]
  x_PR = arrays[0]
  size = bands.tile_tokens(x_PR.shape[0], 4 * x_PR.dtype.itemsize)
  matrices = shaped_alike((bands.num_tiles, bands.num_rows, 2 * LANES), jnp.float32, x_PR)

  def call(interpret: bool, *arrays: jax.Array):
    return pl.pallas_call(
      functools.partial(_backward_kernel, bands=bands, num_tokens=x_PR.shape[0]),
      grid=(bands.num_tiles, pl.cdiv(x_PR.shape[0], size)),
      in_specs=[*[_tokens(size, bands)] * 3, _matrices(bands)],
      out_specs=[_tokens(size, bands), _matrices(bands), _channels(bands)],
      out_shape=[
        shaped_alike(x_PR.shape, x_PR.dtype, x_PR),
        matrices,
        shaped_alike((2, bands.width), jnp.float32, x_PR),
      ],
      scratch_shapes=[pltpu.VMEM((size, bands.tile_width), jnp.float32)],
      compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary")),
      interpret=interpret,
      name="block_diagonal_backward",
    )(*arrays)

  dx_PR, dmatrices, db_2R = on_tpu_or_interpreted(call, *arrays, bands.packed(w_GI2J))
  dw_GI2J = bands.unpacked(dmatrices)
  db_G2J = jnp.swapaxes(db_2R.reshape(2, bands.num_blocks, bands.size), 0, 1)
  return dx_PR.reshape(x_BTR.shape), dw_GI2J.astype(w_GI2J.dtype), db_G2J


def _flat(x_BTR: jax.Array) -> jax.Array:
  """[tokens, R]; not copied if 8 divides the time."""
  return x_BTR.reshape(-1, x_BTR.shape[-1])


def _tokens(size: int, bands: Bands) -> pl.BlockSpec:
  return pl.BlockSpec((size, bands.tile_width), lambda column, step: (step, column))


def _matrices(bands: Bands) -> pl.BlockSpec:
  shape = (1, bands.num_rows, 2 * LANES)
  # A single buffer in VMEM: megabytes that change only with the tile of channels.
  return pl.BlockSpec(shape, lambda column, step: (column, 0, 0), pipeline_mode=pl.Buffered(1))


def _channels(bands: Bands) -> pl.BlockSpec:
  return pl.BlockSpec((2, bands.tile_width), lambda column, step: (0, column))


def _within(z_PL, bands: Bands, num_tokens: int | None):
  """z, and 0 past the last token or channel, where memory may hold NaN."""
  inside = None
  if bands.width % bands.tile_width:
    channel_PL = jax.lax.broadcasted_iota(jnp.int32, z_PL.shape, 1)
    inside = channel_PL < bands.width - pl.program_id(0) * bands.tile_width
  if num_tokens is not None and num_tokens % z_PL.shape[0]:
    token_PL = jax.lax.broadcasted_iota(jnp.int32, z_PL.shape, 0)
    is_token_PL = token_PL < num_tokens - pl.program_id(1) * z_PL.shape[0]
    inside = is_token_PL if inside is None else inside & is_token_PL
  if inside is None:
    return z_PL
  # In float32: Mosaic cannot mask bfloat16 with a mask that is the same in all rows.
  return jnp.where(inside, z_PL.astype(jnp.float32), 0).astype(z_PL.dtype)


def _forward_kernel(x_ref, w_ref, b_ref, r_ref, i_ref, *, bands: Bands):
  x_PL = _within(x_ref[...], bands, None)
  for index, (inputs, rows) in enumerate(bands.bands):
    both = jnp.dot(x_PL[:, inputs], w_ref[0, rows, :], preferred_element_type=jnp.float32)
    for branch, ref in enumerate((r_ref, i_ref)):
      bias = b_ref[branch : branch + 1, lanes(index)]
      ref[:, lanes(index)] = (both[:, lanes(branch)] + bias).astype(ref.dtype)


def _backward_kernel(
  x_ref, dr_ref, di_ref, w_ref, dx_ref, dw_ref, db_ref, sum_ref, *, bands: Bands, num_tokens: int
):
  @pl.when(pl.program_id(1) == 0)
  def _():
    dw_ref[...] = jnp.zeros(dw_ref.shape, jnp.float32)
    db_ref[...] = jnp.zeros(db_ref.shape, jnp.float32)

  x_PL, dr_PL, di_PL = (_within(ref[...], bands, num_tokens) for ref in (x_ref, dr_ref, di_ref))
  x_LP = x_PL.T
  sum_ref[...] = jnp.zeros(sum_ref.shape, jnp.float32)
  for index, (inputs, rows) in enumerate(bands.bands):
    both = jnp.concatenate([dr_PL[:, lanes(index)], di_PL[:, lanes(index)]], axis=1)
    sum_ref[:, inputs] += jax.lax.dot_general(
      both, w_ref[0, rows, :], (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32
    )
    dw_ref[0, rows, :] += jnp.dot(x_LP[inputs], both, preferred_element_type=jnp.float32)
  dx_ref[...] = sum_ref[...].astype(dx_ref.dtype)
  for branch, d_PL in enumerate((dr_PL, di_PL)):
    db_ref[branch : branch + 1, :] += jnp.sum(d_PL.astype(jnp.float32), axis=0, keepdims=True)
