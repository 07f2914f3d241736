"""The Griffin whose speed on CPUs is measured: float32, batch 4, row 1024, width 256, bytes.

  python -m launch.bench --config=configs/bench_cpu.py
  python -m launch.bench --config=configs/bench_cpu.py --config.model.num_blocks=24

No published model has these sizes; docs/benchmarks.md compares it with the recurrentgemma package.
"""

from data.pipeline import DataConfig
from models.griffin import griffin
from train.config import Run
from train.optimizer import AdamW


def get_config() -> Run:
  """6 blocks, no remat, all of it on one device."""
  return Run(
    name="bench-cpu",
    model=griffin(
      vocab_size=256,
      width=256,
      rnn_width=256,
      num_blocks=6,
      num_heads=4,
      head_size=64,
      window=256,
      mlp_width=768,
      dtype="float32",
      remat="none",
    ),
    data=DataConfig(sources=(("runs/corpus/train", 1.0),), row_length=1024),
    optimizer=AdamW(peak_lr=1e-3, warmup_steps=10),
    batch_size=4,
    total_steps=1000,
  )
