"""Runs as one page: how they learn, where their time goes, what their layers do."""

import datetime
import html
import math
from collections.abc import Callable, Sequence

from launch.pages import layer_charts, time_charts
from train.drawing import colors
from train.drawing.line_chart import Axis, Line, Mark, chart, smoothed, without_first_steps
from train.drawing.numbers import short
from train.drawing.picture import Picture
from train.telemetry.history import History, duration

WIDE, HALF = 860.0, 420.0
_STYLE = """
body{font:15px/1.5 system-ui,sans-serif;color:#222;background:#fff;max-width:900px;margin:2em auto;
padding:0 1.2em}h1{font-size:1.35em;margin:.2em 0 .6em}h2{font-size:1.15em;margin:2em 0 .3em}
p{margin:.3em 0}.faint{color:#777}table{border-collapse:collapse;width:100%;font-size:.9em}
th,td{text-align:right;white-space:nowrap;padding:.25em .55em;border-bottom:1px solid #e6e6e6}
th{color:#777;font-weight:500}td:first-child,th:first-child{text-align:left}code{font-size:.92em}
.pair{display:grid;grid-template-columns:1fr 1fr;gap:0 20px}svg{width:100%;height:auto;
display:block;margin:.7em 0}.tooltip:hover{fill-opacity:.07}
@media(max-width:640px){.pair{grid-template-columns:1fr}}
"""


def page(runs: Sequence[History], *, command: str) -> str:
  """The page of one run, or of several side by side; `command` is the command that made it."""
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
      "<h2>Speed, gradient and learning rate</h2>",
      *_pair(_throughput(runs), _grad_norm(runs), _learning_rate(runs)),
      *_time(runs),
      *(part for run, label in zip(runs, labels(runs)) for part in _layers(run, label, runs)),
      f'<p class="faint">{now}: <code>{html.escape(command)}</code></p>',
      "</body></html>",
      "",
    ]
  )


def labels(runs: Sequence[History]) -> list[str]:
  """A different name for each run: its own, or that of its folder."""
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
    ("tokens", lambda run: _shown(_times(run.step, run.tokens_per_step), short)),
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
  # A column without a value of any run is left out.
  found = [(head, cells) for head, cells in found if any(cell is not None for cell in cells)]
  heads = "".join(f"<th>{head}</th>" for head, _ in found)
  rows = []
  for index, (label, color) in enumerate(zip(labels(runs), _run_colors(runs))):
    cells = "".join(f"<td>{html.escape(cells[index] or '-')}</td>" for _, cells in found)
    rows.append(f'<tr><td><b style="color:{color}">{html.escape(label)}</b></td>{cells}</tr>')
  return f"<table><tr><th>run</th>{heads}</tr>{''.join(rows)}</table>"


def _steps(run: History) -> str:
  show = "{:,}".format if run.step < 10_000 else short
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
  progress, x_of = _progress(runs)
  clock, scale = _clock_axis(runs)
  flops, kinds = Axis("training FLOPs", low=0.0), "" if len(runs) == 1 else "; dots: held out"
  by_flops = _loss_chart(runs, "Loss over compute", _flops, flops, HALF, 260, ())
  by_time = _loss_chart(
    runs, "Loss over wall-clock time", _clock(scale), clock, HALF, 260, _clock_marks(runs, scale)
  )
  title, marks = f"Loss over {progress.label}{kinds}", _step_marks(runs, x_of)
  by_progress = _loss_chart(runs, title, x_of, progress, WIDE, 350, marks)
  return [_drawn(by_progress), *_pair(by_flops, by_time)]


XOf = Callable[[History, int], float]


def _loss_chart(
  runs: Sequence[History],
  title: str,
  x_of: XOf,
  x: Axis,
  width: float,
  height: float,
  marks: Sequence[Mark],
) -> Picture | None:
  lines, values = [], []
  is_one = len(runs) == 1
  for run, label, color in zip(runs, labels(runs), _run_colors(runs)):
    of = "" if is_one else f"{label} "
    train, held_out = run.metrics.get("train/loss", {}), run.metrics.get("eval/loss", {})
    points = _points(run, train, x_of)
    mean = smoothed(points)
    lines.append(Line(points, color, name=f"{of}training", style="faint"))
    last = list(held_out.values() or train.values())[-1:]
    if is_one:
      label = f"training {mean[-1][1]:.3f}" if mean else ""
    else:
      label = f"{label} {last[0]:.3f}" if last and not held_out else ""
    lines.append(Line(mean, color, label, f"{of}training, mean"))
    if held_out:
      label = "held out" if is_one else of.strip()
      held_color = colors.HELD_OUT if is_one else color
      points = _points(run, held_out, x_of)
      lines.append(Line(points, held_color, f"{label} {last[0]:.3f}", f"{of}held out", "dots"))
    values += [*train.values(), *held_out.values()]
  y = Axis("loss (nats per token)", show="{:.3g}".format, high=without_first_steps(values))
  return chart(lines, title=title, x=x, y=y, width=width, height=height, marks=marks)


def _throughput(runs: Sequence[History]) -> Picture | None:
  x, x_of = _progress(runs)
  lines = []
  for run, label, color in zip(runs, labels(runs), _run_colors(runs)):
    median = run.median("train/tokens_per_second")
    if median is not None:
      points = _points(run, run.metrics["train/tokens_per_second"], x_of)
      name = "median" if len(runs) == 1 else label
      lines.append(Line(points, color, style="faint", name="" if len(runs) > 1 else "tokens/s"))
      lines.append(Line(smoothed(points), color, f"{name} {short(median)}", _mean(label, runs)))
  y = Axis("tokens per second", low=0.0)
  return _half("Throughput of all devices", lines, x, y, _step_marks(runs, x_of))


def _grad_norm(runs: Sequence[History]) -> Picture | None:
  x, x_of = _progress(runs)
  lines = []
  for run, label, color in zip(runs, labels(runs), _run_colors(runs)):
    points = _points(run, run.metrics.get("train/grad_norm", {}), x_of)
    if points:
      mean = smoothed(points)
      name = "" if len(runs) == 1 else f"{label} "
      lines.append(Line(points, color, style="faint", name="" if len(runs) > 1 else "norm"))
      lines.append(Line(mean, color, f"{name}{mean[-1][1]:.3g}", _mean(label, runs)))
  y = Axis("Euclidean norm", scale="log")
  return _half("Gradient, before clipping", lines, x, y, _step_marks(runs, x_of))


def _learning_rate(runs: Sequence[History]) -> Picture | None:
  x, x_of = _progress(runs)
  lines = []
  for run, label, color in zip(runs, labels(runs), _run_colors(runs)):
    points = _points(run, run.metrics.get("train/learning_rate", {}), x_of)
    if points:
      name = "" if len(runs) == 1 else f"{label} "
      end = f"{name}{short(points[-1][1])}"
      lines.append(Line(points, color, end, f"{name}rate"))
  y = Axis("step size", low=0.0)
  return _half("Learning rate", lines, x, y, _step_marks(runs, x_of))


def _half(
  title: str, lines: Sequence[Line], x: Axis, y: Axis, marks: Sequence[Mark]
) -> Picture | None:
  return chart(lines, title=title, x=x, y=y, width=HALF, height=260, marks=marks)


def _mean(label: str, runs: Sequence[History]) -> str:
  """The name of a run's smoothed values in tooltips."""
  return "mean of those around" if len(runs) == 1 else label


def _time(runs: Sequence[History]) -> list[str]:
  logged = [(run, label) for run, label in zip(runs, labels(runs)) if run.log.pieces]
  if not logged:
    return []
  parts = ["<h2>Where the time went</h2>"]
  for run, label in logged:
    seconds = run.log.seconds()
    title = f"{label}: goodput {run.goodput:.0%} of {duration(sum(seconds.values()))}"
    parts += [
      _drawn(time_charts.bar(seconds, title, WIDE)),
      _drawn(time_charts.strip(run, WIDE)),
    ]
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
  for one in run.statistics:
    pictures = layer_charts.recorded(run, one, x_of, x, marks, HALF)
    note = f'<p class="faint">{html.escape(one.note)}</p>'
    title = one.title if len(runs) == 1 else f"{one.title}: {label}"
    parts += [f"<h2>{html.escape(title)}</h2>", note, *_pair(*pictures)]
  pictures = layer_charts.norms(run, x_of, x, marks, HALF)
  return [*parts, f"<h2>Layers{of}</h2>", *_pair(*pictures)]


def _drawn(picture: Picture | None) -> str:
  return "" if picture is None else picture.svg()


def _pair(*pictures: Picture | None) -> list[str]:
  return ['<div class="pair">', *(_drawn(picture) for picture in pictures), "</div>"]


def _progress(runs: Sequence[History]) -> tuple[Axis, XOf]:
  """The axis of a picture of `runs`, and the function that places steps on it: tokens, or steps for
  all runs where the tokens of one are not known."""
  if all(run.tokens_per_step for run in runs):
    return Axis("tokens", low=0.0), _tokens
  return Axis("steps", low=0.0), lambda run, step: float(step)


def _tokens(run: History, step: int) -> float:
  """The tokens up to a step; NaN, which no picture shows, where they are not known."""
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
  scale, unit = time_charts.clock(longest)
  return Axis(f"{unit} since the first start", show="{:.4g}".format, low=0.0), scale


def _step_marks(runs: Sequence[History], x_of: XOf) -> list[Mark]:
  marks = []
  for run, color in zip(runs, _run_colors(runs)):
    color = colors.FAINT if len(runs) == 1 else color
    marks += [Mark(x_of(run, start.step or 0), "restart", color) for start in run.restarts]
  return marks


def _clock_marks(runs: Sequence[History], scale: float) -> list[Mark]:
  marks = []
  for run, color in zip(runs, _run_colors(runs)):
    color = colors.FAINT if len(runs) == 1 else color
    marks += [Mark((start.time - run.began()) / scale, "restart", color) for start in run.restarts]
  return marks


def _run_colors(runs: Sequence[History]) -> list[str]:
  return colors.of_runs([run.name for run in runs])


def _end_of(run: History, name: str) -> float | None:
  """The last value of a series as its curve shows it."""
  mean = smoothed(list(run.metrics.get(name, {}).items()))
  return mean[-1][1] if mean else None


def _times(step: int, each: int | None) -> float | None:
  return None if each is None else float(step * each)


def _shown(value: float | None, show: Callable[[float], str]) -> str | None:
  return None if value is None else show(value)
