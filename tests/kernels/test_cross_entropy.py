"""The chunked loss against whole logits: one device and vocabulary shards."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from kernels import dispatch
from kernels.cross_entropy import _default_chunk, log_z_and_target_logit
from sharding.mesh import MeshShape, make_mesh
from tests.draws import Draws
from tests.tolerances import assert_close


def _inputs(vocab_size, dtype="float32", batch=4, time=6, width=16):
  draws = Draws()
  x_BTD = draws.normal(batch, time, width, dtype=dtype)
  unembed_VD = draws.normal(vocab_size, width, dtype=dtype)
  targets_BT = np.random.default_rng(0).integers(0, vocab_size, (batch, time), dtype=np.int32)
  targets_BT[0, :2] = vocab_size - 1, 0
  return x_BTD, unembed_VD, jnp.asarray(targets_BT), draws.normal(2, batch, time)


def _whole(x_BTD, unembed_VD, targets_BT, logit_cap):
  logits_BTV = jnp.einsum("BTD,VD->BTV", x_BTD, unembed_VD, preferred_element_type=jnp.float32)
  if logit_cap is not None:
    logits_BTV = logit_cap * jnp.tanh(logits_BTV / logit_cap)
  target_BT = jnp.take_along_axis(logits_BTV, targets_BT[..., None], axis=-1)[..., 0]
  return jax.nn.logsumexp(logits_BTV, axis=-1), target_BT


def _with_gradients(function, x_BTD, unembed_VD, targets_BT, weights):
  """Both results and the gradients of a weighted sum of them, as of loss and z-loss together."""

  def loss(x_BTD, unembed_VD):
    log_z_BT, target_BT = function(x_BTD, unembed_VD, targets_BT)
    return jnp.sum(weights[0] * log_z_BT**2) + jnp.sum(weights[1] * target_BT), (
      log_z_BT,
      target_BT,
    )

  (_, results), grads = jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True))(x_BTD, unembed_VD)
  return *results, *grads


@pytest.mark.parametrize("logit_cap", [None, 3.0])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("vocab_size", "chunk"), [(40, 40), (40, 8), (37, 8), (37, 64), (5, 1)])
def test_chunks_are_the_whole(vocab_size, chunk, dtype, logit_cap):
  arrays = _inputs(vocab_size, dtype)

  def chunked(x, e, t):
    return log_z_and_target_logit(x, e, t, logit_cap=logit_cap, chunk=chunk)

  actual = _with_gradients(chunked, *arrays)
  expected = _with_gradients(lambda x, e, t: _whole(x, e, t, logit_cap), *arrays)
  for a, b in zip(actual, expected, strict=True):
    assert a.dtype == b.dtype
    assert_close(a, b, dtype=dtype if a.dtype == jnp.bfloat16 else "float32", reduction=64)


@pytest.mark.parametrize(
  "shape", [{"data": 2, "tensor": 4}, {"tensor": 8}, {"fsdp": 4, "tensor": 2}], ids=str
)
# 5 and 7 do not divide a shard: the padding of its last chunk must not be read as the next shard.
@pytest.mark.parametrize("chunk", [None, 3, 5, 7])
def test_vocabulary_shards_are_the_whole(shape, chunk):
  x_BTD, unembed_VD, targets_BT, weights = _inputs(48)
  targets_BT = (targets_BT.at[0].set(jnp.arange(6) * 8)).at[1].set(jnp.arange(6) + 12)
  mesh = make_mesh(MeshShape(**shape))
  batch, vocab = P(("data", "fsdp")), P("tensor")

  def on_shard(x_BTD, unembed_VD, targets_BT):
    return log_z_and_target_logit(
      x_BTD, unembed_VD, targets_BT, logit_cap=5.0, chunk=chunk, axis_name="tensor"
    )

  sharded = jax.shard_map(
    on_shard, mesh=mesh, in_specs=(batch, vocab, batch), out_specs=(batch, batch)
  )
  actual = _with_gradients(sharded, x_BTD, unembed_VD, targets_BT, weights)
  expected = _with_gradients(
    lambda x, e, t: _whole(x, e, t, 5.0), x_BTD, unembed_VD, targets_BT, weights
  )
  for a, b in zip(actual, expected, strict=True):
    assert_close(a, b, dtype="float32", reduction=64)


@pytest.mark.parametrize("logit_cap", [None, 3.0])
def test_a_float32_unembedding_is_rounded_and_its_gradient_is_not(logit_cap):
  """Products of bfloat16 activations; the gradient keeps the dtype of the parameter."""
  x_BTD, unembed_VD, targets_BT, weights = _inputs(37)
  x_BTD = x_BTD.astype(jnp.bfloat16)

  def chunked(x, e, t):
    return log_z_and_target_logit(x, e, t, logit_cap=logit_cap, chunk=8)

  def rounded(x, e, t):
    return _whole(x, e.astype(jnp.bfloat16), t, logit_cap)

  arrays = (x_BTD, unembed_VD, targets_BT, weights)
  log_z, target, dx, dunembed = _with_gradients(chunked, *arrays)
  expected = _with_gradients(rounded, *arrays)
  assert (dx.dtype, dunembed.dtype) == (jnp.bfloat16, jnp.float32)
  assert_close(log_z, expected[0], dtype="float32", reduction=64)
  assert_close(target, expected[1], dtype="float32", reduction=64)
  assert_close(dx, expected[2], dtype="bfloat16")
  assert_close(dunembed, expected[3], dtype="bfloat16")


def test_a_target_outside_of_the_vocabulary_counts_nothing():
  x_BTD, unembed_VD, targets_BT, weights = _inputs(37)
  outside_BT = targets_BT.at[0, :4].set(jnp.array([-1, 37, 39, 10**6]))

  def chunked(x, e, t):
    return log_z_and_target_logit(x, e, t, logit_cap=None, chunk=8)

  _, target_BT, *grads = _with_gradients(chunked, x_BTD, unembed_VD, outside_BT, weights)
  assert not target_BT[0, :4].any()
  without = _with_gradients(chunked, x_BTD, unembed_VD, targets_BT, weights.at[1, 0, :4].set(0.0))
  for grad, expected in zip(grads, without[2:], strict=True):
    assert_close(grad, expected, dtype="float32", reduction=64)


# By default, with few tokens as with many; the vocabulary divides by no power of 2.
@pytest.mark.parametrize("tokens", [8, 256])
def test_no_array_is_as_large_as_all_logits(tokens):
  vocab_size, width = 4999, 4
  x = jax.ShapeDtypeStruct((1, tokens, width), jnp.float32)
  unembed = jax.ShapeDtypeStruct((vocab_size, width), jnp.float32)
  targets = jax.ShapeDtypeStruct((1, tokens), jnp.int32)

  def loss(x, unembed, targets):
    log_z, target = log_z_and_target_logit(x, unembed, targets, logit_cap=None)
    return jnp.sum(log_z - target)

  text = jax.jit(jax.grad(loss, (0, 1))).lower(x, unembed, targets).compile().as_text()
  sizes = [
    int(np.prod(list(map(int, shape.split(",")))))
    for shape in re.findall(r"\b(?:f32|pred)\[([\d,]+)\]", text)
  ]
  # The unembedding, padded to whole chunks, or the logits of one chunk.
  assert max(sizes) <= max(1.1 * vocab_size * width, tokens * (vocab_size // 4))


@pytest.mark.parametrize("tokens", [1, 1000, 4096, 1 << 20])
@pytest.mark.parametrize("vocab_size", [1, 256, 1024, 1025, 5000, 32000, 50257, 256000])
def test_default_chunks_fill_up_little(vocab_size, tokens):
  chunk = _default_chunk(vocab_size, tokens)
  if vocab_size <= 1024:
    assert chunk == vocab_size
    return
  assert chunk <= max(1024, vocab_size // 4)
  assert chunk * tokens <= max(1024 * tokens, 1 << 22)
  assert -(-vocab_size // chunk) * chunk < vocab_size + 128 * -(-vocab_size // chunk)


def test_chunks_are_larger_on_gpus_and_never_the_vocabulary():
  assert _default_chunk(256_000, 16_384) == 1024
  with dispatch.targeting("gpu"):
    assert _default_chunk(256_000, 16_384) == 4096
    assert _default_chunk(32_000, 16_384) == 4096
    assert _default_chunk(8000, 16_384) == 2000
    assert _default_chunk(2000, 16_384) == 1024
    assert _default_chunk(1024, 16_384) == 1024


def test_large_logits_do_not_overflow():
  x = jnp.full((1, 2, 1), 1e4)
  unembed = jnp.array([[1.0], [-1.0], [0.5]])
  log_z, target = log_z_and_target_logit(x, unembed, jnp.array([[0, 1]]), logit_cap=None, chunk=1)
  np.testing.assert_allclose(log_z, [[1e4, 1e4]])
  np.testing.assert_allclose(target, [[1e4, -1e4]])


def test_wrong_shapes_are_refused():
  x, unembed, targets, _ = _inputs(40)
  with pytest.raises(ValueError, match="do not fit"):
    log_z_and_target_logit(x, unembed, targets[:, :3], logit_cap=None)
  with pytest.raises(ValueError, match=r"x \(4, 16\), .* do not fit"):
    log_z_and_target_logit(x[:, 0], unembed, jnp.zeros((4, 16), jnp.int32), logit_cap=None)
  with pytest.raises(ValueError, match=r"targets \(4, 0\) .* at least one"):
    log_z_and_target_logit(x[:, :0], unembed, targets[:, :0], logit_cap=None)
  with pytest.raises(ValueError, match="chunk 0 must be at least 1"):
    log_z_and_target_logit(x, unembed, targets, logit_cap=None, chunk=0)
