"""XLA flags with which programs compile fast and run slowly: most of a test's time is compilation.

The passes that lay out arrays, fuse and assign buffers, which tests read, run all the same.
"""

import importlib.metadata

_FLAGS = ["--xla_backend_optimization_level=0", "--xla_llvm_disable_expensive_passes=true"]
if importlib.metadata.version("jaxlib").startswith("0.10."):
  # Two thirds of the time; later releases have no other emitters.
  _FLAGS.append("--xla_cpu_use_fusion_emitters=false")
FAST_TO_COMPILE = " ".join(_FLAGS)
