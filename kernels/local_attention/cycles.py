"""The share of a TPU's peak that splash attention reaches, by the compiler's estimate.

  python -m kernels.local_attention.cycles [v5e v5p v6e]

One JSON line for each chip and head size: estimated cycles of a pair of blocks (queries x keys)
forward and backward (kernels/cycle_estimate.py), and the share of the matrix units' peak that 2 and
5 products of such a pair then have; the backward kernels form 7. The compiler assumes that a kernel
skips whatever it may skip, so the condition that a pair of blocks is visited is replaced by true.
Extra work of the first and the last pair of a row is not counted.
"""

import sys
import types
from typing import Any

from kernels.cycle_estimate import CHIPS, estimated_cycles, sharding_on  # isort: skip

import jax
import jax.numpy as jnp

from kernels.compiler_record import print_record
from kernels.local_attention import splash_tpu

_TIME, _HEADS = 2048, 4
_HEAD_SIZES = (128, 256)


class _When:
  """The library's `pl.when`, with the second of each kernel's three conditions taken as true. They
  ask whether a pair of blocks is the first, whether it is visited, and whether it is the last."""

  def __init__(self, when):
    self.when, self.calls = when, 0

  def __call__(self, condition):
    self.calls += 1
    return (lambda body: body()) if self.calls % 3 == 2 else self.when(condition)


def pair_cycles(chip: str, head_size: int) -> tuple[float, float, int]:
  """Cycles of a pair of blocks, forward and backward, and the size of a block."""
  where = sharding_on(chip)

  def array(shape, dtype):
    return jax.ShapeDtypeStruct(shape, dtype, sharding=where)

  q_BTNH = array((1, _TIME, _HEADS, head_size), jnp.bfloat16)
  k_BSEH, documents_BT = array((1, _TIME, 1, head_size), jnp.bfloat16), array((1, _TIME), jnp.int32)

  def loss(*arrays):
    return jnp.sum(splash_tpu.attention(*arrays, window=None).astype(jnp.float32))

  library: Any = splash_tpu.splash
  plain = library.pl
  library.pl = types.SimpleNamespace(**{**vars(plain), "when": _When(plain.when)})
  try:
    cycles = estimated_cycles(
      jax.grad(loss, (0, 1, 2)), (q_BTNH, k_BSEH, k_BSEH, documents_BT, documents_BT)
    )
  finally:
    library.pl = plain
  block = splash_tpu.block_size(_TIME, None)
  pairs = _HEADS * (_TIME // block) ** 2
  forward = sum(number for name, number in cycles.items() if "splash_mqa_fwd" in name)
  backward = sum(number for name, number in cycles.items() if "splash_mqa_d" in name)
  return forward / pairs, backward / pairs, block


def main(chips: list[str]) -> None:
  for chip in chips or list(CHIPS):
    for head_size in _HEAD_SIZES:
      forward, backward, block = pair_cycles(chip, head_size)
      product = 2 * block * block * head_size / CHIPS[chip].peak_flops * CHIPS[chip].clock
      record = {
        "chip": chip,
        "head_size": head_size,
        "block": block,
        "dtype": "bfloat16",
        "pair_cycles_forward": round(forward),
        "pair_cycles_backward": round(backward),
        "share_forward": round(2 * product / forward, 3),
        "share_backward": round(5 * product / backward, 3),
      }
      print_record(record, command=f"kernels.local_attention.cycles {chip}")


if __name__ == "__main__":
  main(sys.argv[1:])
