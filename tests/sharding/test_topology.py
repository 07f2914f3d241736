"""Chips are found by the names that JAX gives them, and unknown ones are not guessed."""

import dataclasses

import pytest

from sharding import topology


@pytest.mark.parametrize(
  ("device_kind", "name", "peak_tflops"),
  [
    ("TPU v3", "TPU v3 core", 61.5),
    ("TPU v4", "TPU v4", 275),
    ("TPU v5 lite", "TPU v5e", 197),
    ("TPU v5e", "TPU v5e", 197),
    ("TPU v5", "TPU v5p", 459),
    ("TPU v5p", "TPU v5p", 459),
    ("TPU v6 lite", "TPU v6e", 918),
    ("NVIDIA A100-SXM4-40GB", "A100 SXM 40GB", 312),
    ("NVIDIA A100-SXM4-80GB", "A100 SXM 80GB", 312),
    ("NVIDIA H100 80GB HBM3", "H100 SXM", 989.5),
    ("NVIDIA H200", "H200 SXM", 989.5),
    ("NVIDIA B200", "B200", 2250),
  ],
)
def test_chips_are_found_by_the_kind_of_their_devices(device_kind, name, peak_tflops):
  chip = topology.chip_of(device_kind)
  assert chip is not None
  assert chip.name == name
  assert chip.peak_flops == peak_tflops * 1e12
  assert chip.source
  reached = dataclasses.asdict(chip.reached)
  assert reached.pop("source")
  relayout = reached.pop("relayout")
  assert relayout is None or 0.1 < relayout < reached["hbm"]
  assert all(0.1 < share < 1.0 for share in reached.values())
  # A number in the wrong unit would lie far outside of these.
  assert 15e9 < chip.hbm_bytes < 1e12
  assert 4e11 < chip.hbm_bytes_per_second < 1e13
  assert 2e11 < chip.interconnect_bytes_per_second < 2e12
  assert 50 < chip.peak_flops / chip.hbm_bytes_per_second < 600


@pytest.mark.parametrize("device_kind", ["cpu", "TPU v4 lite", "TPU v50", "NVIDIA H100", ""])
def test_unknown_chips_have_no_limits(device_kind):
  assert topology.chip_of(device_kind) is None
