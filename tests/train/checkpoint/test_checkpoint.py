"""Checkpoints: equal on any mesh, complete or absent, damage found and named, what is kept."""

import contextlib
import fcntl
import gc
import json
import pathlib
import shutil
import socket
import threading
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tensorstore
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from train.checkpoint import folder
from train.checkpoint.checkpoints import CheckpointConfig, Checkpoints, SaveFailedError, superfluous
from train.checkpoint.checksums import checksums, named_leaves
from train.checkpoint.content import DamagedCheckpointError
from train.checkpoint.reading import read_run_record, restore
from train.checkpoint.storage import steps
from train.workdir.lock import InUseError, Lock

P = PartitionSpec


class State(NamedTuple):
  step: jax.Array
  params: Any
  opt_state: Any


SPECS = State(P(), {"w_DF": P("a", "b"), "inner": {"b_F": P("b")}}, ({"w_DF": P("a")}, ()))


def _mesh(a: int, b: int):
  devices = np.array(jax.devices()[: a * b]).reshape(a, b)
  return jax.sharding.Mesh(devices, ("a", "b"), axis_types=(AxisType.Auto,) * 2)


def _shardings(mesh):
  return jax.tree.map(
    lambda spec: NamedSharding(mesh, spec), SPECS, is_leaf=lambda x: isinstance(x, P)
  )


def _state(step: int, mesh=None) -> State:
  keys = jax.random.split(jax.random.key(step), 3)
  state = State(
    jnp.int32(step),
    {
      "w_DF": jax.random.normal(keys[0], (8, 16)),
      "inner": {"b_F": jax.random.normal(keys[1], (16,)).astype(jnp.bfloat16)},
    },
    ({"w_DF": jax.random.normal(keys[2], (8, 16))}, ()),
  )
  return jax.device_put(state, _shardings(mesh or _mesh(4, 2)))


def _abstract(mesh=None):
  return jax.tree.map(
    lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
    jax.eval_shape(lambda: _state(0)),
    _shardings(mesh or _mesh(4, 2)),
  )


def _assert_equal(left, right):
  assert jax.tree.structure(left) == jax.tree.structure(right)
  for a, b in zip(jax.tree.leaves(left), jax.tree.leaves(right)):
    assert a.dtype == b.dtype
    np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


def _write(directory, *saved: int, **settings):
  """Checkpoints of those steps, complete and closed."""
  with Checkpoints(directory, CheckpointConfig(**settings)) as checkpoints:
    for step in saved:
      checkpoints.save(step, _state(step), {"seed": step}, kind="permanent")
      checkpoints.wait()


@pytest.fixture
def directory(tmp_path) -> pathlib.Path:
  return tmp_path / "checkpoints"


@pytest.mark.parametrize("sizes", [(4, 2), (2, 4), (8, 1), (2, 2), (1, 1)])
def test_restores_bit_for_bit_into_any_mesh(directory, sizes):
  _write(directory, 3)
  mesh = _mesh(*sizes)
  with Checkpoints(directory, CheckpointConfig()) as checkpoints:
    restored = checkpoints.restore(_abstract(mesh))
  assert (restored.step, restored.record) == (3, {"seed": 3})
  _assert_equal(restored.state, _state(3))
  for leaf, sharding in zip(
    jax.tree.leaves(restored.state), jax.tree.leaves(_shardings(mesh)), strict=True
  ):
    assert leaf.sharding == sharding


def test_an_empty_folder_has_no_checkpoint(directory):
  with Checkpoints(directory, CheckpointConfig()) as checkpoints:
    assert checkpoints.latest() is None
    assert checkpoints.restore(_abstract()) is None


def test_the_state_may_be_overwritten_as_soon_as_save_returns(directory):
  overwrite = jax.jit(lambda s: jax.tree.map(lambda x: x * 0, s), donate_argnums=0)
  with Checkpoints(directory, CheckpointConfig()) as checkpoints:
    state = _state(7)
    checkpoints.save(7, state, {}, kind="permanent")
    overwrite(state)
    checkpoints.wait()
    _assert_equal(checkpoints.restore(_abstract()).state, _state(7))


def test_a_chosen_step_and_its_record_can_be_read(directory):
  _write(directory, 3, 5)
  with Checkpoints(directory, CheckpointConfig()) as checkpoints:
    assert checkpoints.latest() == 5
  assert read_run_record(directory, 3) == {"seed": 3}
  _assert_equal(restore(directory, 3, _abstract()).state, _state(3))
  with pytest.raises(ValueError, match=r"no checkpoint .*00000004; there are: \[3, 5\]"):
    restore(directory, 4, _abstract())


def test_the_record_is_checked_before_arrays_are_read(directory):
  _write(directory, 3)
  shutil.rmtree(directory / "00000003" / "state")

  def refuse(record):
    raise ValueError(f"seed {record['seed']} in the checkpoint")

  with (
    Checkpoints(directory, CheckpointConfig()) as checkpoints,
    pytest.raises(ValueError, match="seed 3 in the checkpoint"),
  ):
    checkpoints.restore(_abstract(), check=refuse)


def test_reading_needs_no_writer_and_leaves_no_trace(directory):
  _write(directory, 3)
  before = sorted(directory.rglob("*"))
  with Checkpoints(directory, CheckpointConfig()):  # a run is training there
    _assert_equal(restore(directory, 3, _abstract()).state, _state(3))
  assert sorted(directory.rglob("*")) == before


def test_a_part_is_restored_without_reading_the_rest(directory):
  """Parameters as a command that does not train restores them."""
  mesh = _mesh(1, 1)
  params = jax.device_put({"w_DF": jnp.ones((8, 16))}, NamedSharding(mesh, P()))
  moments = jax.device_put({"w_DF": jax.random.normal(jax.random.key(0), (512, 512))})
  with Checkpoints(directory, CheckpointConfig()) as checkpoints:
    checkpoints.save(3, {"params": params, "moments": moments}, {}, kind="permanent")
  abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), (params, moments))
  num_bytes = []
  for part, wanted in (("params", abstract[0]), ("moments", abstract[1])):
    before = _bytes_read()
    restored = restore(directory, 3, wanted, part=part)
    num_bytes.append(_bytes_read() - before)
    _assert_equal(restored.state, {"params": params, "moments": moments}[part])
  assert num_bytes[0] < 20_000
  assert num_bytes[1] > moments["w_DF"].nbytes / 2  # compressed
  with pytest.raises(ValueError, match="params/w_DF is only in the checkpoint"):
    restore(directory, 3, {"w_new": abstract[0]["w_DF"]}, part="params")


def _bytes_read() -> int:
  """Of files, by this process so far, through TensorStore."""
  (metric,) = tensorstore.experimental_collect_matching_metrics(
    "/tensorstore/kvstore/file/bytes_read"
  )
  return metric["values"][0]["value"]


def test_other_arrays_are_refused_by_name_with_both_shapes(directory):
  _write(directory, 3)
  abstract = _abstract()
  other = abstract._replace(
    params={
      "w_DF": jax.ShapeDtypeStruct((8, 4), jnp.float32),
      "inner": {"b_F": jax.ShapeDtypeStruct((16,), jnp.float32)},
      "w_new": jax.ShapeDtypeStruct((2,), jnp.float32),
    },
    opt_state=(),
  )
  with (
    Checkpoints(directory, CheckpointConfig()) as checkpoints,
    pytest.raises(ValueError, match="is not of this model") as caught,
  ):
    checkpoints.restore(other)
  for part in (
    "params/w_new is missing in the checkpoint",
    "opt_state/0/w_DF is only in the checkpoint",
    "params/w_DF is float32[8, 16] in the checkpoint, float32[8, 4] now",
    "params/inner/b_F is bfloat16[16] in the checkpoint, float32[16] now",
  ):
    assert part in str(caught.value)


def _largest(folder: pathlib.Path) -> pathlib.Path:
  return max((path for path in folder.rglob("d/*")), key=lambda path: path.stat().st_size)


def _truncate(folder: pathlib.Path) -> None:
  for path in folder.rglob("d/*"):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def _flip_a_bit_of_the_record(folder: pathlib.Path) -> None:
  path = folder / "record" / "record.json"
  path.write_text(path.read_text().replace('"seed": 5', '"seed": 4'))


DAMAGES = {
  "data files cut off": (_truncate, "arrays cannot be read"),
  "data file missing": (
    lambda folder: _largest(folder / "state").unlink(),
    "arrays cannot be read",
  ),
  "manifest missing": (
    lambda folder: (folder / "state" / "manifest.ocdbt").unlink(),
    "arrays cannot be read",
  ),
  "record changed": (_flip_a_bit_of_the_record, r"record\.json changed after it was written"),
  "record cut off": (
    lambda folder: (folder / "record" / "record.json").write_text('{"format": '),
    r"record\.json is not JSON",
  ),
  "record missing": (lambda folder: shutil.rmtree(folder / "record"), r"no record/record\.json"),
  "empty folder": (
    lambda folder: (shutil.rmtree(folder), folder.mkdir()),
    r"no record/record\.json",
  ),
}


@pytest.fixture
def _reads_that_fail():
  """Orbax drops the other reads of a restore that fails; collected here, not in a later test."""
  yield
  gc.collect()


def _fails_to_read(test):
  ignore = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
  return pytest.mark.usefixtures("_reads_that_fail")(ignore(test))


@_fails_to_read
@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_named_and_refused_or_the_one_before_is_used(directory, damage):
  _write(directory, 3, 5)
  harm, message = DAMAGES[damage]
  harm(directory / "00000005")
  with (
    Checkpoints(directory, CheckpointConfig()) as checkpoints,
    pytest.raises(DamagedCheckpointError, match=f"00000005 is damaged: .*{message}") as caught,
  ):
    checkpoints.restore(_abstract())
  assert "To go on from that of step 3: checkpoint.on_damage=previous" in str(caught.value)
  assert steps(directory) == [3, 5]

  with Checkpoints(directory, CheckpointConfig(on_damage="previous")) as checkpoints:
    restored = checkpoints.restore(_abstract())
    assert restored.step == 3
    _assert_equal(restored.state, _state(3))
    # The run goes on and comes to step 5 again.
    checkpoints.save(5, _state(5), {}, kind="permanent")
  assert steps(directory) == [3, 5]
  assert len(list(directory.glob("damaged-00000005-*"))) == 1


def test_a_flipped_bit_in_an_array_is_found(directory):
  """The file format reads it without an error: only the checksum detects it."""
  _write(directory, 3)
  mesh = _mesh(1, 1)
  state = _state(3)
  w_DF = np.array(state.params["w_DF"])
  w_DF.view(np.uint32)[5, 3] ^= 1
  flipped = state._replace(params={**state.params, "w_DF": jax.device_put(w_DF)})
  other = directory.parent / "flipped"
  with Checkpoints(other, CheckpointConfig()) as checkpoints:
    checkpoints.save(3, flipped, {"seed": 3}, kind="permanent")
  shutil.rmtree(directory / "00000003" / "state")
  shutil.copytree(other / "00000003" / "state", directory / "00000003" / "state")
  with (
    Checkpoints(directory, CheckpointConfig()) as checkpoints,
    pytest.raises(DamagedCheckpointError, match=r"damaged: params/w_DF changed .*checksum"),
  ):
    checkpoints.restore(_abstract(mesh))
  with Checkpoints(directory, CheckpointConfig(verify=False)) as checkpoints:
    _assert_equal(checkpoints.restore(_abstract(mesh)).state, flipped)


@_fails_to_read
def test_flipping_any_bit_of_the_files_never_gives_a_wrong_state(directory):
  """Any bit of any array file: refused, or without effect on any value."""
  _write(directory, 3)
  files = sorted(path for path in (directory / "00000003" / "state").rglob("*") if path.is_file())
  random = np.random.default_rng(0)
  refused = 0
  for path in [files[index] for index in random.integers(len(files), size=24)]:
    whole = path.read_bytes()
    bit = int(random.integers(8 * len(whole)))
    changed = bytearray(whole)
    changed[bit // 8] ^= 1 << bit % 8
    path.write_bytes(changed)
    refused += 1
    with contextlib.suppress(DamagedCheckpointError):
      _assert_equal(restore(directory, 3, _abstract()).state, _state(3))
      refused -= 1
    path.write_bytes(whole)
  assert refused > 0
  _assert_equal(restore(directory, 3, _abstract()).state, _state(3))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int32", "uint8", "bool"])
def test_checksums_are_those_of_the_device_wherever_they_are_computed(dtype, monkeypatch):
  arrays = {
    str(shape): (jax.random.normal(jax.random.key(0), shape) * 3).astype(dtype)
    for shape in [(), (1,), (5, 7, 3), (0, 4)]
  }
  on_host = checksums(arrays)
  monkeypatch.setattr("train.checkpoint.checksums.HOST_SIZE", -1)
  assert checksums(arrays) == on_host


@pytest.mark.parametrize("host_size", [-1, 1 << 22])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int32", "uint8", "bool"])
def test_checksums_see_every_change_and_no_layout(dtype, host_size, monkeypatch):
  monkeypatch.setattr("train.checkpoint.checksums.HOST_SIZE", host_size)
  x = jax.random.normal(jax.random.key(0), (8, 6))
  x = x > 0 if dtype == "bool" else (100 * x).astype(dtype)
  sums = {
    checksums({"x": jax.device_put(x, NamedSharding(_mesh(*sizes), spec))})["x"]
    for sizes, spec in [((1, 1), P()), ((4, 2), P("a", "b")), ((2, 2), P("b")), ((8, 1), P())]
  }
  assert len(sums) == 1
  bits = np.array(x).view(np.uint8 if dtype in ("bool", "uint8") else f"uint{8 * x.itemsize}")
  for bit in [0] if dtype == "bool" else range(8 * x.itemsize):
    flipped = bits.copy()
    flipped.flat[17] ^= np.array(1 << bit, bits.dtype)
    assert checksums({"x": jnp.asarray(flipped.view(x.dtype))})["x"] not in sums, bit
  swapped = np.array(x)
  i, j = 0, int(np.flatnonzero(swapped.reshape(-1) != swapped.reshape(-1)[0])[0])
  swapped.flat[[i, j]] = swapped.flat[[j, i]]
  assert checksums({"x": jnp.asarray(swapped)})["x"] not in sums


def test_checksums_refuse_what_has_no_plain_bits():
  with pytest.raises(ValueError, match=r"key has dtype key<fry>.*key_data"):
    checksums({"key": jax.random.key(0)})


def test_names_do_not_depend_on_the_classes_of_a_state():
  assert list(named_leaves(_abstract())) == [
    "step",
    "params/inner/b_F",
    "params/w_DF",
    "opt_state/0/w_DF",
  ]


def test_a_failed_save_fails_the_run_at_the_next_step(directory, monkeypatch):
  _write(directory, 1)

  def full(path):
    raise OSError(28, "No space left on device")

  checkpoints = Checkpoints(directory, CheckpointConfig())
  with monkeypatch.context() as patch:
    patch.setattr(folder, "flush_to_disk", full)
    checkpoints.save(2, _state(2), {}, kind="permanent")
    with pytest.raises(SaveFailedError, match=r"step 2 could not .*No space left.*of step 1"):
      checkpoints.wait()
  assert checkpoints.latest() == 1
  checkpoints.close()
  with Checkpoints(directory, CheckpointConfig()) as checkpoints:
    _assert_equal(checkpoints.restore(_abstract()).state, _state(1))
  assert not list(directory.glob("*tmp*"))


@pytest.mark.parametrize("name", ["lr[1e-3]", "a*", "what?", "back\\slash"])
def test_a_path_that_is_a_pattern_is_refused_before_anything_is_written(tmp_path, name):
  """Orbax does not find its own files there: the checkpoint was called complete, and had none."""
  with pytest.raises(ValueError, match=r"no checkpoint can be written to .* workdir without it"):
    Checkpoints(tmp_path / name / "checkpoints", CheckpointConfig())
  assert not list(tmp_path.iterdir())


def test_arrays_that_were_not_joined_are_no_checkpoint(directory, monkeypatch):
  monkeypatch.setattr(folder, "_PATTERN", frozenset())
  patterned = directory / "lr[1e-3]"
  with Checkpoints(patterned, CheckpointConfig()) as checkpoints:
    checkpoints.save(1, _state(1), {}, kind="permanent")
    with pytest.raises(SaveFailedError, match=r"no manifest\.ocdbt"):
      checkpoints.wait()
  assert steps(patterned) == []


def test_a_failed_save_that_ends_a_run_is_told_once(directory, monkeypatch, caplog):
  errors = [RuntimeError("broken"), RuntimeError("broken")]

  def end_with_a_failed_save():
    with Checkpoints(directory, CheckpointConfig()) as checkpoints:
      checkpoints.save(2, _state(2), {}, kind="permanent")
      sound = checkpoints._writer.wait_until_finished

      # Orbax raises it again, when the checkpoints are closed.
      def broken():
        if errors:
          raise errors.pop()
        sound()

      monkeypatch.setattr(checkpoints._writer, "wait_until_finished", broken)
      checkpoints.wait()

  with pytest.raises(SaveFailedError, match="step 2 could not be written"):
    end_with_a_failed_save()
  assert not errors
  assert "could not be written" not in caplog.text


@pytest.mark.parametrize("call", ["due", "save", "latest", "close"])
def test_no_call_goes_on_after_a_failed_save(directory, monkeypatch, call):
  def broken(path):
    raise RuntimeError("broken")

  checkpoints = Checkpoints(directory, CheckpointConfig())
  with monkeypatch.context() as patch:
    patch.setattr(folder, "flush_to_disk", broken)
    checkpoints.save(2, _state(2), {}, kind="permanent")
    for thread in threading.enumerate():
      if thread.name == "async_save":
        thread.join()
  calls = {
    "due": lambda: checkpoints.due(3),
    "save": lambda: checkpoints.save(3, _state(3), {}, kind="permanent"),
    "latest": checkpoints.latest,
    "close": checkpoints.close,
  }
  with pytest.raises(SaveFailedError, match="step 2 could not be written"):
    calls[call]()
  if call != "close":
    checkpoints.close()


def test_a_step_is_not_written_twice_and_never_over_another_runs(directory):
  _write(directory, 3)
  with Checkpoints(directory, CheckpointConfig()) as checkpoints:
    with pytest.raises(ValueError, match=r"00000003 exists and is not of this run"):
      checkpoints.save(3, _state(4), {}, kind="permanent")
    checkpoints.restore(_abstract())
    checkpoints.save(3, _state(4), {}, kind="permanent")  # restored from there: nothing to do
    checkpoints.save(4, _state(4), {}, kind="temporary")
    checkpoints.save(4, _state(4), {}, kind="permanent")
  assert steps(directory) == [3, 4]
  _assert_equal(restore(directory, 3, _abstract()).state, _state(3))


def test_a_second_run_in_the_same_folder_is_refused(directory):
  with (
    Checkpoints(directory, CheckpointConfig()),
    pytest.raises(ValueError, match=r"in use by a run \(process \d+ on .*another workdir"),
  ):
    Checkpoints(directory, CheckpointConfig())
  Checkpoints(directory, CheckpointConfig()).close()


def test_a_lock_that_was_removed_is_taken_again_and_refuses_others_still(directory):
  with Checkpoints(directory, CheckpointConfig()) as checkpoints:
    (directory / "lock").unlink()
    checkpoints.save(1, _state(1), {}, kind="permanent")
    checkpoints.wait()
    with pytest.raises(ValueError, match=r"in use by a run \(process \d+ on "):
      Checkpoints(directory, CheckpointConfig())
    assert checkpoints.latest() == 1
    # Removed, and taken by another run before this one has looked.
    (directory / "lock").unlink()
    with Lock(directory):
      (directory / "lock").write_text("process 7 on elsewhere since then\n")
      with pytest.raises(ValueError, match="was taken by another run"):
        checkpoints.save(2, _state(2), {}, kind="permanent")


def test_without_locks_the_newer_run_has_the_folder_and_the_older_one_stops(
  directory, monkeypatch, caplog
):
  def refuse(file, how):
    raise OSError("locks are not supported")

  monkeypatch.setattr(fcntl, "flock", refuse)
  # In one process only the names in the lock tell two runs apart.
  names = iter(["one", "another"])
  monkeypatch.setattr(socket, "gethostname", lambda: next(names))
  directory.mkdir(exist_ok=True)
  with caplog.at_level("WARNING", logger="absl"), Lock(directory) as older:
    assert "this file system has no locks (locks are not supported)" in caplog.text
    older.check()
    with Lock(directory) as newer:
      newer.check()
      with pytest.raises(InUseError, match=r"taken by another run \(process \d+ on another"):
        older.check()


def test_what_an_interrupted_run_left_is_removed(directory):
  _write(directory, 3)
  for name in ("00000004.orbax-checkpoint-tmp", "deleted-00000001-5"):
    (directory / name / "state").mkdir(parents=True)
  with Checkpoints(directory, CheckpointConfig()) as checkpoints:
    assert checkpoints.latest() == 3
    checkpoints.save(4, _state(4), {}, kind="permanent")
  assert sorted(path.name for path in directory.iterdir()) == ["00000003", "00000004", "lock"]


@pytest.mark.parametrize("name", ["500", "0000000500", "\u0663"])
def test_checkpoints_of_another_program_are_named_and_left_alone(directory, name):
  _write(directory, 3)
  (directory / name).mkdir()
  before = sorted(directory.iterdir())
  with pytest.raises(ValueError, match=rf"{directory / name} is no checkpoint of this program, .*"):
    Checkpoints(directory, CheckpointConfig(on_damage="previous"))
  assert sorted(directory.iterdir()) == before
  (directory / name).rmdir()
  with Checkpoints(directory, CheckpointConfig()) as checkpoints:
    assert checkpoints.latest() == 3


def test_steps_and_minutes_decide_what_is_due(directory, monkeypatch):
  now = [100.0]
  monkeypatch.setattr("train.checkpoint.checkpoints.time.monotonic", lambda: now[0])
  config = CheckpointConfig(every_steps=10, temporary_minutes=2.0)
  with Checkpoints(directory, config) as checkpoints:
    assert [checkpoints.due(step) for step in (9, 10, 11)] == [None, "permanent", None]
    now[0] += 121
    assert [checkpoints.due(step) for step in (19, 20)] == ["temporary", "permanent"]
    checkpoints.save(20, _state(20), {}, kind="permanent")
    assert checkpoints.due(21) is None
    now[0] += 119
    assert checkpoints.due(22) is None
    now[0] += 2
    assert checkpoints.due(23) == "temporary"


def test_temporary_ones_go_when_a_newer_one_is_complete(directory):
  with Checkpoints(directory, CheckpointConfig(every_steps=10, keep_permanent=2)) as checkpoints:
    for step in range(5, 45, 5):
      kind = "temporary" if step % 10 else "permanent"
      checkpoints.save(step, _state(step), {}, kind=kind)
      checkpoints.wait()
      assert step in steps(directory)
  assert steps(directory) == [30, 40]
  # Another run reads from the records which are temporary.
  with Checkpoints(directory, CheckpointConfig(keep_permanent=1)) as checkpoints:
    checkpoints.save(45, _state(45), {}, kind="temporary")
  assert steps(directory) == [40, 45]


def test_the_policy_keeps_the_newest_and_all_permanent_ones_asked_for():
  kinds = {1: "permanent", 2: "temporary", 3: "permanent", 4: "temporary", 5: "temporary"}
  assert superfluous(kinds, CheckpointConfig()) == [2, 4]
  assert superfluous(kinds, CheckpointConfig(keep_temporary=2)) == [2]
  assert superfluous(kinds, CheckpointConfig(keep_permanent=1)) == [1, 2, 4]
  assert superfluous({1: "temporary"}, CheckpointConfig(keep_permanent=1)) == []


def test_the_record_says_what_was_saved(directory):
  _write(directory, 3)
  content = json.loads((directory / "00000003" / "record" / "record.json").read_text())
  assert {key: content[key] for key in ("step", "kind", "run")} == {
    "step": 3,
    "kind": "permanent",
    "run": {"seed": 3},
  }
  shape, dtype, _ = content["arrays"]["params/w_DF"]
  assert (shape, dtype) == ([8, 16], "float32")


@pytest.mark.parametrize(
  ("settings", "message"),
  [
    ({"every_steps": 0}, "every_steps 0 must be at least 1"),
    ({"keep_permanent": 0}, "keep_permanent 0 must be"),
    ({"temporary_minutes": 0.0}, "temporary_minutes 0.0 must be above 0; None"),
    ({"on_damage": "ignore"}, "'ignore' is none of"),
  ],
)
def test_a_setting_that_cannot_work_is_refused(settings, message):
  with pytest.raises(ValueError, match=message):
    CheckpointConfig(**settings)
