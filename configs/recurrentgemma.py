"""RecurrentGemma (arXiv:2404.07839): Griffin with scaled embeddings and capped logits.

  python -m launch.train --config=configs/recurrentgemma.py:2b --workdir=runs/recurrentgemma-2b

Sizes: 2b, 9b. Rows of 8192 tokens and a window of 2048 (section 2); data, learning rate and batch
of the released models are not published: ours, untuned, those of the nearest Griffin. The token
store must use a vocabulary of at most 256,000 ids.
"""

import dataclasses

from models.griffin import recurrentgemma_2b, recurrentgemma_9b
from models.sizes import size
from train.config import Run
from train.recipes import pretraining

_SIZES = {"2b": (recurrentgemma_2b, "3b"), "9b": (recurrentgemma_9b, "7b")}


def get_config(name: str = "2b") -> Run:
  """The run of one released size; the budget is that of the nearest Griffin, not the released
  2T."""
  if name not in _SIZES:
    raise ValueError(f"size {name!r} is none of RecurrentGemma's: {', '.join(_SIZES)}")
  model, nearest = _SIZES[name]
  run = pretraining(f"recurrentgemma-{name}", model(), size(nearest))
  # The same tokens in a batch, in rows four times as long.
  return dataclasses.replace(
    run,
    data=dataclasses.replace(run.data, row_length=8192),
    batch_size=run.batch_size // 4,
  )
