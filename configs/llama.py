"""Llama: the released models, and Llamas at the sizes of the other families.

  python -m launch.train --config=configs/llama.py:3-8b --workdir=runs/llama-3-8b

Released: 2-7b 2-13b (arXiv:2307.09288), 3-8b (arXiv:2407.21783), 3.2-1b 3.2-3b. Beside Griffin's
table: 100m 200m 400m 1b 3b 7b 14b, with the vocabulary, tokens and recipe of configs/griffin.py and
as many parameters as the Transformer (models/llama.py: of_size).

Of the recipes of released models is marked below what is published. Llama 3 grew its batch as it
trained, and the 3.2 models were pruned and distilled, which this is not.
"""

import dataclasses

from data.pipeline import DataConfig
from models import llama
from models.sizes import SIZES, size
from sharding.mesh import MeshShape
from train.checkpoint.checkpoints import CheckpointConfig
from train.config import Run
from train.recipes import VOCAB_SIZE, adamw, pretraining

# Peak learning rate, row length and tokens. Llama 2: arXiv:2307.09288, Table 1. Llama 3: learning
# rate from arXiv:2407.21783, Table 3, rows from section 3.4.1, tokens from the model card; of 3.2
# the model card has the tokens, the learning rates are ours, untuned.
_RELEASED = {
  "2-7b": (3e-4, 4096, 2e12),
  "2-13b": (3e-4, 4096, 2e12),
  "3-8b": (3e-4, 8192, 15e12),
  "3.2-1b": (4e-4, 8192, 9e12),
  "3.2-3b": (3e-4, 8192, 9e12),
}
_BATCH_TOKENS = 1 << 22  # Llama 2's 4M; for the others ours


def get_config(name: str = "100m") -> Run:
  """The run of one released model, or of one of the shared sizes."""
  if name in SIZES:
    row = size(name)
    return pretraining(f"llama-{name}", llama.of_size(row, vocab_size=VOCAB_SIZE), row)
  if name not in llama.PUBLISHED:
    known = ", ".join((*llama.PUBLISHED, *SIZES))
    raise ValueError(f"configs/llama.py: {name!r} is none of {known}")
  return _released(name)


def _released(name: str) -> Run:
  """AdamW as Llama 2 has it (section 2.2): betas, epsilon, decay, clipping, 2000 steps of warm-up,
  cosine to a tenth. z-loss, checkpoints and mesh are ours."""
  peak_lr, row_length, tokens = _RELEASED[name]
  return Run(
    name=f"llama-{name}",
    model=llama.published(name),
    data=DataConfig(
      sources=(("runs/data/train", 1.0),), eval_source="runs/data/eval", row_length=row_length
    ),
    optimizer=dataclasses.replace(adamw(peak_lr, warmup_steps=2000), eps=1e-5),
    batch_size=_BATCH_TOKENS // row_length,
    total_steps=round(tokens / _BATCH_TOKENS),
    z_loss=1e-4,
    eval_every=1000,
    mesh=MeshShape(fsdp=-1),
    zero_stage=3,
    checkpoint=CheckpointConfig(every_steps=5000, temporary_minutes=15.0),
  )
