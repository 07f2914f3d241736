"""Which implementation of a kernel runs: decided once, when a model is built, and logged."""

import functools
from collections.abc import Mapping

import jax
from absl import logging


def resolve(
  kernel: str, requested: str, *, available: tuple[str, ...], defaults: Mapping[str, str]
) -> str:
  """The implementation to run: `requested`, or the default of this platform for "auto".

  `defaults` goes from platform ("cpu", "gpu", "tpu") to implementation. A name that is not
  available is a ValueError: it is never replaced by another.
  """
  if requested != "auto":
    if requested not in available:
      raise ValueError(
        f"{kernel}: implementation {requested!r} is none of {', '.join(available)}, auto"
      )
    return requested
  platform = jax.default_backend()
  if platform not in defaults:
    raise ValueError(
      f"{kernel}: no default for platform {platform!r}; name one of {', '.join(available)}"
    )
  _log_once(kernel, defaults[platform], platform)
  return defaults[platform]


@functools.cache
def _log_once(kernel: str, implementation: str, platform: str) -> None:
  logging.info("%s: %s, the default on %s", kernel, implementation, platform)
