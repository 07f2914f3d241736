"""Two block-diagonal products as Triton kernels, without reordering before or after.

Bytes per channel and token, with activations of 2 bytes; einsum_rounded.py moves 16 and 30:

  forward    reads x; writes r, i                                          6 bytes
  backward   reads dr, di; writes dx; the products of dw read x, dr, x, di      14

Letters of this file: P tokens of the whole batch, C tokens of a tile, I and J the input and output
channels of a piece of a block.

A program has a block and some tokens. The sizes of Triton's arrays are powers of two: a block of
160 channels is pieces of 128 and 32, and each piece of a result is the sum of one product for each
piece of x. XLA computes the gradients of the weights, because they are sums over all tokens, of
which a program has few. Those of the biases are summed here over the tokens of a program, and then
by XLA.

A program with one tile reads 102 KB of weights for 20 KB of x; on Hopper a program keeps them for
many tiles. On an H100, at [8, 2048, 2560] in 16 blocks, forward then takes 0.123 ms instead of
0.163, and dx with the biases' sums 0.127 instead of 0.212; a copy of these bytes takes 0.096.
"""

import functools
import itertools
import math
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from kernels import dispatch
from kernels.block_diagonal import einsum_rounded
from kernels.triton_call import on_gpu_or_interpreted, shape_of

_TOKENS = 64
# Ampere multiplies from registers, which are too few to keep the weights. "" means the newest.
_HOPPER = re.compile(r"(NVIDIA (GH200|H100|H200|H800|H20).*)?")
_MOST, _LEAST = 128, 16


class Cut(NamedTuple):
  """How a program multiplies: how many tiles of _TOKENS one after the other (with several, the
  weights stay in shared memory), with how many buffers; forward also for one of the results or for
  both."""

  tiles: int = 1
  stages: int = 2
  results: int = 2

  @classmethod
  def forward(cls, x_PR: jax.Array, *, blocks: int, size: int) -> "Cut":
    # With small blocks one result alone is too little work for a program.
    return cls(tiles=16, results=1)._or_once(x_PR, blocks, size, sizes=(65, 256), fewest=256)

  @classmethod
  def backward(cls, x_PR: jax.Array, *, blocks: int, size: int) -> "Cut":
    return cls(tiles=32, stages=3)._or_once(x_PR, blocks, size, sizes=(1, 160), fewest=128)

  def _or_once(
    self, x_PR: jax.Array, blocks: int, size: int, *, sizes: tuple[int, int], fewest: int
  ) -> "Cut":
    """The cut for blocks of these `sizes` (a multiprocessor of a Hopper has room for the weights),
    with fewer tiles if few tokens would leave too few programs for its 132 multiprocessors."""
    programs = math.prod(self._replace(tiles=1).grid(x_PR, blocks=blocks))
    tiles, (least, most) = min(self.tiles, programs // fewest), sizes
    if tiles < 2 or not least <= size <= most or not _HOPPER.fullmatch(dispatch.target_kind()):
      return Cut()
    return self._replace(tiles=tiles)

  def grid(self, x_PR: jax.Array, *, blocks: int) -> tuple[int, int]:
    """Programs by (block and results, tokens). The blocks of the same tokens run side by side:
    together they read and write whole rows of memory."""
    return blocks * (2 // self.results), pl.cdiv(x_PR.shape[0], _TOKENS * self.tiles)


def forward(x_BTR: jax.Array, w_GI2J: jax.Array, b_G2J: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Both products in x's dtype; kernels/block_diagonal has the specification."""
  if x_BTR.dtype.itemsize != 2:
    raise ValueError(
      f"block_diagonal: pallas_gpu takes activations of 2 bytes, not {x_BTR.dtype}, whose products "
      "are not tensor cores' and would spill every register; use einsum_rounded or einsum"
    )
  blocks, size = w_GI2J.shape[:2]
  x_PR = _flat(x_BTR)
  results = (shape_of(x_PR), shape_of(x_PR))
  cut = Cut.forward(x_PR, blocks=blocks, size=size)
  call = _Call(_forward_kernel, results, blocks, size, cut, "block_diagonal_forward")
  r_PR, i_PR = on_gpu_or_interpreted(call, x_PR, w_GI2J, b_G2J)
  return r_PR.reshape(x_BTR.shape), i_PR.reshape(x_BTR.shape)


def backward(
  x_BTR: jax.Array, w_GI2J: jax.Array, dr_BTR: jax.Array, di_BTR: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """dx in the dtype of x, dw in that of w, db in float32."""
  blocks, size = w_GI2J.shape[:2]
  dr_PR = _flat(dr_BTR)
  cut = Cut.backward(dr_PR, blocks=blocks, size=size)
  _, num_programs = cut.grid(dr_PR, blocks=blocks)
  sums = jax.ShapeDtypeStruct((num_programs, blocks, 2, size), jnp.float32)
  results = (shape_of(dr_PR), sums)
  call = _Call(_backward_kernel, results, blocks, size, cut, "block_diagonal_backward")
  dx_PR, sums_NG2J = on_gpu_or_interpreted(call, dr_PR, _flat(di_BTR), w_GI2J)
  dw_GI2J = einsum_rounded.weight_gradients(x_BTR, w_GI2J, dr_BTR, di_BTR)
  return dx_PR.reshape(x_BTR.shape), dw_GI2J, jnp.sum(sums_NG2J, axis=0)


class _Call(NamedTuple):
  """Launches a program for each block and each group of tokens of the first array."""

  kernel: Callable[..., None]
  results: tuple[jax.ShapeDtypeStruct, ...]
  blocks: int
  size: int
  cut: Cut
  name: str

  def __call__(self, interpret: bool, *arrays: jax.Array) -> Any:
    return pl.pallas_call(
      functools.partial(self.kernel, size=self.size, cut=self.cut),
      grid=self.cut.grid(arrays[0], blocks=self.blocks),
      out_shape=self.results,
      compiler_params=plgpu.CompilerParams(num_warps=4, num_stages=self.cut.stages),
      interpret=interpret,
      name=self.name,
    )(*arrays)


def _forward_kernel(x_ref, w_ref, b_ref, r_ref, i_ref, *, size, cut):
  program, pieces = _Program(x_ref.shape[0], size, cut), _pieces(size)
  weights = program.weights(w_ref, pieces)

  def one_tile(tile, _):
    x_CI = [tile.load(x_ref, piece) for piece in pieces]
    for branch in range(cut.results):
      for outputs in pieces:
        y_CJ = sum(
          plgpu.dot(x, weights(branch, inputs, outputs))
          for x, inputs in zip(x_CI, pieces, strict=True)
        )
        y_CJ += program.load_biases(b_ref, branch, outputs)[None]
        tile.store_result((r_ref, i_ref), branch, outputs, y_CJ)

  program.walk(one_tile, None)


def _backward_kernel(dr_ref, di_ref, w_ref, dx_ref, sums_ref, *, size, cut):
  program, pieces = _Program(dr_ref.shape[0], size, cut), _pieces(size)
  weights = program.weights(w_ref, pieces)

  def one_tile(tile, sums):
    dy_CJ = [[tile.load(dy_ref, piece) for piece in pieces] for dy_ref in (dr_ref, di_ref)]
    for inputs in pieces:
      dx_CI = sum(
        plgpu.dot(dy, weights(branch, inputs, outputs), trans_b=True)
        for branch in range(2)
        for dy, outputs in zip(dy_CJ[branch], pieces, strict=True)
      )
      tile.store(dx_ref, inputs, dx_CI)
    of_tile = [jnp.sum(dy.astype(jnp.float32), axis=0) for dy in (*dy_CJ[0], *dy_CJ[1])]
    return [sum_J + more_J for sum_J, more_J in zip(sums, of_tile, strict=True)]

  zeros = [jnp.zeros((length,), jnp.float32) for _, length, _ in (*pieces, *pieces)]
  sums = program.walk(one_tile, zeros)
  for (branch, outputs), sums_J in zip(itertools.product(range(2), pieces), sums, strict=True):
    program.store_sums(sums_ref, branch, outputs, sums_J)


def _pieces(size: int) -> list[tuple[int, int, int]]:
  """The pieces of a block: (first channel, size of the array, how many of its channels exist)."""
  pieces, first = [], 0
  while first < size:
    left = size - first
    length = min(_MOST, max(_LEAST, 1 << left.bit_length() - 1))
    pieces.append((first, length, min(length, left)))
    first += length
  return pieces


class _Program:
  """A block and some tiles of tokens; whatever is past an edge is loaded as 0."""

  def __init__(self, tokens: int, size: int, cut: Cut):
    self.tokens, self.size, self.cut = tokens, size, cut
    self.block, self.index = pl.program_id(0), pl.program_id(1)
    self.branches = [jnp.int32(0), jnp.int32(1)]
    if cut.results == 1:
      # The programs of both results run side by side: one of them finds x in the cache.
      self.block, *self.branches = self.block // 2, self.block % 2

  def walk(self, one_tile: Callable[["_Tile", Any], Any], carry: Any) -> Any:
    """Calls `one_tile` for every tile, with its result for the tile before."""
    first = self.index * self.cut.tiles
    if self.cut.tiles == 1:
      return one_tile(_Tile(self, first), carry)
    return jax.lax.fori_loop(
      0, self.cut.tiles, lambda tile, carry: one_tile(_Tile(self, first + tile), carry), carry
    )

  def weights(self, ref: Any, pieces: list) -> Callable[..., jax.Array]:
    """(branch, inputs, outputs) -> weights. A program with one tile loads them where it needs them,
    one with more before its first tile."""
    load = functools.partial(self._load_weights, ref)
    if self.cut.tiles == 1:
      return load
    all_pieces = itertools.product(range(len(self.branches)), pieces, pieces)
    loaded = {which: load(*which) for which in all_pieces}
    return lambda *which: loaded[which]

  def _load_weights(self, ref, branch, inputs, outputs):
    # As JAX numbers; the mask excludes whatever is past the end of a block.
    place = (self.block, _span(inputs), self.branches[branch], _span(outputs))
    return _load(ref, place, _is_there(inputs), _is_there(outputs))

  def load_biases(self, ref, branch, outputs):
    place, mask_J = (self.block, self.branches[branch], _span(outputs)), _is_there(outputs)
    return plgpu.load(ref.at[place], mask=mask_J, other=None if mask_J is None else 0)

  def store_sums(self, ref, branch, outputs, sums_J):
    place = (self.index, self.block, self.branches[branch], _span(outputs))
    plgpu.store(ref.at[place], sums_J, mask=_is_there(outputs))


class _Tile:
  """The tokens that a program multiplies at once."""

  def __init__(self, program: _Program, index: jax.Array):
    self.program, cut = program, program.cut
    first = index * _TOKENS
    self.rows = pl.ds(first, _TOKENS)
    all_there = program.tokens % (_TOKENS * cut.tiles) == 0
    tokens_C = jax.lax.iota(jnp.int32, _TOKENS)
    self.is_token_C = None if all_there else first + tokens_C < program.tokens

  def load(self, ref, piece):
    return _load(ref, self._place(piece), self.is_token_C, _is_there(piece))

  def store(self, ref, piece, y_CJ):
    mask_CJ = _both(self.is_token_C, _is_there(piece), y_CJ.shape)
    plgpu.store(ref.at[self._place(piece)], y_CJ.astype(ref.dtype), mask=mask_CJ)

  def store_result(self, refs, branch, piece, y_CJ):
    """Stores to the given one of the arrays."""
    if self.program.cut.results == len(refs):
      return self.store(refs[branch], piece, y_CJ)
    for number, ref in enumerate(refs):
      pl.when(self.program.branches[branch] == number)(
        functools.partial(self.store, ref, piece, y_CJ)
      )
    return None

  def _place(self, piece):
    first, length, _ = piece
    return self.rows, pl.ds(self.program.block * self.program.size + first, length)


def _span(piece):
  first, length, _ = piece
  return pl.ds(jnp.int32(first), length)


def _is_there(piece) -> jax.Array | None:
  """Which channels of a piece exist; None: all."""
  _, length, real = piece
  return None if length == real else jax.lax.iota(jnp.int32, length) < real


def _load(ref, place, rows, columns):
  shape = tuple(span.size for span in place if isinstance(span, pl.Slice))
  mask = _both(rows, columns, shape)
  return plgpu.load(ref.at[place], mask=mask, other=None if mask is None else 0)


def _both(rows, columns, shape) -> jax.Array | None:
  """Where both masks are true; None if nothing is missing, because masks cost registers."""
  masks = [] if rows is None else [jnp.broadcast_to(rows[:, None], shape)]
  masks += [] if columns is None else [jnp.broadcast_to(columns[None], shape)]
  return functools.reduce(jnp.logical_and, masks) if masks else None


def _flat(x_BTR):
  return x_BTR.reshape(-1, x_BTR.shape[-1])
