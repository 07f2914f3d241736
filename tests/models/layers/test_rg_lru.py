"""The RG-LRU against a slow, obvious one, its initialisations, and where bfloat16 would break
it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from kernels.rg_lru import gates
from models.layers import rg_lru
from models.layers import segments as segments_lib
from tests.tolerances import assert_close


def _slow_block(module, x_TD, segments_T):
  """The recurrent block of one row in float64, token by token, straight from the paper."""
  w = {name: np.asarray(getattr(module, name)[...], np.float64) for name in (
    "w_in_D2R", "b_in_2R", "w_conv_KR", "b_conv_R", "w_gates_GI2J", "b_gates_G2J", "decay_R",
    "w_out_RD", "b_out_D",
  )}  # fmt: skip
  taps, rnn_width = w["w_conv_KR"].shape
  blocks, size, _, _ = w["w_gates_GI2J"].shape
  h_R, history, outputs = np.zeros(rnn_width), [], []
  for t, x_D in enumerate(np.asarray(x_TD, np.float64)):
    is_start = t == 0 or segments_T[t] != segments_T[t - 1]
    if is_start:
      history = []
    y_R, u_R = np.einsum("d,dkr->kr", x_D, w["w_in_D2R"]) + w["b_in_2R"]
    history = [*history, u_R][-taps:]
    v_R = w["b_conv_R"] + sum(
      w["w_conv_KR"][taps - 1 - age] * past_R for age, past_R in enumerate(reversed(history))
    )
    gates_G2J = np.einsum("gi,gikj->gkj", v_R.reshape(blocks, size), w["w_gates_GI2J"])
    gates_G2J = 1 / (1 + np.exp(-(gates_G2J + w["b_gates_G2J"])))
    r_R, i_R = gates_G2J[:, 0].reshape(-1), gates_G2J[:, 1].reshape(-1)
    a_R = np.exp(-8 * r_R * np.log1p(np.exp(w["decay_R"])))
    h_R = i_R * v_R if is_start else a_R * h_R + np.sqrt(1 - a_R**2) * i_R * v_R
    gelu_R = 0.5 * y_R * (1 + np.tanh(np.sqrt(2 / np.pi) * (y_R + 0.044715 * y_R**3)))
    outputs.append((gelu_R * h_R) @ w["w_out_RD"] + w["b_out_D"])
  return np.stack(outputs)


def _block(rnn_width=48, blocks=4, width=24, **settings):
  config = rg_lru.Config(rnn_width=rnn_width, num_gate_blocks=blocks, **settings)
  module = config.build(width, num_blocks=1, rngs=nnx.Rngs(0))
  keys = iter(jax.random.split(jax.random.key(5), 16))
  params = jax.tree.map(
    lambda w: w + 0.2 * jax.random.normal(next(keys), w.shape), nnx.state(module, nnx.Param)
  )
  nnx.update(module, params)
  return module


@pytest.mark.parametrize(
  ("scan", "gates"),
  [
    *[(scan, "einsum") for scan in ("reference", "associative", "chunked", "pallas_tpu")],
    ("pallas_tpu", "pallas_tpu"),
    ("pallas_gpu", "einsum_rounded"),
  ],
)
def test_block_is_the_papers(scan, gates):
  module = _block(scan=scan, gates=gates)
  segments_BT = np.array([[1] * 7 + [2] + [3] * 29, [4] * 37], np.int32)
  x_BTD = jax.random.normal(jax.random.key(1), (2, 37, 24))
  segments, _ = segments_lib.segments(jnp.asarray(segments_BT), segments_lib.initial_state(2))
  y_BTD, state = jax.jit(lambda x_BTD: module(x_BTD, segments, None))(x_BTD)
  assert state is None
  for y_TD, x_TD, segments_T in zip(y_BTD, x_BTD, segments_BT, strict=True):
    expected = _slow_block(module, x_TD, segments_T)
    assert_close(y_TD, expected.astype(np.float32), dtype="float32", reduction=48)


def test_segments_restart_positions_and_never_reuse_a_document():
  segments_BT = jnp.array([[0, 3, 3, 3, 1, 3, 3, 0]])
  segments, state = segments_lib.segments(segments_BT, segments_lib.initial_state(1))
  np.testing.assert_array_equal(segments.document_BT, [[1, 2, 2, 2, 3, 4, 4, 5]])
  np.testing.assert_array_equal(segments.position_BT, [[0, 0, 1, 2, 0, 0, 1, 0]])
  np.testing.assert_array_equal(segments.is_start_BT, [[1, 1, 0, 0, 1, 1, 0, 1]])
  more, _ = segments_lib.segments(jnp.array([[0, 0, 5]]), state)
  np.testing.assert_array_equal(more.document_BT, [[5, 5, 6]])
  np.testing.assert_array_equal(more.position_BT, [[1, 2, 0]])


@pytest.mark.parametrize("number", [0, -1, -(2**31), 2**31 - 1])
def test_whatever_comes_first_begins_a_document(number):
  ids_BT = jnp.full((1, 3), number, jnp.int32)
  segments, state = segments_lib.segments(ids_BT, segments_lib.initial_state(1))
  np.testing.assert_array_equal(segments.is_start_BT, [[1, 0, 0]])
  np.testing.assert_array_equal(segments.document_BT, [[1, 1, 1]])
  more, _ = segments_lib.segments(ids_BT, state)
  np.testing.assert_array_equal(more.is_start_BT, [[0, 0, 0]])
  np.testing.assert_array_equal(more.position_BT, [[3, 4, 5]])


def test_paper_decay_is_uniform_in_its_eighth_power():
  decay_R = rg_lru.DECAY_INITS["paper"](jax.random.key(0), (20_000,))
  a8_R = np.exp(-8 * np.log1p(np.exp(np.asarray(decay_R, np.float64))))
  assert a8_R.min() >= 0.9 - 1e-4
  assert a8_R.max() <= 0.999 + 1e-4
  np.testing.assert_allclose(
    np.quantile(a8_R, [0.25, 0.5, 0.75]), [0.92475, 0.9495, 0.97425], atol=2e-3
  )


def test_recurrentgemma_decay_is_uniform_in_the_area_of_the_ring():
  decay_R = rg_lru.DECAY_INITS["recurrentgemma"](jax.random.key(0), (20_000,))
  a2_R = (1 / (1 + np.exp(np.asarray(decay_R, np.float64)))) ** 2
  low, high = 0.9**2, 0.999**2
  expected = low + (high - low) * np.array([0.25, 0.5, 0.75])
  np.testing.assert_allclose(np.quantile(a2_R, [0.25, 0.5, 0.75]), expected, atol=2e-3)


@pytest.mark.parametrize("a", [0.9999, 0.9995, 0.999, 0.995])
def test_slow_memories_still_listen_in_bfloat16(a):
  """In bfloat16, 1 - a^2 of a slow decay is 0 or off by half: its channel would never see input."""
  x_BTR = jnp.ones((1, 3, 1), jnp.bfloat16)
  # The gate r is 1/2 and the input gate 1 (to 1e-9), so a is exp(-4 softplus(decay)).
  r_BTR, i_BTR = jnp.zeros((1, 3, 1)), jnp.full((1, 3, 1), 20.0)
  decay_R = jnp.log(jnp.expm1(-jnp.log(jnp.float32([a])) / 4))
  is_start_BT = jnp.array([[True, False, False]])
  in_BTR, a_BTR = gates.gated_input(x_BTR, r_BTR, i_BTR, decay_R, is_start_BT)
  assert a_BTR.dtype == jnp.float32
  assert in_BTR.dtype == jnp.bfloat16
  np.testing.assert_allclose(a_BTR[0, 1:, 0], a, rtol=1e-6)
  np.testing.assert_allclose(np.float32(in_BTR[0, 1:, 0]), np.sqrt(1 - a**2), rtol=2**-8)
  assert a_BTR[0, 0, 0] == 0
  assert in_BTR[0, 0, 0] == 1
  wrong = jnp.sqrt(1 - jnp.exp(2 * jnp.log(jnp.bfloat16(a))))
  assert abs(float(wrong) - np.sqrt(1 - a**2)) > 2**-8 * np.sqrt(1 - a**2)


def test_gradients_stay_finite_where_the_decay_is_exactly_one():
  def loss(gate):
    ones_BTR = jnp.ones((1, 1, 1))
    in_BTR, a_BTR = gates.gated_input(
      ones_BTR, gate * ones_BTR, 0 * ones_BTR, jnp.zeros((1,)), jnp.zeros((1, 1), bool)
    )
    return in_BTR.sum() + a_BTR.sum()

  # sigmoid(-100) underflows: a is exactly 1 and the true derivative of the square root infinite.
  for gate in (-100.0, -20.0, 0.0, 20.0):
    assert np.isfinite(jax.grad(loss)(jnp.float32(gate)))


def test_square_root_derivative_is_bounded():
  z = jnp.array([0.0, 1e-9, 2.5e-7, 1e-4, 0.5])
  slopes = jax.vmap(jax.grad(gates.bounded_sqrt))(z)
  np.testing.assert_allclose(slopes, [1000, 1000, 1000, 50, 0.5 / np.sqrt(0.5)], rtol=1e-5)


@pytest.mark.parametrize(
  ("settings", "message"),
  [
    ({"rnn_width": 100}, "rnn_width 100 is not divisible by num_gate_blocks 16"),
    ({"rnn_width": 64, "decay_init": "ring"}, "decay_init 'ring' is none of"),
    ({"rnn_width": 64, "conv_taps": 0}, "conv_taps 0 must be at least 1"),
  ],
)
def test_wrong_settings_are_named(settings, message):
  with pytest.raises(ValueError, match=message):
    rg_lru.Config(**settings)
