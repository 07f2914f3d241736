"""What the TPU compiler says of a program, as a line of JSON.

jax is not imported here: kernels/cycle_estimate.py sets what it reads when it is.
"""

import datetime
import json
import sys
from collections.abc import Mapping
from importlib import metadata
from typing import Any


def print_record(found: Mapping[str, Any], *, command: str) -> None:
  """`found` as a JSON line, with the compiler's versions, the date and the command."""
  record = {
    **found,
    "jax": metadata.version("jax"),
    "libtpu": metadata.version("libtpu"),
    "date": datetime.date.today().isoformat(),
    "command": f"python -m {command}",
  }
  sys.stdout.write(json.dumps(record) + "\n")
  sys.stdout.flush()
