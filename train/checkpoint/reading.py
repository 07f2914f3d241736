"""Reads checkpoints and changes nothing, so it may be used while a run is writing there."""

import os
from collections.abc import Callable
from typing import Any, NamedTuple

import jax

from train.checkpoint.checksums import checksums, named_leaves
from train.checkpoint.content import (
  DamagedCheckpointError,
  UnreadableError,
  check_arrays,
  first_few,
)
from train.checkpoint.storage import Storage, read_content, storage_at

Check = Callable[[dict[str, Any]], object]


def no_check(record: dict[str, Any]) -> None:
  del record


class Restored(NamedTuple):
  """A state in the layout asked for, with the record of the run that saved it."""

  step: int
  state: Any
  record: dict[str, Any]


def restore(
  directory: str | os.PathLike[str],
  step: int,
  abstract: Any,
  *,
  part: str = "",
  check: Check = no_check,
  verify: bool = True,
) -> Restored:
  """The checkpoint of a step in a folder or below a URL.

  `abstract` is the state as ShapeDtypeStructs with the shardings to restore into, on any mesh. With
  `part`, such as "params", it is that part of the state, and nothing else is read. `check` is
  called with the saved run record before any array is read, and may raise. `verify` compares the
  checksums.
  Raises ValueError for a step without a checkpoint or for other arrays, DamagedCheckpointError for
  damage.
  """
  storage = storage_at(directory)
  return restore_from(storage, step, abstract, part=part, check=check, verify=verify)


def read_run_record(directory: str | os.PathLike[str], step: int) -> dict[str, Any]:
  """The run record stored with a step; nothing else is read. Errors as of `restore`."""
  return read_content(storage_at(directory), step)["run"]


def restore_from(
  storage: Storage,
  step: int,
  abstract: Any,
  *,
  part: str = "",
  check: Check = no_check,
  verify: bool = True,
) -> Restored:
  """As `restore`, for a storage that is open already."""
  content = read_content(storage, step)
  check(content["run"])
  where = storage.at(step)
  inside = f"{part}/" if part else ""
  named = {f"{inside}{name}": _placed(leaf) for name, leaf in named_leaves(abstract).items()}
  saved = {name: array for name, array in content["arrays"].items() if name.startswith(inside)}
  check_arrays(saved, named, where=where)
  found = _read_arrays(storage, step, named, content)
  if verify:
    wrong = [
      name
      for name, checksum in checksums({name: found[name] for name in named}).items()
      if checksum != saved[name][2]
    ]
    if wrong:
      raise DamagedCheckpointError(
        f"checkpoint {where} is damaged: {first_few(wrong)} changed after it was written (checksum)"
      )
  state = jax.tree.unflatten(jax.tree.structure(abstract), [found[name] for name in named])
  return Restored(step, state, content["run"])


def first_line(error: Exception) -> str:
  """The error of Orbax or TensorStore in one line."""
  lines = str(error).strip().partition("[tensorstore_spec")[0].splitlines()
  return lines[0].strip() if lines else type(error).__name__


def _read_arrays(
  storage: Storage, step: int, named: dict[str, jax.ShapeDtypeStruct], content: dict[str, Any]
) -> dict[str, Any]:
  try:
    return storage.read_arrays(step, named, content)
  except (MemoryError, PermissionError, jax.errors.JaxRuntimeError):
    raise  # nothing is wrong with the files
  # Orbax and TensorStore raise all kinds for a broken file, bare Exception too.
  except Exception as error:
    raise UnreadableError(
      f"checkpoint {storage.at(step)} is damaged: its arrays cannot be read ({first_line(error)})"
    ) from error


def _placed(leaf: Any) -> jax.ShapeDtypeStruct:
  sharding = leaf.sharding or jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
  return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)
