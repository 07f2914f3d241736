"""Tokens/s of the families over row length, by the planner's models."""

import json

import pytest

from launch import families, row_lengths
from launch.overrides import load
from sharding import machine as machines
from tests.test_plan import ROOT
from train import plan as plans


def _tokens_per_second(family, row_length):
  run = load(f"{ROOT}/configs/{family}.py:1b")
  machine = machines.of_chips("v5p", 16)
  run = families.with_rows(run, machine, row_length=row_length, tokens_per_chip=16384)
  layout = families.best_layout(run, machine)
  return row_lengths.result(plans.modelled(layout.of(run), machine))


def test_rows_cost_a_transformer_and_not_a_recurrence():
  transformer, hawk = (
    [_tokens_per_second(family, length)["tokens_per_second"] for length in (2048, 16384)]
    for family in ("transformer", "hawk")
  )
  assert transformer[1] < 0.7 * transformer[0]
  assert hawk[1] == pytest.approx(hawk[0], rel=0.01)


def test_rows_that_do_not_divide_the_batch_are_refused():
  with pytest.raises(ValueError, match="no whole number of rows of 3000"):
    _tokens_per_second("hawk", 3000)


def test_the_picture_has_a_line_for_each_family():
  lines = (ROOT / "docs" / "row_lengths.jsonl").read_text().splitlines()
  results = [json.loads(line) for line in lines]
  drawn = row_lengths.picture([one for one in results if one["machine"] == "v5p:2x2x1"], "1b")
  assert all(f">{family}<" in drawn for family in families.FAMILIES)
  assert drawn.count("<svg") == 1
