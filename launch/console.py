"""How a command talks to people: time and message on each line."""

import logging as python_logging

from absl import logging


def log_for_people() -> None:
  """Sets up absl logging; of JAX, Orbax and matplotlib only what is a warning is shown."""
  logging.set_verbosity(logging.INFO)
  logging.get_absl_handler().setFormatter(
    python_logging.Formatter("%(asctime)s %(message)s", "%H:%M:%S")
  )
  for name in ("jax", "matplotlib"):
    python_logging.getLogger(name).setLevel(python_logging.WARNING)
