"""Pictures of what the layers of a run do, from its statistics.jsonl."""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from launch.pages import svg
from launch.pages.line_chart import Axis, Line, Mark, chart, smoothed, ticks
from train.telemetry.history import History

NOTE = (
  '<p class="faint">The memory horizon of a channel is -1 / ln a, at the mean of its recurrence '
  "gate over a batch: after so many tokens its state has fallen to 1/e. Rings: the median with the "
  "gate wide open. Gates are saturated below 0.05 (recurrence: the state is kept; input: closed) "
  "or above 0.95 (the state fades as fast as it can; open).</p>"
)
Titled = tuple[str, str, str]  # title, unit or explanation, picture
_HEIGHT = 240.0
_MOST_LABELS = 9


def recurrence(
  run: History, x_of: Callable[[int], float], x: Axis, marks: Sequence[Mark], width: float
) -> Iterator[Titled]:
  """Horizons over training and now, and gates that are saturated."""
  horizon = [{step: value[2] for step, value in column.items()} for column in run.layer("horizon")]
  picture = _by_block(horizon, x_of, x, Axis(scale="log"), marks, width)
  yield "Memory horizon", "tokens, median channel of each layer", picture
  yield (
    "Memory horizons now",
    "tokens, channels of each layer",
    _distribution(run, width),
  )
  for gate in ("recurrence", "input"):
    share = [
      {step: 100 * (lows[step] + highs[step]) for step in lows}
      for lows, highs in zip(run.layer(f"{gate}_gate_low"), run.layer(f"{gate}_gate_high"))
    ]
    picture = _by_block(share, x_of, x, Axis(show="{:.3g}%".format, low=0.0), marks, width)
    yield f"Saturated {gate} gates", "share of a batch", picture


def norms(
  run: History, x_of: Callable[[int], float], x: Axis, marks: Sequence[Mark], width: float
) -> Iterator[Titled]:
  """Gradient, update over parameters, residual stream and states, a line for each block."""
  log = Axis(scale="log")
  updates = [
    {step: value / params[step] for step, value in column.items() if params.get(step)}
    for column, params in zip(run.layer("update_norm"), run.layer("param_norm"))
  ]
  for title, note, columns in (
    ("Gradient norm of each block", "before clipping", run.layer("grad_norm")),
    ("Update of each block", "relative to its parameters", updates),
    ("Residual stream", "root mean square behind each block", run.layer("output_rms")),
    ("Recurrent state", "root mean square of h", run.layer("state_rms")),
  ):
    yield title, note, _by_block(columns, x_of, x, log, marks, width)


def _by_block(
  columns: Sequence[dict[int, Any]],
  x_of: Callable[[int], float],
  x: Axis,
  y: Axis,
  marks: Sequence[Mark],
  width: float,
) -> str:
  """A line for each block that has values, dark for the first to light for the last."""
  blocks = [block for block, column in enumerate(columns) if column]
  named = _named(blocks)
  lines = []
  for block in blocks:
    points = [(x_of(step), value) for step, value in columns[block].items()]
    last = y.show(points[-1][1]) if points else ""
    label = f"block {block}: {last}" if block in named else ""
    lines.append(Line(smoothed(points), svg.in_order(block, len(columns)), label))
  return chart(lines, x=x, y=y, width=width, height=_HEIGHT, marks=marks)


def _named(blocks: Sequence[int]) -> set[int]:
  """Which of many blocks get a name: evenly spread ones, the first and the last among them."""
  if len(blocks) <= _MOST_LABELS:
    return set(blocks)
  last = len(blocks) - 1
  return {blocks[round(index * last / (_MOST_LABELS - 3))] for index in range(_MOST_LABELS - 2)}


def _distribution(run: History, width: float) -> str:
  """For each recurrent block: 5 to 95 % and 25 to 75 % of its channels, the median, and a ring for
  the median with the gate wide open."""
  line = run.layers[-1]
  blocks = [(block, values) for block, values in enumerate(line.get("horizon", [])) if values]
  if not blocks:
    return ""
  opened = line.get("horizon_open", [])
  lows = [values[0] for _, values in blocks] + [values[2] for values in opened if values]
  highs = [values[-1] for _, values in blocks] + ([run.row_length] if run.row_length else [])
  low, high = min(lows) / 1.3, max(highs) * 1.3
  place = _log_places(low, high, _HEIGHT - 38, 14)
  left, right = 46.0, width - 110.0
  shapes = []
  for tick in ticks(low, high, "log", most=4):
    shapes.append(svg.line([(left, place(tick)), (right, place(tick))], svg.GRID))
    label = svg.short(tick)
    shapes.append(
      svg.text(left - 7, place(tick) + 4, label, anchor="end", color=svg.FAINT, size=12)
    )
  if run.row_length:
    at = place(run.row_length)
    shapes.append(svg.line([(left, at), (right, at)], svg.FAINT, dashes="2 3"))
  slot = (right - left) / len(blocks)
  bar = min(16.0, slot * 0.6)
  every = max(1, -(-len(blocks) // 10))
  for index, (block, (p5, p25, p50, p75, p95)) in enumerate(blocks):
    x = left + slot * (index + 0.5)
    color = svg.in_order(block, len(line["horizon"]))
    shapes.append(svg.line([(x, place(p5)), (x, place(p95))], color, width=1.4))
    shapes.append(
      svg.rect(x - bar / 2, place(p75), bar, place(p25) - place(p75), color, f"block {block}")
    )
    shapes.append(svg.line([(x - bar / 2, place(p50)), (x + bar / 2, place(p50))], "#fff", width=2))
    if opened and opened[block]:
      shapes.append(svg.circle(x, place(opened[block][2]), 3.2, color, filled=False))
    if index % every == 0:
      shapes.append(
        svg.text(x, _HEIGHT - 20, f"{block}", anchor="middle", color=svg.FAINT, size=12)
      )
  shapes.append(svg.text(right, _HEIGHT - 4, "block", anchor="end", color=svg.FAINT, size=12))
  # What the parts of the last block's shape are, beside it.
  _, (p5, p25, p50, p75, p95) = blocks[-1]
  names = [(p95, "95 % of channels"), (p75, "75 %"), (p50, "median"), (p25, "25 %"), (p5, "5 %")]
  if run.row_length:
    names.append((float(run.row_length), f"a row: {run.row_length:,}"))
  shapes += _beside(sorted((place(value), words) for value, words in names), right)
  return svg.svg(width, _HEIGHT, shapes)


def _beside(names: Sequence[tuple[float, str]], right: float) -> list[str]:
  shapes, top = [], -100.0
  for y, words in names:
    top = max(y, top + 13)
    shapes.append(svg.text(right + 8, top + 4, words, color=svg.FAINT, size=11))
  return shapes


def _log_places(low: float, high: float, bottom: float, top: float) -> Callable[[float], float]:
  def place(value: float) -> float:
    return bottom - (bottom - top) * math.log(value / low) / math.log(high / low)

  return place
