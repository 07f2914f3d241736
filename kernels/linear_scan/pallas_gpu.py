"""The linear recurrence as a Triton kernel, for Hopper and Ampere; compiled for them, not run yet.

Letters of this file: K channels of a program. A program is one warp that steps
through one chunk of one row, a channel a thread; the state stays in a register, and the loads of
the next steps are under way while these are computed. Where rows x channels alone fill the chip, a
chunk is the whole row and one pass does it. Where they do not (batch 1), the chunks of a row run in
parallel, twice: first each gives its last state from zero and the product of its decays; then each
joins those before it to its first state (a loop over [K] values that are few) and steps again.

Bytes per element, for x and y of 2 bytes and decays of 4: 8 in one pass, the least there is; 14 in
two. The plain scan in XLA moves at least 8 and launches a kernel for every step; chunked.py at
least 14, with near 3 sqrt(T) launches.

On CPU the kernels run in Pallas' interpreter, slowly: they are there to be tested. What is public
here serves kernels/rg_lru/pallas_gpu.py too.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

# A warp's threads, a channel each: neighbouring programs read the other halves of its cache lines.
CHANNELS = 32
# Rows x channels from which one pass keeps enough loads in flight: 16 steps of 6 bytes each of
# 16,384 threads are 1.5 MB, near bandwidth x latency of an H100 (3.35 TB/s x 0.6 us).
_ONE_PASS = 16_384
# What chunks are cut for, in one wave: 12 warps of 160 registers fit a multiprocessor, of which an
# A100 has 108. And the shortest chunk worth another summary to read.
_THREADS = 40_960
_SHORTEST_CHUNK = 256
# Steps whose loads are issued together.
_STEPS = 16


class Tiles(NamedTuple):
  """How rows are cut: into chunks of `chunk` steps, a multiple of `steps`, the last short."""

  batch: int
  time: int
  width: int
  steps: int
  chunk: int

  @classmethod
  def of(cls, shape: tuple[int, ...], *, steps: int) -> "Tiles":
    """Chunks of x [batch, time, width]: one, or as many as give the chip enough threads."""
    batch, time, width = shape
    num_chunks = 1
    if batch * width < _ONE_PASS:
      num_chunks = max(1, min(-(-_THREADS // (batch * width)), time // _SHORTEST_CHUNK))
    groups = -(-time // (num_chunks * steps))
    return cls(batch, time, width, steps, groups * steps)

  @property
  def num_chunks(self) -> int:
    return -(-self.time // self.chunk)

  @property
  def grid(self) -> tuple[int, int, int]:
    """Programs by (channels, chunk, row); neighbours in channels run, and read, side by side."""
    return -(-self.width // CHANNELS), self.num_chunks, self.batch

  @property
  def summary(self) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct((self.batch, self.num_chunks, self.width), jnp.float32)

  @property
  def state(self) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct((self.batch, self.width), jnp.float32)


def scan(
  x_BTD: jax.Array, a_BTD: jax.Array, h0_BD: jax.Array, *, reverse: bool
) -> tuple[jax.Array, jax.Array]:
  """h_t = a_t h_{t-1} + x_t with a float32 carry; states in x's dtype, the last one float32."""
  tiles = Tiles.of(x_BTD.shape, steps=_STEPS)
  run = functools.partial(launch, tiles=tiles, reverse=reverse)
  summaries = ()
  if tiles.num_chunks > 1:
    summaries = run(
      _summarise, (x_BTD, a_BTD), (tiles.summary, tiles.summary), name="linear_scan_summaries"
    )
  y = jax.ShapeDtypeStruct(x_BTD.shape, x_BTD.dtype)
  inputs = (x_BTD, a_BTD, h0_BD, *summaries)
  y_BTD, hT_BD = run(_scan, inputs, (y, tiles.state), name="linear_scan")
  return y_BTD, hT_BD


def launch(
  kernel: Callable[..., None],
  arrays: tuple[jax.Array, ...],
  out_shapes: tuple[jax.ShapeDtypeStruct, ...],
  *,
  tiles: Tiles,
  reverse: bool,
  name: str,
) -> tuple[jax.Array, ...]:
  """One program of `kernel` for each place of the grid; every one sees the arrays whole."""

  def call(interpret: bool, *arrays: jax.Array):
    return pl.pallas_call(
      functools.partial(kernel, tiles=tiles, reverse=reverse),
      grid=tiles.grid,
      out_shape=out_shapes,
      compiler_params=plgpu.CompilerParams(num_warps=1, num_stages=1),
      interpret=interpret,
      name=name,
    )(*arrays)

  return tuple(on_gpu_or_interpreted(call, *arrays))


def on_gpu_or_interpreted(call: Callable[..., Any], *arrays: jax.Array) -> Any:
  """call(interpret, *arrays): compiled where the program is for a GPU, interpreted on CPU.

  It is the platform that the program is lowered for that counts. On others lowering fails.
  """
  return jax.lax.platform_dependent(
    *arrays, cpu=functools.partial(call, True), cuda=functools.partial(call, False)
  )


def _summarise(x_ref, a_ref, product_ref, last_ref, *, tiles, reverse):
  """What a chunk makes of the state s before it: last + product s."""
  channels = Channels.of(tiles)

  def step(_, is_inside, values, carry):
    x_K, a_K = values
    product_K, h_K = carry
    return keep(is_inside, (a_K * product_K, a_K * h_K + x_K), carry)

  zeros_K = jnp.zeros((CHANNELS,), jnp.float32)
  load = functools.partial(channels.load_steps, (x_ref, a_ref))
  product_K, last_K = walk(load, step, (zeros_K + 1.0, zeros_K), tiles, reverse=reverse)
  channels.store_summary((product_ref, last_ref), (product_K, last_K))


def _scan(x_ref, a_ref, h0_ref, *refs, tiles, reverse):
  *summary_refs, y_ref, hT_ref = refs
  channels = Channels.of(tiles)

  def step(t, is_inside, values, h_K):
    x_K, a_K = values
    (h_K,) = keep(is_inside, (a_K * h_K + x_K,), (h_K,))
    channels.store(y_ref, t, is_inside, h_K)
    return h_K

  h_K = channels.load_state(h0_ref)
  if summary_refs:
    h_K = join(summary_refs, h_K, channels, tiles, reverse=reverse)
  load = functools.partial(channels.load_steps, (x_ref, a_ref))
  h_K = walk(load, step, h_K, tiles, reverse=reverse)
  channels.store_state(hT_ref, h_K, is_last_chunk(tiles, reverse=reverse))


class Channels(NamedTuple):
  """A program's channels of its row. Values are float32 while they are here."""

  row: jax.Array
  columns: Any
  is_real_K: jax.Array

  @classmethod
  def of(cls, tiles: Tiles) -> "Channels":
    first = pl.program_id(0) * CHANNELS
    is_real_K = first + jax.lax.iota(jnp.int32, CHANNELS) < tiles.width
    return cls(pl.program_id(2), pl.ds(first, CHANNELS), is_real_K)

  def load(self, ref: Any, t: jax.Array, is_inside: jax.Array) -> jax.Array:
    """Token t; outside of the chunk anything, which `keep` and the masks of stores throw away."""
    mask_K = self.is_real_K & is_inside
    x_K = plgpu.load(ref.at[self.row, t, self.columns], mask=mask_K)
    return x_K.astype(jnp.float32)

  def load_steps(self, refs: tuple[Any, ...], t: jax.Array, is_inside: jax.Array) -> tuple:
    return tuple(self.load(ref, t, is_inside) for ref in refs)

  def store(self, ref: Any, t: jax.Array, is_inside: jax.Array, x_K: jax.Array) -> None:
    mask_K = self.is_real_K & is_inside
    plgpu.store(ref.at[self.row, t, self.columns], x_K.astype(ref.dtype), mask=mask_K)

  def load_state(self, ref: Any) -> jax.Array:
    return plgpu.load(ref.at[self.row, self.columns], mask=self.is_real_K, other=0.0)

  def store_state(self, ref: Any, h_K: jax.Array, is_mine: jax.Array) -> None:
    plgpu.store(ref.at[self.row, self.columns], h_K, mask=self.is_real_K & is_mine)

  def store_summary(self, refs: tuple[Any, ...], values: tuple[jax.Array, ...]) -> None:
    for ref, x_K in zip(refs, values):
      plgpu.store(ref.at[self.row, pl.program_id(1), self.columns], x_K, mask=self.is_real_K)


def walk(
  load: Callable[[jax.Array, jax.Array], Any],
  step: Callable[[jax.Array, jax.Array, Any, Any], Any],
  carry: Any,
  tiles: Tiles,
  *,
  reverse: bool,
) -> Any:
  """The carry after every step of this program's chunk, in order or from its end.

  `load(t, is_inside)` reads what `step(t, is_inside, values, carry)` computes with, a group of
  `tiles.steps` steps ahead. Behind the end of the chunk `is_inside` is False, and nothing may be
  read or written.
  """
  start = pl.program_id(1) * tiles.chunk
  stop = jnp.minimum(start + tiles.chunk, tiles.time)

  def steps_of(group):
    for index in range(tiles.steps):
      offset = group * tiles.steps + index
      t = start + (tiles.chunk - 1 - offset if reverse else offset)
      yield t, (t >= start) & (t < stop)

  def one_group(group, state):
    values, carry = state
    ahead = tuple(load(t, is_inside) for t, is_inside in steps_of(group + 1))
    for (t, is_inside), value in zip(steps_of(group), values):
      carry = step(t, is_inside, value, carry)
    return ahead, carry

  first = tuple(load(t, is_inside) for t, is_inside in steps_of(0))
  _, carry = jax.lax.fori_loop(0, tiles.chunk // tiles.steps, one_group, (first, carry))
  return carry


def keep(is_inside: jax.Array, new: tuple, old: tuple) -> tuple:
  """The new values inside the chunk, the old ones where steps only fill up a group."""
  return tuple(jnp.where(is_inside, n_K, o_K) for n_K, o_K in zip(new, old))


def join(summary_refs: Any, h_K: jax.Array, channels: Channels, tiles: Tiles, *, reverse: bool):
  """The state before this program's chunk, from that before the row: h = last + product h."""
  product_ref, last_ref = summary_refs
  chunk = pl.program_id(1)

  def one_chunk(index, h_K):
    at = (channels.row, tiles.num_chunks - 1 - index if reverse else index, channels.columns)
    product_K = plgpu.load(product_ref.at[at], mask=channels.is_real_K, other=0.0)
    last_K = plgpu.load(last_ref.at[at], mask=channels.is_real_K, other=0.0)
    return product_K * h_K + last_K

  return jax.lax.fori_loop(0, tiles.num_chunks - 1 - chunk if reverse else chunk, one_chunk, h_K)


def is_last_chunk(tiles: Tiles, *, reverse: bool) -> jax.Array:
  """Whether this program's chunk is the one where the walk of the row ends."""
  return pl.program_id(1) == (0 if reverse else tiles.num_chunks - 1)
