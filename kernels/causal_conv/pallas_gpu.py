"""The short convolution as Triton kernels, which read and write every activation once.

Letters of this file: C channels of a program, N chunks of a row, S sums over tokens. A program is
one warp with some tokens of one row and two channels to a thread. It goes over the tokens with the
K-1 inputs before (and, backward, the K-1 gradients after) in registers.

Bytes per element, for activations of 2 bytes:

  forward    reads x; writes y                              4
  backward   reads x and two gradients of y; writes dx      8

A program sums over its own tokens, in float32; XLA adds the sums of all programs, 4 (K + 2) bytes
for each 64 tokens. The bits of a word say which taps of a token belong to its document.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from kernels.causal_conv.links import link_words
from kernels.triton_call import on_gpu_or_interpreted, program_ids, shape_of

# A warp's threads, two channels each: a cache line, of 2 bytes each.
_CHANNELS = 64
# Tokens of a program, and how many of them are read side by side.
_STEPS = 64
_GROUP = 8
# Bits of a word.
_MOST_TAPS = 31


def forward(
  x_BTR: jax.Array, b_in_R: jax.Array, w_KR: jax.Array, b_R: jax.Array, same: list[jax.Array]
) -> jax.Array:
  """y in the dtype of x. `same[d - 1]`: whether the token d before belongs to the same document."""
  shape, taps = x_BTR.shape, w_KR.shape[0]
  call = _Call(_forward, (shape_of(x_BTR),), shape, taps, "causal_conv_forward")
  (y_BTR,) = on_gpu_or_interpreted(
    call, x_BTR, b_in_R, w_KR, b_R, link_words(same, shape, "pallas_gpu", _MOST_TAPS)
  )
  return y_BTR


def backward(
  x_BTR: jax.Array,
  b_in_R: jax.Array,
  w_KR: jax.Array,
  same: list[jax.Array],
  dy_BTR: jax.Array,
  more_dy_BTR: jax.Array,
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
  """dx in the dtype of x; those of b_in, w and b in float32."""
  shape, taps = x_BTR.shape, w_KR.shape[0]
  batch, time, width = shape
  sums = jax.ShapeDtypeStruct((batch, pl.cdiv(time, _STEPS), taps + 2, width), jnp.float32)
  call = _Call(_backward, (shape_of(x_BTR), sums), shape, taps, "causal_conv_backward")
  arrays = (
    x_BTR,
    dy_BTR,
    more_dy_BTR,
    b_in_R,
    w_KR,
    link_words(same, shape, "pallas_gpu", _MOST_TAPS),
  )
  dx_BTR, sums_BNSR = on_gpu_or_interpreted(call, *arrays)
  sums_SR = jnp.sum(sums_BNSR, axis=(0, 1))
  return dx_BTR, sums_SR[taps + 1], sums_SR[:taps], sums_SR[taps]


class _Call(NamedTuple):
  """A program for each few channels and tokens."""

  kernel: Callable[..., None]
  results: tuple[jax.ShapeDtypeStruct, ...]
  shape: tuple[int, ...]
  taps: int
  name: str

  def __call__(self, interpret: bool, *arrays: jax.Array) -> Any:
    batch, time, width = self.shape
    grid = pl.cdiv(width, _CHANNELS), batch, pl.cdiv(time, _STEPS)
    return pl.pallas_call(
      lambda *refs: self.kernel(_Chunk.of(grid, time, width), self.taps, *refs),
      grid=grid,
      out_shape=self.results,
      compiler_params=plgpu.CompilerParams(num_warps=1, num_stages=1),
      interpret=interpret,
      name=self.name,
    )(*arrays)


class _Chunk(NamedTuple):
  """A program's tokens and channels. Values are float32 while they are here."""

  row: jax.Array
  index: jax.Array
  columns: Any
  is_real_C: jax.Array | None  # None: all are
  time: int

  @classmethod
  def of(cls, grid: tuple[int, ...], time: int, width: int) -> "_Chunk":
    channels, row, index = program_ids(grid)
    first = channels * _CHANNELS
    is_real_C = None
    if width % _CHANNELS:
      is_real_C = first + jax.lax.iota(jnp.int32, _CHANNELS) < width
    return cls(row, index, pl.ds(first, _CHANNELS), is_real_C, time)

  @property
  def start(self) -> jax.Array:
    return self.index * _STEPS

  @property
  def is_whole(self) -> bool:
    """Whether every program has all its tokens."""
    return self.time % _STEPS == 0

  def times(self, group: jax.Array) -> list[jax.Array]:
    first = self.start + group * _GROUP
    return [first + step for step in range(_GROUP)]

  def walk(self, one_group: Callable[[jax.Array, Any], Any], carry: Any) -> Any:
    return jax.lax.fori_loop(0, _STEPS // _GROUP, one_group, carry)

  def load(self, ref: Any, t: jax.Array, *, may_miss: bool) -> jax.Array:
    """Token t; 0 where there is none."""
    if not may_miss:
      return self._load(ref.at[self.row, t, self.columns], self.is_real_C)
    t_inside = jnp.clip(t, 0, self.time - 1)
    return self._load(
      ref.at[self.row, t_inside, self.columns], self._where((t >= 0) & (t < self.time))
    )

  def load_links(self, ref: Any, t: jax.Array) -> jax.Array:
    """The word of token t; 0 where there is none."""
    word = plgpu.load(ref.at[self.row, jnp.minimum(t, self.time - 1)])
    return jnp.where(t < self.time, word, 0)

  def load_channels(self, ref: Any) -> jax.Array:
    return self._load(ref.at[self.columns], self.is_real_C)

  def load_taps(self, ref: Any, taps: int) -> list[jax.Array]:
    return [self._load(ref.at[jnp.int32(tap), self.columns], self.is_real_C) for tap in range(taps)]

  def store(self, ref: Any, t: jax.Array, x_C: jax.Array) -> None:
    mask_C = self.is_real_C if self.is_whole else self._where(t < self.time)
    plgpu.store(ref.at[self.row, t, self.columns], x_C.astype(ref.dtype), mask=mask_C)

  def store_sum(self, ref: Any, index: int, x_C: jax.Array) -> None:
    at = ref.at[self.row, self.index, jnp.int32(index), self.columns]
    plgpu.store(at, x_C, mask=self.is_real_C)

  def _where(self, is_there: jax.Array) -> jax.Array:
    is_there_C = jnp.broadcast_to(is_there, (_CHANNELS,))
    return is_there_C if self.is_real_C is None else is_there_C & self.is_real_C

  def _load(self, at: Any, mask_C: jax.Array | None) -> jax.Array:
    other = None if mask_C is None else 0
    return plgpu.load(at, mask=mask_C, other=other).astype(jnp.float32)


def _has(word: jax.Array, distance: int) -> jax.Array:
  return (word & (1 << distance)) != 0


def _inputs(chunk: _Chunk, x_ref, b_in_C, t, *, may_miss: bool) -> jax.Array:
  """z_t: with the bias, rounded as the convolution's input is."""
  z_C = chunk.load(x_ref, t, may_miss=may_miss) + b_in_C
  return z_C.astype(x_ref.dtype).astype(jnp.float32)


def _forward(chunk, taps, x_ref, b_in_ref, w_ref, b_ref, links_ref, y_ref):
  history = taps - 1
  b_in_C, b_C = chunk.load_channels(b_in_ref), chunk.load_channels(b_ref)
  w, inputs = chunk.load_taps(w_ref, taps), functools.partial(_inputs, chunk, x_ref, b_in_C)

  def one_group(group, before):
    times = chunk.times(group)
    z = [*before, *(inputs(t, may_miss=not chunk.is_whole) for t in times)]
    links = [chunk.load_links(links_ref, t) for t in times]
    for step, t in enumerate(times):
      y_C = z[step + history] * w[history] + b_C
      for distance in range(1, taps):
        tap_C = jnp.where(_has(links[step], distance), z[step + history - distance], 0.0)
        y_C += tap_C * w[history - distance]
      chunk.store(y_ref, t, y_C)
    return tuple(z[_GROUP:])

  first = chunk.start - history
  chunk.walk(one_group, tuple(inputs(first + step, may_miss=True) for step in range(history)))


def _backward(
  chunk, taps, x_ref, dy_ref, more_dy_ref, b_in_ref, w_ref, links_ref, dx_ref, sums_ref
):
  history, b_in_C = taps - 1, chunk.load_channels(b_in_ref)
  w, inputs = chunk.load_taps(w_ref, taps), functools.partial(_inputs, chunk, x_ref, b_in_C)

  def gradients(t):
    return chunk.load(dy_ref, t, may_miss=True) + chunk.load(more_dy_ref, t, may_miss=True)

  def one_group(group, carry):
    before, behind, links_behind, sums = carry
    times, sums = chunk.times(group), list(sums)
    # For this group: its inputs, and the gradients and links of `history` tokens later.
    z = [*before, *(inputs(t, may_miss=not chunk.is_whole) for t in times)]
    dy = [*behind, *(gradients(t + history) for t in times)]
    links = [*links_behind, *(chunk.load_links(links_ref, t + history) for t in times)]
    for step, t in enumerate(times):
      dx_C = w[history] * dy[step]
      sums[history] += dy[step] * z[step + history]
      for distance in range(1, taps):
        later_C = jnp.where(_has(links[step + distance], distance), dy[step + distance], 0.0)
        dx_C += w[history - distance] * later_C
        product_C = dy[step] * z[step + history - distance]
        sums[history - distance] += jnp.where(_has(links[step], distance), product_C, 0.0)
      sums[taps] += dy[step]
      # After the row all gradients are 0.
      sums[taps + 1] += dx_C
      chunk.store(dx_ref, t, dx_C)
    return tuple(z[_GROUP:]), tuple(dy[_GROUP:]), tuple(links[_GROUP:]), tuple(sums)

  history_steps = range(history)
  carry = (
    tuple(inputs(chunk.start - history + step, may_miss=True) for step in history_steps),
    tuple(gradients(chunk.start + step) for step in history_steps),
    tuple(chunk.load_links(links_ref, chunk.start + step) for step in history_steps),
    (jnp.zeros((_CHANNELS,), jnp.float32),) * (taps + 2),
  )
  *_, sums = chunk.walk(one_group, carry)
  for index, sum_C in enumerate(sums):
    chunk.store_sum(sums_ref, index, sum_C)
