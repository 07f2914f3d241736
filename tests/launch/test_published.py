"""The roofline's expectation beside published times of steps, as recorded in docs."""

import json
import re

import pytest

from launch import published
from tests.train.planning.test_plan import ROOT


def _recorded():
  return [json.loads(line) for line in (ROOT / "docs/published.jsonl").read_text().splitlines()]


def test_steps_on_tpu_were_expected_within_a_sixth():
  """Of models that fill a chip; what small ones lose between their many small operations, on GPUs,
  the roofline does not know."""
  on_tpu = [one for one in _recorded() if re.search("v[356]", one["what"])]
  assert len(on_tpu) == 14
  assert max(abs(one["error"]) for one in on_tpu) < 1 / 6


def test_the_record_is_what_the_command_computes():
  first = published.utilisations(published.UTILISATIONS[-1:])[0]
  (recorded,) = [one for one in _recorded() if one["what"] == first["what"]]
  assert first["expected"] == pytest.approx(recorded["expected"], rel=1e-6)
  assert recorded["error"] == pytest.approx(first["expected"] / first["published"] - 1)
