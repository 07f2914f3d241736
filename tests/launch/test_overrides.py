"""`--config=FILE:ARG --config.some.field=value`: what is set, and one line for what cannot be."""

import dataclasses
import re

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
    ("--config.total_steps=300000000000", ["total_steps 300000000000", "not tokens"]),
    ("--config.model.pattern[0].mixer.rnn_width=33", ["rnn_width 33", "num_gate_blocks 16"]),
    ("--config.mesh.tensor=0", ["tensor 0", "at least 1"]),
    ("--config.model.remat=some", ["remat 'some'", "matmuls"]),
    ("--config.optimizer=x", ["optimizer is a AdamW", "--config.optimizer.peak_lr"]),
    ("--config.batch_size=None", ["'None'"]),
    ("--config.xla_flags.set=xla_a=1,fast", ["'fast' of set", "xla_NAME=VALUE"]),
    ("--config=tests/no_such_file.py", ["no file", "tests/no_such_file.py"]),
    ("--config=tests/tolerances.py", ["no function get_config"]),
    ("--config=configs/griffin.py:2b", ["size '2b'", "14b"]),
    ("--workdir=", ["--workdir= is empty", "name a folder"]),
    ("steps=3", ["steps=3", "is not a flag"]),
  ],
)
def test_what_cannot_be_set_is_one_line_that_names_it(commands, tmp_path, argument, words):
  line = _refused(commands, tmp_path, argument)
  for word in words:
    assert word in line, line


def test_what_may_be_none_is_set_to_none(commands, tmp_path):
  status, output = commands.run(
    "launch.train",
    [
      f"--config=tests/tiny_config.py:{tmp_path}",
      f"--workdir={tmp_path / 'run'}",
      "--config.optimizer.clip_norm=None",
      "--config.checkpoint.temporary_minutes=none",
      "--config.name=None",
      "--config.model.vocab_size=5",  # and there it ends
    ],
    tmp_path / "output",
  )
  assert status == 1
  assert "override optimizer.clip_norm: 1.0 -> None" in output
  assert re.search(r"override checkpoint.temporary_minutes: \S+ -> None", output)
  assert "override name: 'tiny' -> 'None'" in output


@pytest.mark.parametrize(
  ("field", "message"),
  [
    ("checkpoint.keep=2", "no such field as keep: checkpoint has every_steps, keep_permanent"),
    ("optimiser.b1=0", "no such field as optimiser: did you mean optimizer.* a run has name"),
    ("total_steps.x=1", "no such field as x: total_steps is set as a whole"),
    ("model.pattern=()", r"model\.pattern has 3 items, .*--config\.model\.pattern\[0\] on"),
    ("data.sources[0]=x", r"data\.sources is set as a whole, \(\("),
    ("model.pattern[3].mixer.window=1", r"model\.pattern has 3 items"),
  ],
)
def test_what_is_no_field_is_refused_with_the_fields_there_are(tmp_path, field, message):
  with pytest.raises(ValueError, match=rf"--config\.{re.escape(field)}: .*{message}"):
    overrides.take_nones(tiny.run(tmp_path), [f"--config.{field}"])


def test_of_a_field_that_is_set_several_times_the_last_counts(tmp_path):
  none, some = "--config.optimizer.clip_norm=None", "--config.optimizer.clip_norm=3.0"
  other = "--config.optimizer.clip_normal=1"

  def taken(*arguments):
    return overrides.take_nones(tiny.run(tmp_path), arguments)

  assert taken(some, none) == (["optimizer.clip_norm"], [])
  assert taken(none, some) == ([], [some])
  assert taken(none, none) == (["optimizer.clip_norm"], [])
  last, window = "--config.model.pattern[-1].mixer.window", "model.pattern[2].mixer.window"
  assert taken(f"{last}=7", f"--config.{window}=None") == ([window], [])
  assert taken(f"{last}=None", f"--config.{window}=7") == ([], [f"--config.{window}=7"])
  assert taken(f"--config.{window}=7", f"{last}=None") == ([window], [])
  assert taken("--seed=1", some, none, some) == ([], ["--seed=1", some])
  with pytest.raises(ValueError, match="no such field as clip_normal"):
    taken(none, other)


def test_an_argument_that_the_config_does_not_take_is_named():
  with pytest.raises(ValueError, match=r"smoke\.py:big: get_config of configs/smoke\.py: .*argum"):
    overrides.load("configs/smoke.py:big")


@pytest.mark.parametrize(
  ("text", "message"),
  [
    ("def get_config(:\n  pass\n", r"SyntaxError: .*config\.py, line 1\)"),
    ("import no_such_module\n", r"ModuleNotFoundError: No module .*config\.py, line 1\)"),
    ("def get_config():\n  return {}['x']\n", r"KeyError: 'x' \(.*config\.py, line 2\)"),
    ("def get_config():\n  raise ValueError('width 3 is odd')\n", r"^width 3 is odd"),
    ("get_config = 3\n", r"get_config is a int, not a function"),
    ("import sys\nsys.exit(0)\n", r"SystemExit: 0 \(.*config\.py, line 2\)"),
    ("def get_config():\n  raise SystemExit\n", r"SystemExit: None \(.*config\.py, line 2\)"),
  ],
)
@pytest.mark.parametrize("name", ["get_config", "get_sweep"])
def test_a_config_that_cannot_be_run_is_one_line_with_its_place(tmp_path, text, message, name):
  path = tmp_path / "config.py"
  path.write_text(text.replace("get_config", name))
  with pytest.raises(ValueError, match=message.replace("get_config", name)):
    overrides.ask(str(path), name)


def test_numbers_that_are_none_are_refused(tmp_path):
  run = tiny.run(tmp_path)
  for name, value in {"seed": -1, "z_loss": float("nan")}.items():
    with pytest.raises(ValueError, match=f"{name} {value}"):
      dataclasses.replace(run, **{name: value})
  with pytest.raises(ValueError, match="logit_cap inf"):
    dataclasses.replace(run.model, logit_cap=float("inf"))


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
  config.model.pattern[2].mixer.implementation = "banded"
  config.checkpoint.keep_permanent = 7
  changed = overrides.rebuild(run, config)
  assert changed.optimizer.clip_norm is None
  assert overrides.difference(run, changed) == {
    "batch_size": (8, 4),
    "optimizer.clip_norm": (1.0, None),
    "model.pattern[2].mixer.implementation": ("auto", "banded"),
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
