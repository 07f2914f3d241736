"""Pictures of what the layers of a run do, from its statistics.jsonl."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from models.statistics import Picture as Declared
from models.statistics import Statistics
from train.drawing import colors
from train.drawing.line_chart import Axis, Line, Mark, chart, dress, label_ends, smoothed
from train.drawing.numbers import short
from train.drawing.picture import TITLE_HEIGHT, Picture, drawing
from train.telemetry.history import History

_HEIGHT = 260.0
_MOST_LABELS = 9


def recorded(
  run: History,
  statistics: Statistics,
  x_of: Callable[[int], float],
  x: Axis,
  marks: Sequence[Mark],
  width: float,
) -> Iterator[Picture | None]:
  """The pictures that a mixer declares of what it recorded (models/statistics.py)."""
  for one in statistics.pictures:
    match one.draw:
      case "lines":
        y = Axis(one.unit, scale="log")
        yield _by_block(medians(run, one.columns[0]), one.title, x_of, x, y, marks, width)
      case "shares":
        y = Axis(one.unit, show="{:.3g}%".format, exact="{:.3g}%".format, low=0.0)
        yield _by_block(_shares(run, one.columns), one.title, x_of, x, y, marks, width)
      case "quantiles":
        yield _distribution(run, one, width)


def medians(run: History, name: str) -> list[dict[int, float]]:
  """For each block, step -> its number in a column, or the middle one of its quantiles."""
  return [
    {
      step: value[len(value) // 2] if isinstance(value, list) else value
      for step, value in column.items()
    }
    for column in run.layer(name)
  ]


def _shares(run: History, names: Sequence[str]) -> list[dict[int, float]]:
  """For each block, step -> the sum of several columns of shares, in percent."""
  columns = zip(*(run.layer(name) for name in names))
  return [
    {step: 100 * sum(values[step] for values in of_block) for step in of_block[0]}
    for of_block in columns
  ]


def norms(
  run: History, x_of: Callable[[int], float], x: Axis, marks: Sequence[Mark], width: float
) -> Iterator[Picture | None]:
  """Gradient, update over parameters, and residual stream: a line for each block."""
  updates = [
    {step: value / params[step] for step, value in column.items() if params.get(step)}
    for column, params in zip(run.layer("update_norm"), run.layer("param_norm"))
  ]
  for title, unit, columns in (
    ("Gradient of each block, before clipping", "Euclidean norm", run.layer("grad_norm")),
    ("Update of each block over its parameters", "ratio of norms", updates),
    ("Residual stream behind each block", "root mean square", run.layer("output_rms")),
  ):
    yield _by_block(columns, title, x_of, x, Axis(unit, scale="log"), marks, width)


def _by_block(
  columns: Sequence[dict[int, Any]],
  title: str,
  x_of: Callable[[int], float],
  x: Axis,
  y: Axis,
  marks: Sequence[Mark],
  width: float,
) -> Picture | None:
  """A line for each block that has values, dark for the first to light for the last."""
  blocks = [block for block, column in enumerate(columns) if column]
  named = _named(blocks)
  lines = []
  for block in blocks:
    points = [(x_of(step), value) for step, value in columns[block].items()]
    label = f"block {block}: {y.show(points[-1][1])}" if block in named else ""
    color = colors.in_order(block, len(columns))
    lines.append(Line(smoothed(points), color, label, f"block {block}"))
  return chart(lines, title=title, x=x, y=y, width=width, height=_HEIGHT, marks=marks)


def _named(blocks: Sequence[int]) -> set[int]:
  """Which of many blocks get a label: evenly spread ones, with the first and the last."""
  if len(blocks) <= _MOST_LABELS:
    return set(blocks)
  last = len(blocks) - 1
  return {blocks[round(index * last / (_MOST_LABELS - 3))] for index in range(_MOST_LABELS - 2)}


def _distribution(run: History, one: Declared, width: float) -> Picture | None:
  """For each block with such quantiles: 5 to 95 % and 25 to 75 % of its channels, the median, and a
  ring at the median of a second column. Where the unit is tokens, a line marks the row's length."""
  line, name, *more = run.layers[-1], *one.columns
  values_of = line.get(name, [])
  blocks = [(block, values) for block, values in enumerate(values_of) if values]
  if not blocks:
    return None
  opened = [values and values[2] for values in (line.get(more[0], []) if more else [])]
  opened += [None] * (len(values_of) - len(opened))
  row = [float(run.row_length)] if run.row_length and one.unit == "tokens" else []
  shown = [*(value for _, values in blocks for value in values), *filter(None, opened), *row]
  with drawing(width, _HEIGHT, title=one.title) as picture:
    axes = picture.axes(64, width - 130, TITLE_HEIGHT + 4, _HEIGHT - 42)
    dress(axes, "y", Axis(one.unit, scale="log"), shown, most=5)
    axes.grid(True, axis="y")
    axes.spines["left"].set_visible(False)
    axes.tick_params(axis="y", length=0)
    axes.set_xlim(-0.5, len(blocks) - 0.5)
    every = -(-len(blocks) // 10)
    numbers = [str(block) for block, _ in blocks[::every]]
    axes.set_xticks(range(0, len(blocks), every), labels=numbers)
    axes.set_xlabel("block")
    for at in row:
      axes.axhline(at, color=colors.FAINT, linewidth=1.0, linestyle=(0, (2, 3)))
    for place, (block, (p5, p25, p50, p75, p95)) in enumerate(blocks):
      color, half = colors.in_order(block, len(values_of)), min(0.3, 0.04 * len(blocks))
      axes.plot([place, place], [p5, p95], color=color, linewidth=1.4)
      axes.bar(place, p75 - p25, 2 * half, bottom=p25, color=color)
      axes.plot([place - half, place + half], [p50, p50], color="#ffffff", solid_capstyle="butt")
      values = [f"95 %: {p95:,.4g} {one.unit}", f"75 %: {p75:,.4g}", f"median: {p50:,.4g}"]
      values += [f"25 %: {p25:,.4g}", f"5 %: {p5:,.4g}"]
      if (ring := opened[block]) is not None:
        axes.plot(place, ring, "o", color=color, markerfacecolor="#ffffff", markersize=6)
        values.append(f"{one.ring}: {ring:,.4g}")
      words = "\n".join([f"block {block}, its channels", *values])
      picture.tooltip(axes, (place - 0.5, place + 0.5), None, words)
    # Beside the last block's shape, labels say what its parts are.
    names = zip(("5 %", "25 %", "median", "75 %", "95 % of channels"), blocks[-1][1])
    ends = [(value, name) for name, value in names]
    ends += [(at, f"a row: {short(at)}" if at >= 1e6 else f"a row: {at:,.0f}") for at in row]
    right = len(blocks) - 0.5
    label_ends(picture, axes, [((right, value), name, colors.FAINT) for value, name in ends])
  return picture
