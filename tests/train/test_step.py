"""The training step: microbatches, meshes, and what a step that is not finite leaves alone."""

import dataclasses
import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from data.rows import Batch
from models import decoder
from sharding.mesh import MeshShape, make_mesh, row_share
from tests import tiny
from tests.tolerances import assert_close
from train import bad_steps
from train import program as programs
from train.step import NO_LIMITS, Limits


def _batch(run, seed=0):
  """Rows whose numbers of targets differ widely: microbatch means would be wrong."""
  rng = np.random.default_rng(seed)
  shape = (run.batch_size, run.data.row_length)
  segments = 1 + np.cumsum(rng.random(shape) < 0.2, axis=1).astype(np.int32)
  weights = (rng.random(shape) < np.linspace(0.05, 1.0, shape[0])[:, None]).astype(np.float32)
  tokens = rng.integers(0, 256, (shape[0], shape[1] + 1)).astype(np.int32)
  return Batch(tokens[:, :-1], tokens[:, 1:], segments, weights)


@functools.cache
def _compiled(run, num_devices):
  """The run's program on the first devices, its training step, and its first state as numpy."""
  program = programs.build(run, devices=jax.devices()[:num_devices])
  state = jax.tree.map(np.asarray, programs.initialize(program))
  return program, programs.lower_train_step(program).compile(), state


def _after(
  run, *, num_devices, num_steps=1, change=lambda state: state, batch=None, limits=NO_LIMITS
):
  """State and metrics after some steps of `run` on the first devices, as numpy."""
  program, step, start = _compiled(run, num_devices)
  # Put there as a copy: the step is given its state for good.
  state = jax.device_put(jax.tree.map(np.copy, change(start)), program.shardings)
  for seed in range(num_steps):
    rows = programs.to_devices(_batch(run, seed) if batch is None else batch, program.mesh)
    state, metrics = step(state, rows, limits)
  return jax.tree.map(np.asarray, (state, metrics))


@pytest.fixture(scope="module")
def on_one_device(tmp_path_factory):
  # Without decay, so that a batch without targets changes nothing.
  run = tiny.run(
    tmp_path_factory.mktemp("one"),
    optimizer=tiny.AdamW(peak_lr=1e-2, warmup_steps=2, weight_decay=0.0),
  )
  return run, *_after(run, num_devices=1)


def test_microbatches_are_one_batch(on_one_device):
  run, whole, whole_metrics = on_one_device
  parts, parts_metrics = _after(dataclasses.replace(run, num_microbatches=4), num_devices=1)
  _assert_same_step(parts, parts_metrics, whole, whole_metrics)
  assert whole_metrics.weight == _batch(run).weights_BT.sum()


def _assert_same_step(state, metrics, expected_state, expected_metrics):
  """Losses, norms and, by Adam's first moment, gradients: an update scales every entry to 1."""
  for name in ("loss", "z_loss", "weight", "grad_norm"):
    pair = (getattr(metrics, name), getattr(expected_metrics, name))
    assert_close(*pair, dtype="float32", reduction=128)
  jax.tree.map(
    lambda a, b: assert_close(a, b, dtype="float32", reduction=1024, floor=0.01),
    state.opt_state.mu,
    expected_state.opt_state.mu,
  )


def test_steps_are_those_of_optax_on_the_mean_of_all_targets(tmp_path):
  """Two clipped steps of AdamW, from plain logits and no sum divided by anything but targets."""
  optimizer = tiny.AdamW(peak_lr=1e-2, warmup_steps=2, clip_norm=0.05, eps=1e-3)
  run = tiny.run(tmp_path, optimizer=optimizer, z_loss=1e-2)
  model = decoder.build(run.model)

  def objective(params, batch):
    logits_BTV = model.logits(params, batch.tokens_BT, batch.segments_BT)
    log_z_BT = jax.nn.logsumexp(logits_BTV, axis=-1)
    target_BT = jnp.take_along_axis(logits_BTV, batch.targets_BT[..., None], axis=-1)[..., 0]
    mean = functools.partial(jnp.average, weights=batch.weights_BT)
    loss, square = mean(log_z_BT - target_BT), mean(log_z_BT**2)
    return loss + run.z_loss * square, (loss, square)

  rate = functools.partial(optimizer.learning_rate, total_steps=run.total_steps)
  of_optax = optax.chain(
    optax.clip_by_global_norm(optimizer.clip_norm),
    optax.adamw(
      lambda count: rate(count + 1),
      **{name: getattr(optimizer, name) for name in ("b1", "b2", "eps", "weight_decay")},
      mask=model.decays,
    ),
  )

  @jax.jit
  def step(params, moments, batch):
    grads, losses = jax.grad(objective, has_aux=True)(params, batch)
    norm = jnp.sqrt(sum(jnp.sum(g**2) for g in jax.tree.leaves(grads)))
    updates, moments = of_optax.update(grads, moments, params)
    return optax.apply_updates(params, updates), moments, (*losses, norm)

  start = _compiled(run, 1)[2].params
  params, moments, _ = step(start, of_optax.init(start), _batch(run, 0))
  params, moments, expected = step(params, moments, _batch(run, 1))
  assert expected[-1] > 2 * optimizer.clip_norm

  state, metrics = _after(run, num_devices=1, num_steps=2)
  told = (metrics.loss, metrics.z_loss, metrics.grad_norm)
  np.testing.assert_allclose(told, expected, rtol=1e-5)
  adam = moments[1][0]
  for ours, theirs in ((state.opt_state.mu, adam.mu), (state.opt_state.nu, adam.nu)):
    jax.tree.map(lambda a, b: assert_close(a, b, dtype="float32", reduction=1024), ours, theirs)
  changes = (jax.tree.map(np.subtract, tree, start) for tree in (state.params, params))
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-6), *changes)


MESHES = [
  (MeshShape(data=2, fsdp=2, tensor=2), 1, 2),
  # Shards of 4 tokens: the window of 5 reaches over two borders.
  (MeshShape(fsdp=2, sequence=4), 3, 2),
  (MeshShape(fsdp=8), 3, 1),
]


@pytest.mark.parametrize(("mesh", "zero_stage", "num_microbatches"), MESHES, ids=str)
def test_a_sharded_step_is_that_of_one_device(on_one_device, mesh, zero_stage, num_microbatches):
  run, one, one_metrics = on_one_device
  sharded = dataclasses.replace(
    run, mesh=mesh, zero_stage=zero_stage, num_microbatches=num_microbatches
  )
  (many, many_metrics) = _after(sharded, num_devices=8)
  _assert_same_step(many, many_metrics, one, one_metrics)


def _assert_unchanged(after, before):
  assert after.step == before.step + 1
  jax.tree.map(np.testing.assert_array_equal, after.params, before.params)
  jax.tree.map(np.testing.assert_array_equal, after.opt_state, before.opt_state)


def test_a_step_that_is_not_finite_changes_nothing_and_is_named(on_one_device):
  run, _, _ = on_one_device

  def poison(state):
    poisoned = jax.tree.map(np.copy, state)
    poisoned.params["groups"]["0"]["mlp"]["w_up_D2F"][0, 1, 3] = np.inf
    return poisoned

  after, metrics = _after(run, num_devices=1, change=poison)
  assert not metrics.is_applied
  _assert_unchanged(after, poison(_compiled(run, 1)[2]))
  named = bad_steps.bad_tensors(metrics.square_norms, limit=99)
  assert any("groups/0/mlp" in name for name in named)


@pytest.mark.parametrize("limited", Limits._fields)
def test_a_step_above_a_limit_changes_nothing_and_one_at_it_everything(on_one_device, limited):
  run, whole, metrics = on_one_device
  value = getattr(metrics, limited)
  at = NO_LIMITS._replace(**{limited: value})
  below = NO_LIMITS._replace(**{limited: np.nextafter(value, np.float32(0))})
  state, told = _after(run, num_devices=1, limits=at)
  assert told.is_applied
  jax.tree.map(np.testing.assert_array_equal, state, whole)
  state, told = _after(run, num_devices=1, limits=below)
  assert not told.is_applied
  assert getattr(told, limited) == value
  _assert_unchanged(state, _compiled(run, 1)[2])


def test_a_batch_of_padding_teaches_nothing(on_one_device):
  run, _, _ = on_one_device
  empty = jax.tree.map(np.zeros_like, _batch(run))
  state, metrics = _after(run, num_devices=1, batch=empty)
  assert metrics.is_applied
  assert metrics.loss == metrics.weight == metrics.grad_norm == 0
  jax.tree.map(np.testing.assert_array_equal, state.params, _compiled(run, 1)[2].params)


def test_bfloat16_parameters_and_moments_stay_so(tmp_path):
  run = tiny.run(
    tmp_path,
    optimizer=tiny.AdamW(peak_lr=1e-2, warmup_steps=2, moment_dtype="bfloat16"),
  )
  run = dataclasses.replace(
    run, model=dataclasses.replace(run.model, dtype="bfloat16", param_dtype="bfloat16")
  )
  state, metrics = _after(run, num_devices=1, num_steps=2)
  assert metrics.is_applied
  block = state.params["groups"]["0"]
  assert block["mlp"]["w_up_D2F"].dtype == jnp.bfloat16
  assert block["mixer"]["decay_R"].dtype == jnp.float32
  assert {leaf.dtype for leaf in jax.tree.leaves(state.opt_state.mu)} == {jnp.dtype(jnp.bfloat16)}


def test_meshes_that_do_not_fit_are_refused(tmp_path):
  run = tiny.run(tmp_path)
  with pytest.raises(ValueError, match=r"tensor degree 4 does not divide num_heads 2.*work: 1, 2"):
    programs.build(dataclasses.replace(run, mesh=MeshShape(data=2, tensor=4)))
  # Every block counts, not only the last of its kind.
  first, *others = run.model.pattern
  narrow = dataclasses.replace(first, mlp=dataclasses.replace(first.mlp, mlp_width=47))
  model = dataclasses.replace(run.model, pattern=(first, narrow, *others[1:]))
  with pytest.raises(ValueError, match=r"divide pattern\[1\]\.mlp\.mlp_width 47; .* work: 1$"):
    programs.build(dataclasses.replace(run, model=model, mesh=MeshShape(data=4, tensor=2)))
  with pytest.raises(ValueError, match=r"4 rows of a microbatch .* not divisible by the 8 devices"):
    programs.build(dataclasses.replace(run, mesh=MeshShape(fsdp=8), num_microbatches=2))
  with pytest.raises(ValueError, match=r"16 over the 8 devices.* leaves 2 tokens to each, fewer"):
    programs.build(dataclasses.replace(run, mesh=MeshShape(sequence=8)))
  # Blocks that the model ends before do not.
  recurrent, *_, attention = run.model.pattern
  model = dataclasses.replace(run.model, num_blocks=1, pattern=(attention, recurrent))
  programs.build(dataclasses.replace(run, model=model, mesh=MeshShape(sequence=8)))
  data = dataclasses.replace(run.data, row_length=18)
  with pytest.raises(ValueError, match=r"row_length 18 is not divisible by the 4 devices of"):
    programs.build(dataclasses.replace(run, data=data, mesh=MeshShape(data=2, sequence=4)))


@pytest.mark.parametrize(
  "mesh_shape", [MeshShape(fsdp=2, sequence=4), MeshShape(data=4, sequence=2)]
)
@pytest.mark.parametrize("devices_each", [1, 2, 4, 8])
def test_processes_together_give_the_global_batch(mesh_shape, devices_each):
  """Each process makes its part from its own rows alone, as the loader distributes them. The test
  needs no other process: the sharding says what a device holds, the numbers say whose rows."""
  mesh = make_mesh(mesh_shape)
  owned = np.vectorize(lambda d: types.SimpleNamespace(process_index=d.id // devices_each))
  global_BT = np.arange(8 * 12).reshape(8, 12)
  layout = programs.batch_sharding(mesh).devices_indices_map(global_BT.shape)
  for device, index in layout.items():
    share = row_share(owned(mesh.devices), device.id // devices_each)
    rows_each = len(global_BT) // share.count
    mine_BT = global_BT[share.index * rows_each : (share.index + 1) * rows_each]
    np.testing.assert_array_equal(programs.local_part(mine_BT, share, index), global_BT[index])
