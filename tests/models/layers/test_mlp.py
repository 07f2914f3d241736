"""The MLP of every kind against its definition, with and without biases."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from models.costs import Shard
from models.initial_weights import Normal
from models.layers import mlp
from tests.tolerances import assert_close

_WIDTH, _MLP_WIDTH = 12, 20
_KINDS = {
  "geglu": {},
  "swiglu": {"activation": "silu", "biases": False, "initial_weights": Normal(std=0.3)},
  "gelu": {"is_gated": False},
  "silu": {"activation": "silu", "is_gated": False, "biases": False},
}
every_kind = pytest.mark.parametrize("kind", _KINDS)


def _built(kind):
  config = mlp.Config(mlp_width=_MLP_WIDTH, **_KINDS[kind])
  graph, params = nnx.split(config.build(_WIDTH, num_blocks=2, rngs=nnx.Rngs(0)), nnx.Param)
  random = np.random.default_rng(1)
  # No bias is 0.
  params = jax.tree.map(lambda w: w + random.normal(scale=0.1, size=w.shape), params)
  return config, params, lambda params, x_BTD: nnx.merge(graph, params)(x_BTD)


def _defined(kind, params, x_BTD):
  """The formulas, in float32."""
  p = {name: jnp.float32(w) for name, w in nnx.to_pure_dict(params).items()}
  if kind in ("geglu", "gelu"):
    f = lambda x: 0.5 * x * (1 + jnp.tanh(jnp.sqrt(2 / jnp.pi) * (x + 0.044715 * x**3)))  # noqa: E731
  else:
    f = lambda x: x / (1 + jnp.exp(-x))  # noqa: E731
  if kind in ("geglu", "swiglu"):
    up_BT2F = jnp.einsum("btd,dkf->btkf", x_BTD, p["w_up_D2F"]) + p.get("b_up_2F", 0.0)
    hidden_BTF = f(up_BT2F[:, :, 0]) * up_BT2F[:, :, 1]
  else:
    hidden_BTF = f(x_BTD @ p["w_up_DF"] + p.get("b_up_F", 0.0))
  return hidden_BTF @ p["w_down_FD"] + p.get("b_down_D", 0.0)


@every_kind
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_values_and_gradients_are_those_of_the_definition(kind, dtype):
  _, params, apply = _built(kind)
  x_BTD = jax.random.normal(jax.random.key(0), (2, 5, _WIDTH)).astype(dtype)
  y_BTD, pull_back = jax.vjp(apply, params, x_BTD)
  exact_BTD, exact_back = jax.vjp(
    lambda params, x: _defined(kind, params, x), params, x_BTD.astype(jnp.float32)
  )
  dy_BTD = jax.random.normal(jax.random.key(1), exact_BTD.shape).astype(dtype)
  assert y_BTD.dtype == dtype
  close = lambda a, b: assert_close(a, b, dtype=dtype, reduction=_MLP_WIDTH)  # noqa: E731
  close(y_BTD, exact_BTD)
  jax.tree.map(close, pull_back(dy_BTD), exact_back(dy_BTD.astype(jnp.float32)))


@every_kind
def test_costs_count_the_products_there_are(kind):
  config, params, _ = _built(kind)
  matrices = sum(w.size for w in jax.tree.leaves(params) if w.ndim > 1 and _WIDTH in w.shape)
  [part] = config.flops(_WIDTH)
  assert part.flops == 2 * matrices
  shard = Shard(
    rows=1, row_length=8, tensor=2, sequence=1, itemsize=2, remat="none", is_unrolled=False
  )
  # The results of the products: up on a tensor shard, and down, whole.
  up = matrices / _WIDTH - _MLP_WIDTH
  assert config.activations(_WIDTH, shard).products == 2 * (up / 2 + _WIDTH)


def test_an_activation_that_there_is_not_is_refused():
  with pytest.raises(ValueError, match=r"activation 'relu' is none of \('gelu', 'silu'\)"):
    mlp.Config(mlp_width=8, activation="relu")  # pyright: ignore[reportArgumentType]
