"""Documents packed in a row: where each begins, how far into it a token is.

Segment ids are integers that change at each document start; 0 is padding. An id may come back later
in the row for another document (1, 2, 1, 2 ...), so layers compare the running document number
computed here and never the ids.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

# No document has this number: what is stored under it is visible to nobody.
NO_DOCUMENT = -1


class Segments(NamedTuple):
  """The documents of a row, int32 and bool [batch, time]."""

  document_BT: jax.Array  # 1, 2, ... within the row (and on over the chunks of a split row)
  position_BT: jax.Array  # 0 at each document start
  is_start_BT: jax.Array


class SegmentState(NamedTuple):
  """What the next chunk of a split row must know of the chunks before it, int32 [batch]."""

  segment_B: jax.Array
  document_B: jax.Array
  position_B: jax.Array  # of the next token, if it continues the document


def initial_state(batch: int) -> SegmentState:
  """The state before the first token: whatever comes first begins a document."""
  no_segment_B = jnp.full((batch,), jnp.iinfo(jnp.int32).min, jnp.int32)
  zeros_B = jnp.zeros((batch,), jnp.int32)
  return SegmentState(no_segment_B, zeros_B, zeros_B)


def segments(segments_BT: jax.Array, state: SegmentState) -> tuple[Segments, SegmentState]:
  """The documents of one chunk of a row, and the state for the next chunk."""
  segments_BT = segments_BT.astype(jnp.int32)
  previous_BT = jnp.concatenate([state.segment_B[:, None], segments_BT[:, :-1]], axis=1)
  is_start_BT = segments_BT != previous_BT
  document_BT = state.document_B[:, None] + jnp.cumsum(is_start_BT.astype(jnp.int32), axis=1)
  index_1T = jnp.arange(segments_BT.shape[1], dtype=jnp.int32)[None]
  # The index of the start that a token belongs to; one before the chunk lies at -position_B.
  start_BT = jnp.where(is_start_BT, index_1T, -state.position_B[:, None])
  position_BT = index_1T - jax.lax.cummax(start_BT, axis=1)
  new_state = SegmentState(segments_BT[:, -1], document_BT[:, -1], position_BT[:, -1] + 1)
  return Segments(document_BT, position_BT, is_start_BT), new_state
