"""Machines that are not here: their sizes, their links, and the links of a mesh on them."""

import re

import numpy as np
import pytest

from sharding import gpu_targets
from sharding import machine as machines
from sharding.mesh import MeshShape, make_mesh
from sharding.topology import chip_named, chip_of


@pytest.mark.parametrize(
  ("machine", "chips", "devices", "words"),
  [
    (machines.of_topology("v5e:16x16"), 256, 256, "v5e:16x16"),
    (machines.of_topology("v5p:4x4x8", num_slices=2), 256, 256, "2 slices of v5p:4x4x8"),
    (machines.of_topology("v3:4x4"), 16, 32, "v3:4x4"),
    (machines.of_chips("v5p", 128), 128, 128, "v5p:4x4x8"),
    (machines.of_chips("v5e", 512, num_slices=2), 512, 512, "2 slices of v5e:16x16"),
    (machines.of_chips("h100", 16), 16, 16, "16 x H100 SXM"),
    (machines.of_chips("h100", 4), 4, 4, "4 x H100 SXM"),
    (machines.of_topology("a100-80gb:8"), 8, 8, "8 x A100 SXM 80GB"),
  ],
)
def test_a_machine_has_this_many_chips(machine, chips, devices, words):
  assert (machine.num_chips, machine.num_devices, str(machine)) == (chips, devices, words)


@pytest.mark.parametrize(
  ("make", "message"),
  [
    (lambda: machines.of_topology("v5e-16"), "is not CHIP:SIZE"),
    (lambda: machines.of_topology("v5e:4x4x4"), "a torus of 2 dimensions"),
    (lambda: machines.of_topology("v5e:0x4"), "'v5e:0x4': .* 2 dimensions, each at least 1"),
    (lambda: machines.of_topology("h100:2x8"), "has no torus; h100:16 are 16 in two nodes"),
    (lambda: machines.of_topology("v9:4x4"), "chip 'v9' is none of"),
    (lambda: machines.of_chips("v5e", 100), "100 chips in 1 slice.* no standard size"),
    (lambda: machines.of_chips("h100", 12), "are not whole nodes of 8"),
    (lambda: machines.of_chips("h100", 16, num_slices=2), "has none; nodes follow"),
    (lambda: machines.of_topology("v4:2x2x1", num_slices=2), "no source states its network"),
  ],
)
def test_what_is_no_machine_is_refused(make, message):
  with pytest.raises(ValueError, match=message):
    make()


def test_an_axis_has_the_links_of_the_dimensions_that_it_lies_on():
  pod, cubes = machines.of_topology("v5e:16x16"), machines.of_topology("v5p:4x4x8")
  # Both dimensions are whole rings of two links each.
  assert pod.links(MeshShape(fsdp=256))["fsdp"] == 4
  assert pod.links(MeshShape(fsdp=16, tensor=16)) | {} == {
    "data": 1.0,
    "fsdp": 2.0,
    "sequence": 1.0,
    "tensor": 2.0,
  }
  # A part of a dimension is a line; the rings in between share its links.
  shared = pod.links(MeshShape(fsdp=64, tensor=4))
  assert (shared["tensor"], shared["fsdp"]) == (1.0, 2.25)
  assert cubes.links(MeshShape(fsdp=128))["fsdp"] == 6
  # Smaller than a ring: lines.
  assert machines.of_topology("v5e:2x4").links(MeshShape(fsdp=8))["fsdp"] == 2
  assert machines.of_topology("v5p:2x4x4").links(MeshShape(fsdp=32))["fsdp"] == 3


def test_islands_are_crossed_by_data_first():
  machine = machines.of_chips("h100", 16)
  mesh = MeshShape(data=2, fsdp=4, tensor=2)
  for axes, islands in [(("data",), 2), (("fsdp",), 1), (("tensor",), 1), (("data", "fsdp"), 2)]:
    assert machine.islands(machines.positions(mesh, axes)) == islands


@pytest.mark.parametrize(
  ("machine", "shape"),
  [
    # Neither 128 nor 2 is a product of whole dimensions of 16.
    (machines.of_topology("v5e:16x16"), MeshShape(fsdp=128, tensor=2)),
    (machines.of_topology("v5p:4x4x8"), MeshShape(data=2, fsdp=16, tensor=4)),
    (machines.of_topology("v5e:4x4", num_slices=2), MeshShape(data=2, fsdp=8, tensor=2)),
  ],
  ids=str,
)
def test_a_mesh_is_laid_over_the_torus_and_slices_over_data(machine, shape):
  mesh = make_mesh(shape, devices=machine.devices())
  assert mesh.devices.shape == shape.sizes
  assert len({device.id for device in mesh.devices.flat}) == machine.num_devices
  # Neighbours along tensor are neighbours on the torus.
  first, second = (device.coords for device in mesh.devices[0, 0, 0, :2])
  assert np.abs(np.subtract(first, second)).sum() == 1
  slices = [getattr(device, "slice_index", None) or 0 for device in mesh.devices.flat]
  expected = [
    machine.islands([position]) and position // machine.island_devices
    for position in range(machine.num_devices)
  ]
  assert slices == expected


def test_what_cannot_be_compiled_for_says_why(monkeypatch):
  monkeypatch.setattr(machines, "_CUDA_PLUGINS", ("no_such_plugin",))
  h100 = machines.of_topology("h100:8")
  assert h100.uncompilable == "install the cuda extra to compile: pip install 'jax[cuda13]'"
  with pytest.raises(ValueError, match="8 x H100 SXM: install the cuda extra"):
    h100.devices()
  unknown = machines.of_topology("b200:8")
  assert unknown.uncompilable == "there is no description of B200 for the compiler"
  assert machines.of_topology("v5e:4x4").uncompilable is None


def test_every_gpu_that_is_described_to_the_compiler_is_a_chip():
  for key, target in gpu_targets.TARGETS.items():
    chip = chip_named(key)
    name = re.search(r'device_description_str: "(.*)"', target)[1]
    assert chip_of(name) == chip
    memory = int(re.search(r"device_memory_size: (\d+)", target)[1])
    assert memory == pytest.approx(chip.hbm_bytes, rel=0.08)
    bandwidth = int(re.search(r"memory_bandwidth: (\d+)", target)[1])
    assert bandwidth == pytest.approx(chip.hbm_bytes_per_second, rel=0.001)
