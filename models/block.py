"""The residual block that every family is made of: pre-norm mixer, pre-norm MLP."""

import dataclasses
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from flax import nnx

from models.layers import gated_mlp
from models.layers.norms import RMSNorm
from models.layers.segments import Segments


class Mixer(Protocol):
  """What a mixer owes (models/layers/__init__.py); `state` is its own NamedTuple."""

  def __call__(self, x_BTD: jax.Array, segments: Segments, state: Any) -> tuple[jax.Array, Any]: ...

  def initial_state(self, batch: int, context: int, dtype: jnp.dtype) -> Any: ...


class MixerConfig(Protocol):
  """A frozen dataclass in the mixer's own file."""

  def build(self, width: int, *, num_blocks: int, rngs: nnx.Rngs) -> Mixer: ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class BlockConfig:
  """One residual block: what mixes over time, and the MLP."""

  mixer: MixerConfig
  mlp: gated_mlp.Config

  def build(self, width: int, *, num_blocks: int, rngs: nnx.Rngs) -> "ResidualBlock":
    return ResidualBlock(self, width, num_blocks=num_blocks, rngs=rngs)


class ResidualBlock(nnx.Module):
  """u = x + mixer(norm(x)); y = u + mlp(norm(u))."""

  def __init__(self, config: BlockConfig, width: int, *, num_blocks: int, rngs: nnx.Rngs):
    self.mixer_norm = RMSNorm(width, rngs=rngs)
    self.mixer = config.mixer.build(width, num_blocks=num_blocks, rngs=rngs)
    self.mlp_norm = RMSNorm(width, rngs=rngs)
    self.mlp = config.mlp.build(width, num_blocks=num_blocks, rngs=rngs)

  def initial_state(self, batch: int, context: int, dtype: jnp.dtype) -> Any:
    return self.mixer.initial_state(batch, context, dtype)

  def __call__(self, x_BTD: jax.Array, segments: Segments, state: Any) -> tuple[jax.Array, Any]:
    mixed_BTD, state = self.mixer(self.mixer_norm(x_BTD), segments, state)
    u_BTD = x_BTD + mixed_BTD
    return u_BTD + self.mlp(self.mlp_norm(u_BTD)), state
