"""What must be true of every block and every model: one list of configs, all properties."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from models import decoder
from models.block import BlockConfig
from models.decoder import DecoderConfig
from models.layers import attention, gated_mlp, rg_lru
from models.layers import segments as segments_lib
from sharding import logical, rules
from sharding.mesh import MeshShape, make_mesh
from tests.tolerances import assert_close

WIDTH, VOCAB, WINDOW = 32, 48, 6
MLP = gated_mlp.Config(mlp_width=48)


def _model(*mixers, num_blocks: int | None = None, **settings) -> DecoderConfig:
  return DecoderConfig(
    vocab_size=VOCAB,
    width=WIDTH,
    num_blocks=num_blocks or len(mixers),
    pattern=tuple(BlockConfig(mixer=mixer, mlp=MLP) for mixer in mixers),
    **{"dtype": "float32", "remat": "none", **settings},
  )


RECURRENT = rg_lru.Config(rnn_width=64, num_gate_blocks=16)
LOCAL = attention.Config(num_heads=4, head_size=8, window=WINDOW)
GLOBAL = attention.Config(num_heads=4, head_size=8, window=None)

# A new mixer is added here, and inherits every test below.
CONFIGS = {
  "recurrent": _model(RECURRENT),
  "recurrent_recurrentgemma_decay": _model(
    dataclasses.replace(RECURRENT, decay_init="recurrentgemma", num_gate_blocks=4, conv_taps=2)
  ),
  "recurrent_gates_pallas_tpu": _model(dataclasses.replace(RECURRENT, gates="pallas_tpu")),
  "local_attention": _model(LOCAL),
  "global_attention": _model(GLOBAL),
  "hawk": _model(RECURRENT, num_blocks=3),
  "griffin_with_remainder": _model(RECURRENT, RECURRENT, LOCAL, num_blocks=8),
  "recurrentgemma": _model(
    RECURRENT, RECURRENT, LOCAL, embedding_scale="sqrt_width", logit_cap=5.0
  ),
}
every_config = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())
# Sharding needs divisible sizes; these have them.
SHARDED = (
  "recurrent",
  "recurrent_gates_pallas_tpu",
  "local_attention",
  "global_attention",
  "griffin_with_remainder",
)


def _params(model, seed=0):
  """Initial parameters with every zero (biases, norm scales) moved, so that nothing is trivial."""
  params = model.init(jax.random.key(seed))
  leaves, tree = jax.tree.flatten(params)
  keys = jax.random.split(jax.random.key(seed + 1), len(leaves))
  return jax.tree.unflatten(
    tree,
    [
      w + 0.1 * jax.random.normal(key, w.shape).astype(w.dtype)
      for w, key in zip(leaves, keys, strict=True)
    ],
  )


def _tokens(batch, time, seed=0):
  return jax.random.randint(jax.random.key(seed), (batch, time), 0, VOCAB)


# Documents of length 1 and longer than the window, ids that come back, and padding at the end.
SEGMENTS = np.array(
  [[1] * 9 + [2] + [1] * 11 + [3] * 2 + [0] * 2, [5] * 3 + [4] * 20 + [9] * 2], np.int32
)
BATCH, TIME = SEGMENTS.shape


@every_config
def test_gradient_with_respect_to_the_future_is_zero(config):
  key = jax.random.key(0)
  x_BTD = jax.random.normal(key, (1, 12, WIDTH))
  weight_D = jax.random.normal(jax.random.key(1), (WIDTH,))
  block = config.pattern[0].build(WIDTH, num_blocks=1, rngs=nnx.Rngs(0))
  segments, _ = segments_lib.segments(jnp.ones((1, 12), jnp.int32), segments_lib.initial_state(1))

  def output(x_BTD):
    return block(x_BTD, segments, None)[0][0] @ weight_D

  jacobian_TS = np.abs(jax.jit(jax.jacrev(output))(x_BTD)[:, 0]).max(-1)
  assert (np.triu(jacobian_TS, 1) == 0).all()
  assert (np.diag(jacobian_TS) > 0).all()


@every_config
def test_later_tokens_change_nothing_before_them(config):
  model = decoder.build(config)
  params, tokens_BT = _params(model), _tokens(BATCH, TIME)
  apply = jax.jit(lambda tokens: model.apply(params, tokens, SEGMENTS)[0])
  changed = np.asarray(apply(tokens_BT.at[:, 13:].set((tokens_BT[:, 13:] + 1) % VOCAB)))
  original = np.asarray(apply(tokens_BT))
  np.testing.assert_array_equal(changed[:, :13], original[:, :13])
  assert (changed[:, 13] != original[:, 13]).any()


def _document_loss(model, start, end):
  """Loss that reads the logits of tokens [start, end) of the first row only."""
  weights = jax.random.normal(jax.random.key(7), (end - start, VOCAB))

  def loss(params, tokens_BT, segments_BT):
    return jnp.sum(model.logits(params, tokens_BT, segments_BT)[0, start:end] * weights)

  return jax.jit(jax.value_and_grad(loss))


@every_config
def test_packed_documents_are_as_if_alone(config):
  model = decoder.build(config)
  params, tokens_BT = _params(model), _tokens(BATCH, TIME)
  logits = jax.jit(model.logits)
  packed = logits(params, tokens_BT, SEGMENTS)
  for start, end in ((0, 9), (9, 10), (10, 21), (21, 23)):
    size = end - start
    # Alone in a row of the same length, so that one compiled program serves both.
    alone_BT = jnp.zeros((BATCH, TIME), jnp.int32).at[0, :size].set(tokens_BT[0, start:end])
    segments_BT = np.zeros((BATCH, TIME), np.int32)
    segments_BT[0, :size] = 1
    alone = logits(params, alone_BT, segments_BT)
    assert_close(packed[0, start:end], alone[0, :size], dtype="float32", reduction=WIDTH)
  loss, grads = _document_loss(model, 10, 21)(params, tokens_BT, SEGMENTS)
  alone_BT = tokens_BT[:1, 10:21]
  loss_alone, grads_alone = _document_loss(model, 0, 11)(
    params, alone_BT, np.ones((1, 11), np.int32)
  )
  # Terms of size 1 to 10 that may cancel.
  assert_close(loss, loss_alone, dtype="float32", reduction=WIDTH * VOCAB, floor=10.0)
  jax.tree.map(
    lambda g, alone: assert_close(g, alone, dtype="float32", reduction=WIDTH * VOCAB, floor=1.0),
    grads,
    grads_alone,
  )


@every_config
def test_a_document_does_not_notice_that_another_changes(config):
  model = decoder.build(config)
  params, tokens_BT = _params(model), _tokens(BATCH, TIME)
  other_BT = tokens_BT.at[0, :10].set((tokens_BT[0, :10] + 5) % VOCAB)
  other_BT = other_BT.at[0, 21:].set((tokens_BT[0, 21:] + 7) % VOCAB)
  loss = _document_loss(model, 10, 21)
  jax.tree.map(
    np.testing.assert_array_equal,
    loss(params, tokens_BT, SEGMENTS),
    loss(params, other_BT, SEGMENTS),
  )


@every_config
def test_split_rows_with_carried_state_are_the_whole(config):
  model = decoder.build(config)
  params, tokens_BT = _params(model), _tokens(BATCH, TIME)
  whole = model.apply(params, tokens_BT, SEGMENTS)[0]
  extend = jax.jit(model.extend)
  for ends in ((1, 2, 25), (9, 10, 17, 25), (4, 24, 25)):
    state, parts, start = model.initial_state(BATCH, context=TIME), [], 0
    for end in ends:
      x_BTD, _, state = extend(params, tokens_BT[:, start:end], SEGMENTS[:, start:end], state)
      parts.append(x_BTD)
      start = end
    assert_close(jnp.concatenate(parts, axis=1), whole, dtype="float32", reduction=WIDTH)


@every_config
@pytest.mark.parametrize("prompt", [1, 2, 3, 4, 5, WINDOW + 5])
def test_prefill_and_decoding_are_the_parallel_pass(config, prompt):
  model = decoder.build(config)
  params, time = _params(model), prompt + WINDOW + 3
  tokens_BT = _tokens(2, time)
  # The second prompt is one token shorter, and padded on the left.
  segments_BT = np.ones((2, time), np.int32)
  segments_BT[1, :1] = 0 if prompt > 1 else 1
  whole = jax.jit(model.logits)(params, tokens_BT, segments_BT)
  x_BTD, unembed_VD, state = jax.jit(model.extend)(
    params, tokens_BT[:, :prompt], segments_BT[:, :prompt], model.initial_state(2, context=time)
  )
  step = jax.jit(model.extend)
  hidden = [x_BTD]
  for t in range(prompt, time):
    x_BTD, _, state = step(params, tokens_BT[:, t : t + 1], segments_BT[:, t : t + 1], state)
    hidden.append(x_BTD)
  logits = jnp.concatenate(hidden, axis=1) @ unembed_VD.T
  if config.logit_cap is not None:
    logits = config.logit_cap * jnp.tanh(logits / config.logit_cap)
  # The pad itself predicts nothing that anyone reads.
  assert_close(logits[0], whole[0], dtype="float32", reduction=WIDTH)
  assert_close(logits[1, 1:], whole[1, 1:], dtype="float32", reduction=WIDTH)


def _loss_and_grads(config, params, tokens_BT):
  model = decoder.build(config)
  weights = jax.random.normal(jax.random.key(3), (BATCH, TIME, VOCAB))
  return jax.jit(
    jax.value_and_grad(lambda params: jnp.sum(model.logits(params, tokens_BT, SEGMENTS) * weights))
  )(params)


@every_config
@pytest.mark.parametrize(
  "change", [{"layers": "unroll"}, {"remat": "block"}, {"remat": "matmuls"}], ids=str
)
def test_scan_and_remat_change_no_result(config, change):
  params, tokens_BT = _params(decoder.build(config)), _tokens(BATCH, TIME)
  expected = _loss_and_grads(config, params, tokens_BT)
  actual = _loss_and_grads(dataclasses.replace(config, **change), params, tokens_BT)
  jax.tree.map(
    lambda a, b: assert_close(a, b, dtype="float32", reduction=TIME * VOCAB, floor=1.0),
    actual,
    expected,
  )


@pytest.mark.parametrize("name", SHARDED)
@pytest.mark.parametrize(
  "shape", [{"data": 2, "tensor": 4}, {"fsdp": 2, "data": 2, "tensor": 2}], ids=str
)
def test_sharded_is_as_on_one_device(name, shape):
  config = CONFIGS[name]
  model = decoder.build(config)
  params = _params(model)
  tokens_BT = jnp.tile(_tokens(BATCH, TIME), (2, 1))
  segments_BT = np.tile(SEGMENTS, (2, 1))
  weights = jax.random.normal(jax.random.key(3), (2 * BATCH, TIME, VOCAB))

  def loss(params):
    return jnp.sum(model.logits(params, tokens_BT, segments_BT) * weights)

  expected = jax.jit(jax.value_and_grad(loss))(params)
  mesh = make_mesh(MeshShape(**shape))
  for zero in (rules.ZERO1, rules.ZERO3):
    layout = logical.shardings(model.axes, model.shapes, zero.parameters, mesh)
    with logical.placement(mesh, zero):
      actual = jax.jit(jax.value_and_grad(loss))(jax.device_put(params, layout))
    jax.tree.map(
      lambda a, b: assert_close(a, b, dtype="float32", reduction=TIME * VOCAB, floor=1.0),
      actual,
      expected,
    )


# Shards of 4 tokens on 8 devices. Documents that begin at a border, just before and after one, span
# several shards, or are one token long; padding that begins within a shard; ids that come back.
BORDERS = np.array(
  [[1] * 4 + [2] * 3 + [3] * 2 + [1] * 16 + [2] * 3 + [3] + [2] * 3, [7] * 13 + [0] * 5 + [5] * 14],
  np.int32,
)


def _split_loss(model):
  tokens_BT = jnp.tile(_tokens(*BORDERS.shape), (2, 1))
  segments_BT = np.tile(BORDERS, (2, 1))
  weights = jax.random.normal(jax.random.key(3), (*tokens_BT.shape, VOCAB))

  def loss(params):
    logits = model.logits(params, tokens_BT, segments_BT)
    return jnp.sum(logits * weights), logits

  return jax.jit(jax.value_and_grad(loss, has_aux=True))


@functools.cache
def _on_one_device(name):
  model = decoder.build(CONFIGS[name])
  return _split_loss(model)(_params(model))


# With every other axis; the meshes of the test above split rows in one part.
SEQUENCE = (
  ({"fsdp": 2, "sequence": 2, "tensor": 2}, rules.ZERO3),
  ({"data": 2, "sequence": 4}, rules.ZERO1),
  ({"sequence": 8}, rules.ZERO3),
)


@pytest.mark.parametrize(
  "name", ["recurrent", "local_attention", "global_attention", "recurrentgemma"]
)
@pytest.mark.parametrize(
  ("shape", "zero"), SEQUENCE, ids=lambda x: str(x) if type(x) is dict else ""
)
def test_rows_split_over_devices_are_whole_rows(name, shape, zero):
  model = decoder.build(CONFIGS[name])
  mesh = make_mesh(MeshShape(**shape))
  params = _params(model)
  (loss, logits), grads = _on_one_device(name)
  layout = logical.shardings(model.axes, model.shapes, zero.parameters, mesh)
  with logical.placement(mesh, zero):
    (split_loss, split_logits), split_grads = _split_loss(model)(jax.device_put(params, layout))
  assert_close(split_logits, logits, dtype="float32", reduction=WIDTH)
  jax.tree.map(
    lambda a, b: assert_close(a, b, dtype="float32", reduction=32 * VOCAB, floor=1.0),
    (split_loss, split_grads),
    (loss, grads),
  )


def test_padding_on_the_left_changes_nothing():
  model = decoder.build(CONFIGS["griffin_with_remainder"])
  params, tokens_BT = _params(model), _tokens(1, 6)
  plain = model.logits(params, tokens_BT, np.ones((1, 6), np.int32))
  padded_BT = jnp.concatenate([jnp.full((1, 3), 7), tokens_BT], axis=1)
  segments_BT = np.array([[0] * 3 + [1] * 6], np.int32)
  padded = model.logits(params, padded_BT, segments_BT)
  assert_close(padded[:, 3:], plain, dtype="float32", reduction=WIDTH)


@pytest.mark.parametrize(
  ("tokens", "segments", "message"),
  [
    (np.zeros((1, 4)), np.ones((1, 4), int), r"tokens are float64 \(1, 4\).* integers"),
    (np.zeros((1, 4), int), np.ones((1, 4), bool), "segments are bool"),
    (np.zeros(4, int), np.ones(4, int), r"tokens are int64 \(4,\).*\[batch, time\]"),
    (np.zeros((2, 4), int), np.ones((1, 4), int), r"tokens \(2, 4\) and segments \(1, 4\)"),
    (np.zeros((2, 0), int), np.ones((2, 0), int), "at least one"),
  ],
)
def test_rows_of_another_shape_or_type_are_named(tokens, segments, message):
  model = decoder.build(CONFIGS["hawk"])
  with pytest.raises(ValueError, match=message):
    jax.eval_shape(lambda params: model.logits(params, tokens, segments), model.shapes)


@pytest.mark.parametrize("name", ["hawk", "local_attention", "global_attention"])
def test_a_state_of_other_rows_is_refused(name):
  model = decoder.build(CONFIGS[name])
  rows = np.ones((2, 3), np.int32)
  for batch in (1, 3):
    state = model.initial_state(batch, context=3)
    with pytest.raises(ValueError, match=f"extend: tokens of 2 rows .* a state of {batch}"):
      jax.eval_shape(model.extend, model.shapes, rows, rows, state)
  with pytest.raises(ValueError, match="batch 0 must be at least 1"):
    model.initial_state(0, context=3)


@pytest.mark.parametrize("context", [0, -1])
def test_room_for_no_token_is_refused_where_attention_is_global(context):
  decoder.build(CONFIGS["griffin_with_remainder"]).initial_state(2, context)  # which ignores it
  with pytest.raises(ValueError, match=f"context {context} must be at least 1"):
    decoder.build(CONFIGS["global_attention"]).initial_state(2, context)


def test_bfloat16_activations_stay_near_float32():
  config = CONFIGS["griffin_with_remainder"]
  model = decoder.build(config)
  params, tokens_BT = _params(model), _tokens(BATCH, TIME)
  exact = model.logits(params, tokens_BT, SEGMENTS)
  for param_dtype in ("float32", "bfloat16"):
    low = decoder.build(dataclasses.replace(config, dtype="bfloat16", param_dtype=param_dtype))
    rounded = jax.tree.map(lambda w, s: w.astype(s.dtype), params, low.shapes)
    logits = low.logits(rounded, tokens_BT, SEGMENTS)
    assert logits.dtype == jnp.float32
    error = np.abs(np.asarray(logits) - np.asarray(exact)).max() / np.abs(np.asarray(exact)).max()
    assert error < 0.05
