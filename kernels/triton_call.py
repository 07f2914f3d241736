"""Calls of Triton kernels: traced once for equal calls, interpreted where there is no GPU."""

from collections.abc import Hashable
from functools import partial
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl


class Call(Hashable, Protocol):
  """A launch without its arrays, a NamedTuple: equal ones compute the same from equal arrays."""

  def __call__(self, interpret: bool, *arrays: jax.Array) -> Any: ...


def shape_of(x: jax.Array) -> jax.ShapeDtypeStruct:
  """A result with the shape and dtype of x."""
  return jax.ShapeDtypeStruct(x.shape, x.dtype)


def program_ids(grid: tuple[int, ...]) -> list[jax.Array]:
  """Within a kernel, the index of the program in the grid.

  It carries the grid's bounds, with which LLVM computes one address plus constants instead of many.
  """
  return [jnp.minimum(pl.program_id(axis), size - 1) for axis, size in enumerate(grid)]


@partial(jax.jit, static_argnums=0)
def on_gpu_or_interpreted(call: Call, *arrays: jax.Array) -> Any:
  """call(interpret, *arrays): compiled where the program is for a GPU, interpreted on CPU.

  The platform that the program is lowered for decides; on others lowering fails. Traced and lowered
  once for all blocks of a model: one by one, those of an unrolled model of 1b took 43 s.
  """
  return jax.lax.platform_dependent(*arrays, cpu=partial(call, True), cuda=partial(call, False))
