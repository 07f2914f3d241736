"""A real Griffin that learns English on a laptop: `make train`, minutes on two CPU cores.

  python -m launch.train --config=configs/smoke.py --workdir=runs/smoke

Trains on the shipped corpus (data/corpus) as bytes: recurrent blocks and local attention whose
window is shorter than the row, documents packed. All numbers are ours, untuned.
"""

from data.pipeline import DataConfig
from models.griffin import griffin
from sharding.mesh import MeshShape
from train.checkpoint.checkpoints import CheckpointConfig
from train.config import Run
from train.layer_statistics import StatisticsConfig
from train.optimizer import AdamW, Cosine
from train.telemetry.metrics import MetricsConfig


def get_config() -> Run:
  """1.3 million parameters, a million bytes."""
  return Run(
    name="smoke",
    model=griffin(
      vocab_size=256,
      width=128,
      rnn_width=192,
      num_blocks=6,
      num_heads=4,
      head_size=32,
      window=64,
      mlp_width=384,
      dtype="float32",
      remat="none",
    ),
    data=DataConfig(
      sources=(("runs/corpus/train", 1.0),),
      eval_source="runs/corpus/eval",
      eval_rows=64,
      row_length=256,
    ),
    optimizer=AdamW(
      peak_lr=3e-3,
      warmup_steps=50,
      schedule=Cosine(final_fraction=0.1),
      weight_decay=0.1,
      clip_norm=1.0,
    ),
    batch_size=16,
    total_steps=250,
    eval_every=50,
    # Killed after a minute, it should have a checkpoint to go on from.
    checkpoint=CheckpointConfig(every_steps=100, temporary_minutes=0.25),
    mesh=MeshShape(data=-1),
    metrics=MetricsConfig(log_every=10),
    statistics=StatisticsConfig(every=25),
  )
