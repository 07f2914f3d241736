"""A run that commit 5ac03c1 began goes on with today's code, to the losses that commit computed."""

import dataclasses
import json
import logging
import pathlib
import tarfile

import pytest

from tests.golden import make_old_run
from train import loop
from train.checkpoint.storage import steps

_FILE = pathlib.Path(make_old_run.__file__).parent / "old_run.tar.xz"


@pytest.fixture
def folder(tmp_path):
  with tarfile.open(_FILE) as tar:
    tar.extractall(tmp_path, filter="data")
  return tmp_path


def test_a_run_of_an_older_commit_goes_on_as_if_nothing_had_changed(folder, caplog):
  """If this fails, today's code reads old checkpoints differently, or computes another model. Do
  not make the golden file again: existing runs are like it."""
  run = make_old_run.run(folder)
  assert steps(folder / "run/checkpoints") == [make_old_run.SAVED]
  with caplog.at_level(logging.INFO, logger="absl"):
    assert loop.fit(run, folder / "run") == "complete"
  assert "restored step 2" in caplog.text
  changes = [line for line in caplog.messages if line.startswith("changed since the checkpoint")]
  assert [line.split()[4] for line in changes] == ["data.eval_source:"]  # where it lies
  wanted = json.loads((folder / "losses.json").read_text())
  # On the machine that made the file they are equal; another CPU may round the last bits otherwise.
  assert make_old_run.losses(folder / "run") == pytest.approx(wanted, rel=1e-6)


def test_a_run_of_an_older_commit_refuses_another_model_by_name(folder):
  run = make_old_run.run(folder)
  other = dataclasses.replace(run, model=dataclasses.replace(run.model, logit_cap=30.0))
  with pytest.raises(ValueError, match=r"model\.logit_cap is None in the checkpoint, 30\.0 now"):
    loop.fit(other, folder / "run")
