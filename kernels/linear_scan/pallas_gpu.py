"""The linear recurrence as a Triton kernel, for Hopper and Ampere.

Letters of this file: K channels of a program, N chunks of a row. A program is one warp with a chunk
of `steps` tokens of one row, two channels to a thread. It goes over them from a state of zero, and
keeps each state h_t and the product p_t of the decays up to it in registers; h_t + p_t s is what
the state s before the chunk makes of it. Chunks of all rows run side by side, and each activation
is read once and written once, however few rows and channels there are.

State s comes along the row, through a small array in memory that starts as _UNKNOWN (a NaN that no
instruction makes). Every program writes there what its chunk does to a state, (p, h), and the state
behind it as soon as that is known: from the state `window` chunks before, s <- p s + h over the
chunks since. These are the operations of the row in order, so that no result ever depends on who
was first. Programs start in the order of the grid, chunks last, so that nobody waits for one that
cannot start.

Bytes per element, for x and y of 2 bytes and decays of 4: 8, the least there is, and 0.8 for that
array. The plain scan in XLA moves at least 8 and launches a kernel for every step; chunked.py at
least 14, with near 3 sqrt(T) launches.

On CPU the kernels run in Pallas' interpreter, slowly: they are there to be tested. What is public
here serves kernels/rg_lru/pallas_gpu.py too.
"""

import functools
import itertools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from kernels import gpu_math
from kernels.triton_call import on_gpu_or_interpreted, shape_of

# A warp's threads, two channels each: a cache line, of 2 bytes each.
CHANNELS = 64
# Tokens of a chunk whose states are kept: seven registers each while they are read, of the 255 that
# a thread has.
STEPS = 32
# Steps that are computed side by side, because one alone waits for every instruction. A chunk is a
# whole number of such groups. And groups whose loads are under way meanwhile.
GROUP = 8
_AHEAD = 4
# Programs that an H100 has under way (eight to a multiprocessor), and of how many chunks before it
# a program learns at once: as many as are under way, between these.
_UNDER_WAY = 1056
_WINDOWS = (4, 12)
_MOST_CHUNKS = 65_535
_UNKNOWN = int(np.uint32(0xFFABCDEF).astype(np.int32))
# What is in the array of links, for each row, chunk and channel.
_PRODUCT, _LAST, _STATE = range(3)


class Tiles(NamedTuple):
  """How rows are cut: into chunks of `steps` tokens, the last short."""

  batch: int
  time: int
  width: int
  steps: int

  @classmethod
  def of(cls, shape: tuple[int, ...], *, steps: int) -> "Tiles":
    """Chunks of x [batch, time, width]; ValueError if there are more than CUDA's grids have."""
    batch, time, width = shape
    tiles = cls(batch, time, width, steps)
    if tiles.num_chunks > _MOST_CHUNKS:
      raise ValueError(
        f"pallas_gpu: {tiles.time} tokens of a row on one device are more than {_MOST_CHUNKS} "
        f"chunks of {steps}; split rows over the mesh axis sequence, or name another implementation"
      )
    return tiles

  @property
  def num_chunks(self) -> int:
    return -(-self.time // self.steps)

  @property
  def grid(self) -> tuple[int, int, int]:
    """Programs by (channels, row, chunk); neighbours in channels run, and read, side by side."""
    return -(-self.width // CHANNELS), self.batch, self.num_chunks

  @property
  def window(self) -> int:
    """Of how many chunks a program learns at once."""
    fewest, most = _WINDOWS
    channels, rows, _ = self.grid
    return max(fewest, min(most, _UNDER_WAY // (channels * rows)))

  def packed(self, flags_BT: jax.Array, *, reverse: bool) -> jax.Array:
    """Flags as the bits of a word for each group of steps, in the order of the recurrence."""
    if reverse:
      flags_BT = flags_BT[:, ::-1]
    flags_BT = jnp.pad(flags_BT, ((0, 0), (0, self.num_chunks * self.steps - self.time)))
    flags_BNG = flags_BT.reshape(self.batch, -1, GROUP)
    return jnp.sum(jnp.where(flags_BNG, 1 << jnp.arange(GROUP), 0), axis=2, dtype=jnp.int32)

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
  tiles = Tiles.of(x_BTD.shape, steps=STEPS)
  y = shape_of(x_BTD)
  y_BTD, hT_BD = launch(
    _scan, (x_BTD, a_BTD, h0_BD), (y, tiles.state), tiles=tiles, reverse=reverse, name="linear_scan"
  )
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
  """`kernel(chunk, *array_refs, *out_refs)` for each chunk; every one sees the arrays whole."""
  call = _Launch(kernel, out_shapes, tiles, reverse, name)
  *results, _ = on_gpu_or_interpreted(call, *arrays)
  return tuple(results)


class _Launch(NamedTuple):
  """As kernels/triton_call.py wants it."""

  kernel: Callable[..., None]
  out_shapes: tuple[jax.ShapeDtypeStruct, ...]
  tiles: Tiles
  reverse: bool
  name: str

  def __call__(self, interpret: bool, *arrays: jax.Array) -> Any:
    tiles, num_inputs = self.tiles, len(arrays)
    links = jax.ShapeDtypeStruct((3 * tiles.batch, tiles.num_chunks, tiles.width), jnp.int32)
    math = gpu_math.of(interpret=interpret)

    def program(*refs):
      *inputs, _ = refs[: num_inputs + 1]
      *outputs, links_ref = refs[num_inputs + 1 :]
      self.kernel(Chunk.of(tiles, links_ref, math, reverse=self.reverse), *inputs, *outputs)

    return pl.pallas_call(
      program,
      grid=tiles.grid,
      out_shape=(*self.out_shapes, links),
      input_output_aliases={num_inputs: len(self.out_shapes)},
      compiler_params=plgpu.CompilerParams(num_warps=1, num_stages=1),
      interpret=interpret,
      name=self.name,
    )(*arrays, jnp.full(links.shape, _UNKNOWN, links.dtype))


def _scan(chunk, x_ref, a_ref, h0_ref, y_ref, hT_ref):
  states = LocalStates.none()
  for times, loaded in chunk.groups(lambda times: chunk.load_all((x_ref, a_ref), times)):
    x, a = loaded
    states.extend(chunk.keep(times, a, x), chunk.math)
  chunk.store_states(states, h0_ref, y_ref, hT_ref)


class LocalStates(NamedTuple):
  """Of a chunk's steps so far: products of decays, and states had the one before it been zero."""

  products: list[jax.Array]
  states: list[jax.Array]

  @classmethod
  def none(cls) -> "LocalStates":
    zeros_K = jnp.zeros((CHANNELS,), jnp.float32)
    return cls([zeros_K + 1.0], [zeros_K])

  def extend(self, steps: tuple[list, list], math: gpu_math.Math) -> None:
    """By the decays and the inputs of some steps."""
    for a_K, in_K in zip(*steps, strict=True):
      self.products.append(a_K * self.products[-1])
      self.states.append(math.fma(a_K, self.states[-1], in_K))


class Chunk(NamedTuple):
  """A program's tokens and channels. Values are float32 while they are here."""

  tiles: Tiles
  links_ref: Any
  math: gpu_math.Math
  row: jax.Array
  index: jax.Array
  columns: Any
  is_real_K: jax.Array | None  # None: all are
  reverse: bool

  @classmethod
  def of(cls, tiles: Tiles, links_ref: Any, math: gpu_math.Math, *, reverse: bool) -> "Chunk":
    first = pl.program_id(0) * CHANNELS
    is_real_K = None
    if tiles.width % CHANNELS:
      is_real_K = first + jax.lax.iota(jnp.int32, CHANNELS) < tiles.width
    row, index = pl.program_id(1), pl.program_id(2)
    return cls(tiles, links_ref, math, row, index, pl.ds(first, CHANNELS), is_real_K, reverse)

  @property
  def is_whole(self) -> bool:
    """Whether every chunk of the row has all its steps."""
    return self.tiles.time % self.tiles.steps == 0

  def times(self, group: Any) -> list[jax.Array]:
    """The tokens of a group of steps, in the order of the recurrence."""
    first = self.index * self.tiles.steps + group * GROUP
    if self.reverse:
      return [self.tiles.time - 1 - first - step for step in range(GROUP)]
    return [first + step for step in range(GROUP)]

  def is_inside(self, t: jax.Array) -> jax.Array | None:
    """Whether the row has step t; None where all of a chunk always are."""
    return None if self.is_whole else self._is_of_row(t)

  def _is_of_row(self, t: jax.Array) -> jax.Array:
    return (t >= 0) & (t < self.tiles.time)

  def groups(self, load: Callable[[list[jax.Array]], Any]) -> Iterator[tuple[list, Any]]:
    """All steps, a group at a time, with what `load` reads of it, well before it is used."""
    groups = [self.times(group) for group in range(self.tiles.steps // GROUP)]
    loaded = [load(times) for times in groups[:_AHEAD]]
    for number, times in enumerate(groups):
      loaded += [load(ahead) for ahead in groups[number + _AHEAD :][:1]]
      yield times, loaded[number]

  def walk(
    self,
    load: Callable[[list[jax.Array]], Any],
    compute: Callable[[list[jax.Array], Any, Any], Any],
    carry: Any,
  ) -> Any:
    """The carry of `compute(times, loaded, carry)` after all groups; one is read ahead."""
    num_groups = self.tiles.steps // GROUP

    def one_group(group, state):
      loaded, carry = state
      # Behind the last group it is read again.
      ahead = load(self.times(jnp.minimum(group + 1, num_groups - 1)))
      return ahead, compute(self.times(group), loaded, carry)

    _, carry = jax.lax.fori_loop(0, num_groups, one_group, (load(self.times(0)), carry))
    return carry

  def load_all(self, refs: tuple[Any, ...], times: list[jax.Array]) -> list[list[jax.Array]]:
    """Of each array the steps of a group."""
    return [[self.load(ref, t) for t in times] for ref in refs]

  def load(self, ref: Any, t: jax.Array) -> jax.Array:
    """Token t; 0 where there is none."""
    x_K = _load(ref.at[self.row, t, self.columns], _both(self.is_real_K, self.is_inside(t)))
    return x_K.astype(jnp.float32)

  def load_flags(self, ref: Any, times: list[jax.Array]) -> list[jax.Array]:
    """Of each step of a group, from `packed` flags."""
    first = self.tiles.time - 1 - times[0] if self.reverse else times[0]
    word = plgpu.load(ref.at[self.row, first // GROUP])
    return [(word & (1 << step)) != 0 for step in range(GROUP)]

  def store(self, ref: Any, t: jax.Array, x_K: jax.Array) -> None:
    mask = _both(self.is_real_K, self.is_inside(t))
    plgpu.store(ref.at[self.row, t, self.columns], x_K.astype(ref.dtype), mask=_full(mask))

  def load_channels(self, ref: Any) -> jax.Array:
    return _load(ref.at[self.columns], self.is_real_K)

  def load_state(self, ref: Any) -> jax.Array:
    return _load(ref.at[self.row, self.columns], self.is_real_K)

  def store_last(self, ref: Any, h_K: jax.Array) -> None:
    """By the program of the row's last chunk."""
    mask = _both(self.is_real_K, self.index == self.tiles.num_chunks - 1)
    plgpu.store(ref.at[self.row, self.columns], h_K, mask=_full(mask))

  def store_states(self, local: LocalStates, h0_ref: Any, y_ref: Any, hT_ref: Any) -> None:
    """The state after each step, and the row's last one, from that before the row."""
    first_K = self.load_state(h0_ref)
    before_K, behind_K = self.join(local.products[-1], local.states[-1], first_K)
    groups = range(self.tiles.steps // GROUP)
    times = itertools.chain.from_iterable(self.times(group) for group in groups)
    for t, product_K, state_K in zip(times, local.products[1:], local.states[1:], strict=True):
      self.store(y_ref, t, self.math.fma(product_K, before_K, state_K))
    self.store_last(hT_ref, behind_K)

  def store_summary(self, ref: Any, x_K: jax.Array) -> None:
    plgpu.store(ref.at[self.row, self.index, self.columns], x_K, mask=self.is_real_K)

  def keep(self, times: list, a: list, inputs: list) -> tuple[list, list]:
    """Decays and inputs, those of steps behind the row's end such that they change nothing."""
    if self.is_whole:
      return a, inputs
    inside = [self._is_of_row(t) for t in times]
    return (
      [jnp.where(is_inside, a_K, 1.0) for is_inside, a_K in zip(inside, a)],
      [jnp.where(is_inside, in_K, 0.0) for is_inside, in_K in zip(inside, inputs)],
    )

  def join(
    self, product_K: jax.Array, last_K: jax.Array, first_K: jax.Array
  ) -> tuple[jax.Array, jax.Array]:
    """The states before and behind this chunk, which makes `product s + last` of a state s.

    `first_K` is that before the row.
    """
    self._tell(_PRODUCT, product_K)
    self._tell(_LAST, last_K)
    before_K = self._state_before(first_K)
    behind_K = self.math.fma(product_K, before_K, last_K)
    self._tell(_STATE, behind_K)
    return before_K, behind_K

  def _state_before(self, first_K: jax.Array) -> jax.Array:
    """From the state some chunks before, over those since; waits until all of them have told."""
    window = self.tiles.window

    def look(_):
      state_K = self._told(_STATE, self.index - window)
      is_known_K = self._is_told(state_K)
      state_K = jnp.where(self.index < window, first_K, _number(state_K))
      for distance in range(window - 1, 0, -1):
        index = self.index - distance
        product_K, last_K = self._told(_PRODUCT, index), self._told(_LAST, index)
        is_known_K = is_known_K * self._is_told(product_K) * self._is_told(last_K)
        next_K = self.math.fma(_number(product_K), state_K, _number(last_K))
        state_K = jnp.where(index < 0, first_K, next_K)
      return state_K, jnp.min(is_known_K)

    start = first_K, jnp.int32(0)
    state_K, _ = jax.lax.while_loop(lambda state: state[1] == 0, look, start)
    return state_K

  def _link(self, which: int) -> jax.Array:
    return self.row + which * self.tiles.batch

  def _tell(self, which: int, x_K: jax.Array) -> None:
    bits_K = jax.lax.bitcast_convert_type(x_K, jnp.int32)
    at = self.links_ref.at[self._link(which), self.index, self.columns]
    plgpu.store(at, bits_K, mask=self.is_real_K)

  def _is_told(self, bits_K: jax.Array) -> jax.Array:
    return jnp.where(bits_K == _UNKNOWN, 0, 1)

  def _told(self, which: int, index: jax.Array) -> jax.Array:
    """Bits of what the program of another chunk told, _UNKNOWN before; 0 where there is none."""
    at = self.links_ref.at[self._link(which), jnp.clip(index, 0, self.index), self.columns]
    is_there = (index >= 0) & (index < self.index)
    # Volatile: from where other multiprocessors write to, at each look.
    return _load(at, _both(self.is_real_K, is_there), volatile=True)


def _number(bits_K: jax.Array) -> jax.Array:
  return jax.lax.bitcast_convert_type(bits_K, jnp.float32)


def _both(one: jax.Array | None, other: jax.Array | None) -> jax.Array | None:
  masks = [mask for mask in (one, other) if mask is not None]
  return functools.reduce(jnp.logical_and, masks) if masks else None


def _full(mask: jax.Array | None) -> jax.Array | None:
  return None if mask is None else jnp.broadcast_to(mask, (CHANNELS,))


def _load(at: Any, mask: jax.Array | None, *, volatile: bool = False) -> jax.Array:
  """[K], 0 where the mask is not."""
  other = None if mask is None else 0
  return plgpu.load(at, mask=_full(mask), other=other, volatile=volatile)
