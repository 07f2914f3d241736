"""Each layer as it trains: norms of gradient, parameters and update, and what mixers record.

A program of its own, dispatched behind the step at a set interval: the step pays nothing. It reads
the state after the step and goes forward, once, over the step's first microbatch. It writes
WORKDIR/statistics.jsonl: step, time, "mixers" (what each block is), and lists by the names of
LAYER_FIELDS and of what blocks declare (models/statistics.py), with an entry for each block, first
to last; null where a block does not record it. "embedding", "final_norm" and an "unembedding" of
its own have norms of their own. The first line of each start has "about": what the blocks declare.
"""

import dataclasses
import math
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from data.rows import Batch
from models.decoder import DecoderConfig, Model, Params
from models.stacks import split_blocks
from models.statistics import Statistics
from train.optimizer import AdamW
from train.state import TrainState
from train.step import microbatches, square_norm

JSONL = "statistics.jsonl"
LAYER_FIELDS = {
  "param_norm": "norm of all parameters of the block",
  "grad_norm": "norm of their gradient, before clipping",
  "update_norm": "norm of what the step added to them",
  "output_rms": "root mean square of the residual stream behind the block",
}
_BLOCKS = ("groups", "remainder")


@dataclasses.dataclass(frozen=True, kw_only=True)
class StatisticsConfig:
  """every: after so many steps, again and again; None for never, which also compiles nothing."""

  recorded_as: ClassVar[str] = "train.statistics.StatisticsConfig"

  every: int | None = 100

  def __post_init__(self):
    if self.every is not None and self.every < 1:
      raise ValueError(
        f"StatisticsConfig: every {self.every} must be at least 1; None is no statistics"
      )

  def due(self, step: int) -> bool:
    """Whether the statistics of this step are wanted."""
    return self.every is not None and step % self.every == 0


def statistics_step(
  state: TrainState,
  batch: Batch,
  grad_square_norms: Any,
  weight: jax.Array,
  *,
  model: Model,
  optimizer: AdamW,
  total_steps: int,
  num_microbatches: int,
) -> dict[str, Any]:
  """What `by_layer` reads, for the step that ended in `state`. The batch is that step's, and its
  StepMetrics have the other two: square norms of the gradients' sums, and number of targets."""
  if num_microbatches == 1:
    part = batch
  else:
    part = jax.tree.map(lambda x: x[0], microbatches(batch, num_microbatches))
  seen = model.observe(state.params, part.tokens_BT, part.segments_BT)
  _check_declared(model.config, seen)
  update = optimizer.last_update(
    state.opt_state, state.params, total_steps=total_steps, decay_mask=model.decays
  )

  def square_norms(tree: Any) -> Any:
    return jax.tree.map(lambda x, axes: square_norm(x.astype(jnp.float32), axes), tree, model.axes)

  norms = {
    "param_norm": square_norms(state.params),
    "grad_norm": jax.tree.map(lambda x: x / jnp.square(weight), grad_square_norms),
    "update_norm": square_norms(update),
  }
  values: dict[str, Any] = {
    end: {name: jnp.sqrt(_sum(tree[end])) for name, tree in norms.items()}
    for end in model.axes.keys() - set(_BLOCKS)
  }
  for part_name in _BLOCKS:
    values[part_name] = {
      run: {
        **{name: jnp.sqrt(_sum(tree[part_name][run])) for name, tree in norms.items()},
        **seen[part_name][run],
      }
      for run in model.axes[part_name]
    }
  return values


def declared(config: DecoderConfig) -> list[Statistics]:
  """What the blocks of a model record beside LAYER_FIELDS, first to last, each once."""
  found = dict.fromkeys(block.statistics() for block in config.blocks)
  return [statistics for statistics in found if statistics.columns]


def by_layer(config: DecoderConfig, values: dict[str, Any]) -> dict[str, Any]:
  """A line of the file without step, time and "about", from the arrays of statistics_step on the
  host."""
  blocks = split_blocks(config, values)
  columns: dict[str, Any] = {"mixers": [block.kind() for block in config.blocks]}
  for name in (*LAYER_FIELDS, *_declared_names(config)):
    column = [_plain(block[name]) if name in block else None for block in blocks]
    if any(value is not None for value in column):
      columns[name] = column
  ends = {
    end: {name: _plain(x) for name, x in values[end].items()}
    for end in sorted(values.keys() - set(_BLOCKS))
  }
  return {**columns, **ends}


def _declared_names(config: DecoderConfig) -> list[str]:
  columns = [column.name for one in declared(config) for column in one.columns]
  return list(dict.fromkeys(columns))


def _check_declared(config: DecoderConfig, seen: Params) -> None:
  """Raises for a recorded value that no block declares: no line of the file would have it."""
  names = {*LAYER_FIELDS, *_declared_names(config)}
  for run in (*seen["groups"].values(), *seen["remainder"].values()):
    if unknown := sorted(set(run) - names):
      raise ValueError(
        f"statistics: a layer records {unknown[0]!r}, which no block declares; add a Column to the "
        "statistics() of its config (models/statistics.py)"
      )


def _sum(tree: Any) -> jax.Array:
  return jax.tree.reduce(jnp.add, tree)


def _plain(value: Any) -> Any:
  """Numbers with five digits, as JSON has them: what is not finite is None."""
  if getattr(value, "ndim", 0):
    return [_plain(item) for item in value]
  return float(f"{float(value):.5g}") if math.isfinite(value) else None
