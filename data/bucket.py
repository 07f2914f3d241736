"""Objects of a bucket by their URL (gs://bucket/folder/name), through TensorStore.

An object appears whole or not at all, and everybody sees a new one at once. There are no folders,
and nothing can be renamed. Errors of the service are ValueError, as TensorStore raises them.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import tensorstore as ts


def is_url(path: str) -> bool:
  return "://" in path


def read(url: str) -> bytes | None:
  """The content of an object; None where there is none."""
  folder, name = _split(url)
  found = folder.read(name).result()
  return bytes(found.value) if found.state == "value" else None


def read_newer(url: str, *, than: bytes) -> tuple[bytes, bytes] | None:
  """Content and generation of an object; None if its generation is `than`, or it is not there."""
  folder, name = _split(url)
  found = folder.read(name, if_not_equal=than).result()
  return (bytes(found.value), found.stamp.generation) if found.state == "value" else None


def write(url: str, content: bytes) -> bytes:
  """Writes an object; returns its generation."""
  folder, name = _split(url)
  return folder.write(name, content).result().generation


def generation(url: str) -> bytes:
  """The generation of an object, which changes with each write; "no object" has one too."""
  folder, name = _split(url)
  return folder.read(name).result().stamp.generation


def replace(url: str, content: bytes, *, of: bytes) -> bytes | None:
  """Writes an object if its generation is still `of`: the new one, or None if it is not."""
  folder, name = _split(url)
  return folder.write(name, content, if_equal=of).result().generation or None


def delete(url: str, *, of: bytes | None = None) -> None:
  """Deletes an object, if it is there, and if its generation is still `of`, unless that is None."""
  folder, name = _split(url)
  folder.write(name, None, if_equal=of).result()


def names(url: str, *, seconds: float | None = None) -> list[str]:
  """The names of all objects below URL/, without that prefix, sorted; TimeoutError if listing them
  takes longer than `seconds` (None: no limit)."""
  return sorted(name.decode() for name in _open(url).list().result(timeout=seconds))


def delete_below(url: str) -> None:
  """Deletes all objects below URL/."""
  _open(url).delete_range(ts.KvStore.KeyRange()).result()


def create_array(url: str, *, shape: Sequence[int], dtype: np.dtype, block: Sequence[int]) -> Any:
  """An array below URL/ that several processes write, each of its blocks one object (zarr 3)."""
  metadata = {
    "shape": list(shape),
    "data_type": dtype.name,
    "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": list(block)}},
    "codecs": checked_codecs(dtype),
  }
  spec = {
    "driver": "zarr3",
    "kvstore": f"{url.rstrip('/')}/",
    "metadata": metadata,
    # Otherwise a block of zeros would not be stored, and would look like a lost one.
    "store_data_equal_to_fill_value": True,
  }
  return ts.open(spec, create=True, open=True).result()


def checked_codecs(dtype: np.dtype) -> list[dict[str, Any]]:
  """How zarr 3 stores a block of that dtype: little-endian bytes and their CRC, by which a damaged
  one is refused when it is read."""
  order = {} if dtype.itemsize == 1 else {"configuration": {"endian": "little"}}
  return [{"name": "bytes", **order}, {"name": "crc32c"}]


def open_array(url: str) -> Any:
  return ts.open({"driver": "zarr3", "kvstore": f"{url.rstrip('/')}/"}, read=True).result()


def _open(url: str) -> Any:
  return ts.KvStore.open(f"{url.rstrip('/')}/").result()


def _split(url: str) -> tuple[Any, str]:
  folder, _, name = url.rpartition("/")
  return _open(folder), name
