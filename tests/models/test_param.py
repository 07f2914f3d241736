"""A parameter is treated as it was declared: its dtypes, its decay, its layout."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from models import decoder, residual_block
from models.decoder import DecoderConfig
from models.layers import mlp
from models.param import param, zeros
from models.remat import SavedNames
from sharding import logical
from sharding.mesh import MeshShape
from sharding.rules import ZERO3
from tests.golden import make_parameters
from train.optimizer import AdamW, Constant
from train.planning import footprint


@dataclasses.dataclass(frozen=True)
class _Config:
  """A mixer whose one parameter has the dimensions of the convolution's taps."""

  first: str = "tap"

  def saved_names(self):
    return SavedNames()

  def build(self, width, *, num_blocks, rngs):
    return _Mixer(self.first, rngs=rngs)


class _Mixer(nnx.Module):
  def __init__(self, first, *, rngs):
    self.rates_KR = param(zeros, (2, 8), (first, "rnn"), float32=True, decays=False, rngs=rngs)

  def __call__(self, x_BTD, segments, state):
    assert (self.rates_KR[...].dtype, x_BTD.dtype) == (jnp.float32, jnp.bfloat16)
    return x_BTD * self.rates_KR[...].sum().astype(x_BTD.dtype), state


def _model(first: str = "tap") -> decoder.Model:
  block = residual_block.Config(mixer=_Config(first), mlp=mlp.Config(mlp_width=8))
  return decoder.build(
    DecoderConfig(
      vocab_size=8,
      width=4,
      num_blocks=2,
      pattern=(block,),
      dtype="bfloat16",
      param_dtype="bfloat16",
      layers="unroll",
    )
  )


def test_a_parameter_of_two_dimensions_stays_float32_and_does_not_decay_if_it_says_so():
  model = _model()
  params = model.init(jax.random.key(0))
  block = params["groups"]["0"]
  assert block["mixer"]["rates_KR"].dtype == jnp.float32
  assert block["mlp"]["w_down_FD"].dtype == jnp.bfloat16

  ones_BT = jnp.ones((1, 2), jnp.int32)
  jax.eval_shape(model.apply, params, ones_BT, ones_BT)  # the mixer checks what it reads

  tx = AdamW(peak_lr=1.0, warmup_steps=0, schedule=Constant()).build(
    total_steps=1, decay_mask=model.decays
  )
  params = jax.tree.map(jnp.ones_like, params)
  updates, _ = tx.update(jax.tree.map(jnp.zeros_like, params), tx.init(params), params)
  decayed = jax.tree.map(lambda update: bool(np.any(update)), updates)["groups"]["0"]
  assert not decayed["mixer"]["rates_KR"]
  assert decayed["mlp"]["w_down_FD"]


def test_an_axis_that_no_table_has_is_an_error_that_names_the_parameter():
  model = _model("state")
  message = r"groups/0/mixer/rates_KR: unknown axis 'state' in .*; the table has"
  mesh = jax.sharding.AbstractMesh((1, 1, 1, 1), ("data", "fsdp", "sequence", "tensor"))
  with pytest.raises(ValueError, match=message):
    logical.shardings(model.axes, model.shapes, ZERO3.parameters, mesh)  # pyright: ignore
  with pytest.raises(ValueError, match=message):
    footprint.compute_numbers(model.config, MeshShape(fsdp=1), "cpu")


def test_how_every_preset_treats_its_parameters_is_known():
  """If this fails and the change is intended, run `python -m tests.golden.make_parameters` and
  review the difference: existing checkpoints hold the old dtypes."""
  assert make_parameters.text() == make_parameters.FILE.read_text()
