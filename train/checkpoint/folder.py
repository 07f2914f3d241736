"""What a checkpoint's folder holds besides its arrays, and how to tell whether it is broken."""

import errno
import functools
import hashlib
import json
import os
import pathlib
import shutil
from typing import Any

import jax
from absl import logging

from data import bucket
from train.checkpoint.bucket import BucketFolder

FORMAT = "checkpoint 1"
# Orbax looks for its own files with glob, and does not escape the path above them.
_PATTERN = frozenset("*?[\\")


class DamagedCheckpointError(ValueError):
  """A checkpoint cannot be read, or is not what was written; the message names what and where."""


class UnreadableError(DamagedCheckpointError):
  """Damage that one process may see and another not."""


Place = pathlib.Path | BucketFolder


def place(directory: str | os.PathLike[str] | BucketFolder) -> Place:
  """Where checkpoints are: an absolute path, or a folder of a bucket if it is a URL."""
  if isinstance(directory, BucketFolder):
    return directory
  name = os.fspath(directory)
  return BucketFolder(name) if bucket.is_url(name) else pathlib.Path(os.path.abspath(name))


def check_path(directory: pathlib.Path) -> None:
  """ValueError for a path below which no checkpoint could be read again."""
  if wrong := sorted(_PATTERN & set(str(directory))):
    raise ValueError(
      f"no checkpoint can be written to {directory}: Orbax takes {' and '.join(wrong)} in a path "
      "for a pattern and would not find what it wrote. Use a workdir without it, also in the names "
      "of the folders above"
    )


def check_joined(folder: pathlib.Path) -> None:
  """RuntimeError if what the processes wrote was not joined to arrays that can be read."""
  for arrays in folder.glob("state*"):
    if not (arrays / "manifest.ocdbt").exists():
      raise RuntimeError(f"{arrays} has no manifest.ocdbt: Orbax did not join what was written")


def steps(directory: str | os.PathLike[str] | BucketFolder) -> list[int]:
  """The steps with a folder, ascending; a folder that is still being written has another name.

  ValueError for a step that is not written as ours are: it is of another program.
  """
  found = place(directory)
  if isinstance(found, BucketFolder):
    return found.steps()
  if not found.is_dir():
    return []
  names = [path.name for path in found.iterdir() if path.name.isdecimal()]
  for name in names:
    if name != f"{int(name):08d}":
      raise ValueError(
        f"{found / name} is no checkpoint of this program, which would name it {int(name):08d}: "
        "move it away, or use another workdir"
      )
  return sorted(map(int, names))


def read_content(folder: Place) -> dict[str, Any]:
  """What record.json holds, after checking that it is what was written."""
  try:
    content = json.loads(_read_record(folder))
  except (FileNotFoundError, NotADirectoryError) as error:
    if not folder.exists():
      raise ValueError(
        f"there is no checkpoint {folder}; there are: {steps(folder.parent)}"
      ) from error
    raise DamagedCheckpointError(
      f"checkpoint {folder} is damaged: it has no record/record.json"
    ) from error
  except ValueError as error:
    raise DamagedCheckpointError(
      f"checkpoint {folder} is damaged: record.json is not JSON"
    ) from error
  if not isinstance(content, dict) or content != sealed(content):
    raise DamagedCheckpointError(
      f"checkpoint {folder} is damaged: record.json changed after it was written (sha256)"
    )
  if content["format"] != FORMAT:
    raise ValueError(
      f"checkpoint {folder} has format {content['format']!r}, this code reads {FORMAT!r}"
    )
  if content["step"] != int(folder.name):
    raise DamagedCheckpointError(f"checkpoint {folder} is damaged: it is of step {content['step']}")
  return content


def _read_record(folder: Place) -> bytes:
  if isinstance(folder, pathlib.Path):
    return (folder / "record" / "record.json").read_bytes()
  record = folder.read_record()
  if record is None:
    raise FileNotFoundError(str(folder))
  return record


def sealed(content: dict[str, Any]) -> dict[str, Any]:
  """With the sha256 of all the rest, as JSON gives it back."""
  rest = {key: value for key, value in content.items() if key != "sha256"}
  text = json.dumps(rest, sort_keys=True, allow_nan=False)
  return {**json.loads(text), "sha256": hashlib.sha256(text.encode()).hexdigest()}


def nested(named: dict[str, Any]) -> dict[str, Any]:
  """Plain nested dicts: the names in a checkpoint do not depend on our classes."""
  tree: dict[str, Any] = {}
  for name, leaf in named.items():
    *parents, last = name.split("/")
    functools.reduce(lambda inner, key: inner.setdefault(key, {}), parents, tree)[last] = leaf
  return tree


def describe(named: dict[str, jax.Array], sums: dict[str, str]) -> dict[str, list[Any]]:
  return {name: [list(x.shape), str(x.dtype), sums[name]] for name, x in named.items()}


def check_arrays(saved: dict[str, Any], named: dict[str, Any], folder: Place) -> None:
  """Raises unless the checkpoint has exactly the arrays that the model and optimizer need."""
  now = {name: (list(x.shape), str(x.dtype)) for name, x in named.items()}
  then = {name: (shape, dtype) for name, (shape, dtype, _) in saved.items()}
  wrong = [f"{name} is missing in the checkpoint" for name in now if name not in then]
  wrong += [f"{name} is only in the checkpoint" for name in then if name not in now]
  wrong += [
    f"{name} is {then[name][1]}{then[name][0]} in the checkpoint, {dtype}{shape} now"
    for name, (shape, dtype) in now.items()
    if name in then and then[name] != (shape, dtype)
  ]
  if wrong:
    raise ValueError(
      f"checkpoint {folder} is not of this model and optimizer: {first_few(wrong, '; ')}. Use the "
      "config it was made with, or another workdir"
    )


def first_few(names: list[str], separator: str = ", ", limit: int = 5) -> str:
  more = f"{separator}and {len(names) - limit} more" if len(names) > limit else ""
  return separator.join(names[:limit]) + more


def flush_to_disk(path: pathlib.Path) -> None:
  """Returns when the content is on the disk; OSError if the disk has failed."""
  descriptor = os.open(path, os.O_RDONLY)
  try:
    os.fsync(descriptor)
  except OSError as error:
    # Some network file systems cannot flush folders; they keep renames in order themselves.
    if not path.is_dir() or error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.EBADF):
      raise
  finally:
    os.close(descriptor)


def remove_tree(folder: pathlib.Path) -> None:
  try:
    shutil.rmtree(folder)
  except OSError as error:
    # It has another name than a step, so nothing depends on it but space.
    logging.error("%s could not be removed: %s", folder, error)
