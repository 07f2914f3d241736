"""Two block-diagonal products as Triton kernels, nothing put in another order before or behind.

With activations of 2 bytes, a channel and token, beside einsum_rounded.py's 16 and 30:

  forward    reads x; writes r, i                                          6 bytes
  backward   reads dr, di; writes dx; the products of dw read x, dr, x, di      14

Letters of this file: P tokens of the whole batch, C tokens of a program, I and J channels that go
into a piece of a block and come out of it.

A program has a block and some tokens. Triton's arrays have powers of two: a block of 160 channels
is pieces of 128 and 32, each piece of a result the sum of a product for each piece of x. The
gradients of the weights are left to XLA: sums over all tokens, which a program has few of.
Those of the biases begin here, summed over the tokens of a program.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from kernels.block_diagonal import einsum_rounded
from kernels.triton_call import on_gpu_or_interpreted, shape_of

_TOKENS = 64
_MOST, _LEAST = 128, 16


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
  call = _Call(_forward_kernel, results, blocks, size, "block_diagonal_forward")
  r_PR, i_PR = on_gpu_or_interpreted(call, x_PR, w_GI2J, b_G2J)
  return r_PR.reshape(x_BTR.shape), i_PR.reshape(x_BTR.shape)


def backward(
  x_BTR: jax.Array, w_GI2J: jax.Array, dr_BTR: jax.Array, di_BTR: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """dx in the dtype of x, dw in that of w, db in float32."""
  blocks, size = w_GI2J.shape[:2]
  dr_PR = _flat(dr_BTR)
  sums = jax.ShapeDtypeStruct((_num_tiles(dr_PR), blocks, 2, size), jnp.float32)
  call = _Call(_backward_kernel, (shape_of(dr_PR), sums), blocks, size, "block_diagonal_backward")
  dx_PR, sums_NG2J = on_gpu_or_interpreted(call, dr_PR, _flat(di_BTR), w_GI2J)
  dw_GI2J = einsum_rounded.weight_gradients(x_BTR, w_GI2J, dr_BTR, di_BTR)
  return dx_PR.reshape(x_BTR.shape), dw_GI2J, jnp.sum(sums_NG2J, axis=0)


def _num_tiles(x_PR: jax.Array) -> int:
  return pl.cdiv(x_PR.shape[0], _TOKENS)


class _Call(NamedTuple):
  """A program for each block and each few tokens of the first array."""

  kernel: Callable[..., None]
  results: tuple[jax.ShapeDtypeStruct, ...]
  blocks: int
  size: int
  name: str

  def __call__(self, interpret: bool, *arrays: jax.Array) -> Any:
    return pl.pallas_call(
      functools.partial(self.kernel, size=self.size),
      # The blocks of a token beside each other: together they read and write whole rows of memory.
      grid=(self.blocks, _num_tiles(arrays[0])),
      out_shape=self.results,
      compiler_params=plgpu.CompilerParams(num_warps=4, num_stages=2),
      interpret=interpret,
      name=self.name,
    )(*arrays)


def _forward_kernel(x_ref, w_ref, b_ref, r_ref, i_ref, *, size):
  tile, pieces = _Tile(x_ref.shape[0], size), _pieces(size)
  x_CI = [tile.load(x_ref, piece) for piece in pieces]
  for branch, y_ref in enumerate((r_ref, i_ref)):
    for outputs in pieces:
      y_CJ = sum(
        plgpu.dot(x, tile.load_weights(w_ref, branch, inputs, outputs))
        for x, inputs in zip(x_CI, pieces, strict=True)
      )
      tile.store(y_ref, outputs, y_CJ + tile.load_biases(b_ref, branch, outputs)[None])


def _backward_kernel(dr_ref, di_ref, w_ref, dx_ref, sums_ref, *, size):
  tile, pieces = _Tile(dr_ref.shape[0], size), _pieces(size)
  dy_CJ = [[tile.load(dy_ref, piece) for piece in pieces] for dy_ref in (dr_ref, di_ref)]
  for inputs in pieces:
    dx_CI = sum(
      plgpu.dot(dy, tile.load_weights(w_ref, branch, inputs, outputs), trans_b=True)
      for branch in range(2)
      for dy, outputs in zip(dy_CJ[branch], pieces, strict=True)
    )
    tile.store(dx_ref, inputs, dx_CI)
  for branch in range(2):
    for dy, outputs in zip(dy_CJ[branch], pieces, strict=True):
      tile.store_sums(sums_ref, branch, outputs, jnp.sum(dy.astype(jnp.float32), axis=0))


def _pieces(size: int) -> list[tuple[int, int, int]]:
  """The channels of a block: (first, how many an array has, how many of those there are)."""
  pieces, first = [], 0
  while first < size:
    left = size - first
    length = min(_MOST, max(_LEAST, 1 << left.bit_length() - 1))
    pieces.append((first, length, min(length, left)))
    first += length
  return pieces


class _Tile:
  """The tokens and the block of a program; what is not there is loaded as 0."""

  def __init__(self, tokens: int, size: int):
    self.size, self.block, self.tile = size, pl.program_id(0), pl.program_id(1)
    first = self.tile * _TOKENS
    self.rows = pl.ds(first, _TOKENS)
    all_there = tokens % _TOKENS == 0
    self.is_token_C = None if all_there else first + jax.lax.iota(jnp.int32, _TOKENS) < tokens

  def load(self, ref, piece):
    return _load(ref, self._place(piece), self.is_token_C, _is_there(piece))

  def store(self, ref, piece, y_CJ):
    mask_CJ = _both(self.is_token_C, _is_there(piece), y_CJ.shape)
    plgpu.store(ref.at[self._place(piece)], y_CJ.astype(ref.dtype), mask=mask_CJ)

  def load_weights(self, ref, branch, inputs, outputs):
    # Numbers of JAX: what is past the end of a block is for the mask to leave out.
    place = (self.block, _span(inputs), jnp.int32(branch), _span(outputs))
    return _load(ref, place, _is_there(inputs), _is_there(outputs))

  def load_biases(self, ref, branch, outputs):
    place, mask_J = (self.block, jnp.int32(branch), _span(outputs)), _is_there(outputs)
    return plgpu.load(ref.at[place], mask=mask_J, other=None if mask_J is None else 0)

  def store_sums(self, ref, branch, outputs, sums_J):
    place = (self.tile, self.block, jnp.int32(branch), _span(outputs))
    plgpu.store(ref.at[place], sums_J, mask=_is_there(outputs))

  def _place(self, piece):
    first, length, _ = piece
    return self.rows, pl.ds(self.block * self.size + first, length)


def _span(piece):
  first, length, _ = piece
  return pl.ds(jnp.int32(first), length)


def _is_there(piece) -> jax.Array | None:
  """Which channels of a piece there are; None: all."""
  _, length, real = piece
  return None if length == real else jax.lax.iota(jnp.int32, length) < real


def _load(ref, place, rows, columns):
  shape = tuple(span.size for span in place if isinstance(span, pl.Slice))
  mask = _both(rows, columns, shape)
  return plgpu.load(ref.at[place], mask=mask, other=None if mask is None else 0)


def _both(rows, columns, shape) -> jax.Array | None:
  """Where both are there, and None where nothing is missing: masks cost registers."""
  masks = [] if rows is None else [jnp.broadcast_to(rows[:, None], shape)]
  masks += [] if columns is None else [jnp.broadcast_to(columns[None], shape)]
  return functools.reduce(jnp.logical_and, masks) if masks else None


def _flat(x_BTR):
  return x_BTR.reshape(-1, x_BTR.shape[-1])
