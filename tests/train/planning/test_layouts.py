"""Every preset has a layout that fits each machine, and the compiler agrees where it was asked."""

import dataclasses
import functools
import json
import pathlib

import pytest

from launch.overrides import load
from models import kernel_fields
from sharding import machine as machines
from sharding import topology
from sharding.mesh import MeshShape
from train.planning import plan as plans
from train.planning.footprint import resolved_kernels
from train.planning.layouts import Layout, recommendations, recommended

ROOT = pathlib.Path(__file__).parents[3]
_SIZES = ("100m", "200m", "400m", "1b", "3b", "7b", "14b")
_PRESETS = [f"{family}-{size}" for family in ("griffin", "hawk", "transformer") for size in _SIZES]
_PRESETS += ["recurrentgemma-2b", "recurrentgemma-9b", "long-row-1b"]
_MACHINES = [("v5e", 256), ("v5p", 128), ("h100", 8)]
_CASES = [(name, chip, chips) for chip, chips in _MACHINES for name in _PRESETS]


@functools.cache
def _preset(name):
  family, size = name.rsplit("-", 1)
  return load(f"{ROOT}/configs/{family.replace('-', '_')}.py:{size}")


@pytest.mark.parametrize(("name", "chip", "chips"), _CASES)
def test_every_preset_fits_as_recommended(name, chip, chips):
  """If this fails, `launch.plan --search` finds another layout for recommended.jsonl."""
  run = _preset(name)
  assert run.name == name
  layout = recommended(run, chip=chip, num_chips=chips)
  assert layout is not None
  plan = plans.modelled(layout.of(run), machines.of_chips(chip, chips))
  assert plan.fits
  assert plan.memory.margin > 0.08, "too near to what the memory model can tell"
  assert plan.roofline.mfu_ceiling < 1.0


def test_another_run_has_no_recommendation():
  assert set(recommendations()) == {f"{chip}-{chips}" for chip, chips in _MACHINES}
  run = _preset("griffin-1b")
  assert recommended(run, chip="v5e", num_chips=8) is None
  for name in ("own-1b", "long-row-7b"):  # of a size, and not of the families of that size
    other = dataclasses.replace(run, name=name)
    assert recommended(other, chip="v5e", num_chips=256) is None


def _recorded():
  return [json.loads(line) for line in (ROOT / "docs" / "plans.jsonl").read_text().splitlines()]


def _name(record):
  return f"{record['config']}-{record['machine']}"


def _key(record):
  """The machine of _MACHINES that a plan was recorded for; None for another."""
  for chip, chips in _MACHINES:
    if record["machine"] == str(machines.of_chips(chip, chips)):
      return f"{chip}-{chips}"
  return None


def _kernels(record):
  """Op -> implementation. Older records say "none" of ops that a model has not."""
  return {op: name for op, name in record["kernels"].items() if name != "none"}


def _layout(record):
  return Layout(
    mesh=MeshShape(**record["mesh"]),
    zero_stage=record["zero_stage"],
    remat=record["remat"],
    num_microbatches=record["num_microbatches"],
  )


@pytest.mark.parametrize("record", [one for one in _recorded() if _key(one)], ids=_name)
def test_what_the_compiler_said_is_of_the_preset_as_recommended_today(record):
  """If this fails, plan the preset again as the record's command says, in the layout of
  train/planning/recommended.jsonl, and replace the line."""
  run = _preset(record["config"])
  assert record["fits"]
  assert record["compiled"]
  assert record["refusal"] is None
  assert _layout(record) == recommended(run, chip=record["chip"], num_chips=record["chips"])
  platform = topology.chip_named(record["chip"]).platform
  assert _kernels(record) == resolved_kernels(run.model, platform)
  assert (record["batch_size"], record["row_length"]) == (run.batch_size, run.data.row_length)


def test_a_compiler_has_seen_every_preset_on_every_machine_once():
  """A preset that is new needs `python -m launch.plan` with the flags that it recommends and
  `--json=docs/plans.jsonl`, for each machine; GPUs with the packages of the cuda extra."""
  seen = sorted((record["config"], key) for record in _recorded() if (key := _key(record)))
  assert seen == sorted((name, f"{chip}-{chips}") for name, chip, chips in _CASES)


@pytest.mark.parametrize(
  ("name", "chip", "chips"), [("transformer-100m", "v5p", 128), ("hawk-100m", "v5e", 256)]
)
def test_the_cheapest_presets_compile_as_recorded(name, chip, chips):
  """If this fails, the program is another: plan all of docs/plans.jsonl again."""
  machine = machines.of_chips(chip, chips)
  layout = recommended(_preset(name), chip=chip, num_chips=chips)
  assert layout is not None
  plan = plans.compiled(layout.of(_preset(name)), machine)
  (record,) = [
    one for one in _recorded() if (one["config"], one["machine"]) == (name, str(machine))
  ]
  assert plan.fits
  assert plan.memory.total == pytest.approx(record["memory_bytes"]["total"], rel=0.02)
  sent = {(one.kind, one.axes): one.bytes for one in plan.collectives}
  recorded = {(one["kind"], tuple(one["axes"])): one["bytes"] for one in record["collectives"]}
  assert sent == pytest.approx(recorded, rel=0.02)


def _machine(record):
  """The machine of "v5e:16x16", "2 slices of v5e:16x16" or 8 GPUs."""
  if topology.chip_named(record["chip"]).platform == "gpu":
    return machines.of_chips(record["chip"], record["chips"])
  slices, _, torus = record["machine"].rpartition(" slices of ")
  return machines.of_topology(torus, num_slices=int(slices or 1))


@pytest.mark.parametrize("record", _recorded(), ids=_name)
def test_the_memory_model_agrees_with_recorded_plans(record):
  """docs/plans.jsonl: what the compiler said of presets that take minutes each.

  The model may ask for more than the compiler needs, but not for much less.
  """
  run = _preset(record["config"])
  model = kernel_fields.with_kernels(run.model, _kernels(record))
  plan = plans.modelled(_layout(record).of(dataclasses.replace(run, model=model)), _machine(record))
  for name in ("parameters", "moments"):
    assert getattr(plan.memory, name) == pytest.approx(record["memory_bytes"][name])
  needed, limit = record["memory_bytes"]["total"], record["memory_bytes"]["limit"]
  over = plan.memory.total - needed
  # Of a program that needs little, what the model asks too much matters little for what fits.
  assert -0.12 * needed < over < max(0.4 * needed, 0.06 * limit), (
    f"{record['command']}: {over / needed:+.0%} of what is needed, {over / limit:+.0%} of the limit"
  )


@pytest.mark.parametrize(
  "record", [one for one in _recorded() if one["mesh"]["sequence"] > 1], ids=_name
)
def test_the_traffic_model_agrees_with_recorded_plans_of_split_rows(record):
  plan = plans.modelled(_layout(record).of(_preset(record["config"])), _machine(record))
  said = {one.kind: one for one in plan.collectives if one.axes == ("sequence",)}
  kinds = {"all-gather", "collective-permute"}
  assert kinds <= set(said)
  for one in record["collectives"]:
    if one["axes"] == ["sequence"] and one["kind"] in kinds:
      assert said[one["kind"]].bytes == pytest.approx(one["bytes"], rel=1e-4)
