"""A plan in words: the command that trains it, and numbers that are those of the plan."""

import dataclasses
import functools
import json
import re
import shlex
import subprocess
import sys

import pytest

from launch.overrides import load
from launch.pages import plan_text
from launch.pages.plan_page import page
from launch.pages.plan_text import plan_lines
from sharding import machine as machines
from sharding.mesh import MeshShape
from tests import drawn
from train.planning import plan as plans
from train.planning.layouts import Layout

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


@functools.cache
def _two_slices():
  run = load("configs/griffin.py:100m")
  run = dataclasses.replace(run, mesh=MeshShape(data=2, fsdp=8), num_microbatches=2)
  return plans.modelled(run, machines.of_topology("v5e:2x4", num_slices=2))


def test_the_text_has_the_numbers_of_the_plan():
  planned = _two_slices()
  lines = plan_lines(planned, mfu=0.4, price=3.0)
  rows = planned.run.batch_size // 2
  assert f"2 microbatches of {rows} x {planned.run.data.row_length} tokens" in lines[1]
  times, bound = planned.roofline.times, planned.roofline.bound
  (binds,) = [line for line in lines if line.endswith("<- binds")]
  assert binds.split("  <-")[0].split()[-1] == f"{1e3 * times[bound]:.1f}"  # ms
  cells = {line.split()[0]: line.split() for line in lines if line.startswith("  ")}
  memory = planned.memory
  assert cells["parameters"][1:] == [
    f"{memory.parts['parameters'] / 1e9:.2f}",
    f"{memory.parts['parameters'] / memory.limit:.1%}",
  ]
  sent = [line.split() for line in lines if line.startswith(("  all-", "  reduce-"))]
  crossing = {(kind, axes) for kind, axes, *_, crosses in sent if crosses == "yes"}
  assert crossing == {(one.kind, "+".join(one.axes)) for one in planned.collectives if one.crosses}
  assert crossing
  assert any("at MFU 40%" in line for line in lines)


def test_a_gigabyte_is_a_billion_bytes():
  assert [plan_text.gigabytes(number) for number in (2.5e9, 256e9)] == ["2.50", "256"]


def test_the_page_has_the_numbers_of_the_plan():
  planned = _two_slices()
  whole = page(planned, mfu=None, price=None, notes=[], train="train <C>", command="plan <X>")
  assert re.search(r'class="verdict"[^>]*>fits<', whole)
  assert "train &lt;C&gt;" in whole
  assert "plan &lt;X&gt;" in whole
  pictures = re.findall(r"<svg.*?</svg>", whole, re.S)
  memory, times, sent, flops = ([*drawn.words(picture)] for picture in pictures)
  tooltips = [words for picture in pictures for *_, words in drawn.tooltips(picture)]
  tokens = planned.tokens_per_step / planned.machine.num_devices
  # With the backward pass, three times the forward one.
  number = f"{3 * planned.flops['mlp'] * tokens / 1e12:,.2f} TFLOP"
  share = f"{planned.flops['mlp'] / planned.flops.forward:.0%}"
  assert f"MLPs: {number}, {share}" in tooltips
  assert {"FLOPs of a step on each device, by part", "TFLOP", f"{number}, {share}"} <= set(flops)
  assert {"What each device sends in a step", "ms"} <= set(sent)
  assert {"Memory of each device", "GB"} <= set(memory)
  assert f"{plan_text.gigabytes(planned.memory.total)} GB needed" in memory
  assert {"Least time of a step", "ms"} <= set(times)
  least = planned.roofline.times[planned.roofline.bound]
  assert [word for word in times if "binds" in word] == [f"{1e3 * least:,.1f} ms, binds"]
  half = dataclasses.replace(planned.memory, limit=planned.memory.total / 2)
  small = dataclasses.replace(planned, memory=half)
  whole = page(small, mfu=None, price=None, notes=[], train="", command="")
  assert re.search(r'class="verdict"[^>]*>does not fit<', whole)


def test_flags_reach_the_text_and_a_line_of_json_is_added(tmp_path):
  (tmp_path / "plan.jsonl").write_text('"an earlier plan"\n')
  words = ["--config=configs/griffin.py:100m", "--config.batch_size=64", "--compile=0", "--search"]
  words += ["--topology=v5e:4x4", "--price_per_chip_hour=2", "--mfu=0.4"]
  done = subprocess.run(
    [sys.executable, "-m", "launch.plan", *words, f"--json={tmp_path}/plan.jsonl"],
    capture_output=True,
    text=True,
    timeout=120,
  )
  assert done.returncode == 0, done.stderr
  assert "at MFU 40%" in done.stdout
  assert "cost at 2 per chip-hour" in done.stdout
  trains = [line for line in done.stdout.splitlines() if " launch.train " in line]
  assert len(trains) >= 2
  assert all(" --config.batch_size=64 " in line for line in trains)
  before, added = map(json.loads, (tmp_path / "plan.jsonl").read_text().splitlines())
  assert before == "an earlier plan"
  assert added["budget"]["cost"] == pytest.approx(2 * added["budget"]["chip_hours"])
