"""Eight simulated CPU devices for the whole session, set before jax is first imported."""

import os
import sys

os.environ["JAX_PLATFORMS"] = "cpu"
# Most of a test's time is LLVM's: without its optimisations the suite takes a quarter of the time.
# The passes that lay out arrays, fuse and assign buffers, which tests read, run all the same.
os.environ["XLA_FLAGS"] = " ".join(
  [
    os.environ.get("XLA_FLAGS", ""),
    "--xla_force_host_platform_device_count=8",
    "--xla_backend_optimization_level=0",
    "--xla_llvm_disable_expensive_passes=true",
  ]
).strip()

assert "jax" not in sys.modules, "jax was imported before the simulated devices were set"
