"""Attention, local or global, with any number of key-value heads.

One is multi-query attention (arXiv:2402.19427, section 2.3), as many as query heads multi-head
attention; in between (arXiv:2305.13245) query head n uses key-value head n // (N / E).

A query sees itself and the `window` tokens before it, so at most window + 1 keys, all in its own
document; `window=None` is global attention, the baseline Transformer's. Distances are counted in
the row; rotary positions restart at each document.

Tensor parallelism: query heads and the rows of the output projection are split, and key-value heads
with them: a shard computes those that its query heads use. Where there are fewer key-value heads
than shards, several shards compute the same one, and its gradient is the sum over them.

Sequence parallelism: local attention takes the `window` keys and values before a shard from the
shard before it, or from as many as hold them. Global attention gathers the keys and values of the
row on every shard: 2 x head_size numbers a token for each key-value head, beside width.
"""

import dataclasses
import functools
import math
from typing import ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from kernels import halo, local_attention
from models.costs import FlopsPart, LayerActivations, LeastTokens, Sends, Shard
from models.initial_weights import FanIn, InitialWeights
from models.kernel_fields import kernel_field
from models.layers import attention_costs, projection
from models.layers.projection import add_bias, project, project_each
from models.layers.rope import Rope, apply_rope
from models.layers.segments import NO_DOCUMENT, Segments
from models.layers.state import Cache
from models.param import param, zeros
from models.remat import SavedNames
from models.statistics import Statistics
from sharding import logical


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
  """`window=None` is global; `implementation` names one of kernels/local_attention, or "auto".

  The defaults are those of Griffin and RecurrentGemma.
  """

  recorded_as: ClassVar[str] = "models.layers.attention.Config"

  num_heads: int
  head_size: int
  window: int | None
  num_kv_heads: int = 1
  rope: Rope = Rope()
  output_bias: bool = True
  initial_weights: InitialWeights = FanIn()
  implementation: str = kernel_field("local_attention")

  def __post_init__(self):
    for name in ("num_heads", "head_size", "num_kv_heads"):
      if getattr(self, name) < 1:
        raise ValueError(f"attention.Config: {name} {getattr(self, name)} must be at least 1")
    if self.num_heads % self.num_kv_heads:
      raise ValueError(
        f"attention.Config: num_heads {self.num_heads} is not divisible by num_kv_heads "
        f"{self.num_kv_heads}"
      )
    self.rope.rotated(self.head_size)
    if self.window is not None and self.window < 1:
      raise ValueError(f"attention.Config: window {self.window} must be at least 1, or None")

  def kernels(self, dtype: str) -> dict[str, str]:
    del dtype
    name = local_attention.resolve(self.implementation, head_size=self.head_size)
    return {"implementation": name}

  def saved_names(self) -> SavedNames:
    return projection.SAVED | SavedNames(
      none=frozenset({"attention"}), unrolled=frozenset({"rotated"})
    )

  def build(self, width: int, *, num_blocks: int, rngs: nnx.Rngs) -> "Attention":
    return Attention(self, width, num_blocks=num_blocks, rngs=rngs)

  def scopes(self) -> tuple[str, ...]:
    return attention_costs.SCOPES

  def statistics(self) -> Statistics:
    return Statistics()

  def tensor_sizes(self) -> dict[str, int]:
    return {"num_heads": self.num_heads}

  def least_tokens_per_shard(self) -> LeastTokens:
    return LeastTokens(1, "a device can compute")

  def flops(self, width: int, row_length: int) -> tuple[FlopsPart, ...]:
    return attention_costs.flops(
      width,
      row_length,
      num_heads=self.num_heads,
      num_kv_heads=self.num_kv_heads,
      head_size=self.head_size,
      window=self.window,
      implementation=self.implementation,
    )

  def activations(self, width: int, shard: Shard) -> LayerActivations:
    return attention_costs.activations(
      width,
      shard,
      num_heads=self.num_heads,
      num_kv_heads=self.num_kv_heads,
      head_size=self.head_size,
      window=self.window,
      implementation=self.implementation,
    )

  def sends(self, shard: Shard) -> Sends:
    return attention_costs.sends(
      shard, num_kv_heads=self.num_kv_heads, head_size=self.head_size, window=self.window
    )


class AttentionState(NamedTuple):
  """The keys and values (already rotated) that the next query may see, its own included. Token t of
  the row is at index t modulo the size, in place of one that no later query sees."""

  k_BWEH: Cache
  v_BWEH: Cache
  document_BW: Cache


class Attention(nnx.Module):
  """x -> attention over the documents of the row -> projection."""

  def __init__(self, config: Config, width: int, *, num_blocks: int, rngs: nnx.Rngs):
    num_heads, num_kv_heads, head_size = config.num_heads, config.num_kv_heads, config.head_size
    initial = config.initial_weights
    self.num_kv_heads = num_kv_heads
    self.rope = config.rope
    self.has_bias = config.output_bias
    self.window = config.window
    self.head_size = head_size
    self.implementation = local_attention.resolve(config.implementation, head_size=head_size)
    inside = initial.inside(width)
    self.w_q_DNH = param(
      inside, (width, num_heads, head_size), ("embed", "heads", "head"), rngs=rngs
    )
    if num_kv_heads == 1:
      self.w_kv_D2H = param(inside, (width, 2, head_size), ("embed", "branch", "head"), rngs=rngs)
    else:
      self.w_kv_D2EH = param(
        inside,
        (width, 2, num_kv_heads, head_size),
        ("embed", "branch", "kv_heads", "head"),
        rngs=rngs,
      )
    self.w_out_NHD = param(
      initial.into_stream(num_heads * head_size, num_blocks),
      (num_heads, head_size, width),
      ("heads", "head", "embed"),
      rngs=rngs,
    )
    if config.output_bias:
      self.b_out_D = param(zeros, (width,), ("norm",), float32=True, decays=False, rngs=rngs)

  def initial_state(self, batch: int, context: int, dtype: jnp.dtype) -> AttentionState:
    """Room for `window` tokens and the query's own, or for `context` where attention is global."""
    if self.window is None and context < 1:
      raise ValueError(
        f"attention: context {context} must be at least 1: so many tokens can global attention see"
      )
    size = context if self.window is None else self.window + 1
    empty_BWEH = jnp.zeros((batch, size, self.num_kv_heads, self.head_size), dtype)
    no_document_BW = jnp.full((batch, size), NO_DOCUMENT, jnp.int32)
    return AttentionState(Cache(empty_BWEH), Cache(empty_BWEH), Cache(no_document_BW))

  def __call__(
    self, x_BTD: jax.Array, segments: Segments, state: AttentionState | None
  ) -> tuple[jax.Array, AttentionState | None]:
    dtype = x_BTD.dtype
    with jax.named_scope("attention"):
      # A state holds each key-value head once.
      copies = _copies(self.num_kv_heads) if state is None else 1
      q_BTNH, k_BSEH, v_BSEH = self._projected(x_BTD, copies=copies)
      q_BTNH = apply_rope(q_BTNH, segments.position_BT, self.rope)
      k_BSEH = apply_rope(k_BSEH, segments.position_BT, self.rope)
      # Remat keeps this instead of the product before it, which no gradient needs.
      q_BTNH = checkpoint_name(q_BTNH, "rotated")
      document_BS = segments.document_BT
      new = (k_BSEH, v_BSEH, document_BS)
      keys = new
      if state is not None:
        if segments.num_before_B is not None and x_BTD.shape[1] > 1:
          before = _in_order(state, segments.num_before_B, self.window)
          keys = tuple(jnp.concatenate(parts, axis=1) for parts in zip(before, new, strict=True))
        state = _written(state, new, segments.num_before_B)
      if state is not None and x_BTD.shape[1] == 1:
        # The cache now holds only keys that are near enough to be seen.
        y_BTNH = _attend_to_cache(q_BTNH, document_BS, state)
      else:
        y_BTNH = self._attend(q_BTNH, segments.document_BT, *keys)
      y_BTD = project(y_BTNH, self.w_out_NHD[...].astype(dtype), inputs=2)
      return add_bias(y_BTD, self.b_out_D[...]) if self.has_bias else y_BTD, state

  def _projected(self, x_BTD: jax.Array, *, copies: int) -> tuple[jax.Array, ...]:
    """q_BTNH, k_BTEH and v_BTEH, not rotated; each key-value head `copies` times in a row."""
    w_q_DNH = self.w_q_DNH[...].astype(x_BTD.dtype)
    if self.num_kv_heads == 1:
      q_BTNH = project(x_BTD, w_q_DNH)
      kv_BT2H = project(x_BTD, self.w_kv_D2H[...].astype(x_BTD.dtype))
      return q_BTNH, kv_BT2H[:, :, :1], kv_BT2H[:, :, 1:]
    w_kv_D2EH = _repeated(self.w_kv_D2EH[...].astype(x_BTD.dtype), copies)
    q_axes, kv_axes = ("heads", "head"), (None, "heads", "head")
    q_BTNH, kv_BT2EH = project_each(
      x_BTD, (w_q_DNH, w_kv_D2EH), axes=(q_axes, kv_axes), split="heads"
    )
    return q_BTNH, kv_BT2EH[:, :, 0], kv_BT2EH[:, :, 1]

  def _attend(
    self,
    q_BTNH: jax.Array,
    q_document_BT: jax.Array,
    k_BSEH: jax.Array,
    v_BSEH: jax.Array,
    k_document_BS: jax.Array,
  ) -> jax.Array:
    """The attention of the queries to the keys, the last of which are the queries' own."""
    copies = _copies(k_BSEH.shape[2])
    k_BSEH, v_BSEH = _repeated(k_BSEH, copies), _repeated(v_BSEH, copies)
    # Where all shards use one key-value head, its gradients are summed over shards once, because
    # heads are split here; the partitioner would sum them block by block, in float32.
    kv_axes = ("batch", "time", None if self.num_kv_heads == 1 else "heads", "head")
    attend = logical.on_shards(
      functools.partial(_attend, window=self.window, implementation=self.implementation),
      in_axes=(
        ("batch", "time", "heads", "head"),
        kv_axes,
        kv_axes,
        ("batch", "time"),
        ("batch", "time"),
      ),
      out_axes=("batch", "time", "heads", "head"),
      check_vma=local_attention.tracks_varying(self.implementation),
    )
    return attend(q_BTNH, k_BSEH, v_BSEH, q_document_BT, k_document_BS)


def _copies(num_kv_heads: int) -> int:
  """How many times each of several key-value heads must be repeated, so that every shard of query
  heads has whole key-value heads of its own."""
  shards = logical.num_shards("heads")
  return 1 if num_kv_heads == 1 else shards // math.gcd(shards, num_kv_heads)


def _repeated(x: jax.Array, copies: int) -> jax.Array:
  """x [.., .., E, H] with each key-value head `copies` times in a row."""
  return x if copies == 1 else jnp.repeat(x, copies, axis=2)


def _attend_to_cache(q_BTNH, document_BT, state):
  """The attention of one query of each row to the cache, its own key included, in any order."""
  k_BWEH, v_BWEH, document_BW = (cache.read() for cache in state)
  product = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)
  batch, time, num_heads, head_size = q_BTNH.shape
  q_BTEQH = q_BTNH.reshape(batch, time, k_BWEH.shape[2], -1, head_size)
  logits_BTEQW = product("BTEQH,BWEH->BTEQW", q_BTEQH, k_BWEH) * head_size**-0.5
  is_seen_BTW = document_BT[:, :, None] == document_BW[:, None]
  logits_BTEQW = jnp.where(is_seen_BTW[:, :, None, None], logits_BTEQW, -jnp.inf)
  weights_BTEQW = jnp.exp(logits_BTEQW - jnp.max(logits_BTEQW, axis=-1, keepdims=True))
  sum_BTEQ1 = jnp.sum(weights_BTEQW, axis=-1, keepdims=True)
  o_BTEQH = product("BTEQW,BWEH->BTEQH", weights_BTEQW.astype(v_BWEH.dtype), v_BWEH) / sum_BTEQ1
  return o_BTEQH.astype(q_BTNH.dtype).reshape(batch, time, num_heads, head_size)


def _in_order(state, num_before_B, window):
  """Keys, values and documents of the cache that later queries see, oldest first."""
  size = state.document_BW.size
  kept = size if window is None else window
  # The oldest is where the next will be written.
  index_BW = (num_before_B[:, None] + jnp.arange(size - kept, size)) % size

  def ordered(x: jax.Array) -> jax.Array:
    return jnp.take_along_axis(x, index_BW.reshape(*index_BW.shape, *(1,) * (x.ndim - 2)), axis=1)

  return tuple(ordered(cache.read()) for cache in state)


def _written(state, new, num_before_B):
  """The state with the newest tokens, each in place of the oldest."""
  size, time = state.document_BW.size, new[0].shape[1]
  kept = slice(max(0, time - size), time)
  index_BT = jnp.arange(time, dtype=jnp.int32)[None, kept]
  if num_before_B is not None:
    index_BT += num_before_B[:, None]
  index_BT = jnp.broadcast_to(index_BT % size, new[2][:, kept].shape)
  caches = (cache.write(x[:, kept], index_BT) for cache, x in zip(state, new, strict=True))
  return AttentionState(*caches)


def _attend(q_BTNH, k_BSEH, v_BSEH, q_documents_BT, k_documents_BS, *, window, implementation):
  """Attention of one shard's queries to the keys of its row that they can reach."""
  keys = (k_BSEH, v_BSEH, k_documents_BS)
  axis_name = logical.mesh_axis("time")
  if axis_name is not None:
    before = _all_keys_before if window is None else functools.partial(_keys_before, window=window)
    keys = tuple(
      jnp.concatenate(parts, axis=1) for parts in zip(before(*keys, axis_name=axis_name), keys)
    )
  k_BSEH, v_BSEH, k_documents_BS = keys
  return local_attention.local_attention(
    q_BTNH,
    k_BSEH,
    v_BSEH,
    q_documents_BT,
    k_documents_BS,
    window=window,
    implementation=implementation,
  )


def _keys_before(k_BSEH, v_BSEH, documents_BS, *, window, axis_name):
  """The `window` keys before this shard; those before the row belong to no document."""
  # Farther back than all shards but one there is no token.
  count = min(window, (jax.lax.axis_size(axis_name) - 1) * documents_BS.shape[1])
  before = functools.partial(halo.tokens_before, count=count, axis_name=axis_name)
  return before(k_BSEH), before(v_BSEH), before(documents_BS, fill=NO_DOCUMENT)


def _all_keys_before(k_BSEH, v_BSEH, documents_BS, *, axis_name):
  """The keys of all shards, those of this one and later ones hidden: they belong to no document.

  A shard's own keys follow them, so that the last key is the last query's own.
  """
  gather = functools.partial(jax.lax.all_gather, axis_name=axis_name, axis=1, tiled=True)
  shard_1S = jnp.arange(jax.lax.axis_size(axis_name) * documents_BS.shape[1])[None]
  shard_1S = shard_1S // documents_BS.shape[1]
  is_before_1S = shard_1S < jax.lax.axis_index(axis_name)
  documents_BS = jnp.where(is_before_1S, gather(documents_BS), NO_DOCUMENT)
  return gather(k_BSEH), gather(v_BSEH), documents_BS
