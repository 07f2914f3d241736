"""What a plan says: presets fit as recommended, models agree with the compiler, exit statuses."""

import dataclasses
import functools
import json
import math
import pathlib
import subprocess
import sys

import jax
import pytest

from launch.overrides import load
from launch.plan_page import page
from launch.plan_text import layout_flags, plan_lines
from models.transformer import mqa_transformer
from sharding import machine as machines
from sharding.mesh import MeshShape
from sharding.topology import chip_named
from train import plan as plans
from train.activations import Kernels
from train.layouts import RECOMMENDED, Layout, recommended
from train.roofline import transfer
from train.search import SAFE_MARGIN, advice, evaluate, layouts, search

ROOT = pathlib.Path(__file__).parents[1]
_SIZES = ("100m", "200m", "400m", "1b", "3b", "7b", "14b")
_PRESETS = [(family, size) for family in ("griffin", "hawk", "transformer") for size in _SIZES]
_PRESETS += [("recurrentgemma", "2b"), ("recurrentgemma", "9b")]
_MACHINES = [("v5e", 256), ("v5p", 128), ("h100", 8)]


@functools.cache
def _preset(family, size):
  return load(f"{ROOT}/configs/{family}.py:{size}")


@functools.cache
def _small():
  """As few lines of a program as there can be, compiled in half a minute; wide enough not to fit
  into a chip's cache."""
  run = _preset("transformer", "100m")
  model = mqa_transformer(
    vocab_size=1024,
    width=1024,
    num_blocks=2,
    num_heads=8,
    head_size=128,
    mlp_width=3072,
    remat="none",
  )
  return dataclasses.replace(run, model=model, batch_size=64)


@pytest.mark.parametrize(("chip", "chips"), _MACHINES)
@pytest.mark.parametrize(("family", "size"), _PRESETS)
def test_every_preset_fits_as_recommended(family, size, chip, chips):
  """If this fails, `python -m launch.plan --search` finds another layout for train/layouts.py."""
  run = _preset(family, size)
  layout = recommended(run, chip=chip, num_chips=chips)
  assert layout is not None
  plan = plans.modelled(layout.of(run), machines.of_chips(chip, chips))
  assert plan.fits
  assert plan.memory.margin > 0.08, "too near to what the memory model can tell"
  assert plan.roofline.mfu_ceiling < 1.0


def test_a_run_of_another_name_has_no_recommendation():
  assert recommended(_small(), chip="v5e", num_chips=8) is None
  assert set(RECOMMENDED) == {f"{chip}-{chips}" for chip, chips in _MACHINES}


@functools.cache
def _compiled_small():
  machine = machines.of_topology("v5e:2x4")
  run = dataclasses.replace(_small(), mesh=MeshShape(fsdp=4, tensor=2))
  return plans.compiled(run, machine)


def test_the_compiled_step_says_what_the_models_say():
  plan = _compiled_small()
  model = plans.modelled(plan.run, plan.machine)
  assert plan.is_compiled
  assert plan.fits
  assert plan.compile_seconds > 0
  # Arguments are exact but for the padding of small arrays to whole tiles.
  assert plan.memory.batch < model.memory.batch + 0.05 * plan.memory.parameters + 1e6
  assert abs(plan.model_error) < 0.25
  sent = {(one.kind, one.axes): one for one in plan.collectives}
  said = {(one.kind, one.axes): one for one in model.collectives}
  for key in (("all-gather", ("fsdp",)), ("all-reduce", ("tensor",))):
    assert sent[key].bytes == pytest.approx(said[key].bytes, rel=0.35)
  assert {axis for one in plan.collectives for axis in one.axes} == {"fsdp", "tensor"}
  assert not any(one.crosses for one in plan.collectives)


@pytest.mark.parametrize(
  ("message", "needed"),
  [
    (
      "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO temporaries "
      "(256.00G) exceeds available HBM (15.75G).",
      256 * 2**30,
    ),
    (
      "RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in memory space hbm. "
      "Used 19.53G of 15.75G hbm. Exceeded hbm capacity by 3.78G.",
      19.53 * 2**30,
    ),
  ],
)
def test_a_program_that_the_compiler_refuses_does_not_fit(monkeypatch, message, needed):
  def refuse(program, lowered):
    raise jax.errors.JaxRuntimeError(message)

  monkeypatch.setattr(plans.programs, "compile_step", refuse)
  run = dataclasses.replace(_small(), mesh=MeshShape(fsdp=8))
  plan = plans.compiled(run, machines.of_topology("v5e:2x4"))
  assert not plan.fits
  assert plan.refusal == message
  assert plan.memory.total == pytest.approx(needed)


def test_another_error_of_the_compiler_is_not_hidden(monkeypatch):
  def fail(program, lowered):
    raise jax.errors.JaxRuntimeError("INTERNAL: Mosaic failed to compile TPU kernel")

  monkeypatch.setattr(plans.programs, "compile_step", fail)
  run = dataclasses.replace(_small(), mesh=MeshShape(fsdp=8))
  with pytest.raises(jax.errors.JaxRuntimeError, match="Mosaic"):
    plans.compiled(run, machines.of_topology("v5e:2x4"))


def _recorded():
  return [json.loads(line) for line in (ROOT / "docs" / "plans.jsonl").read_text().splitlines()]


def _as_recorded(record):
  """The run of a recorded plan, in its layout and with the kernels that it was compiled with."""
  family, size = record["config"].rsplit("-", 1)
  run = _preset(family.replace("-", "_"), size)  # a config is called as its file is, with hyphens
  layout = Layout(
    mesh=MeshShape(**record["mesh"]),
    zero_stage=record["zero_stage"],
    remat=record["remat"],
    num_microbatches=record["num_microbatches"],
  )
  # Those that do not say which were compiled before there was another.
  model = Kernels(**{"block_diagonal": "einsum", **record["kernels"]}).of(run.model)
  return layout.of(dataclasses.replace(run, model=model))


@pytest.mark.parametrize(
  "record", _recorded(), ids=lambda record: f"{record['config']}-{record['machine']}"
)
def test_the_memory_model_agrees_with_recorded_plans(record):
  """docs/plans.jsonl: what the compiler said of presets that take minutes each.

  The model may ask for more than the compiler needs, but not for much less.
  """
  assert record["compiled"]
  assert record["fits"]
  chip, _, torus = record["machine"].partition(":")
  assert torus, "recorded plans are of one slice"
  plan = plans.modelled(_as_recorded(record), machines.of_topology(f"{chip}:{torus}"))
  state = ("parameters", "moments")
  for name in state:
    assert getattr(plan.memory, name) == pytest.approx(record["memory_bytes"][name])
  needed, limit = record["memory_bytes"]["total"], record["memory_bytes"]["limit"]
  over = plan.memory.total - needed
  # Of a program that needs little, what the model asks too much matters little for what fits.
  assert -0.12 * needed < over < max(0.35 * needed, 0.06 * limit), (
    f"{record['command']}: {over / needed:+.0%} of what is needed, {over / limit:+.0%} of the limit"
  )


def test_json_has_what_a_program_asks_for():
  run = _preset("griffin", "1b")
  plan = plans.modelled(run, machines.of_chips("v5e", 256))
  record = json.loads(json.dumps(plan.as_json(mfu=None, price_per_chip_hour=2.0)))
  assert record["fits"] is True
  assert record["mesh"] == {"data": 1, "fsdp": 256, "sequence": 1, "tensor": 1}
  parts = record["memory_bytes"]
  assert math.isclose(sum(parts.values()) - parts["limit"] - parts["total"], parts["total"])
  # 256 does not divide the gates' blocks of 160: they are whole on every device.
  assert 1 < parts["parameters"] / (record["parameters"] * 4 / 256) < 5
  assert set(record["seconds"]) == {"compute", "HBM", "ICI", "DCN"}
  assert record["step_seconds"] == max(record["seconds"].values())
  budget = record["budget"]
  assert budget["tokens"] == pytest.approx(25e9, rel=0.01)
  assert budget["cost"] == pytest.approx(2.0 * budget["chip_hours"])
  assert budget["chip_hours"] == pytest.approx(budget["days"] * 24 * 256)
  assert "cost" not in plan.as_json(mfu=None, price_per_chip_hour=None)["budget"]
  # At an MFU of its own the ceiling does not count.
  half = plan.budget(plan.roofline.mfu_ceiling / 2, None)
  assert half["days"] == pytest.approx(2 * budget["days"])


def test_slices_are_crossed_by_gradients_alone():
  run = dataclasses.replace(_preset("griffin", "1b"), mesh=MeshShape(data=2, fsdp=256))
  plan = plans.modelled(run, machines.of_topology("v5e:16x16", num_slices=2))
  crossing = [one for one in plan.collectives if one.crosses]
  assert [(one.kind, one.axes) for one in crossing] == [("all-reduce", ("data",))]
  assert plan.roofline.dcn == pytest.approx(crossing[0].network_seconds)
  with pytest.raises(ValueError, match="data 1 is not divisible by the number of slices 2"):
    plans.modelled(
      dataclasses.replace(run, mesh=MeshShape(fsdp=512)),
      machines.of_topology("v5e:16x16", num_slices=2),
    )


def test_a_ring_moves_what_it_must():
  machine, mesh = machines.of_chips("h100", 16), MeshShape(data=2, fsdp=8)
  chip = chip_named("h100")
  inside = transfer(
    "all-gather", ("fsdp",), range(8), times=1, num_bytes=8e9, machine=machine, mesh=mesh
  )
  assert inside.link_seconds == pytest.approx(7e9 / 450e9)
  assert inside.network_seconds == 0
  across = transfer(
    "all-reduce", ("data",), (0, 8), times=1, num_bytes=1e9, machine=machine, mesh=mesh
  )
  assert across.link_seconds == 0
  assert across.network_seconds == pytest.approx(1e9 / chip.dcn_bytes_per_second)


@pytest.mark.parametrize(("chip", "chips", "slices"), [("v5e", 256, 1), ("v5e", 32, 2)])
def test_a_search_gives_layouts_that_divide_the_run_best_first(chip, chips, slices):
  run, machine = _preset("griffin", "1b"), machines.of_chips(chip, chips, num_slices=slices)
  found = search(run, machine)
  assert len(found) > 100
  assert {one.layout.zero_stage for one in found} == {1, 2, 3}
  assert {one.layout.remat for one in found} == {"none", "matmuls", "block"}
  for one in found:
    mesh = one.layout.mesh
    assert math.prod(mesh.sizes) == machine.num_devices
    assert mesh.data % slices == 0
    assert run.batch_size % (one.layout.num_microbatches * mesh.data * mesh.fsdp) == 0
    assert run.model.pattern[2].mixer.num_heads % mesh.tensor == 0
  assert [one.rank for one in found] == sorted(one.rank for one in found)
  assert found[0].margin >= SAFE_MARGIN
  best = min(one.roofline.expected_seconds for one in found if one.margin >= SAFE_MARGIN)
  assert found[0].roofline.expected_seconds == best
  # Those that do not divide it are left out, not refused.
  assert len(found) < sum(1 for _ in layouts(run, machine)) + 1
  assert evaluate(run, Layout(mesh=MeshShape(tensor=machine.num_devices)), machine) is None


def test_advice_changes_one_setting_and_makes_it_fit():
  machine = machines.of_topology("v5e:16x16")
  run = dataclasses.replace(_preset("griffin", "7b"), mesh=MeshShape(fsdp=32, tensor=8))
  assert not plans.modelled(run, machine).fits
  found = advice(run, machine)
  assert found
  assert all(after.margin >= SAFE_MARGIN for _, after in found)


def test_flags_say_the_layout():
  layout = Layout(mesh=MeshShape(data=2, tensor=4), zero_stage=1, remat="matmuls")
  assert layout_flags(layout) == (
    "--config.mesh.data=2 --config.mesh.tensor=4 --config.mesh.fsdp=1 --config.zero_stage=1 "
    "--config.model.remat=matmuls --config.num_microbatches=1"
  )


def test_the_page_is_whole_and_the_text_says_the_same():
  plan = _compiled_small()
  lines = plan_lines(plan, mfu=None, price=3.0)
  assert lines[0].startswith("FITS: transformer-100m on v5e:2x4")
  assert any(line.startswith("cost at 3 per chip-hour") for line in lines)
  whole = page(plan, mfu=None, price=3.0, notes=["a <note>"], train="train", command="plan")
  assert whole.count("<svg") == whole.count("</svg>") == 4
  assert "a &lt;note&gt;" in whole
  assert not any(outside in whole for outside in ("<script", "src=", "href=", "@import", "url("))


@pytest.mark.parametrize(
  ("arguments", "status", "words"),
  [
    (("--topology=v5e:4x4",), 0, "FITS: griffin-100m on v5e:4x4"),
    (("--topology=v5e:4x4", "--search"), 0, "the best layouts:"),
    (("--chip=v5e", "--chips=1", "--config.mesh.fsdp=1"), 1, "DOES NOT FIT: griffin-100m"),
    (("--topology=v5e:4x4", "--chips=16"), 2, "give either --topology"),
    (("--topology=v5e:4x4", "--bogus"), 2, "Unknown command line flag 'bogus"),
  ],
)
def test_the_exit_status_says_whether_it_fits(arguments, status, words, tmp_path):
  command = ["-m", "launch.plan", "--config=configs/griffin.py:100m", "--compile=0"]
  command += [f"--json={tmp_path}/plan.jsonl", f"--html={tmp_path}/plan.html", *arguments]
  done = subprocess.run(
    [sys.executable, *command], cwd=ROOT, capture_output=True, text=True, check=False
  )
  assert done.returncode == status, done.stderr
  assert words in done.stdout + done.stderr
  if status < 2:
    record = json.loads((tmp_path / "plan.jsonl").read_text())
    assert record["fits"] is (status == 0)
    assert record["command"].startswith("python -m launch.plan --config=configs/griffin.py:100m")
    assert (tmp_path / "plan.html").read_text().startswith("<!doctype html>")
