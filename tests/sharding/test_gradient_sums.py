"""Gradients that are sums over all tokens: float32, whatever the activations are.

Summed in bfloat16, a gradient of 16,384 tokens is wrong by 2 to 6 % where these allow 0.4 %.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from data.rows import Batch
from kernels import causal_conv
from models import decoder
from models.griffin import griffin
from models.layers import embedding, projection
from sharding import logical, rules
from sharding.mesh import MeshShape, make_mesh
from tests.jaxprs import equations
from train.loss import loss_sums

_BATCH, _TIME, _WIDTH, _VOCAB, _TAPS = 8, 2048, 16, 64, 4
_GENERATOR = np.random.default_rng(0)


def _bfloat16(*shape: int, mean: float = 0.0) -> jax.Array:
  return jnp.asarray(_GENERATOR.normal(mean, 1.0, shape), jnp.bfloat16)


_X_BTD = _bfloat16(_BATCH, _TIME, _WIDTH)
_DY_BTD = _bfloat16(_BATCH, _TIME, _WIDTH, mean=0.1)
_DOCUMENT_BT = np.sort(_GENERATOR.integers(1, 9, (_BATCH, _TIME), dtype=np.int32), axis=1)
# Frequencies of tokens, about as in text: the first is a quarter of all.
_TOKENS_BT = np.minimum(_GENERATOR.zipf(1.3, (_BATCH, _TIME)) - 1, _VOCAB - 1).astype(np.int32)


def _convolve(w_KR, b_R):
  no_bias_R = jnp.zeros((_WIDTH,))
  y_BTD, _ = causal_conv.convolve(
    _X_BTD, no_bias_R, w_KR, b_R, jnp.asarray(_DOCUMENT_BT), implementation="shifts"
  )
  return y_BTD


def _sums_of_convolution(dy_BTD):
  x_BTD, dw_KR = np.asarray(_X_BTD, np.float64), []
  for age in reversed(range(_TAPS)):
    same_BT1 = (_DOCUMENT_BT[:, age:] == _DOCUMENT_BT[:, : _TIME - age])[..., None]
    dw_KR.append(np.sum(dy_BTD[:, age:] * x_BTD[:, : _TIME - age] * same_BT1, axis=(0, 1)))
  return np.stack(dw_KR), np.sum(dy_BTD, axis=(0, 1))


def _sums_of_tokens(dy_BTD):
  sums_VD = np.zeros((_VOCAB, _WIDTH))
  np.add.at(sums_VD, _TOKENS_BT, dy_BTD)
  return (sums_VD,)


# The function, its parameters, and their gradients in float64.
_LAYERS = {
  "bias": (
    lambda b_D: projection.add_bias(_X_BTD, b_D),
    "float32",
    ((_WIDTH,),),
    lambda dy_BTD: (np.sum(dy_BTD, axis=(0, 1)),),
  ),
  "convolution": (_convolve, "float32", ((_TAPS, _WIDTH), (_WIDTH,)), _sums_of_convolution),
  "embedding": (
    lambda table_VD: embedding._lookup(table_VD, _TOKENS_BT),
    "bfloat16",
    ((_VOCAB, _WIDTH),),
    _sums_of_tokens,
  ),
}


@pytest.mark.parametrize("name", _LAYERS)
def test_a_sum_over_tokens_is_float32(name):
  layer, dtype, shapes, expected = _LAYERS[name]
  params = [jnp.asarray(_GENERATOR.normal(size=shape), dtype) for shape in shapes]
  y_BTD, transposed = jax.vjp(lambda *params: layer(*params), *params)
  assert y_BTD.dtype == jnp.bfloat16
  gradients = jax.jit(transposed)(_DY_BTD)
  for found, w, reference in zip(
    gradients, params, expected(np.asarray(_DY_BTD, np.float64)), strict=True
  ):
    assert found.dtype == w.dtype
    found = np.asarray(found, np.float64)
    assert np.abs(found - reference).max() <= 4e-3 * np.abs(reference).max()


# Over devices, with `Rules.float32_sums`.


def _rows_of_devices() -> tuple[jax.Array, jax.Array]:
  """Two rows for each of eight devices, ones and dy: four dy sum to 1 + 2^-10, four to -1."""
  dy_BTD = np.zeros((16, 1, _WIDTH), np.float32)
  dy_BTD[0:8:2], dy_BTD[1:8:2], dy_BTD[8::2] = 1.0, 2.0**-10, -1.0
  return jnp.ones((16, 1, _WIDTH), jnp.bfloat16), jnp.asarray(dy_BTD, jnp.bfloat16)


@pytest.mark.parametrize(("float32_sums", "expected"), [(False, 0.0), (True, 2.0**-8)])
@pytest.mark.parametrize("form", ["project", "heads", "branches"])
def test_a_matrix_is_rounded_behind_the_sum_over_devices(form, float32_sums, expected):
  products = {
    "project": (projection.project, (_WIDTH, _WIDTH)),
    "heads": (projection.project, (_WIDTH, 2, _WIDTH // 2)),
    "branches": (
      lambda x, w: projection.branches(x, w, jnp.zeros(w.shape[1:]), axis="mlp")[0],
      (_WIDTH, 2, _WIDTH),
    ),
  }
  product, shape = products[form]
  mesh = make_mesh(MeshShape(data=8))
  rows = NamedSharding(mesh, P("data"))
  x_BTD, dy_BTD = (jax.device_put(x, rows) for x in _rows_of_devices())

  @jax.jit
  def gradient(w_DO, x_BTD, dy_BTD):
    y, transposed = jax.vjp(lambda w_DO: product(x_BTD, w_DO), w_DO)
    return transposed(dy_BTD.reshape(y.shape))[0]

  with logical.placement(mesh, dataclasses.replace(rules.ZERO1, float32_sums=float32_sums)):
    dw_DO = gradient(jnp.ones(shape, jnp.bfloat16), x_BTD, dy_BTD)
  dw_DO = dw_DO[:, 0] if form == "branches" else dw_DO
  assert dw_DO.dtype == jnp.bfloat16
  np.testing.assert_array_equal(np.asarray(dw_DO, np.float32), expected)


def _model_loss():
  config = griffin(
    vocab_size=64, width=32, rnn_width=32, num_blocks=3, num_heads=4, head_size=8, window=8,
    mlp_width=48, remat="none",
  )  # fmt: skip
  model, tokens_BT = decoder.build(config), np.asarray(_TOKENS_BT[:, :24])
  ones_BT = np.ones_like(tokens_BT)

  def loss(params):
    x_BTD, unembed_VD = model.apply(params, tokens_BT, ones_BT)
    batch = Batch(tokens_BT, tokens_BT, ones_BT, ones_BT.astype(np.float32))
    return loss_sums(x_BTD, unembed_VD, batch, logit_cap=None).loss

  return model, loss


def _layout(float32_sums):
  mesh = make_mesh(MeshShape(data=2, fsdp=2, tensor=2))
  return logical.placement(mesh, dataclasses.replace(rules.ZERO3, float32_sums=float32_sums))


@pytest.mark.parametrize(("float32_sums", "dtype"), [(False, "bfloat16"), (True, "float32")])
def test_the_table_is_summed_over_devices_in(float32_sums, dtype):
  """Looks at the program before compilation: XLA for CPU sums bfloat16 as float32 anyway."""
  model, loss = _model_loss()
  with _layout(float32_sums):
    jaxpr = jax.make_jaxpr(jax.grad(loss))(model.shapes)
  sums = [
    equation.outvars[0].aval
    for equation in equations(jaxpr.jaxpr)
    if equation.primitive.name.startswith("psum") and "data" in equation.params["axes"]
  ]
  # From both its uses.
  assert [aval.dtype.name for aval in sums if aval.shape == (64 // 2, 32)] == [dtype] * 2


def test_a_model_with_float32_sums_has_the_gradients_of_one_device():
  model, loss = _model_loss()
  params = jax.jit(model.init)(jax.random.key(0))
  expected = jax.jit(jax.grad(loss))(params)
  with _layout(float32_sums=True):
    found = jax.jit(jax.grad(loss))(params)

  def close(path, found, expected):
    error = np.linalg.norm(found - expected) / np.linalg.norm(expected)
    assert error < 0.02, f"{jax.tree_util.keystr(path)}: {error}"

  jax.tree_util.tree_map_with_path(close, found, expected)
