"""The TPU kernels through the real compiler, for every generation it knows, on a machine without
one: that they compile, and what else the compiled program holds."""

import functools
import os
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding

from kernels import rg_lru
from kernels.linear_scan import pallas_tpu as linear_pallas
from kernels.rg_lru import pallas_tpu
from models.layers import rg_lru as layer
from models.layers import segments as segments_lib

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


@pytest.mark.parametrize("topology", ["v5e:2x2", "v6e:2x2"])
def test_a_layer_keeps_no_float32_activation(topology):
  """The gates are rounded by the product that makes them; the backward makes them again."""
  batch, time, width, rnn_width = 2, 512, 256, 512
  config = layer.Config(rnn_width=rnn_width, num_gate_blocks=4, scan="pallas_tpu")

  def loss(params, x_BTD):
    graph = nnx.split(nnx.eval_shape(lambda: config.build(width, num_blocks=1, rngs=nnx.Rngs(0))))[
      0
    ]
    segments, _ = segments_lib.segments(
      jnp.ones((batch, time), jnp.int32), segments_lib.initial_state(batch)
    )
    y_BTD, _ = nnx.merge(graph, params)(x_BTD, segments, None)
    return jnp.sum(y_BTD.astype(jnp.float32) ** 2)

  module = config.build(width, num_blocks=1, rngs=nnx.Rngs(0))
  sharding = SingleDeviceSharding(_devices(topology)[0])
  params, x_BTD = jax.tree.map(
    lambda z: jax.ShapeDtypeStruct(z.shape, z.dtype, sharding=sharding),
    (nnx.state(module, nnx.Param), jnp.zeros((batch, time, width), jnp.bfloat16)),
  )
  text = jax.jit(jax.grad(loss, (0, 1))).lower(params, x_BTD).compile().as_text()
  size = batch * time * rnn_width
  kept = []
  for line in _entry(text):
    result = line.split(" = ")[-1].split("(", 1)[0] if " = (" not in line else line
    for dimensions in re.findall(r"f32\[([\d,]+)\]", result.split(" custom-call")[0]):
      if np.prod(list(map(int, dimensions.split(",")))) >= size:
        kept.append(line.strip()[:200])
  assert not kept, "\n".join(kept)


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
