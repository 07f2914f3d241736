"""What a plan says: presets fit as recommended, models agree with the compiler, exit statuses."""

import dataclasses
import functools
import json
import math
import pathlib

import jax
import pytest

from launch.overrides import load
from launch.pages.plan_page import page
from launch.pages.plan_text import layout_flags, plan_lines
from models.flops import flops_per_token
from models.transformer import mqa_transformer
from sharding import machine as machines
from sharding.mesh import MeshShape
from sharding.topology import chip_named
from tests import drawn
from train.planning import plan as plans
from train.planning.layouts import Layout
from train.planning.roofline import Executed, roofline, transfer
from train.planning.search import SAFE_MARGIN, advice, evaluate, layouts, search
from train.planning.traffic import hbm_bytes

ROOT = pathlib.Path(__file__).parents[3]


@functools.cache
def _preset(family, size):
  return load(f"{ROOT}/configs/{family}.py:{size}")


@functools.cache
def _small():
  """The smallest program that is wide enough not to fit into a chip's cache; it compiles in half a
  minute."""
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


# One worker for all that use it.
_compiles_small = pytest.mark.xdist_group("compiled_small")


@functools.cache
def _compiled_small():
  machine = machines.of_topology("v5e:2x4")
  run = dataclasses.replace(_small(), mesh=MeshShape(fsdp=4, tensor=2))
  return plans.compiled(run, machine)


@_compiles_small
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


@_compiles_small
def test_the_compiled_step_executes_what_the_models_say():
  plan = _compiled_small()
  assert plan.program is not None
  total = plan.program.total
  tokens = plan.tokens_per_step / plan.machine.num_devices
  # Attention's kernels visit whole blocks: more keys than queries see.
  assert 1.0 <= total.flops / (plan.executed_flops * tokens) < 1.06
  assert 0.5 < total.bytes / plan.hbm.total < 1.5
  parts = plan.program.parts
  assert {"mlp", "attention", "loss", "stack", "rest"} <= parts.keys()
  assert parts["mlp"].flops == pytest.approx(3 * plan.flops["mlp"] * tokens, rel=0.02)
  # Rates that are reached are below the peaks, and the compiler expects no better.
  assert plan.program.expected_seconds > total.flops / plan.chip.peak_flops
  assert plan.program.estimated_seconds > plan.program.expected_seconds
  written = "\n".join(plan_lines(plan, mfu=None, price=None))
  assert "the compiled step by part" in written
  assert json.loads(json.dumps(plan.program.as_json()))["flops"] == total.flops


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


def test_a_roofline_counts_all_that_is_executed():
  machine = machines.of_chips("h100", 1)
  chip, reached = machine.chip, machine.chip.reached
  found = roofline(
    flops=flops_per_token(_small().model, 2048),
    executed=Executed(2e9, attention_forward=1e9, attention_backward=3e9, visited=1.5),
    tokens_per_device=100,
    hbm_bytes=5e9,
    relayout_bytes=0.0,
    transfers=(),
    machine=machine,
  )
  assert found.compute == pytest.approx(100 * 6e9 / chip.peak_flops)
  at_peak = 2 / reached.matmul + 1.5 * (
    1 / reached.attention_forward + 3 / reached.attention_backward
  )
  assert found.compute_reached == pytest.approx(100e9 * at_peak / chip.peak_flops)
  assert found.hbm_reached == pytest.approx(5e9 / chip.hbm_bytes_per_second / reached.hbm)
  assert found.relayout_reached == 0
  times = (found.compute_reached, found.hbm_reached)
  assert found.expected_seconds == pytest.approx((max(times) + sum(times)) / 2)


def test_weights_that_fill_no_tiles_are_copied():
  """20 of 5120 rows on each of 256 chips, where a tile has 8; the compiled step of griffin-14b on
  v5e:16x16 has such copies, by the compiler a quarter of its time."""
  run, machine = _preset("griffin", "14b"), machines.of_topology("v5e:16x16")

  def of(**settings):
    found = evaluate(run, Layout(num_microbatches=2, **settings), machine)
    assert found is not None
    planned = found.layout.of(run)
    return hbm_bytes(planned, found.layout.mesh, chip=machine.chip), found.roofline

  whole, faster = of(mesh=MeshShape(data=2, fsdp=128))
  broken, slower = of(mesh=MeshShape(fsdp=256))
  assert whole.relayouts == 0
  # Of each microbatch, forward and backward: 14 billion weights of 2 bytes, read and written.
  assert broken.relayouts == pytest.approx(2 * 2 * 2 * 2 * 14e9, rel=0.05)
  assert broken.total - broken.relayouts == pytest.approx(whole.total, rel=0.05)
  assert faster.relayout_reached == 0
  assert slower.hbm_reached == pytest.approx(faster.hbm_reached, rel=0.01)
  assert slower.expected_seconds > 1.15 * faster.expected_seconds
  best = search(run, machine)[0].layout.mesh
  assert run.model.width % (8 * best.fsdp) == 0
  # Arrays on GPUs have no tiles, and at ZeRO stage 2 nothing is gathered for a microbatch.
  assert hbm_bytes(run, MeshShape(fsdp=256), chip=chip_named("h100")).relayouts == 0
  assert of(mesh=MeshShape(fsdp=256), zero_stage=2)[0].relayouts == 0


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


def test_a_search_splits_long_rows_alone():
  run, machine = _preset("griffin", "400m"), machines.of_chips("v5e", 32)
  assert {one.layout.mesh.sequence for one in search(run, machine)} == {1}
  data = dataclasses.replace(run.data, row_length=65536)
  found = search(dataclasses.replace(run, data=data, batch_size=4), machine)
  # A shard of 4096 tokens is the shortest.
  assert {one.layout.mesh.sequence for one in found} == {2, 4, 8, 16}
  # Four whole rows leave chips idle: heads and gate blocks are not split into eight.
  assert found[0].layout.mesh.sequence > 1


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


@_compiles_small
def test_the_page_is_whole_and_the_text_says_the_same():
  plan = _compiled_small()
  lines = plan_lines(plan, mfu=None, price=3.0)
  assert lines[0].startswith("FITS: transformer-100m on v5e:2x4")
  assert any(line.startswith("cost at 3 per chip-hour") for line in lines)
  whole = page(plan, mfu=None, price=3.0, notes=["a <note>"], train="train", command="plan")
  assert whole.count("<svg") == whole.count("</svg>") == 4
  assert "a &lt;note&gt;" in whole
  assert not drawn.outside(whole)


@pytest.mark.parametrize(
  ("arguments", "status", "words"),
  [
    (("--topology=v5e:4x4",), 0, "FITS: griffin-100m on v5e:4x4"),
    (("--topology=v5e:4x4", "--search"), 0, "the best layouts:"),
    (("--chip=v5e", "--chips=1", "--config.mesh.fsdp=1"), 1, "DOES NOT FIT: griffin-100m"),
    (("--topology=v5e:4x4", "--chips=16"), 2, "give either --topology"),
    (("--topology=v5e:4x4", "--mfu=40"), 2, "flag --mfu=40: 40.0 is not a number in the range"),
    (("--topology=v5e:4x4", "--bogus"), 2, "Unknown command line flag 'bogus"),
    (("--topology=v5e:4x4", "--mesh=fsdp=8,tensor=2"), 0, "mesh fsdp 8 x tensor 2,"),
    (("--chip=v5e", "--chips=16", "--mesh=fsdp=-1"), 0, "mesh fsdp 16,"),
    (("--topology=v5e:4x4", "--slices=2", "--mesh=data=2,fsdp=-1"), 0, "mesh data 2 x fsdp 16,"),
    (
      ("--topology=v5e:4x4", "--slices=2", "--mesh=fsdp=32"),
      2,
      "slices lie over data: set it to 2",
    ),
    (("--topology=v5e:4x4", "--json=runs/none/plan.json"), 2, "there is no folder 'runs/none'"),
    (("--topology=v5e:4x4", "--html=docs"), 2, "--html=docs is a folder"),
    (("--topology=v5e:4x4", "--mesh=fsdp=8"), 2, "= 8 is not the number of devices 16"),
    (("--topology=v5e:4x4", "--mesh=fsdp=8,model=2"), 2, "axis 'model' is none of data, fsdp"),
    (("--topology=v5e:4x4", "--mesh=fsdp=16", "--search"), 2, "--mesh says which mesh, --search"),
    (("--topology=v5e:4x4", "--mesh=fsdp=16", "--config.mesh.tensor=2"), 2, "both say the mesh"),
  ],
)
def test_the_exit_status_says_whether_it_fits(arguments, status, words, tmp_path, commands):
  command = ["--config=configs/griffin.py:100m", "--compile=0", f"--json={tmp_path}/plan.jsonl"]
  command += [f"--html={tmp_path}/plan.html", *arguments]
  done, said = commands.run("launch.plan", command, tmp_path / "output")
  assert done == status, said
  assert words in said
  if status < 2:
    record = json.loads((tmp_path / "plan.jsonl").read_text())
    assert record["fits"] is (status == 0)
    assert record["command"].startswith("python -m launch.plan --config=configs/griffin.py:100m")
    assert (tmp_path / "plan.html").read_text().startswith("<!doctype html>")


def test_gpus_are_modelled_where_nothing_compiles_for_them_and_the_plan_says_why(monkeypatch):
  monkeypatch.setattr(machines, "_CUDA_PLUGINS", ("no_such_plugin",))
  plan = plans.modelled(
    dataclasses.replace(_small(), mesh=MeshShape(fsdp=8)), machines.of_topology("h100:8")
  )
  lines = plan_lines(plan, mfu=None, price=None)
  assert "  by the model; not compiled: install the cuda extra to compile: " in "\n".join(lines)
