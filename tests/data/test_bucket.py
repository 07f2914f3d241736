"""Checkpoints in a bucket, with a Cloud Storage on this machine."""

import re
import time

import jax
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from data import bucket
from tests import checkpoint_process
from tests.fake_gcs import _Handler, serving
from tests.train.checkpoint.test_checkpoint_processes import two_processes
from train.checkpoint.bucket import BucketFolder, BucketWriter
from train.checkpoint.checkpoints import CheckpointConfig, Checkpoints, SaveFailedError
from train.checkpoint.content import DamagedCheckpointError
from train.checkpoint.reading import restore
from train.checkpoint.storage import steps
from train.workdir import bucket_lock

URL = "gs://bucket/run"
PLACE = f"{URL}/checkpoints"


@pytest.fixture(scope="module")
def server():
  with serving() as server, pytest.MonkeyPatch.context() as patch:
    patch.setattr(bucket_lock, "HEARTBEAT_SECONDS", 0.1)
    yield server


@pytest.fixture(autouse=True)
def empty(server):
  server.refuse = None
  server.objects.clear()


def _mesh(a: int, b: int):
  devices = np.array(jax.devices()[: a * b]).reshape(a, b)
  return jax.sharding.Mesh(devices, ("a", "b"), axis_types=(AxisType.Auto,) * 2)


def _state(step: int, mesh):
  rng = np.random.default_rng(step)
  arrays = {
    "step": (np.int32(step), PartitionSpec()),
    "w_DF": (rng.normal(size=(8, 16)).astype(np.float32), PartitionSpec("a", "b")),
    "b_F": (jax.numpy.asarray(rng.normal(size=16), jax.numpy.bfloat16), PartitionSpec("b")),
  }
  return {name: jax.device_put(x, NamedSharding(mesh, spec)) for name, (x, spec) in arrays.items()}


def _abstract(mesh):
  return jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), _state(0, mesh)
  )


def _write(*saved: int, **settings) -> None:
  with Checkpoints(PLACE, CheckpointConfig(**settings)) as checkpoints:
    for step in saved:
      checkpoints.save(step, _state(step, _mesh(4, 2)), {"seed": step}, kind="permanent")
      checkpoints.wait()


def test_a_checkpoint_is_the_same_on_any_mesh():
  _write(3, 7)
  assert steps(PLACE) == [3, 7]
  for mesh in (_mesh(4, 2), _mesh(2, 1), _mesh(1, 4)):
    restored = restore(PLACE, 7, _abstract(mesh))
    assert restored.record == {"seed": 7}
    for name, x in _state(7, mesh).items():
      assert restored.state[name].sharding == x.sharding
      np.testing.assert_array_equal(np.asarray(restored.state[name]), np.asarray(x))


def test_a_part_is_restored_without_reading_the_rest(server):
  """What a command that does not train restores: only parameters, the moments may be missing."""
  mesh = _mesh(4, 2)
  state = {"params": _state(5, mesh), "moments": _state(6, mesh)}
  with Checkpoints(PLACE, CheckpointConfig()) as checkpoints:
    checkpoints.save(5, state, {}, kind="permanent")
  for name in server.names("run/checkpoints_arrays/"):
    if "/moments/" in name:
      del server.objects["bucket", name]
  restored = restore(PLACE, 5, _abstract(mesh), part="params")
  for name, x in state["params"].items():
    np.testing.assert_array_equal(np.asarray(restored.state[name]), np.asarray(x))


def test_what_is_superfluous_goes_with_its_arrays(server):
  _write(1, 2, 3, keep_permanent=1)
  assert steps(PLACE) == [3]
  (kept,) = {name.split("/")[2] for name in server.names("run/checkpoints_arrays/")}
  assert kept.startswith("00000003-")
  assert server.names("run/checkpoints/") == ["run/checkpoints/00000003.json"]


def test_an_interrupted_save_is_no_checkpoint_and_leaves_nothing(server):
  _write(1)
  before = server.names()
  server.refuse = "checkpoints/00000002.json"  # all arrays are there, the record is not
  with pytest.raises(SaveFailedError, match="The last complete one is that of step 1"):
    _write(2)
  assert steps(PLACE) == [1]
  assert len(server.names()) > len(before)
  server.refuse = None
  with Checkpoints(PLACE, CheckpointConfig()) as checkpoints:
    assert checkpoints.latest() == 1
    assert set(server.names()) == {*before, "run/checkpoints/lock"}
    checkpoints.save(2, _state(2, _mesh(4, 2)), {}, kind="permanent")
  assert steps(PLACE) == [1, 2]


def test_an_interrupted_removal_is_finished_by_the_next_start(server):
  _write(1, 2)
  BucketWriter(BucketFolder(PLACE), 1, lambda: None).forget(1)  # and killed before remove_arrays
  _write(3)
  assert steps(PLACE) == [2, 3]
  assert not [name for name in server.names() if "/00000001" in name]


def test_killed_between_its_record_and_its_mark_it_is_a_checkpoint_with_all_its_arrays(server):
  _write(1)
  (arrays,) = {name.split("/")[2] for name in server.names("run/checkpoints_arrays/")}
  bucket.write(f"{PLACE}/{arrays}.tmp", b"")  # which the next start finds beside the record
  _write(2)
  assert steps(PLACE) == [1, 2]
  mesh = _mesh(2, 1)
  restored = restore(PLACE, 1, _abstract(mesh))
  np.testing.assert_array_equal(restored.state["w_DF"], _state(1, mesh)["w_DF"])
  assert not [name for name in server.names() if name.endswith(".tmp")]


def test_damage_is_found_and_set_aside(server):
  _write(1, 2)
  name = next(name for name in server.names("run/checkpoints_arrays/00000002") if "w_DF/c/" in name)
  content, generation = server.objects["bucket", name]
  server.objects["bucket", name] = (content[:-5] + b"\0" + content[-4:], generation + 1)
  mesh = _mesh(4, 2)
  with (
    Checkpoints(PLACE, CheckpointConfig()) as checkpoints,
    pytest.raises(DamagedCheckpointError, match="arrays cannot be read"),
  ):
    checkpoints.restore(_abstract(mesh))
  with Checkpoints(PLACE, CheckpointConfig(on_damage="previous")) as checkpoints:
    assert checkpoints.restore(_abstract(mesh)).step == 1
  assert steps(PLACE) == [1]
  assert [name for name in server.names("run/checkpoints/damaged-00000002")]


def test_a_second_run_is_refused_and_a_dead_one_is_not_waited_for_long(server):
  refused = r"in use by a run \(process \d+ on .*another workdir"
  with Checkpoints(PLACE, CheckpointConfig()), pytest.raises(ValueError, match=refused):
    _write(1)
  server.objects["bucket", "run/checkpoints/lock"] = (b"process 1 on elsewhere", 5)
  _write(1)  # nobody renews it
  assert "run/checkpoints/lock" not in server.names()


def test_two_processes_save_as_one_and_one_process_restores_them(server, monkeypatch):
  num_blocks = _of_each_record(server, monkeypatch)
  told = two_processes(PLACE)
  assert told[0] == told[1] == "start 0\ntemporary 16\npermanent 20\ntemporary 32\npermanent 40"
  assert num_blocks == [4, 4, 4, 4]
  assert steps(PLACE) == [20, 40]
  restored = restore(PLACE, 40, checkpoint_process.abstract(checkpoint_process.make_mesh()))
  expected = checkpoint_process.init()
  for _ in range(40):
    expected = jax.jit(checkpoint_process.update)(expected)
  assert int(restored.state["step"]) == 40
  np.testing.assert_array_equal(restored.state["w_DF"], expected["w_DF"])


def _of_each_record(server, monkeypatch) -> list[int]:
  """The number of blocks of w_DF at the time of each record; those of process 1 come late."""
  num_blocks, write = [], _Handler.do_POST

  def slow_write(handler):
    if "w_DF%2Fc%2F1%2F" in handler.path:
      time.sleep(0.2)
    if record := re.search(r"checkpoints%2F(\d+)\.json", handler.path):
      arrays = server.names(f"run/checkpoints_arrays/{record[1]}-")
      num_blocks.append(sum("w_DF/c/" in name for name in arrays))
    write(handler)

  monkeypatch.setattr(_Handler, "do_POST", slow_write)
  return num_blocks
