"""What a token store was made from, as its manifest records it, to find out whether it is stale."""

import hashlib
import json
import os
from typing import Any

from data.prepare import documents


def file(path: str) -> dict[str, Any]:
  """Name, size and time of a file; its digest is added when it has been read."""
  status = os.stat(path)
  return {"path": path, "size": status.st_size, "mtime_ns": status.st_mtime_ns}


def difference(before: dict[str, Any], now: dict[str, Any]) -> str:
  """The first thing in which two origins differ, or ""."""
  if not {"settings", "inputs"} <= before.keys():
    return "it does not say what"
  for name, value in now["settings"].items():
    if before["settings"].get(name) != value:
      return f"{name} was {before['settings'].get(name)!r}, it is {value!r}"
  old = {file["path"]: file for file in before["inputs"]}
  new = {file["path"]: file for file in now["inputs"]}
  if list(old) != list(new):
    added, gone = sorted(new.keys() - old.keys()), sorted(old.keys() - new.keys())
    if added or gone:
      return f"{f'{added[0]} is new' if added else f'{gone[0]} is not among the inputs now'}"
    return "the inputs are in another order"
  for path, file in new.items():
    if file["size"] != old[path]["size"]:
      return f"{path} had {old[path]['size']} bytes, it has {file['size']}"
    # A fresh checkout changes the time but not the content.
    if file["mtime_ns"] != old[path]["mtime_ns"] and file_digest(path) != old[path]["digest"]:
      return f"{path} was edited"
  return ""


def file_digest(path: str) -> str:
  """The digest of a file as it is now; equal to that of its parts."""
  digests = []
  for piece in documents.pieces(path):
    digest = hashlib.sha256()
    for _ in documents.chunks(piece, digest.update):
      pass
    digests.append(digest.hexdigest())
  return join_digests(digests)


def join_digests(digests: list[str]) -> str:
  """The digest of a file, from those of its pieces in order."""
  return hashlib.sha256(json.dumps(digests).encode()).hexdigest()
