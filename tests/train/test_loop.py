"""`fit`: a run that resumes is the run that did not stop."""

import dataclasses
import json
import shutil
import time

import jax
import numpy as np
import pytest

from data import pipeline
from data.pipeline import DataConfig
from models.flops import flops_per_token
from sharding import topology
from sharding.mesh import MeshShape
from tests import tiny
from tests.tolerances import assert_close
from train import loop
from train import program as programs
from train.bad_steps import BadStepError, BadStepPolicy
from train.checkpoint.storage import steps
from train.job.peers import Peers
from train.workdir.jsonl import read_jsonl

ONE = MeshShape(fsdp=8)


@pytest.fixture(scope="module", autouse=True)
def _compiled_once():
  """A program that a test before has compiled is not compiled again, and none is optimised."""
  compiled = {}

  def once(program, lowered):
    text = lowered.as_text()
    if text not in compiled:
      compiled[text] = lowered.compile()
    return compiled[text]

  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(programs, "compile_step", once)
    yield


def _run(folder, **changes):
  """tiny.run with one block: the loop does not depend on what blocks compute."""
  run = tiny.run(folder, **{"mesh": ONE, **changes})
  return dataclasses.replace(run, model=dataclasses.replace(run.model, num_blocks=1))


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
  """A run that nothing happened to, and its workdir."""
  folder = tmp_path_factory.mktemp("loop")
  run = _run(folder)
  assert loop.fit(run, folder / "straight") == "complete"
  return run, folder / "straight"


def _losses(workdir):
  records = read_jsonl(workdir / "metrics.jsonl")
  return {r["step"]: r["train/loss"] for r in records if "train/loss" in r}


def _stop_after(monkeypatch, step):
  """Makes the loop believe that a signal came once `step` steps were dispatched."""
  original = loop.Checkpoints.due

  def due(self, now):
    if now == step:
      peers.ask_to_stop("SIGTERM")
    return original(self, now)

  peers = Peers.alone()
  monkeypatch.setattr(loop.Checkpoints, "due", due)
  monkeypatch.setattr(loop.Peers, "alone", lambda: peers)


def test_a_resumed_run_is_bitwise_the_undisturbed_one(straight, tmp_path, monkeypatch):
  run, undisturbed = straight
  with monkeypatch.context() as patch:
    _stop_after(patch, 5)
    assert loop.fit(run, tmp_path) == "stopped"
  assert max(_losses(tmp_path)) == 5
  assert loop.fit(run, tmp_path) == "complete"
  assert _losses(tmp_path) == _losses(undisturbed)
  assert len(_losses(undisturbed)) == 8
  assert (tmp_path / "loss.png").stat().st_size > 1000
  evals = [r for r in read_jsonl(tmp_path / "metrics.jsonl") if "eval/loss" in r]
  assert [r["step"] for r in evals] == [4, 8]
  assert evals[-1]["eval/bits_per_byte"] == pytest.approx(
    evals[-1]["eval/loss"] / np.log(2) / pipeline.bytes_per_target(run.data)
  )
  # Once more: there is nothing left to do.
  before = (tmp_path / "metrics.jsonl").read_bytes()
  assert loop.fit(run, tmp_path) == "complete"
  assert (tmp_path / "metrics.jsonl").read_bytes() == before


def test_rates_of_a_line_are_those_of_all_tokens_and_all_chips(tmp_path, monkeypatch):
  chip = topology.chip_named("v5e")
  monkeypatch.setattr(topology, "chip_of", lambda device_kind: chip)
  run = _run(tmp_path, total_steps=3)
  loop.fit(run, tmp_path / "run")
  flops = flops_per_token(run.model, run.data.row_length).train
  lines = [r for r in read_jsonl(tmp_path / "run" / "metrics.jsonl") if "train/loss" in r]
  assert len(lines) == 3
  for line in lines:
    speed = line["train/tokens_per_second"]
    assert speed * line["train/step_seconds"] == pytest.approx(8 * 16)
    assert line["train/mfu"] == pytest.approx(flops * speed / (8 * chip.peak_flops))


def test_the_seed_decides_the_first_parameters(tmp_path):
  tables = [
    programs.initialize(programs.build(_run(tmp_path, seed=seed))).params["embedding"]["table_VD"]
    for seed in (0, 1)
  ]
  assert not np.array_equal(*tables)


def test_each_line_has_the_time_of_its_own_steps_where_steps_run_as_they_are_dispatched(
  tmp_path, monkeypatch
):
  compile_step = programs.compile_step

  def slowly(program, lowered):
    compiled = compile_step(program, lowered)

    def step(*arguments):
      time.sleep(0.05)
      return jax.block_until_ready(compiled(*arguments))

    return step

  monkeypatch.setattr(programs, "compile_step", slowly)
  # Steps before and after an evaluation and a save, and the last.
  loop.fit(_run(tmp_path, total_steps=6), tmp_path / "run")
  records = read_jsonl(tmp_path / "run" / "metrics.jsonl")
  seconds = [r["train/step_seconds"] for r in records if "train/step_seconds" in r]
  assert len(seconds) == 6
  assert min(seconds) > 0.05


def test_another_mesh_and_zero_stage_go_on_with_the_same_batches(straight, tmp_path):
  run, undisturbed = straight
  shutil.copytree(undisturbed, tmp_path / "run")
  for step in steps(tmp_path / "run" / "checkpoints")[1:]:
    shutil.rmtree(tmp_path / "run" / "checkpoints" / f"{step:08d}")
  other = dataclasses.replace(
    run, mesh=MeshShape(data=2, fsdp=2, tensor=2), zero_stage=1, num_microbatches=2
  )
  assert loop.fit(other, tmp_path / "run") == "complete"
  actual, expected = _losses(tmp_path / "run"), _losses(undisturbed)
  assert actual.keys() == expected.keys()
  assert actual != expected  # it was another program
  for step, loss in expected.items():
    assert_close(actual[step], loss, dtype="float32", reduction=1024)


def test_what_may_not_change_is_refused_by_name(straight):
  run, workdir = straight
  changes = {
    "seed": dataclasses.replace(run, seed=3),
    "batch_size": dataclasses.replace(run, batch_size=16),
    "data.row_length": dataclasses.replace(run, data=dataclasses.replace(run.data, row_length=24)),
    "model.logit_cap": dataclasses.replace(
      run, model=dataclasses.replace(run.model, logit_cap=5.0)
    ),
  }
  for name, changed in changes.items():
    with pytest.raises(ValueError, match=name):
      loop.fit(changed, workdir)


def test_a_run_ends_where_its_data_ends(tmp_path):
  small = tiny.store(tmp_path / "small", documents=4)
  data = DataConfig(sources=((small, 1.0),), row_length=16, at_end="stop")
  available = pipeline.num_steps_available(data, batch_size=8)
  run = _run(tmp_path, data=data, total_steps=available + 5)
  workdir = tmp_path / "run"
  assert loop.fit(run, workdir) == "complete"
  assert max(_losses(workdir)) == available > 6
  # A batch that is passed over is missing at the end; the learning rates stay those of their steps.
  records = read_jsonl(workdir / "metrics.jsonl")
  rates = {record["step"]: record["train/learning_rate"] for record in records}
  note = {"step": 5, "checkpoint": 3, "batches": [4], "why": "its loss was not finite"}
  (workdir / "passed_over.json").write_text(json.dumps({"rollbacks": [note]}))
  with pytest.raises(ValueError, match=rf"passed_over.json .*\[4\], .*step {available} has"):
    loop.fit(run, workdir)
  for step in steps(workdir / "checkpoints")[1:]:
    shutil.rmtree(workdir / "checkpoints" / f"{step:08d}")
  assert loop.fit(run, workdir) == "complete"
  records = read_jsonl(workdir / "metrics.jsonl")
  assert [record["step"] for record in records] == list(range(1, available))
  assert all(record["train/learning_rate"] == rates[record["step"]] for record in records)


def test_a_vocabulary_larger_than_the_models_is_refused(tmp_path):
  run = _run(tmp_path)
  small = dataclasses.replace(run, model=dataclasses.replace(run.model, vocab_size=128))
  with pytest.raises(ValueError, match=r"vocabulary of 256 ids .* model has 128"):
    loop.fit(small, tmp_path / "run")


@pytest.mark.parametrize("action", ["stop", "skip", "rollback"])
def test_steps_that_are_not_finite_stop_the_run_in_the_end(tmp_path, action):
  # A learning rate that throws the parameters to infinity in the first step.
  run = _run(
    tmp_path,
    optimizer=tiny.AdamW(peak_lr=1e38, warmup_steps=0),
    checkpoint=tiny.CheckpointConfig(every_steps=1),
    bad_steps=BadStepPolicy(non_finite=action, max_skipped=2, max_rollbacks=2),
  )
  with pytest.raises(BadStepError, match=r"not finite.*Rows: .* of source 0"):
    loop.fit(run, tmp_path / "run")
  reports = sorted((tmp_path / "run" / "bad_steps").iterdir())
  assert len(reports) == (1 if action == "stop" else 3)
  report = json.loads(reports[0].read_text())
  assert report["tensors"]
  # The rows can be read again, as they were in the batch.
  rows = [pipeline.RowAddress(**row) for row in report["rows"]]
  again = pipeline.read_rows(run.data, rows)
  with pipeline.train_batches(run.data, batch_size=8, start_step=report["batch"]) as batches:
    np.testing.assert_array_equal(again.tokens_BT, next(batches).tokens_BT)
  if action != "skip":
    assert max(steps(tmp_path / "run" / "checkpoints")) == report["step"] - 1
  if action == "rollback":
    rollbacks = json.loads((tmp_path / "run" / "passed_over.json").read_text())["rollbacks"]
    assert [note["batches"] for note in rollbacks] == [[1], [2]]


def test_a_held_out_store_of_another_vocabulary_is_refused(tmp_path):
  base = _run(tmp_path)
  missing = DataConfig(sources=((str(tmp_path / "nowhere"), 1.0),), row_length=16)
  with pytest.raises((ValueError, OSError), match="nowhere"):
    loop.fit(dataclasses.replace(base, data=missing), tmp_path / "run")
