"""`--config=FILE.py[:ARG]` to a `Run`, with `--config.some.field=value` applied and type-checked.

A config file is a program with `get_config(arg) -> Run`, nested frozen dataclasses. Its values
become a locked ml_collections ConfigDict, whose flags parse and check the overrides. Then the
dataclasses are built again, so that every check in them sees the final values.
"""

import contextlib
import dataclasses
import difflib
import importlib.util
import inspect
import itertools
import os
import pathlib
import re
import sys
import traceback
import types
import typing
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from absl import app, flags
from ml_collections import config_dict, config_flags
from ml_collections.config_flags import config_path

from launch.console import refuse
from train.config import Run, flatten

_FLAG = "--config"
# What absl and ml_collections raise for a wrong flag, path or value.
_FLAG_ERRORS = (flags.Error, AttributeError, KeyError, IndexError, TypeError, ValueError)


def run_app(main: Callable[[Run, dict[str, tuple[Any, Any]]], None]) -> None:
  """Calls main(run, overridden) with the run that the command line describes; `overridden` maps
  the path of each changed field to its value in the preset and now. A wrong flag is one line on
  stderr and exit status 2."""
  try:
    preset, argv = _preset(sys.argv)
    nones, argv = take_nones(preset, argv)
  except ValueError as error:
    refuse(error)
  config = to_config_dict(preset)
  for path in nones:
    config_path.set_value(path, config, None)
  try:
    # This already looks for the flags --config.some.field=value; they change `config` itself.
    config_flags.DEFINE_config_dict("config", config, lock_config=True, sys_argv=argv)
  except _FLAG_ERRORS as error:
    refuse(error)

  def parse(argv: Sequence[str]) -> list[str]:
    try:
      return flags.FLAGS(list(argv))
    except _FLAG_ERRORS as error:
      refuse(error)

  def with_run(argv: Sequence[str]) -> None:
    if len(argv) > 1:
      refuse(ValueError(f"{argv[1]!r} is not a flag; fields are set as {_FLAG}.some.field=value"))
    try:
      run = rebuild(preset, config)
    except ValueError as error:
      refuse(error)
    main(run, difference(preset, run))

  app.run(with_run, argv=argv, flags_parser=parse)


def said(argv: Sequence[str]) -> tuple[str, dict[str, str]]:
  """The value of --config in `argv`, and its flags --config.some.field=value: path -> the flag as
  one word; the last one counts."""
  (spec,), rest = _specs(argv)
  overrides: dict[str, str] = {}
  for word, following in itertools.pairwise([*rest, "--"]):
    if found := re.match(r"--?(?:no)?config\.([^=]+)(=?)", word):
      # A switch has no value after it.
      is_whole = found[2] or following.startswith("--")
      overrides[found[1]] = word if is_whole else f"{word}={following}"
  return spec, overrides


def load(spec: str) -> Run:
  """The run of "path/to/file.py" or "path/to/file.py:argument"."""
  run = ask(spec, "get_config")
  if not isinstance(run, Run):
    raise ValueError(
      f"{_FLAG}={spec}: get_config gave a {type(run).__name__}, not a train.config.Run"
    )
  return run


def ask(spec: str, name: str) -> Any:
  """The result of the function `name` of the config file "path/to/file.py:argument", called with
  the argument if there is one. ValueError, with the line, for a file that raises."""
  path, _, argument = spec.partition(":")
  with _as_value_errors(spec, path):
    module = _module(spec, path)
  function = getattr(module, name, None)
  if function is None:
    raise ValueError(f"{_FLAG}={spec}: it has no function {name}")
  if not callable(function):
    raise ValueError(f"{_FLAG}={spec}: {name} is a {type(function).__name__}, not a function")
  arguments = (argument,) if argument else ()
  try:
    inspect.signature(function).bind(*arguments)
  except TypeError as error:
    raise ValueError(f"{_FLAG}={spec}: {name} of {path}: {error}") from error
  with _as_value_errors(spec, path):
    return function(*arguments)


def _module(spec: str, path: str) -> types.ModuleType:
  if not pathlib.Path(path).is_file():
    raise ValueError(f"{_FLAG}={spec}: there is no file {path!r} (seen from the current folder)")
  module_spec = importlib.util.spec_from_file_location(f"config_{pathlib.Path(path).stem}", path)
  if module_spec is None or module_spec.loader is None:
    raise ValueError(f"{_FLAG}={spec}: {path!r} is not a Python file")
  module = importlib.util.module_from_spec(module_spec)
  module_spec.loader.exec_module(module)
  return module


@contextlib.contextmanager
def _as_value_errors(spec: str, path: str) -> Iterator[None]:
  """Turns what the program at `path` raises into a ValueError with the line; its own pass."""
  try:
    yield
  except ValueError:
    raise
  # A config is a program and may raise anything; its sys.exit(0) would mean that a run is complete.
  except (Exception, SystemExit) as error:
    what, where = error.code if isinstance(error, SystemExit) else error, path
    if isinstance(error, SyntaxError):
      what, where = error.msg, f"{error.filename or path}, line {error.lineno}"
    else:
      own, frames = os.path.realpath(path), traceback.extract_tb(error.__traceback__)
      lines = [frame.lineno for frame in frames if os.path.realpath(frame.filename) == own]
      where = f"{path}, line {lines[-1]}" if lines else path
    raise ValueError(f"{_FLAG}={spec}: {type(error).__name__}: {what} ({where})") from error


def to_config_dict(value: Any) -> Any:
  """Dataclasses as ConfigDicts, tuples of them as tuples; a field that may be None keeps its
  type."""
  if isinstance(value, tuple):
    return tuple(to_config_dict(item) for item in value)
  if not dataclasses.is_dataclass(value):
    return value
  hints = typing.get_type_hints(type(value))
  fields = {}
  for field in dataclasses.fields(value):
    item = to_config_dict(getattr(value, field.name))
    if optional := _optional_type(hints[field.name]):
      item = config_dict.FieldReference(item, field_type=optional)
    fields[field.name] = item
  return config_dict.ConfigDict(fields, convert_dict=False)


def rebuild(original: Any, changed: Any) -> Any:
  """The dataclasses of `original` with the values of `changed`; every __post_init__ runs."""
  if isinstance(original, tuple) and any(dataclasses.is_dataclass(item) for item in original):
    return tuple(rebuild(item, new) for item, new in zip(original, changed, strict=True))
  if not dataclasses.is_dataclass(original) or isinstance(original, type):
    return changed
  values = {
    field.name: rebuild(getattr(original, field.name), changed[field.name])
    for field in dataclasses.fields(original)
  }
  return type(original)(**values)


def take_nones(run: Run, argv: Sequence[str]) -> tuple[list[str], list[str]]:
  """The fields that are set to None, and the other arguments; ValueError for a field that does not
  exist.

  The flags of ml_collections cannot express None: it would be an error, or the string "None". If a
  field is set several times, the last one counts, even if an item is [2] in one and [-1] in
  another.
  """
  nones: list[str] = []
  rest: list[tuple[str | None, str]] = []  # (field, argument)
  for argument in argv:
    if not argument.startswith(f"{_FLAG}."):
      rest.append((None, argument))
      continue
    path, _, text = argument.removeprefix(f"{_FLAG}.").partition("=")
    try:
      field, may_be_none = _field(run, path)
    except ValueError as error:
      raise ValueError(f"{argument}: {error}") from error
    nones = [other for other in nones if other != field]
    if may_be_none and text in ("None", "none"):
      nones.append(field)
      rest = [(other, argument) for other, argument in rest if other != field]
    else:
      rest.append((field, argument))
  return nones, [argument for _, argument in rest]


def difference(preset: Run, run: Run) -> dict[str, tuple[Any, Any]]:
  """The fields in which `run` is not the preset: path -> (value in the preset, value now)."""
  before, after = flatten(preset), flatten(run)
  return {
    path: (before.get(path), after[path]) for path in after if before.get(path) != after[path]
  }


def _field(run: Run, path: str) -> tuple[str, bool]:
  """The field at `path`, with items counted from the first, and whether it may be None. ValueError,
  with the fields that exist, for any other path."""
  value: Any = run
  may_be_none, seen = False, ""
  for name, index in re.findall(r"(\w+)|\[(-?\d+)\]", path):
    if index:
      if not (isinstance(value, tuple) and any(map(dataclasses.is_dataclass, value))):
        raise ValueError(f"there is no such field: {seen} is set as a whole, {value!r} now")
      if not -len(value) <= int(index) < len(value):
        raise ValueError(f"there is no such field: {seen} has {len(value)} items, from [0] on")
      place = int(index) % len(value)
      value, seen = value[place], f"{seen}[{place}]"
      continue
    names = [field.name for field in dataclasses.fields(value)] if _has_fields(value) else []
    if name not in names:
      close = difflib.get_close_matches(name, names, n=1)
      hint = f"did you mean {close[0]}? " if close else ""
      has = f"has {', '.join(names)}" if names else "is set as a whole"
      raise ValueError(f"there is no such field as {name}: {hint}{seen or 'a run'} {has}")
    may_be_none = _optional_type(typing.get_type_hints(type(value))[name]) is not None
    value, seen = getattr(value, name), f"{seen}.{name}".removeprefix(".")
  if _has_fields(value):
    names = ", ".join(f"{_FLAG}.{path}.{field.name}" for field in dataclasses.fields(value))
    raise ValueError(f"{path} is a {type(value).__name__}: set its fields ({names})")
  if isinstance(value, tuple) and any(map(_has_fields, value)):
    raise ValueError(
      f"{path} has {len(value)} items, and as many it keeps: set their fields, from "
      f"{_FLAG}.{path}[0] on; another number of them is for the config file to give"
    )
  return seen, may_be_none


def _has_fields(value: Any) -> bool:
  return dataclasses.is_dataclass(value) and not isinstance(value, type)


def _optional_type(hint: Any) -> type | None:
  """T of an annotation `T | None`, for the plain types that a flag can carry."""
  if typing.get_origin(hint) not in (types.UnionType, typing.Union):
    return None
  arguments = [argument for argument in typing.get_args(hint) if argument is not types.NoneType]
  plain = len(arguments) == 1 and arguments[0] in (int, float, str, bool)
  return arguments[0] if plain and types.NoneType in typing.get_args(hint) else None


def _preset(argv: Sequence[str]) -> tuple[Run, list[str]]:
  """The run of the one --config flag, and the arguments without it."""
  specs, rest = _specs(argv)
  if {"--help", "--helpfull", "--helpshort", "-h"} & set(rest) and not specs:
    specs.append("configs/smoke.py")
  if len(specs) != 1:
    raise ValueError(f"{_FLAG}=FILE.py[:ARG] must be given once, it is given {len(specs)} times")
  return load(specs[0]), rest


def _specs(argv: Sequence[str]) -> tuple[list[str], list[str]]:
  """What each --config flag says, and the arguments without them."""
  specs, rest = [], []
  arguments = iter(argv)
  for argument in arguments:
    if argument == _FLAG:
      specs.append(next(arguments, ""))
    elif argument.startswith(f"{_FLAG}="):
      specs.append(argument.removeprefix(f"{_FLAG}="))
    else:
      rest.append(argument)
  return specs, rest
