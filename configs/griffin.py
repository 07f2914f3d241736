"""Griffin at the seven published sizes (arXiv:2402.19427, Table 2).

  python -m launch.train --config=configs/griffin.py:1b --workdir=runs/griffin-1b

Sizes: 100m 200m 400m 1b 3b 7b 14b. Window 1024 (section 2.3), 16 gate blocks (section 4.1), head
size 128. Optimizer and batch are ours and untuned: train/recipes.py.
"""

from models.griffin import griffin
from models.sizes import size
from train.config import Run
from train.recipes import VOCAB_SIZE, pretraining


def get_config(name: str = "100m") -> Run:
  """The run of one published size."""
  row = size(name)
  model = griffin(
    vocab_size=VOCAB_SIZE,
    width=row.width,
    rnn_width=row.rnn_width,
    num_blocks=row.num_blocks,
    num_heads=row.num_heads,
    head_size=row.head_size,
    window=1024,
    mlp_width=row.mlp_width,
  )
  return pretraining(f"griffin-{name}", model, row)
