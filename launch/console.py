"""A command's output for people: time and message on each line, one line for a refusal."""

import contextlib
import logging as python_logging
import math
import os
import pathlib
import sys
import typing
from collections.abc import Iterator, Sequence

from absl import flags, logging


def log_for_people() -> None:
  """Sets up absl logging; of JAX, Orbax and matplotlib only warnings are shown."""
  logging.set_verbosity(logging.INFO)
  logging.get_absl_handler().setFormatter(
    python_logging.Formatter("%(asctime)s %(message)s", "%H:%M:%S")
  )
  for name in ("jax", "matplotlib"):
    python_logging.getLogger(name).setLevel(python_logging.WARNING)


def parse_flags(argv: Sequence[str]) -> list[str]:
  """The arguments that are not flags, for app.run; a wrong flag is refused."""
  try:
    return flags.FLAGS(list(argv))
  except flags.Error as error:
    refuse(error)


def must_be_finite(*numbers: flags.FlagHolder[float] | flags.FlagHolder[float | None]) -> None:
  """Refuses infinite and NaN values of these flags, which bounds let through."""
  for number in numbers:
    flags.register_validator(
      number.name, lambda value: value is None or math.isfinite(value), "must be a finite number"
    )


def check_output(name: str) -> None:
  """ValueError if the flag `name` is set and no file can be written there. Called before the work
  whose result goes there."""
  place = flags.FLAGS[name].value
  if place is None:
    return
  path = pathlib.Path(place)
  if path.is_dir():
    raise ValueError(f"--{name}={place} is a folder: name a file in it")
  if not path.parent.is_dir():
    raise ValueError(
      f"--{name}={place}: there is no folder {str(path.parent)!r}: make it, or name another file"
    )
  if not os.access(path if path.exists() else path.parent, os.W_OK):
    raise ValueError(f"--{name}={place}: this user may not write there: name another file")


@contextlib.contextmanager
def writing(path: pathlib.Path) -> Iterator[None]:
  """Turns an OSError within it into a refusal with the path (by default `path`) and the reason; a
  file that did not exist before is removed."""
  is_new = not path.exists()
  try:
    yield
  except OSError as error:
    if is_new:
      # Fails for a folder, which stays.
      with contextlib.suppress(OSError):
        path.unlink()
    reason = error.strerror or error
    refuse(ValueError(f"{error.filename or path}: {reason}: mend that, or name another place"))


def refuse(error: Exception) -> typing.NoReturn:
  """One line on stderr and exit status 2. ml_collections quotes its messages and breaks lines."""
  text = str(error.args[0] if error.args else error).replace("\\n", "\n").replace("\\", "")
  line = ". ".join(part.strip() for part in text.split("\n"))
  print(f"error: {line}", file=sys.stderr)
  sys.exit(2)
