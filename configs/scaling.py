"""Grids for scaling laws: family x size x FLOP budget, and each of their runs by name.

  python -m launch.sweep --config=configs/scaling.py:mini --workdir=runs/mini     # all of them
  python -m launch.train --config=configs/scaling.py:mini/hawk/w64/1e12 --workdir=runs/one

  mini, small  isoFLOP on the shipped corpus, bytes, one device, float32: 8.8e13 FLOPs in all,
               80 minutes on two cores; 2.2e16, a day and a half of eight (`make train` prepares
               the corpus)
  isoflop      isoFLOP at the published sizes: for each budget the five nearest to 20 tokens for
               each parameter (arXiv:2203.15556), which lie on both sides of it
  optimal      the published sizes with the published tokens (arXiv:2402.19427, Table 2)

FLOPs are those of models/flops.py, logits included: arXiv:2406.19146 shows that leaving them out
bends the laws at small sizes. Every run of a budget ends within a step of it. The paper publishes
no recipe; ours combines published rules, the same for all families, and is untuned:

  peak learning rate   0.3118 C^-0.1250        arXiv:2401.02954, section 3.1; C is the run's FLOPs
  batch in tokens      0.2920 C^0.3271         the same, rounded to whole rows; for isoflop and
                       optimal to a power of two of them, which meshes divide
  AdamW                0.9, 0.95, decay 0.1, clipping at norm 1: the same
  schedule             cosine to a tenth, as long as the run: arXiv:2203.15556, appendix B
  warm-up              as many tokens as parameters, after arXiv:2406.19146; at most a tenth (ours)

The rules were fitted at 1e17 FLOPs and more: for mini and small they are extrapolated.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

from data.pipeline import DataConfig
from models import griffin, hawk, llama, transformer
from models.decoder import DecoderConfig, DType, Remat
from models.flops import count_params, flops_per_token
from models.sizes import SIZES, Size
from sharding.mesh import MeshShape
from train.checkpoint.checkpoints import CheckpointConfig
from train.config import Run
from train.recipes import VOCAB_SIZE, adamw
from train.scaling.sweep import Point, flops_name
from train.telemetry.metrics import MetricsConfig

FAMILIES = ("griffin", "hawk", "transformer", "llama")
_GATE_BLOCKS = 4

# Ours. width -> recurrent width and blocks. The paper chooses the recurrent width so that a
# recurrent block has as many parameters as one of multi-head attention (about 4/3 of the width);
# here it has as many as one of multi-query attention, so that at each size the parameters of
# all families agree within 3 % (5 % at width 8).
_MINIATURES = {
  8: (8, 3),
  12: (12, 3),
  16: (12, 3),
  24: (16, 3),
  32: (20, 3),
  48: (32, 3),
  64: (40, 3),
  96: (60, 3),
  128: (80, 3),
  192: (120, 6),
  256: (156, 6),
  384: (236, 6),
}
# FLOP budget -> widths on both sides of its best one. Ours, by what was measured.
_BUDGETS = {
  "mini": {
    1e11: (8, 12, 16, 24, 32),
    3e11: (12, 16, 24, 32, 48),
    1e12: (16, 24, 32, 48, 64),
    3e12: (24, 32, 48, 64, 96),
  },
  "small": {
    1e13: (32, 48, 64, 96, 128),
    1e14: (64, 96, 128, 192, 256),
    1e15: (96, 128, 192, 256, 384),
  },
}
_ROW_LENGTH = 256  # of mini and small, ours: some sentences
_ISOFLOP = (1e19, 3e19, 1e20, 3e20)
_NUM_SIZES = 5


def get_sweep(grid: str = "mini") -> tuple[Point, ...]:
  """The runs of a grid, smallest budgets first."""
  return tuple(_point(grid, family, size, budget) for family, size, budget in _cells(grid))


def get_config(name: str = "mini/griffin/w64/1e12") -> Run:
  """One run of a grid: GRID/FAMILY/SIZE/FLOPS, or optimal/FAMILY/SIZE."""
  grid, _, rest = name.partition("/")
  family = rest.partition("/")[0]
  if rest and family not in FAMILIES:
    raise ValueError(
      f"configs/scaling.py: family {family!r} of {name!r} is none of {', '.join(FAMILIES)}"
    )
  for family, size, budget in _cells(grid):
    if rest == _name(family, size, budget):
      return _point(grid, family, size, budget).run
  raise ValueError(
    f"configs/scaling.py: there is no run {name!r}; "
    f"`python -m launch.sweep --config=configs/scaling.py:{grid} --dry_run` lists them"
  )


def _cells(grid: str) -> list[tuple[str, str, float | None]]:
  """(family, size, FLOP budget or None for the published tokens) of every run."""
  match grid:
    case "mini" | "small":
      budgets = _BUDGETS[grid]
      sizes = {
        budget: [f"w{width}" for width in _outwards(widths)] for budget, widths in budgets.items()
      }
    case "isoflop":
      sizes = {budget: _outwards(_nearest(budget)) for budget in _ISOFLOP}
    case "optimal":
      sizes = {None: [name for name in SIZES if name != "14b"]}
    case _:
      raise ValueError(
        f"configs/scaling.py: grid {grid!r} is none of mini, small, isoflop, optimal"
      )
  return [
    (family, size, budget)
    for budget, names in sizes.items()
    for size in names
    for family in FAMILIES
  ]


def _outwards(sizes: Sequence[Any]) -> list[Any]:
  """From the middle, so that the curve of a sweep that is cut off has its minimum."""
  middle = (len(sizes) - 1) / 2
  return sorted(sizes, key=lambda size: abs(sizes.index(size) - middle))


def _nearest(budget: float) -> list[str]:
  """The published sizes nearest to C = 6 N D with D = 20 N, smallest first."""
  best = math.sqrt(budget / 120)
  # The published token budgets are 20 for each of the nominal parameters.
  ranked = sorted(SIZES, key=lambda name: abs(math.log(SIZES[name].tokens / 20 / best)))
  chosen = [name for name in ranked if name != "14b"][:_NUM_SIZES]
  return sorted(chosen, key=lambda name: SIZES[name].tokens)


def _name(family: str, size: str, budget: float | None) -> str:
  return f"{family}/{size}" + ("" if budget is None else f"/{flops_name(budget)}")


def _point(grid: str, family: str, size: str, budget: float | None) -> Point:
  name = _name(family, size, budget)
  if grid in _BUDGETS:
    assert budget is not None
    run = _miniature(name, family, int(size.removeprefix("w")), budget, grid)
  else:
    run = _published(name, family, SIZES[size], budget)
  return Point(name=name, family=family, budget=budget, run=run)


def _miniature(name: str, family: str, width: int, budget: float, grid: str) -> Run:
  rnn_width, num_blocks = _MINIATURES[width]
  size = Size(
    width=width,
    rnn_width=rnn_width,
    num_blocks=num_blocks,
    num_heads=max(1, width // 8),
    head_size=width // max(1, width // 8),
    tokens=0.0,  # the budget decides
  )
  model = _model(
    family,
    size,
    vocab_size=256,
    window=_ROW_LENGTH // 2,  # half a row, as the paper has it
    num_gate_blocks=_GATE_BLOCKS,
    mlp_multiple=1,
    dtype="float32",
    remat="none",
  )
  return _run(
    f"{grid}/{name}",
    model,
    data=DataConfig(
      sources=(("runs/corpus/train", 1.0),),
      eval_source="runs/corpus/eval",
      eval_rows=131_072 // _ROW_LENGTH,
      row_length=_ROW_LENGTH,
    ),
    flops=budget,
    rounds_rows=round,
    mesh=MeshShape(),
    # A run takes minutes at most; what a restart repeats is short.
    checkpoint=CheckpointConfig(every_steps=100_000, temporary_minutes=1.0),
  )


def _published(name: str, family: str, size: Size, budget: float | None) -> Run:
  row_length = 2048
  model = _model(
    family,
    size,
    vocab_size=VOCAB_SIZE,
    window=1024,
    num_gate_blocks=16,
    mlp_multiple=64,
    dtype="bfloat16",
    remat="block",
  )
  return _run(
    name,
    model,
    data=DataConfig(
      sources=(("runs/data/train", 1.0),), eval_source="runs/data/eval", row_length=row_length
    ),
    flops=budget or size.tokens * flops_per_token(model, row_length).train,
    rounds_rows=_power_of_two,
    mesh=MeshShape(fsdp=-1),
    checkpoint=CheckpointConfig(every_steps=5000, temporary_minutes=15.0),
  )


def _model(
  family: str,
  size: Size,
  *,
  vocab_size: int,
  window: int,
  num_gate_blocks: int,
  mlp_multiple: int,
  dtype: DType,
  remat: Remat,
) -> DecoderConfig:
  of_size = {
    "griffin": functools.partial(griffin.of_size, window=window, num_gate_blocks=num_gate_blocks),
    "hawk": functools.partial(hawk.of_size, num_gate_blocks=num_gate_blocks),
    "transformer": transformer.of_size,
    "llama": functools.partial(llama.of_size, mlp_multiple=mlp_multiple),
  }[family]
  return of_size(size, vocab_size=vocab_size, dtype=dtype, remat=remat)


def _power_of_two(rows: float) -> int:
  return 2 ** round(math.log2(rows))


def _run(
  name: str,
  model: DecoderConfig,
  *,
  data: DataConfig,
  flops: float,
  rounds_rows: Callable[[float], int],
  mesh: MeshShape,
  checkpoint: CheckpointConfig,
) -> Run:
  """The run that spends `flops` on `model` by the rules above."""
  rows = 0.2920 * flops**0.3271 / data.row_length
  batch_size = max(1, rounds_rows(rows))
  batch_tokens = batch_size * data.row_length
  total_steps = max(1, round(flops / flops_per_token(model, data.row_length).train / batch_tokens))
  return Run(
    name=name,
    model=model,
    data=data,
    optimizer=adamw(
      float(f"{0.3118 * flops**-0.1250:.3g}"),
      warmup_steps=min(round(count_params(model).total / batch_tokens), total_steps // 10),
    ),
    batch_size=batch_size,
    total_steps=total_steps,
    eval_every=total_steps,
    mesh=mesh,
    checkpoint=checkpoint,
    metrics=MetricsConfig(log_every=50, tensorboard=False),
  )
