"""The roofline's expectation beside published measurements, and its record in docs."""

import json

import pytest

from launch import published
from tests.train.planning.test_plan import ROOT

_ON_TPU = [one for one in published.UTILISATIONS if one.chip.startswith("v")]


def _recorded():
  lines = (ROOT / "docs/published.jsonl").read_text().splitlines()
  return {one["what"]: one for one in map(json.loads, lines)}


@pytest.mark.parametrize("one", _ON_TPU, ids=lambda one: one.what)
def test_a_step_on_tpu_is_expected_within_a_sixth_and_the_record_says_so(one):
  """Of models that fill a chip; the roofline does not know what small ones lose on GPUs, between
  their many small operations. If the record is another: launch/published.py has the command."""
  (found,) = published.utilisations((one,))
  error = found["expected"] / found["published"] - 1
  assert abs(error) < 1 / 6
  recorded = _recorded()[one.what]
  assert recorded["expected"] == pytest.approx(found["expected"], rel=1e-6)
  assert recorded["error"] == pytest.approx(error)


def test_the_record_has_every_published_time_and_its_error():
  recorded = _recorded()
  times = [one for one in recorded.values() if one["kind"] == "time of a step"]
  assert {one.what for one in published.UTILISATIONS} == set(recorded) - {t["what"] for t in times}
  wanted = [seconds for one in published._STEP_TIMES for seconds in one.times.values()]
  assert [one["published"] for one in times] == wanted
  for one in recorded.values():
    assert one["error"] == pytest.approx(one["expected"] / one["published"] - 1)
  assert max(abs(one["error"]) for one in times) < 1 / 6
