"""Runs as one page: how they learn, where their time goes, what their layers do."""

import datetime
import html
import math
from collections.abc import Callable, Sequence

from launch.pages import layer_charts, svg, time_charts
from launch.pages.line_chart import Axis, Line, Mark, chart, smoothed, without_first_steps
from train.telemetry.history import History, duration

WIDE, HALF = 860.0, 420.0
_STYLE = """
body{font:15px/1.5 system-ui,sans-serif;color:#222;background:#fff;max-width:900px;margin:2em auto;
padding:0 1.2em}h1{font-size:1.35em;margin:.2em 0 .6em}h2{font-size:1.15em;margin:2em 0 .3em}
h3{font-size:.98em;font-weight:600;margin:1em 0 .1em}h3 span{font-weight:400;color:#777}
p{margin:.3em 0}.faint{color:#777}table{border-collapse:collapse;width:100%;font-size:.9em}
th,td{text-align:right;white-space:nowrap;padding:.25em .55em;border-bottom:1px solid #e6e6e6}
th{color:#777;font-weight:500}td:first-child,th:first-child{text-align:left}code{font-size:.92em}
.pair{display:grid;grid-template-columns:1fr 1fr;gap:0 20px}svg{width:100%;height:auto;
display:block}@media(max-width:640px){.pair{grid-template-columns:1fr}}
"""


def page(runs: Sequence[History], *, command: str) -> str:
  """The page of one run or of several beside each other; `command` is what made it."""
  title = html.escape(", ".join(labels(runs)))
  now = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC")
  return "\n".join(
    [
      "<!doctype html>",
      f'<html lang="en"><head><meta charset="utf-8"><title>{title}</title>',
      '<meta name="viewport" content="width=device-width, initial-scale=1">',
      f"<style>{_STYLE}</style></head><body>",
      f"<h1>{title}</h1>",
      _table(runs),
      *_notes(runs),
      "<h2>Loss</h2>",
      *_losses(runs),
      "<h2>Speed and gradient</h2>",
      *_pair(_throughput(runs), _grad_norm(runs)),
      *_time(runs),
      *(part for run, label in zip(runs, labels(runs)) for part in _layers(run, label, runs)),
      f'<p class="faint">{now}: <code>{html.escape(command)}</code></p>',
      "</body></html>",
      "",
    ]
  )


def labels(runs: Sequence[History]) -> list[str]:
  """A name for each run that no other has: its own, or that of its folder."""
  names = [run.name for run in runs]
  if len(set(names)) == len(names):
    return names
  folders = [run.workdir.resolve().name for run in runs]
  if len(set(folders)) == len(folders):
    return folders
  return [str(run.workdir) for run in runs]


def _table(runs: Sequence[History]) -> str:
  columns: list[tuple[str, Callable[[History], str | None]]] = [
    ("", lambda run: run.state),
    ("steps", _steps),
    ("tokens", lambda run: _shown(_times(run.step, run.tokens_per_step), svg.short)),
    ("loss", lambda run: _shown(_end_of(run, "train/loss"), "{:.3f}".format)),
    ("held out", lambda run: _shown(run.last("eval/loss"), "{:.3f}".format)),
    ("bits/byte", lambda run: _shown(run.last("eval/bits_per_byte"), "{:.3f}".format)),
    ("tokens/s", lambda run: _shown(run.median("train/tokens_per_second"), "{:,.0f}".format)),
    ("MFU", lambda run: _shown(run.median("train/mfu"), "{:.1%}".format)),
    ("goodput", lambda run: _shown(run.goodput, "{:.0%}".format)),
    ("restarts", lambda run: f"{len(run.restarts)}" if run.log.starts else None),
    ("time", lambda run: _shown(sum(run.log.seconds().values()) or None, duration)),
  ]
  found = [(head, [cell(run) for run in runs]) for head, cell in columns]
  # A column that no run can fill says nothing.
  found = [(head, cells) for head, cells in found if any(cell is not None for cell in cells)]
  heads = "".join(f"<th>{head}</th>" for head, _ in found)
  rows = []
  for index, (label, color) in enumerate(zip(labels(runs), _run_colors(runs))):
    cells = "".join(f"<td>{html.escape(cells[index] or '-')}</td>" for _, cells in found)
    rows.append(f'<tr><td><b style="color:{color}">{html.escape(label)}</b></td>{cells}</tr>')
  return f"<table><tr><th>run</th>{heads}</tr>{''.join(rows)}</table>"


def _steps(run: History) -> str:
  show = "{:,}".format if run.step < 10_000 else svg.short
  return f"{show(run.step)} of {show(run.total_steps)}" if run.total_steps else show(run.step)


def _notes(runs: Sequence[History]) -> list[str]:
  notes = []
  for run, label in zip(runs, labels(runs)):
    if run.devices:
      about = html.escape(f"{label}: {run.devices}")
      notes.append(f"{about}, <code>{html.escape(str(run.workdir))}</code>")
    notes += [html.escape(f"{label}: {line}") for line in run.missing]
  return [f'<p class="faint">{note}</p>' for note in notes]


def _losses(runs: Sequence[History]) -> list[str]:
  unit = "nats per token" + ("" if len(runs) == 1 else "; lines: training, dots: held out")
  progress, x_of = _progress(runs)
  by_progress = _loss_chart(runs, x_of, progress, WIDE, 330, _step_marks(runs, x_of))
  by_flops = _loss_chart(runs, _flops, Axis("training FLOPs", low=0.0), HALF, 240, ())
  clock, scale = _clock_axis(runs)
  by_time = _loss_chart(runs, _clock(scale), clock, HALF, 240, _clock_marks(runs, scale))
  return [
    _titled(f"over {progress.label}", unit, by_progress),
    *_pair(_titled("over compute", "", by_flops), _titled("over wall-clock time", "", by_time)),
  ]


XOf = Callable[[History, int], float]


def _loss_chart(
  runs: Sequence[History], x_of: XOf, x: Axis, width: float, height: float, marks: Sequence[Mark]
) -> str:
  lines, values = [], []
  is_one = len(runs) == 1
  for run, label, color in zip(runs, labels(runs), _run_colors(runs)):
    train, held_out = run.metrics.get("train/loss", {}), run.metrics.get("eval/loss", {})
    points = _points(run, train, x_of)
    lines.append(Line(points, color, style="faint"))
    mean = smoothed(points)
    name = f"training {mean[-1][1]:.3f}" if mean else ""
    if is_one:
      lines.append(Line(mean, color, name))
    else:
      last = list(held_out.values() or train.values())[-1:]
      name = f"{label} {last[0]:.3f}" if last else ""
      lines.append(Line(mean, color, "" if held_out else name))
    if held_out:
      held_color = svg.COLORS[1] if is_one else color
      if is_one:
        name = f"held out {list(held_out.values())[-1]:.3f}"
      lines.append(Line(_points(run, held_out, x_of), held_color, name, "dots"))
    values += [*train.values(), *held_out.values()]
  y = Axis(show="{:.3g}".format, high=without_first_steps(values))
  return chart(lines, x=x, y=y, width=width, height=height, marks=marks)


def _throughput(runs: Sequence[History]) -> str:
  x, x_of = _progress(runs)
  lines = []
  for run, label, color in zip(runs, labels(runs), _run_colors(runs)):
    median = run.median("train/tokens_per_second")
    if median is not None:
      points = _points(run, run.metrics["train/tokens_per_second"], x_of)
      name = "median" if len(runs) == 1 else label
      lines.append(Line(points, color, style="faint"))
      lines.append(Line(smoothed(points), color, f"{name} {svg.short(median)}"))
  picture = chart(
    lines,
    x=x,
    y=Axis(low=0.0),
    width=HALF,
    height=240,
    marks=_step_marks(runs, x_of),
  )
  return _titled("Throughput", "tokens per second, all devices", picture)


def _grad_norm(runs: Sequence[History]) -> str:
  x, x_of = _progress(runs)
  lines = []
  for run, label, color in zip(runs, labels(runs), _run_colors(runs)):
    points = _points(run, run.metrics.get("train/grad_norm", {}), x_of)
    if points:
      mean = smoothed(points)
      name = "" if len(runs) == 1 else f"{label} "
      lines.append(Line(points, color, style="faint"))
      lines.append(Line(mean, color, f"{name}{mean[-1][1]:.3g}"))
  picture = chart(
    lines,
    x=x,
    y=Axis(scale="log"),
    width=HALF,
    height=240,
    marks=_step_marks(runs, x_of),
  )
  return _titled("Gradient norm", "before clipping", picture)


def _time(runs: Sequence[History]) -> list[str]:
  logged = [(run, label) for run, label in zip(runs, labels(runs)) if run.log.pieces]
  if not logged:
    return []
  parts = ["<h2>Where the time went</h2>"]
  for run, label in logged:
    seconds = run.log.seconds()
    total = sum(seconds.values())
    head = f"{label}: goodput {run.goodput:.0%} of {duration(total)}"
    parts += [_titled(head, "", time_charts.bar(seconds, WIDE) + time_charts.strip(run, WIDE))]
  return parts


def _layers(run: History, label: str, runs: Sequence[History]) -> list[str]:
  if not run.layers:
    return []
  of = "" if len(runs) == 1 else f" of {html.escape(label)}"
  x, x_of_run = _progress([run])
  marks = _step_marks([run], x_of_run)

  def x_of(step: int) -> float:
    return x_of_run(run, step)

  parts = []
  if any(run.layer("horizon")):
    titled = [
      _titled(title, note, picture)
      for title, note, picture in layer_charts.recurrence(run, x_of, x, marks, HALF)
    ]
    parts += [f"<h2>What the recurrence{of} does</h2>", layer_charts.NOTE, *_pair(*titled)]
  titled = [
    _titled(title, note, picture)
    for title, note, picture in layer_charts.norms(run, x_of, x, marks, HALF)
  ]
  return [*parts, f"<h2>Layers{of}</h2>", *_pair(*titled)]


def _titled(title: str, note: str, picture: str) -> str:
  if not picture:
    return ""
  return f"<div><h3>{html.escape(title)} <span>{html.escape(note)}</span></h3>{picture}</div>"


def _pair(*parts: str) -> list[str]:
  return ['<div class="pair">', *(part for part in parts if part), "</div>"]


def _progress(runs: Sequence[History]) -> tuple[Axis, XOf]:
  """The axis of a picture of `runs` and their places on it: tokens, or for all of them steps where
  one does not know its tokens."""
  if all(run.tokens_per_step for run in runs):
    return Axis("tokens", low=0.0), _tokens
  return Axis("steps", low=0.0), lambda run, step: float(step)


def _tokens(run: History, step: int) -> float:
  """NaN where that is not known, which no picture shows."""
  return float(step * (run.tokens_per_step or math.nan))


def _flops(run: History, step: int) -> float:
  return _tokens(run, step) * (run.flops_per_token or math.nan)


def _clock(scale: float) -> XOf:
  def x_of(run: History, step: int) -> float:
    return (run.metrics["time"][step] - run.began()) / scale

  return x_of


def _points(run: History, values: dict[int, float], x_of: XOf) -> list[tuple[float, float]]:
  return [(x_of(run, step), value) for step, value in values.items()]


def _clock_axis(runs: Sequence[History]) -> tuple[Axis, float]:
  longest = max(
    (max(run.metrics["time"].values()) - run.began() for run in runs if run.metrics["time"]),
    default=0.0,
  )
  for size, unit in ((86400.0, "days"), (3600.0, "hours"), (60.0, "minutes"), (1.0, "seconds")):
    if longest >= 2 * size or size == 1.0:
      return Axis(f"{unit} since the first start", show="{:.4g}".format, low=0.0), size
  raise AssertionError


def _step_marks(runs: Sequence[History], x_of: XOf) -> list[Mark]:
  marks = []
  for run, color in zip(runs, _run_colors(runs)):
    color = svg.FAINT if len(runs) == 1 else color
    marks += [Mark(x_of(run, start.step or 0), "restart", color) for start in run.restarts]
  return marks


def _clock_marks(runs: Sequence[History], scale: float) -> list[Mark]:
  marks = []
  for run, color in zip(runs, _run_colors(runs)):
    color = svg.FAINT if len(runs) == 1 else color
    marks += [Mark((start.time - run.began()) / scale, "restart", color) for start in run.restarts]
  return marks


def _run_colors(runs: Sequence[History]) -> list[str]:
  return [svg.COLORS[index % len(svg.COLORS)] for index in range(len(runs))]


def _end_of(run: History, name: str) -> float | None:
  """The end of a series as its curve is drawn."""
  mean = smoothed(list(run.metrics.get(name, {}).items()))
  return mean[-1][1] if mean else None


def _times(step: int, each: int | None) -> float | None:
  return None if each is None else float(step * each)


def _shown(value: float | None, show: Callable[[float], str]) -> str | None:
  return None if value is None else show(value)
