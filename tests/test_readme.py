"""What the README says is what the code has."""

import pathlib
import re

from train.metrics import fields_table

ROOT = pathlib.Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def test_every_console_field_is_explained():
  """If this fails, put the output of train.metrics.fields_table() into the README."""
  assert fields_table().strip() in README


def test_every_command_and_file_it_names_exists():
  modules = set(re.findall(r"python -m ([\w.]+)", README))
  assert {"launch.prepare", "launch.train", "launch.generate"} <= modules
  for module in modules:
    assert (ROOT / (module.replace(".", "/") + ".py")).is_file(), module
  for path in re.findall(r"`((?:configs|tests|train|models|docs)/[\w/]+\.(?:py|md))", README):
    assert (ROOT / path).exists(), path
  targets = set(re.findall(r"make (train|test|lint)\b", README))
  makefile = (ROOT / "Makefile").read_text()
  assert targets == {"train", "test", "lint"}
  assert all(re.search(rf"^{target}:", makefile, re.MULTILINE) for target in targets)
