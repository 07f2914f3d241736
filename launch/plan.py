"""Will it fit? `python -m launch.plan --config=configs/griffin.py:14b --topology=v5p:8x8x8`.

Compiles the real training step for the real chip on any machine, and prints for each device how
much memory it needs, what it sends over which axis and what bounds its speed, and what the run
costs.

  --topology=v5e:16x16 [--slices=2]   a TPU slice, or several; h100:8 are eight GPUs
  --mesh=data=2,fsdp=-1,tensor=4      instead of the config's; axes not named are 1, -1 is the rest
  --chip=v5e --chips=256              the standard slice of that many chips; searches, unless the
                                      command sets a mesh
  --chip=h100 --chips=8               GPUs: compiled if the cuda extra is installed
  --search                            meshes, ZeRO stages, remat, microbatches, by the model
  --compile=3                         how many plans to compile: the best of a search; 0 for none
  --json=PATH --html=PATH             for programs (.jsonl: a line is added), and as a page

Exit status: 0 it fits, 1 it does not, 2 a command that cannot be run.
"""

import dataclasses
import datetime
import json
import pathlib
import sys
from collections.abc import Iterable
from typing import Any

import jax
from absl import flags

from launch.console import check_output, must_be_finite, refuse, writing
from launch.overrides import run_app
from launch.pages import plan_text
from launch.pages.plan_page import page
from sharding import machine as machines
from sharding.machine import Machine
from sharding.mesh import parse_mesh
from train.config import Run
from train.planning import plan as plans
from train.planning.layouts import layout_of, recommended
from train.planning.plan import Plan
from train.planning.search import Candidate, advice, check_row_shards, search

_TOPOLOGY = flags.DEFINE_string("topology", None, "v5e:16x16, v5p:8x8x8, h100:8, ...")
_CHIP = flags.DEFINE_string("chip", None, "v3, v4, v5e, v5p, v6e, h100, h200, a100-80gb, b200, ...")
_CHIPS = flags.DEFINE_integer("chips", None, "Chips in all, with --chip.", lower_bound=1)
_SLICES = flags.DEFINE_integer("slices", 1, "Slices of that topology.", lower_bound=1)
_COMPILE = flags.DEFINE_integer(
  "compile", 1, "How many plans to compile: the best of a search; 0: none.", lower_bound=0
)
_SEARCH = flags.DEFINE_boolean(
  "search", None, "Try layouts. Unsaid: with --chips, unless the command sets a mesh."
)
_MESH = flags.DEFINE_string(
  "mesh", None, "As data=2,fsdp=-1,tensor=4; axes: data, fsdp, sequence, tensor, else 1."
)
_PRICE = flags.DEFINE_float("price_per_chip_hour", None, "In any currency.", lower_bound=0.0)
_MFU = flags.DEFINE_float(
  "mfu",
  None,
  "Tokens per day at this MFU, as 0.4, instead of the ceiling.",
  lower_bound=0.01,
  upper_bound=1.0,
)
must_be_finite(_PRICE, _MFU)
_JSON = flags.DEFINE_string("json", None, "Where to write the plan; .jsonl: a line is added.")
_HTML = flags.DEFINE_string("html", None, "Where to write a page with pictures.")


def main(run: Run, overridden: dict[str, tuple[Any, Any]]) -> None:
  # Programs are compiled for another machine; this one's accelerators are not used.
  jax.config.update("jax_platforms", "cpu")
  try:
    for name in ("json", "html"):
      check_output(name)
    machine = _machine()
    has_mesh = _MESH.value is not None or any(path.startswith("mesh.") for path in overridden)
    searches = _SEARCH.value
    if searches is None:
      searches = _CHIPS.value is not None and not has_mesh
    if _MESH.value is not None:
      run = _on_mesh(run, _MESH.value, overridden, searches=searches)
    found = _searched(run, machine) if searches else [_planned(run, machine, _COMPILE.value > 0)]
  except ValueError as error:
    refuse(error)
  plan = next((one for one in found if one.fits), found[0])
  notes = _best(found, run, machine) if searches else _advice(found[0], run, machine)
  notes = [*notes, *_table(run, machine)]
  lines = plan_text.plan_lines(plan, mfu=_MFU.value, price=_PRICE.value)
  print("\n".join([*lines, "", *notes]))
  if _JSON.value is not None:
    _write_json(pathlib.Path(_JSON.value), plan)
  if _HTML.value is not None:
    whole = page(
      plan,
      mfu=_MFU.value,
      price=_PRICE.value,
      notes=notes,
      train=plan_text.train_command(run, layout_of(plan.run, machine.num_devices), sys.argv),
      command=plan_text.plan_command(sys.argv),
    )
    path = pathlib.Path(_HTML.value)
    with writing(path):
      path.write_text(whole)
  sys.exit(0 if plan.fits else 1)


def _machine() -> Machine:
  """What --topology or --chip and --chips describe."""
  topology, chip, chips = _TOPOLOGY.value, _CHIP.value, _CHIPS.value
  if topology is not None and chip is None and chips is None:
    return machines.of_topology(topology, num_slices=_SLICES.value)
  if topology is None and chip is not None and chips is not None:
    return machines.of_chips(chip, chips, num_slices=_SLICES.value)
  raise ValueError("give either --topology=v5e:16x16, or both --chip=v5e and --chips=256")


def _on_mesh(run: Run, mesh: str, overridden: dict[str, tuple[Any, Any]], *, searches: bool) -> Run:
  """`run` on the mesh of --mesh, unless the command says otherwise elsewhere."""
  if searches:
    raise ValueError("--mesh says which mesh, --search looks for one: give one of them")
  for path in overridden:
    if path.startswith("mesh."):
      raise ValueError(f"--mesh and --config.{path} both say the mesh: give one of them")
  return dataclasses.replace(run, mesh=parse_mesh(mesh))


def _planned(run: Run, machine: Machine, compiles: bool) -> Plan:
  if compiles and machine.uncompilable is None:
    return plans.compiled(run, machine)
  return plans.modelled(run, machine)


def _searched(run: Run, machine: Machine) -> list[Plan]:
  """Plans of the three best layouts, which differ in mesh or remat; the best few compiled."""
  check_row_shards(run, machine)
  candidates = search(run, machine)
  if not candidates:
    raise ValueError(
      f"{run.name} on {machine}: no mesh of {machine.num_devices} devices divides {run.batch_size} "
      "rows and the model's widths; change batch_size"
    )
  kinds: dict[Any, Candidate] = {}
  for one in candidates:
    kinds.setdefault((one.layout.mesh, one.layout.remat), one)
  fitting = [one for one in kinds.values() if one.margin >= 0] or list(kinds.values())
  return [
    _planned(one.layout.of(run), machine, place < _COMPILE.value)
    for place, one in enumerate(fitting[:3])
  ]


def _best(found: list[Plan], run: Run, machine: Machine) -> Iterable[str]:
  """The results of a search, best first, with commands; if nothing fits, what would."""
  fits = any(plan.fits for plan in found)
  yield "the best layouts:" if fits else "none of these fits:"
  for plan in found:
    layout = layout_of(plan.run, plan.machine.num_devices)
    yield f"  {plan_text.short(plan)}"
    yield f"    {plan_text.train_command(plan.run, layout, sys.argv)}"
  if not fits:
    yield from _needed(run, machine, found)


def _advice(plan: Plan, run: Run, machine: Machine) -> Iterable[str]:
  """Single changes that help, by the model; if none makes it fit, what would."""
  found = advice(run, machine)
  if not found and not plan.fits:
    yield from _needed(run, machine, [plan])
    return
  if not found:
    yield "no single change of mesh, ZeRO stage, remat or microbatches helps by the model"
    return
  yield "single changes that help, by the model:"
  for words, after in found:
    yield (
      f"  {words}: {plan_text.gigabytes(after.bytes)} GB, step "
      f"{1e3 * after.roofline.step_seconds:,.0f} to {1e3 * after.roofline.serial_seconds:,.0f} ms, "
      f"{after.roofline.bound} binds"
    )


def _needed(run: Run, machine: Machine, refused: list[Plan]) -> Iterable[str]:
  """The best layout here, except those refused; if there is none, the smallest machine of these
  chips that has one."""
  tried = [layout_of(plan.run, machine.num_devices) for plan in refused]
  candidates = search(run, machine)
  best = next((one for one in candidates if one.margin >= 0 and one.layout not in tried), None)
  if best is not None:
    yield f"this layout fits by the model, in {plan_text.gigabytes(best.bytes)} GB:"
    yield f"  {plan_text.train_command(run, best.layout, sys.argv)}"
    return
  least = min((one.bytes for one in candidates), default=float("inf"))
  yield (
    f"no layout fits {machine}, by the model; the least is {plan_text.gigabytes(least)} GB on each "
    "device"
  )
  for larger in machines.larger(machine):
    candidates = search(run, larger)
    if candidates and candidates[0].margin >= 0:
      yield f"it takes {larger}: {plan_text.layout_flags(candidates[0].layout)}"
      return


def _table(run: Run, machine: Machine) -> Iterable[str]:
  """What train/planning/recommended.jsonl recommends for this preset here."""
  layout = recommended(run, chip=machine.chip.key, num_chips=machine.num_chips)
  if layout is not None:
    yield f"recommended for {run.name} on {machine.num_chips} {machine.chip.name}:"
    yield f"  {plan_text.train_command(run, layout, sys.argv)}"


def _write_json(path: pathlib.Path, plan: Plan) -> None:
  record = plan.as_json(mfu=_MFU.value, price_per_chip_hour=_PRICE.value)
  record["date"] = datetime.date.today().isoformat()
  record["command"] = plan_text.plan_command(sys.argv)
  with writing(path):
    if path.suffix == ".jsonl":
      with path.open("a") as lines:
        lines.write(json.dumps(record) + "\n")
    else:
      path.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
  run_app(main)
