"""A plan in words: the command that trains it, and numbers that are those of the plan."""

import shlex

import pytest

from launch import plan_text
from launch.overrides import load
from sharding.mesh import MeshShape
from train.layouts import Layout

LAYOUT = Layout(mesh=MeshShape(fsdp=16), zero_stage=3, remat="block")


@pytest.mark.parametrize(
  "config", [("--config=configs/griffin.py:100m",), ("--config", "configs/griffin.py:100m")]
)
def test_the_command_that_trains_has_all_that_was_planned_in_the_layout_of_the_plan(config):
  said = ["--config.batch_size=64", "--config.notes=a b", "--config.seed", "3"]
  laid_out = ["--config.mesh.tensor=2", "--config.zero_stage=1", "--config.model.remat=none"]
  laid_out += ["--config.num_microbatches", "2"]
  argv = ["plan", *config, *said, *laid_out, "--search", "--compile=0"]
  run = load("configs/griffin.py:100m")
  assert shlex.split(plan_text.train_command(run, LAYOUT, argv)) == [
    *("python", "-m", "launch.train", "--config=configs/griffin.py:100m"),
    *("--workdir=runs/griffin-100m", "--config.batch_size=64", "--config.notes=a b"),
    *("--config.seed=3", "--config.mesh.fsdp=16", "--config.zero_stage=3"),
    *("--config.model.remat=block", "--config.num_microbatches=1"),
  ]


def test_words_of_a_command_come_back_from_a_shell_as_they_were():
  told = ["--config=a b.py:c", "--config.batch_size=64", "--search"]
  argv = ["plan", "--json", "a.json", *told, "--html=b.html"]
  assert shlex.split(plan_text.plan_command(argv)) == ["python", "-m", "launch.plan", *told]
  run = load("configs/griffin.py:100m")
  assert shlex.split(plan_text.train_command(run, LAYOUT, argv))[3] == "--config=a b.py:c"
