"""Griffin on rows of 1,048,576 tokens: each row lies over 64 chips, four of them side by side.

  python -m launch.train --config=configs/long_row.py:1b --workdir=runs/long-row-1b

Sizes: those of configs/griffin.py. The mesh is fsdp 4 x sequence 64 for 256 chips: a chip holds
16,384 tokens of one row and, by ZeRO, a quarter of the state. What the compiled step of the 1b
needs on a v5e-256 is in docs/benchmarks.md. No Griffin was published at this length: row, batch and
mesh are ours, untuned; the other settings are those of configs/griffin.py.
"""

import dataclasses

from models import griffin
from models.sizes import size
from sharding.mesh import MeshShape
from train.config import Run
from train.recipes import VOCAB_SIZE, pretraining

_ROW_LENGTH = 1 << 20
_ROWS = 4


def get_config(name: str = "1b") -> Run:
  """The run of one published size, its token budget in rows of 2^20."""
  row = size(name)
  run = pretraining(f"long-row-{name}", griffin.of_size(row, vocab_size=VOCAB_SIZE), row)
  total_steps = round(row.tokens / (_ROWS * _ROW_LENGTH))
  return dataclasses.replace(
    run,
    data=dataclasses.replace(run.data, row_length=_ROW_LENGTH, eval_rows=16, prefetch_batches=2),
    batch_size=_ROWS,
    total_steps=total_steps,
    optimizer=dataclasses.replace(run.optimizer, warmup_steps=min(1000, total_steps // 10)),
    mesh=MeshShape(fsdp=4, sequence=-1),
  )
