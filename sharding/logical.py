"""Where an array lies, from the names of its dimensions: names -> table -> mesh axes.

A table is a dict from the name of a dimension to what it is split over: a mesh axis, a tuple of
them, None (not split), or `IfDivisible(axis)`. A name that a table lacks is an error.

`placement(mesh, rules)` is the one ambient value; without it `constrain`, `gathered` and
`on_shards` do nothing, so that models run on one device as they are written. It is part of the
cache key of jax.jit: a function traced under one placement is traced again under another.
"""

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.custom_derivatives import linear_call
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec


@dataclasses.dataclass(frozen=True)
class IfDivisible:
  """Split over `axis` where the axis divides the size, else whole on every device.

  For parameters that are too small to matter. Over the tensor axis every layer of a block has to be
  split the same way: there for key-value heads alone, of which attention gives each shard its own.
  """

  axis: str


Axes = tuple[str | None, ...]
Target = str | tuple[str, ...] | IfDivisible | None
Table = Mapping[str, Target]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rules:
  """The tables of one layout: see sharding/rules.py for ours.

  parameters   as they lie between steps
  compute      parameters while a layer uses them: gathered over ZeRO's axis
  gradients    as they are summed up, and as the optimizer reads them
  moments      the optimizer's state, as it lies between steps
  activations  what `constrain` and `on_shards` name

  float32_sums: gradients of parameters are summed over devices in float32, and not in the dtype
  that layers compute in; twice the bytes then travel.
  """

  parameters: Table
  compute: Table
  gradients: Table
  moments: Table
  activations: Table
  float32_sums: bool = False

  def __hash__(self) -> int:
    tables = (self.parameters, self.compute, self.gradients, self.moments, self.activations)
    return hash((*(frozenset(table.items()) for table in tables), self.float32_sums))


def spec(
  axes: Axes,
  table: Table,
  *,
  shape: tuple[int, ...] | None = None,
  mesh: Mesh | AbstractMesh | None = None,
  name: str = "array",
) -> PartitionSpec:
  """The PartitionSpec of an array whose dimensions are called `axes` (None: not split).

  With `shape` and `mesh`, sizes are checked against the mesh, and `IfDivisible` needs them. Errors
  speak of the array as `name`.
  """
  if shape is not None and len(shape) != len(axes):
    raise ValueError(f"{name}: shape {shape} and axes {axes} differ in length")
  entries, used = [], {}
  for index, axis in enumerate(axes):
    if axis is not None and axis not in table:
      raise ValueError(f"{name}: unknown axis {axis!r} in {axes}; the table has {sorted(table)}")
    target = None if axis is None else table[axis]
    if isinstance(target, IfDivisible):
      if shape is None or mesh is None:
        raise ValueError(f"{name}: axis {axis!r} is split if divisible: give shape and mesh")
      target = None if shape[index] % mesh.shape[target.axis] else target.axis
    for mesh_axis in _as_tuple(target):
      if mesh_axis in used:
        raise ValueError(
          f"{name}: axes {used[mesh_axis]!r} and {axis!r} of {axes} are both split over mesh axis "
          f"{mesh_axis!r}"
        )
      used[mesh_axis] = axis
    if shape is not None and mesh is not None:
      _check_divides(name, axis, shape[index], target, mesh)
    entries.append(target)
  return PartitionSpec(*entries)


def _check_divides(
  name: str, axis: str | None, size: int, target: Target, mesh: Mesh | AbstractMesh
) -> None:
  mesh_axes = _as_tuple(target)
  shards = math.prod(mesh.shape[mesh_axis] for mesh_axis in mesh_axes)
  if size % shards:
    sizes = " x ".join(f"{mesh_axis} {mesh.shape[mesh_axis]}" for mesh_axis in mesh_axes)
    raise ValueError(
      f"{name}: axis {axis!r} of size {size} is not divisible by mesh {sizes}; change the mesh, or "
      "that size in the config"
    )


def _as_tuple(target: Target) -> tuple[str, ...]:
  assert not isinstance(target, IfDivisible)
  if target is None:
    return ()
  return (target,) if isinstance(target, str) else target


def _is_axes(value: Any) -> bool:
  return isinstance(value, tuple) and all(name is None or isinstance(name, str) for name in value)


def shardings(axes: Any, shapes: Any, table: Table, mesh: Mesh) -> Any:
  """The NamedSharding of every array of a tree; errors name the array by its path.

  `axes` holds tuples of names where `shapes` holds arrays or ShapeDtypeStructs.
  """

  def one(path: Any, names: Axes, array: Any) -> NamedSharding:
    name = jax.tree_util.keystr(path, simple=True, separator="/")
    return NamedSharding(mesh, spec(names, table, shape=array.shape, mesh=mesh, name=name))

  return jax.tree_util.tree_map_with_path(one, axes, shapes, is_leaf=_is_axes)


class _Placement(NamedTuple):
  mesh: Mesh
  rules: Rules
  # Inside `on_shards` arrays are one shard's own: there is nothing left to constrain.
  is_inside: bool = False


_ambient = jax.make_user_context(default_value=None)


@contextmanager
def placement(mesh: Mesh, rules: Rules) -> Iterator[None]:
  """Within it, models lay out their arrays on `mesh` by `rules`."""
  with _ambient(_Placement(mesh, rules)):
    yield


def _placed() -> _Placement | None:
  """The placement, where arrays are whole."""
  ambient = _ambient.value
  return None if ambient is None or ambient.is_inside else ambient


def constrain(x: jax.Array, *axes: str | None) -> jax.Array:
  """x, laid out as the activation table says of `axes`; without a placement, x."""
  placed = _placed()
  if placed is None:
    return x
  layout = spec(axes, placed.rules.activations, shape=x.shape, mesh=placed.mesh, name="activation")
  return jax.lax.with_sharding_constraint(x, NamedSharding(placed.mesh, layout))


def use(w: jax.Array, axes: Axes, *, name: str = "parameter") -> jax.Array:
  """A stored parameter in the layout that a layer computes with: gathered over ZeRO's axis.

  Its gradient is laid out by the gradient table as soon as it is made, so that a layer's whole
  gradient lives no longer than the layer. Inside a scan over layers, `axes` are one layer's.
  """
  placed = _placed()
  if placed is None:
    return w
  mesh, rules = placed.mesh, placed.rules
  compute = spec(axes, rules.compute, shape=w.shape, mesh=mesh, name=name)
  gradient = spec(axes, rules.gradients, shape=w.shape, mesh=mesh, name=name)
  return _relaid(w, NamedSharding(mesh, compute), NamedSharding(mesh, gradient))


def gathered(params: Any, axes: Any) -> Any:
  """`use` of every parameter of a tree; `axes` holds their names in the same tree."""

  def one(path: Any, names: Axes, w: jax.Array) -> jax.Array:
    return use(w, names, name=jax.tree_util.keystr(path, simple=True, separator="/"))

  return jax.tree_util.tree_map_with_path(one, axes, params, is_leaf=_is_axes)


def constrain_gradients(grads: Any, axes: Any) -> Any:
  """A tree of gradients laid out by the gradient table; without a placement, `grads`."""
  placed = _placed()
  if placed is None:
    return grads
  layout = shardings(axes, grads, placed.rules.gradients, placed.mesh)
  return jax.lax.with_sharding_constraint(grads, layout)


def _relaid(w: jax.Array, forward: NamedSharding, backward: NamedSharding) -> jax.Array:
  """w laid out as `forward`, its cotangent as `backward`: the built-in rule has one for both."""

  def forwards(_: tuple[()], w: jax.Array) -> jax.Array:
    return jax.lax.with_sharding_constraint(w, forward)

  def backwards(_: tuple[()], dw: jax.Array) -> jax.Array:
    return jax.lax.with_sharding_constraint(dw, backward)

  return linear_call(forwards, backwards, (), w)


def on_shards(
  f: Callable[..., Any], *, in_axes: Any, out_axes: Any, check_vma: bool = True
) -> Callable[..., Any]:
  """`f` run by every device on its own shards (jax.shard_map); without a placement, `f`.

  `in_axes` is a tuple with the activation axes of each argument, `out_axes` those of the result,
  or a tuple of them for several. Differentiable in every argument. The gradient of an argument that
  is whole on several devices is summed over them: over devices with other rows in float32, if the
  rules ask for it. Inside, `mesh_axis(name)` is the axis to sum over.

  check_vma=True lets JAX track over which axes values differ between devices. Every argument is
  marked as different over all axes that any argument is split over. So its gradient is summed once
  and in its own dtype, not wherever it meets another array. An output that is not split over such
  an axis must be summed over it, or is an error. A Pallas kernel with its own gradient does not
  support the tracking and needs False. Its gradients are right then too, but every psum in `f`
  costs an all-reduce in the backward pass.
  """
  placed = _placed()
  if placed is None or placed.mesh.size == 1:
    return f
  mesh = placed.mesh
  in_specs = tuple(_inside_spec(axes, placed) for axes in in_axes)
  is_one = _is_axes(out_axes)
  out_specs = (
    _inside_spec(out_axes, placed)
    if is_one
    else tuple(_inside_spec(axes, placed) for axes in out_axes)
  )

  split = set[str]().union(*map(_axes_of, in_specs))
  activations = placed.rules.activations
  rows = {axis for name in ("batch", "time") for axis in _as_tuple(activations.get(name))}

  def is_summed(x: jax.Array, layout: PartitionSpec) -> bool:
    """Whether x has a gradient that is a sum over devices with other rows."""
    return bool(jnp.issubdtype(x.dtype, jnp.floating) and rows & split - _axes_of(layout))

  def checked(*arguments: Any) -> Any:
    for axes, argument in zip(in_axes, arguments, strict=True):
      spec(axes, placed.rules.activations, shape=argument.shape, mesh=mesh, name="activation")
    dtypes = [x.dtype for x in arguments]

    def body(*arguments: Any) -> Any:
      if check_vma:
        arguments = tuple(
          _varying(x, split, layout) for x, layout in zip(arguments, in_specs, strict=True)
        )
      arguments = tuple(x.astype(dtype) for x, dtype in zip(arguments, dtypes, strict=True))
      with _ambient(placed._replace(is_inside=True)):
        return f(*arguments)

    if placed.rules.float32_sums:
      # Cast back on the devices: the only effect of both casts is the dtype of the gradient.
      arguments = tuple(
        x.astype(jnp.promote_types(x.dtype, jnp.float32)) if is_summed(x, layout) else x
        for x, layout in zip(arguments, in_specs, strict=True)
      )
    return jax.shard_map(
      body, mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_vma=check_vma
    )(*arguments)

  return checked


def _axes_of(layout: PartitionSpec) -> set[str]:
  return {axis for entry in layout for axis in _as_tuple(entry)}


def _varying(x: jax.Array, split: set[str], layout: PartitionSpec) -> jax.Array:
  """x, laid out as `layout`, marked as different between devices over all axes of `split`."""
  missing = split - _axes_of(layout)
  return jax.lax.pcast(x, tuple(sorted(missing)), to="varying") if missing else x


def _inside_spec(axes: Axes, placed: _Placement) -> PartitionSpec:
  """The spec without mesh axes of size 1: over those, values cannot differ between devices."""
  entries = [
    tuple(axis for axis in _as_tuple(entry) if placed.mesh.shape[axis] > 1)
    for entry in spec(axes, placed.rules.activations)
  ]
  return PartitionSpec(*(entry or None for entry in entries))


def is_split() -> bool:
  """Whether whole arrays may lie on several devices."""
  placed = _placed()
  return placed is not None and placed.mesh.size > 1


def sums_are_float32() -> bool:
  """Whether whole arrays lie on several devices, and their gradients' sums are to be float32."""
  placed = _placed()
  return placed is not None and placed.mesh.size > 1 and placed.rules.float32_sums


def num_shards(name: str) -> int:
  """Into how many parts the activation axis `name` is split; 1 without a placement."""
  ambient = _ambient.value
  if ambient is None:
    return 1
  (entry,) = _inside_spec((name,), ambient)
  return math.prod(ambient.mesh.shape[axis] for axis in _as_tuple(entry))


def mesh_axis(name: str) -> str | tuple[str, ...] | None:
  """Inside `on_shards`, what the activation axis `name` is split over; None where it is whole."""
  ambient = _ambient.value
  if ambient is None or not ambient.is_inside:
    return None
  (entry,) = _inside_spec((name,), ambient)
  match entry:
    case (axis,):
      return axis
    case _:
      return entry
