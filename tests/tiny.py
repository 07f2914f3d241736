"""A run of seconds, for tests of the loop: a tiny Griffin on a tiny token store of bytes."""

import pathlib

import numpy as np

from data import token_store, vocabulary
from data.pipeline import DataConfig
from models.griffin import griffin
from train.checkpoint.checkpoints import CheckpointConfig
from train.config import Run
from train.layer_statistics import StatisticsConfig
from train.optimizer import AdamW
from train.telemetry.metrics import MetricsConfig


def store(path: pathlib.Path | str, *, seed: int = 0, documents: int = 40) -> str:
  """A token store of random text."""
  rng = np.random.default_rng(seed)
  words = vocabulary.load("byte")
  texts = [bytes(rng.integers(97, 123, rng.integers(5, 90))).decode() for _ in range(documents)]
  encoded = [words.encode(text) for text in texts]
  token_store.write(str(path), encoded, words.record, text_bytes=sum(map(len, texts)))
  return str(path)


def run(folder: pathlib.Path, **changes) -> Run:
  """A run of 8 steps on stores in `folder`, which are made if missing."""
  for name, seed in (("train", 0), ("eval", 1)):
    if not (folder / name).exists():
      store(folder / name, seed=seed)
  settings = {
    "name": "tiny",
    "model": griffin(
      vocab_size=256,
      width=32,
      rnn_width=32,
      num_blocks=4,
      num_heads=2,
      head_size=16,
      window=5,
      mlp_width=48,
      dtype="float32",
      remat="none",
    ),
    "data": DataConfig(
      sources=((str(folder / "train"), 1.0),),
      eval_source=str(folder / "eval"),
      eval_rows=8,
      row_length=16,
    ),
    "optimizer": AdamW(peak_lr=1e-2, warmup_steps=2),
    "batch_size": 8,
    "total_steps": 8,
    "eval_every": 4,
    "z_loss": 1e-3,
    "checkpoint": CheckpointConfig(every_steps=3),
    "metrics": MetricsConfig(log_every=1, tensorboard=False),
    "statistics": StatisticsConfig(every=None),
  }
  return Run(**{**settings, **changes})
