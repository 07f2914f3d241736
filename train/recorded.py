"""The settings of a config as records hold them, and settings that older records lack.

In a record, a config class has the name `recorded_as`. It never changes, so the class may be moved
and renamed:

  recorded_as: ClassVar[str] = "models.layers.running_mean.Config"

A field that is added to a class later needs a default that means what was done before the field
existed. A record without the field then fits a run in which the field is at its default.
"""

import dataclasses
import re
from collections.abc import Iterator, Mapping
from typing import Any


def settings(config: object) -> dict[str, Any]:
  """Path -> value of every field, and path -> class name of every value that is a config.

  TypeError for a class without a name of its own, and for two classes of one name.
  """
  classes: dict[str, type] = {}
  return dict(_settings(config, "", classes))


def _settings(value: Any, path: str, classes: dict[str, type]) -> Iterator[tuple[str, Any]]:
  if _is_config(value):
    if path:
      yield path, _name(type(value), classes)
    for field in dataclasses.fields(value):
      yield from _settings(getattr(value, field.name), _inner(path, field.name), classes)
  elif isinstance(value, tuple | list) and any(map(_is_config, value)):
    for index, item in enumerate(value):
      yield from _settings(item, f"{path}[{index}]", classes)
    yield f"{path}.length", len(value)
  else:
    yield path, value


def _name(kind: type, classes: dict[str, type]) -> str:
  here = f"{kind.__module__}.{kind.__qualname__}"
  # Not the name of a class that it inherits from.
  name = vars(kind).get("recorded_as")
  if name is None:
    raise TypeError(
      f"{here} has no name for the records of checkpoints; add recorded_as: ClassVar[str] = "
      f'"{here}" to it, or another name that no other class has, and never change it'
    )
  other = classes.setdefault(name, kind)
  if other is not kind:
    raise TypeError(
      f"{here} and {other.__module__}.{other.__qualname__} are both recorded as {name!r}; give the "
      "newer class another name"
    )
  return name


def defaults(config: object) -> dict[str, dict[str, Any]]:
  """Path of every field that has a default -> that default, as `settings` from this path on."""
  return {path: dict(_settings(default, path, {})) for path, default in default_values(config)}


def default_values(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
  """Path and default of every field that has one, in a config and in the configs that it holds."""
  if _is_config(value):
    for field in dataclasses.fields(value):
      inner = _inner(path, field.name)
      if field.default is not dataclasses.MISSING:
        yield inner, field.default
      elif field.default_factory is not dataclasses.MISSING:
        yield inner, field.default_factory()
      yield from default_values(getattr(value, field.name), inner)
  elif isinstance(value, tuple | list):
    for index, item in enumerate(value):
      yield from default_values(item, f"{path}[{index}]")


def new_at_default(
  then: Mapping[str, Any], now: Mapping[str, Any], defaults: Mapping[str, Mapping[str, Any]]
) -> set[str]:
  """The paths of `now` that `then` lacks and whose value is the default.

  Where a whole object is new, the default of the field that holds it decides, not the defaults of
  the object's own fields.
  """
  new = now.keys() - then.keys()
  found = set()
  for path in new:
    field = next(one for one in _with_parents(path) if one in new)
    default = defaults.get(field, {})
    if path in default and default[path] == now[path]:
      found.add(path)
  return found


def _with_parents(path: str) -> Iterator[str]:
  """model, model.pattern, model.pattern[0], and so on up to the path itself."""
  for end in re.finditer(r"(?=[.\[])|$", path):
    yield path[: end.start()]


def _inner(path: str, name: str) -> str:
  return f"{path}.{name}" if path else name


def _is_config(value: object) -> bool:
  return dataclasses.is_dataclass(value) and not isinstance(value, type)
