"""Collectives are read from compiled programs: small programs, and every form of the text."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from sharding import collectives
from sharding.mesh import AXES, MeshShape, make_mesh

_SHUFFLED = [0, 3, 1, 2, 7, 5, 6, 4]


def _meshes() -> list[Mesh]:
  shuffled = np.array(jax.devices())[_SHUFFLED].reshape(2, 2, 1, 2)
  types = (jax.sharding.AxisType.Auto,) * 4
  return [make_mesh(MeshShape(data=2, fsdp=2, tensor=2)), Mesh(shuffled, AXES, axis_types=types)]


def _read(f, mesh, *arrays):
  return collectives.read(jax.jit(f).lower(*arrays).compile().as_text(), mesh)


def _array(mesh, shape, *spec, dtype=jnp.float32):
  return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, P(*spec)))


@pytest.mark.parametrize("mesh", _meshes(), ids=["in order", "shuffled"])
@pytest.mark.parametrize("axes", ["data", "fsdp", "tensor", ("data", "fsdp"), ("data", "tensor")])
def test_kind_axes_and_bytes_of_what_shard_map_sends(mesh, axes):
  first = axes if isinstance(axes, str) else axes[0]
  names = (axes,) if isinstance(axes, str) else axes
  degree = 2 ** len(names)

  def f(x):
    gathered = jax.lax.all_gather(x, axes)
    scattered = jax.lax.psum_scatter(jnp.sin(x), axes, tiled=True)
    exchanged = jax.lax.all_to_all(jnp.cos(x), axes, 0, 0, tiled=True)
    permuted = jax.lax.ppermute(x, first, [(0, 1), (1, 0)])
    return gathered, scattered, exchanged, permuted, jax.lax.psum(x, axes)

  mapped = jax.shard_map(f, mesh=mesh, in_specs=P(), out_specs=P(), check_vma=False)
  found = _read(mapped, mesh, jax.ShapeDtypeStruct((16, 4), jnp.float32))
  size = 16 * 4 * 4
  assert collectives.summary(found) == {
    ("all-gather", names): (1, degree * size),
    ("reduce-scatter", names): (1, size),
    ("all-to-all", names): (1, size),
    ("collective-permute", (first,)): (1, size),
    ("all-reduce", names): (1, size),
  }


def test_collectives_of_a_loop_are_counted_for_every_trip():
  mesh = _meshes()[0]

  def f(x_BD, w_LDF, w_LFD):
    def layer(x_BD, w):
      x_BD = x_BD + jnp.tanh(x_BD @ w[0]) @ w[1]
      return jax.lax.with_sharding_constraint(x_BD, NamedSharding(mesh, P("data"))), None

    with jax.named_scope("layers"):
      return jax.lax.scan(layer, x_BD, (w_LDF, w_LFD))[0]

  found = _read(
    f,
    mesh,
    _array(mesh, (8, 16), "data"),
    _array(mesh, (3, 16, 32), None, None, "tensor"),
    _array(mesh, (3, 32, 16), None, "tensor", None),
  )
  (reduce,) = found
  assert (reduce.kind, reduce.axes, reduce.times) == ("all-reduce", ("tensor",), 3)
  assert reduce.arrays == (("f32", (4, 16)),)
  assert "layers" in reduce.op_name
  assert collectives.summary(found) == {("all-reduce", ("tensor",)): (3, 3 * 4 * 16 * 4)}


def test_a_loop_that_depends_on_data_has_no_count():
  mesh = _meshes()[0]

  def f(x):
    return jax.lax.while_loop(
      lambda x: jnp.sum(x) < 100, lambda x: x + jax.lax.psum(x, "tensor"), x
    )

  mapped = jax.shard_map(f, mesh=mesh, in_specs=P(), out_specs=P(), check_vma=False)
  found = _read(mapped, mesh, jax.ShapeDtypeStruct((4,), jnp.float32))
  assert [(one.kind, one.times) for one in found] == [("all-reduce", None)]


_PROGRAM = """HloModule jit_f, num_partitions=8

%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %sum = f32[] add(%a, %b)
}

%wrapped (p: bf16[64,4]) -> bf16[32,4] {
  %p = bf16[64,4]{1,0} parameter(0)
  ROOT %inner = bf16[32,4]{1,0} reduce-scatter(%p), channel_id=3, replica_groups=[4,2]<=[8], dimensions={0}, use_global_device_ids=true, to_apply=%add
}

%scattered (p: f32[64]) -> f32[16] {
  %p.1 = f32[64]{0} parameter(0)
  %zero = s32[] constant(0)
  %whole = f32[64]{0} all-reduce(%p.1), channel_id=4, replica_groups={{0,2,4,6},{1,3,5,7}}, use_global_device_ids=true, to_apply=%add
  ROOT %slice = f32[16]{0} dynamic-slice(%whole, %zero), dynamic_slice_sizes={16}
}

%branch (p: (f32[8])) -> f32[8] {
  %tuple = (f32[8]{0}) parameter(0)
  %element = f32[8]{0} get-tuple-element(%tuple), index=0
  ROOT %sent = f32[8]{0} collective-permute(%element), channel_id=5, source_target_pairs={{0,4},{4,0}}
}

%never_called (p: f32[8]) -> f32[8] {
  %p.2 = f32[8]{0} parameter(0)
  ROOT %unused = f32[8]{0} all-reduce(%p.2), replica_groups={}, to_apply=%add
}

%first_link (p: f32[8]) -> f32[16] {
  %p.3 = f32[8]{0} parameter(0)
  ROOT %link = f32[16]{0} all-gather(%p.3), channel_id=7, replica_groups=[4,2]<=[8], frontend_attributes={chain_id="0"}
}

%last_link (p: f32[8]) -> f32[16] {
  %p.4 = f32[8]{0} parameter(0)
  ROOT %link.1 = f32[16]{0} all-gather(%p.4), channel_id=7, replica_groups=[4,2]<=[8], frontend_attributes={chain_id="0"}
}

%body (p: (s32[], f32[8])) -> (s32[], f32[8]) {
  %p.5 = (s32[]{:T(128)}, f32[8]{0}) parameter(0)
  %element.1 = f32[8]{0} get-tuple-element(%p.5), index=1
  %started = f32[16]{0} fusion(%element.1), kind=kCustom, calls=%first_link
  %finished = f32[16]{0} fusion(%element.1), kind=kCustom, calls=%last_link
  ROOT %next = (s32[]{:T(128)}, f32[8]{0}) tuple(%p.5, %element.1)
}

%condition (p: (s32[], f32[8])) -> pred[] {
  %six = s32[]{:T(128)} constant(6)
  %p.6 = (s32[]{:T(128)}, f32[8]{0}) parameter(0)
  %step = s32[]{:T(128)} get-tuple-element(%p.6), index=0
  ROOT %less = pred[]{:T(512)} compare(%step, %six), direction=LT
}

ENTRY %main (x: f32[64], y: bf16[64,4]) -> f32[64] {
  %x = f32[64]{0:T(128)} parameter(0)
  %y = bf16[64,4]{1,0:T(8,128)(2,1)} parameter(1)
  %gather = (f32[64]{0:T(128)}, f32[128]{0:T(128)}) all-gather-start(%x), channel_id=1, replica_groups=[4,2]<=[2,4]T(1,0), dimensions={0}, use_global_device_ids=true, metadata={op_name="jit(f)/conv/gather"}
  %gather.1 = f32[128]{0} all-gather-done(%gather)
  %reduce = (f32[64]{0:T(128)}, /*index=1*/bf16[64,4]{1,0:T(8,128)(2,1)}) all-reduce-start(%x, %y), channel_id=2, replica_groups=RGROUPS, use_global_device_ids=true, to_apply=%add
  %reduce.1 = (f32[64]{0}, bf16[64,4]{1,0}) all-reduce-done(%reduce)
  %scatter = ((bf16[64,4]{1,0}), bf16[32,4]{1,0}, u32[]{:S(2)}) async-start(%y), calls=%wrapped
  %scatter.1 = bf16[32,4]{1,0} async-done(%scatter), calls=%wrapped
  %fused = f32[16]{0} fusion(%x), kind=kCustom, calls=%scattered
  %permute = (f32[64]{0}, f32[64]{0}, u32[]{:S(2)}, u32[]{:S(2)}) collective-permute-start(%x), channel_id=6, source_target_pairs={{0,1},{1,0}}
  %permute.1 = f32[64]{0} collective-permute-done(%permute)
  %which = s32[] constant(0)
  %args = (f32[8]) tuple(%x)
  %chosen = f32[8]{0} conditional(%which, %args, %args), branch_computations={%branch, %branch}
  %loop = (s32[]{:T(128)}, f32[8]{0}) while(%args), condition=%condition, body=%body, metadata={}
  ROOT %out = f32[64]{0} copy(%permute.1)
}
"""  # noqa: E501 (XLA writes one instruction on a line)


def test_every_form_of_a_collective_is_counted_once():
  mesh = make_mesh(MeshShape(data=2, fsdp=2, tensor=2))
  found = collectives.read(_PROGRAM.replace("RGROUPS", "{}"), mesh)
  rows = {one.name: (one.kind, one.axes, one.bytes, one.times) for one in found}
  assert rows == {
    "gather": ("all-gather", ("data",), 128 * 4, 1),
    "reduce": ("all-reduce", ("data", "fsdp", "tensor"), 64 * 4 + 256 * 2, 1),
    "inner": ("reduce-scatter", ("tensor",), 256 * 2, 1),
    "whole": ("reduce-scatter", ("data", "fsdp"), 64 * 4, 1),
    "permute": ("collective-permute", ("tensor",), 64 * 4, 1),
    "sent": ("collective-permute", ("data",), 8 * 4, 2),
    "link": ("all-gather", ("tensor",), 16 * 4, 6),
  }
  (gather,) = [one for one in found if one.name == "gather"]
  assert gather.op_name == "jit(f)/conv/gather"
  assert gather.groups == ((0, 4), (1, 5), (2, 6), (3, 7))


@pytest.mark.parametrize(
  ("written", "groups"),
  [
    ("{{0,1},{2,3},{4,5},{6,7}}", ((0, 1), (2, 3), (4, 5), (6, 7))),
    ("{{0,1,2,3,4,5,6,7}}", (tuple(range(8)),)),
    ("{}", (tuple(range(8)),)),
    ("[2,4]<=[8]", ((0, 1, 2, 3), (4, 5, 6, 7))),
    ("[4,2]<=[2,4]T(1,0)", ((0, 4), (1, 5), (2, 6), (3, 7))),
    ("[2,4]<=[2,2,2]T(1,0,2)", ((0, 1, 4, 5), (2, 3, 6, 7))),
    ("mesh['a'=4,'b'=1,'c'=2] {'a'}", ((0, 2, 4, 6), (1, 3, 5, 7))),
    ("mesh['a'=2,'b'=2,'c'=2] {'a','c'}", ((0, 1, 4, 5), (2, 3, 6, 7))),
    ("mesh['a'=4,'c'=2], device_ids=([2,4]T(1,0)) {'c'}", ((0, 4), (1, 5), (2, 6), (3, 7))),
    ("mesh['a'=8] {'a':(2)2}", ((0, 2), (1, 3), (4, 6), (5, 7))),
    ("mesh['a'=8] {'a':(1)2}", ((0, 4), (1, 5), (2, 6), (3, 7))),
  ],
)
def test_groups_are_read_in_every_form(written, groups):
  mesh = make_mesh(MeshShape(data=8))
  (reduce,) = [
    one
    for one in collectives.read(_PROGRAM.replace("RGROUPS", written), mesh)
    if one.name == "reduce"
  ]
  assert {tuple(sorted(group)) for group in reduce.groups} == set(groups)


@pytest.mark.parametrize(
  ("step", "counter", "times"), [(2, "u32", 3), (1, "u32", 6), (4, "s32", 2), (None, "u32", None)]
)
def test_a_loop_that_counts_by_more_than_one_is_counted(step, counter, times):
  """A loop such as XLA makes of a product, to send the operand while it multiplies."""
  new = "%counted" if step else "%p.5"
  counts = f"""  %count = s32[]{{:T(128)}} get-tuple-element(%p.5), index=0
  %by = s32[]{{:T(128)}} constant({step})
  %counted = s32[]{{:T(128)}} add(%count, %by)
  ROOT %next = (s32[]{{:T(128)}}, f32[8]{{0}}) tuple({new}, %element.1)"""
  program = re.sub(r"  ROOT %next = .*", counts, _PROGRAM).replace("RGROUPS", "{}")
  program = program.replace("s32[]", f"{counter}[]")
  found = collectives.read(program, make_mesh(MeshShape(data=2, fsdp=2, tensor=2)))
  assert [one.times for one in found if one.name == "link"] == [times]


def test_what_is_not_understood_is_an_error():
  mesh = make_mesh(MeshShape(data=8))
  with pytest.raises(ValueError, match=r"unknown form of replica groups: 'somehow"):
    collectives.read(_PROGRAM.replace("RGROUPS", "somehow"), mesh)
  with pytest.raises(ValueError, match="not the text of a compiled program"):
    collectives.read("module @jit_f {}", mesh)
