"""Gated MLP, "GeGLU" (arXiv:2402.19427, section 2.2): down(gelu(gate(x)) * up(x)).

Tensor parallelism: gate and up are one matrix split by columns, down is split by rows, so the
sub-layer costs one all-reduce forward (after down) and one backward (before gate and up).
"""

import dataclasses
from typing import ClassVar

import jax
from flax import nnx

from models.costs import FlopsPart, LayerActivations, Shard
from models.layers import projection
from models.layers.gelu import gated_gelu
from models.layers.projection import add_bias, branches, project
from models.param import normal, param, zeros
from models.remat import SavedNames

# Arrays of the MLP's width alive at the peak of its backward pass, found by compiling for TPU;
# docs/plans.jsonl has the errors that are left.
_WORKING = 9


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
  """`mlp_width` is 3 x width in every published Griffin."""

  recorded_as: ClassVar[str] = "models.layers.gated_mlp.Config"

  mlp_width: int

  def __post_init__(self):
    if self.mlp_width < 1:
      raise ValueError(f"gated_mlp.Config: mlp_width {self.mlp_width} must be at least 1")

  def saved_names(self) -> SavedNames:
    return projection.SAVED

  def build(self, width: int, *, num_blocks: int, rngs: nnx.Rngs) -> "GatedMLP":
    return GatedMLP(self, width, num_blocks=num_blocks, rngs=rngs)

  def scopes(self) -> tuple[str, ...]:
    return ("mlp",)

  def tensor_sizes(self) -> dict[str, int]:
    return {"mlp_width": self.mlp_width}

  def flops(self, width: int) -> tuple[FlopsPart, ...]:
    """Two products up and one down."""
    down = 2.0 * width * self.mlp_width
    return (FlopsPart(name="mlp", words="MLPs", flops=3 * down, last=down),)

  def activations(self, width: int, shard: Shard) -> LayerActivations:
    """up: reads D, writes 2 F; gelu x up: reads 2 F, writes F; down: reads F, writes D."""
    a, f = shard.itemsize, self.mlp_width / shard.tensor
    return LayerActivations(
      products=a * (2 * f + width),
      batched=0.0,
      forward=a * (2 * width + 6 * f),
      elementwise=a * 3 * f,
      working=a * _WORKING * f,
    )


class GatedMLP(nnx.Module):
  """Two projections up in one matrix (0: through GELU, 1: linear), their product down; biases."""

  def __init__(self, config: Config, width: int, *, num_blocks: int, rngs: nnx.Rngs):
    mlp_width = config.mlp_width
    self.w_up_D2F = param(
      normal(1.0 / width), (width, 2, mlp_width), ("embed", "branch", "mlp"), rngs=rngs
    )
    self.b_up_2F = param(
      zeros, (2, mlp_width), ("branch", "mlp"), float32=True, decays=False, rngs=rngs
    )
    # 2 / num_blocks: the residual stream keeps its scale at any depth.
    self.w_down_FD = param(
      normal(2.0 / (num_blocks * mlp_width)), (mlp_width, width), ("mlp", "embed"), rngs=rngs
    )
    self.b_down_D = param(zeros, (width,), ("norm",), float32=True, decays=False, rngs=rngs)

  def __call__(self, x_BTD: jax.Array) -> jax.Array:
    dtype = x_BTD.dtype
    with jax.named_scope("mlp"):
      w_up_D2F = self.w_up_D2F[...].astype(dtype)
      gate_BTF, up_BTF = branches(x_BTD, w_up_D2F, self.b_up_2F[...], axis="mlp")
      gated_BTF = gated_gelu(gate_BTF, up_BTF)
      y_BTD = project(gated_BTF, self.w_down_FD[...].astype(dtype))
      return add_bias(y_BTD, self.b_down_D[...])
