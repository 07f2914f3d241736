"""Decides which implementation of a kernel runs, once, when a model is built, and logs it.

The platform is that of this process, or within `targeting(platform)` another one, because programs
are also compiled for machines that are not here (launch/plan.py).
"""

import functools
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from typing import Any

import jax
from absl import logging

_NEWEST_GPU = "NVIDIA H100 80GB HBM3"
_target: ContextVar[tuple[str, str] | None] = ContextVar("target", default=None)


@contextmanager
def targeting(platform: str, *, device_kind: str = "") -> Iterator[None]:
  """Within it, "auto" stands for the default of `platform` ("cpu", "gpu", "tpu").

  `device_kind` is what JAX calls its devices; "" means the newest.
  """
  token = _target.set((platform, device_kind))
  try:
    with _seen_by_triton(platform, device_kind or _NEWEST_GPU):
      yield
  finally:
    _target.reset(token)


def _seen_by_triton(platform: str, device_kind: str) -> AbstractContextManager[Any]:
  """Sets the mesh that Pallas, where there is no GPU, asks for the kind of GPU to compile for."""
  if platform != "gpu" or jax.__version_info__ < (0, 11) or jax.default_backend() == "gpu":
    return nullcontext()
  device = jax.sharding.AbstractDevice(device_kind=device_kind, num_cores=None, platform="gpu")
  mesh = jax.sharding.AbstractMesh((), (), abstract_device=device)
  return jax.sharding.use_abstract_mesh(mesh)


def target_platform() -> str:
  """The platform that programs are made for: `targeting`'s, else this process's."""
  target = _target.get()
  return jax.default_backend() if target is None else target[0]


def target_kind() -> str:
  """What JAX calls the devices that programs are made for; "" if none is named."""
  target = _target.get()
  return jax.devices()[0].device_kind if target is None else target[1]


def runs_triton() -> bool:
  """Whether programs are made for GPUs that run our Triton kernels: NVIDIA's from Ampere on."""
  if _target.get() is not None or jax.default_backend() != "gpu":
    return target_platform() == "gpu"
  device = jax.devices()[0]
  if "cuda" not in device.client.platform_version.lower():
    return False
  return float(device.compute_capability) >= 8.0


def gpu_defaults(defaults: Mapping[str, str], *, otherwise: str) -> Mapping[str, str]:
  """`defaults`, with `otherwise` for GPUs that do not run our Triton kernels."""
  return defaults if runs_triton() else {**defaults, "gpu": otherwise}


def resolve(
  kernel: str, requested: str, *, available: tuple[str, ...], defaults: Mapping[str, str]
) -> str:
  """The implementation to run: `requested`, or the default of the target platform for "auto".

  `defaults` goes from platform ("cpu", "gpu", "tpu") to implementation. A name that is not
  available is a ValueError: it is never replaced by another.
  """
  if requested != "auto":
    if requested not in available:
      raise ValueError(
        f"{kernel}: implementation {requested!r} is none of {', '.join(available)}, auto"
      )
    return requested
  platform = target_platform()
  if platform not in defaults:
    raise ValueError(
      f"{kernel}: no default for platform {platform!r}; name one of {', '.join(available)}"
    )
  _log_once(kernel, defaults[platform], platform)
  return defaults[platform]


@functools.cache
def _log_once(kernel: str, implementation: str, platform: str) -> None:
  logging.info("%s: %s, the default on %s", kernel, implementation, platform)
