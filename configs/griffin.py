"""Griffin at the seven published sizes (arXiv:2402.19427, Table 2).

  python -m launch.train --config=configs/griffin.py:1b --workdir=runs/griffin-1b

Sizes: 100m 200m 400m 1b 3b 7b 14b. Window 1024 (section 2.3), 16 gate blocks (section 4.1), head
size 128. Optimizer and batch are ours and untuned: train/recipes.py.
"""

from models import griffin
from models.sizes import size
from train.config import Run
from train.recipes import VOCAB_SIZE, pretraining


def get_config(name: str = "100m") -> Run:
  """The run of one published size."""
  row = size(name)
  return pretraining(f"griffin-{name}", griffin.of_size(row, vocab_size=VOCAB_SIZE), row)
