"""The residual block: a mixer, and an MLP unless there is none, each behind a norm."""

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx

from models.block import MixerConfig, MLPConfig
from models.costs import FlopsPart, LayerActivations, LeastTokens, Sends, Sent, Shard
from models.layers import norms
from models.layers.segments import Segments
from models.remat import SavedNames
from models.statistics import Statistics

# Arrays of the stream's width alive at the peak of a block's backward pass, found by compiling for
# TPU; docs/plans.jsonl has the errors that are left.
_STREAM_WORKING = 6
# A norm reads the stream and writes its result; the sum reads stream and branch, writes the stream.
_STREAM_PASSES = 5


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
  """One residual block: what mixes over time, the MLP, if it has one, and the norm before each."""

  recorded_as: ClassVar[str] = "models.block.BlockConfig"

  mixer: MixerConfig
  mlp: MLPConfig | None
  norm: norms.NormConfig = norms.Config()

  def build(self, width: int, *, num_blocks: int, rngs: nnx.Rngs) -> "ResidualBlock":
    return ResidualBlock(self, width, num_blocks=num_blocks, rngs=rngs)

  def saved_names(self) -> SavedNames:
    saved = self.mixer.saved_names()
    return saved if self.mlp is None else saved | self.mlp.saved_names()

  def scopes(self) -> tuple[str, ...]:
    return self.mixer.scopes() + (() if self.mlp is None else self.mlp.scopes())

  def tensor_sizes(self) -> dict[str, int]:
    sizes = {} if self.mlp is None else _under("mlp", self.mlp.tensor_sizes())
    return sizes | _under("mixer", self.mixer.tensor_sizes())

  def least_tokens_per_shard(self) -> LeastTokens:
    return self.mixer.least_tokens_per_shard()

  def flops(self, width: int, row_length: int) -> tuple[FlopsPart, ...]:
    mixer = self.mixer.flops(width, row_length)
    if self.mlp is None:
      return mixer
    # The norm of the MLP needs the result of the mixer's last product.
    return self.mlp.flops(width) + tuple(dataclasses.replace(part, last=0.0) for part in mixer)

  def activations(self, width: int, shard: Shard) -> LayerActivations:
    layers = [self.mixer.activations(width, shard)]
    if self.mlp is not None:
      layers.append(self.mlp.activations(width, shard))
    stream = width * shard.itemsize
    moved = len(layers) * _STREAM_PASSES * stream
    return LayerActivations(
      products=sum(layer.products for layer in layers),
      batched=sum(layer.batched for layer in layers),
      forward=moved + sum(layer.forward for layer in layers),
      elementwise=moved + sum(layer.elementwise for layer in layers),
      working=_STREAM_WORKING * stream + sum(layer.working for layer in layers),
    )

  def sends(self, width: int, shard: Shard) -> Sends:
    """Megatron: tensor shards sum each layer's output forward and its input's gradient backward.
    The sum of an output that is computed again is sent again."""
    sent = self.mixer.sends(shard)
    mlp = {} if self.mlp is None else self.mlp.tensor_sizes()
    is_split = [bool(self.mixer.tensor_sizes()), bool(mlp)]
    times = 2 * sum(is_split)
    if self.mlp is not None and shard.remat == "block":
      times += is_split[0]
    stream = shard.tokens * width * shard.itemsize
    sums = Sent("all-reduce", "tensor", times, times * stream)
    return sent._replace(each=(sums, *sent.each))

  def kind(self) -> str:
    return type(self.mixer).__module__.rpartition(".")[2]

  def statistics(self) -> Statistics:
    return self.mixer.statistics()


def _under(name: str, sizes: dict[str, int]) -> dict[str, int]:
  return {f"{name}.{field}": size for field, size in sizes.items()}


class ResidualBlock(nnx.Module):
  """u = x + mixer(norm(x)); y = u + mlp(norm(u)), or u without an MLP."""

  def __init__(self, config: Config, width: int, *, num_blocks: int, rngs: nnx.Rngs):
    self.mixer_norm = config.norm.build(width, rngs=rngs)
    self.mixer = config.mixer.build(width, num_blocks=num_blocks, rngs=rngs)
    self.has_mlp = config.mlp is not None
    if config.mlp is not None:
      self.mlp_norm = config.norm.build(width, rngs=rngs)
      self.mlp = config.mlp.build(width, num_blocks=num_blocks, rngs=rngs)

  def initial_state(self, batch: int, context: int, dtype: jnp.dtype) -> Any:
    return self.mixer.initial_state(batch, context, dtype)

  def __call__(self, x_BTD: jax.Array, segments: Segments, state: Any) -> tuple[jax.Array, Any]:
    mixed_BTD, state = self.mixer(self.mixer_norm(x_BTD), segments, state)
    u_BTD = x_BTD + mixed_BTD
    if not self.has_mlp:
      return u_BTD, state
    return u_BTD + self.mlp(self.mlp_norm(u_BTD)), state
