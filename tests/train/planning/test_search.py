"""What a search says about a run that does not fit a machine, or that is no valid run."""

import dataclasses
import pathlib

import pytest

from launch.overrides import load
from sharding import machine as machines
from sharding.mesh import MeshShape
from train.planning import plan as plans
from train.planning.search import check_row_shards, search

ROOT = pathlib.Path(__file__).parents[3]


def _hawk(size):
  return load(f"{ROOT}/configs/hawk.py:{size}")


def test_of_layouts_that_do_not_fit_the_smallest_comes_first():
  found = search(_hawk("3b"), machines.of_chips("v5e", 1))
  assert all(one.margin < 0 for one in found)
  assert [one.bytes for one in found] == sorted(one.bytes for one in found)


@pytest.mark.parametrize(
  ("sequence", "row_length", "message"),
  [
    (3, 2048, "mesh.sequence 3 does not divide the 8 devices of 8 x H100 SXM"),
    (8, 2044, "row_length 2044 is not divisible by the 8 devices of the mesh axis sequence"),
    (8, 16, "leaves 2 tokens to each, fewer than the 3"),
  ],
)
def test_a_search_refuses_what_rows_cannot_be_split_into(sequence, row_length, message):
  run, machine = _hawk("100m"), machines.of_chips("h100", 8)
  check_row_shards(run, machine)
  data = dataclasses.replace(run.data, row_length=row_length)
  run = dataclasses.replace(run, data=data, mesh=MeshShape(sequence=sequence))
  with pytest.raises(ValueError, match=message):
    check_row_shards(run, machine)
  assert search(run, machine) == []


def test_a_plan_refuses_the_schedule_that_training_refuses():
  run = dataclasses.replace(_hawk("100m"), total_steps=12)
  machine = machines.of_chips("v5e", 8)
  with pytest.raises(ValueError, match=r"warmup_steps \d+ is more than total_steps 12"):
    plans.modelled(run, machine)
  plans.modelled(
    dataclasses.replace(run, optimizer=dataclasses.replace(run.optimizer, warmup_steps=12)), machine
  )
