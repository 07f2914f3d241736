"""What a process sets on its machine before it trains."""

import ctypes
import platform

import jax

# Of mallopt in glibc's malloc.h.
_TRIM_THRESHOLD, _MMAP_MAX = -1, -4


def keep_memory() -> None:
  """Makes steps on CPUs reuse the memory of those before. Call it before JAX makes its devices.

  By default every step gets its hundreds of megabytes of temporaries from the kernel, page by page,
  and gives them back: a tenth of its time (docs/benchmarks.md). glibc can keep what was freed, but
  only of the main thread; so that is where steps then run. Nothing changes for other devices.

  Not for one process of several: it would wait for the others in the main thread, deaf to signals.
  """
  jax.config.update("jax_cpu_enable_async_dispatch", False)
  if jax.default_backend() == "cpu" and platform.libc_ver()[0] == "glibc":
    libc = ctypes.CDLL(None)
    libc.mallopt(_MMAP_MAX, 0)
    libc.mallopt(_TRIM_THRESHOLD, -1)
