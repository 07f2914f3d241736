"""Writes tests/golden/parameters.txt: how every parameter of every preset is treated.

  python -m tests.golden.make_parameters

One line for each parameter: its name, the names of its dimensions, the dtype that it is stored in
and the one that layers read it in, and whether weight decay applies. Presets that agree in all of
it share a table. A change of any of these is then seen in review as what it is.
"""

import pathlib

import jax

from launch.overrides import load
from models import decoder
from models.decoder import DecoderConfig
from tests.golden.make_configs import SPECS

FILE = pathlib.Path(__file__).parent / "parameters.txt"


def text() -> str:
  """Every table, under the names of its presets."""
  presets: dict[str, list[str]] = {}
  for spec in SPECS:
    presets.setdefault(_table(load(spec).model), []).append(spec.removeprefix("configs/"))
  return "\n".join("\n".join(names) + "\n" + table for table, names in presets.items())


def _table(config: DecoderConfig) -> str:
  model = decoder.build(config)

  def line(path, axes, shape, float32, decays) -> str:
    name = jax.tree_util.keystr(path, simple=True, separator="/")
    read = "float32" if float32 else config.dtype
    verb = "decays" if decays else "does not decay"
    return f"  {name}: {' x '.join(axes)}; {shape.dtype}, read as {read}; {verb}\n"

  lines = jax.tree_util.tree_map_with_path(
    line, model.axes, model.shapes, model.float32, model.decays, is_leaf=_is_axes
  )
  return "".join(jax.tree.leaves(lines))


def _is_axes(value: object) -> bool:
  return isinstance(value, tuple)


if __name__ == "__main__":
  FILE.write_text(text())
