"""Statistics of layers are right, on any mesh and for any family."""

import dataclasses
import functools
import json
import math
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from data import pipeline
from models.hawk import hawk
from models.layers import rg_lru
from models.layers.rg_lru_statistics import STATISTICS, statistics
from models.stacks import split_blocks
from models.statistics import QUANTILES, of_json
from models.transformer import mqa_transformer
from sharding.mesh import MeshShape
from tests import tiny
from tests.tolerances import assert_close
from train import program as programs
from train.layer_statistics import LAYER_FIELDS, StatisticsConfig, by_layer, declared
from train.optimizer import AdamW, apply_updates
from train.telemetry.goodput import KINDS

_RECURRENT = {column.name for column in STATISTICS.columns}


def _random(tree, seed):
  """Positive numbers in the shapes of the tree."""
  rng = np.random.default_rng(seed)
  return jax.tree.map(lambda x: np.abs(rng.normal(size=np.shape(x))).astype(np.float32), tree)


def _columns(program, state, batch, square_norms):
  """The statistics that a program computes for `state`, in the program's layout."""
  step = programs.compile_step(program, programs.lower_statistics_step(program))
  values = step(
    jax.device_put(state, program.shardings),
    programs.to_devices(batch, program.mesh),
    *jax.device_put((square_norms, jnp.float32(3.0)), NamedSharding(program.mesh, PartitionSpec())),
  )
  return by_layer(program.run.model, jax.device_get(values))


@pytest.fixture(scope="module")
def griffin(tmp_path_factory):
  """A run of blocks R R A R in two microbatches, a state, a batch, and their statistics."""
  run = tiny.run(tmp_path_factory.mktemp("statistics"), num_microbatches=2)
  run = dataclasses.replace(run, model=dataclasses.replace(run.model, unembedding="own"))
  with pipeline.train_batches(run.data, batch_size=8, start_step=0) as batches:
    batch = next(batches)
  program = programs.build(run, devices=jax.devices()[:1])
  state = jax.device_get(programs.initialize(program))
  moments = state.opt_state._replace(
    count=np.int32(3), mu=_random(state.params, 1), nu=_random(state.params, 2)
  )
  state = state._replace(opt_state=moments)
  square_norms = _random(
    jax.tree.map(
      lambda w, axes: np.empty(w.shape[: axes.count("layers")]), state.params, program.model.axes
    ),
    3,
  )
  return program, state, batch, square_norms, _columns(program, state, batch, square_norms)


def test_norms_are_those_of_each_blocks_arrays(griffin):
  program, state, _, square_norms, columns = griffin
  config = program.run.model
  last_update = functools.partial(
    program.run.optimizer.last_update, total_steps=8, decay_mask=program.model.decays
  )
  update = jax.jit(last_update)(state.opt_state, state.params)

  def norms(tree):
    return [
      math.sqrt(sum(np.square(np.float64(leaf)).sum() for leaf in jax.tree.leaves(block)))
      for block in split_blocks(config, jax.device_get(tree))
    ]

  np.testing.assert_allclose(columns["param_norm"], norms(state.params), rtol=1e-4)
  np.testing.assert_allclose(columns["update_norm"], norms(update), rtol=1e-4)
  roots = jax.tree.map(np.sqrt, square_norms)
  np.testing.assert_allclose(columns["grad_norm"], np.divide(norms(roots), 3.0), rtol=1e-4)
  ends = {"final_norm": "scale_D", "embedding": "table_VD", "unembedding": "table_VD"}
  for end, name in ends.items():
    expected = np.linalg.norm(state.params[end][name])
    np.testing.assert_allclose(columns[end]["param_norm"], expected, rtol=1e-4)
  assert columns["mixers"] == ["rg_lru", "rg_lru", "attention", "rg_lru"]
  assert columns["horizon"][2] is None
  assert columns["output_rms"][2] > 0


def test_what_the_blocks_do_is_seen_on_the_first_microbatch(griffin):
  program, state, batch, _, columns = griffin
  rows = (batch.tokens_BT[::2], batch.segments_BT[::2])
  seen = split_blocks(program.run.model, jax.jit(program.model.observe)(state.params, *rows))
  for name in ("output_rms", "input_gate_low", "state_rms"):
    expected = [block.get(name, np.nan) for block in seen]
    np.testing.assert_allclose(np.asarray(columns[name], np.float64), expected, rtol=1e-4)


def test_horizons_are_those_of_each_layers_decay(griffin):
  program, state, _, _, columns = griffin
  for block, params in enumerate(split_blocks(program.run.model, state.params)):
    if "decay_R" not in params["mixer"]:
      continue
    rate_R = 8 * np.log1p(np.exp(np.float64(params["mixer"]["decay_R"])))
    expected = np.quantile(1 / rate_R, QUANTILES)
    np.testing.assert_allclose(columns["horizon_open"][block], expected, rtol=1e-3)
    # No gate is wide open on average.
    assert np.all(np.asarray(columns["horizon"][block]) > expected)


def test_statistics_of_the_recurrence_are_their_definitions():
  rng = np.random.default_rng(0)
  r, i, h = (rng.normal(scale=4, size=(2, 5, 6)) for _ in range(3))
  decay = rng.normal(size=6)
  seen = statistics(*map(jnp.asarray, (r, i, h, decay)))
  opened = 1 / (1 + np.exp(-r))
  log_a = -8 * np.log1p(np.exp(decay)) * opened
  # The geometric mean of the decays is what a channel is multiplied by at each token.
  horizon = -1 / np.log(np.exp(log_a.mean((0, 1))))
  np.testing.assert_allclose(seen["horizon"], np.quantile(horizon, QUANTILES), rtol=1e-4)
  for name, gate in (("recurrence_gate", opened), ("input_gate", 1 / (1 + np.exp(-i)))):
    np.testing.assert_allclose(seen[f"{name}_low"], (gate < 0.05).mean(), rtol=1e-5)
    np.testing.assert_allclose(seen[f"{name}_high"], (gate > 0.95).mean(), rtol=1e-5)
  np.testing.assert_allclose(seen["state_rms"], np.sqrt((h**2).mean()), rtol=1e-5)


def test_any_mesh_tells_the_same(griffin):
  program, state, batch, square_norms, expected = griffin
  mesh = MeshShape(fsdp=2, sequence=2, tensor=2)
  split = programs.build(dataclasses.replace(program.run, mesh=mesh))
  actual = _columns(split, state, batch, square_norms)
  assert actual.keys() == expected.keys()
  for name in (*LAYER_FIELDS, *_RECURRENT):
    for one, other in zip(actual[name], expected[name]):
      assert (one is None) == (other is None)
      if one is not None:
        # Five digits are kept, and a gate at the border of saturation may fall on either side.
        assert_close(one, other, dtype="float32", reduction=10_000, floor=1.0)


@pytest.mark.parametrize("family", ["hawk", "transformer"])
def test_every_family_tells_what_it_has(griffin, family):
  run = griffin[0].run
  sizes = {"vocab_size": 256, "width": 32, "num_blocks": 3, "mlp_width": 48, "dtype": "float32"}
  model = (
    hawk(**sizes, rnn_width=32)
    if family == "hawk"
    else mqa_transformer(**sizes, num_heads=2, head_size=16)
  )
  program = programs.build(dataclasses.replace(run, model=model), devices=jax.devices()[:1])
  shapes = programs.lower_statistics_step(program).out_info
  values = jax.tree.map(lambda x: np.ones(x.shape, np.float32), shapes)
  columns = by_layer(model, values)
  assert set(LAYER_FIELDS) <= set(columns)
  assert (set(columns) >= _RECURRENT) == (not _RECURRENT.isdisjoint(columns)) == (family == "hawk")
  assert declared(model) == ([STATISTICS] if family == "hawk" else [])
  assert all(len(columns[name]) == 3 for name in LAYER_FIELDS)


def test_the_last_update_is_what_was_added():
  optimizer = AdamW(peak_lr=0.1, warmup_steps=1, weight_decay=0.3)
  params = {"w": jnp.asarray([[1.0, -2.0]]), "b": jnp.asarray([0.5])}
  decays = {"w": True, "b": False}
  tx = optimizer.build(total_steps=10, decay_mask=decays)
  state = tx.init(params)
  for seed in range(3):
    before = params
    updates, state = tx.update(_random(params, seed), state, params)
    params = apply_updates(params, updates)
  told = optimizer.last_update(state, params, total_steps=10, decay_mask=decays)
  for name in params:
    np.testing.assert_allclose(told[name], params[name] - before[name], rtol=1e-4)


def test_every_field_is_explained():
  text = (pathlib.Path(__file__).parents[2] / "docs" / "seeing_a_run.md").read_text()
  assert not [name for name in (*LAYER_FIELDS, *_RECURRENT, *KINDS) if f"`{name}`" not in text]


def test_what_a_layer_declares_goes_through_json():
  assert of_json(json.loads(json.dumps(STATISTICS.as_json()))) == STATISTICS
  drawn = {name for picture in STATISTICS.pictures for name in picture.columns}
  assert drawn == _RECURRENT


def test_a_value_that_nothing_declares_is_refused(griffin, monkeypatch):
  monkeypatch.setattr(rg_lru, "statistics", lambda *_: {"surprise": jnp.float32(1)})
  with pytest.raises(ValueError, match="records 'surprise', which no block declares"):
    programs.lower_statistics_step(griffin[0])


def test_an_interval_that_is_none_is_refused():
  with pytest.raises(ValueError, match="every 0 must be at least 1"):
    StatisticsConfig(every=0)
