"""Eight simulated CPU devices for the whole session, set before jax is first imported."""

import os
import sys

os.environ["JAX_PLATFORMS"] = "cpu"
_FLAGS = os.environ.get("XLA_FLAGS", "")
if "xla_force_host_platform_device_count" not in _FLAGS:
  os.environ["XLA_FLAGS"] = f"{_FLAGS} --xla_force_host_platform_device_count=8".strip()

assert "jax" not in sys.modules, "jax was imported before the simulated devices were set"
