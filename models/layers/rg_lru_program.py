"""The recurrent block as compiled for TPU: `python -m models.layers.rg_lru_program v5e`.

One JSON line for each of three published sizes, forward alone and with all gradients, the gates
by each implementation of kernels/block_diagonal: bytes that the compiled program accesses, bytes
that only move an activation to another layout, and the compiler's own estimate of the cycles of
everything except the Pallas kernels (python -m kernels.rg_lru.cycles estimates those). It runs on a
CPU with libtpu installed; nothing is timed.
"""

import re
import sys
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import SingleDeviceSharding

from kernels import block_diagonal
from kernels.compiler_record import print_record
from models.layers import rg_lru, segments
from models.sizes import SIZES
from sharding import machine
from sharding.program_text import Instruction, arrays_of, computations_of, size_of

TOPOLOGIES = {"v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2"}
_SIZES = ("1b", "7b", "14b")
_BATCH, _TIME = 8, 2048
# What a fusion that computes nothing consists of.
_MOVES = {"parameter", "constant", "bitcast", "tuple", "get-tuple-element"}
_MOVES |= {"copy", "transpose", "reshape", "slice", "concatenate", "pad", "convert"}


def compiled(
  config: rg_lru.Config, device: Any, *, width: int, batch: int, time: int, backward: bool
) -> jax.stages.Compiled:
  """The block on bfloat16 rows for a TPU that need not be here; with gradients if `backward`."""

  def build():
    return config.build(width, num_blocks=1, rngs=nnx.Rngs(0))

  graph, params = nnx.split(nnx.eval_shape(build))

  def forward(params, x_BTD, segments_BT):
    row, _ = segments.segments(segments_BT, segments.initial_state(batch))
    block: Any = nnx.merge(graph, params)
    y_BTD, _ = block(x_BTD, row, None)
    return y_BTD

  def with_gradients(params, x_BTD, segments_BT, dy_BTD):
    y_BTD, vjp = jax.vjp(lambda w, x: forward(w, x, segments_BT), params, x_BTD)
    return y_BTD, vjp(dy_BTD)

  x_BTD = jax.ShapeDtypeStruct((batch, time, width), jnp.bfloat16)
  arguments = (params, x_BTD, jax.ShapeDtypeStruct((batch, time), jnp.int32))
  run = forward
  if backward:
    run, arguments = with_gradients, (*arguments, x_BTD)
  layout = SingleDeviceSharding(device)
  arguments = jax.tree.map(
    lambda z: jax.ShapeDtypeStruct(z.shape, z.dtype, sharding=layout), arguments
  )
  return jax.jit(run).lower(*arguments).compile()


def instructions(text: str) -> list[Instruction]:
  """The instructions of the program that runs, without those inside its fusions."""
  computations, entry = computations_of(text)
  return list(computations[entry].values())


def result_bytes(one: Instruction) -> int:
  """The bytes of all arrays that the instruction makes."""
  return size_of(arrays_of(one.shape))


def moves(text: str, least_bytes: int) -> list[Instruction]:
  """Instructions that only move an array of at least so many bytes to another place or layout."""
  computations, entry = computations_of(text)
  found = []
  for one in computations[entry].values():
    is_move = one.opcode in ("copy", "transpose", "reshape")
    if one.opcode == "fusion" and (called := re.search(r"calls=%?([\w.\-]+)", one.rest)):
      is_move = {inside.opcode for inside in computations[called[1]].values()} <= _MOVES
    if is_move and result_bytes(one) >= least_bytes:
      found.append(one)
  return found


def main(chips: list[str]) -> None:
  for chip in chips or list(TOPOLOGIES):
    device = machine.of_topology(TOPOLOGIES[chip]).devices()[0]
    for width, rnn_width in ((SIZES[name].width, SIZES[name].rnn_width) for name in _SIZES):
      for backward in (False, True):
        for gates in block_diagonal.IMPLEMENTATIONS:
          config = rg_lru.Config(rnn_width=rnn_width, scan="pallas_tpu", gates=gates)
          program = compiled(
            config, device, width=width, batch=_BATCH, time=_TIME, backward=backward
          )
          text, memory = program.as_text(), program.memory_analysis()
          assert text is not None
          assert memory is not None
          states = _BATCH * _TIME * rnn_width
          moved = moves(text, 2 * states)
          cycles = re.findall(r'"estimated_cycles":"(\d+)"', text[text.index("\nENTRY ") :])
          record = {
            "chip": chip,
            "program": "forward and gradients" if backward else "forward",
            "gates": gates,
            "shape": [_BATCH, _TIME, rnn_width],
            "width": width,
            "dtype": "bfloat16",
            "bytes_per_state": round(_bytes_accessed(program) / states, 1),
            "moves": len(moved),
            # Each is read and written.
            "moved_bytes_per_state": round(2 * sum(map(result_bytes, moved)) / states, 1),
            "temporary_bytes": memory.temp_size_in_bytes,
            "estimated_cycles_without_kernels": sum(map(int, cycles)),
          }
          print_record(record, command=f"models.layers.rg_lru_program {chip}")


def _bytes_accessed(program: jax.stages.Compiled) -> float:
  analysis = program.cost_analysis()
  assert analysis is not None
  return analysis["bytes accessed"]


if __name__ == "__main__":
  main(sys.argv[1:])
