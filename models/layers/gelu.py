"""GELU times the value it gates, by the tanh approximation of Griffin, with its own gradient.

  gelu(x) = x (1 + tanh(c (x + k x^3))) / 2 = x sigmoid(2 c (x + k x^3))      arXiv:1606.08415

With autodiff, XLA for CPUs and GPUs writes the tanh to memory, to share it between value and
gradients: the elementwise part of an MLP's backward pass then moves nine arrays
(docs/benchmarks.md, "Passes over memory"). XLA computes an exponential again instead: one pass
reads x, y and dz, and writes three arrays.
"""

import math
from typing import cast

import jax
import jax.numpy as jnp

_TWO_C = 2.0 * math.sqrt(2.0 / math.pi)
_K = 0.044715
_FAR = 32.0


def gated_gelu(x_BTF: jax.Array, y_BTF: jax.Array) -> jax.Array:
  """gelu(x) * y, in the dtype of both; float32 between."""
  return cast(jax.Array, _gated_gelu(x_BTF, y_BTF))


@jax.custom_vjp
def _gated_gelu(x_BTF, y_BTF):
  wide_BTF = x_BTF.astype(jnp.float32)
  return (wide_BTF * _open(wide_BTF) * y_BTF.astype(jnp.float32)).astype(x_BTF.dtype)


def _forward(x_BTF, y_BTF):
  return _gated_gelu(x_BTF, y_BTF), (x_BTF, y_BTF)


def _backward(kept, dz_BTF):
  x_BTF, y_BTF, dz_BTF = (z_BTF.astype(jnp.float32) for z_BTF in (*kept, dz_BTF))
  open_BTF = _open(x_BTF)
  # From _FAR on, open (1 - open) is 0, and so is its product with anything finite.
  inner_BTF = _TWO_C * (1.0 + 3.0 * _K * jnp.minimum(jnp.square(x_BTF), _FAR**2))
  slope_BTF = open_BTF + open_BTF * (1.0 - open_BTF) * x_BTF * inner_BTF
  dtype = kept[0].dtype
  return (dz_BTF * y_BTF * slope_BTF).astype(dtype), (dz_BTF * x_BTF * open_BTF).astype(dtype)


_gated_gelu.defvjp(_forward, _backward)


def _open(x_BTF: jax.Array) -> jax.Array:
  """The part of x that passes, 0 to 1."""
  return jax.nn.sigmoid(_TWO_C * x_BTF * (1.0 + _K * jnp.square(x_BTF)))
