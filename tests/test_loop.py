"""`fit`: a run that resumes is the run that did not stop."""

import dataclasses
import json

import numpy as np
import pytest

from data import pipeline
from data.pipeline import DataConfig
from sharding.mesh import MeshShape
from tests import tiny
from tests.tolerances import assert_close
from train import faults, loop
from train.jsonl import read_jsonl
from train.peers import Peers

ONE = MeshShape(fsdp=8)


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


def test_a_resumed_run_is_bitwise_the_undisturbed_one(tmp_path, monkeypatch):
  run = tiny.run(tmp_path, mesh=ONE)
  assert loop.fit(run, tmp_path / "straight") == "complete"
  with monkeypatch.context() as patch:
    _stop_after(patch, 5)
    assert loop.fit(run, tmp_path / "stopped") == "stopped"
  assert max(_losses(tmp_path / "stopped")) == 5
  assert loop.fit(run, tmp_path / "stopped") == "complete"
  assert _losses(tmp_path / "stopped") == _losses(tmp_path / "straight")
  assert len(_losses(tmp_path / "straight")) == 8
  assert (tmp_path / "stopped" / "loss.png").stat().st_size > 1000
  evals = [r for r in read_jsonl(tmp_path / "stopped" / "metrics.jsonl") if "eval/loss" in r]
  assert [r["step"] for r in evals] == [4, 8]
  assert evals[-1]["eval/bits_per_byte"] == pytest.approx(
    evals[-1]["eval/loss"] / np.log(2) / pipeline.bytes_per_target(run.data)
  )
  # Once more: there is nothing left to do.
  before = (tmp_path / "stopped" / "metrics.jsonl").read_bytes()
  assert loop.fit(run, tmp_path / "stopped") == "complete"
  assert (tmp_path / "stopped" / "metrics.jsonl").read_bytes() == before


def test_another_mesh_and_zero_stage_go_on_with_the_same_batches(tmp_path, monkeypatch):
  run = tiny.run(tmp_path, mesh=ONE)
  with monkeypatch.context() as patch:
    _stop_after(patch, 4)
    loop.fit(run, tmp_path / "run")
  loop.fit(run, tmp_path / "straight")
  other = dataclasses.replace(
    run, mesh=MeshShape(data=2, fsdp=2, tensor=2), zero_stage=1, num_microbatches=2
  )
  assert loop.fit(other, tmp_path / "run") == "complete"
  actual, expected = _losses(tmp_path / "run"), _losses(tmp_path / "straight")
  assert actual.keys() == expected.keys()
  for step, loss in expected.items():
    assert_close(actual[step], loss, dtype="float32", reduction=1024)


def test_what_may_not_change_is_refused_by_name(tmp_path):
  run = tiny.run(tmp_path, mesh=ONE, total_steps=2, eval_every=2)
  loop.fit(run, tmp_path / "run")
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
      loop.fit(changed, tmp_path / "run")


def test_a_run_ends_where_its_data_ends(tmp_path):
  base = tiny.run(tmp_path, mesh=ONE)
  data = dataclasses.replace(base.data, at_end="stop")
  available = pipeline.num_steps_available(data, batch_size=8)
  run = dataclasses.replace(base, data=data, total_steps=available + 5)
  assert loop.fit(run, tmp_path / "run") == "complete"
  assert max(_losses(tmp_path / "run")) == available


def test_a_vocabulary_larger_than_the_models_is_refused(tmp_path):
  run = tiny.run(tmp_path, mesh=ONE)
  small = dataclasses.replace(run, model=dataclasses.replace(run.model, vocab_size=128))
  with pytest.raises(ValueError, match=r"vocabulary of 256 ids .* model has 128"):
    loop.fit(small, tmp_path / "run")


@pytest.mark.parametrize("action", ["stop", "skip"])
def test_steps_that_are_not_finite_stop_the_run_or_are_skipped(tmp_path, action):
  # A learning rate that throws the parameters to infinity in the first step.
  run = tiny.run(
    tmp_path,
    mesh=ONE,
    optimizer=tiny.AdamW(peak_lr=1e38, warmup_steps=0),
    checkpoint=tiny.CheckpointConfig(every_steps=1),
    non_finite=faults.NonFinitePolicy(action=action, max_skipped=2),
  )
  with pytest.raises(faults.NonFiniteError, match=r"not finite.*Rows: .* of source 0"):
    loop.fit(run, tmp_path / "run")
  reports = sorted((tmp_path / "run" / "bad_steps").iterdir())
  assert len(reports) == (1 if action == "stop" else 3)
  report = json.loads(reports[0].read_text())
  assert report["tensors"]
  # The rows can be read again, as they were in the batch.
  rows = [pipeline.RowAddress(**row) for row in report["rows"]]
  again = pipeline.read_rows(run.data, rows)
  with pipeline.train_batches(run.data, batch_size=8, start_step=report["step"] - 1) as batches:
    np.testing.assert_array_equal(again.tokens_BT, next(batches).tokens_BT)
  if action == "stop":
    steps = [
      int(path.name) for path in (tmp_path / "run" / "checkpoints").iterdir() if path.name.isdigit()
    ]
    assert max(steps) == report["step"] - 1


def test_a_held_out_store_of_another_vocabulary_is_refused(tmp_path):
  base = tiny.run(tmp_path, mesh=ONE)
  missing = DataConfig(sources=((str(tmp_path / "nowhere"), 1.0),), row_length=16)
  with pytest.raises((ValueError, OSError), match="nowhere"):
    loop.fit(dataclasses.replace(base, data=missing), tmp_path / "run")
