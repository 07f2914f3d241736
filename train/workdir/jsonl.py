"""Files of one JSON object a line, written by a process that may be killed at any time."""

import json
import math
import os
import pathlib
from collections.abc import Iterable
from typing import Any

from absl import logging

from train.workdir.whole_file import write_whole


def read_jsonl(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
  """The objects of a file in its order, none if it is missing; lines that are not whole are left
  out."""
  file = pathlib.Path(path)
  lines = file.read_bytes().split(b"\n") if file.exists() else []
  return [record for line in lines if (record := _parse(line)) is not None]


def series(records: Iterable[dict[str, Any]], name: str) -> dict[int, float]:
  """step -> finite value of one name, steps ascending; the last record of a step counts."""
  found = {
    record["step"]: float(record[name]) for record in records if name in record and "step" in record
  }
  return {step: found[step] for step in sorted(found) if math.isfinite(found[step])}


def truncate(path: pathlib.Path, step: int) -> None:
  """Removes records of steps after `step` and what is no record of a step; all or nothing."""
  if not path.exists():
    return
  before = path.read_bytes()
  kept = [
    record
    for record in read_jsonl(path)
    if isinstance(record.get("step"), int) and record["step"] <= step
  ]
  after = "".join(json.dumps(record) + "\n" for record in kept).encode()
  if after == before:
    return
  logging.info("%s: removing what was written after step %d", path, step)
  write_whole(path, after)


def _parse(line: bytes) -> dict[str, Any] | None:
  try:
    record = json.loads(line)
  except ValueError:
    return None
  return record if isinstance(record, dict) else None
