"""The families that `launch.row_lengths` compares by default, all of them with the first.

Each has a preset in this folder, with the sizes of models/sizes.py.
"""


def get_families() -> tuple[str, ...]:
  """Names of presets: configs/NAME.py."""
  return ("transformer", "hawk", "griffin", "llama")
