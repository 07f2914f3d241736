"""Every shipped config, setting by setting, against the dump of it in tests/golden/configs.txt."""

import pathlib

from launch.overrides import ask, load
from models.sizes import SIZES
from tests.golden import make_configs

ROOT = pathlib.Path(__file__).parents[2]


def test_no_setting_of_a_preset_changes_unseen():
  """If the change is meant: python -m tests.golden.make_configs, and commit the difference."""
  now, golden = make_configs.lines(), make_configs.FILE.read_text().splitlines()
  gone, new = sorted({*golden} - {*now}), sorted({*now} - {*golden})
  assert now == golden, f"gone: {gone[:5]}, new: {new[:5]}; run python -m tests.golden.make_configs"


def test_every_config_file_is_in_the_dump():
  paths = (ROOT / "configs").glob("*.py")
  files = {path.name for path in paths if "def get_config(" in path.read_text()}
  assert files == {spec.partition(":")[0].removeprefix("configs/") for spec in make_configs.SPECS}


def test_every_family_that_is_compared_has_all_sizes():
  for family in ask(str(ROOT / "configs" / "comparison.py"), "get_families"):
    for size in SIZES:
      assert load(str(ROOT / "configs" / f"{family}.py:{size}")).name == f"{family}-{size}"
