"""How a command talks to people: time and message on each line, one line for what it refuses."""

import logging as python_logging
import sys
import typing
from collections.abc import Sequence

from absl import flags, logging


def log_for_people() -> None:
  """Sets up absl logging; of JAX, Orbax and matplotlib only what is a warning is shown."""
  logging.set_verbosity(logging.INFO)
  logging.get_absl_handler().setFormatter(
    python_logging.Formatter("%(asctime)s %(message)s", "%H:%M:%S")
  )
  for name in ("jax", "matplotlib"):
    python_logging.getLogger(name).setLevel(python_logging.WARNING)


def parse_flags(argv: Sequence[str]) -> list[str]:
  """The arguments that are no flags, for app.run; a wrong flag is refused."""
  try:
    return flags.FLAGS(list(argv))
  except flags.Error as error:
    refuse(error)


def refuse(error: Exception) -> typing.NoReturn:
  """One line on stderr and exit status 2; ml_collections quotes its messages and breaks lines."""
  text = str(error.args[0] if error.args else error).replace("\\n", "\n").replace("\\", "")
  line = ". ".join(part.strip() for part in text.split("\n"))
  print(f"error: {line}", file=sys.stderr)
  sys.exit(2)
