"""Activations of one block: what is kept for the backward pass, what is moved through HBM.

Each layer says what it makes (models/costs.py): matrix products read their operand and write their
result; elementwise work between two of them is one pass, which reads the results before and writes
the operand after; a kernel of its own keeps the values inside an op out of HBM. This file computes
what each remat policy keeps of them and computes again.
"""

import dataclasses

from models.block import BlockConfig
from models.costs import Shard


@dataclasses.dataclass(frozen=True, kw_only=True)
class Activations:
  """Bytes per token and device of one block.

  saved    kept from the forward to the backward pass
  forward  moved by the forward pass; the backward pass moves twice that: it reads what the forward
           pass read and the gradient of what it wrote, and writes the gradient of what it read
  again    moved to compute again what was not kept
  working  alive at the peak of the backward pass, beside what is kept
  """

  saved: float
  forward: float
  again: float
  working: float

  @property
  def moved(self) -> float:
    return 3.0 * self.forward + self.again


def of_block(block: BlockConfig, *, width: int, shard: Shard) -> Activations:
  """The activations of one block on a shard; the block's kernels are named."""
  made = block.activations(width, shard)
  saved, again = width * shard.itemsize, made.elementwise  # the block's input
  match shard.remat:
    case "block":
      again = made.forward
    case "matmuls":
      saved += made.products
    case _:
      saved += made.products + made.batched
  return Activations(saved=saved, forward=made.forward, again=again, working=made.working)
