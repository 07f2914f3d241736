"""Mesh shapes: -1 is replaced, wrong ones are refused with numbers; slices lie over data."""

import dataclasses
import re
import types

import jax
import numpy as np
import pytest

from sharding.mesh import AXES, MeshShape, RowShare, make_mesh, parse_mesh, row_share


def test_the_axes_are_in_this_order_and_auto():
  mesh = make_mesh(MeshShape(data=2, fsdp=2, tensor=2))
  assert mesh.axis_names == AXES == ("data", "fsdp", "sequence", "tensor")
  assert mesh.devices.shape == (2, 2, 1, 2)
  assert mesh.axis_types == (jax.sharding.AxisType.Auto,) * 4
  assert [device.id for device in mesh.devices.flat] == list(range(8))


@pytest.mark.parametrize(
  ("shape", "sizes"),
  [
    (MeshShape(data=-1), (8, 1, 1, 1)),
    (MeshShape(fsdp=-1, tensor=2), (1, 4, 1, 2)),
    (MeshShape(data=2, fsdp=4, tensor=-1), (2, 4, 1, 1)),
    (MeshShape(tensor=8), (1, 1, 1, 8)),
    (MeshShape(fsdp=2, sequence=-1, tensor=2), (1, 2, 2, 2)),
  ],
)
def test_minus_one_takes_the_rest(shape, sizes):
  assert shape.resolved(8).sizes == sizes
  assert make_mesh(shape).devices.shape == sizes


@pytest.mark.parametrize(
  ("text", "sizes"),
  [
    ("data=1,fsdp=16,tensor=4", (1, 16, 1, 4)),
    ("tensor=2", (1, 1, 1, 2)),
    ("sequence=8, fsdp=-1", (1, -1, 8, 1)),
  ],
)
def test_a_mesh_is_said_in_words(text, sizes):
  assert parse_mesh(text).sizes == sizes


@pytest.mark.parametrize(
  ("text", "message"),
  [
    ("fsdp:16", "mesh 'fsdp:16': 'fsdp:16' is not AXIS=SIZE, as in data=2,fsdp=-1,tensor=4"),
    ("fsdp=", "'fsdp=' is not AXIS=SIZE"),
    ("fsdp=16,", "'' is not AXIS=SIZE"),
    ("fsdp=16,model=4", "axis 'model' is none of data, fsdp, sequence, tensor"),
    ("fsdp=4,fsdp=2", "axis fsdp is given twice"),
    ("fsdp=0", "fsdp 0 must be at least 1, or -1 for the rest"),
    ("data=-1,fsdp=-1", "only one axis can take the rest"),
  ],
)
def test_words_that_are_no_mesh_are_refused(text, message):
  with pytest.raises(ValueError, match=re.escape(message)):
    parse_mesh(text)


def test_a_mesh_can_be_made_of_some_devices():
  mesh = make_mesh(MeshShape(fsdp=2), devices=jax.devices()[4:6])
  assert [device.id for device in mesh.devices.flat] == [4, 5]


@pytest.mark.parametrize(
  ("shape", "message"),
  [
    (MeshShape(), r"data 1 x fsdp 1 x sequence 1 x tensor 1 = 1 is not the number of devices 8"),
    (MeshShape(data=2, fsdp=3), r"= 6 is not the number of devices 8"),
    (MeshShape(data=16), r"= 16 is not the number of devices 8"),
    (MeshShape(data=-1, tensor=3), r"fsdp 1 x sequence 1 x tensor 3 = 3 does not divide.* 8"),
  ],
)
def test_a_shape_that_does_not_use_all_devices_is_an_error_with_the_numbers(shape, message):
  with pytest.raises(ValueError, match=message):
    make_mesh(shape)


@pytest.mark.parametrize(
  ("sizes", "message"),
  [
    ({"data": 0}, "data 0 must be at least 1"),
    ({"tensor": -2}, "tensor -2 must be at least 1"),
    ({"data": -1, "fsdp": -1}, "more than one -1"),
    ({"sequence": 0}, "sequence 0 must be at least 1"),
    ({"sequence": -1, "tensor": -1}, "more than one -1"),
  ],
)
def test_impossible_shapes_are_refused(sizes, message):
  with pytest.raises(ValueError, match=message):
    MeshShape(**sizes)


@dataclasses.dataclass(frozen=True)
class _Device:
  """The attributes of a device of a multi-slice TPU job that mesh_utils reads."""

  id: int
  slice_index: int
  process_index: int
  platform: str = "tpu"
  device_kind: str = "TPU v5 lite"
  core_on_chip: int = 0

  @property
  def coords(self) -> tuple[int, int, int]:
    return (self.id % 2, self.id // 2 % 2, 0)


def _slices(number: int) -> list[_Device]:
  return [_Device(i, slice_index=i // 4, process_index=i // 4) for i in range(4 * number)]


@pytest.mark.parametrize("shape", [MeshShape(data=4, tensor=2), MeshShape(data=2, fsdp=4)])
def test_slices_lie_over_data(shape, monkeypatch):
  made = []
  monkeypatch.setattr(
    jax.sharding, "Mesh", lambda array, *unused, **types: made.append(array) or array
  )
  make_mesh(shape, devices=_slices(2))
  (array,) = made
  assert array.shape == shape.sizes
  for slice_index, half in enumerate((array[: shape.data // 2], array[shape.data // 2 :])):
    assert {device.slice_index for device in half.flat} == {slice_index}


@dataclasses.dataclass(frozen=True)
class _PodDevice(_Device):
  """A chip of a v5e-256."""

  @property
  def coords(self) -> tuple[int, int, int]:
    return (self.id % 16, self.id // 16, 0)


def test_a_mesh_need_not_be_made_of_whole_axes_of_the_torus(monkeypatch):
  made = []
  monkeypatch.setattr(
    jax.sharding, "Mesh", lambda array, *unused, **types: made.append(array) or array
  )
  monkeypatch.setattr(jax, "device_count", lambda: 256)
  devices = [_PodDevice(i, slice_index=0, process_index=i // 4) for i in range(256)]
  make_mesh(MeshShape(fsdp=4, sequence=64), devices=devices)
  (array,) = made
  assert array.shape == (1, 4, 64, 1)
  assert {device.id for device in array.flat} == set(range(256))


def test_data_that_the_slices_do_not_divide_is_an_error():
  with pytest.raises(ValueError, match="data 3 is not divisible by the number of slices 2"):
    make_mesh(MeshShape(data=3, tensor=4), devices=_slices(3)[:8] + _slices(2)[4:])


def _owned(shape, process_of):
  """An array like mesh.devices, in which device i belongs to process `process_of(i)`."""
  devices = np.empty(np.prod(shape), object)
  for i in range(devices.size):
    devices[i] = types.SimpleNamespace(process_index=process_of(i))
  return devices.reshape(shape)


@pytest.mark.parametrize(
  ("shape", "process_of", "shares"),
  [
    # One process; a process for each row shard, for two of them, and two of another order.
    ((2, 2, 2, 1), lambda i: 0, [(0, 1, (0, 1, 2, 3))]),
    ((2, 1, 2, 2), lambda i: i // 4, [(0, 2, (0,)), (1, 2, (1,))]),
    ((2, 2, 1, 2), lambda i: i // 4, [(0, 2, (0, 1)), (1, 2, (2, 3))]),
    ((4, 1, 1, 1), lambda i: i % 2, [(0, 2, (0, 2)), (1, 2, (1, 3))]),
    # Rows split over processes: those of the same rows read the same ones.
    ((1, 2, 4, 1), lambda i: i // 2, [(0, 2, (0,)), (0, 2, (0,)), (1, 2, (1,)), (1, 2, (1,))]),
    ((1, 1, 8, 1), lambda i: i // 4, [(0, 1, (0,)), (0, 1, (0,))]),
    ((2, 1, 2, 2), lambda i: i // 2, [(0, 2, (0,)), (0, 2, (0,)), (1, 2, (1,)), (1, 2, (1,))]),
  ],
)
def test_processes_that_share_rows_read_the_same_ones(shape, process_of, shares):
  devices = _owned(shape, process_of)
  for process, expected in enumerate(shares):
    assert row_share(devices, process) == RowShare(*expected)


def test_rows_that_processes_share_in_part_are_an_error():
  with pytest.raises(ValueError, match=r"fsdp 3 x sequence 2.*\{0: \(0, 1\), 1: \(1, 2\)\}"):
    row_share(_owned((1, 3, 2, 1), lambda i: i // 3), 0)
