"""AdamW: equal to optax, schedules, bfloat16 moments."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from train.optimizer import (
  AdamW,
  AdamWState,
  Constant,
  Cosine,
  WarmupStableDecay,
  clip_factor,
  global_norm,
)


def _params(seed: int) -> dict:
  keys = jax.random.split(jax.random.key(seed), 2)
  return {"w_DF": jax.random.normal(keys[0], (3, 5)), "b_F": jax.random.normal(keys[1], (5,))}


def _run(tx, params, num_steps: int):
  """Parameters and state after steps with random gradients."""

  @jax.jit
  def step(params, state, grads):
    updates, state = tx.update(grads, state, params)
    return optax.apply_updates(params, updates), state

  state = tx.init(params)
  for index in range(num_steps):
    grads = jax.tree.map(lambda g, w: g.astype(w.dtype), _params(100 + index), params)
    params, state = step(params, state, grads)
  return params, state


def test_float32_equals_optax():
  config = AdamW(peak_lr=0.1, warmup_steps=3, b1=0.8, b2=0.95, eps=1e-6, weight_decay=0.3)
  mask = {"w_DF": True, "b_F": False}
  ours, state = _run(config.build(total_steps=10, decay_mask=mask), _params(0), 10)

  def schedule(count):
    return config.learning_rate(count + 1, total_steps=10)

  tx = optax.adamw(schedule, b1=0.8, b2=0.95, eps=1e-6, weight_decay=0.3, mask=mask)
  theirs, _ = _run(tx, _params(0), 10)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), ours, theirs)
  assert int(state.count) == 10
  assert state.count.dtype == jnp.int32


def test_both_moments_have_the_chosen_dtype_and_stay_close_to_float32():
  mask = {"w_DF": True, "b_F": False}

  def after(moment_dtype):
    config = AdamW(peak_lr=0.01, warmup_steps=2, moment_dtype=moment_dtype)
    return _run(config.build(total_steps=20, decay_mask=mask), _params(0), 20)

  exact, _ = after("float32")
  rounded, state = after("bfloat16")
  assert {leaf.dtype for leaf in jax.tree.leaves((state.mu, state.nu))} == {jnp.dtype("bfloat16")}
  assert state.count.dtype == jnp.int32
  # 20 updates of at most 0.01 each, every moment good to 2^-8.
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, atol=20 * 0.01 * 2**-7), exact, rounded
  )


def test_bfloat16_parameters_stay_bfloat16_and_their_updates_are_float32():
  tx = AdamW(peak_lr=0.1, warmup_steps=0).build(
    total_steps=5, decay_mask={"w_DF": True, "b_F": True}
  )
  params = jax.tree.map(lambda w: w.astype(jnp.bfloat16), _params(0))
  updates, state = tx.update(params, tx.init(params), params)
  assert {u.dtype for u in jax.tree.leaves(updates)} == {jnp.dtype("float32")}
  assert {m.dtype for m in jax.tree.leaves((state.mu, state.nu))} == {jnp.dtype("float32")}
  new, _ = _run(tx, params, 3)
  assert {w.dtype for w in jax.tree.leaves(new)} == {jnp.dtype("bfloat16")}
  assert not np.array_equal(new["w_DF"], params["w_DF"])


def test_bfloat16_second_moment_falls_when_gradients_stop():
  b2 = 0.996
  tx = AdamW(peak_lr=1e-3, warmup_steps=0, b2=b2, moment_dtype="bfloat16").build(
    total_steps=5, decay_mask={"w": False}
  )
  params = {"w": jnp.ones(256)}
  nu = jnp.linspace(1.0, 2.0, 256, endpoint=False).astype(jnp.bfloat16)
  state = AdamWState(jnp.int32(100), jax.tree.map(jnp.zeros_like, params), {"w": nu})
  _, state = tx.update({"w": jnp.zeros(256)}, state, params)
  assert np.all(np.asarray(state.nu["w"], np.float32) < np.asarray(nu, np.float32))


def test_state_is_a_plain_tree_whose_moments_optax_finds():
  config = AdamW(peak_lr=0.1, warmup_steps=0)
  tx = config.build(total_steps=1, decay_mask={"w_DF": True, "b_F": False})
  state = jax.eval_shape(tx.init, _params(0))
  names = optax.tree_map_params(
    tx,
    lambda _, name: name,
    state,
    {"w_DF": "w", "b_F": "b"},
    transform_non_params=lambda _: "-",
  )
  assert names == AdamWState("-", {"w_DF": "w", "b_F": "b"}, {"w_DF": "w", "b_F": "b"})


def test_learning_rate_rises_linearly_then_falls_to_its_end():
  config = AdamW(peak_lr=2.0, warmup_steps=4, schedule=Cosine(final_fraction=0.1))
  rates = [float(config.learning_rate(t, total_steps=14)) for t in range(1, 15)]
  np.testing.assert_allclose(rates[:4], [0.5, 1.0, 1.5, 2.0])
  np.testing.assert_allclose(rates[8], 2.0 * 0.55, rtol=1e-6)  # halfway down
  np.testing.assert_allclose(rates[-1], 0.2, rtol=1e-6)
  assert all(after < before for before, after in itertools.pairwise(rates[3:]))


@pytest.mark.parametrize(
  ("shape", "expected"),
  [("linear", [1.0, 0.875, 0.75, 0.625, 0.5]), ("sqrt", [1.0, 0.75, 0.646447, 0.566987, 0.5])],
)
def test_warmup_stable_decay_is_flat_and_falls_in_the_last_steps(shape, expected):
  schedule = WarmupStableDecay(decay_fraction=0.2, final_fraction=0.5, shape=shape)
  config = AdamW(peak_lr=1.0, warmup_steps=5, schedule=schedule)
  rates = [float(config.learning_rate(t, total_steps=20)) for t in range(1, 21)]
  np.testing.assert_allclose(rates[4:16], 1.0)
  np.testing.assert_allclose(rates[15:], expected, rtol=1e-5)


@pytest.mark.parametrize("schedule", [Cosine(), WarmupStableDecay(), Constant()])
@pytest.mark.parametrize("warmup_steps", [0, 1, 7])
def test_host_and_device_agree_on_the_learning_rate(schedule, warmup_steps):
  config = AdamW(peak_lr=3e-4, warmup_steps=warmup_steps, schedule=schedule)
  host = [float(config.learning_rate(t, total_steps=30)) for t in range(1, 31)]
  on_device = jax.jit(lambda t: config.learning_rate(t, total_steps=30))
  np.testing.assert_allclose(host, [on_device(jnp.int32(t)) for t in range(1, 31)], rtol=1e-5)
  assert max(host) == pytest.approx(3e-4, rel=0.01)
  assert min(host) >= 0


def test_constant_is_the_peak_after_the_warm_up():
  config = AdamW(peak_lr=1e-4, warmup_steps=2, schedule=Constant())
  assert [float(config.learning_rate(t, total_steps=9)) for t in (1, 2, 9)] == pytest.approx(
    [5e-5, 1e-4, 1e-4]
  )


def test_clipping_bounds_the_norm_over_all_parameters():
  norm = global_norm({"a": jnp.array([9.0, 0.0]), "b": jnp.array([[16.0]])})
  assert float(norm) == 5.0
  np.testing.assert_allclose(clip_factor(norm, 1.0), 0.2, rtol=1e-6)
  for max_norm in (5.0, 100.0, None):
    assert clip_factor(norm, max_norm) == 1.0
  assert clip_factor(jnp.float32(0.0), 1.0) == 1.0


@pytest.mark.parametrize("norm", [jnp.inf, jnp.nan])
def test_clipping_never_hides_a_gradient_that_is_not_finite(norm):
  assert np.isnan(clip_factor(jnp.float32(norm), 1.0))


@pytest.mark.parametrize(
  ("settings", "message"),
  [
    ({"peak_lr": 0.0}, "peak_lr 0.0 must be positive"),
    ({"peak_lr": float("nan")}, "peak_lr nan must be positive"),
    ({"warmup_steps": -1}, "warmup_steps -1 must not be negative"),
    ({"b2": 1.0}, "b2 1.0 must be at least 0 and below 1"),
    ({"clip_norm": 0.0}, "clip_norm 0.0 must be positive; None"),
    ({"moment_dtype": "float16"}, "'float16' is none of"),
    ({"moment_dtype": "bfloat16", "b2": 0.999}, "b2 0.999 is above 0.9961.*never falls"),
  ],
)
def test_a_setting_that_cannot_work_is_refused(settings, message):
  with pytest.raises(ValueError, match=message):
    AdamW(**{"peak_lr": 1e-3, "warmup_steps": 0, **settings})


def test_a_schedule_longer_than_the_run_is_refused():
  config = AdamW(peak_lr=1e-3, warmup_steps=11)
  with pytest.raises(ValueError, match="warmup_steps 11 is more than total_steps 10"):
    config.build(total_steps=10, decay_mask={})
  config = AdamW(peak_lr=1e-3, warmup_steps=6, schedule=WarmupStableDecay(decay_fraction=0.5))
  with pytest.raises(ValueError, match=r"warmup_steps 6 and a decay of 5 steps .* total_steps 10"):
    config.build(total_steps=10, decay_mask={})
  with pytest.raises(ValueError, match=r"decay_fraction 0\.0 must be above 0"):
    WarmupStableDecay(decay_fraction=0.0)
  with pytest.raises(ValueError, match=r"final_fraction 1\.5 is not between"):
    Cosine(final_fraction=1.5)
