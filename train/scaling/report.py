"""A sweep's laws as one page: pictures, constants with their intervals, and all runs.

SWEEP/report.html    self-contained, no script; loss.svg, isoflop.svg and optimal.svg beside it
SWEEP/points.json    every finished run and every constant, for programs
"""

import html
import json
import math
import pathlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from train.scaling import charts
from train.scaling.law import (
  LEVEL,
  Interval,
  Isoflop,
  Minimum,
  Power,
  Runs,
  Surface,
  isoflop,
  surface,
)
from train.scaling.sweep import State, read_result
from train.workdir.whole_file import write_whole

PAGE, POINTS = "report.html", "points.json"
_KEPT = ("name", "family", "budget", "parameters", "embedding", "tokens", "steps", "flops")
_RESULT = ("loss", "bits_per_byte", "tokens_per_second")


class Points(NamedTuple):
  """The finished runs of a sweep as records, and the names of those that are missing."""

  config: str
  runs: list[dict[str, Any]]
  missing: list[str]


class Laws(NamedTuple):
  """What was fitted, by family."""

  runs: dict[str, Runs]
  isoflop: dict[str, Isoflop]
  surface: dict[str, Surface | None]


def read(path: pathlib.Path) -> Points:
  """The finished points of a sweep's folder, or those of a points.json."""
  if path.is_file():
    try:
      content = json.loads(path.read_text())
      return Points(content["config"], content["runs"], content["missing"])
    except (ValueError, KeyError, TypeError) as error:
      raise ValueError(
        f"{path} is not the points.json of a sweep ({type(error).__name__}: {error}): give one, or "
        "the folder of a sweep or of a run"
      ) from error
  state = State.load(path)
  runs, missing = [], []
  for name, record in state.in_grid.items():
    result = record["result"] or read_result(state.run_folder(name), record["steps"])
    if result is None:
      missing.append(name)
    else:
      record = {"name": name, **record}
      runs.append({key: record[key] for key in _KEPT} | {key: result[key] for key in _RESULT})
  return Points(state.config, runs, missing)


def fit(points: Points) -> Laws:
  """The laws of every family with a finished run; budgets in FLOPs are rounded to the grid's."""
  if not points.runs:
    raise ValueError(f"no run of {points.config} has finished yet: there is nothing to fit")
  found: dict[str, Runs] = {}
  for family in dict.fromkeys(run["family"] for run in points.runs):
    own = [run for run in points.runs if run["family"] == family]

    def column(key: str, own: list[dict[str, Any]] = own) -> np.ndarray:
      return np.array([float(run[key]) for run in own])

    budgets = np.array([float(run["budget"] or run["flops"]) for run in own])
    found[family] = Runs(
      budgets, column("flops"), column("parameters"), column("tokens"), column("loss")
    )
  return Laws(
    found,
    {family: isoflop(runs) for family, runs in found.items()},
    {family: surface(runs) for family, runs in found.items()},
  )


def report(path: pathlib.Path, output: pathlib.Path | None) -> list[str]:
  """Draws the sweep in the folder `path`, or that of a points.json, and returns the results as
  lines. `output` is the page (None: report.html in the sweep's folder); the pictures and
  points.json are written beside it."""
  folder = path.parent if path.is_file() else path
  points = read(path)
  laws = fit(points)
  page_path = output or folder / PAGE
  write(points, laws, page_path)
  return [*summary(points, laws), f"page: {page_path}"]


def write(points: Points, laws: Laws, path: pathlib.Path) -> None:
  """Writes the page to `path`, and the pictures and points.json beside it."""
  pictures = {
    "loss": charts.loss_chart(laws.runs, laws.isoflop).svg(),
    "isoflop": charts.isoflop_chart(laws.runs, laws.isoflop).svg(),
    "optimal": charts.optimal_chart(laws.runs, laws.isoflop).svg(),
  }
  path.parent.mkdir(parents=True, exist_ok=True)
  for name, picture in pictures.items():
    write_whole(path.with_name(f"{name}.svg"), picture + "\n")
  content = {**points._asdict(), "laws": _as_json(laws)}
  write_whole(path.with_name(POINTS), (_dump(content) + "\n").encode())
  write_whole(path, page(points, laws, pictures).encode())


def summary(points: Points, laws: Laws) -> list[str]:
  """The results as lines: the headline, the laws of each family, and what is missing."""
  lines = [headline(laws)]
  for family, law in laws.isoflop.items():
    words = f"{family}: "
    if law.loss is None or law.parameters is None:
      lines.append(words + "fewer than two budgets with their best size among the trained ones")
      continue
    lines.append(words + f"L = {_law(law.loss)}, best N = {_law(law.parameters)}")
    if law.unbracketed:
      named = ", ".join(f"{budget:.0e}" for budget in law.unbracketed)
      lines.append(f"{family}: left out, for the best size was not among the trained: {named}")
  if points.missing:
    lines.append(f"{len(points.missing)} runs are missing: {', '.join(points.missing)}")
  return lines


def page(points: Points, laws: Laws, pictures: Mapping[str, str]) -> str:
  """The page; `pictures` are SVG and stand in it."""
  title = html.escape(f"Scaling laws: {points.config}")
  done = len(points.runs)
  missing = (
    f'<p class="warn">Not finished: {len(points.missing)} of {done + len(points.missing)} runs are '
    f"missing ({html.escape(', '.join(points.missing))}).</p>"
    if points.missing
    else ""
  )
  return "\n".join(
    [
      "<!doctype html>",
      f'<html lang="en"><head><meta charset="utf-8"><title>{title}</title>',
      '<meta name="viewport" content="width=device-width, initial-scale=1">',
      f"<style>{_CSS}</style></head><body>",
      f"<h1>{title}</h1>",
      f"<p>{done} runs, {sum(run['flops'] for run in points.runs):.2e} FLOPs in all.</p>",
      missing,
      f"<p class=lead>{html.escape(headline(laws))}</p>",
      "<h2>What does compute buy?</h2>",
      pictures["loss"],
      '<p class="faint">Large marks: the minimum of each budget, from the curves below, with its '
      f"interval of {LEVEL:.0%}; lines: L(C) = a C<sup>b</sup> with theirs. Faint: every run.</p>",
      _table(*_law_rows(laws, "loss", "L")),
      "<h2>Which size is best for a budget?</h2>",
      pictures["isoflop"],
      '<p class="faint">A curve for each FLOP budget; diamonds: its minimum. Dotted: no minimum '
      "among the sizes that were trained.</p>",
      "<h2>How does the best size grow?</h2>",
      pictures["optimal"],
      _table(*_law_rows(laws, "parameters", "N")),
      _table(*_minima_rows(laws)),
      "<h2>The surface L(N, D) = E + A / N<sup>α</sup> + B / D<sup>β</sup></h2>",
      _table(*_surface_rows(laws)),
      '<p class="faint">The best size grows as C to the power β / (α + β).</p>',
      "<h2>How to read it</h2>",
      f"<p>{_NOTES}</p>",
      "<h2>Every run</h2>",
      _table(*_run_rows(points)),
      "</body></html>",
      "",
    ]
  )


def headline(laws: Laws) -> str:
  """Which family is best at the largest budget they share, and whether the intervals overlap."""
  known = {family: {one.budget: one for one in law.minima} for family, law in laws.isoflop.items()}
  common = set.intersection(*(set(minima) for minima in known.values())) if known else set()
  if not common or len(known) < 2:
    return "No budget has a minimum in every family yet."
  budget = max(common)
  ranked = sorted(known, key=lambda family: known[family][budget].loss.value)
  best, second = (known[family][budget].loss for family in ranked[:2])
  apart = best.high < second.low
  told = ", ".join(f"{family} {_with_ends(known[family][budget].loss)}" for family in ranked)
  sure = (
    f"{ranked[0].capitalize()} is best, and its interval lies below the others'"
    if apart
    else f"{ranked[0].capitalize()} is best, within the intervals of the next"
  )
  return f"At {budget:.0e} FLOPs: {told} nats per token. {sure}."


_NOTES = (
  f"Intervals are those of {LEVEL:.0%}, by a bootstrap of the residuals: they show scatter "
  "around the fitted law, not whether it holds further on, or for another recipe or corpus. "
  "C is the FLOPs of training as models/flops.py counts them, logits included, nothing recomputed; "
  "N counts the tied embedding once. Loss is that of the held-out text after the last step."
)
_CSS = """
body{font:15px/1.5 system-ui,sans-serif;color:#222;background:#fff;max-width:980px;margin:2em auto;
padding:0 1.2em}h1{font-size:1.35em;margin:.2em 0}h2{font-size:1.08em;margin:1.9em 0 .4em}
p{margin:.4em 0}.faint{color:#666;font-size:.92em}.warn{background:#fff4e0;padding:.5em .8em;
border-radius:6px}.lead{font-size:1.08em}table{border-collapse:collapse;margin:.8em 0;
font-size:.92em}
th,td{text-align:right;padding:.22em .8em;border-bottom:1px solid #e6e6e6;white-space:nowrap}
th{color:#666;font-weight:500}td:first-child,th:first-child{text-align:left}
svg{width:100%;height:auto;display:block}
.tooltip:hover{fill-opacity:.07}
"""


def _law_rows(laws: Laws, name: str, letter: str) -> tuple[list[str], list[list[str]]]:
  head = ["family", f"{letter} at the largest budget", "floor", "coefficient", "exponent of C"]
  rows = []
  for family, law in laws.isoflop.items():
    power: Power | None = getattr(law, name)
    if power is None:
      rows.append([family, "", "", "", "fewer than two budgets"])
      continue
    last = getattr(law.minima[-1], name)
    floor = _with_ends(power.floor) if power.floor.value else "none"
    rows.append(
      [family, _with_ends(last), floor, _with_ends(power.coefficient), _with_ends(power.exponent)]
    )
  return head, rows


def _minima_rows(laws: Laws) -> tuple[list[str], list[list[str]]]:
  head = ["family", "budget, FLOPs", "best N", "its tokens D", "D / N", "loss"]
  rows = [
    [
      family,
      f"{one.budget:.0e}",
      _with_ends(one.parameters),
      _number(one.tokens),
      f"{one.tokens / one.parameters.value:.0f}",
      _with_ends(one.loss),
    ]
    for family, law in laws.isoflop.items()
    for one in law.minima
  ]
  return head, rows


def _surface_rows(laws: Laws) -> tuple[list[str], list[list[str]]]:
  head = ["family", "E", "A", "B", "α", "β", "β / (α + β)", "rms error of log L"]
  rows = []
  for family, law in laws.surface.items():
    if law is None:
      rows.append([family, "too few runs", *[""] * 6])
    else:
      numbers = (law.E, law.A, law.B, law.alpha, law.beta, law.optimal)
      rows.append([family, *map(_with_ends, numbers), f"{law.residual:.2%}"])
  return head, rows


def _run_rows(points: Points) -> tuple[list[str], list[list[str]]]:
  head = ["run", "N", "of it embedding", "tokens D", "FLOPs", "loss, nats/token", "bits/byte"]
  rows = [
    [
      run["name"],
      f"{run['parameters']:,}",
      f"{run['embedding']:,}",
      f"{run['tokens']:,}",
      f"{run['flops']:.3e}",
      f"{run['loss']:.4f}",
      f"{run['bits_per_byte']:.4f}",
    ]
    for run in points.runs
  ]
  return head, rows


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
  def line(tag: str, cells: Sequence[str]) -> str:
    return f"<tr>{''.join(f'<{tag}>{html.escape(cell)}</{tag}>' for cell in cells)}</tr>"

  return f"<table>{line('th', head)}{''.join(line('td', row) for row in rows)}</table>"


def _law(power: Power) -> str:
  floor = f"{_number(power.floor.value)} + " if power.floor.value else ""
  return f"{floor}{_number(power.coefficient.value)} C^{_with_ends(power.exponent)}"


def _with_ends(interval: Interval) -> str:
  """ "0.34 (0.31 to 0.37)"; the ends are left out where nothing is left to judge by."""
  value, low, high = interval
  if not (math.isfinite(low) and math.isfinite(high)):
    return _number(value)
  return f"{_number(value)} ({_number(low)} to {_number(high)})"


def _number(value: float) -> str:
  size = abs(value)
  if size == 0 or 1e-3 <= size < 1e4:
    return f"{value:.4g}" if size >= 1 else f"{value:.3g}"
  return f"{value:.2e}"


def _as_json(laws: Laws) -> dict[str, Any]:
  def plain(value: Any) -> Any:
    match value:
      case Interval():
        return [one if math.isfinite(one) else None for one in value]
      case Power():
        return {name: plain(getattr(value, name)) for name in ("floor", "coefficient", "exponent")}
      case Minimum() | Isoflop() | Surface():
        return {name: plain(one) for name, one in value._asdict().items()}
      case tuple() | list():
        return [plain(one) for one in value]
      case _:
        return value

  return {
    family: {"isoflop": plain(laws.isoflop[family]), "surface": plain(laws.surface[family])}
    for family in laws.runs
  }


def _dump(content: Mapping[str, Any]) -> str:
  """JSON with one run to a line."""
  runs = ",\n  ".join(json.dumps(run) for run in content["runs"])
  rest = {key: value for key, value in content.items() if key != "runs"}
  return json.dumps(rest, indent=1)[:-2] + f',\n "runs": [\n  {runs}\n ]\n}}'
