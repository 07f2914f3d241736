"""Tokens/s of the families over row length, by the planner's models."""

import json
import types

import pytest

from launch import families, row_lengths
from launch.overrides import load
from sharding import machine as machines
from sharding import topology
from sharding.mesh import MeshShape
from tests import drawn, tiny
from tests.train.planning.test_plan import ROOT
from train import program as programs
from train.drawing import colors
from train.planning import plan as plans


def _tokens_per_second(family, row_length):
  run = load(f"{ROOT}/configs/{family}.py:1b")
  machine = machines.of_chips("v5p", 16)
  run = families.with_rows(
    run, num_devices=machine.num_devices, row_length=row_length, tokens_per_chip=16384
  )
  layout = families.best_layout(run, machine)
  return row_lengths.result(plans.modelled(layout.of(run), machine))


def test_rows_cost_a_transformer_and_not_a_recurrence():
  transformer, hawk = (
    [_tokens_per_second(family, length)["tokens_per_second"] for length in (2048, 16384)]
    for family in ("transformer", "hawk")
  )
  assert transformer[1] < 0.7 * transformer[0]
  assert hawk[1] == pytest.approx(hawk[0], rel=0.01)


def _flags(monkeypatch, **values):
  for name, value in values.items():
    monkeypatch.setattr(row_lengths, f"_{name.upper()}", types.SimpleNamespace(value=value))


@pytest.mark.parametrize("remat", [None, "none"])
def test_blocks_are_a_loop_unless_unrolled_ones_are_asked_for(monkeypatch, remat):
  _flags(monkeypatch, size="100m", tokens=16384, compile=False, remat=remat)
  for layers in ("scan", "unroll"):
    _flags(monkeypatch, layers=layers)
    (plan,) = row_lengths._plans("hawk", machines.of_chips("v5p", 4), 2048)
    assert plan.run.model.layers == layers


@pytest.mark.parametrize("line", ["# Results", '{"fits": true}', "[1]"])
def test_nothing_is_added_to_a_file_of_something_else(monkeypatch, tmp_path, capsys, line):
  path = tmp_path / "results.jsonl"
  known = (ROOT / "docs" / "row_lengths.jsonl").read_text().splitlines()[0]
  path.write_text(f"{known}\n{line}\n")
  _flags(monkeypatch, json=str(path), machine=["v5p:4"], rows=["2048"], families=["hawk"])
  _flags(monkeypatch, measure=False, recorded=False)
  monkeypatch.setattr(row_lengths, "check_output", lambda name: None)
  monkeypatch.setattr(row_lengths, "_compare", None)  # it is refused before any work
  with pytest.raises(SystemExit) as left:
    row_lengths.main(["row_lengths"])
  assert left.value.code == 2
  assert f"--json={path}: line 2 is no result of this command" in capsys.readouterr().err


def test_rows_that_do_not_divide_the_batch_are_refused():
  with pytest.raises(ValueError, match="no whole number of rows of 3000"):
    _tokens_per_second("hawk", 3000)


def test_a_step_that_ran_here_is_recorded_with_what_it_ran_on(tmp_path, monkeypatch):
  run = tiny.run(tmp_path, mesh=MeshShape(fsdp=8))
  program = programs.build(run)
  compiled = programs.compile_step(program, programs.lower_train_step(program))
  found = row_lengths.measured(program, compiled, 1.5, steps=3)
  seconds = found["step_seconds"]
  assert seconds["min"] <= seconds["median"] <= seconds["max"]
  assert found["tokens_per_second"] == pytest.approx(8 * 16 / seconds["median"])
  assert found["how"] == "measured"
  assert found["machine"] == "8 x cpu"
  assert found["mfu"] is None  # of a CPU no peak is known
  assert found["mesh"]["fsdp"] == 8
  assert found["loss"] > 0
  chip = topology.chip_named("v5e")
  monkeypatch.setattr(topology, "chip_of", lambda device_kind: chip)
  again = row_lengths.measured(program, compiled, 1.5, steps=1)
  reached = again["train_flops_per_token"] * again["tokens_per_second"]
  assert again["mfu"] == pytest.approx(reached / (8 * chip.peak_flops))


def test_what_the_readme_shows_of_an_h100_is_drawn_from_what_was_recorded():
  lines = (ROOT / "docs" / "row_lengths.jsonl").read_text().splitlines()
  results = [json.loads(line) for line in lines]
  machine = "1 x H100 SXM"
  wanted = [one for one in results if one["machine"] == machine and one["config"].endswith("-1b")]
  # Blocks in a loop, and unrolled on two days: the picture shows the last.
  layers = [one["layers"] for one in wanted if one["how"] == "measured"]
  assert layers == 12 * ["scan"] + 24 * ["unroll"]
  picture = row_lengths.picture(wanted, f"1b on {machine}")
  assert (ROOT / "docs" / "row_lengths_h100.svg").read_text() == picture + "\n"


def test_the_picture_has_a_line_for_each_family_in_its_color():
  lines = (ROOT / "docs" / "row_lengths.jsonl").read_text().splitlines()
  results = [json.loads(line) for line in lines]
  svg = row_lengths.picture([one for one in results if one["machine"] == "v5p:2x2x1"], "1b")
  words = drawn.words(svg)
  assert {"Tokens per second over row length: 1b", "tokens in a row", "tokens per second"} <= set(
    words
  )
  for family in ("transformer", "hawk", "griffin"):
    for word in (family, f"{family}, compiler's"):
      assert drawn.color_of(svg, word) == colors.of_family(family).color
  tooltips = dict(words.split("\n", 1) for *_, words in drawn.tooltips(svg))
  assert tooltips.keys() == {
    f"tokens in a row: {row}" for row in ("2,048", "4,096", "8,192", "16,384")
  }
  (griffin,) = [
    one["tokens_per_second"]
    for one in results
    if (one["machine"], one["config"], one["how"]) == ("v5p:2x2x1", "griffin-1b", "compiled")
    and one["row_length"] == 8192
  ][-1:]
  assert f"griffin, compiled: {griffin:,.0f}" in tooltips["tokens in a row: 8,192"]


def test_a_picture_is_drawn_again_from_what_was_recorded(monkeypatch, tmp_path, capsys):
  recorded, path = ROOT / "docs" / "row_lengths.jsonl", tmp_path / "again.svg"
  before = recorded.read_bytes()
  _flags(monkeypatch, measure=False, recorded=True, machine=["h100:1"], size="1b")
  _flags(monkeypatch, json=str(recorded), svg=str(path), rows=["2048"], families=["hawk"])
  monkeypatch.setattr(row_lengths, "check_output", lambda name: None)
  row_lengths.main(["row_lengths"])
  assert path.read_bytes() == (ROOT / "docs" / "row_lengths_h100.svg").read_bytes()
  assert recorded.read_bytes() == before
  _flags(monkeypatch, json=None)
  with pytest.raises(SystemExit):
    row_lengths.main(["row_lengths"])
  assert "--recorded draws --svg from --json: name both" in capsys.readouterr().err
  _flags(monkeypatch, json=str(recorded), machine=["v5p:16"])
  with pytest.raises(SystemExit):
    row_lengths.main(["row_lengths"])
  assert "no result of 1b on v5p" in capsys.readouterr().err
