"""From tokens to logits: embed, scan over the blocks, final norm, unembedding.

`build(config)` gives a `Model` of pure functions; nothing outside models/ sees a module. Parameters
are a plain dict:

  embedding/table_VD      also the unembedding, where that is tied
  groups/<run>/...        the pattern, repeated: a run is a stretch of equal blocks in it, stacked
                          [groups, blocks in the run, ...]
  remainder/<run>/...     the blocks left over when the depth is no multiple of the pattern
  final_norm/scale_D
  unembedding/table_VD    where it is a table of its own

Groups are scanned, and the blocks of a run inside them unless they are two: what is compiled does
not grow with depth.
"""

import dataclasses
import functools
import itertools
from collections.abc import Callable
from typing import Any, ClassVar, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from models import kernel_fields, observe, remat
from models.block import BlockConfig
from models.layers import norms
from models.layers import segments as segments_lib
from models.layers import state as state_lib
from models.layers.cut import cut_steps
from models.layers.embedding import Embedding, Unembedding, cap_logits
from models.layers.segments import Segments, SegmentState
from models.param import declared_of
from models.remat import Remat, SavedNames
from sharding import logical

Params = dict[str, Any]
DType = Literal["float32", "bfloat16"]
EmbeddingScale = Literal["none", "sqrt_width"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class DecoderConfig:
  """A decoder: `pattern` repeats and is cut off after `num_blocks` blocks.

  embedding_scale  "sqrt_width": embedded tokens times sqrt(width), rounded to bfloat16, as in
                   RecurrentGemma
  final_norm       may carry a state along the row (models/layers/norms.py)
  unembedding      "tied": the table of the embedding; "own": another one
  logit_cap        c bounds logits as c tanh(logits / c)
  dtype            of activations
  param_dtype      of all parameters that are not declared float32 (models/param.py)
  remat            what the backward pass computes again. "block": everything but block inputs.
                   "matmuls": attention, scans, gates and elementwise work. "none": elementwise work
                   and the gates' products only; storing these would cost more than computing them.
                   With the Triton kernels and layers="unroll" the gates' products are kept too
  layers           "scan" loops over blocks. "unroll" trains without that loop: it compiles longer
                   and is faster on GPUs
  """

  recorded_as: ClassVar[str] = "models.decoder.DecoderConfig"

  vocab_size: int
  width: int
  num_blocks: int
  pattern: tuple[BlockConfig, ...]
  embedding_scale: EmbeddingScale = "none"
  final_norm: norms.NormConfig = norms.Config()
  unembedding: Literal["tied", "own"] = "tied"
  logit_cap: float | None = None
  dtype: DType = "bfloat16"
  param_dtype: DType = "float32"
  remat: Remat = "block"
  layers: Literal["scan", "unroll"] = "scan"

  def __post_init__(self):
    for name in ("vocab_size", "width", "num_blocks"):
      if getattr(self, name) < 1:
        raise ValueError(f"DecoderConfig: {name} {getattr(self, name)} must be at least 1")
    if not self.pattern:
      raise ValueError("DecoderConfig: pattern is empty; give at least one residual_block.Config")
    for index, (block, after) in enumerate(itertools.pairwise(self.pattern)):
      same = kernel_fields.without_kernels(block) == kernel_fields.without_kernels(after)
      if same and block != after:
        named = _kernels(block), _kernels(after)
        raise ValueError(
          f"DecoderConfig: pattern[{index}] and pattern[{index + 1}] are the same block, whose "
          f"parameters are stacked, but name other kernels: {named[0]} and {named[1]}; name the "
          "same in both"
        )
    if self.logit_cap is not None and not 0 < self.logit_cap < float("inf"):
      raise ValueError(
        f"DecoderConfig: logit_cap {self.logit_cap} must be above 0 and finite, or None"
      )
    for name, choices in _CHOICES.items():
      if getattr(self, name) not in choices:
        raise ValueError(f"DecoderConfig: {name} {getattr(self, name)!r} is none of {choices}")

  @property
  def blocks(self) -> tuple[BlockConfig, ...]:
    """Every block's config, first to last."""
    return tuple(itertools.islice(itertools.cycle(self.pattern), self.num_blocks))

  @property
  def blocks_wait(self) -> bool:
    """Whether a block's gradient has to be there before the block is computed again.

    With remat "block" the blocks of a group are in one loop: without that, what is computed of all
    is held at once. Nothing is then shared between the forward pass and what is computed again.
    """
    return self.remat == "block" and len(self.pattern) > 1

  def resolved(self) -> "DecoderConfig":
    """This config with the kernels that run on the target platform (kernels/dispatch.py) named."""
    return kernel_fields.resolved(self, self.dtype)

  def kernels(self) -> dict[str, str]:
    """Op -> implementation on the target platform, of the first block that has the op."""
    found: dict[str, str] = {}
    for field in kernel_fields.marked(self.resolved()):
      found.setdefault(field.op, field.name)
    return found


def _kernels(block: BlockConfig) -> dict[str, str]:
  """The kernels that a block names, by field."""
  return {field.path: field.name for field in kernel_fields.marked(block)}


_CHOICES = {
  "embedding_scale": ("none", "sqrt_width"),
  "unembedding": ("tied", "own"),
  "dtype": ("float32", "bfloat16"),
  "param_dtype": ("float32", "bfloat16"),
  "remat": ("none", "block", "matmuls"),
  "layers": ("scan", "unroll"),
}


# Two equal blocks inside a group are no loop of their own: what a loop's blocks keep for the
# backward pass it collects, only to be copied whole into what the loop over the groups collects.
_WRITTEN_OUT = 2


class State(NamedTuple):
  """What a split or decoded sequence carries from chunk to chunk."""

  segments: SegmentState
  blocks: dict[str, Any]
  final_norm: Any = None  # None, unless it is a RowNorm


class Model(NamedTuple):
  """A built model. Shapes as in models/__init__.py; unembed_VD is in the activations' dtype."""

  config: DecoderConfig
  axes: Params  # the names of each parameter's dimensions, in the tree of the parameters
  float32: Params  # whether it is float32 whatever the config's dtypes
  decays: Params  # whether weight decay applies to it
  shapes: Params  # the ShapeDtypeStruct of each parameter
  init: Callable[[jax.Array], Params]  # (key)
  apply: Callable[..., tuple[jax.Array, jax.Array]]  # (params, tokens_BT, segments_BT) -> x, E
  logits: Callable[..., jax.Array]  # (params, tokens_BT, segments_BT) -> float32 [B, T, V]
  initial_state: Callable[..., State]  # (batch, context): global attention sees `context` tokens
  extend: Callable[..., tuple[jax.Array, jax.Array, State]]  # (params, tokens, segments, state)
  prefill: Callable[..., tuple[jax.Array, jax.Array, State]]  # (params, tokens, segments, context)
  cast: Callable[[Params], Params]  # in the dtypes that layers use: once, where they are used often
  observe: Callable[..., Params]  # (params, tokens_BT, segments_BT) -> what blocks tell, stacked


def build(config: DecoderConfig) -> Model:
  """The model of `config`; kernels are chosen here, once. No array is made."""
  decoder = _Decoder(config)
  shapes = jax.eval_shape(decoder.init, jax.random.key(0))
  return Model(
    config,
    jax.tree.map(lambda one: one.axes, decoder.declared),
    jax.tree.map(lambda one: one.float32, decoder.declared),
    jax.tree.map(lambda one: one.decays, decoder.declared),
    shapes,
    decoder.init,
    decoder.apply,
    decoder.logits,
    decoder.initial_state,
    decoder.extend,
    decoder.prefill,
    decoder.cast,
    decoder.observe,
  )


class _Part(NamedTuple):
  """A module as functions of its parameters: `merge(params)` is the module holding them."""

  init: Callable[[jax.Array], Params]
  merge: Callable[[Params], Any]
  declared: Params  # what models/param.py: Declared says of each

  @property
  def axes(self) -> Params:
    return jax.tree.map(lambda one: one.axes, self.declared)


def _part(make: Callable[[nnx.Rngs], Any], param_dtype: str) -> _Part:
  """The functional form of the module that `make` builds."""
  graph, abstract = nnx.split(nnx.eval_shape(lambda: make(nnx.Rngs(0))), nnx.Param)

  def init(key: jax.Array) -> Params:
    params = nnx.to_pure_dict(nnx.state(make(nnx.Rngs(params=key)), nnx.Param))
    return jax.tree.map(
      lambda w, one: w.astype(jnp.float32 if one.float32 else param_dtype), params, declared
    )

  def merge(params: Params) -> Any:
    state = jax.tree.map(lambda leaf: leaf, abstract)
    nnx.replace_by_pure_dict(state, params)
    return nnx.merge(graph, state)

  variables = nnx.to_flat_state(abstract)
  declared: Params = {}
  for path, variable in variables:
    inner = declared
    for name in path[:-1]:
      inner = inner.setdefault(str(name), {})
    inner[str(path[-1])] = declared_of(variable)
  return _Part(init, merge, declared)


class _Run(NamedTuple):
  """`length` equal blocks in a row."""

  name: str
  part: _Part
  length: int
  saved: SavedNames


def _runs(blocks: tuple[BlockConfig, ...], config: DecoderConfig) -> list[_Run]:
  runs = []
  for block, equal in itertools.groupby(blocks):
    part = _part(
      lambda rngs, block=block: block.build(config.width, num_blocks=config.num_blocks, rngs=rngs),
      config.param_dtype,
    )
    runs.append(_Run(f"{len(runs)}", part, len(list(equal)), block.saved_names()))
  return runs


class _Decoder:
  """The parts of one decoder and the functions over them; holds no array."""

  def __init__(self, config: DecoderConfig):
    self.config = config
    self.num_groups, num_left = divmod(config.num_blocks, len(config.pattern))
    self.group_runs = _runs(config.pattern, config) if self.num_groups else []
    self.left_runs = _runs(config.pattern[:num_left], config)
    self.embedding = _part(
      lambda rngs: Embedding(config.vocab_size, config.width, rngs=rngs), config.param_dtype
    )
    self.final_norm = _part(
      lambda rngs: config.final_norm.build(config.width, rngs=rngs), config.param_dtype
    )
    self.unembedding: _Part | None = None
    if config.unembedding == "own":
      self.unembedding = _part(
        lambda rngs: Unembedding(config.vocab_size, config.width, rngs=rngs), config.param_dtype
      )
    self.declared: Params = {
      "embedding": self.embedding.declared,
      "groups": {run.name: _stacked(run.part.declared, 2) for run in self.group_runs},
      "remainder": {run.name: _stacked(run.part.declared, 1) for run in self.left_runs},
      "final_norm": self.final_norm.declared,
    }
    if self.unembedding is not None:
      self.declared["unembedding"] = self.unembedding.declared

  def init(self, key: jax.Array) -> Params:
    """Every parameter, from one typed key; the values do not depend on how they are sharded."""
    embedding_key, group_key, left_key = jax.random.split(key, 3)

    def stack(run: _Run, key: jax.Array, shape: tuple[int, ...]) -> Params:
      init = run.part.init
      for _ in shape:
        init = jax.vmap(init)
      return init(jax.random.split(jax.random.fold_in(key, int(run.name)), shape))

    params = {
      "embedding": self.embedding.init(embedding_key),
      "groups": {
        run.name: stack(run, group_key, (self.num_groups, run.length)) for run in self.group_runs
      },
      "remainder": {run.name: stack(run, left_key, (run.length,)) for run in self.left_runs},
      "final_norm": self.final_norm.init(embedding_key),
    }
    if self.unembedding is not None:
      params["unembedding"] = self.unembedding.init(jax.random.fold_in(embedding_key, 1))
    return params

  def apply(
    self, params: Params, tokens_BT: jax.Array, segments_BT: jax.Array
  ) -> tuple[jax.Array, jax.Array]:
    """Hidden states after the final norm, and the unembedding; rows begin without history."""
    x_BTD, unembed_VD, *_ = self._forward(params, tokens_BT, segments_BT, None)
    return x_BTD, unembed_VD

  def logits(self, params: Params, tokens_BT: jax.Array, segments_BT: jax.Array) -> jax.Array:
    """Float32 logits [batch, time, vocabulary], capped if the config says so."""
    x_BTD, unembed_VD = self.apply(params, tokens_BT, segments_BT)
    return cap_logits(x_BTD, unembed_VD, self.config.logit_cap)

  def extend(
    self, params: Params, tokens_BT: jax.Array, segments_BT: jax.Array, state: State
  ) -> tuple[jax.Array, jax.Array, State]:
    """As `apply`, going on from `state`: any number of tokens, one for a decoding step."""
    x_BTD, unembed_VD, after, _ = self._forward(params, tokens_BT, segments_BT, state)
    assert after is not None
    return x_BTD, unembed_VD, after

  def prefill(
    self, params: Params, tokens_BT: jax.Array, segments_BT: jax.Array, context: int
  ) -> tuple[jax.Array, jax.Array, State]:
    """As `extend` from the initial state, with less work: attention reads no empty cache."""
    state = self.initial_state(tokens_BT.shape[0], context)
    x_BTD, unembed_VD, after, _ = self._forward(
      params, tokens_BT, segments_BT, state, is_first=True
    )
    assert after is not None
    return x_BTD, unembed_VD, after

  def cast(self, params: Params) -> Params:
    """The parameters in the dtypes that layers use them in, as every call casts them."""
    return self._cast(params, self.declared)

  def observe(self, params: Params, tokens_BT: jax.Array, segments_BT: jax.Array) -> Params:
    """The values that every block records on these rows (models/observe.py), by name: "groups"
    and "remainder" as of the parameters, so that models/stacks.py gives each block its own."""
    with observe.collecting():
      *_, seen = self._forward(params, tokens_BT, segments_BT, None)
    return seen

  def initial_state(self, batch: int, context: int) -> State:
    """The state before the first token. `context` is how many tokens global attention can see, so
    at least the length of prompt and continuation; local attention and recurrence ignore it."""
    if batch < 1:
      raise ValueError(f"initial_state: batch {batch} must be at least 1")

    def stack(run: _Run, shape: tuple[int, ...]) -> Any:
      block = run.part.merge(self._no_array(run.part))
      one = block.initial_state(batch, context, jnp.dtype(self.config.dtype))
      return jax.tree.map(lambda leaf: jnp.broadcast_to(leaf, (*shape, *leaf.shape)), one)

    groups = {run.name: stack(run, (self.num_groups, run.length)) for run in self.group_runs}
    left = {run.name: stack(run, (run.length,)) for run in self.left_runs}
    blocks = {"groups": groups, "remainder": left}
    norm = self.final_norm.merge(self._no_array(self.final_norm))
    final_norm = None
    if isinstance(norm, norms.RowNorm):
      final_norm = norm.initial_state(batch, context, jnp.dtype(self.config.dtype))
    return State(segments_lib.initial_state(batch), blocks, final_norm)

  def _forward(
    self,
    params: Params,
    tokens_BT: jax.Array,
    segments_BT: jax.Array,
    state: State | None,
    *,
    is_first: bool = False,
  ) -> tuple[jax.Array, jax.Array, State | None, dict[str, Any]]:
    """Hidden states, unembedding, the state after the rows, what blocks told of themselves."""
    segments_lib.check_rows(tokens_BT, segments_BT)
    if state is None:
      segments, after = _row_segments(segments_BT), None
    else:
      _check_rows_are_whole()
      _check_is_of_rows(state, tokens_BT)
      segments, after = segments_lib.segments(segments_BT, state.segments)
      if is_first:
        segments = segments._replace(num_before_B=None)
    embedding = self.embedding.merge(self._used(params["embedding"], self.embedding))
    x_BTD = embedding(tokens_BT, jnp.dtype(self.config.dtype))
    if self.config.embedding_scale == "sqrt_width":
      # Rounded to bfloat16 first, as the released weights were trained with.
      scale = jnp.sqrt(jnp.float32(self.config.width)).astype(jnp.bfloat16)
      x_BTD *= scale.astype(x_BTD.dtype)
    x_BTD = logical.constrain(x_BTD, "batch", "time", "width")

    blocks = None if state is None else state.blocks
    new_groups, seen_groups = {}, {}
    if self.group_runs:
      groups = params["groups"]
      if self.config.layers == "unroll":
        # Cast before a group is cut out, so that what is kept for the backward pass is the cast.
        groups = self._cast(groups, {run.name: run.part.declared for run in self.group_runs})
      if blocks is None:

        def group(x_BTD: jax.Array, group_params: Params) -> tuple[jax.Array, Any]:
          x_BTD, _, seen = self._scan_runs(
            self.group_runs, x_BTD, group_params, segments, written_out=_WRITTEN_OUT
          )
          return x_BTD, seen

        x_BTD, seen_groups = self._scan(group, x_BTD, groups)
      else:
        x_BTD, new_groups = self._extend_groups(x_BTD, groups, segments, blocks["groups"])
    x_BTD, new_left, seen_left = self._scan_runs(
      self.left_runs,
      x_BTD,
      params["remainder"],
      segments,
      None if blocks is None else blocks["remainder"],
    )

    norm = self.final_norm.merge(self._used(params["final_norm"], self.final_norm))
    norm_state = None if state is None else state.final_norm
    if isinstance(norm, norms.RowNorm):
      x_BTD, norm_state = norm(x_BTD, segments, norm_state)
    else:
      x_BTD = norm(x_BTD)
    if self.unembedding is None:
      unembed_VD = embedding.table_VD[...]
    else:
      used = self._used(params["unembedding"], self.unembedding)
      unembed_VD = self.unembedding.merge(used).table_VD[...]
    new_blocks = {"groups": new_groups, "remainder": new_left}
    new_state = None if after is None else State(after, new_blocks, norm_state)
    seen = {"groups": seen_groups, "remainder": seen_left}
    return x_BTD, unembed_VD.astype(x_BTD.dtype), new_state, seen

  def _extend_groups(
    self, x_BTD: jax.Array, params: Params, segments: Segments, states: Any
  ) -> tuple[jax.Array, Any]:
    """The groups, going on from the states of all of them, which the loop updates in place."""
    plain, caches = state_lib.divide(states)

    def group(carry: Any, xs: Any) -> tuple[Any, None]:
      (x_BTD, plain, caches, state), (group_params, index) = carry, xs
      x_BTD, new, _ = self._scan_runs(
        self.group_runs,
        x_BTD,
        group_params,
        segments,
        state_lib.join(state, caches),
        group=(index,),
        written_out=_WRITTEN_OUT,
      )
      new, caches = state_lib.divide(new)
      plain = jax.tree.map(lambda stack, x: state_lib.put(stack, x, index), plain, new)
      # Read behind the write: what is read first, by several operations, XLA copies to write it.
      after = (index + 1) % self.num_groups
      state = jax.tree.map(lambda stack: state_lib.at(stack, (after,)), plain)
      return (x_BTD, plain, caches, state), None

    carry = (x_BTD, plain, caches, jax.tree.map(lambda stack: stack[0], plain))
    xs = (params, jnp.arange(self.num_groups))
    (x_BTD, plain, caches, _), _ = jax.lax.scan(group, carry, xs)
    return x_BTD, state_lib.join(plain, caches)

  def _scan_runs(
    self,
    runs: list[_Run],
    x_BTD: jax.Array,
    params: Params,
    segments: Segments,
    states: Any = None,
    *,
    group: tuple[jax.Array, ...] = (),
    written_out: int = 0,
  ) -> tuple[jax.Array, Any, Any]:
    """The blocks of every run, scanned but for those of runs of 2 to `written_out`.

    Returned are also the states of every run after it, and what its blocks told of themselves. Of
    the states, plain arrays are this group's, caches those of all groups.
    """
    new_states, seen = {}, {}
    for run in runs:

      def block(carry: Any, xs: Any, run: _Run = run) -> tuple[Any, Any]:
        (x_BTD, caches), (block_params, before) = carry, xs
        module = run.part.merge(self._used(block_params, run.part))
        state = None
        if before is not None:
          plain, index = before
          state = state_lib.join(plain, state_lib.placed(caches, (*group, index)))
        with observe.block() as seen:
          x_BTD, state = module(x_BTD, segments, state)
          if observe.is_on():
            observe.record(output_rms=observe.rms(x_BTD))
        x_BTD = logical.constrain(x_BTD, "batch", "time", "width")
        if before is not None:
          state, caches = state_lib.divide(state)
          caches = state_lib.placed(caches, ())
        return (x_BTD, caches), (state, seen)

      before, caches = None, None
      if states is not None:
        plain, caches = state_lib.divide(states[run.name])
        before = (plain, np.arange(run.length))
      (x_BTD, caches), (plain, seen[run.name]) = self._scan(
        block,
        (x_BTD, caches),
        (params[run.name], before),
        is_scanned=not 1 < run.length <= written_out,
        around=functools.partial(self._rematerialized, saved=run.saved),
      )
      new_states[run.name] = state_lib.join(plain, caches)
    return x_BTD, new_states, seen

  def _rematerialized(self, block: Callable[..., Any], saved: SavedNames) -> Callable[..., Any]:
    is_unrolled = self.config.layers == "unroll"
    # Inside a scan nothing can be merged across forward and backward; unrolled, it would be.
    prevent_cse = is_unrolled or self.config.blocks_wait
    policy = remat.policy(self.config.remat, saved, is_unrolled=is_unrolled)
    return jax.checkpoint(block, policy=policy, prevent_cse=prevent_cse)

  def _scan(
    self,
    body: Callable[..., Any],
    carry: Any,
    xs: Any,
    *,
    is_scanned: bool = True,
    around: Callable[[Callable[..., Any]], Callable[..., Any]] | None = None,
  ) -> tuple[Any, Any]:
    """jax.lax.scan of around(body), or its steps one after the other.

    With `around`, an unrolled step takes all of `xs` and cuts its part out within it: what is kept
    for the backward pass is then `xs` as it lies, where a part would be kept gathered over ZeRO's
    axis. Without, all parts are cut out at once.
    """
    if self.config.layers == "scan" and is_scanned:
      return jax.lax.scan(body if around is None else around(body), carry, xs)
    if around is None:
      steps = [(body, part) for part in cut_steps(xs)]
    else:

      def at(carry: Any, xs: Any, *, index: int) -> tuple[Any, Any]:
        return body(carry, jax.tree.map(lambda leaf: leaf[index], xs))

      length = jax.tree.leaves(xs)[0].shape[0]
      steps = [(around(functools.partial(at, index=index)), xs) for index in range(length)]
    outputs = []
    for step, part in steps:
      carry, output = step(carry, part)
      outputs.append(output)
    return carry, jax.tree.map(lambda *leaves: jnp.stack(leaves), *outputs)

  def _no_array(self, part: _Part) -> Params:
    return jax.eval_shape(part.init, jax.random.key(0))

  def _used(self, params: Params, part: _Part) -> Params:
    """Parameters as the layers use them: in the activations' dtype, but for those declared float32,
    and gathered over ZeRO's axis. The cast comes first, so that half the bytes travel."""
    return logical.gathered(self._cast(params, part.declared), part.axes)

  def _cast(self, params: Params, declared: Params) -> Params:
    return jax.tree.map(
      lambda w, one: w if one.float32 else w.astype(self.config.dtype), params, declared
    )


def _row_segments(segments_BT: jax.Array) -> Segments:
  """The documents of rows without history, numbered across the shards of a row."""

  def on_shard(segments_BT: jax.Array) -> tuple[jax.Array, ...]:
    before = segments_lib.initial_state(segments_BT.shape[0])
    segments, _ = segments_lib.segments(segments_BT, before, axis_name=logical.mesh_axis("time"))
    return segments.document_BT, segments.position_BT, segments.is_start_BT

  tokens = ("batch", "time")
  return Segments(
    *logical.on_shards(on_shard, in_axes=(tokens,), out_axes=(tokens,) * 3)(segments_BT)
  )


def _check_rows_are_whole() -> None:
  """Raises where time is split: a state is carried from one chunk to the next in one place."""
  shards = logical.num_shards("time")
  if shards > 1:
    raise ValueError(
      f"extend: rows are split over {shards} devices (mesh axis sequence), and the state that is "
      "carried lies after the last of them; prefill and decode on a mesh with sequence=1"
    )


def _check_is_of_rows(state: State, tokens_BT: jax.Array) -> None:
  """Raises unless the state is of as many rows as go on from it."""
  rows, state_rows = tokens_BT.shape[0], state.segments.segment_B.shape[0]
  if rows != state_rows:
    raise ValueError(
      f"extend: tokens of {rows} rows cannot go on from a state of {state_rows}; make it with "
      f"initial_state({rows}, ...)"
    )


def _stacked(declared: Params, num_layer_axes: int) -> Params:
  stacked = ("layers",) * num_layer_axes
  return jax.tree.map(lambda one: dataclasses.replace(one, axes=stacked + one.axes), declared)
