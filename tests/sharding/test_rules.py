"""The tables: which part of each parameter a device holds, and which tensor degrees are allowed."""

import math

import jax
import pytest

from models import decoder
from models.griffin import griffin
from sharding import logical, rules
from sharding.mesh import MeshShape, make_mesh

# One of every kind of parameter: two recurrent blocks and one of attention.
_MODEL = decoder.build(
  griffin(
    vocab_size=256,
    width=256,
    rnn_width=512,
    num_blocks=3,
    num_heads=8,
    head_size=32,
    window=16,
    mlp_width=768,
  )
)
_STAGES = {"ZERO1": rules.ZERO1, "ZERO2": rules.ZERO2, "ZERO3": rules.ZERO3}


def _share(table, **sizes):
  """The part of all parameters that one device holds."""
  mesh = make_mesh(MeshShape(**sizes))
  shapes = jax.tree.leaves(_MODEL.shapes)
  shardings = jax.tree.leaves(logical.shardings(_MODEL.axes, _MODEL.shapes, table, mesh))
  held = sum(
    math.prod(layout.shard_shape(array.shape))
    for layout, array in zip(shardings, shapes, strict=True)
  )
  return held / sum(array.size for array in shapes)


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_each_stage_splits_one_more_kind_of_array_over_fsdp(stage):
  tables = _STAGES[f"ZERO{stage}"]
  shares = [
    _share(table, fsdp=8) for table in (tables.moments, tables.gradients, tables.parameters)
  ]
  for index, share in enumerate(shares):
    if index < stage:
      # The rest are vectors and the convolution.
      assert 1 / 8 < share < 1.25 / 8
    else:
      assert share == 1


@pytest.mark.parametrize("name", _STAGES)
def test_tensor_parallelism_is_in_every_stage(name):
  tables = _STAGES[name]
  for table in (tables.parameters, tables.compute, tables.gradients, tables.moments):
    assert 1 / 8 < _share(table, tensor=8) < 1.25 / 8
  assert _share(tables.compute, fsdp=8) == 1
  assert 1 / 8 < _share(tables.moments, fsdp=4, tensor=2) < 1.25 / 8


@pytest.mark.parametrize("name", _STAGES)
def test_no_state_is_split_over_data(name):
  tables = _STAGES[name]
  for table in (tables.parameters, tables.compute, tables.gradients, tables.moments):
    assert _share(table, data=8) == 1


def test_the_key_value_head_is_whole_on_every_tensor_shard():
  mesh = make_mesh(MeshShape(tensor=8))
  layouts = logical.shardings(_MODEL.axes, _MODEL.shapes, rules.ZERO3.compute, mesh)
  named = {
    jax.tree_util.keystr(path, simple=True, separator="/"): layout.spec
    for path, layout in jax.tree_util.tree_leaves_with_path(layouts)
  }
  (key_value,) = [spec for name, spec in named.items() if name.endswith("/w_kv_D2H")]
  assert all(entry is None for entry in key_value)
  (query,) = [spec for name, spec in named.items() if name.endswith("/w_q_DNH")]
  assert "tensor" in query


def test_tables_with_the_same_entries_are_the_same_rules():
  again = rules.Rules(
    parameters=dict(rules.ZERO3.parameters),
    compute=dict(rules.ZERO3.compute),
    gradients=dict(rules.ZERO3.gradients),
    moments=dict(rules.ZERO3.moments),
    activations=dict(rules.ZERO3.activations),
  )
  assert again == rules.ZERO3
  assert hash(again) == hash(rules.ZERO3)
  assert len({rules.ZERO1, rules.ZERO2, rules.ZERO3, again}) == 3


def test_a_tensor_degree_that_does_not_divide_names_what_it_does_not():
  sizes = {"num_heads": 10, "num_gate_blocks": 16, "rnn_width": 2560, "mlp_width": 7680}
  for degree in (1, 2):
    rules.check_tensor_degree(degree, sizes=sizes)
  message = r"tensor degree 4 does not divide num_heads 10; degrees that work: 1, 2$"
  with pytest.raises(ValueError, match=message):
    rules.check_tensor_degree(4, sizes=sizes)
  message = r"does not divide num_gate_blocks 16, rnn_width 2560, mlp_width 7680, width 1; .*: 1$"
  with pytest.raises(ValueError, match=message):
    rules.check_tensor_degree(7, sizes={**sizes, "num_heads": 7, "width": 1})
  with pytest.raises(ValueError, match="tensor degree 0"):
    rules.check_tensor_degree(0, sizes=sizes)
