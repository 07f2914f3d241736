"""Records name classes by names that stay; a field that is newer than a record has its default."""

import dataclasses
import re
from typing import ClassVar

import pytest

from tests.commands import ROOT
from train.recorded import defaults, new_at_default, settings


@dataclasses.dataclass(frozen=True)
class _Norm:
  recorded_as: ClassVar[str] = "norm"
  kind: str
  epsilon: float = 1e-6


@dataclasses.dataclass(frozen=True)
class _Block:
  """Today's class: of its fields, only `width` is in old records."""

  recorded_as: ClassVar[str] = "block"
  width: int
  heads: int = 1
  norm: _Norm = _Norm(kind="rms", epsilon=1e-5)
  others: tuple[_Norm, ...] = ()


@dataclasses.dataclass(frozen=True)
class _Model:
  pattern: tuple[_Block, ...]


_BEFORE = {
  "pattern[0]": "block",
  "pattern[0].width": 4,
  "pattern.length": 1,
}


def _new(**changes) -> set[str]:
  """The new settings in a block's record that do not make it differ from the old block."""
  model = _Model((_Block(4, **changes),))
  return new_at_default(_BEFORE, settings(model), defaults(model))


def test_settings_are_named_by_path_and_classes_by_their_own_name():
  assert settings(_Model((_Block(4),))) == {
    **_BEFORE,
    "pattern[0].heads": 1,
    "pattern[0].norm": "norm",
    "pattern[0].norm.kind": "rms",
    "pattern[0].norm.epsilon": 1e-5,
    "pattern[0].others": (),
  }


def test_new_fields_at_their_default_are_no_difference():
  assert {*_BEFORE, *_new()} == settings(_Model((_Block(4),))).keys()


def test_a_new_field_of_another_value_is_one():
  assert "pattern[0].heads" not in _new(heads=2)
  assert "pattern[0].others.length" not in _new(others=(_Norm("rms"),))
  # The block's default decides, not that of the norm's own class.
  assert "pattern[0].norm.epsilon" not in _new(norm=_Norm("rms", 1e-6))
  assert "pattern[0].norm.kind" not in _new(norm=_Norm("layer", 1e-5))
  assert "pattern[0].norm.epsilon" in _new(norm=_Norm("layer", 1e-5))


def test_a_field_without_a_default_is_a_difference():
  before = {path: value for path, value in _BEFORE.items() if path != "pattern[0].width"}
  model = _Model((_Block(4),))
  assert "pattern[0].width" not in new_at_default(before, settings(model), defaults(model))


def test_a_new_field_of_an_object_that_was_there_has_its_class_s_default():
  before = settings(_Model((_Block(4, norm=_Norm("layer", 1e-6)),)))
  del before["pattern[0].norm.epsilon"]
  for epsilon, is_same in ((1e-6, True), (1e-5, False)):
    model = _Model((_Block(4, norm=_Norm("layer", epsilon)),))
    new = new_at_default(before, settings(model), defaults(model))
    assert new == ({"pattern[0].norm.epsilon"} if is_same else set())


@dataclasses.dataclass(frozen=True)
class _Unnamed(_Norm):
  """Inherits a name, and has none of its own."""


@dataclasses.dataclass(frozen=True)
class _Impostor(_Norm):
  recorded_as: ClassVar[str] = "norm"


def test_a_class_without_a_name_of_its_own_is_an_error_that_says_what_to_add():
  with pytest.raises(TypeError, match=r"_Unnamed has no name for the .* add recorded_as: ClassVar"):
    settings(_Block(4, norm=_Unnamed("rms")))
  with pytest.raises(TypeError, match=r"_Impostor and .*_Norm are both recorded as 'norm'; give"):
    settings(_Block(4, others=(_Norm("rms"), _Impostor("rms"))))


def test_no_two_classes_have_one_name():
  """Otherwise a run with one could be taken for a run with the other."""
  names = []
  for folder in ("data", "models", "sharding", "train"):
    for path in sorted((ROOT / folder).rglob("*.py")):
      names += re.findall(r"^  recorded_as: ClassVar\[str\] = \"(.+)\"", path.read_text(), re.M)
  assert len(names) > 10
  assert sorted(names) == sorted(set(names))
