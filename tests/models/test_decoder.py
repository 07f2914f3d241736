"""Options of a decoder besides its blocks: other norms, an unembedding of its own."""

import dataclasses
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from models import decoder, residual_block
from models.decoder import DecoderConfig
from models.flops import count_params
from models.layers import norms, rg_lru
from models.param import ones, param
from sharding.mesh import MeshShape
from tests.tolerances import assert_close
from train.planning import footprint

WIDTH, VOCAB = 8, 12
RECURRENT = residual_block.Config(mixer=rg_lru.Config(rnn_width=8, num_gate_blocks=2), mlp=None)
BASE = DecoderConfig(
  vocab_size=VOCAB, width=WIDTH, num_blocks=1, pattern=(RECURRENT,), dtype="float32", remat="none"
)
TOKENS = np.random.default_rng(0).integers(0, VOCAB, (2, 11)).astype(np.int32)
SEGMENTS = np.array([[1] * 4 + [2] * 7, [0] * 2 + [1] * 8 + [3]], np.int32)


@pytest.mark.parametrize("weight", ["one_plus_scale", "scale"])
def test_a_norm_divides_by_the_root_mean_square_and_begins_without_a_weight(weight):
  norm = norms.Config(weight=weight, epsilon=0.5).build(4, rngs=nnx.Rngs(0))
  x_BTD = jnp.array([[[1.0, -2.0, 3.0, 4.0]]])
  np.testing.assert_allclose(norm(x_BTD), x_BTD / math.sqrt(30 / 4 + 0.5), rtol=1e-6)
  norm.scale_D[...] += jnp.array([0.0, 1.0, 2.0, -1.0])
  expected = x_BTD / math.sqrt(8.0) * jnp.array([1.0, 2.0, 3.0, 0.0])
  np.testing.assert_allclose(norm(x_BTD), expected, rtol=1e-6)


def test_norms_of_another_kind_are_refused_by_name():
  with pytest.raises(ValueError, match="weight 'plain' is none of 'one_plus_scale', 'scale'"):
    norms.Config(weight="plain")  # pyright: ignore
  with pytest.raises(ValueError, match=r"epsilon 0\.0 must be above 0"):
    norms.Config(epsilon=0.0)


def test_blocks_and_the_last_norm_are_built_with_the_norms_of_the_config():
  plain = norms.Config(weight="scale", epsilon=1e-5)
  block = dataclasses.replace(RECURRENT, norm=plain)
  model = decoder.build(dataclasses.replace(BASE, pattern=(block,), final_norm=plain))
  params = jax.jit(model.init)(jax.random.key(0))
  assert params["groups"]["0"].keys() == {"mixer_norm", "mixer"}  # no MLP
  for scale in (params["groups"]["0"]["mixer_norm"]["scale_D"], params["final_norm"]["scale_D"]):
    assert (np.asarray(scale) == 1.0).all()


def test_an_unembedding_of_its_own_makes_the_logits():
  tied, own = (
    decoder.build(dataclasses.replace(BASE, unembedding=unembedding))
    for unembedding in ("tied", "own")
  )
  params = jax.jit(own.init)(jax.random.key(0))
  table_VD = params["unembedding"]["table_VD"]
  # All other parameters begin as with a tied one; the new table is one more draw.
  rest = {name: params[name] for name in params if name != "unembedding"}
  jax.tree.map(np.testing.assert_array_equal, rest, jax.jit(tied.init)(jax.random.key(0)))
  assert not np.array_equal(table_VD, params["embedding"]["table_VD"])
  x_BTD, _ = tied.apply(rest, TOKENS, SEGMENTS)
  assert_close(
    own.logits(params, TOKENS, SEGMENTS), x_BTD @ table_VD.T, dtype="float32", reduction=WIDTH
  )
  counts = [count_params(model.config) for model in (tied, own)]
  assert [count.embedding for count in counts] == [VOCAB * WIDTH, 2 * VOCAB * WIDTH]
  assert counts[0].rest == counts[1].rest
  numbers = footprint.compute_numbers(own.config, MeshShape(tensor=2), "cpu")
  assert numbers.embedding == VOCAB * WIDTH  # half of both


def test_an_unembedding_of_another_kind_is_refused_by_name():
  with pytest.raises(ValueError, match="unembedding 'none' is none of"):
    dataclasses.replace(BASE, unembedding="none")


class _State(NamedTuple):
  total_B: jax.Array


class _RunningNorm(nnx.Module):
  """x over the root mean square of all tokens of the document so far."""

  def __init__(self, width: int, rngs: nnx.Rngs):
    self.scale_D = param(ones, (width,), ("norm",), float32=True, decays=False, rngs=rngs)

  def initial_state(self, batch, context, dtype):
    return _State(jnp.zeros((batch,), jnp.float32))

  def __call__(self, x_BTD, segments, state):
    def step(total_B, xs):
      square_B, is_start_B = xs
      total_B = jnp.where(is_start_B, 0.0, total_B) + square_B
      return total_B, total_B

    before_B = jnp.zeros(x_BTD.shape[0]) if state is None else state.total_B
    squares_TB = jnp.mean(jnp.square(x_BTD), -1).T
    last_B, total_TB = jax.lax.scan(step, before_B, (squares_TB, segments.is_start_BT.T))
    y_BTD = x_BTD * jax.lax.rsqrt(total_TB.T / (segments.position_BT + 1))[..., None]
    return y_BTD * self.scale_D[...], None if state is None else _State(last_B)


@dataclasses.dataclass(frozen=True)
class _RunningNormConfig:
  def build(self, width, *, rngs):
    return _RunningNorm(width, rngs)


def test_a_last_norm_carries_its_state_along_split_rows():
  model = decoder.build(dataclasses.replace(BASE, final_norm=_RunningNormConfig()))
  params = jax.jit(model.init)(jax.random.key(0))
  whole, _ = jax.jit(model.apply)(params, TOKENS, SEGMENTS)
  extend = jax.jit(model.extend)
  parts, state = [], model.initial_state(2, context=1)
  for start, end in ((0, 3), (3, 4), (4, 5), (5, 8), (8, 11)):
    x_BTD, _, state = extend(params, TOKENS[:, start:end], SEGMENTS[:, start:end], state)
    parts.append(x_BTD)
  assert_close(jnp.concatenate(parts, axis=1), whole, dtype="float32", reduction=WIDTH)
  # The state matters: without it the second part differs.
  lost = state._replace(final_norm=_State(jnp.zeros(2)))
  token = (TOKENS[:, -1:], SEGMENTS[:, -1:])
  again, forgot = (extend(params, *token, one)[0] for one in (state, lost))
  assert not np.allclose(again, forgot)
