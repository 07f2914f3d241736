"""Fields of configs that name a kernel's implementation, marked where they are declared.

  scan: str = kernel_field("rg_lru")

A config with such fields resolves them itself, because it knows what the choice depends on:

  kernels(dtype) -> {field: implementation}    for activations of `dtype`, on the platform that
                                               kernels/dispatch.py has as its target

The functions below find marked fields anywhere in a config, so code that lists, sets or ignores
kernels needs to know neither the fields' names nor the classes that have them.
"""

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple, TypeVar, cast

_OP = "kernel"
_T = TypeVar("_T")


def kernel_field(op: str) -> str:
  """A dataclass field that names an implementation of kernels/<op>, or "auto", its default."""
  return cast(str, dataclasses.field(default="auto", metadata={_OP: op}))


class KernelField(NamedTuple):
  """A marked field: where it is ("pattern[0].mixer.scan"), its op, and what it names."""

  path: str
  op: str
  name: str


def marked(config: object, path: str = "") -> Iterator[KernelField]:
  """The marked fields of a config and of all configs in it."""
  if isinstance(config, tuple | list):
    for index, item in enumerate(config):
      yield from marked(item, f"{path}[{index}]")
  elif dataclasses.is_dataclass(config):
    for field in dataclasses.fields(config):
      value, inner = getattr(config, field.name), f"{path}.{field.name}".removeprefix(".")
      if _OP in field.metadata:
        yield KernelField(inner, field.metadata[_OP], value)
      else:
        yield from marked(value, inner)


def resolved(config: _T, dtype: str) -> _T:
  """`config` with every "auto" replaced by the implementation that runs."""

  def names(owner: Any, ops: Mapping[str, str]) -> dict[str, str]:
    if not hasattr(owner, "kernels"):
      raise TypeError(
        f"{type(owner).__module__}.{type(owner).__qualname__} has kernel fields {sorted(ops)} and "
        "no method kernels(dtype) that resolves them; see models/kernel_fields.py"
      )
    found = owner.kernels(dtype)
    if found.keys() != ops.keys():
      raise TypeError(
        f"{type(owner).__module__}.{type(owner).__qualname__}: kernels() resolves {sorted(found)}, "
        f"but the kernel fields are {sorted(ops)}; both must be the same"
      )
    return found

  return _renamed(config, names)


def with_kernels(config: _T, names: Mapping[str, str]) -> _T:
  """`config` with the fields of every op in `names` set to that implementation."""
  return _renamed(
    config, lambda _, ops: {field: names[op] for field, op in ops.items() if op in names}
  )


def without_kernels(config: _T) -> _T:
  """`config` with "auto" in every marked field: equal for configs that differ in kernels only."""
  return _renamed(config, lambda _, ops: dict.fromkeys(ops, "auto"))


def _renamed(config: Any, names: Callable[[Any, dict[str, str]], dict[str, str]]) -> Any:
  """`config` with its marked fields as `names(owner, {field: op})` says."""
  if isinstance(config, tuple | list):
    return type(config)(_renamed(item, names) for item in config)
  if not dataclasses.is_dataclass(config) or isinstance(config, type):
    return config
  ops, changed = {}, {}
  for field in dataclasses.fields(config):
    before = getattr(config, field.name)
    if _OP in field.metadata:
      ops[field.name] = field.metadata[_OP]
    elif (after := _renamed(before, names)) != before:
      changed[field.name] = after
  if ops:
    changed |= names(config, ops)
  return dataclasses.replace(config, **changed)
