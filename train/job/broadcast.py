"""Broadcasts text from process 0: a workdir's small files may be on its machine alone."""

import jax
import numpy as np
from jax.experimental import multihost_utils

_LENGTH_BYTES = 8
# A text that fits into so many bytes, with its length, takes one collective.
_BLOCK_BYTES = 1024


def broadcast(text: str) -> str:
  """Process 0's text, on every process; all have arrived when it returns.

  It is a collective: every process calls it, at the same place among its steps and other
  collectives. The text of the others is ignored. train/job/peers.py detects a process that never
  calls it.
  """
  if jax.process_count() == 1:
    return text
  content = text.encode() if jax.process_index() == 0 else b""
  first_size = _BLOCK_BYTES - _LENGTH_BYTES
  head = len(content).to_bytes(_LENGTH_BYTES, "little") + content[:first_size]
  head = _broadcast(head, num_bytes=_BLOCK_BYTES)
  length = int.from_bytes(head[:_LENGTH_BYTES], "little")
  received = head[_LENGTH_BYTES:]
  if length > first_size:
    # A power of two: every size is a program to compile.
    rest = content[first_size:]
    received += _broadcast(rest, num_bytes=1 << (length - first_size - 1).bit_length())
  return received[:length].decode()


def _broadcast(content: bytes, *, num_bytes: int) -> bytes:
  block = np.zeros(num_bytes, np.uint8)
  block[: len(content)] = np.frombuffer(content, np.uint8)
  return np.asarray(multihost_utils.broadcast_one_to_all(block), np.uint8).tobytes()
