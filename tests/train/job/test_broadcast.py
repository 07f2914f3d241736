"""Text of process 0 reaches the others; tests of its users run real processes."""

import jax
import numpy as np
import pytest
from jax.experimental import multihost_utils

from train.job.broadcast import broadcast


@pytest.mark.parametrize("length", [0, 1, 1013, 1014, 1015, 5000])
def test_every_process_gets_the_text_of_process_0_and_brings_blocks_of_its_size(
  length, monkeypatch
):
  text = ("\u20ac" + "x" * length)[:length]  # the first character is three bytes
  sent, index = [], 0

  def collective(block):
    """Process 0 goes first; the others must pass as many bytes, and get those of process 0."""
    if index == 0:
      sent.append(np.copy(block))
      return block
    expected = sent.pop(0)
    assert (block.shape, block.dtype) == (expected.shape, expected.dtype)
    return expected

  monkeypatch.setattr(jax, "process_count", lambda: 2)
  monkeypatch.setattr(jax, "process_index", lambda: index)
  monkeypatch.setattr(multihost_utils, "broadcast_one_to_all", collective)
  assert broadcast(text) == text
  assert len(sent) == (1 if len(text.encode()) <= 1016 else 2)
  index = 1
  assert broadcast("ignored") == text
  assert not sent


def test_one_process_keeps_its_text():
  assert broadcast("text") == "text"
