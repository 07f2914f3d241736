"""Every fused RG-LRU against the one whose gates are plain JAX: values and every gradient."""

import contextlib
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from kernels import rg_lru
from kernels.rg_lru import pallas_tpu
from sharding.mesh import MeshShape, make_mesh
from tests.draws import Draws
from tests.tolerances import assert_close
from tests.triton_tiles import small_tiles


def _inputs(shape, dtype, seed=0, starts=0.1):
  """x, r, i, decay, is_start, h0, and weights for the loss; some channels' a is exactly 0 or 1."""
  batch, time, width = shape
  draws = Draws(seed)
  x_BTR, r_BTR, i_BTR = (draws.normal(*shape, dtype=dtype) for _ in range(3))
  decay_R = draws.uniform(width, low=-9.0, high=1.0)
  # softplus(30) makes a underflow to 0, softplus(-200) is 0 and makes a exactly 1.
  decay_R = decay_R.at[::5].set(30.0).at[1::5].set(-200.0)
  is_start_BT = draws.uniform(batch, time) < starts
  h0_BR = draws.normal(batch, width)
  # The cotangent of y comes in the dtype of y: rounded here, so that it is the same in float32.
  weights_BTR = draws.normal(*shape, dtype="bfloat16").astype(jnp.float32)
  weights = weights_BTR, draws.normal(batch, width)
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
  """A fused backend in plain JAX, to test the code around a backend."""
  monkeypatch.setitem(rg_lru._FUSED, "plain", rg_lru.Fused(_plain_forward, _plain_backward))
  monkeypatch.setattr(rg_lru, "IMPLEMENTATIONS", (*rg_lru.IMPLEMENTATIONS, "plain"))
  return "plain"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_dispatch_joins_forward_and_backward(plain, dtype):
  arrays, weights = _inputs((2, 9, 10), dtype)
  actual, expected = (
    jax.jit(functools.partial(_run, implementation=name))(arrays, weights)
    for name in (plain, "reference")
  )
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
  results = jax.jit(functools.partial(_run, implementation=plain))(wide, weights)
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


# More blocks of channels than one register holds; otherwise several tiles of channels and of time.
SHAPES = [(2, 1, 24), (1, 63, 200), (1, 257, 150), (2, 20, 1300)]


def _with_tile(monkeypatch, tile):
  fused = (functools.partial(run, tile=tile) for run in (pallas_tpu.forward, pallas_tpu.backward))
  monkeypatch.setitem(rg_lru._FUSED, "pallas_tpu", rg_lru.Fused(*fused))


def _assert_parity(arrays, weights, dtype):
  # Against float32 from the same inputs: a carry in bfloat16 would fail.
  wide = (*(z.astype(jnp.float32) for z in arrays[:3]), *arrays[3:])
  actual = jax.jit(functools.partial(_run, implementation="pallas_tpu"))(arrays, weights)
  expected = jax.jit(functools.partial(_run, implementation="reference"))(wide, weights)
  dtypes = (dtype, "float32", dtype, dtype, dtype, "float32", "float32")
  assert [z.dtype.name for z in actual] == list(dtypes)
  names = ("y", "hT", "x", "r", "i", "decay", "h0")
  for name, result, expected_result in zip(names, actual, expected, strict=True):
    # The last state and the gradient of the first one never meet a rounded y. softplus(decay) of
    # 30 makes log a, and its rounding error, 30 times as large as any in use.
    kind = "float32" if name in ("hT", "h0") else dtype
    reduction = 1000 if kind == "float32" else 4
    assert_close(result, expected_result, dtype=kind, reduction=reduction)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_pallas_tpu_is_the_reference(monkeypatch, shape, dtype):
  if shape[2] < 1300:
    _with_tile(monkeypatch, (min(128, 16 * -(-shape[1] // 16)), 128))
  _assert_parity(*_inputs(shape, dtype), dtype)


@pytest.mark.parametrize("starts", ["borders", "everywhere", "nowhere"])
def test_pallas_tpu_resets_wherever_documents_start(monkeypatch, starts):
  """Starts at and beside the borders of a tile of 128 tokens, and of 16 tokens loaded at once."""
  _with_tile(monkeypatch, (128, 128))
  arrays, weights = _inputs((1, 272, 130), "float32", starts=float(starts == "everywhere"))
  if starts == "borders":
    at = jnp.array([0, 15, 16, 127, 128, 129, 255, 271])
    arrays = (*arrays[:4], arrays[4].at[:, at].set(True), arrays[5])
  _assert_parity(arrays, weights, "float32")


@pytest.mark.parametrize("a", [0.9999, 0.999, 0.9])
def test_pallas_tpu_listens_with_slow_memories(a):
  """1 - a^2 without cancellation, with the gate half open: a is exp(-4 softplus(decay))."""
  x_BTR = jnp.ones((1, 2, 1), jnp.bfloat16)
  decay_R = jnp.log(jnp.expm1(-jnp.log(jnp.float32([a])) / 4))
  _, hT_BR = rg_lru.rg_lru(
    *(x_BTR, 0 * x_BTR, 0 * x_BTR + 20, decay_R),
    *(jnp.array([[True, False]]), jnp.zeros((1, 1))),
    implementation="pallas_tpu",
  )
  # The first token enters whole, the second with sqrt(1 - a^2); 2e-7 is the rounding of a itself.
  exact = np.exp(-4 * np.log1p(np.exp(np.float64(decay_R[0]))))
  np.testing.assert_allclose(hT_BR[0, 0] - exact, np.sqrt(1 - exact**2), rtol=1e-5, atol=2e-7)


@pytest.mark.parametrize("implementation", ["plain", "pallas_tpu"])
def test_shards_with_a_shared_decay_and_state_are_the_whole(plain, implementation):
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
    return rg_lru.rg_lru(
      x_BTR, r_BTR, i_BTR, decay_R, is_start_BT, h0_BR, implementation=implementation
    )

  on_shards = jax.shard_map(
    run,
    mesh=mesh,
    in_specs=(split, split, split, P("tensor"), P("data"), P("tensor")),
    out_specs=(split, P("data", "tensor")),
  )
  for actual, expected in zip(gradients(on_shards), gradients(run), strict=True):
    assert_close(actual, expected, dtype="float32", reduction=16)


@pytest.mark.parametrize("implementation", ["plain", "pallas_tpu", "pallas_gpu"])
def test_rows_split_over_devices_are_as_whole_ones(plain, implementation):
  """Values and every gradient; h0 and hT are the row's, documents begin at borders and inside."""
  arrays, weights = _inputs((2, 12, 10), "float32", starts=0.0)
  is_start_BT = arrays[4].at[0, 6].set(True).at[1, 4].set(True)
  arrays = (*arrays[:4], is_start_BT, arrays[5])
  mesh = make_mesh(MeshShape(data=2, sequence=4))
  row = P(None, "sequence")

  def on_shard(*arrays):
    y_BTR, hT_BR = rg_lru.rg_lru(*arrays, implementation=implementation, axis_name="sequence")
    return y_BTR, hT_BR[None]

  split = jax.shard_map(
    on_shard,
    mesh=mesh,
    in_specs=(row, row, row, P(), row, P()),
    out_specs=(row, P("sequence")),
    check_vma=rg_lru.tracks_varying(implementation),
  )

  def whole(*arrays):
    y_BTR, hT_BR = rg_lru.rg_lru(*arrays, implementation="reference")
    return y_BTR, jnp.broadcast_to(hT_BR, (4, *hT_BR.shape))

  def gradients(run):
    def loss(x_BTR, r_BTR, i_BTR, decay_R, h0_BR):
      y_BTR, hT_SBR = run(x_BTR, r_BTR, i_BTR, decay_R, is_start_BT, h0_BR)
      # Every shard has the row's last state, and each copy counts for itself.
      share_S11 = jnp.arange(1.0, 5.0)[:, None, None] / 10
      total = jnp.sum(y_BTR * weights[0]) + jnp.sum(hT_SBR * share_S11 * weights[1])
      return total, (y_BTR, hT_SBR)

    return jax.jit(jax.grad(loss, (0, 1, 2, 3, 4), has_aux=True))(*arrays[:4], arrays[5])

  is_triton = implementation == "pallas_gpu"
  with small_tiles(steps=8, warps=4) if is_triton else contextlib.nullcontext():
    results = gradients(split)
  jax.tree.map(
    lambda a, b: assert_close(a, b, dtype="float32", reduction=64, floor=1.0),
    results,
    gradients(whole),
  )


@pytest.mark.parametrize("implementation", rg_lru.IMPLEMENTATIONS)
def test_rows_of_another_rank_or_without_a_token_are_refused(implementation):
  (x_BTR, r_BTR, i_BTR, *rest), _ = _inputs((2, 3, 8), "float32")
  for wrong in (np.s_[:, 0], np.s_[:, :0]):
    with pytest.raises(ValueError, match=r"rg_lru: x \(2, .* must be \[batch, time, width\]"):
      rg_lru.rg_lru(
        *(z_BTR[wrong] for z_BTR in (x_BTR, r_BTR, i_BTR)), *rest, implementation=implementation
      )
