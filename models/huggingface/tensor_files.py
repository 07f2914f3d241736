"""The tensors of a Hugging Face directory: one safetensors file, or several with an index."""

import json
import pathlib
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import safetensors

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
# The dtype that holds every value of a stored one.
DTYPES = {"F32": "float32", "BF16": "bfloat16", "F16": "float32"}
_STORED = {"float32": "F32", "bfloat16": "BF16"}


class StoredTensor(NamedTuple):
  """One tensor of a file, not yet read; `dtype` is the file's word for it."""

  path: pathlib.Path
  name: str
  dtype: str

  def read(self, shape: tuple[int, ...]) -> np.ndarray:
    """Its values; ValueError unless it has `shape` and a dtype of `DTYPES`."""
    if self.dtype not in DTYPES:
      raise ValueError(f"{self.path}: {self.name} is {self.dtype}; known are {sorted(DTYPES)}")
    with safetensors.safe_open(self.path, framework="np") as file:
      stored_shape = tuple(file.get_slice(self.name).get_shape())
      if stored_shape != shape:
        raise ValueError(
          f"{self.path}: {self.name} has shape {stored_shape}, config.json asks for {shape}"
        )
      return file.get_tensor(self.name)


def stored_tensors(directory: pathlib.Path) -> dict[str, StoredTensor]:
  """Every tensor of the directory's files, by name; an index must name just what the files hold."""
  single, index = directory / SINGLE, directory / INDEX
  if single.exists() == index.exists():
    found = sorted(path.name for path in directory.iterdir())
    raise ValueError(f"{directory}: must hold either {SINGLE} or {INDEX}; holds {found}")
  if single.exists():
    return _of_file(single)
  weight_map = read_json(index).get("weight_map")
  if not isinstance(weight_map, dict):
    raise ValueError(f"{index}: weight_map is missing")
  for name, file in weight_map.items():
    if not isinstance(file, str):
      raise ValueError(f"{index}: weight_map has {file!r} for {name}; it must name a file")
    # All of them first: a file that is there would seem to hold tensors of the one that is not.
    if not (directory / file).is_file():
      raise ValueError(f"{index}: names {file}, which does not exist")
  stored: dict[str, StoredTensor] = {}
  for file in sorted(set(weight_map.values())):
    of_file = _of_file(directory / file)
    indexed = {name for name, where in weight_map.items() if where == file}
    check_names(directory / file, indexed, set(of_file), source=INDEX)
    stored |= of_file
  return stored


def check_names(place: pathlib.Path, expected: set[str], found: set[str], *, source: str) -> None:
  """ValueError, with names, unless the tensors found in `place` are those that `source` names."""
  for problem, names in (("missing", expected - found), ("not of the model", found - expected)):
    if names:
      raise ValueError(
        f"{place}: tensors {problem} (by {source}): {', '.join(sorted(names)[:8])}"
        + (f" and {len(names) - 8} more" if len(names) > 8 else "")
      )


def write(directory: pathlib.Path, tensors: Mapping[str, np.ndarray], max_file_bytes: int) -> None:
  """Writes one file, or several and an index where one would be larger than `max_file_bytes`.

  Arrays are float32 or bfloat16 and may be views; of one at a time a contiguous copy is made.
  """
  parts: list[dict[str, np.ndarray]] = [{}]
  size = 0
  for name, tensor in tensors.items():
    if parts[-1] and size + tensor.nbytes > max_file_bytes:
      parts.append({})
      size = 0
    parts[-1][name] = tensor
    size += tensor.nbytes
  files = [SINGLE]
  if len(parts) > 1:
    files = [f"model-{i + 1:05}-of-{len(parts):05}.safetensors" for i in range(len(parts))]
    index = {
      "metadata": {"total_size": sum(tensor.nbytes for tensor in tensors.values())},
      "weight_map": {name: file for file, part in zip(files, parts) for name in part},
    }
    (directory / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")
  for file, part in zip(files, parts):
    _write_file(directory / file, part)


def _write_file(path: pathlib.Path, tensors: dict[str, np.ndarray]) -> None:
  """The length of a JSON header in 8 bytes, the header, then the values of every tensor.

  By hand, because the package wants contiguous copies of all tensors of the file at once.
  """
  names = sorted(tensors, key=lambda name: (-tensors[name].itemsize, name))  # the package's order
  header: dict[str, Any] = {"__metadata__": {"format": "pt"}}  # transformers reads no other
  stop = 0
  for name in names:
    tensor = tensors[name]
    start, stop = stop, stop + tensor.nbytes
    header[name] = {
      "dtype": _STORED[str(tensor.dtype)],
      "shape": list(tensor.shape),
      "data_offsets": [start, stop],
    }
  text = json.dumps(header, separators=(",", ":")).encode()
  text += b" " * (-len(text) % 8)
  try:
    with path.open("wb") as file:
      file.write(len(text).to_bytes(8, "little") + text)
      for name in names:
        file.write(np.ascontiguousarray(tensors[name]).view(np.uint8).data)
  except OSError as error:
    # Without a name when a write fails.
    raise OSError(error.errno, error.strerror, str(path)) from error


def read_json(path: pathlib.Path) -> dict[str, Any]:
  """The JSON object in a file; ValueError if there is none."""
  if not path.is_file():
    raise ValueError(f"load: {path} does not exist; give a directory that holds {path.name}")
  try:
    value = json.loads(path.read_text(encoding="utf-8"))
  except ValueError as error:
    raise ValueError(f"{path}: not JSON: {error}") from error
  if not isinstance(value, dict):
    raise ValueError(f"{path}: must hold a JSON object, holds {type(value).__name__}")
  return value


def _of_file(path: pathlib.Path) -> dict[str, StoredTensor]:
  try:
    with safetensors.safe_open(path, framework="np") as file:
      names = file.keys()
      return {name: StoredTensor(path, name, file.get_slice(name).get_dtype()) for name in names}
  except safetensors.SafetensorError as error:
    raise ValueError(f"{path}: not a whole safetensors file: {error}") from error
