"""How a command talks to people: time and message on each line."""

import logging as python_logging

from absl import logging


def log_for_people() -> None:
  """Sets up absl logging; of JAX and Orbax only what is a warning is shown."""
  logging.set_verbosity(logging.INFO)
  logging.get_absl_handler().setFormatter(
    python_logging.Formatter("%(asctime)s %(message)s", "%H:%M:%S")
  )
  python_logging.getLogger("jax").setLevel(python_logging.WARNING)
