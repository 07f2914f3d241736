"""What must be true of every block and every model: one list of configs, all properties."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from models import decoder, residual_block
from models.decoder import DecoderConfig
from models.layers import attention, mlp, rg_lru
from models.layers import segments as segments_lib
from models.layers.rope import Llama3Scaling, Rope
from models.llama import llama
from sharding import logical, rules
from sharding.mesh import MeshShape, make_mesh
from tests.tolerances import assert_close

WIDTH, VOCAB, WINDOW = 32, 48, 6
MLP = mlp.Config(mlp_width=48)
PLAIN = dataclasses.replace(MLP, is_gated=False)
SWIGLU = dataclasses.replace(MLP, activation="silu", biases=False)


def _model(*mixers, num_blocks: int | None = None, **settings) -> DecoderConfig:
  return DecoderConfig(
    vocab_size=VOCAB,
    width=WIDTH,
    num_blocks=num_blocks or len(mixers),
    pattern=tuple(residual_block.Config(mixer=mixer, mlp=MLP) for mixer in mixers),
    **{"dtype": "float32", "remat": "none", **settings},
  )


RECURRENT = rg_lru.Config(rnn_width=64, num_gate_blocks=16)
LOCAL = attention.Config(num_heads=4, head_size=8, window=WINDOW)
GLOBAL = attention.Config(num_heads=4, head_size=8, window=None)
# Two and four key-value heads, on meshes that split four query heads in two and in four.
SOME = dataclasses.replace(LOCAL, num_kv_heads=2, output_bias=False)
ALL = dataclasses.replace(GLOBAL, num_kv_heads=4, rope=Rope(share=1.0, theta=500.0))

# Add a new mixer here: every test below then runs on it.
CONFIGS = {
  "recurrent": _model(RECURRENT),
  "recurrent_recurrentgemma_decay": _model(
    dataclasses.replace(RECURRENT, decay_init="recurrentgemma", num_gate_blocks=4, conv_taps=2)
  ),
  "recurrent_gates_pallas_tpu": _model(dataclasses.replace(RECURRENT, gates="pallas_tpu")),
  "local_attention": _model(LOCAL),
  "global_attention": _model(GLOBAL),
  "grouped_attention": dataclasses.replace(
    _model(SOME, ALL),
    pattern=(
      residual_block.Config(mixer=SOME, mlp=PLAIN),
      residual_block.Config(mixer=ALL, mlp=SWIGLU),
    ),
  ),
  "hawk": _model(RECURRENT, num_blocks=3),
  "griffin_with_remainder": _model(RECURRENT, RECURRENT, LOCAL, num_blocks=8),
  "recurrentgemma": _model(
    RECURRENT, RECURRENT, LOCAL, embedding_scale="sqrt_width", logit_cap=5.0
  ),
  "llama": llama(
    vocab_size=VOCAB,
    width=WIDTH,
    num_blocks=2,
    num_heads=4,
    num_kv_heads=2,
    mlp_width=48,
    theta=500.0,
    rope_scaling=Llama3Scaling(factor=8.0, original_context=16),
    dtype="float32",
    remat="none",
  ),
}


def every(*names):
  """One worker for all tests of a config: they share what is compiled."""
  params = [
    pytest.param(CONFIGS[name], id=name, marks=pytest.mark.xdist_group(f"blocks_{name}"))
    for name in names
  ]
  return pytest.mark.parametrize("config", params)


every_config = every(*CONFIGS)
# The configs with sizes that sharding can divide.
every_sharded = every(
  "recurrent",
  "recurrent_gates_pallas_tpu",
  "local_attention",
  "global_attention",
  "grouped_attention",
  "griffin_with_remainder",
  "llama",
)


def _params(model):
  """Initial parameters with every zero (biases, norm scales) moved, so that nothing is trivial."""
  random = np.random.default_rng(1)
  return jax.tree.map(
    lambda w: w + random.normal(scale=0.1, size=w.shape).astype(w.dtype),
    jax.jit(model.init)(jax.random.key(0)),
  )


def _tokens(batch, time, seed=0):
  return jax.random.randint(jax.random.key(seed), (batch, time), 0, VOCAB)


# Documents of length 1 and longer than the window, ids that come back, and padding at the end.
SEGMENTS = np.array(
  [[1] * 9 + [2] + [1] * 11 + [3] * 2 + [0] * 2, [5] * 3 + [4] * 20 + [9] * 2], np.int32
)
BATCH, TIME = SEGMENTS.shape


class _Built:
  """A model, parameters, and its functions, each compiled once for equal shapes."""

  def __init__(self, config: DecoderConfig):
    self.model = decoder.build(config)
    self.params = _params(self.model)
    self.apply, self.logits = jax.jit(self.model.apply), jax.jit(self.model.logits)
    self.extend = jax.jit(self.model.extend)
    self.prefill = jax.jit(self.model.prefill, static_argnames="context")
    self.document_loss = functools.cache(self._document_loss)

  def _document_loss(self, start, end):
    """Loss that reads the logits of tokens [start, end) of the first row only."""
    weights = jax.random.normal(jax.random.key(7), (end - start, VOCAB))

    def loss(params, tokens_BT, segments_BT):
      return jnp.sum(self.model.logits(params, tokens_BT, segments_BT)[0, start:end] * weights)

    return jax.jit(jax.value_and_grad(loss))


_built = functools.cache(_Built)


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
  built, tokens_BT = _built(config), _tokens(BATCH, TIME)
  changed_BT = tokens_BT.at[:, 13:].set((tokens_BT[:, 13:] + 1) % VOCAB)
  changed = np.asarray(built.logits(built.params, changed_BT, SEGMENTS))
  original = np.asarray(built.logits(built.params, tokens_BT, SEGMENTS))
  np.testing.assert_array_equal(changed[:, :13], original[:, :13])
  assert (changed[:, 13] != original[:, 13]).any()


@every_config
def test_packed_documents_are_as_if_alone(config):
  built, tokens_BT = _built(config), _tokens(BATCH, TIME)
  params = built.params
  packed = built.logits(params, tokens_BT, SEGMENTS)
  for start, end in ((0, 9), (9, 10), (10, 21), (21, 23)):
    size = end - start
    # Alone in a row of the same length, so that one compiled program serves both.
    alone_BT = jnp.zeros((BATCH, TIME), jnp.int32).at[0, :size].set(tokens_BT[0, start:end])
    segments_BT = np.zeros((BATCH, TIME), np.int32)
    segments_BT[0, :size] = 1
    alone = built.logits(params, alone_BT, segments_BT)
    assert_close(packed[0, start:end], alone[0, :size], dtype="float32", reduction=WIDTH)
  loss, grads = built.document_loss(10, 21)(params, tokens_BT, SEGMENTS)
  alone_BT = tokens_BT[:1, 10:21]
  loss_alone, grads_alone = built.document_loss(0, 11)(params, alone_BT, np.ones((1, 11), np.int32))
  # Terms of size 1 to 10 that may cancel.
  assert_close(loss, loss_alone, dtype="float32", reduction=WIDTH * VOCAB, floor=10.0)
  jax.tree.map(
    lambda g, alone: assert_close(g, alone, dtype="float32", reduction=WIDTH * VOCAB, floor=1.0),
    grads,
    grads_alone,
  )


@every_config
def test_a_document_does_not_notice_that_another_changes(config):
  built, tokens_BT = _built(config), _tokens(BATCH, TIME)
  other_BT = tokens_BT.at[0, :10].set((tokens_BT[0, :10] + 5) % VOCAB)
  other_BT = other_BT.at[0, 21:].set((tokens_BT[0, 21:] + 7) % VOCAB)
  loss = built.document_loss(10, 21)
  jax.tree.map(
    np.testing.assert_array_equal,
    loss(built.params, tokens_BT, SEGMENTS),
    loss(built.params, other_BT, SEGMENTS),
  )


@every_config
def test_split_rows_with_carried_state_are_the_whole(config):
  built, tokens_BT = _built(config), _tokens(BATCH, TIME)
  whole = built.apply(built.params, tokens_BT, SEGMENTS)[0]
  # At borders of documents and between them, parts of one token and longer than the window.
  for ends in ((1, 2, 9, 10, 18, 25), (8, 24, 25), (16, 17, 24, 25)):
    state, parts, start = built.model.initial_state(BATCH, context=TIME), [], 0
    for end in ends:
      part = (tokens_BT[:, start:end], SEGMENTS[:, start:end])
      x_BTD, _, state = built.extend(built.params, *part, state)
      parts.append(x_BTD)
      start = end
    assert_close(jnp.concatenate(parts, axis=1), whole, dtype="float32", reduction=WIDTH)


# More than a window long, and more than another is decoded.
LONG_PROMPT = WINDOW + 5
CONTEXT = LONG_PROMPT + WINDOW + 3


@every_config
@pytest.mark.parametrize("prompt", [1, 2, 3, 4, 5, LONG_PROMPT])
def test_prefill_and_decoding_are_the_parallel_pass(config, prompt):
  built, time = _built(config), CONTEXT
  params, tokens_BT = built.params, _tokens(2, time)
  # The second prompt is one token shorter, and padded on the left.
  segments_BT = np.ones((2, time), np.int32)
  segments_BT[1, :1] = 0 if prompt > 1 else 1
  whole = built.logits(params, tokens_BT, segments_BT)
  x_BTD, unembed_VD, state = built.prefill(
    params, tokens_BT[:, :prompt], segments_BT[:, :prompt], context=time
  )
  hidden = [x_BTD]
  for t in range(prompt, time):
    token = (tokens_BT[:, t : t + 1], segments_BT[:, t : t + 1])
    x_BTD, _, state = built.extend(params, *token, state)
    hidden.append(x_BTD)
  logits = jnp.concatenate(hidden, axis=1) @ unembed_VD.T
  if config.logit_cap is not None:
    logits = config.logit_cap * jnp.tanh(logits / config.logit_cap)
  # The pad itself predicts nothing that anyone reads.
  assert_close(logits[0], whole[0], dtype="float32", reduction=WIDTH)
  assert_close(logits[1, 1:], whole[1, 1:], dtype="float32", reduction=WIDTH)


def _loss(model, copies=1):
  """A loss of all logits of the rows of SEGMENTS, `copies` times."""
  tokens_BT = jnp.tile(_tokens(BATCH, TIME), (copies, 1))
  segments_BT = np.tile(SEGMENTS, (copies, 1))
  weights = jax.random.normal(jax.random.key(3), (*tokens_BT.shape, VOCAB))
  return lambda params: jnp.sum(model.logits(params, tokens_BT, segments_BT) * weights)


@functools.cache
def _loss_and_grads(config, copies=1):
  built = _built(config)
  return jax.jit(jax.value_and_grad(_loss(built.model, copies)))(built.params)


@every_config
@pytest.mark.parametrize(
  "change", [{"layers": "unroll"}, {"remat": "block"}, {"remat": "matmuls"}], ids=str
)
def test_scan_and_remat_change_no_result(config, change):
  changed = decoder.build(dataclasses.replace(config, **change))
  actual = jax.jit(jax.value_and_grad(_loss(changed)))(_built(config).params)
  jax.tree.map(
    lambda a, b: assert_close(a, b, dtype="float32", reduction=TIME * VOCAB, floor=1.0),
    actual,
    _loss_and_grads(config),
  )


def _check_sharded(config, model, shape, stages):
  """The model's loss and gradients on a mesh are those of the config's on one device."""
  mesh, loss = make_mesh(MeshShape(**shape)), _loss(model, copies=2)
  for zero in stages:
    layout = logical.shardings(model.axes, model.shapes, zero.parameters, mesh)
    with logical.placement(mesh, zero):
      actual = jax.jit(jax.value_and_grad(loss))(jax.device_put(_built(config).params, layout))
    jax.tree.map(
      lambda a, b: assert_close(a, b, dtype="float32", reduction=TIME * VOCAB, floor=1.0),
      actual,
      _loss_and_grads(config, copies=2),
    )


@every_sharded
@pytest.mark.parametrize(
  "shape", [{"data": 2, "tensor": 4}, {"fsdp": 2, "data": 2, "tensor": 2}], ids=str
)
def test_sharded_is_as_on_one_device(config, shape):
  _check_sharded(config, _built(config).model, shape, (rules.ZERO1, rules.ZERO3))


@every("griffin_with_remainder")
def test_unrolled_and_sharded_blocks_are_as_on_one_device(config):
  written = decoder.build(dataclasses.replace(config, layers="unroll"))
  _check_sharded(config, written, {"fsdp": 2, "data": 2, "tensor": 2}, (rules.ZERO3,))


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
def _on_one_device(config):
  built = _built(config)
  return _split_loss(built.model)(built.params)


# Together with every other axis; the meshes of the test above do not split rows.
SEQUENCE = (
  ({"fsdp": 2, "sequence": 2, "tensor": 2}, rules.ZERO3),
  ({"data": 2, "sequence": 4}, rules.ZERO1),
  ({"sequence": 8}, rules.ZERO3),
)


@every("recurrent", "local_attention", "global_attention", "grouped_attention", "recurrentgemma")
@pytest.mark.parametrize(
  ("shape", "zero"), SEQUENCE, ids=lambda x: str(x) if type(x) is dict else ""
)
def test_rows_split_over_devices_are_whole_rows(config, shape, zero):
  built, mesh = _built(config), make_mesh(MeshShape(**shape))
  model, params = built.model, built.params
  (loss, logits), grads = _on_one_device(config)
  layout = logical.shardings(model.axes, model.shapes, zero.parameters, mesh)
  with logical.placement(mesh, zero):
    (split_loss, split_logits), split_grads = _split_loss(model)(jax.device_put(params, layout))
  assert_close(split_logits, logits, dtype="float32", reduction=WIDTH)
  jax.tree.map(
    lambda a, b: assert_close(a, b, dtype="float32", reduction=32 * VOCAB, floor=1.0),
    (split_loss, split_grads),
    (loss, grads),
  )


@every("grouped_attention")
def test_decoding_with_heads_split_over_devices_is_the_parallel_pass(config):
  """Four shards of heads; a state holds two key-value heads once, which two shards each use."""
  built, tokens_BT, ones_BT = _built(config), _tokens(2, 6), np.ones((2, 6), np.int32)
  whole = built.apply(built.params, tokens_BT, ones_BT)[0]
  model = built.model
  with logical.placement(make_mesh(MeshShape(data=2, tensor=4)), rules.ZERO1):
    state, parts, extend = model.initial_state(2, context=6), [], jax.jit(model.extend)
    for part in (slice(0, 5), slice(5, 6)):
      x_BTD, _, state = extend(built.params, tokens_BT[:, part], ones_BT[:, part], state)
      parts.append(x_BTD)
  assert_close(jnp.concatenate(parts, axis=1), whole, dtype="float32", reduction=WIDTH)


@every("griffin_with_remainder")
def test_padding_on_the_left_changes_nothing(config):
  built, tokens_BT = _built(config), _tokens(1, 6)
  plain = built.logits(built.params, tokens_BT, np.ones((1, 6), np.int32))
  padded_BT = jnp.concatenate([jnp.full((1, 3), 7), tokens_BT], axis=1)
  segments_BT = np.array([[0] * 3 + [1] * 6], np.int32)
  padded = built.logits(built.params, padded_BT, segments_BT)
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


@every("griffin_with_remainder")
def test_bfloat16_activations_stay_near_float32(config):
  built, tokens_BT = _built(config), _tokens(BATCH, TIME)
  exact = built.logits(built.params, tokens_BT, SEGMENTS)
  for param_dtype in ("float32", "bfloat16"):
    low = decoder.build(dataclasses.replace(config, dtype="bfloat16", param_dtype=param_dtype))
    rounded = jax.tree.map(lambda w, s: w.astype(s.dtype), built.params, low.shapes)
    logits = jax.jit(low.logits)(rounded, tokens_BT, SEGMENTS)
    assert logits.dtype == jnp.float32
    error = np.abs(np.asarray(logits) - np.asarray(exact)).max() / np.abs(np.asarray(exact)).max()
    assert error < 0.05
