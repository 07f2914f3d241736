"""Whether two configs describe one model: the same parameters then give the same logits."""

import dataclasses
from collections.abc import Iterator
from typing import Any, NamedTuple

from models import kernel_fields
from models.decoder import DecoderConfig

# Fields, anywhere in a config, that logits of given parameters do not depend on: precision, how a
# step is computed, and how parameters are initialized.
_FREE = ("dtype", "param_dtype", "remat", "layers", "decay_init", "initial_weights")
_ABSENT = "(not there)"


class Difference(NamedTuple):
  """A field ("pattern[0].mixer.window") in which two configs differ, and its value in each."""

  path: str
  first: Any
  second: Any


def differences(first: DecoderConfig, second: DecoderConfig) -> list[Difference]:
  """The fields that make them different models, by path; empty if they are one model."""
  here, there = (dict(_decisive(kernel_fields.without_kernels(c))) for c in (first, second))
  return [
    Difference(path, here.get(path, _ABSENT), there.get(path, _ABSENT))
    for path in sorted({*here, *there})
    if here.get(path, _ABSENT) != there.get(path, _ABSENT)
  ]


def _decisive(config: Any, path: str = "") -> Iterator[tuple[str, Any]]:
  """Path and value of every field that decides the model; for a field with a config, its class."""
  if isinstance(config, tuple):
    for index, item in enumerate(config):
      yield from _decisive(item, f"{path}[{index}]")
  elif dataclasses.is_dataclass(config) and not isinstance(config, type):
    if path:
      yield path, f"a {type(config).__module__}.{type(config).__qualname__}"
    for field in dataclasses.fields(config):
      if field.name not in _FREE:
        inner = f"{path}.{field.name}".removeprefix(".")
        yield from _decisive(getattr(config, field.name), inner)
  else:
    yield path, config
