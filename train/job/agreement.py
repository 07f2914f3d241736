"""Whether all processes of a job run the same thing: config, data, code and packages.

Otherwise a host with another checkout or token store would go on unnoticed, or hang.
"""

import hashlib
import json
import pathlib
from typing import Any

from train.job.peers import Peers

_ROOT = pathlib.Path(__file__).parents[2]
_FOLDERS = ("train", "models", "sharding", "data", "kernels", "configs", "launch")
_SHOWN = 5


def check(peers: Peers, record: dict[str, Any]) -> None:
  """Raises ValueError on every process if one has another run record, source file or package.

  `record` is that of train/record.py: the settings and the fingerprints of the data. The message
  names the process and what differs from process 0.
  """
  if peers.count == 1:
    return
  mine = {
    **record["identity"],
    **{f"package {name}": version for name, version in record["versions"].items()},
    **{f"file {name}": digest for name, digest in _sources().items()},
  }
  text = json.dumps(mine, sort_keys=True)
  if len(set(peers.exchange("same", hashlib.sha256(text.encode()).hexdigest()))) == 1:
    return
  first = json.loads(peers.exchange("same_first", text if peers.index == 0 else "")[0])
  found = peers.exchange("same_differences", json.dumps(_differences(first, mine)))
  lines = [
    f"{peers.name(index)}: {', '.join(differences)}"
    for index, differences in enumerate(map(json.loads, found))
    if differences
  ]
  raise ValueError(
    f"not all processes run the same as {peers.name(0)}. {'; '.join(lines)}. Start all with the "
    "same command, code and data"
  )


def _differences(first: dict[str, Any], mine: dict[str, Any]) -> list[str]:
  """What differs from process 0, for people; for a file only that it differs."""
  lines = []
  for name in sorted({*first, *mine}):
    theirs, ours = first.get(name), mine.get(name)
    if theirs != ours:
      is_file = name.startswith("file ")
      lines.append(f"{name} differs" if is_file else f"{name} is {ours!r}, not {theirs!r}")
  more = [f"and {len(lines) - _SHOWN} more"] if len(lines) > _SHOWN else []
  return lines[:_SHOWN] + more


def _sources() -> dict[str, str]:
  """sha256 of every source file, which says more than a commit: the tree may be changed."""
  return {
    path.relative_to(_ROOT).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
    for folder in _FOLDERS
    for path in sorted((_ROOT / folder).rglob("*.py"))
  }
