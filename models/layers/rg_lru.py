"""The recurrent block of Griffin: two branches, a short convolution, the RG-LRU (arXiv:2402.19427).

  y = out(gelu(linear_y(x)) * rg_lru(conv(linear_x(x))))                          section 2.3
  r_t = sigmoid(W_a x_t + b_a)      i_t = sigmoid(W_x x_t + b_x)                  eqs. 1, 2
  a_t = exp(-8 softplus(decay) r_t)                                               eq. 3
  h_t = a_t h_{t-1} + sqrt(1 - a_t^2) (i_t x_t)                                   eq. 4

`decay` is minus the paper's Lambda. At a document start a_t is 0 and the square root 1: the state
is forgotten and the first token enters whole. The convolution does not look across it either.

Tensor parallelism: the two input projections are split by columns, the output by rows; convolution,
gates (by block), decay and scan stay inside a shard's channels.

Sequence parallelism: the convolution takes the K - 1 tokens before a shard from the shard before
it, the recurrence what kernels/linear_scan says: both O(batch x R), whatever the row's length.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from kernels import block_diagonal, halo, rg_lru
from kernels.rg_lru.gates import C
from models import observe
from models.layers.gelu import gated_gelu
from models.layers.projection import add_bias, branches, project
from models.layers.rg_lru_statistics import statistics
from models.layers.segments import NO_DOCUMENT, Segments
from models.param import Initializer, normal, param, zeros
from sharding import logical

_DECAY_RANGE = (0.9, 0.999)

DecayInit = Literal["paper", "recurrentgemma"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
  """The recurrent block.

  `decay_init` "paper": a^8 uniform in [0.9, 0.999] (the text of section 2.4); "recurrentgemma": a
  itself there, uniform in the ring's area (the released code): memories about 8 times shorter.
  `scan` names an implementation of kernels/rg_lru, `gates` of kernels/block_diagonal, or "auto".
  """

  rnn_width: int
  num_gate_blocks: int = 16
  conv_taps: int = 4
  decay_init: DecayInit = "paper"
  scan: str = "auto"
  gates: str = "auto"

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

  def build(self, width: int, *, num_blocks: int, rngs: nnx.Rngs) -> "RecurrentBlock":
    return RecurrentBlock(self, width, num_blocks=num_blocks, rngs=rngs)


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
    self.w_in_D2R = param(
      normal(1.0 / width), (width, 2, rnn_width), ("embed", "branch", "rnn"), rngs=rngs
    )
    self.b_in_2R = param(zeros, (2, rnn_width), ("branch", "rnn"), rngs=rngs)
    self.w_conv_KR = param(
      normal(0.01 / 4), (config.conv_taps, rnn_width), ("tap", "rnn"), rngs=rngs
    )
    self.b_conv_R = param(zeros, (rnn_width,), ("rnn",), rngs=rngs)
    self.w_gates_GI2J = param(
      normal(1.0 / block_width),
      (blocks, block_width, 2, block_width),
      ("gate_block", "gate_in", "branch", "gate_out"),
      rngs=rngs,
    )
    self.b_gates_G2J = param(
      zeros, (blocks, 2, block_width), ("gate_block", "branch", "gate_out"), rngs=rngs
    )
    self.decay_R = param(DECAY_INITS[config.decay_init], (rnn_width,), ("rnn",), rngs=rngs)
    self.w_out_RD = param(
      normal(2.0 / (num_blocks * rnn_width)), (rnn_width, width), ("rnn", "embed"), rngs=rngs
    )
    self.b_out_D = param(zeros, (width,), ("norm",), rngs=rngs)

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
    has_state = state is not None
    if state is None:
      state = self.initial_state(x_BTD.shape[0], 0, dtype)
    with jax.named_scope("recurrent"):
      w_in_D2R = self.w_in_D2R[...].astype(dtype)
      gate_BTR, in_BTR = branches(x_BTD, w_in_D2R, self.b_in_2R[...], axis="rnn")
      conv_BTR = self._conv(in_BTR, segments, state)
      h_BTR, h_BR = self._recur(conv_BTR, segments, state)
      y_BTD = project(gated_gelu(gate_BTR, h_BTR), self.w_out_RD[...].astype(dtype))
      y_BTD = add_bias(y_BTD, self.b_out_D[...])
    if not has_state:
      return y_BTD, None
    time = x_BTD.shape[1]
    conv_BSR = jnp.concatenate([state.conv_BKR, in_BTR], axis=1)
    document_BS = jnp.concatenate([state.document_BK, segments.document_BT], axis=1)
    return y_BTD, RecurrentState(h_BR, conv_BSR[:, time:], document_BS[:, time:])

  def _conv(self, x_BTR: jax.Array, segments: Segments, state: RecurrentState) -> jax.Array:
    """Causal depthwise convolution, tap K-1 on the current token, over one document only."""
    convolve = logical.on_shards(
      _convolve,
      in_axes=(
        ("batch", "time", "rnn"),
        ("batch", "time"),
        ("batch", None, "rnn"),
        ("batch", None),
        (None, "rnn"),
        ("rnn",),
      ),
      out_axes=("batch", "time", "rnn"),
    )
    with jax.named_scope("conv"):
      return convolve(
        x_BTR,
        segments.document_BT,
        state.conv_BKR,
        state.document_BK,
        self.w_conv_KR[...].astype(jnp.float32),
        self.b_conv_R[...].astype(jnp.float32),
      )

  def _recur(
    self, x_BTR: jax.Array, segments: Segments, state: RecurrentState
  ) -> tuple[jax.Array, jax.Array]:
    """The states of the recurrence on x, and the row's last one.

    On shards also where only channels are split: a Pallas kernel must not meet the partitioner.
    """
    row = ("batch", "time", "rnn")
    recur = logical.on_shards(
      functools.partial(_recur, implementation=self.scan),
      in_axes=(row, row, row, ("rnn",), ("batch", "time"), ("batch", "rnn")),
      out_axes=(row, row),
      check_vma=rg_lru.tracks_varying(self.scan),
    )
    r_BTR, i_BTR = self._gates(x_BTR)
    h_BTR, last_BSR = recur(
      x_BTR, r_BTR, i_BTR, self.decay_R[...], segments.is_start_BT, state.h_BR
    )
    if observe.is_on():
      observe.record(**statistics(r_BTR, i_BTR, h_BTR, self.decay_R[...]))
    return h_BTR, last_BSR[:, 0]

  def _gates(self, x_BTR: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Pre-activations of the recurrence gate and of the input gate, [batch, time, R]."""
    products = functools.partial(
      block_diagonal.products, implementation=self.gates, is_whole=not logical.is_split()
    )
    if not block_diagonal.is_partitioned(self.gates):
      row = ("batch", "time", "rnn")
      products = logical.on_shards(
        products,
        in_axes=(row, ("gate_block", None, None, None), ("gate_block", None, None)),
        out_axes=(row, row),
        check_vma=False,
      )
    with jax.named_scope("gates"):
      return products(x_BTR, self.w_gates_GI2J[...].astype(x_BTR.dtype), self.b_gates_G2J[...])


def _convolve(x_BTR, document_BT, before_BKR, before_BK, w_KR, b_R):
  """The convolution of one shard of the row; `before` is what stands before the row.

  Sums are float32: those of the outputs and, over all tokens, the gradients of w and b.
  """
  axis_name, history = logical.mesh_axis("time"), before_BK.shape[1]
  time = x_BTR.shape[1]
  if axis_name is not None:
    if time < history:
      raise ValueError(
        f"rg_lru: {time} tokens of a row on each device are fewer than the {history} that the "
        "convolution takes from the device before; use longer rows or a smaller mesh axis sequence"
      )
    neighbour = functools.partial(halo.from_neighbour, before=True, axis_name=axis_name)
    before_BKR = neighbour(x_BTR[:, time - history :], edge=before_BKR)
    before_BK = neighbour(document_BT[:, time - history :], edge=before_BK)
  x_BSR = jnp.concatenate([before_BKR, x_BTR], axis=1)
  document_BS = jnp.concatenate([before_BK, document_BT], axis=1)
  y_BTR = x_BTR.astype(jnp.float32) * w_KR[history] + b_R
  for tap in range(history):
    same_BT1 = (document_BS[:, tap : tap + time] == document_BT)[..., None]
    tap_BTR = jnp.where(same_BT1, x_BSR[:, tap : tap + time], 0)
    y_BTR += tap_BTR.astype(jnp.float32) * w_KR[tap]
  return y_BTR.astype(x_BTR.dtype)


def _recur(x_BTR, r_BTR, i_BTR, decay_R, is_start_BT, h0_BR, *, implementation):
  """The states of one shard of the row, and the row's last one as this shard's [batch, 1, R]."""
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
  """a uniform in the area of the ring low <= |a| <= high: decay = log(1/a - 1)."""
  low, high = _DECAY_RANGE
  a_R = jnp.sqrt(jax.random.uniform(key, shape, jnp.float32, low**2, high**2))
  return jnp.log(1.0 / a_R - 1.0)


DECAY_INITS: dict[str, Initializer] = {
  "paper": _paper_decay,
  "recurrentgemma": _recurrentgemma_decay,
}
