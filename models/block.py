"""What the config of a block, and of the layers in it, must answer.

A decoder stacks blocks, and training, planning and reports ask their configs. Each layer answers in
its own file: nothing outside models/ knows which layers there are.
"""

from collections.abc import Callable
from typing import Any, ClassVar, Protocol

import jax
import jax.numpy as jnp
from flax import nnx

from models.costs import FlopsPart, LayerActivations, LeastTokens, Sends, Shard
from models.layers.segments import Segments
from models.remat import SavedNames
from models.statistics import Statistics


class Mixer(Protocol):
  """What a mixer must have (models/layers/__init__.py); `state` is its own NamedTuple."""

  def __call__(self, x_BTD: jax.Array, segments: Segments, state: Any) -> tuple[jax.Array, Any]: ...

  def initial_state(self, batch: int, context: int, dtype: jnp.dtype) -> Any: ...


class MixerConfig(Protocol):
  """A frozen dataclass in the mixer's own file. If it has kernel fields, it also has `kernels`
  (models/kernel_fields.py). `recorded_as` is its name in the records of checkpoints, which never
  changes (train/recorded.py)."""

  recorded_as: ClassVar[str]

  def build(self, width: int, *, num_blocks: int, rngs: nnx.Rngs) -> Mixer: ...

  def saved_names(self) -> SavedNames:
    """The names that the layer and its kernels give to values that remat may keep."""
    ...

  def scopes(self) -> tuple[str, ...]:
    """The named scopes that the layer opens: its parts in the cost of a compiled step."""
    ...

  def tensor_sizes(self) -> dict[str, int]:
    """What tensor parallelism splits, by field; empty where every tensor shard computes all."""
    ...

  def least_tokens_per_shard(self) -> LeastTokens:
    """How many tokens of a row each device must have where rows are split."""
    ...

  def flops(self, width: int, row_length: int) -> tuple[FlopsPart, ...]:
    """Forward FLOPs of one token, averaged over a row, by part."""
    ...

  def activations(self, width: int, shard: Shard) -> LayerActivations: ...

  def sends(self, shard: Shard) -> Sends:
    """What the shards of a row send each other. The block adds what tensor shards send."""
    ...

  def statistics(self) -> Statistics:
    """What the layer records with `observe.record`: every name is declared here."""
    ...


class MLPConfig(Protocol):
  """As MixerConfig, for a layer that looks at each token alone."""

  recorded_as: ClassVar[str]

  def build(
    self, width: int, *, num_blocks: int, rngs: nnx.Rngs
  ) -> Callable[[jax.Array], jax.Array]: ...

  def saved_names(self) -> SavedNames: ...

  def scopes(self) -> tuple[str, ...]: ...

  def tensor_sizes(self) -> dict[str, int]: ...

  def flops(self, width: int) -> tuple[FlopsPart, ...]: ...

  def activations(self, width: int, shard: Shard) -> LayerActivations: ...


class BlockConfig(Protocol):
  """A frozen dataclass that says what a block is and what it costs; equal ones are stacked.

  The built block is called as a mixer is, and has an `initial_state` too. A block of another shape
  than the residual one is a dataclass of its own with these methods.
  """

  recorded_as: ClassVar[str]

  def build(self, width: int, *, num_blocks: int, rngs: nnx.Rngs) -> Mixer: ...

  def saved_names(self) -> SavedNames:
    """The names of its values that remat may keep; any other is an error (models/remat.py)."""
    ...

  def scopes(self) -> tuple[str, ...]:
    """The named scopes of its layers: parts of a compiled step."""
    ...

  def tensor_sizes(self) -> dict[str, int]:
    """What tensor parallelism splits, by the path of the field."""
    ...

  def least_tokens_per_shard(self) -> LeastTokens: ...

  def flops(self, width: int, row_length: int) -> tuple[FlopsPart, ...]: ...

  def activations(self, width: int, shard: Shard) -> LayerActivations:
    """Those of the whole block, without its input, which every remat keeps."""
    ...

  def sends(self, width: int, shard: Shard) -> Sends:
    """All collectives of activations inside the block."""
    ...

  def kind(self) -> str:
    """One word for the block, for statistics.jsonl."""
    ...

  def statistics(self) -> Statistics: ...
