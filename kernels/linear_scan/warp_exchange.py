"""Exchange of values between the warps of a Triton program, in PTX, because Triton has none.

Letters of this file: S parts of a program, a warp each; K channels, a power of 2, two to a thread.
"""

import jax
import jax.numpy as jnp
from jax.experimental.pallas import triton as plgpu


def exchanged(
  part_S1: jax.Array, column_SK: jax.Array, parts: range, arrays: tuple[jax.Array, ...]
) -> list[list[jax.Array]]:
  """For each float32 array [S, K] the values of the parts given, in all parts: by one barrier,
  through shared memory that nothing else uses.

  A sum over S of an array that is 0 except in one part would do the same, with four barriers each.
  Elements are addressed by part and column, wherever Triton keeps them. The code only relies on
  each thread having two, as many as [S, K] has for each.
  """
  shape, count = column_SK.shape, len(arrays)
  channels, element_bytes = shape[1], 4 * count
  part_bytes = channels * element_bytes

  def stored(element: int) -> list[str]:
    """The PTX for the elements of all arrays; $0 or $1 becomes the address of those of part 0."""
    values = ", ".join(f"${6 + 2 * which + element}" for which in range(count))
    return [
      f"and.b32 column, ${4 + element}, {channels - 1};",
      f"mad.lo.s32 ${element}, column, {element_bytes}, all;",
      f"mad.lo.s32 mine, ${2 + element}, {part_bytes}, ${element};",
      f"st.shared{'.v2' if count == 2 else ''}.f32 [mine], {{{values}}};",
    ]

  lines = [
    f"{{ .shared .align {element_bytes} .b8 parts[{shape[0] * part_bytes}];",
    ".reg .b32 all, column, mine;",
    "mov.b32 all, parts;",
    *stored(0),
    *stored(1),
    "bar.sync 0; }",
  ]
  [at_SK] = plgpu.elementwise_inline_asm(
    " ".join(lines),
    args=[jnp.broadcast_to(part_S1, shape), column_SK, *arrays],
    constraints=",".join(["=&r", "=&r", *"rrrr", *"ff" * count]),
    pack=2,
    result_shape_dtypes=[jax.ShapeDtypeStruct(shape, jnp.int32)],
  )

  def loaded(part: int, which: int) -> jax.Array:
    [x_SK] = plgpu.elementwise_inline_asm(
      f"ld.shared.f32 $0, [$1 + {part * part_bytes + 4 * which}];",
      args=[at_SK],
      constraints="=f,r",
      pack=1,
      result_shape_dtypes=[jax.ShapeDtypeStruct(shape, jnp.float32)],
    )
    return x_SK

  return [[loaded(part, which) for part in parts] for which in range(count)]
