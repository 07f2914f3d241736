"""The recurrence's Triton kernels on short chunks, which compile sooner in the interpreter."""

import contextlib
from collections.abc import Iterator

import pytest

from kernels.linear_scan import pallas_gpu as plain
from kernels.rg_lru import pallas_gpu as fused
from kernels.triton_call import on_gpu_or_interpreted


@contextlib.contextmanager
def small_tiles(*, steps: int, warps: int = 1) -> Iterator[None]:
  """Within, chunks have `steps` tokens in `warps` parts, and two steps are computed side by side.

  Forgets earlier traces: constants are not part of the key by which JAX finds them. At the end,
  AssertionError if no kernel ran, or one on other chunks.
  """
  tiles_of, cut_into = plain.Tiles.of, set()

  def watched(shape, *, steps, warps):
    cut_into.add((steps, warps))
    return tiles_of(shape, steps=steps, warps=warps)

  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(plain.Tiles, "of", watched)
    for module, name in ((plain, ""), (fused, ""), (fused, "_BACKWARD")):
      patch.setattr(module, f"{name}_STEPS", steps)
      patch.setattr(module, f"{name}_WARPS", warps)
    patch.setattr(plain, "GROUP", 2)
    patch.setattr(plain, "_WINDOWS", (2, 3))
    on_gpu_or_interpreted.clear_cache()
    try:
      yield
    finally:
      on_gpu_or_interpreted.clear_cache()
  assert cut_into == {(steps, warps)}
