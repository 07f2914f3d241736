"""Root-mean-square normalisation (arXiv:1910.07467), and what a decoder asks of a norm."""

import dataclasses
from typing import Any, ClassVar, Literal, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from flax import nnx

from models.layers.segments import Segments
from models.param import ones, param, zeros


class NormConfig(Protocol):
  """A frozen dataclass that builds a norm, which looks at each token alone: y_BTD = norm(x_BTD).
  Behind the last block it may build a `RowNorm`."""

  def build(self, width: int, *, rngs: nnx.Rngs) -> Any: ...


@runtime_checkable
class RowNorm(Protocol):
  """A norm that looks along the row, and carries a state as a mixer does."""

  def __call__(self, x_BTD: jax.Array, segments: Segments, state: Any) -> tuple[jax.Array, Any]: ...

  def initial_state(self, batch: int, context: int, dtype: jnp.dtype) -> Any: ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
  """x / sqrt(mean(x^2) + epsilon), times 1 + scale ("one_plus_scale": scale is 0 at first) or times
  scale ("scale": it is 1 at first, as in Llama)."""

  recorded_as: ClassVar[str] = "models.layers.norms.Config"

  weight: Literal["one_plus_scale", "scale"] = "one_plus_scale"
  epsilon: float = 1e-6

  def __post_init__(self):
    if self.weight not in ("one_plus_scale", "scale"):
      raise ValueError(f"norms.Config: weight {self.weight!r} is none of 'one_plus_scale', 'scale'")
    if not 0.0 < self.epsilon < 1.0:
      raise ValueError(f"norms.Config: epsilon {self.epsilon} must be above 0 and below 1")

  def build(self, width: int, *, rngs: nnx.Rngs) -> "RMSNorm":
    return RMSNorm(self, width, rngs=rngs)


class RMSNorm(nnx.Module):
  """As Config says: statistics in float32, the result in the dtype of x."""

  def __init__(self, config: Config, width: int, *, rngs: nnx.Rngs):
    self.epsilon = config.epsilon
    self.adds_one = config.weight == "one_plus_scale"
    init = zeros if self.adds_one else ones
    self.scale_D = param(init, (width,), ("norm",), float32=True, decays=False, rngs=rngs)

  def __call__(self, x_BTD: jax.Array) -> jax.Array:
    # Float32: a mean of squares over thousands of channels has no bits to spare in bfloat16.
    x32_BTD = x_BTD.astype(jnp.float32)
    inverse_rms_BT1 = jax.lax.rsqrt(
      jnp.mean(jnp.square(x32_BTD), axis=-1, keepdims=True) + self.epsilon
    )
    scale_D = self.scale_D[...].astype(jnp.float32)
    if self.adds_one:
      scale_D = 1.0 + scale_D
    return (x32_BTD * inverse_rms_BT1 * scale_D).astype(x_BTD.dtype)
