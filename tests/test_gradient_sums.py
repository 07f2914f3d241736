"""Gradients that are sums over all tokens: float32, whatever the activations are.

Summed in bfloat16, a gradient of 16,384 tokens is wrong by 2 to 6 % where these allow 0.4 %.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models.layers import embedding, projection, rg_lru

_BATCH, _TIME, _WIDTH, _VOCAB, _TAPS = 8, 2048, 16, 64, 4
_GENERATOR = np.random.default_rng(0)


def _bfloat16(*shape: int, mean: float = 0.0) -> jax.Array:
  return jnp.asarray(_GENERATOR.normal(mean, 1.0, shape), jnp.bfloat16)


_X_BTD = _bfloat16(_BATCH, _TIME, _WIDTH)
_DY_BTD = _bfloat16(_BATCH, _TIME, _WIDTH, mean=0.1)
_DOCUMENT_BT = np.sort(_GENERATOR.integers(1, 9, (_BATCH, _TIME), dtype=np.int32), axis=1)
# Words are about as frequent as this: the first is a fourth of all.
_TOKENS_BT = np.minimum(_GENERATOR.zipf(1.3, (_BATCH, _TIME)) - 1, _VOCAB - 1).astype(np.int32)


def _convolve(w_KR, b_R):
  before_BKR = jnp.zeros((_BATCH, _TAPS - 1, _WIDTH), jnp.bfloat16)
  before_BK = jnp.zeros((_BATCH, _TAPS - 1), jnp.int32)
  return rg_lru._convolve(_X_BTD, _DOCUMENT_BT, before_BKR, before_BK, w_KR, b_R)


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


# What is differentiated, its parameters, and their gradients by float64.
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
