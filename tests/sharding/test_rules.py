"""The tables: which part of each parameter a device holds, and which tensor degrees can be."""

import math

import numpy as np
import pytest

from sharding import logical, rules
from sharding.mesh import MeshShape, make_mesh

_WIDTH, _RNN, _MLP, _VOCAB, _BLOCKS = 64, 128, 192, 256, 16

# The parameters of a Griffin, as models/ names them.
_AXES = {
  "embedding": ("vocab", "embed"),
  "w_in": ("layers", "embed", "branch", "rnn"),
  "w_out": ("layers", "rnn", "embed"),
  "w_gates": ("layers", "gate_block", "gate_in", "branch", "gate_out"),
  "w_conv": ("layers", "tap", "rnn"),
  "decay": ("layers", "rnn"),
  "w_q": ("layers", "embed", "heads", "head"),
  "w_kv": ("layers", "embed", "branch", "head"),
  "w_up": ("layers", "embed", "branch", "mlp"),
  "w_down": ("layers", "mlp", "embed"),
  "scale": ("layers", "norm"),
}
_SHAPES = {
  "embedding": (_VOCAB, _WIDTH),
  "w_in": (3, _WIDTH, 2, _RNN),
  "w_out": (3, _RNN, _WIDTH),
  "w_gates": (3, _BLOCKS, _RNN // _BLOCKS, 2, _RNN // _BLOCKS),
  "w_conv": (3, 4, _RNN),
  "decay": (3, _RNN),
  "w_q": (3, _WIDTH, 8, 16),
  "w_kv": (3, _WIDTH, 2, 16),
  "w_up": (3, _WIDTH, 2, _MLP),
  "w_down": (3, _MLP, _WIDTH),
  "scale": (3, _WIDTH),
}
_STAGES = {"ZERO1": rules.ZERO1, "ZERO2": rules.ZERO2, "ZERO3": rules.ZERO3}


def _share(table, **sizes):
  """The part of all parameters that one device holds."""
  mesh = make_mesh(MeshShape(**sizes))
  arrays = {name: np.zeros(shape, np.int8) for name, shape in _SHAPES.items()}
  shardings = logical.shardings(_AXES, arrays, table, mesh)
  held = sum(math.prod(shardings[name].shard_shape(array.shape)) for name, array in arrays.items())
  return held / sum(array.size for array in arrays.values())


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
  spec = logical.spec(
    _AXES["w_kv"], rules.ZERO3.compute, shape=_SHAPES["w_kv"], mesh=mesh, name="w_kv"
  )
  assert all(entry is None for entry in spec)


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
