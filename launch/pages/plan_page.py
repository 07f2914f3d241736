"""A plan as one HTML page of pictures, without scripts or other files."""

import html
from collections.abc import Sequence

from launch.pages import plan_text
from train.drawing import bar_chart, colors
from train.drawing.bar_chart import Bar
from train.planning.plan import Plan

_COLORS = {
  "parameters": colors.BLUE,
  "moments": colors.SKY,
  "batch": colors.SILVER,
  "gradients": colors.SAND,
  "activations": colors.VERMILLION,
  "code": colors.SLATE,
}
_TIMES = {
  "compute": colors.BLUE,
  "HBM": colors.VERMILLION,
  "ICI": colors.SAND,
  "DCN": colors.WINE,
}
_GOOD, _BAD = "#2d6a4f", "#b3261e"
_WIDTH = 860
_STYLE = """
body{font:15px/1.5 system-ui,sans-serif;color:#222;background:#fff;max-width:900px;margin:2em auto;
padding:0 1.2em}h1{font-size:1.35em;margin:.2em 0}h2{font-size:1.05em;margin:1.6em 0 .4em}
.verdict{display:inline-block;color:#fff;border-radius:6px;padding:.15em .7em;font-weight:600}
p{margin:.3em 0}.faint{color:#777}table{border-collapse:collapse;width:100%;font-size:.93em}
th,td{text-align:right;padding:.22em .6em;border-bottom:1px solid #e6e6e6}th{color:#777;
font-weight:500}td:first-child,th:first-child{text-align:left}pre{background:#f5f5f5;padding:.7em;
border-radius:6px;white-space:pre-wrap;font-size:.87em}svg{width:100%;height:auto;
display:block;margin:1.5em 0 .5em}.tooltip:hover{fill-opacity:.07}
"""


def page(
  plan: Plan,
  *,
  mfu: float | None,
  price: float | None,
  notes: Sequence[str],
  train: str,
  command: str,
) -> str:
  """The page. `notes` are lines of advice and other layouts, `train` is the command that runs the
  plan, and `command` the one that made the page."""
  color, word = (_GOOD, "fits") if plan.fits else (_BAD, "does not fit")
  title = html.escape(f"{plan.run.name} on {plan.machine}")
  lines = plan_text.plan_lines(plan, mfu=mfu, price=price)
  return "\n".join(
    [
      "<!doctype html>",
      f'<html lang="en"><head><meta charset="utf-8"><title>{title}</title>',
      '<meta name="viewport" content="width=device-width, initial-scale=1">',
      f"<style>{_STYLE}</style></head><body>",
      f'<h1>{title} <span class="verdict" style="background:{color}">{word}</span></h1>',
      *(f"<p>{html.escape(line.strip())}</p>" for line in plan_text.header(plan)),
      _memory(plan),
      _times(plan),
      f"<p>{html.escape(plan_text.ceiling(plan))}. {html.escape(plan_text.expected(plan))}.</p>",
      _collectives(plan),
      _flops(plan),
      "<h2>The whole run</h2>",
      *(f"<p>{html.escape(line)}</p>" for line in plan_text.budget(plan, mfu, price)),
      "<h2>Run it, or change it</h2>",
      f"<pre>{html.escape(train)}</pre>",
      *([f"<pre>{html.escape(chr(10).join(notes))}</pre>"] if notes else []),
      "<h2>The same as text</h2>",
      f"<pre>{html.escape(chr(10).join(lines))}</pre>",
      f'<p class="faint">{html.escape(command)}</p>',
      "</body></html>",
      "",
    ]
  )


def _memory(plan: Plan) -> str:
  """One bar as long as the memory needed or the chip's, whichever is more; a line where the chip's
  memory ends."""
  memory = plan.memory
  rows = [
    Bar(plan_text.MEMORY[name], size / 1e9, f"{plan_text.gigabytes(size)} GB", _COLORS[name])
    for name, size in memory.parts.items()
  ]
  end = f"{plan_text.gigabytes(memory.limit)} GB in {plan.chip.name}"
  return bar_chart.parts(
    rows,
    title="Memory of each device",
    unit="GB",
    width=_WIDTH,
    limit=bar_chart.Limit(memory.limit / 1e9, end),
    note=f"{plan_text.gigabytes(memory.total)} GB needed",
  ).svg()


def _times(plan: Plan) -> str:
  """A bar for each resource; the longest one is the bound."""
  times = plan.roofline
  rows = []
  for name, seconds in times.times.items():
    words = plan_text.RESOURCES.get(name, name)
    if name == "ICI" and plan.chip.platform == "gpu":
      words = "NVLink"
    value = f"{1e3 * seconds:,.1f} ms" + (", binds" if name == times.bound else "")
    rows.append(Bar(words, 1e3 * seconds, value, _TIMES[name]))
  return bar_chart.bars(rows, title="Least time of a step", unit="ms", width=_WIDTH).svg()


def _collectives(plan: Plan) -> str:
  """A bar for each kind and axes, by time, in another color where it crosses slices or nodes."""
  if not plan.collectives:
    return "<p>Nothing: one device, or nothing split.</p>"
  across = "slices" if plan.chip.platform == "tpu" else "nodes"
  sent = sorted(plan.collectives, key=lambda one: -(one.link_seconds + one.network_seconds))
  rows = []
  for one in sent[:12]:
    seconds = one.link_seconds + one.network_seconds
    crossing = f", crosses {across}" if one.crosses else ""
    value = (
      f"{1e3 * seconds:,.1f} ms, {plan_text.gigabytes(one.bytes)} GB, {one.times:,} times{crossing}"
    )
    color = _TIMES["DCN"] if one.crosses else _TIMES["ICI"]
    rows.append(Bar(f"{one.kind} over {'+'.join(one.axes)}", 1e3 * seconds, value, color))
  left_out = len(sent) - len(rows)
  more = f'<p class="faint">and {left_out} smaller ones, below</p>' if left_out else ""
  title = "What each device sends in a step"
  return bar_chart.bars(rows, title=title, unit="ms", width=_WIDTH).svg() + more


def _flops(plan: Plan) -> str:
  tokens = plan.tokens_per_step / plan.machine.num_devices
  rows = []
  for part in plan.flops.counted:
    size = 3 * part.flops * tokens / 1e12
    value = f"{size:,.2f} TFLOP, {part.flops / plan.flops.forward:.0%}"
    rows.append(Bar(part.words, size, value, _TIMES["compute"]))
  title = "FLOPs of a step on each device, by part"
  return bar_chart.bars(rows, title=title, unit="TFLOP", width=_WIDTH).svg()
