"""Float32 functions for Triton kernels, each of which is one instruction on NVIDIA's GPUs.

Those of jax.numpy handle subnormal numbers, which takes three or four more instructions; a quotient
takes eight, and a product and a sum never become one instruction. The functions here treat
subnormal numbers as 0, and are off by at most 2 units in the last place.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas import triton as plgpu

LOG2_E = 1.4426950408889634


class Math(NamedTuple):
  exp2: Callable[[jax.Array], jax.Array]
  reciprocal: Callable[[jax.Array], jax.Array]
  sqrt: Callable[[jax.Array], jax.Array]
  rsqrt: Callable[[jax.Array], jax.Array]
  fma: Callable[..., jax.Array]  # (a, b, c) -> a b + c; any of them may be a Python float


def _instruction(name: str) -> Callable[[jax.Array], jax.Array]:
  def apply(x: jax.Array) -> jax.Array:
    return _assembly(f"{name}.approx.ftz.f32 $0, $1;", x)

  return apply


def _fma(*args: jax.Array | float) -> jax.Array:
  arrays = [x for x in args if isinstance(x, jax.Array)]
  names = (f"${index}" for index in range(1, 1 + len(arrays)))
  # A constant is part of the instruction, in hexadecimal, as PTX requires.
  operands = [_hexadecimal(x) if isinstance(x, float) else next(names) for x in args]
  return _assembly(f"fma.rn.ftz.f32 $0, {', '.join(operands)};", *arrays)


def _hexadecimal(x: float) -> str:
  return "0f" + np.float32(x).view(np.uint32).item().to_bytes(4, "big").hex().upper()


def _assembly(text: str, *arrays: jax.Array) -> jax.Array:
  shape = jnp.broadcast_shapes(*(x.shape for x in arrays))
  [y] = plgpu.elementwise_inline_asm(
    text,
    args=[jnp.broadcast_to(x, shape) for x in arrays],
    constraints=",".join(["=f", *("f" for _ in arrays)]),
    pack=1,
    result_shape_dtypes=[jax.ShapeDtypeStruct(shape, jnp.float32)],
  )
  return y


_INSTRUCTIONS = Math(
  exp2=_instruction("ex2"),
  reciprocal=_instruction("rcp"),
  sqrt=_instruction("sqrt"),
  rsqrt=_instruction("rsqrt"),
  fma=_fma,
)
_INTERPRETED = Math(
  exp2=jnp.exp2,
  reciprocal=jnp.reciprocal,
  sqrt=jnp.sqrt,
  rsqrt=jax.lax.rsqrt,
  fma=lambda a, b, c: a * b + c,
)


def of(*, interpret: bool) -> Math:
  """The functions for kernels that are compiled, or that Pallas interprets."""
  return _INTERPRETED if interpret else _INSTRUCTIONS
