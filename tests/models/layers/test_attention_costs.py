"""The costs of attention against a count by hand."""

import numpy as np
import pytest

from models.costs import Shard
from models.layers import attention
from models.layers.attention_costs import visible_keys


@pytest.mark.parametrize(("row_length", "window"), [(1, None), (7, None), (9, 3), (9, 8), (5, 40)])
def test_visible_keys_are_counted_one_by_one(row_length, window):
  counts = [min(t, row_length if window is None else window) + 1 for t in range(row_length)]
  assert visible_keys(row_length, window) == pytest.approx(np.mean(counts))


def _config(num_kv_heads, window=None):
  return attention.Config(
    num_heads=8, num_kv_heads=num_kv_heads, head_size=16, window=window, implementation="banded"
  )


def test_key_value_heads_are_multiplied_and_sent_each():
  """Products with all weights; of keys and values, those of the heads that a shard computes."""
  for num_kv_heads in (1, 2, 8):
    projections, _ = _config(num_kv_heads).flops(64, row_length=100)
    assert projections.flops == 2 * 64 * (8 + 2 * num_kv_heads + 8) * 16
  for window in (None, 12):
    sent = {}
    for num_kv_heads, tensor in ((1, 1), (1, 4), (2, 1), (2, 4), (8, 1), (8, 4)):
      shard = Shard(
        rows=2, row_length=64, tensor=tensor, sequence=4, itemsize=2, remat="block",
        is_unrolled=False,
      )  # fmt: skip
      each = _config(num_kv_heads, window).sends(shard).each
      sent[num_kv_heads, tensor] = sum(one.bytes for one in each) / (2 * 16)
    # Of one head: as many numbers whatever the shards of heads.
    alone = sent[1, 1]
    assert sent == {
      (1, 1): alone, (1, 4): alone, (2, 1): 2 * alone, (2, 4): alone, (8, 1): 8 * alone,
      (8, 4): 2 * alone,
    }  # fmt: skip
