"""Sweeps: planned, run, killed, changed, handed to a cluster; and the grids that are shipped."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
import types

import pytest

from launch import sweep as sweep_module
from launch.overrides import ask, load
from models.flops import count_params, flops_per_token
from sharding.topology import chip_named
from tests import tiny
from tests.commands import ROOT
from tests.fake_gcs import serving
from train.scaling.sweep import (
  Point,
  State,
  compare,
  facts,
  flops_name,
  measured_speed,
  new_record,
  read_result,
  settings_of,
)
from train.workdir.jsonl import read_jsonl
from train.workdir.lock import Lock

WORKER = f"{sys.executable} tests/sweep_worker.py"


class Sweep:
  """A sweep in a folder of its own, with its grid and what its workers have done."""

  def __init__(self, commands, folder):
    self.commands, self.folder, self.workdir = commands, folder, folder / "sweep"
    tiny.run(folder)

  def grid(self, *runs):
    (self.folder / "grid.json").write_text(json.dumps(runs))

  def arguments(self, *more, worker=f"--launch_command={WORKER}"):
    config = f"--config=tests/sweep_config.py:{self.folder}"
    return [config, f"--workdir={self.workdir}", *([worker] if worker else []), *more]

  def run(self, *more, **worker):
    return self.commands.run(
      "launch.sweep", self.arguments(*more, **worker), self.folder / "output"
    )

  def start(self, *more):
    return self.commands.start("launch.sweep", self.arguments(*more), self.folder / "output")

  @property
  def starts(self):
    path = self.folder / "starts"
    return path.read_text().split() if path.exists() else []

  @property
  def runs(self):
    return State.load(self.workdir).runs

  def wait_for(self, words):
    end = time.monotonic() + 60
    while words not in (self.folder / "output").read_text():
      assert time.monotonic() < end, f"it never said {words!r}"
      time.sleep(0.02)

  def wait_for_start(self, count):
    end = time.monotonic() + 60
    while len(self.starts) < count:
      assert time.monotonic() < end, "nothing was started"
      time.sleep(0.02)


@pytest.fixture
def sweep(commands, tmp_path):
  return Sweep(commands, tmp_path)


def test_a_result_is_of_the_last_step_and_the_median_speed(tmp_path):
  lines = [
    {"step": step, "train/tokens_per_second": speed}
    for step, speed in enumerate((10.0, 400.0, 300.0, 500.0, 20.0), start=1)
  ]
  lines += [{"step": step, "eval/loss": step / 2, "eval/bits_per_byte": 1.0} for step in (3, 5)]
  (tmp_path / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)))
  expected = {"loss": 2.5, "bits_per_byte": 1.0, "tokens_per_second": 300.0}
  assert read_result(tmp_path, 5) == expected
  assert read_result(tmp_path, 6) is None


def test_the_speed_of_a_run_is_that_of_the_nearest_one_of_its_family():
  def record(family, parameters, speed, seconds=40.0):
    result = {"tokens_per_second": speed}
    sizes = {"parameters": parameters, "tokens": 1000, "flops": 6000.0 * parameters}
    return {"family": family, **sizes, "result": result, "seconds": seconds}

  wanted = record("hawk", 100, 0.0)
  done = [record("hawk", 30, 50.0), record("hawk", 150, 100.0), record("griffin", 100, 7.0)]
  # 6 x 150 FLOPs a token. Of the seconds of each, 20 and 10 were steps: the larger median is taken.
  assert measured_speed(wanted, done) == (100.0 * 900.0, 30.0)
  assert measured_speed(wanted, done[2:]) == (7.0 * 600.0, 0.0)
  waiting = {**wanted, "result": None}
  assert measured_speed(wanted, [waiting]) is None


def test_it_runs_what_is_left_and_finished_runs_never_again(sweep):
  sweep.grid(["hawk", 4, 1e-2], ["griffin", 5, 1e-2])
  status, output = sweep.run("--dry_run")
  assert status == 0
  assert "2 of 2 runs are left" in output
  assert not sweep.workdir.exists()
  status, output = sweep.run()
  assert status == 0, output
  assert sweep.starts == ["hawk/4", "griffin/5"]
  assert sweep.runs["griffin/5"]["result"]["loss"] == 2.2
  status, output = sweep.run()
  assert status == 0
  assert "0 of 2 runs are left" in output
  assert sweep.starts == ["hawk/4", "griffin/5"]
  sweep.grid(["hawk", 4, 1e-2], ["griffin", 5, 1e-2], ["griffin", 9, 1e-2])
  status, output = sweep.run("--dry_run")
  assert "added since the last time, 1 runs: griffin/9" in output
  # 1000 tokens a second, as in the runs before it.
  tokens = sweep.runs["hawk/4"]["tokens"] * 9 / 4
  seconds = next(line.split()[-1] for line in output.splitlines() if line.startswith("griffin/9"))
  assert int(seconds.split(":")[2]) == pytest.approx(tokens / 1000, abs=1.5)


def test_a_failing_run_is_tried_so_often_and_the_others_go_on(sweep):
  sweep.grid(["hawk", 4, 1e-2], ["griffin", 5, 1e-2])
  (sweep.folder / "hawk.fails").write_text("1")
  (sweep.folder / "griffin.fails").write_text("3")
  status, output = sweep.run("--max_attempts=2", "--jobs=2")
  assert status == 1
  assert "no luck today" in output
  assert "1 runs failed: griffin/5" in output
  assert sorted(sweep.starts) == ["griffin/5"] * 2 + ["hawk/4"] * 2
  assert sweep.runs["hawk/4"]["result"] is not None
  assert sweep.run("--max_attempts=2")[0] == 1
  assert len(sweep.starts) == 4
  status, output = sweep.run("--max_attempts=2", "--retry_failed")
  assert status == 0, output
  assert len(sweep.starts) == 6


def test_killed_it_finds_the_runs_it_left_and_starts_none_twice(sweep):
  grid = [["hawk", 4, 1e-2], ["griffin", 5, 1e-2], ["hawk", 6, 1e-2], ["griffin", 7, 1e-2]]
  sweep.grid(*grid)
  (sweep.folder / "hold").touch()
  pid = sweep.start("--jobs=2")
  sweep.wait_for_start(2)
  os.kill(pid, signal.SIGKILL)
  assert sweep.commands.wait() == -signal.SIGKILL
  status, output = sweep.run("--status")
  assert status == 0
  assert "2 running, 2 waiting" in output
  sweep.start("--jobs=1")
  sweep.wait_for("griffin/5: still running, started by a sweep before; waiting for it")
  time.sleep(0.5)
  assert len(sweep.starts) == 2  # those that are under way count as jobs
  (sweep.folder / "hold").unlink()
  assert sweep.commands.wait() == 0
  assert sorted(sweep.starts) == sorted(f"{family}/{steps}" for family, steps, _ in grid)
  assert all(record["result"] and not record["attempts"] for record in sweep.runs.values())


def test_a_killed_run_is_started_again(sweep):
  sweep.grid(["hawk", 4, 1e-2])
  (sweep.folder / "hold").touch()
  sweep.start()
  sweep.wait_for_start(1)
  (sweep.folder / "hold").unlink()
  os.kill(int((sweep.folder / "pid").read_text()), signal.SIGKILL)
  assert sweep.commands.wait() == 0
  assert "killed by SIGKILL" in (sweep.folder / "output").read_text()
  assert sweep.starts == ["hawk/4"] * 2
  assert sweep.runs["hawk/4"]["attempts"] == 1


def test_told_to_stop_it_lets_its_runs_save_and_goes_on_later(sweep):
  sweep.grid(["hawk", 4, 1e-2], ["griffin", 5, 1e-2])
  (sweep.folder / "hold").touch()
  pid = sweep.start()
  sweep.wait_for_start(1)
  os.kill(pid, signal.SIGTERM)
  assert sweep.commands.wait() == 75
  assert (sweep.folder / "told").exists()
  assert sweep.runs["hawk/4"]["attempts"] == 0
  (sweep.folder / "hold").unlink()
  assert sweep.run()[0] == 0
  assert sweep.starts == ["hawk/4", "hawk/4", "griffin/5"]


def test_a_second_sweep_on_the_same_folder_is_refused(sweep):
  sweep.grid(["hawk", 4, 1e-2])
  sweep.workdir.mkdir()
  with Lock(sweep.workdir):
    status, output = sweep.run()
  assert status == 2
  assert "is in use by a run" in output
  assert not sweep.starts


def test_a_changed_grid_says_what_changed_and_loses_no_result(sweep):
  sweep.grid(["hawk", 4, 1e-2], ["griffin", 5, 1e-2])
  assert sweep.run()[0] == 0
  sweep.grid(["hawk", 4, 2e-2], ["hawk", 6, 1e-2])
  status, output = sweep.run()
  assert status == 2
  assert "hawk/4: optimizer.peak_lr 0.01 -> 0.02" in output
  assert "--redo_altered" in output
  assert len(sweep.starts) == 2
  status, output = sweep.run("--redo_altered")
  assert status == 0, output
  assert "added since the last time, 1 runs: hawk/6" in output
  assert "removed since the last time, 1 runs: griffin/5" in output
  assert "altered since the last time: hawk/4: optimizer.peak_lr 0.01 -> 0.02" in output
  assert sweep.starts[2:] == ["hawk/4", "hawk/6"]
  assert (sweep.workdir / "replaced" / "hawk" / "4" / "metrics.jsonl").exists()
  # A run that comes back has its result still.
  sweep.grid(["hawk", 4, 2e-2], ["griffin", 5, 1e-2])
  assert sweep.run()[0] == 0
  assert len(sweep.starts) == 4
  status, output = sweep.run("--", "--config.seed=1")
  assert status == 2
  assert "the results would not belong together" in output


def test_settings_without_effect_on_the_result_may_change():
  run = load("configs/griffin.py:1b")
  point = Point(name="a", family="griffin", budget=None, run=run)

  def compared_with(*paths):
    before = settings_of(run)
    assert set(paths) <= before.keys()
    record = {"in_grid": True, "settings": {**before, **dict.fromkeys(paths, "before")}}
    return compare({"a": record}, [point])

  assert compared_with(*_WITHOUT_EFFECT) == ([], [], {})
  # An older sweep may lack a setting; its runs had the value that is the default now.
  before = settings_of(run)
  del before["model.logit_cap"]
  record = {"in_grid": True, "settings": before}
  assert compare({"a": record}, [point]) == ([], [], {})
  capped = dataclasses.replace(run, model=dataclasses.replace(run.model, logit_cap=30.0))
  changes = compare({"a": record}, [dataclasses.replace(point, run=capped)])
  assert changes.altered == {"a": ["model.logit_cap None -> 30.0"]}
  for path in _WITH_EFFECT:
    assert compared_with(path).altered == {"a": [f"{path} 'before' -> {settings_of(run)[path]!r}"]}


_WITHOUT_EFFECT = ("metrics.log_every", "mesh.fsdp", "statistics.every", "watchdog.step_minutes")
_WITHOUT_EFFECT += ("model.pattern[0].mixer.scan", "model.pattern[2].mixer.implementation")
_WITHOUT_EFFECT += ("bad_steps.max_skipped", "bad_steps.max_rollbacks")
_WITH_EFFECT = ("bad_steps.non_finite", "bad_steps.spike", "bad_steps.spike_window")
_WITH_EFFECT += ("bad_steps.spike_deviations", "bad_steps.also_before")
_WITH_EFFECT += ("seed", "xla_flags.set", "model.pattern[0].mixer.decay_init", "model.dtype")


def test_a_cluster_gets_each_run_once_and_its_result_is_found(sweep):
  sweep.grid(["hawk", 4, 1e-2], ["griffin", 5, 1e-2])
  accept = tmp_command(sweep.folder / "cluster")
  submit = f"--submit_command={accept} --name={{job}} --"
  status, output = sweep.run(submit, worker=None)
  assert status == 0, output
  assert "2 runs are with the cluster" in output
  lines = (sweep.folder / "cluster.calls").read_text().splitlines()
  config = f"tests/sweep_config.py:{sweep.folder}/hawk/4"
  workdir = f"{sweep.workdir}/runs/hawk/4"
  assert lines[0] == f"--name=hawk-4 -- --config={config} --workdir={workdir}"
  assert sweep.run(submit, worker=None)[0] == 0
  assert len((sweep.folder / "cluster.calls").read_text().splitlines()) == 2
  assert sweep.runs["hawk/4"]["submitted"]["said"] == "job 7"
  worker = [*WORKER.split(), f"--config={config}", f"--workdir={workdir}"]
  subprocess.run(worker, cwd=ROOT, check=True)
  status, output = sweep.run("--status", worker=None)
  assert "1 done, 1 submitted" in output
  assert sweep.run(submit, "--resubmit=griffin/5", worker=None)[0] == 0
  assert len((sweep.folder / "cluster.calls").read_text().splitlines()) == 3


def tmp_command(path):
  """A program that records its arguments and answers as a queue does."""
  path.write_text(f'#!/bin/sh\necho "$@" >> {path}.calls\necho job 7\n')
  path.chmod(0o755)
  return path


def test_the_command_that_it_runs_is_launch_train(sweep):
  sweep.grid(["griffin", 4, 1e-2])
  status, output = sweep.run("--", "--config.no_such_field=1", worker=None)
  assert status == 1
  assert "exit status 2: error: --config.no_such_field=1: there is no such field" in output
  assert sweep.runs["griffin/4"]["attempts"] == 3  # trying again would be of no use
  # Nothing came of the mistake: the right command goes on in the same folder.
  status, output = sweep.run("--", "--config.seed=1")
  assert status == 0, output
  assert sweep.starts == ["griffin/4"]
  assert sweep.runs["griffin/4"]["attempts"] == 0


def test_other_arguments_are_refused_once_a_run_has_a_checkpoint(sweep):
  sweep.grid(["griffin", 4, 1e-2])
  config = f"tests/sweep_config.py:{sweep.folder}"
  state = State(sweep.workdir, config, [])
  state.runs = {point.name: new_record(point) for point in ask(config, "get_sweep")}
  sweep.workdir.mkdir()
  state.save()
  (sweep.workdir / "runs/griffin/4/checkpoints/00000002").mkdir(parents=True)
  status, output = sweep.run("--dry_run", "--", "--config.seed=1")
  assert status == 2
  assert "was swept with the arguments '' for every run" in output


@pytest.mark.parametrize(
  ("arguments", "words"),
  [
    (("--workdir=README.md",), "--workdir=README.md is a file"),
    (("--launch_command=no_such_program {name}",), "there is no program 'no_such_program'"),
    (("--launch_command= ",), "there is no program ''"),
    (("--launch_command=sh {nme}",), "'nme'; it may hold {name}, {job}, {workdir}"),
    (("--mfu=0.4",), "--mfu=0.4 has no effect without --chip"),
    (("--mfu=40", "--chip=v5e"), "flag --mfu=40: 40.0 is not a number in the range [0.01, 1.0]"),
    (("--submit_command=sh",), "--launch_command runs here, --submit_command elsewhere"),
  ],
)
def test_what_it_cannot_start_is_refused_before_anything_is_written(sweep, arguments, words):
  sweep.grid(["griffin", 4, 1e-2])
  status, output = sweep.run(*arguments)
  assert status == 2
  (line,) = output.splitlines()
  assert line.startswith("error: ")
  assert words in line
  assert not sweep.workdir.exists()


def test_a_grid_without_runs_is_refused(sweep):
  sweep.grid()
  status, output = sweep.run("--dry_run")
  assert status == 2
  assert "get_sweep gave no run" in output


@pytest.mark.parametrize(
  ("grid", "words"),
  [("5", "get_sweep gave a int"), ("(load('configs/smoke.py'),)", "[0] of get_sweep is a Run")],
)
def test_what_is_no_grid_is_refused(commands, tmp_path, grid, words):
  text = f"from launch.overrides import load\n\n\ndef get_sweep():\n  return {grid}\n"
  (tmp_path / "config.py").write_text(text)
  arguments = [f"--config={tmp_path}/config.py", f"--workdir={tmp_path}/sweep"]
  status, output = commands.run("launch.sweep", arguments, tmp_path / "output")
  assert status == 2
  assert f"{words}; a tuple of train.scaling.sweep.Point is expected" in output.splitlines()[-1]


def test_without_its_data_nothing_is_started(sweep):
  sweep.grid(["griffin", 4, 1e-2])
  config = (ROOT / "tests/sweep_config.py").read_text()
  elsewhere = config.replace("return dataclasses.replace(\n    run,", _MOVED)
  assert elsewhere != config
  (sweep.folder / "config.py").write_text(elsewhere)
  arguments = [f"--config={sweep.folder}/config.py:{sweep.folder}", f"--workdir={sweep.workdir}"]
  status, output = sweep.commands.run("launch.sweep", arguments, sweep.folder / "output")
  assert status == 2
  assert "there is no token store runs/nowhere" in output


_MOVED = """return dataclasses.replace(
    run,
    data=dataclasses.replace(run.data, sources=(("runs/nowhere", 1.0),)),"""


def test_data_in_a_bucket_is_there_when_its_store_is_complete(sweep, monkeypatch):
  sweep.grid(["griffin", 4, 1e-2])
  (point,) = ask(f"tests/sweep_config.py:{sweep.folder}", "get_sweep")
  data = dataclasses.replace(point.run.data, sources=(("gs://bucket/train", 1.0),))
  point = dataclasses.replace(point, run=dataclasses.replace(point.run, data=data))
  monkeypatch.setattr(sweep_module, "_LAUNCH", types.SimpleNamespace(value=None))
  with serving():
    with pytest.raises(ValueError, match="there is no token store gs://bucket/train"):
      sweep_module._check_data([point])
    tiny.store("gs://bucket/train")
    sweep_module._check_data([point])


def test_a_run_that_was_started_by_hand_is_taken_over(sweep):
  """It really trains: names, folders and metrics are those of `python -m launch.train`."""
  sweep.grid(["llama", 4, 1e-2])
  config = f"--config=tests/sweep_config.py:{sweep.folder}/llama/4"
  arguments = [config, f"--workdir={sweep.workdir}/runs/llama/4"]
  status, output = sweep.commands.run("launch.train", arguments, sweep.folder / "output")
  assert status == 0, output
  assert sweep.run()[0] == 0
  assert not sweep.starts
  last = read_jsonl(sweep.workdir / "runs/llama/4/metrics.jsonl")[-1]
  assert last["step"] == 4
  assert sweep.runs["llama/4"]["result"]["loss"] == last["eval/loss"]


def test_a_plan_for_chips_has_time_and_cost(sweep):
  sweep.grid(["griffin", 4, 1e-2])
  chips = ("--chip=v5e", "--chips=1", "--mfu=0.5", "--price_per_chip_hour=1e9")
  status, output = sweep.run("--dry_run", *chips)
  assert status == 0, output
  run = load(f"tests/sweep_config.py:{sweep.folder}/griffin/4")
  flops = facts(run).flops
  cost = flops / (0.5 * chip_named("v5e").peak_flops) / 3600 * 1e9
  total = output.splitlines()[-1]
  assert "v5e:1x1, MFU 50%" in total
  assert f"cost {cost:,.2f} (" in total


@pytest.mark.parametrize("grid", ["mini", "small", "isoflop", "optimal"])
def test_the_shipped_grids_keep_their_promises(grid):
  points = ask(f"configs/scaling.py:{grid}", "get_sweep")
  assert len({point.name for point in points}) == len(points)
  by_size = {}
  for point in points:
    run = point.run
    batch_flops = run.batch_size * run.data.row_length
    batch_flops *= flops_per_token(run.model, run.data.row_length).train
    budget = point.budget
    if budget is not None:
      assert abs(run.total_steps * batch_flops / budget - 1) <= batch_flops / budget
    assert run.optimizer.warmup_steps <= run.total_steps / 10
    by_size.setdefault((point.name.split("/")[1], budget), {})[point.family] = run
  assert all(set(runs) == {"griffin", "hawk", "transformer", "llama"} for runs in by_size.values())
  budgets = {budget for _, budget in by_size}
  assert all(sum(key[1] == budget for key in by_size) >= 4 for budget in budgets)
  if grid in ("mini", "small"):
    for runs in by_size.values():
      counts = [count_params(run.model).total for run in runs.values()]
      assert max(counts) / min(counts) < 1.06
  if grid == "isoflop":
    for budget in budgets:
      ratios = [
        run.total_steps * run.batch_size * run.data.row_length / count_params(run.model).total
        for (_, one), runs in by_size.items()
        if one == budget
        for run in runs.values()
      ]
      assert min(ratios) < 20 < max(ratios)
  last = points[-1]
  assert load(f"configs/scaling.py:{grid}/{last.name}") == last.run


def test_the_published_rules_are_as_published():
  """arXiv:2401.02954, section 3.1, at 1e19 FLOPs: 1.31e-3, and a batch of 479 thousand tokens,
  of which 256 rows are the nearest power of two; 5,220 tokens at 1e13."""
  run = load("configs/scaling.py:isoflop/hawk/400m/1e19")
  assert run.optimizer.peak_lr == pytest.approx(1.31e-3, rel=0.01)
  assert (run.batch_size, run.data.row_length) == (256, 2048)
  small = load("configs/scaling.py:small/hawk/w64/1e13")
  assert small.batch_size * small.data.row_length == pytest.approx(5220, abs=128)
  with pytest.raises(ValueError, match="there is no run"):
    load("configs/scaling.py:mini/hawk/w64/1e99")
  with pytest.raises(
    ValueError, match=r"family 'owl' of .* is none of griffin, hawk, transformer, llama"
  ):
    load("configs/scaling.py:mini/owl/w64/1e12")


def test_names_are_folders():
  assert [flops_name(x) for x in (1e13, 2.5e12, 3e9)] == ["1e13", "2.5e12", "3e9"]
  run = load("configs/smoke.py")
  for name in ("../x", "a//b", "a b", "/a", ""):
    with pytest.raises(ValueError, match="it is a folder"):
      Point(name=name, family="a", budget=None, run=run)
