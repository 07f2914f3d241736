"""The families that `launch.row_lengths` compares: presets here, the others with the first.

Each has the sizes of models/sizes.py.
"""


def get_families() -> tuple[str, ...]:
  """Names of files of this folder."""
  return ("transformer", "hawk", "griffin", "llama")
