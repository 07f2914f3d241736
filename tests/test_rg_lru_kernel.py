"""Every fused RG-LRU against the one whose gates are plain JAX: values and every gradient."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec as P

from kernels import rg_lru
from sharding.mesh import MeshShape, make_mesh
from tests.tolerances import assert_close


def _inputs(shape, dtype, seed=0, starts=0.1):
  """x, r, i, decay, is_start, h0, and weights for the loss; some channels' a is exactly 0 or 1."""
  batch, time, width = shape
  keys = jax.random.split(jax.random.key(seed), 8)
  x_BTR, r_BTR, i_BTR = (jax.random.normal(k, shape).astype(dtype) for k in keys[:3])
  decay_R = jax.random.uniform(keys[3], (width,), minval=-9.0, maxval=1.0)
  # softplus(30) makes a underflow to 0, softplus(-200) is 0 and makes a exactly 1.
  decay_R = decay_R.at[::5].set(30.0).at[1::5].set(-200.0)
  is_start_BT = jax.random.uniform(keys[4], (batch, time)) < starts
  h0_BR = jax.random.normal(keys[5], (batch, width))
  weights = jax.random.normal(keys[6], shape), jax.random.normal(keys[7], (batch, width))
  return (x_BTR, r_BTR, i_BTR, decay_R, is_start_BT, h0_BR), weights


def _run(arrays, weights, implementation):
  """y, hT and the gradients of x, r, i, decay and h0 under cotangents on y and hT."""

  def loss(x_BTR, r_BTR, i_BTR, decay_R, h0_BR):
    y_BTR, hT_BR = rg_lru.rg_lru(
      x_BTR, r_BTR, i_BTR, decay_R, arrays[4], h0_BR, implementation=implementation
    )
    total = jnp.sum(y_BTR.astype(jnp.float32) * weights[0]) + jnp.sum(hT_BR * weights[1])
    return total, (y_BTR, hT_BR)

  grads, (y_BTR, hT_BR) = jax.grad(loss, (0, 1, 2, 3, 4), has_aux=True)(*arrays[:4], arrays[5])
  return y_BTR, hT_BR, *grads


def _plain_forward(x_BTR, r_BTR, i_BTR, decay_R, is_start_BT, h0_BR):
  return rg_lru.rg_lru(x_BTR, r_BTR, i_BTR, decay_R, is_start_BT, h0_BR, implementation="reference")


def _plain_backward(x_BTR, r_BTR, i_BTR, decay_R, is_start_BT, h0_BR, y_BTR, dy_BTR, dhT_BR):
  _, vjp = jax.vjp(
    lambda *a: _plain_forward(*a[:4], is_start_BT, a[4]), x_BTR, r_BTR, i_BTR, decay_R, h0_BR
  )
  return vjp((dy_BTR, dhT_BR))


@pytest.fixture
def plain(monkeypatch):
  """A fused backend in plain JAX: what the dispatch owes a backend, without one."""
  monkeypatch.setitem(rg_lru._FUSED, "plain", rg_lru.Fused(_plain_forward, _plain_backward))
  monkeypatch.setattr(rg_lru, "IMPLEMENTATIONS", (*rg_lru.IMPLEMENTATIONS, "plain"))
  return "plain"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_dispatch_joins_forward_and_backward(plain, dtype):
  arrays, weights = _inputs((2, 9, 10), dtype)
  actual, expected = (_run(arrays, weights, name) for name in (plain, "reference"))
  for result, expected_result in zip(actual, expected, strict=True):
    assert result.dtype == expected_result.dtype
    assert_close(result, expected_result, dtype=dtype, reduction=4)


def test_a_fused_backend_takes_gates_in_the_dtype_of_x(plain, monkeypatch):
  arrays, weights = _inputs((1, 5, 10), "bfloat16")
  seen = []

  def forward(x_BTR, r_BTR, i_BTR, *rest):
    seen.append([z.dtype.name for z in (x_BTR, r_BTR, i_BTR)])
    return _plain_forward(x_BTR, r_BTR, i_BTR, *rest)

  monkeypatch.setitem(rg_lru._FUSED, "plain", rg_lru.Fused(forward, _plain_backward))
  wide = (arrays[0], *(z.astype(jnp.float32) for z in arrays[1:3]), *arrays[3:])
  results = _run(wide, weights, plain)
  assert seen == [["bfloat16"] * 3] * len(seen) != []
  assert [z.dtype for z in results[2:]] == [jnp.bfloat16] + [jnp.float32] * 4


def test_a_remat_policy_keeps_the_states_of_a_fused_backend(plain, monkeypatch):
  arrays, weights = _inputs((1, 5, 10), "float32")

  def forward(*arrays):
    y_BTR, hT_BR = _plain_forward(*arrays)
    return jnp.cbrt(y_BTR), hT_BR  # an operation that nothing else has, to count

  monkeypatch.setitem(rg_lru._FUSED, "plain", rg_lru.Fused(forward, _plain_backward))

  def run(x_BTR):
    y_BTR, _ = rg_lru.rg_lru(x_BTR, *arrays[1:], implementation=plain)
    return jnp.sum(jnp.sin(y_BTR) * weights[0])

  def forward_passes(policy):
    gradient = jax.value_and_grad(jax.checkpoint(run, policy=policy))
    return jax.jit(gradient).lower(arrays[0]).as_text().count("cbrt")

  assert forward_passes(jax.checkpoint_policies.save_only_these_names("scan")) == 1
  assert forward_passes(jax.checkpoint_policies.nothing_saveable) == 2


def test_shards_with_a_shared_decay_and_state_are_the_whole(plain):
  """Batch and channels split by jax.shard_map, decay and first state the same on data shards."""
  (*arrays, h0_BR), weights = _inputs((4, 6, 20), "float32")
  mesh = make_mesh(MeshShape(data=2, tensor=4))
  split = P("data", None, "tensor")

  def gradients(run):
    def loss(x_BTR, r_BTR, i_BTR, decay_R, h0_R):
      y_BTR, hT_BR = run(x_BTR, r_BTR, i_BTR, decay_R, arrays[4], h0_R)
      return jnp.sum(y_BTR * weights[0]) + jnp.sum(hT_BR * weights[1])

    return jax.jit(jax.grad(loss, (0, 1, 2, 3, 4)))(*arrays[:4], h0_BR[0])

  def run(x_BTR, r_BTR, i_BTR, decay_R, is_start_BT, h0_R):
    h0_BR = jnp.broadcast_to(h0_R, (x_BTR.shape[0], x_BTR.shape[2]))
    return rg_lru.rg_lru(x_BTR, r_BTR, i_BTR, decay_R, is_start_BT, h0_BR, implementation=plain)

  on_shards = jax.shard_map(
    run,
    mesh=mesh,
    in_specs=(split, split, split, P("tensor"), P("data"), P("tensor")),
    out_specs=(split, P("data", "tensor")),
  )
  for actual, expected in zip(gradients(on_shards), gradients(run), strict=True):
    assert_close(actual, expected, dtype="float32", reduction=16)
