"""Pictures of what the layers of a run do, from its statistics.jsonl."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from train.drawing import colors
from train.drawing.line_chart import Axis, Line, Mark, chart, dress, label_ends, smoothed
from train.drawing.numbers import short
from train.drawing.picture import TITLE_HEIGHT, Picture, drawing
from train.telemetry.history import History

NOTE = (
  '<p class="faint">The memory horizon of a channel is -1 / ln a, at the mean of its recurrence '
  "gate over a batch: after so many tokens its state has fallen to 1/e. Rings: the median with the "
  "gate wide open. Gates are saturated below 0.05 (recurrence: the state is kept; input: closed) "
  "or above 0.95 (the state fades as fast as it can; open).</p>"
)
_HEIGHT = 260.0
_MOST_LABELS = 9


def recurrence(
  run: History, x_of: Callable[[int], float], x: Axis, marks: Sequence[Mark], width: float
) -> Iterator[Picture | None]:
  """Horizons over training and now, and gates that are saturated."""
  horizon = [{step: value[2] for step, value in column.items()} for column in run.layer("horizon")]
  tokens = Axis("tokens", scale="log")
  yield _by_block(horizon, "Memory horizon of the median channel", x_of, x, tokens, marks, width)
  yield _distribution(run, width)
  for gate in ("recurrence", "input"):
    share = [
      {step: 100 * (lows[step] + highs[step]) for step in lows}
      for lows, highs in zip(run.layer(f"{gate}_gate_low"), run.layer(f"{gate}_gate_high"))
    ]
    y = Axis("share of a batch (%)", show="{:.3g}%".format, exact="{:.3g}%".format, low=0.0)
    yield _by_block(share, f"Saturated {gate} gates", x_of, x, y, marks, width)


def norms(
  run: History, x_of: Callable[[int], float], x: Axis, marks: Sequence[Mark], width: float
) -> Iterator[Picture | None]:
  """Gradient, update over parameters, residual stream and states, a line for each block."""
  updates = [
    {step: value / params[step] for step, value in column.items() if params.get(step)}
    for column, params in zip(run.layer("update_norm"), run.layer("param_norm"))
  ]
  for title, unit, columns in (
    ("Gradient of each block, before clipping", "Euclidean norm", run.layer("grad_norm")),
    ("Update of each block over its parameters", "ratio of norms", updates),
    ("Residual stream behind each block", "root mean square", run.layer("output_rms")),
    ("Recurrent state h of each block", "root mean square", run.layer("state_rms")),
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
  """Which of many blocks get a name: evenly spread ones, the first and the last among them."""
  if len(blocks) <= _MOST_LABELS:
    return set(blocks)
  last = len(blocks) - 1
  return {blocks[round(index * last / (_MOST_LABELS - 3))] for index in range(_MOST_LABELS - 2)}


def _distribution(run: History, width: float) -> Picture | None:
  """For each recurrent block: 5 to 95 % and 25 to 75 % of its channels, the median, and a ring for
  the median with the gate wide open."""
  line = run.layers[-1]
  blocks = [(block, values) for block, values in enumerate(line.get("horizon", [])) if values]
  if not blocks:
    return None
  opened = [values and values[2] for values in line.get("horizon_open", [])]
  opened += [None] * (len(line["horizon"]) - len(opened))
  row = [float(run.row_length)] if run.row_length else []
  shown = [*(value for _, values in blocks for value in values), *filter(None, opened), *row]
  with drawing(width, _HEIGHT, title="Memory horizons of the channels now") as picture:
    axes = picture.axes(64, width - 130, TITLE_HEIGHT + 4, _HEIGHT - 42)
    dress(axes, "y", Axis("tokens", scale="log"), shown, most=5)
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
      color, half = colors.in_order(block, len(line["horizon"])), min(0.3, 0.04 * len(blocks))
      axes.plot([place, place], [p5, p95], color=color, linewidth=1.4)
      axes.bar(place, p75 - p25, 2 * half, bottom=p25, color=color)
      axes.plot([place - half, place + half], [p50, p50], color="#ffffff", solid_capstyle="butt")
      values = [f"95 %: {p95:,.4g} tokens", f"75 %: {p75:,.4g}", f"median: {p50:,.4g}"]
      values += [f"25 %: {p25:,.4g}", f"5 %: {p5:,.4g}"]
      if (ring := opened[block]) is not None:
        axes.plot(place, ring, "o", color=color, markerfacecolor="#ffffff", markersize=6)
        values.append(f"median with the gate wide open: {ring:,.4g}")
      words = "\n".join([f"block {block}, horizons of its channels", *values])
      picture.tooltip(axes, (place - 0.5, place + 0.5), None, words)
    # What the parts of the last block's shape are, beside it.
    names = zip(("5 %", "25 %", "median", "75 %", "95 % of channels"), blocks[-1][1])
    ends = [(value, name) for name, value in names]
    ends += [(at, f"a row: {short(at)}" if at >= 1e6 else f"a row: {at:,.0f}") for at in row]
    right = len(blocks) - 0.5
    label_ends(picture, axes, [((right, value), name, colors.FAINT) for value, name in ends])
  return picture
