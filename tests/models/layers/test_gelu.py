"""The gated GELU and its gradients against its definition in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models.layers.gelu import gated_gelu
from tests.tolerances import assert_close

SHAPE = (2, 33, 24)


def _inputs(dtype):
  keys = jax.random.split(jax.random.key(0), 3)
  return [(3 * jax.random.normal(key, SHAPE)).astype(dtype) for key in keys]


def _slow(x, y):
  return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3))) * y


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_values_are_those_of_the_definition(dtype):
  x, y, _ = _inputs(dtype)
  actual = gated_gelu(x, y)
  assert actual.dtype == x.dtype
  assert_close(actual, _slow(np.float64(x), np.float64(y)), dtype=dtype)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_gradients_are_those_of_the_definition(dtype):
  x, y, dz = _inputs(dtype)
  actual = jax.vjp(gated_gelu, x, y)[1](dz)
  step, (x64, y64, dz64) = 1e-6, map(np.float64, (x, y, dz))
  slope = (_slow(x64 + step, y64) - _slow(x64 - step, y64)) / (2 * step)
  for mine, expected in zip(actual, (dz64 * slope, dz64 * _slow(x64, 1.0)), strict=True):
    assert mine.dtype == x.dtype
    assert_close(mine, expected, dtype=dtype, reduction=8)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_far_from_zero_it_is_open_or_shut(dtype):
  x = jnp.asarray([-1e9, -50.0, -0.0, 0.0, 50.0, 1e9], dtype)
  value, (dx, dy) = jax.value_and_grad(lambda x, y: jnp.sum(gated_gelu(x, y)), (0, 1))(
    x, jnp.ones_like(x)
  )
  np.testing.assert_allclose(np.float64(value), 1e9 + 50, rtol=1e-2)
  np.testing.assert_array_equal(np.float64(dx), [0, 0, 0.5, 0.5, 1, 1])
  np.testing.assert_array_equal(np.float64(dy), np.float64(jnp.maximum(x, 0)))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("size", [2e13, 1e18, 3e38])
def test_as_far_as_numbers_reach_it_is_open_or_shut(dtype, size):
  """There the slope's x (1 + 3 k x^2), and even x^2, overflow; 0 times infinity would be NaN."""
  x = jnp.asarray([-size, size], dtype)
  value, vjp = jax.vjp(gated_gelu, x, jnp.ones_like(x))
  dx, dy = vjp(jnp.ones_like(x))
  np.testing.assert_array_equal(np.float64(value), np.float64(jnp.maximum(x, 0)))
  np.testing.assert_array_equal(np.float64(dx), [0, 1])
  np.testing.assert_array_equal(np.float64(dy), np.float64(jnp.maximum(x, 0)))


def test_where_tanh_cancels_the_tail_is_exact_to_the_last_digits():
  x = jnp.linspace(-6.0, -3.0, 31)
  actual = np.float64(gated_gelu(x, jnp.ones_like(x)))
  exact = np.float64(x)
  exact = exact / (1 + np.exp(-2 * np.sqrt(2 / np.pi) * (exact + 0.044715 * exact**3)))
  np.testing.assert_allclose(actual, exact, rtol=2e-5)


def test_nothing_but_inputs_is_kept_for_the_backward_pass():
  """No tanh is written: the only arrays of a product's size are the results."""
  x, y, dz = _inputs("bfloat16")
  _, vjp = jax.vjp(gated_gelu, x, y)
  kept = [leaf for leaf in jax.tree.leaves(vjp) if getattr(leaf, "shape", None) == SHAPE]
  assert len(kept) == 2
  assert "tanh" not in str(
    jax.make_jaxpr(lambda x, y, dz: jax.vjp(gated_gelu, x, y)[1](dz))(x, y, dz)
  )
