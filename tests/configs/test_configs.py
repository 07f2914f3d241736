"""Every shipped config, setting by setting, against the dump of it in tests/golden/configs.txt."""

import pathlib

from tests.golden import make_configs

ROOT = pathlib.Path(__file__).parents[2]


def test_no_setting_of_a_preset_changes_unseen():
  """If the change is meant: python -m tests.golden.make_configs, and commit the difference."""
  now, golden = make_configs.lines(), make_configs.FILE.read_text().splitlines()
  gone, new = sorted({*golden} - {*now}), sorted({*now} - {*golden})
  assert now == golden, f"gone: {gone[:5]}, new: {new[:5]}; run python -m tests.golden.make_configs"


def test_every_config_file_is_in_the_dump():
  files = {path.name for path in (ROOT / "configs").glob("*.py")} - {"__init__.py"}
  assert files == {spec.partition(":")[0].removeprefix("configs/") for spec in make_configs.SPECS}
