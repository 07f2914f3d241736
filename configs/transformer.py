"""The multi-query-attention Transformer at the published sizes (arXiv:2402.19427, Table 2).

  python -m launch.train --config=configs/transformer.py:1b --workdir=runs/transformer-1b

Sizes: 100m 200m 400m 1b 3b 7b 14b (no 14b Transformer was published). Global attention, head size
128. Optimizer and batch are ours and untuned: train/recipes.py.
"""

from models import transformer
from models.sizes import size
from train.config import Run
from train.recipes import VOCAB_SIZE, pretraining


def get_config(name: str = "100m") -> Run:
  """The run of one published size."""
  row = size(name)
  return pretraining(f"transformer-{name}", transformer.of_size(row, vocab_size=VOCAB_SIZE), row)
