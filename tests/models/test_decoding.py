"""What decoding copies: nothing of the state, and the weights once."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import pytest

from models import decoder, generate
from models.griffin import griffin
from models.hawk import hawk
from models.llama import llama
from models.transformer import mqa_transformer

# Deep and narrow, with many rows: the state is larger than a block's activations and weights.
SETTINGS = {"vocab_size": 32, "width": 8, "mlp_width": 8, "dtype": "float32", "remat": "none"}
RECURRENT = {"num_gate_blocks": 1, **SETTINGS}
HEADS = {"num_heads": 1, "head_size": 8}
FAMILIES = {
  "griffin": griffin(num_blocks=98, rnn_width=16, window=255, **HEADS, **RECURRENT),
  "hawk": hawk(num_blocks=96, rnn_width=64, **RECURRENT),
  "llama": llama(num_blocks=48, num_heads=2, num_kv_heads=2, **SETTINGS),
  "transformer": mqa_transformer(num_blocks=48, **HEADS, **SETTINGS),
}
BATCH, CONTEXT = 64, 512


def _bytes(tree):
  return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def _memory(lowered):
  memory = lowered.compile().memory_analysis()
  assert memory is not None
  return memory


@pytest.mark.parametrize("layers", ["scan", "unroll"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_decoded_token_copies_no_state(family, layers):
  model = decoder.build(dataclasses.replace(FAMILIES[family], layers=layers))
  state = jax.eval_shape(lambda: model.initial_state(BATCH, context=CONTEXT))
  token = jax.ShapeDtypeStruct((BATCH, 1), jnp.int32)
  step = jax.jit(model.extend, donate_argnames="state")
  memory = _memory(step.lower(model.shapes, token, token, state))
  assert _bytes(state) > 4e6
  assert memory.alias_size_in_bytes == _bytes(state)
  assert memory.temp_size_in_bytes < 0.05 * _bytes(state)


def test_generation_holds_one_state():
  model = decoder.build(FAMILIES["transformer"])
  state = jax.eval_shape(lambda: model.initial_state(BATCH, context=CONTEXT))
  prompt = jax.ShapeDtypeStruct((BATCH, 16), jnp.int32)

  def sample(params, prompt_BT, segments_BT):
    return generate.generate(
      model,
      params,
      prompt_BT,
      segments_BT,
      num_tokens=CONTEXT - 16,
      temperature=1.0,
      key=jax.random.key(0),
    )

  memory = _memory(jax.jit(sample).lower(model.shapes, prompt, prompt))
  assert memory.temp_size_in_bytes < 1.05 * _bytes(state)


def test_matrices_are_cast_ahead_of_the_tokens_and_decays_stay():
  settings = {**SETTINGS, "dtype": "bfloat16"}
  model = decoder.build(
    griffin(num_blocks=4, rnn_width=16, window=3, num_gate_blocks=2, **HEADS, **settings)
  )
  cast = jax.eval_shape(model.cast, model.shapes)
  for mixer in (cast["groups"]["0"]["mixer"], cast["remainder"]["0"]["mixer"]):
    assert mixer["w_out_RD"].dtype == cast["embedding"]["table_VD"].dtype == jnp.bfloat16
    assert mixer["decay_R"].dtype == cast["final_norm"]["scale_D"].dtype == jnp.float32
