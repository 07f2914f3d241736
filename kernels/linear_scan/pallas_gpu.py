"""The linear recurrence as a Triton kernel, for Hopper and Ampere.

Letters of this file: K channels of a program, N chunks of a row, S parts of a chunk, in the order
of the recurrence. A program has a chunk of `steps` tokens of one row, and each of its warps a part
of the chunk, with two channels to a thread. A warp goes over its tokens from a state of zero, and
keeps each state h_t and the product p_t of the decays so far in registers. With the state s before
the part, the true state is h_t + p_t s. Chunks of all rows run side by side, and each activation is
read once and written once, however few rows and channels there are.

Parts are for the registers: a warp waits for memory once, with all its loads under way, and the
fewer tokens it has, the more warps fit. Chunks are for the row: the fewer there are, the less has
to be passed along it. The warps of a chunk exchange their (p, h) in shared memory.

The state s is passed along the row in a small array that starts as _UNKNOWN (a NaN that no
instruction produces). Every program writes the effect of its chunk, (p, h), to it, and later the
state after the chunk, which it computes from the state `window` chunks before: s <- p s + h over
the chunks since. The operations are always those of the row in order, so no result depends on which
program was first. Programs start in the order of the grid, with chunks as the slowest index, so
none waits for one that cannot start. Before the first chunk of a row the array has a window of
chunks without effect.

Bytes per element, for x and y of 2 bytes and decays of 4: 8, the minimum, and 0.8 for that array.
The plain scan in XLA moves at least 8 and launches a kernel for every step; chunked.py moves at
least 14, with about 3 sqrt(T) launches.

On CPU the kernels run in Pallas' interpreter, slowly, for tests. kernels/rg_lru/pallas_gpu.py uses
the public names here too.
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
from kernels.linear_scan.warp_exchange import exchanged
from kernels.triton_call import on_gpu_or_interpreted, program_ids, shape_of

# A warp's threads, two channels each: a cache line, of 2 bytes each.
CHANNELS = 64
# Tokens of a chunk, and its parts. States stay in registers: seven for each token of a part while
# it is read, of the 255 that a thread has.
_STEPS, _WARPS = 32, 1
# Steps that are computed side by side, because a single one waits for every instruction. A part is
# a whole number of such groups. And how many groups ahead loads are started.
GROUP = 8
_AHEAD = 4
# Tokens, of a program's channels, that an H100 processes at a time (16 of each of at least 16 warps
# to a multiprocessor). A program looks back over as many chunks at once as are being processed,
# within these bounds.
_UNDER_WAY = 132 * 256
_WINDOWS = (4, 12)
_MOST_CHUNKS = 65_535
_UNKNOWN = int(np.uint32(0xFFABCDEF).astype(np.int32))
# The entries of the array of links for each row, chunk and channel.
_PRODUCT, _LAST, _STATE = range(3)


class Tiles(NamedTuple):
  """How rows are cut: into chunks of `steps` tokens, the last short, of as many parts as warps."""

  batch: int
  time: int
  width: int
  steps: int
  warps: int

  @classmethod
  def of(cls, shape: tuple[int, ...], *, steps: int, warps: int) -> "Tiles":
    """Chunks of x [batch, time, width]; ValueError if there are more than CUDA's grids have."""
    assert steps % (warps * GROUP) == 0
    batch, time, width = shape
    tiles = cls(batch, time, width, steps, warps)
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
  def part(self) -> int:
    """Tokens of a warp."""
    return self.steps // self.warps

  @property
  def shape(self) -> tuple[int, int]:
    """[S, K], the shape of all values of a program, so that all are laid out alike over threads."""
    return self.warps, CHANNELS

  @property
  def grid(self) -> tuple[int, int, int]:
    """Programs by (channels, row, chunk); neighbours in channels run, and read, side by side."""
    return -(-self.width // CHANNELS), self.batch, self.num_chunks

  @property
  def window(self) -> int:
    """How many chunks a program looks back over at once."""
    fewest, most = _WINDOWS
    channels, rows, _ = self.grid
    return max(fewest, min(most, _UNDER_WAY // (self.steps * channels * rows)))

  def packed(self, flags_BT: jax.Array, *, reverse: bool) -> jax.Array:
    """Flags as the bits of a word for each group of steps, in the order of the recurrence."""
    if reverse:
      flags_BT = flags_BT[:, ::-1]
    flags_BT = jnp.pad(flags_BT, ((0, 0), (0, self.num_chunks * self.steps - self.time)))
    flags_BNG = flags_BT.reshape(self.batch, -1, GROUP)
    return jnp.sum(jnp.where(flags_BNG, 1 << jnp.arange(GROUP), 0), axis=2, dtype=jnp.int32)

  def links(self, first_BD: jax.Array) -> jax.Array:
    """The initial array of links: a window of chunks without effect, whose states are those before
    the rows, and then _UNKNOWN."""
    ones_BD = jnp.ones(first_BD.shape, jnp.float32)
    # As _PRODUCT, _LAST and _STATE.
    before_BD = jnp.concatenate([ones_BD, 0.0 * ones_BD, first_BD.astype(jnp.float32)])
    bits_BD = jax.lax.bitcast_convert_type(before_BD, jnp.int32)
    shape = 3 * self.batch, self.window + self.num_chunks, self.width
    is_before = jax.lax.broadcasted_iota(jnp.int32, shape, 1) < self.window
    return jnp.where(is_before, bits_BD[:, None], _UNKNOWN)

  @property
  def summary(self) -> jax.ShapeDtypeStruct:
    """The shape of one number for each part and channel, to be summed."""
    num_parts = self.num_chunks * self.warps
    return jax.ShapeDtypeStruct((self.batch, num_parts, self.width), jnp.float32)

  @property
  def state(self) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct((self.batch, self.width), jnp.float32)


def scan(
  x_BTD: jax.Array, a_BTD: jax.Array, h0_BD: jax.Array, *, reverse: bool
) -> tuple[jax.Array, jax.Array]:
  """h_t = a_t h_{t-1} + x_t with a float32 carry; states in x's dtype, the last one float32."""
  tiles = Tiles.of(x_BTD.shape, steps=_STEPS, warps=_WARPS)
  y = shape_of(x_BTD)
  y_BTD, hT_BD = launch(
    _scan,
    (x_BTD, a_BTD),
    (y, tiles.state),
    first_BD=h0_BD,
    tiles=tiles,
    reverse=reverse,
    name="linear_scan",
  )
  return y_BTD, hT_BD


def launch(
  kernel: Callable[..., None],
  arrays: tuple[jax.Array, ...],
  out_shapes: tuple[jax.ShapeDtypeStruct, ...],
  *,
  first_BD: jax.Array,
  tiles: Tiles,
  reverse: bool,
  name: str,
) -> tuple[jax.Array, ...]:
  """Runs `kernel(chunk, *array_refs, *out_refs)` for each chunk; each gets the whole arrays.

  `first_BD` are the states before the rows.
  """
  call = _Launch(kernel, out_shapes, tiles, reverse, name)
  *results, _ = on_gpu_or_interpreted(call, *arrays, first_BD)
  return tuple(results)


class _Launch(NamedTuple):
  """A launch for kernels/triton_call.py."""

  kernel: Callable[..., None]
  out_shapes: tuple[jax.ShapeDtypeStruct, ...]
  tiles: Tiles
  reverse: bool
  name: str

  def __call__(self, interpret: bool, *arrays: jax.Array) -> Any:
    tiles, num_inputs = self.tiles, len(arrays) - 1
    links = tiles.links(arrays[-1])
    math = gpu_math.of(interpret=interpret)

    def program(*refs):
      *inputs, _ = refs[: num_inputs + 1]
      *outputs, links_ref = refs[num_inputs + 1 :]
      self.kernel(Chunk.of(tiles, links_ref, math, reverse=self.reverse), *inputs, *outputs)

    return pl.pallas_call(
      program,
      grid=tiles.grid,
      out_shape=(*self.out_shapes, shape_of(links)),
      input_output_aliases={num_inputs: len(self.out_shapes)},
      compiler_params=plgpu.CompilerParams(num_warps=tiles.warps, num_stages=1),
      interpret=interpret,
      name=self.name,
    )(*arrays[:-1], links)


def _scan(chunk, x_ref, a_ref, y_ref, hT_ref):
  states = LocalStates.none(chunk.zeros())
  for times, loaded in chunk.groups(lambda times: chunk.load_all((x_ref, a_ref), times)):
    x, a = loaded
    states.extend(chunk.keep(times, a, x), chunk.math)
  chunk.store_states(states, y_ref, hT_ref)


class LocalStates(NamedTuple):
  """The products of decays, and the states from zero, after each step of a part so far."""

  products: list[jax.Array]
  states: list[jax.Array]

  @classmethod
  def none(cls, zeros_SK: jax.Array) -> "LocalStates":
    return cls([zeros_SK + 1.0], [zeros_SK])

  def extend(self, steps: tuple[list, list], math: gpu_math.Math) -> None:
    """Appends steps with these decays and inputs."""
    for a_SK, in_SK in zip(*steps, strict=True):
      self.products.append(a_SK * self.products[-1])
      self.states.append(math.fma(a_SK, self.states[-1], in_SK))


class Chunk(NamedTuple):
  """A program's tokens and channels. Values are float32 [S, K] while they are here."""

  tiles: Tiles
  links_ref: Any
  math: gpu_math.Math
  row: jax.Array
  index: jax.Array
  part_S1: jax.Array
  column_SK: jax.Array
  is_real_SK: jax.Array | None  # None: all are
  reverse: bool

  @classmethod
  def of(cls, tiles: Tiles, links_ref: Any, math: gpu_math.Math, *, reverse: bool) -> "Chunk":
    channels, row, index = program_ids(tiles.grid)
    column_SK = channels * CHANNELS + jax.lax.broadcasted_iota(jnp.int32, tiles.shape, 1)
    is_real_SK = column_SK < tiles.width if tiles.width % CHANNELS else None
    part_S1 = jax.lax.broadcasted_iota(jnp.int32, (tiles.warps, 1), 0)
    return cls(tiles, links_ref, math, row, index, part_S1, column_SK, is_real_SK, reverse)

  @property
  def is_whole(self) -> bool:
    """Whether every chunk of the row has all its steps."""
    return self.tiles.time % self.tiles.steps == 0

  def zeros(self) -> jax.Array:
    return jnp.zeros(self.tiles.shape, jnp.float32)

  def times(self, group: Any) -> list[jax.Array]:
    """The tokens [S, 1] of a group of steps, in the order of the recurrence."""
    first_S1 = self.index * self.tiles.steps + self.part_S1 * self.tiles.part + group * GROUP
    if self.reverse:
      return [self.tiles.time - 1 - first_S1 - step for step in range(GROUP)]
    return [first_S1 + step for step in range(GROUP)]

  def is_inside(self, t_S1: jax.Array) -> jax.Array | None:
    """Whether the row has step t; None if every chunk is whole."""
    return None if self.is_whole else self._is_of_row(t_S1)

  def _is_of_row(self, t_S1: jax.Array) -> jax.Array:
    return (t_S1 >= 0) & (t_S1 < self.tiles.time)

  def groups(self, load: Callable[[list[jax.Array]], Any]) -> Iterator[tuple[list, Any]]:
    """All steps, a group at a time, with the result of `load`, which is called well before."""
    groups = [self.times(group) for group in range(self.tiles.part // GROUP)]
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
    num_groups = self.tiles.part // GROUP

    def one_group(group, state):
      loaded, carry = state
      # After the last group, that group is read again.
      ahead = load(self.times(jnp.minimum(group + 1, num_groups - 1)))
      return ahead, compute(self.times(group), loaded, carry)

    _, carry = jax.lax.fori_loop(0, num_groups, one_group, (load(self.times(0)), carry))
    return carry

  def load_all(self, refs: tuple[Any, ...], times: list[jax.Array]) -> list[list[jax.Array]]:
    """The steps of a group, for each array."""
    return [[self.load(ref, t_S1) for t_S1 in times] for ref in refs]

  def load(self, ref: Any, t_S1: jax.Array) -> jax.Array:
    """Token t; 0 if there is none."""
    return self._load(self._token(ref, t_S1), self.is_inside(t_S1)).astype(jnp.float32)

  def load_flags(self, ref: Any, times: list[jax.Array]) -> list[jax.Array]:
    """The flag of each step of a group, from `packed` flags."""
    first_S1 = self.tiles.time - 1 - times[0] if self.reverse else times[0]
    word_S1 = plgpu.load(ref.at[self.row, jax.lax.div(first_S1, GROUP)])
    return [(word_S1 & (1 << step)) != 0 for step in range(GROUP)]

  def store(self, ref: Any, t_S1: jax.Array, x_SK: jax.Array) -> None:
    self._store(self._token(ref, t_S1), x_SK.astype(ref.dtype), self.is_inside(t_S1))

  def load_channels(self, ref: Any) -> jax.Array:
    return self._load(ref.at[self.column_SK])

  def load_state(self, ref: Any) -> jax.Array:
    return self._load(ref.at[self.row, self.column_SK])

  def store_last(self, ref: Any, h_SK: jax.Array) -> None:
    """Stores h, in the program of the row's last chunk only."""
    is_last = self.index == self.tiles.num_chunks - 1
    at = ref.at[self._by_one(self.row, ref), self.column_SK]
    self._store(at, h_SK, is_last, self._is_first_part())

  def store_states(self, local: LocalStates, y_ref: Any, hT_ref: Any) -> None:
    """Stores the state after each step, and the row's last one."""
    before_SK, behind_SK = self.join(local.products[-1], local.states[-1])
    groups = range(self.tiles.part // GROUP)
    times = itertools.chain.from_iterable(self.times(group) for group in groups)
    for t_S1, product_SK, state_SK in zip(times, local.products[1:], local.states[1:], strict=True):
      self.store(y_ref, t_S1, self.math.fma(product_SK, before_SK, state_SK))
    self.store_last(hT_ref, behind_SK)

  def store_summary(self, ref: Any, x_SK: jax.Array) -> None:
    """Stores one number for each part and channel."""
    part_S1 = self.index * self.tiles.warps + self.part_S1
    self._store(ref.at[self.row, part_S1, self.column_SK], x_SK)

  def keep(self, times: list, a: list, inputs: list) -> tuple[list, list]:
    """Decays and inputs, with those of steps past the row's end replaced by 1 and 0."""
    if self.is_whole:
      return a, inputs
    inside = [self._is_of_row(t_S1) for t_S1 in times]
    return (
      [jnp.where(is_inside, a_SK, 1.0) for is_inside, a_SK in zip(inside, a)],
      [jnp.where(is_inside, in_SK, 0.0) for is_inside, in_SK in zip(inside, inputs)],
    )

  def join(self, product_SK: jax.Array, last_SK: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The states before each part, and after the chunk; a part maps s to product s + last."""
    fma, parts = self.math.fma, range(self.tiles.warps)
    products, lasts = self._of_parts(parts, product_SK, last_SK)
    product_SK, last_SK = products[0], lasts[0]
    for next_product_SK, next_last_SK in zip(products[1:], lasts[1:]):
      last_SK = fma(next_product_SK, last_SK, next_last_SK)
      product_SK = next_product_SK * product_SK
    self._tell(_PRODUCT, product_SK)
    self._tell(_LAST, last_SK)
    state_SK = before_SK = self._state_before()
    behind_SK = fma(product_SK, state_SK, last_SK)
    self._tell(_STATE, behind_SK)
    for part in parts[1:]:
      state_SK = fma(products[part - 1], state_SK, lasts[part - 1])
      before_SK = jnp.where(self.part_S1 == part, state_SK, before_SK)
    return before_SK, behind_SK

  def _of_parts(self, parts: range, *arrays: jax.Array) -> list[list[jax.Array]]:
    """For each float32 array the values of these parts, in all parts."""
    if self.tiles.warps == 1:
      return [[x_SK] for x_SK in arrays]
    if self.math is gpu_math.of(interpret=True):
      return [[jnp.broadcast_to(x_SK[part], x_SK.shape) for part in parts] for x_SK in arrays]
    return exchanged(self.part_S1, self.column_SK, parts, arrays)

  def _state_before(self) -> jax.Array:
    """The state before this chunk, from the state `window` chunks before and the chunks since.
    Waits until all of them have written. The first part reads, for all."""

    def look(_):
      state_SK = self._told(_STATE, self.tiles.window)
      is_known_SK = _is_told(state_SK)
      state_SK = _number(state_SK)
      for distance in range(self.tiles.window - 1, 0, -1):
        product_SK, last_SK = self._told(_PRODUCT, distance), self._told(_LAST, distance)
        is_known_SK = is_known_SK * _is_told(product_SK) * _is_told(last_SK)
        state_SK = self.math.fma(_number(product_SK), state_SK, _number(last_SK))
      return state_SK, jnp.min(is_known_SK.reshape(-1))

    start = self.zeros(), jnp.int32(0)
    state_SK, _ = jax.lax.while_loop(lambda state: state[1] == 0, look, start)
    return self._of_parts(range(1), state_SK)[0][0]

  def _link(self, which: int, distance: int) -> tuple[jax.Array, jax.Array]:
    """The place in the array of links for the chunk `distance` before this one."""
    return self.row + which * self.tiles.batch, self.index + (self.tiles.window - distance)

  def _tell(self, which: int, x_SK: jax.Array) -> None:
    bits_SK = jax.lax.bitcast_convert_type(x_SK, jnp.int32)
    row, index = self._link(which, 0)
    at = self.links_ref.at[self._by_one(row, self.links_ref), index, self.column_SK]
    self._store(at, bits_SK, self._is_first_part())

  def _told(self, which: int, distance: int) -> jax.Array:
    """Bits written by another chunk's program, or _UNKNOWN; 0 in all parts but the first."""
    at = self.links_ref.at[*self._link(which, distance), self.column_SK]
    # Volatile: each read goes to the memory that other multiprocessors write to.
    return self._load(at, self._is_first_part(), volatile=True)

  def _is_first_part(self) -> jax.Array | None:
    return None if self.tiles.warps == 1 else self.part_S1 == 0

  def _by_one(self, row: jax.Array, ref: Any) -> jax.Array:
    """The row of an array for the first part, and a row outside of it for the others: where a mask
    is false the interpreter writes the old value back, which would undo the first part's write."""
    return row + self.part_S1 * ref.shape[0]

  def _token(self, ref: Any, t_S1: jax.Array) -> Any:
    # Unsigned: for the interpreter -1 is the last token, which another part may be writing.
    return ref.at[self.row, t_S1.astype(jnp.uint32), self.column_SK]

  def _load(self, at: Any, *masks: jax.Array | None, volatile: bool = False) -> jax.Array:
    """[S, K], 0 where a mask is false."""
    mask_SK = self._all(*masks)
    other = None if mask_SK is None else 0
    return plgpu.load(at, mask=mask_SK, other=other, volatile=volatile)

  def _store(self, at: Any, x_SK: jax.Array, *masks: jax.Array | None) -> None:
    plgpu.store(at, x_SK, mask=self._all(*masks))

  def _all(self, *masks: jax.Array | None) -> jax.Array | None:
    """Where the channel exists and all masks are true."""
    given = [mask for mask in (self.is_real_SK, *masks) if mask is not None]
    if not given:
      return None
    return jnp.broadcast_to(functools.reduce(jnp.logical_and, given), self.tiles.shape)


def _is_told(bits_SK: jax.Array) -> jax.Array:
  return jnp.where(bits_SK == _UNKNOWN, 0, 1)


def _number(bits_SK: jax.Array) -> jax.Array:
  return jax.lax.bitcast_convert_type(bits_SK, jnp.float32)
