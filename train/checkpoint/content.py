"""What is stored with the arrays of a checkpoint, and how to tell whether it is broken.

  format, step, kind   of the checkpoint
  arrays               name -> [shape, dtype, checksum]
  run                  the run's record, train/record.py
  sha256               of all that

In a bucket it also says where the arrays are: train/checkpoint/bucket.py.
"""

import hashlib
import json
from typing import Any

import jax

FORMAT = "checkpoint 1"


class DamagedCheckpointError(ValueError):
  """A checkpoint cannot be read, or is not what was written; the message names what and where."""


class UnreadableError(DamagedCheckpointError):
  """Damage that one process may see and another may not."""


def parsed(record: bytes, *, where: str, step: int) -> dict[str, Any]:
  """The content of record.json, after checking that it is what was written for `step`.

  Raises DamagedCheckpointError, and ValueError for another format. `where` is for messages.
  """
  try:
    content = json.loads(record)
  except ValueError as error:
    raise DamagedCheckpointError(
      f"checkpoint {where} is damaged: record.json is not JSON"
    ) from error
  if not isinstance(content, dict) or content != sealed(content):
    raise DamagedCheckpointError(
      f"checkpoint {where} is damaged: record.json changed after it was written (sha256)"
    )
  if content["format"] != FORMAT:
    raise ValueError(
      f"checkpoint {where} has format {content['format']!r}, this code reads {FORMAT!r}"
    )
  if content["step"] != step:
    raise DamagedCheckpointError(f"checkpoint {where} is damaged: it is of step {content['step']}")
  return content


def sealed(content: dict[str, Any]) -> dict[str, Any]:
  """`content` with the sha256 of everything else in it, as plain JSON values."""
  rest = {key: value for key, value in content.items() if key != "sha256"}
  text = json.dumps(rest, sort_keys=True, allow_nan=False)
  return {**json.loads(text), "sha256": hashlib.sha256(text.encode()).hexdigest()}


def describe(named: dict[str, jax.Array], sums: dict[str, str]) -> dict[str, list[Any]]:
  return {name: [list(x.shape), str(x.dtype), sums[name]] for name, x in named.items()}


def check_arrays(saved: dict[str, Any], named: dict[str, Any], *, where: str) -> None:
  """Raises ValueError unless `saved`, as `describe` gave it, has exactly the arrays of `named`."""
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
      f"checkpoint {where} is not of this model and optimizer: {first_few(wrong, '; ')}. Use the "
      "config it was made with, or another workdir"
    )


def first_few(names: list[str], separator: str = ", ", limit: int = 5) -> str:
  more = f"{separator}and {len(names) - limit} more" if len(names) > limit else ""
  return separator.join(names[:limit]) + more
