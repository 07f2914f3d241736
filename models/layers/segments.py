"""Documents packed in a row: where each begins, how far into it a token is.

Segment ids are integers that change at each document start; 0 is padding. An id may come back later
in the row for another document (1, 2, 1, 2 ...), so layers compare the running document number
computed here and never the ids.

A row split over devices is numbered as a whole: shards exchange their last id, how many documents
begin in them, and where the last of these does.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from kernels import halo

# No document has this number: what is stored under it is visible to nobody.
NO_DOCUMENT = -1


class Segments(NamedTuple):
  """The documents of a row, int32 and bool [batch, time]."""

  document_BT: jax.Array  # 1, 2, ... within the row (and on over the chunks of a split row)
  position_BT: jax.Array  # 0 at each document start
  is_start_BT: jax.Array
  num_before_B: jax.Array | None = None  # tokens of the row before these; None: there are none


class SegmentState(NamedTuple):
  """What the next chunk of a split row must know of the chunks before it, int32 [batch]."""

  segment_B: jax.Array
  document_B: jax.Array  # 0: none has begun
  position_B: jax.Array  # of the next token, if it continues the document
  num_tokens_B: jax.Array  # padding too


def check_rows(tokens_BT: jax.Array, segments_BT: jax.Array) -> None:
  """ValueError unless both are integers [batch, time] of one shape, with at least one token."""
  for name, x in (("tokens", tokens_BT), ("segments", segments_BT)):
    if x.ndim != 2 or not x.size or not jnp.issubdtype(x.dtype, jnp.integer):
      raise ValueError(
        f"{name} are {x.dtype} {x.shape}; they must be integers [batch, time], at least one"
      )
  if tokens_BT.shape != segments_BT.shape:
    raise ValueError(
      f"tokens {tokens_BT.shape} and segments {segments_BT.shape} must have one shape: every token "
      "has its segment"
    )


def initial_state(batch: int) -> SegmentState:
  """The state before the first token: whatever comes first begins a document."""
  zeros_B = jnp.zeros((batch,), jnp.int32)
  return SegmentState(zeros_B, zeros_B, zeros_B, zeros_B)


def segments(
  segments_BT: jax.Array, state: SegmentState, *, axis_name: str | tuple[str, ...] | None = None
) -> tuple[Segments, SegmentState]:
  """The documents of one chunk of a row, and the state for the next chunk.

  Inside jax.shard_map with time split over `axis_name`, the chunk is a shard's own part; `state` is
  what came before the row, and the new one what comes after this shard.
  """
  segments_BT = segments_BT.astype(jnp.int32)
  segment_B, document_B, start_B = state.segment_B, state.document_B, -state.position_B
  index_1T = jnp.arange(segments_BT.shape[1], dtype=jnp.int32)[None]
  if axis_name is not None:
    index_1T += jax.lax.axis_index(axis_name) * segments_BT.shape[1]
    segment_B = halo.from_neighbour(
      segments_BT[:, -1], before=True, axis_name=axis_name, edge=segment_B
    )
  previous_BT = jnp.concatenate([segment_B[:, None], segments_BT[:, :-1]], axis=1)
  # Not marked by a special id: every integer may be the id of a document.
  is_first_BT = (index_1T == 0) & (document_B == 0)[:, None]
  is_start_BT = is_first_BT | (segments_BT != previous_BT)
  if axis_name is not None:
    document_B, start_B = _before_this_shard(is_start_BT, index_1T, document_B, start_B, axis_name)
  document_BT = document_B[:, None] + jnp.cumsum(is_start_BT.astype(jnp.int32), axis=1)
  # The index of the start that a token belongs to; one before the row lies at -position_B.
  start_BT = jnp.where(is_start_BT, index_1T, start_B[:, None])
  position_BT = index_1T - jax.lax.cummax(start_BT, axis=1)
  new_state = SegmentState(
    segments_BT[:, -1],
    document_BT[:, -1],
    position_BT[:, -1] + 1,
    state.num_tokens_B + segments_BT.shape[1],
  )
  return Segments(document_BT, position_BT, is_start_BT, state.num_tokens_B), new_state


def _before_this_shard(is_start_BT, index_1T, document_B, start_B, axis_name):
  """The number of the document before this shard, and the index in the row where it began."""
  count_B = jnp.sum(is_start_BT.astype(jnp.int32), axis=1)
  last_start_B = jnp.max(jnp.where(is_start_BT, index_1T, jnp.iinfo(jnp.int32).min), axis=1)
  # [shards, 2, batch]: the only thing here that is gathered, once for all layers.
  count_SB, last_start_SB = jax.lax.all_gather(
    jnp.stack([count_B, last_start_B]), axis_name, axis=1
  )
  is_before_S1 = (jnp.arange(count_SB.shape[0]) < jax.lax.axis_index(axis_name))[:, None]
  document_B = document_B + jnp.sum(jnp.where(is_before_S1, count_SB, 0), axis=0)
  last_start_B = jnp.max(jnp.where(is_before_S1, last_start_SB, jnp.iinfo(jnp.int32).min), axis=0)
  return document_B, jnp.maximum(start_B, last_start_B)
