"""`--config=FILE:ARG --config.some.field=value`: what is set, and one line for what cannot be."""

import dataclasses

import pytest

from launch import overrides
from sharding.mesh import MeshShape
from tests import tiny
from train.config import flatten


def _refused(commands, tmp_path, *arguments: str) -> str:
  """The one line with which launch.train refuses the arguments."""
  config = [f"--config=tests/tiny_config.py:{tmp_path}"]
  if any(argument.startswith("--config=") for argument in arguments):
    config = []
  arguments = [*config, f"--workdir={tmp_path / 'run'}", *arguments]
  status, output = commands.run("launch.train", arguments, tmp_path / "output")
  assert status == 2, output
  (line,) = output.strip().splitlines()
  assert line.startswith("error: ")
  assert not (tmp_path / "run").exists()
  return line


def test_a_misspelt_field_is_refused_with_a_suggestion(commands, tmp_path):
  line = _refused(commands, tmp_path, "--config.optimizer.peak_rl=1e-3")
  assert "--config.optimizer.peak_rl=1e-3" in line
  assert "no such field" in line
  assert "peak_lr" in line


@pytest.mark.parametrize(
  ("argument", "words"),
  [
    ("--config.batch_size=many", ["many"]),
    ("--config.batch_size=1.5", ["1.5"]),
    ("--config.batch_size=0", ["batch_size 0", "at least 1"]),
    ("--config.model.pattern[0].mixer.rnn_width=33", ["rnn_width 33", "num_gate_blocks 16"]),
    ("--config.mesh.tensor=0", ["tensor 0", "at least 1"]),
    ("--config.model.remat=some", ["remat 'some'", "matmuls"]),
    ("--config.xla_flags.set=xla_a=1,fast", ["'fast' of set", "xla_NAME=VALUE"]),
    ("--config=tests/no_such_file.py", ["no file", "tests/no_such_file.py"]),
    ("--config=tests/tolerances.py", ["no function get_config"]),
    ("--config=configs/griffin.py:2b", ["size '2b'", "14b"]),
    ("steps=3", ["steps=3", "is not a flag"]),
  ],
)
def test_what_cannot_be_set_is_one_line_that_names_it(commands, tmp_path, argument, words):
  line = _refused(commands, tmp_path, argument)
  for word in words:
    assert word in line, line


def test_without_a_config_nothing_runs(commands, tmp_path):
  status, output = commands.run("launch.train", ["--workdir=nowhere"], tmp_path / "output")
  assert status == 2
  assert "must be given once" in output


def test_a_run_survives_the_way_through_flags(tmp_path):
  run = tiny.run(tmp_path, mesh=MeshShape(fsdp=2))
  assert overrides.rebuild(run, overrides.to_config_dict(run)) == run
  assert overrides.difference(run, run) == {}


def test_changed_fields_are_found_and_named_as_they_are_set(tmp_path):
  run = tiny.run(tmp_path)
  config = overrides.to_config_dict(run)
  config.batch_size = 4
  config.optimizer.clip_norm = None
  config.model.pattern[0].mixer.scan = "chunked"
  config.checkpoint.keep_permanent = 7
  changed = overrides.rebuild(run, config)
  assert changed.optimizer.clip_norm is None
  assert overrides.difference(run, changed) == {
    "batch_size": (8, 4),
    "optimizer.clip_norm": (1.0, None),
    "model.pattern[0].mixer.scan": ("auto", "chunked"),
    "checkpoint.keep_permanent": (None, 7),
  }
  # Whatever a config checks about itself is checked again with the new values.
  config.num_microbatches = 3
  with pytest.raises(ValueError, match="batch_size 4 is not divisible by num_microbatches 3"):
    overrides.rebuild(run, config)


def test_every_field_of_a_run_can_be_named():
  run = overrides.load("configs/griffin.py:1b")
  flat = flatten(run)
  assert flat["model.pattern[2].mixer.window"] == 1024
  assert flat["optimizer.schedule.final_fraction"] == 0.1
  assert flat["mesh.fsdp"] == -1
  names = {field.name for field in dataclasses.fields(run)}
  assert {path.split(".")[0].split("[")[0] for path in flat} == names
