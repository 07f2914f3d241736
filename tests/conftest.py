"""Eight simulated CPU devices for the whole session, set before jax is first imported."""

import os
import sys

from tests.compiler_flags import FAST_TO_COMPILE

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = " ".join(
  [
    os.environ.get("XLA_FLAGS", ""),
    "--xla_force_host_platform_device_count=8",
    FAST_TO_COMPILE,
  ]
).strip()

assert "jax" not in sys.modules, "jax was imported before the simulated devices were set"
