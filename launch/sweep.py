"""Sweeps a grid: `python -m launch.sweep --config=configs/scaling.py:mini --workdir=runs/mini`.

Prints the plan, then runs what is left; after that `python -m launch.report runs/mini` fits and
draws the laws. The same command again goes on, however it was ended. The config file has
`get_sweep(arg)`, a tuple of train.scaling.sweep.Point, and its `get_config` knows each run as
ARG/NAME, so any of them can be started by hand. What follows `--` goes to every run:
-- --config.mesh.fsdp=4

  --dry_run     the plan only          --status    how far each run is
  --jobs=2      so many at a time      --max_attempts=3, --retry_failed
  --launch_command="launch/local.sh -n 4 --"    what gets the arguments of launch.train instead of
                `python -m launch.train`, and ends when the run ends
  --submit_command="launch/slurm.sh submit --name={job} --workdir={workdir} --"    the same where a
                cluster takes the job and the command returns. In either {name} is the run's, {job}
                the same without slashes, {workdir} its folder
  --chip=v5e --chips=8 [--mfu=0.4] [--price_per_chip_hour=1.2]    plan for chips, by the model

Exit status: 0 all runs are done (or submitted), 1 some failed, 2 a command that cannot be run, 75
stopped by a signal: start me again.
"""

import pathlib
import shlex
import shutil
import sys
from collections.abc import Callable, Sequence

import jax
from absl import app, flags, logging

from data import token_store
from launch.console import log_for_people, must_be_finite, parse_flags, refuse, writing
from launch.overrides import ask
from launch.pages.sweep_text import Estimate, changes_lines, plan_lines, status_lines
from sharding import machine as machines
from sharding.machine import Machine
from train.checkpoint.storage import steps
from train.job.exit_status import STOPPED
from train.job.signals import StopRequest
from train.planning import plan as plans
from train.scaling import runner as sweep_runner
from train.scaling.runner import Runner
from train.scaling.sweep import (
  STATE,
  Point,
  State,
  compare,
  measured_speed,
  new_record,
  settings_of,
)
from train.workdir.lock import Lock

_CONFIG = flags.DEFINE_string("config", None, "FILE.py[:ARG] with get_sweep.", required=True)
_WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the sweep.", required=True)
_DRY_RUN = flags.DEFINE_boolean("dry_run", False, "Print the plan; start and write nothing.")
_STATUS = flags.DEFINE_boolean("status", False, "Print how far each run is; start nothing.")
_JOBS = flags.DEFINE_integer("jobs", 1, "Runs at a time.", lower_bound=1)
_ATTEMPTS = flags.DEFINE_integer("max_attempts", 3, "Failures of a run.", lower_bound=1)
_RETRY = flags.DEFINE_boolean("retry_failed", False, "Give failed runs all their attempts again.")
_RESUBMIT = flags.DEFINE_multi_string("resubmit", [], "Name of a run to submit once more.")
_REDO = flags.DEFINE_boolean(
  "redo_altered", False, "Runs whose settings changed start over; what they did is put aside."
)
_LAUNCH = flags.DEFINE_string("launch_command", None, "What runs each command, and waits for it.")
_SUBMIT = flags.DEFINE_string("submit_command", None, "What hands each command to a cluster.")
_CHIP = flags.DEFINE_string("chip", None, "Plan for these chips, by the model: v5e, h100, ...")
_CHIPS = flags.DEFINE_integer("chips", 1, "Chips of each run, with --chip.", lower_bound=1)
_MFU = flags.DEFINE_float(
  "mfu",
  None,
  "With --chip: instead of the roofline, as 0.4.",
  lower_bound=0.01,
  upper_bound=1.0,
)
_FLOPS = flags.DEFINE_float(
  "flops_per_second", None, "Of a run here; unsaid: as measured in finished runs.", lower_bound=1.0
)
_PRICE = flags.DEFINE_float(
  "price_per_chip_hour", None, "In any currency; this machine counts as one chip.", lower_bound=0.0
)
must_be_finite(_MFU, _FLOPS, _PRICE)
# What a command may hold in braces: see above.
_WORDS: tuple[str, ...] = ("name", "job", "workdir")


def main(argv: Sequence[str]) -> None:
  log_for_people()
  # Only shapes are computed here; accelerators are the runs'.
  jax.config.update("jax_platforms", "cpu")
  folder, arguments = pathlib.Path(_WORKDIR.value), list(argv[1:])
  try:
    if arguments and "--" not in sys.argv:
      raise ValueError(f"{arguments[0]!r} is no flag; what every run is to get comes after --")
    if folder.exists() and not folder.is_dir():
      raise ValueError(f"--workdir={folder} is a file; a sweep is a folder: choose another place")
    if _MFU.value is not None and _CHIP.value is None:
      raise ValueError(f"--mfu={_MFU.value} has no effect without --chip: say of which chips")
    _check_command()
    if _STATUS.value:
      state = State.load(folder)
      sweep_runner.collect(state)
      print("\n".join(status_lines(state, max_attempts=_ATTEMPTS.value)))
    elif _DRY_RUN.value:
      points = _points()
      state, lines = _updated(_state(folder, arguments), points)
      print("\n".join([*lines, *_plan(state, points)]))
    else:
      with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        with Lock(folder):
          sys.exit(_sweep(folder, arguments))
  except ValueError as error:
    refuse(error)


def _sweep(folder: pathlib.Path, arguments: list[str]) -> int:
  points = _points()
  state, lines = _updated(_state(folder, arguments), points)
  if _RETRY.value:
    for record in state.in_grid.values():
      record["attempts"] = 0
  sweep_runner.collect(state)
  state.save()
  print("\n".join([*lines, *_plan(state, points)]), flush=True)
  with StopRequest() as stop:
    if _SUBMIT.value:
      names = _to_submit(state)
      sweep_runner.submit(state, _command(state), names, max_attempts=_ATTEMPTS.value)
    else:
      _check_data(points)
      runner = Runner(state, _command(state), jobs=_JOBS.value, max_attempts=_ATTEMPTS.value)
      runner.run(stop)
    stopped = stop.signal_name is not None
  return _end(state, stopped)


def _check_command() -> None:
  """Raises where the command that starts each run cannot be one."""
  if _SUBMIT.value is not None and _LAUNCH.value is not None:
    raise ValueError("--launch_command runs here, --submit_command elsewhere: give one of them")
  for flag in (_SUBMIT, _LAUNCH):
    if flag.value is None:
      continue
    program = sweep_runner.expand(flag.value, dict.fromkeys(_WORDS, ""))[:1]
    if not program or shutil.which(program[0]) is None:
      raise ValueError(f"--{flag.name}={flag.value}: there is no program {''.join(program)!r}")


def _check_data(points: Sequence[Point]) -> None:
  """Raises if runs that start here would fail one by one for the same reason."""
  if _LAUNCH.value is not None:
    return
  paths = {path for point in points for path, _ in point.run.data.sources}
  missing = sorted(path for path in paths if not token_store.is_complete(path))
  if missing:
    raise ValueError(
      f"there is no token store {missing[0]} (seen from the current folder): prepare it with "
      "`python -m launch.prepare`; the shipped corpus is prepared by `make train`"
    )


def _end(state: State, stopped: bool) -> int:
  """Says how it ended; the exit status."""
  left = [name for name, record in state.in_grid.items() if record["result"] is None]
  failed = [name for name in left if state.runs[name]["submitted"] is None]
  if stopped:
    logging.info("stopped; the same command goes on: %d runs are left", len(left))
    return STOPPED
  if failed:
    logging.error("%d runs failed: %s", len(failed), ", ".join(failed))
    return 1
  if left:
    logging.info("%d runs are with the cluster; --status tells how far they are", len(left))
  else:
    logging.info("all runs are done; the laws: python -m launch.report %s", state.folder)
  return 0


def _points() -> tuple[Point, ...]:
  points = ask(_CONFIG.value, "get_sweep")
  wanted = "a tuple of train.scaling.sweep.Point is expected"
  if not isinstance(points, tuple | list):
    raise ValueError(
      f"--config={_CONFIG.value}: get_sweep gave a {type(points).__name__}; {wanted}"
    )
  if not points:
    raise ValueError(f"--config={_CONFIG.value}: get_sweep gave no run; a sweep has at least one")
  for index, point in enumerate(points):
    if not isinstance(point, Point):
      raise ValueError(
        f"--config={_CONFIG.value}: [{index}] of get_sweep is a {type(point).__name__}; {wanted}"
      )
  names = [point.name for point in points]
  if twice := sorted({name for name in names if names.count(name) > 1}):
    raise ValueError(f"--config={_CONFIG.value}: two runs are called {twice[0]!r}")
  return tuple(points)


def _state(folder: pathlib.Path, arguments: list[str]) -> State:
  """What is known of this sweep; a new one if it is new."""
  if not (folder / STATE).exists():
    return State(folder, _CONFIG.value, arguments)
  state = State.load(folder)
  if state.arguments != arguments:
    sweep_runner.collect(state)
    if any(_has_begun(state, name) for name in state.runs):
      raise ValueError(
        f"{folder} was swept with the arguments {shlex.join(state.arguments)!r} for every run, now "
        f"they are {shlex.join(arguments)!r}: the results would not belong together. Give the "
        "same, or another --workdir"
      )
    # What failed with the others may go well with these.
    for record in state.runs.values():
      record["attempts"] = 0
    state.arguments = arguments
  state.config = _CONFIG.value
  return state


def _has_begun(state: State, name: str) -> bool:
  """Whether a run has, or may come to have, anything that its arguments went into."""
  record, folder = state.runs[name], state.run_folder(name)
  is_under_way = record["submitted"] is not None or sweep_runner.is_running(folder)
  return is_under_way or record["result"] is not None or bool(steps(folder / "checkpoints"))


def _updated(state: State, points: Sequence[Point]) -> tuple[State, list[str]]:
  """The state with the grid as it is now, in its order, and what has changed as lines; ValueError
  where a run has something to lose."""
  known, changes = state.runs, compare(state.runs, points)
  started = [name for name in changes.altered if state.run_folder(name).exists()]
  if started and not _REDO.value:
    told = "; ".join(f"{name}: {', '.join(changes.altered[name][:4])}" for name in started[:3])
    raise ValueError(
      f"{len(started)} runs have begun or finished with other settings than the grid has now "
      f"({told}). Set the grid back, use another --workdir, or start them over with --redo_altered"
    )
  for name in started:
    if sweep_runner.is_running(state.run_folder(name)):
      raise ValueError(f"{name} is running with other settings: end it first")
    if not _DRY_RUN.value:
      _put_aside(state, name)
  state.runs = {}
  for point in points:
    same = point.name in known and point.name not in changes.altered
    state.runs[point.name] = (
      {**known[point.name], "in_grid": True, "settings": settings_of(point.run)}
      if same
      else new_record(point)
    )
  gone = {name: record for name, record in known.items() if name not in state.runs}
  state.runs |= {name: {**record, "in_grid": False} for name, record in gone.items()}
  return state, changes_lines(changes) if known else []


def _put_aside(state: State, name: str) -> None:
  aside = state.folder / "replaced" / name
  while aside.exists():
    aside = aside.with_name(aside.name + "_")
  aside.parent.mkdir(parents=True, exist_ok=True)
  state.run_folder(name).rename(aside)
  logging.info("%s: what it did is in %s", name, aside)


def _command(state: State) -> Callable[[str], list[str]]:
  """The command line of each run."""
  template = _SUBMIT.value or _LAUNCH.value or f"{shlex.quote(sys.executable)} -m launch.train"

  def command(name: str) -> list[str]:
    config = f"{_CONFIG.value}/{name}" if ":" in _CONFIG.value else f"{_CONFIG.value}:{name}"
    workdir = str(state.run_folder(name))
    words = dict(zip(_WORDS, (name, name.replace("/", "-"), workdir)))
    flags_ = [f"--config={config}", f"--workdir={workdir}"]
    return [*sweep_runner.expand(template, words), *flags_, *state.arguments]

  return command


def _to_submit(state: State) -> list[str]:
  unknown = [name for name in _RESUBMIT.value if name not in state.in_grid]
  if unknown:
    raise ValueError(f"--resubmit={unknown[0]}: there is no such run in the grid")
  for name in _RESUBMIT.value:
    state.runs[name] |= {"submitted": None, "attempts": 0}
  return [
    name
    for name, record in state.in_grid.items()
    if record["result"] is None
    and record["submitted"] is None
    and record["attempts"] < _ATTEMPTS.value
  ]


def _plan(state: State, points: Sequence[Point]) -> list[str]:
  """The table of runs, with what each takes."""
  price = _PRICE.value
  if _CHIP.value is None:
    estimates = {point.name: _here(state, point.name) for point in points}
    chips, source = 1, "speed as of finished runs" if _FLOPS.value is None else "--flops_per_second"
  else:
    machine = machines.of_chips(_CHIP.value, _CHIPS.value)
    chips = machine.num_chips
    source = f"{machine}, " + ("roofline" if _MFU.value is None else f"MFU {_MFU.value:.0%}")
    estimates = {point.name: _on_chips(point, machine) for point in points}
  return list(plan_lines(state, estimates, chips=chips, price=price, source=source))


def _here(state: State, name: str) -> Estimate:
  record = state.runs[name]
  if _FLOPS.value is not None:
    return Estimate(record["flops"] / _FLOPS.value, record["memory_bytes"], True)
  speed = measured_speed(record, state.in_grid.values())
  seconds = speed and speed.start_seconds + record["flops"] / speed.flops_per_second
  return Estimate(seconds, record["memory_bytes"], True)


def _on_chips(point: Point, machine: Machine) -> Estimate:
  plan = plans.modelled(point.run, machine)
  seconds = plan.budget_tokens / plan.tokens_per_second(_MFU.value)
  return Estimate(seconds, plan.memory.total, plan.fits)


if __name__ == "__main__":
  app.run(main, flags_parser=parse_flags)
