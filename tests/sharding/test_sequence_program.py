"""What a step sends between the devices of a split row, read from the compiled program.

The rows of a device are divisible by 5 and no dimension of a parameter is: an array whose size is
divisible by 5 holds activations.
"""

import functools
import math

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from models import decoder, residual_block
from models.decoder import DecoderConfig
from models.layers import attention, mlp, rg_lru
from sharding import collectives, logical, rules
from sharding.mesh import MeshShape, make_mesh

# One worker for all of them: they share the compiled programs.
pytestmark = pytest.mark.xdist_group("sequence_program")

_ROWS, _SHARDS, _RNN, _WINDOW, _HEAD_SIZE, _TAPS = 5, 4, 64, 8, 8, 4
_FLOAT = _INT = 4  # bytes
_MLP = mlp.Config(mlp_width=48)
_RECURRENT = rg_lru.Config(rnn_width=_RNN, conv_taps=_TAPS)
_LOCAL = attention.Config(num_heads=4, head_size=_HEAD_SIZE, window=_WINDOW)


def _model(remat: str, mixer: rg_lru.Config | attention.Config) -> decoder.Model:
  return decoder.build(
    DecoderConfig(
      vocab_size=64,
      width=32,
      num_blocks=2,
      pattern=(residual_block.Config(mixer=mixer, mlp=_MLP),),
      dtype="float32",
      remat=remat,  # pyright: ignore[reportArgumentType]
    )
  )


# Numbering the documents: each shard sends its last id, how many begin, and where the last begins.
_NUMBERING = {
  ("collective-permute", _ROWS * _INT): 1,
  ("all-gather", _SHARDS * 2 * _ROWS * _INT): 1,
}


@functools.cache
def _sent(time: int, remat: str, mixer: rg_lru.Config | attention.Config):
  """How often the gradient of a model of 2 blocks moves activations, by kind and bytes."""
  model = _model(remat, mixer)
  mesh = make_mesh(MeshShape(data=2, sequence=_SHARDS))

  def loss(params, tokens_BT):
    x_BTD, unembed_VD = model.apply(params, tokens_BT, tokens_BT // 2)
    return jnp.sum(jnp.sin(x_BTD)) + jnp.sum(jnp.sin(unembed_VD))

  layout = NamedSharding(mesh, P("data", "sequence"))
  tokens_BT = jax.ShapeDtypeStruct((2 * _ROWS, time), jnp.int32, sharding=layout)
  with logical.placement(mesh, rules.ZERO3):
    compiled = jax.jit(jax.grad(loss)).lower(model.shapes, tokens_BT).compile()
  found = {}
  for one in collectives.read(compiled.as_text(), mesh):
    if any(math.prod(shape) % 5 == 0 for _, shape in one.arrays):
      assert one.axes == ("sequence",), one
      assert one.times is not None
      key = (one.kind, one.bytes)
      found[key] = found.get(key, 0) + one.times
  return found


@pytest.mark.parametrize(
  ("time", "remat", "scans"), [(64, "none", 2), (64, "block", 3), (256, "block", 3)]
)
def test_a_recurrent_layer_sends_the_same_for_rows_of_any_length(time, remat, scans):
  pairs = _SHARDS * 2 * _ROWS * _RNN * _FLOAT
  halo = _ROWS * (_TAPS - 1) * _RNN * _FLOAT
  assert _sent(time, remat, _RECURRENT) == {
    **_NUMBERING,
    # Forward and backward; where the block is computed again, once more.
    ("all-gather", pairs): 2 * scans,
    # The decay by which the gradient is multiplied on its way to the shard before.
    ("collective-permute", _ROWS * _RNN * _FLOAT): 2,
    # The convolution is always computed again. Document numbers: once for all layers.
    ("collective-permute", halo): 2 * 3,
    ("collective-permute", _ROWS * (_TAPS - 1) * _INT): 1,
  }


@pytest.mark.parametrize("time", [64, 256])
def test_local_attention_sends_a_window_for_rows_of_any_length(time):
  assert _sent(time, "block", _LOCAL) == {
    **_NUMBERING,
    # Keys and values, forward, again and backward.
    ("collective-permute", _ROWS * _WINDOW * _HEAD_SIZE * _FLOAT): 2 * 2 * 3,
    ("collective-permute", _ROWS * _WINDOW * _INT): 1,
  }


def test_decoding_on_split_rows_is_refused_with_the_reason():
  model = _model("none", _RECURRENT)
  state, tokens_BT = model.initial_state(2, context=8), jnp.ones((2, 8), jnp.int32)
  with (
    logical.placement(make_mesh(MeshShape(data=2, sequence=_SHARDS)), rules.ZERO3),
    pytest.raises(ValueError, match=r"extend: rows are split over 4 devices.*sequence=1"),
  ):
    jax.eval_shape(model.extend, model.shapes, tokens_BT, tokens_BT, state)
