"""Parameters and FLOPs of a model by part, from its config; nothing is allocated.

Convention, for MFU too: one multiply-add is 2 FLOPs. Matrix products are counted (projections,
gates, convolution, logits) and attention at the keys that a query sees, causal and within its
window: not at those that a kernel multiplies and then masks. Documents are not taken into account:
a row counts as one document. The elementwise work of the recurrence is told apart (`recurrence`)
and is in no total: it runs on the vector unit, and peak FLOP/s are those of the matrix unit.
Training is three times the forward pass; recomputation by remat is not counted.
"""

import dataclasses
import functools
import math

import jax

from models.block import BlockConfig
from models.decoder import DecoderConfig, build
from models.layers import attention, gated_mlp, rg_lru

# Gate nonlinearities, decay, input scale and the step itself, for each channel (arXiv:2402.19427).
_ELEMENTWISE_PER_CHANNEL = 20


@dataclasses.dataclass(frozen=True, kw_only=True)
class Flops:
  """Forward FLOPs per token, averaged over a row."""

  mlp: float
  recurrent_matmul: float  # linear layers, gates and convolution of the recurrent blocks
  attention_matmul: float  # projections
  attention_keys: float  # q k^T and p v
  logits: float
  recurrence: float  # elementwise; in no total

  @property
  def forward(self) -> float:
    """All matrix products of the forward pass."""
    return (
      self.mlp + self.recurrent_matmul + self.attention_matmul + self.attention_keys + self.logits
    )

  @property
  def train(self) -> float:
    """Forward and backward: what MFU counts."""
    return 3.0 * self.forward


def flops_per_token(config: DecoderConfig, row_length: int) -> Flops:
  """FLOPs of one token in a row of `row_length` tokens, by part."""
  if row_length < 1:
    raise ValueError(f"flops_per_token: row_length {row_length} must be at least 1")
  parts = [_block_flops(block, config.width, row_length) for block in config.blocks]
  return Flops(
    mlp=sum(part.mlp for part in parts),
    recurrent_matmul=sum(part.recurrent_matmul for part in parts),
    attention_matmul=sum(part.attention_matmul for part in parts),
    attention_keys=sum(part.attention_keys for part in parts),
    logits=2.0 * config.width * config.vocab_size,
    recurrence=sum(part.recurrence for part in parts),
  )


def visible_keys(row_length: int, window: int | None) -> float:
  """Keys that a query sees, itself included, averaged over the row."""
  if window is None or window + 1 >= row_length:
    return (row_length + 1) / 2
  ramp = window * (window + 1) / 2
  return (ramp + (row_length - window) * (window + 1)) / row_length


def _block_flops(block: BlockConfig, width: int, row_length: int) -> Flops:
  mlp = _mlp_flops(block.mlp, width)
  match block.mixer:
    case rg_lru.Config() as mixer:
      return _recurrent_flops(mixer, width, mlp)
    case attention.Config() as mixer:
      return _attention_flops(mixer, width, row_length, mlp)
    case mixer:
      raise TypeError(f"flops_per_token: no rule for the mixer {type(mixer).__qualname__}")


def _mlp_flops(mlp: gated_mlp.Config, width: int) -> float:
  return 2.0 * 3 * width * mlp.mlp_width


def _recurrent_flops(mixer: rg_lru.Config, width: int, mlp: float) -> Flops:
  rnn_width = mixer.rnn_width
  linear = 2.0 * 3 * width * rnn_width
  gates = 2.0 * 2 * rnn_width * (rnn_width // mixer.num_gate_blocks)
  conv = 2.0 * mixer.conv_taps * rnn_width
  return Flops(
    mlp=mlp,
    recurrent_matmul=linear + gates + conv,
    attention_matmul=0.0,
    attention_keys=0.0,
    logits=0.0,
    recurrence=float(_ELEMENTWISE_PER_CHANNEL * rnn_width),
  )


def _attention_flops(mixer: attention.Config, width: int, row_length: int, mlp: float) -> Flops:
  heads_width = mixer.num_heads * mixer.head_size
  return Flops(
    mlp=mlp,
    recurrent_matmul=0.0,
    attention_matmul=2.0 * width * (2 * heads_width + 2 * mixer.head_size),
    attention_keys=4.0 * heads_width * visible_keys(row_length, mixer.window),
    logits=0.0,
    recurrence=0.0,
  )


@dataclasses.dataclass(frozen=True, kw_only=True)
class ParamCount:
  """Numbers of parameters."""

  embedding: int  # the table, tied with the unembedding
  rest: int

  @property
  def total(self) -> int:
    return self.embedding + self.rest


@functools.lru_cache(maxsize=256)
def count_params(config: DecoderConfig) -> ParamCount:
  """The parameters of the model, counted from its shapes."""
  shapes = build(config).shapes
  sizes = [math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes)]
  embedding = config.vocab_size * config.width
  return ParamCount(embedding=embedding, rest=sum(sizes) - embedding)
