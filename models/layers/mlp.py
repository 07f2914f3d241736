"""MLP of one hidden layer, gated or plain.

  gated   down(f(gate(x)) * up(x))    GeGLU with f = gelu (arXiv:2402.19427, section 2.2), SwiGLU
                                      with f = silu (arXiv:2002.05202)
  plain   down(f(up(x)))

Tensor parallelism: gate and up are one matrix split by columns, down is split by rows, so the
sub-layer costs one all-reduce forward (after down) and one backward (before gate and up).
"""

import dataclasses
from typing import ClassVar, Literal

import jax
import jax.numpy as jnp
from flax import nnx

from models.costs import FlopsPart, LayerActivations, Shard
from models.initial_weights import FanIn, InitialWeights
from models.layers import projection
from models.layers.gelu import gated_gelu
from models.layers.projection import add_bias, branch_products, branches, project
from models.param import param, zeros
from models.remat import SavedNames

# Arrays of the MLP's width alive at the peak of its backward pass, for each product up and for the
# hidden value: found by compiling GeGLU for TPU; docs/plans.jsonl has the errors that are left.
_WORKING = 3
_ACTIVATIONS = ("gelu", "silu")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
  """The defaults are Griffin's, whose `mlp_width` is 3 x width in every published size."""

  # The file's name when the first records were written; it never changes.
  recorded_as: ClassVar[str] = "models.layers.gated_mlp.Config"

  mlp_width: int
  activation: Literal["gelu", "silu"] = "gelu"
  is_gated: bool = True
  biases: bool = True
  initial_weights: InitialWeights = FanIn()

  def __post_init__(self):
    if self.mlp_width < 1:
      raise ValueError(f"mlp.Config: mlp_width {self.mlp_width} must be at least 1")
    if self.activation not in _ACTIVATIONS:
      raise ValueError(f"mlp.Config: activation {self.activation!r} is none of {_ACTIVATIONS}")

  def saved_names(self) -> SavedNames:
    return projection.SAVED

  def build(self, width: int, *, num_blocks: int, rngs: nnx.Rngs) -> "MLP":
    return MLP(self, width, num_blocks=num_blocks, rngs=rngs)

  def scopes(self) -> tuple[str, ...]:
    return ("mlp",)

  def tensor_sizes(self) -> dict[str, int]:
    return {"mlp_width": self.mlp_width}

  @property
  def num_up(self) -> int:
    """Products up."""
    return 2 if self.is_gated else 1

  def flops(self, width: int) -> tuple[FlopsPart, ...]:
    """The products up and one down."""
    down = 2.0 * width * self.mlp_width
    return (FlopsPart(name="mlp", words="MLPs", flops=(self.num_up + 1) * down, last=down),)

  def activations(self, width: int, shard: Shard) -> LayerActivations:
    """Gated, up: reads D, writes 2 F; f(gate) x up: reads 2 F, writes F; down: reads F, writes D.
    Plain, F in place of 2 F."""
    a, f, up = shard.itemsize, self.mlp_width / shard.tensor, self.num_up
    return LayerActivations(
      products=a * (up * f + width),
      batched=0.0,
      forward=a * (2 * width + 2 * (up + 1) * f),
      elementwise=a * (up + 1) * f,
      working=a * _WORKING * (up + 1) * f,
    )


class MLP(nnx.Module):
  """The projections up in one matrix (if gated 0: through f, 1: linear), and the one down."""

  def __init__(self, config: Config, width: int, *, num_blocks: int, rngs: nnx.Rngs):
    mlp_width, initial = config.mlp_width, config.initial_weights
    self.is_gated, self.has_biases = config.is_gated, config.biases
    self.activation = config.activation
    inside = initial.inside(width)
    if config.is_gated:
      self.w_up_D2F = param(inside, (width, 2, mlp_width), ("embed", "branch", "mlp"), rngs=rngs)
      if config.biases:
        self.b_up_2F = param(
          zeros, (2, mlp_width), ("branch", "mlp"), float32=True, decays=False, rngs=rngs
        )
    else:
      self.w_up_DF = param(inside, (width, mlp_width), ("embed", "mlp"), rngs=rngs)
      if config.biases:
        self.b_up_F = param(zeros, (mlp_width,), ("mlp",), float32=True, decays=False, rngs=rngs)
    self.w_down_FD = param(
      initial.into_stream(mlp_width, num_blocks), (mlp_width, width), ("mlp", "embed"), rngs=rngs
    )
    if config.biases:
      self.b_down_D = param(zeros, (width,), ("norm",), float32=True, decays=False, rngs=rngs)

  def __call__(self, x_BTD: jax.Array) -> jax.Array:
    with jax.named_scope("mlp"):
      hidden_BTF = _activated(self.activation, *self._up(x_BTD))
      y_BTD = project(hidden_BTF, self.w_down_FD[...].astype(x_BTD.dtype))
      return add_bias(y_BTD, self.b_down_D[...]) if self.has_biases else y_BTD

  def _up(self, x_BTD: jax.Array) -> tuple[jax.Array, ...]:
    """The products up, each [B, T, F]."""
    w_DKF = self.w_up_D2F[...] if self.is_gated else self.w_up_DF[...][:, None]
    w_DKF = w_DKF.astype(x_BTD.dtype)
    if not self.has_biases:
      return branch_products(x_BTD, w_DKF, axis="mlp")
    b_KF = self.b_up_2F[...] if self.is_gated else self.b_up_F[...][None]
    return branches(x_BTD, w_DKF, b_KF, axis="mlp")


def _activated(activation: str, x_BTF: jax.Array, y_BTF: jax.Array | None = None) -> jax.Array:
  """f(x) * y, or f(x), in the dtype of x; float32 between."""
  if activation == "gelu":
    return gated_gelu(x_BTF, jnp.ones_like(x_BTF) if y_BTF is None else y_BTF)
  wide_BTF = jax.nn.silu(x_BTF.astype(jnp.float32))
  if y_BTF is not None:
    wide_BTF *= y_BTF.astype(jnp.float32)
  return wide_BTF.astype(x_BTF.dtype)
