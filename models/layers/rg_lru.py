"""The recurrent block of Griffin: two branches, a short convolution, the RG-LRU (arXiv:2402.19427).

  y = out(gelu(linear_y(x)) * rg_lru(conv(linear_x(x))))                          section 2.3
  r_t = sigmoid(W_a x_t + b_a)      i_t = sigmoid(W_x x_t + b_x)                  eqs. 1, 2
  a_t = exp(-8 softplus(decay) r_t)                                               eq. 3
  h_t = a_t h_{t-1} + sqrt(1 - a_t^2) (i_t x_t)                                   eq. 4

`decay` is minus the paper's Lambda. At a document start a_t is 0 and the square root is 1: the
state is forgotten and the first token enters whole. The convolution does not look across it either.

Tensor parallelism: the two input projections are split by columns, the output by rows; convolution,
gates (by block), decay and scan stay inside a shard's channels.

Sequence parallelism: the convolution takes the K - 1 tokens before a shard from the shard before
it, the recurrence what kernels/linear_scan says: both O(batch x R), whatever the row's length.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import ClassVar, Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from kernels import block_diagonal, causal_conv, halo, rg_lru
from kernels.rg_lru.gates import C
from models import observe
from models.costs import FlopsPart, LayerActivations, LeastTokens, Sends, Shard
from models.kernel_fields import kernel_field
from models.layers import projection, rg_lru_costs
from models.layers.gelu import gated_gelu
from models.layers.projection import add_bias, branch_products, project
from models.layers.rg_lru_statistics import STATISTICS, statistics
from models.layers.segments import NO_DOCUMENT, Segments
from models.param import Initializer, normal, param, zeros
from models.remat import SavedNames
from models.statistics import Statistics
from sharding import logical

_DECAY_RANGE = (0.9, 0.999)

DecayInit = Literal["paper", "recurrentgemma"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
  """The recurrent block.

  `decay_init` "paper": a^8 is uniform in [0.9, 0.999] (the text of section 2.4). "recurrentgemma":
  a itself is in that range, uniform in the ring's area (the released code), so memories are about 8
  times shorter.
  `scan` names an implementation of kernels/rg_lru, `gates` of kernels/block_diagonal, `conv` of
  kernels/causal_conv, or "auto".
  """

  recorded_as: ClassVar[str] = "models.layers.rg_lru.Config"

  rnn_width: int
  num_gate_blocks: int = 16
  conv_taps: int = 4
  decay_init: DecayInit = "paper"
  scan: str = kernel_field("rg_lru")
  gates: str = kernel_field("block_diagonal")
  conv: str = kernel_field("causal_conv")

  def __post_init__(self):
    for name in ("rnn_width", "num_gate_blocks", "conv_taps"):
      if getattr(self, name) < 1:
        raise ValueError(f"rg_lru.Config: {name} {getattr(self, name)} must be at least 1")
    if self.rnn_width % self.num_gate_blocks:
      raise ValueError(
        f"rg_lru.Config: rnn_width {self.rnn_width} is not divisible by num_gate_blocks "
        f"{self.num_gate_blocks}"
      )
    if self.decay_init not in DECAY_INITS:
      raise ValueError(
        f"rg_lru.Config: decay_init {self.decay_init!r} is none of {sorted(DECAY_INITS)}"
      )

  def kernels(self, dtype: str) -> dict[str, str]:
    return {
      "scan": rg_lru.resolve(self.scan),
      "gates": block_diagonal.resolve(self.gates, itemsize=jnp.dtype(dtype).itemsize),
      "conv": causal_conv.resolve(self.conv),
    }

  def saved_names(self) -> SavedNames:
    return projection.SAVED | SavedNames(
      none=frozenset({"scan"}), unrolled=frozenset({"gates", "conv"})
    )

  def build(self, width: int, *, num_blocks: int, rngs: nnx.Rngs) -> "RecurrentBlock":
    return RecurrentBlock(self, width, num_blocks=num_blocks, rngs=rngs)

  def scopes(self) -> tuple[str, ...]:
    return rg_lru_costs.SCOPES

  def statistics(self) -> Statistics:
    return STATISTICS

  def tensor_sizes(self) -> dict[str, int]:
    return {"num_gate_blocks": self.num_gate_blocks, "rnn_width": self.rnn_width}

  def least_tokens_per_shard(self) -> LeastTokens:
    return rg_lru_costs.least_tokens_per_shard(self.conv_taps)

  def flops(self, width: int, row_length: int) -> tuple[FlopsPart, ...]:
    del row_length
    return rg_lru_costs.flops(
      width,
      rnn_width=self.rnn_width,
      gate_width=self.rnn_width // self.num_gate_blocks,
      conv_taps=self.conv_taps,
    )

  def activations(self, width: int, shard: Shard) -> LayerActivations:
    return rg_lru_costs.activations(
      width, shard, rnn_width=self.rnn_width, scan=self.scan, gates=self.gates, conv=self.conv
    )

  def sends(self, shard: Shard) -> Sends:
    return rg_lru_costs.sends(
      shard, rnn_width=self.rnn_width, conv_taps=self.conv_taps, scan=self.scan
    )


class RecurrentState(NamedTuple):
  """The recurrence's last state (always float32) and the last inputs of the convolution."""

  h_BR: jax.Array
  conv_BKR: jax.Array
  document_BK: jax.Array


class RecurrentBlock(nnx.Module):
  """x -> gated recurrence over the documents of the row -> projection with bias."""

  def __init__(self, config: Config, width: int, *, num_blocks: int, rngs: nnx.Rngs):
    rnn_width, blocks = config.rnn_width, config.num_gate_blocks
    block_width = rnn_width // blocks
    self.scan = rg_lru.resolve(config.scan)
    self.gates = block_diagonal.resolve(config.gates)
    self.gates_of_float32 = block_diagonal.resolve(config.gates, itemsize=4)
    self.conv = causal_conv.resolve(config.conv)
    self.w_in_D2R = param(
      normal(1.0 / width), (width, 2, rnn_width), ("embed", "branch", "rnn"), rngs=rngs
    )
    self.b_in_2R = param(
      zeros, (2, rnn_width), ("branch", "rnn"), float32=True, decays=False, rngs=rngs
    )
    self.w_conv_KR = param(
      normal(0.01 / 4), (config.conv_taps, rnn_width), ("tap", "rnn"), rngs=rngs
    )
    self.b_conv_R = param(zeros, (rnn_width,), ("rnn",), float32=True, decays=False, rngs=rngs)
    self.w_gates_GI2J = param(
      normal(1.0 / block_width),
      (blocks, block_width, 2, block_width),
      ("gate_block", "gate_in", "branch", "gate_out"),
      decays=False,
      rngs=rngs,
    )
    self.b_gates_G2J = param(
      zeros,
      (blocks, 2, block_width),
      ("gate_block", "branch", "gate_out"),
      float32=True,
      decays=False,
      rngs=rngs,
    )
    self.decay_R = param(
      DECAY_INITS[config.decay_init], (rnn_width,), ("rnn",), float32=True, decays=False, rngs=rngs
    )
    self.w_out_RD = param(
      normal(2.0 / (num_blocks * rnn_width)), (rnn_width, width), ("rnn", "embed"), rngs=rngs
    )
    self.b_out_D = param(zeros, (width,), ("norm",), float32=True, decays=False, rngs=rngs)

  def initial_state(self, batch: int, context: int, dtype: jnp.dtype) -> RecurrentState:
    """Zeros; the size does not depend on `context`."""
    del context
    taps, rnn_width = self.w_conv_KR.shape
    return RecurrentState(
      jnp.zeros((batch, rnn_width), jnp.float32),
      jnp.zeros((batch, taps - 1, rnn_width), dtype),
      jnp.full((batch, taps - 1), NO_DOCUMENT, jnp.int32),
    )

  def __call__(
    self, x_BTD: jax.Array, segments: Segments, state: RecurrentState | None
  ) -> tuple[jax.Array, RecurrentState | None]:
    dtype = x_BTD.dtype
    with jax.named_scope("recurrent"):
      w_in_D2R = self.w_in_D2R[...].astype(dtype)
      gate_BTR, in_BTR = branch_products(x_BTD, w_in_D2R, axis="rnn")
      gate_BTR = add_bias(gate_BTR, self.b_in_2R[0])
      h_BTR, h_BR = self._recur(*self._conv(in_BTR, segments, state), segments, state)
      y_BTD = project(gated_gelu(gate_BTR, h_BTR), self.w_out_RD[...].astype(dtype))
      y_BTD = add_bias(y_BTD, self.b_out_D[...])
    if state is None:
      return y_BTD, None
    time = x_BTD.shape[1]
    conv_BSR = jnp.concatenate([state.conv_BKR, add_bias(in_BTR, self.b_in_2R[1])], axis=1)
    document_BS = jnp.concatenate([state.document_BK, segments.document_BT], axis=1)
    return y_BTD, RecurrentState(h_BR, conv_BSR[:, time:], document_BS[:, time:])

  def _conv(
    self, x_BTR: jax.Array, segments: Segments, state: RecurrentState | None
  ) -> tuple[jax.Array, jax.Array]:
    """Causal depthwise convolution of x and its bias, tap K-1 on the current token, within each
    document. It is returned twice, for gates and for the recurrence (kernels/causal_conv)."""
    row, channels = ("batch", "time", "rnn"), ("rnn",)
    arrays = (
      x_BTR, self.b_in_2R[1], self.w_conv_KR[...], self.b_conv_R[...], segments.document_BT
    )  # fmt: skip
    in_axes = (row, channels, (None, "rnn"), channels, ("batch", "time"))
    if state is not None:
      arrays += (state.conv_BKR, state.document_BK)
      in_axes += (("batch", None, "rnn"), ("batch", None))
    convolve = logical.on_shards(
      functools.partial(_convolve, implementation=self.conv),
      in_axes=in_axes,
      out_axes=(row, row),
      check_vma=causal_conv.tracks_varying(self.conv),
    )
    with jax.named_scope("conv"):
      return convolve(*arrays)

  def _recur(
    self,
    gated_BTR: jax.Array,
    x_BTR: jax.Array,
    segments: Segments,
    state: RecurrentState | None,
  ) -> tuple[jax.Array, jax.Array]:
    """The states of the recurrence on `x_BTR`, with gates formed from `gated_BTR`, and the row's
    last state.

    On shards also where only channels are split: the partitioner must not see a Pallas kernel.
    """
    row = ("batch", "time", "rnn")
    recur = logical.on_shards(
      functools.partial(_recur, implementation=self.scan),
      in_axes=(row, row, row, ("rnn",), ("batch", "time"), ("batch", "rnn")),
      out_axes=(row, row),
      check_vma=rg_lru.tracks_varying(self.scan),
    )
    r_BTR, i_BTR = self._gates(gated_BTR)
    batch, _, width = x_BTR.shape
    h0_BR = jnp.zeros((batch, width), jnp.float32) if state is None else state.h_BR
    h_BTR, last_BSR = recur(x_BTR, r_BTR, i_BTR, self.decay_R[...], segments.is_start_BT, h0_BR)
    if observe.is_on():
      observe.record(**statistics(r_BTR, i_BTR, h_BTR, self.decay_R[...]))
    return h_BTR, last_BSR[:, 0]

  def _gates(self, x_BTR: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Pre-activations of the recurrence gate and of the input gate, [batch, time, R]."""
    implementation = self.gates_of_float32 if x_BTR.dtype == jnp.float32 else self.gates
    products = functools.partial(
      block_diagonal.products, implementation=implementation, is_whole=not logical.is_split()
    )
    if not block_diagonal.is_partitioned(implementation):
      row = ("batch", "time", "rnn")
      products = logical.on_shards(
        products,
        in_axes=(row, ("gate_block", None, None, None), ("gate_block", None, None)),
        out_axes=(row, row),
        check_vma=False,
      )
    with jax.named_scope("gates"):
      return products(x_BTR, self.w_gates_GI2J[...].astype(x_BTR.dtype), self.b_gates_G2J[...])


def _convolve(x_BTR, b_in_R, w_KR, b_R, document_BT, *before, implementation):
  """The convolution of one shard of the row; `before` is what precedes the row, if anything: inputs
  with their bias [B, K-1, R], and documents."""
  axis_name, history = logical.mesh_axis("time"), w_KR.shape[0] - 1
  if axis_name is not None:
    batch, time, width = x_BTR.shape
    if time < history:
      raise ValueError(
        f"rg_lru: {time} tokens of a row on each device are fewer than the {history} that the "
        "convolution takes from the device before; use longer rows or a smaller mesh axis sequence"
      )
    edges = before or (
      jnp.zeros((batch, history, width), x_BTR.dtype),
      jnp.full((batch, history), NO_DOCUMENT, jnp.int32),
    )
    ends = (add_bias(x_BTR[:, time - history :], b_in_R), document_BT[:, time - history :])
    before = tuple(
      halo.from_neighbour(end, before=True, axis_name=axis_name, edge=edge)
      for end, edge in zip(ends, edges)
    )
  return causal_conv.convolve(
    x_BTR, b_in_R, w_KR, b_R, document_BT, *before, implementation=implementation
  )


def _recur(x_BTR, r_BTR, i_BTR, decay_R, is_start_BT, h0_BR, *, implementation):
  """The states of one shard of the row, and a copy of the row's last state, [batch, 1, R]."""
  h_BTR, h_BR = rg_lru.rg_lru(
    x_BTR,
    r_BTR,
    i_BTR,
    decay_R,
    is_start_BT,
    h0_BR,
    implementation=implementation,
    axis_name=logical.mesh_axis("time"),
  )
  return h_BTR, h_BR[:, None]


def _paper_decay(key: jax.Array, shape: Sequence[int]) -> jax.Array:
  """a^8 uniform in the range: decay = log(expm1(-ln(a^8) / 8))."""
  low, high = _DECAY_RANGE
  a8_R = jax.random.uniform(key, shape, jnp.float32, low, high)
  return jnp.log(jnp.expm1(-jnp.log(a8_R) / C))


def _recurrentgemma_decay(key: jax.Array, shape: Sequence[int]) -> jax.Array:
  """a uniform in the area of the ring low <= a <= high: decay = log(1/a - 1)."""
  low, high = _DECAY_RANGE
  a_R = jnp.sqrt(jax.random.uniform(key, shape, jnp.float32, low**2, high**2))
  return jnp.log(1.0 / a_R - 1.0)


DECAY_INITS: dict[str, Initializer] = {
  "paper": _paper_decay,
  "recurrentgemma": _recurrentgemma_decay,
}
