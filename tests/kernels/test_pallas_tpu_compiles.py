"""The TPU kernels through the real compiler, for every generation it knows, on a machine without
one: that they compile, and what else the compiled program holds."""

import functools
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding

from kernels import block_diagonal, causal_conv, rg_lru
from kernels.linear_scan import pallas_tpu as linear_pallas
from kernels.rg_lru import pallas_tpu
from models.layers import rg_lru as layer
from models.layers import rg_lru_program
from sharding.program_text import arrays_of, size_of

# Read when the compiler is loaded, which the first topology does.
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")

TOPOLOGIES = ["v3:2x2", "v4:2x2x1", "v5e:2x2", "v5p:2x2x1", "v6e:2x2"]
# Several tiles of time and of channels; one with a tail in both; a decoding step.
SHAPES = [(2, 768, 5632), (1, 257, 1500), (2, 1, 24)]


@functools.cache
def _devices(topology):
  return topologies.get_topology_desc(topology_name=topology, platform="tpu").devices


def _arguments(shape, sharding):
  batch, time, width = shape

  def array(shape, dtype):
    return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

  activation = array(shape, jnp.bfloat16)
  edge = array((batch, width), jnp.float32)
  starts = array((batch, time), jnp.bool_)
  gates = (*[activation] * 3, array((width,), jnp.float32), starts, edge)
  return {
    "rg_lru_forward": (pallas_tpu.forward, gates),
    "rg_lru_backward": (pallas_tpu.backward, (*gates, activation, activation, edge)),
    "linear_scan": (
      functools.partial(linear_pallas.scan, reverse=True),
      (activation, array(shape, jnp.float32), edge),
    ),
  }


def _entry(text):
  """The lines of the program that runs, without those of its fusions."""
  return text[text.index("\nENTRY ") :].splitlines()


@pytest.mark.parametrize("kernel", ["rg_lru_forward", "rg_lru_backward", "linear_scan"])
@pytest.mark.parametrize("topology", TOPOLOGIES)
def test_kernels_compile(topology, kernel):
  for shape in SHAPES:
    run, arguments = _arguments(shape, SingleDeviceSharding(_devices(topology)[0]))[kernel]
    compiled = jax.jit(run).lower(*arguments).compile()
    calls = [line for line in _entry(compiled.as_text()) if "custom-call(" in line]
    assert sum(f"%{kernel}" in line and "tpu_custom_call" in line for line in calls) == 1
    if shape != SHAPES[0]:
      continue  # of lengths that no tile divides, the layout is the compiler's choice
    # Document starts, first and last states, and nothing as large as an activation.
    activation_bytes = 2 * np.prod(shape)
    assert compiled.memory_analysis().temp_size_in_bytes < activation_bytes / 16


# Two tiles of channels and a tail of tokens; a decoding step; on the chip with the least memory for
# its kernels, the widest of the published sizes.
_GATES = [(topology, (1, 100, 1280), 8) for topology in TOPOLOGIES[1:]]
_GATES += [("v5e:2x2", (2, 1, 24), 4), ("v4:2x2x1", (1, 256, 5632), 16)]


@pytest.mark.parametrize(("topology", "shape", "blocks"), _GATES, ids=str)
def test_the_gates_products_compile(topology, shape, blocks):
  """Not for v3, where they are XLA's (tests/kernels/test_dispatch.py)."""
  size, layout = shape[-1] // blocks, SingleDeviceSharding(_devices(topology)[0])
  x_BTR, w_GI2J, b_G2J = (
    jax.ShapeDtypeStruct(shape, dtype, sharding=layout)
    for shape, dtype in (
      (shape, jnp.bfloat16),
      ((blocks, size, 2, size), jnp.bfloat16),
      ((blocks, 2, size), jnp.float32),
    )
  )

  def both_ways(x_BTR, w_GI2J, b_G2J, dy):
    gates = functools.partial(block_diagonal.products, implementation="pallas_tpu")
    y, vjp = jax.vjp(gates, x_BTR, w_GI2J, b_G2J)
    return y, vjp(dy)

  program = jax.jit(both_ways).lower(x_BTR, w_GI2J, b_G2J, (x_BTR, x_BTR)).compile()
  calls = [line for line in _entry(program.as_text()) if "custom-call(" in line]
  for kernel in ("block_diagonal_forward", "block_diagonal_backward"):
    assert sum(f"%{kernel}" in line and "tpu_custom_call" in line for line in calls) == 1


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("topology", TOPOLOGIES)
def test_the_convolution_compiles(topology, dtype):
  layout = SingleDeviceSharding(_devices(topology)[0])

  def both_ways(x_BTR, b_in_R, w_KR, b_R, document_BT, dy):
    def convolve(*arrays):
      return causal_conv.convolve(*arrays, document_BT, implementation="pallas_tpu")

    y, vjp = jax.vjp(convolve, x_BTR, b_in_R, w_KR, b_R)
    return y, vjp(dy)

  # Several tiles of both on one of them; tails, and a step of decoding, on all.
  shapes = SHAPES if (topology, dtype) == ("v5e:2x2", "bfloat16") else SHAPES[1:]
  for batch, time, width in shapes:
    x_BTR, b_R, w_KR, document_BT = (
      jax.ShapeDtypeStruct(shape, kind, sharding=layout)
      for shape, kind in (
        ((batch, time, width), dtype),
        ((width,), "float32"),
        ((4, width), "float32"),
        ((batch, time), "int32"),
      )
    )
    arguments = (x_BTR, b_R, w_KR, b_R, document_BT, (x_BTR, x_BTR))
    program = jax.jit(both_ways).lower(*arguments).compile()
    calls = [line for line in _entry(program.as_text()) if "custom-call(" in line]
    for kernel in ("causal_conv_forward", "causal_conv_backward"):
      assert sum(f"%{kernel}" in line and "tpu_custom_call" in line for line in calls) == 1


_BATCH, _TIME, _RNN_WIDTH = 2, 1024, 640


@functools.cache
def _layer_program(topology, gates="pallas_tpu"):
  config = layer.Config(
    rnn_width=_RNN_WIDTH, num_gate_blocks=4, scan="pallas_tpu", gates=gates, conv="pallas_tpu"
  )
  program = rg_lru_program.compiled(
    config, _devices(topology)[0], width=256, batch=_BATCH, time=_TIME, backward=True
  )
  return program.as_text()


@pytest.mark.parametrize("topology", ["v5e:2x2", "v6e:2x2"])
def test_a_layer_keeps_no_float32_activation(topology):
  """The product that computes the gates rounds them; the backward pass computes them again."""
  size = 4 * _BATCH * _TIME * _RNN_WIDTH
  kept = []
  for one in rg_lru_program.instructions(_layer_program(topology)):
    arrays = [array for array in arrays_of(one.shape) if array[0] == "f32"]
    if any(size_of([array]) >= size for array in arrays):
      kept.append(f"{one.name} {one.shape}"[:200])
  assert not kept, "\n".join(kept)


# What passes an array on as it lies; a copy between memories has a start and an end, and one
# between layouts has neither.
_PASSES_ON = ("bitcast", "get-tuple-element", "copy-start", "copy-done", "opt-barrier")


def _made_by(text, kernel):
  """For each operand of the kernel, the name of what computed it."""
  found = {one.name: one for one in rg_lru_program.instructions(text)}
  (call,) = [one for name, one in found.items() if name.startswith(kernel)]

  def maker(name):
    one = found[name]
    return maker(one.operands[0]) if one.opcode in _PASSES_ON else name

  return [maker(name) for name in call.operands]


@pytest.mark.parametrize("topology", ["v5e:2x2", "v6e:2x2"])
def test_nothing_is_copied_between_gates_and_recurrence(topology):
  text = _layer_program(topology)
  forward, backward = "block_diagonal_forward", "rg_lru_backward"
  from_gates = [name.startswith(forward) for name in _made_by(text, "rg_lru_forward")]
  assert sum(from_gates) == 2
  assert sum(name.startswith(forward) for name in _made_by(text, "rg_lru_backward")) == 2
  assert sum(name.startswith(backward) for name in _made_by(text, "block_diagonal_backward")) == 2
  # Both read the x that the convolution wrote.
  (x,) = set(_made_by(text, "block_diagonal_forward")) & set(_made_by(text, "rg_lru_forward"))
  assert x.startswith("causal_conv_forward")
  assert x in _made_by(text, "block_diagonal_backward")
  size = 2 * _BATCH * _TIME * _RNN_WIDTH
  moves = rg_lru_program.moves(text, size)
  assert not [one for one in moves if "/gates/" in one.op_name or "/scan/" in one.op_name]
  assert not [one for one in moves if one.opcode == "copy"]


def test_xlas_product_of_the_gates_is_copied():
  """The reason for the kernel. If this fails, the compiler may not need it any more."""
  size = 2 * _BATCH * _TIME * _RNN_WIDTH
  assert len(rg_lru_program.moves(_layer_program("v5e:2x2", "einsum"), size)) > 4


def test_the_gradient_compiles_on_shards_with_their_axes_checked():
  mesh = Mesh(np.array(_devices("v5e:2x2")).reshape(2, 2), ("data", "tensor"))
  split = PartitionSpec("data", None, "tensor")
  edge = PartitionSpec("data", "tensor")
  specs = (split, split, split, PartitionSpec("tensor"), PartitionSpec("data"), edge)
  on_shards = jax.shard_map(
    functools.partial(rg_lru.rg_lru, implementation="pallas_tpu"),
    mesh=mesh,
    in_specs=specs,
    out_specs=(split, edge),
  )

  def loss(*arrays):
    y_BTR, hT_BR = on_shards(*arrays)
    return jnp.sum(y_BTR.astype(jnp.float32)) + jnp.sum(hT_BR)

  _, shapes = _arguments((4, 256, 512), None)["rg_lru_forward"]
  arguments = [
    jax.ShapeDtypeStruct(z.shape, z.dtype, sharding=NamedSharding(mesh, spec))
    for z, spec in zip(shapes, specs, strict=True)
  ]
  text = jax.jit(jax.grad(loss, (0, 1, 2, 3, 5))).lower(*arguments).compile().as_text()
  for kernel in ("rg_lru_forward", "rg_lru_backward"):
    assert f"%{kernel}" in text
  # The decay is the same on the data shards: its gradient is summed over them.
  assert "all-reduce" in text
