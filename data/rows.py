"""Rows: a token store cut into windows of equal length, in a shuffled order; random access.

Documents are packed by concatenation: a window may hold the end of one, several whole ones and the
start of another. A document longer than a row continues in the next row of the store. Every token
except a store's first is the target of exactly one position of one row. T is the row length.
"""

import dataclasses
from typing import NamedTuple

import numpy as np

from data.token_store import TokenStore


class Batch(NamedTuple):
  """Rows for one step, [batch, time]; a single row has no leading dimension.

  targets_BT: the token that follows each token. segments_BT: 1, 2, ... as documents change in a
  row, 0 in padding. weights_BT: 1 where the target is a token of the same document, else 0.
  """

  tokens_BT: np.ndarray  # int32
  targets_BT: np.ndarray  # int32
  segments_BT: np.ndarray  # int32
  weights_BT: np.ndarray  # float32


@dataclasses.dataclass(frozen=True)
class Rows:
  """All rows of a store, in the order of the store: row i predicts tokens i*T + 1 to (i+1)*T."""

  store: TokenStore
  row_length: int

  def __post_init__(self):
    if self.row_length < 1:
      raise ValueError(f"Rows: row_length {self.row_length} must be at least 1")

  def __len__(self) -> int:
    return num_rows(self.store.manifest.num_tokens, self.row_length)

  def read(self, indices: np.ndarray) -> Batch:
    """The rows of these indices, one after the other; an index of -1 gives a row of padding."""
    T = self.row_length
    indices = np.asarray(indices, np.int64)
    if len(indices) and (indices.max() >= len(self) or indices.min() < -1):
      raise ValueError(
        f"Rows: index {indices.min()} to {indices.max()}: {self.store.path} has {len(self)} rows"
      )
    # A row of padding is one that starts past the end of the store.
    first_B = np.where(indices < 0, self.store.manifest.num_tokens, indices * T)
    window_BT1 = self.store.read(first_B, T + 1)
    is_start_BT1 = self._is_start(first_B)
    position_BT = first_B[:, None] + np.arange(T)
    num_tokens = self.store.manifest.num_tokens
    segments_BT = np.cumsum(is_start_BT1[:, :-1], axis=1, dtype=np.int32)
    segments_BT += 1 - segments_BT[:, :1]
    has_target_BT = position_BT + 1 < num_tokens
    return Batch(
      tokens_BT=window_BT1[:, :-1],
      targets_BT=window_BT1[:, 1:],
      segments_BT=np.where(position_BT < num_tokens, segments_BT, 0).astype(np.int32),
      weights_BT=(has_target_BT & ~is_start_BT1[:, 1:]).astype(np.float32),
    )

  def documents(self, index: int) -> range:
    """The numbers, within the store, of the documents with tokens in row `index`."""
    first = index * self.row_length
    last = min(first + self.row_length, self.store.manifest.num_tokens) - 1
    low, high = np.searchsorted(self.store.starts, (first, last), side="right")
    return range(int(low) - 1, int(high))

  def _is_start(self, first_B: np.ndarray) -> np.ndarray:
    """[B, T + 1]: whether a document starts at that position of the window."""
    width = self.row_length + 1
    is_start_BT1 = np.zeros((len(first_B), width), bool)
    low_B = np.searchsorted(self.store.starts, first_B)
    high_B = np.searchsorted(self.store.starts, first_B + width)
    for is_start_T1, first, low, high in zip(is_start_BT1, first_B, low_B, high_B):
      is_start_T1[self.store.starts[low:high] - first] = True
    return is_start_BT1


def num_rows(num_tokens: int, row_length: int) -> int:
  """Rows of a store; its first token is never a target, and the last row may end in padding."""
  return max(0, -(-(num_tokens - 1) // row_length))


def shuffled(position: int, size: int, *, seed: tuple[int, ...]) -> int:
  """Where `position` goes in a permutation of range(size) that depends on `seed` alone; O(1).

  A Feistel network over the smallest even number of bits that holds `size`, applied again until the
  result is below `size` (Black and Rogaway 2002, "Ciphers with arbitrary finite domains"). Runs
  that continue from a checkpoint depend on this order: tests/data/test_rows.py pins it.
  """
  if not 0 <= position < size:
    raise ValueError(f"shuffled: position {position} is not in 0 .. {size - 1}")
  half_bits = max(1, ((size - 1).bit_length() + 1) // 2)
  mask = (1 << half_bits) - 1
  key = _mix(0, *seed, size)
  while True:
    left, right = position >> half_bits, position & mask
    for round_index in range(_ROUNDS):
      left, right = right, left ^ (_mix(key, round_index, right) & mask)
    position = (left << half_bits) | right
    if position < size:
      return position


_ROUNDS = 6
_64_BITS = (1 << 64) - 1


def _mix(state: int, *values: int) -> int:
  """A 64-bit hash of small integers, by the finaliser of splitmix64 after each."""
  for value in values:
    state = (state + value + 0x9E3779B97F4A7C15) & _64_BITS
    state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & _64_BITS
    state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & _64_BITS
    state ^= state >> 31
  return state
