"""The training recipe that configs/ share: the paper's settings, and our choices where it has none.

Stated (arXiv:2402.19427): AdamW, rows of 2048 tokens, the token budgets of Table 2, bfloat16. Not
published: learning rate, betas, weight decay, batch, warm-up, schedule, clipping, vocabulary. Those
are ours and untuned; the learning rate falls with the width, as is common practice.
"""

from data.pipeline import DataConfig
from models.decoder import DecoderConfig
from models.sizes import Size
from sharding.mesh import MeshShape
from train.checkpoint.checkpoints import CheckpointConfig
from train.config import Run
from train.optimizer import AdamW, Cosine

# Ours, untuned: peak learning rate and rows of 2048 tokens per batch, by width.
_PEAK_LR = {768: 1e-3, 1024: 8e-4, 1536: 6e-4, 2048: 4e-4, 3072: 3e-4, 4096: 2e-4, 5120: 1.5e-4}
_ROWS = {768: 128, 1024: 128, 1536: 256, 2048: 512, 3072: 512, 4096: 1024, 5120: 1024}

# Ours; the paper does not state its vocabulary. 32,000 is what its data was used with elsewhere.
VOCAB_SIZE = 32_000


def adamw(peak_lr: float, *, warmup_steps: int) -> AdamW:
  """The optimizer of all pretraining runs in configs/, at this learning rate and warm-up."""
  return AdamW(
    peak_lr=peak_lr,
    warmup_steps=warmup_steps,
    schedule=Cosine(final_fraction=0.1),
    b1=0.9,
    b2=0.95,
    weight_decay=0.1,
    clip_norm=1.0,
  )


def pretraining(name: str, model: DecoderConfig, size: Size) -> Run:
  """The run of one published size on the token store `runs/data/train`."""
  row_length = 2048
  batch_size = _ROWS[size.width]
  total_steps = round(size.tokens / (batch_size * row_length))
  return Run(
    name=name,
    model=model,
    data=DataConfig(
      sources=(("runs/data/train", 1.0),), eval_source="runs/data/eval", row_length=row_length
    ),
    optimizer=adamw(_PEAK_LR[size.width], warmup_steps=min(1000, total_steps // 10)),
    batch_size=batch_size,
    total_steps=total_steps,
    z_loss=1e-4,
    eval_every=1000,
    mesh=MeshShape(fsdp=-1),
    zero_stage=3,
    checkpoint=CheckpointConfig(every_steps=5000, temporary_minutes=15.0),
  )
