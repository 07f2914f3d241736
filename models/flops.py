"""Parameters and FLOPs of a model by part, from its config; nothing is allocated.

Convention, for MFU too: one multiply-add is 2 FLOPs. Matrix products are counted (projections,
gates, convolution, logits), and attention at the keys that a query sees, causal and within its
window; keys that a kernel multiplies and then masks do not count. A row counts as one document.
Elementwise work, such as the recurrence, is listed separately and is in no total: it runs on the
vector unit, and peak FLOP/s are those of the matrix unit. Training is three times the forward pass;
recomputation by remat is not counted.
"""

import dataclasses
import functools
import itertools
import math

import jax

from models.costs import FlopsPart
from models.decoder import DecoderConfig, build


@dataclasses.dataclass(frozen=True, kw_only=True)
class Flops:
  """Forward FLOPs per token, averaged over a row. `parts` are summed over blocks, each name once:
  first those that count in the total, in the order of the blocks, then elementwise ones."""

  parts: tuple[FlopsPart, ...]

  def __getitem__(self, name: str) -> float:
    """The FLOPs of one part; KeyError where no block has it."""
    return self.as_dict()[name]

  def as_dict(self) -> dict[str, float]:
    return {part.name: part.flops for part in self.parts}

  @property
  def counted(self) -> tuple[FlopsPart, ...]:
    """The parts that are matrix products."""
    return tuple(part for part in self.parts if part.kind != "elementwise")

  @property
  def forward(self) -> float:
    """All matrix products of the forward pass."""
    return sum(part.flops for part in self.counted)

  @property
  def train(self) -> float:
    """Forward and backward: what MFU counts."""
    return 3.0 * self.forward


def flops_per_token(config: DecoderConfig, row_length: int) -> Flops:
  """FLOPs of one token in a row of `row_length` tokens, by part."""
  if row_length < 1:
    raise ValueError(f"flops_per_token: row_length {row_length} must be at least 1")
  of_kind = {block: block.flops(config.width, row_length) for block in config.pattern}
  named: dict[str, list[FlopsPart]] = {}
  for part in itertools.chain(*(of_kind[block] for block in config.blocks)):
    named.setdefault(part.name, []).append(part)
  logits = 2.0 * config.width * config.vocab_size
  found = [_sum(parts) for parts in named.values()]
  found.append(FlopsPart(name="logits", words="logits", flops=logits))
  return Flops(parts=tuple(sorted(found, key=lambda part: part.kind == "elementwise")))


def _sum(parts: list[FlopsPart]) -> FlopsPart:
  """The part summed over blocks. Its kernels are those of the first block alone."""
  return dataclasses.replace(
    parts[0],
    flops=sum(part.flops for part in parts),
    batched=sum(part.batched for part in parts),
    last=sum(part.last for part in parts),
    multiplied=sum(part.executed for part in parts),
  )


@dataclasses.dataclass(frozen=True, kw_only=True)
class ParamCount:
  """Numbers of parameters."""

  embedding: int  # the table, and the unembedding's where it has its own
  rest: int

  @property
  def total(self) -> int:
    return self.embedding + self.rest


@functools.lru_cache(maxsize=256)
def count_params(config: DecoderConfig) -> ParamCount:
  """The parameters of the model, counted from its shapes."""
  shapes = build(config).shapes
  sizes = [math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes)]
  tables = 1 if config.unembedding == "tied" else 2
  embedding = tables * config.vocab_size * config.width
  return ParamCount(embedding=embedding, rest=sum(sizes) - embedding)
