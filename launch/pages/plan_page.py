"""A plan as one page: pictures a person reads at a glance, no script and no other file."""

import html
from collections.abc import Sequence

from launch.pages import plan_text, svg
from train.planning.plan import Plan

_COLORS = {
  "parameters": "#3d5a80",
  "moments": "#6f94bd",
  "batch": "#b8b8b8",
  "gradients": "#e09f3e",
  "activations": "#c8553d",
  "code": "#7a7a7a",
}
_TIMES = {"compute": "#3d5a80", "HBM": "#c8553d", "ICI": "#e09f3e", "DCN": "#6a4c93"}
_GOOD, _BAD = "#2d6a4f", "#b3261e"
_WIDTH = 860
_STYLE = """
body{font:15px/1.5 system-ui,sans-serif;color:#222;background:#fff;max-width:900px;margin:2em auto;
padding:0 1.2em}h1{font-size:1.35em;margin:.2em 0}h2{font-size:1.05em;margin:1.6em 0 .4em}
.verdict{display:inline-block;color:#fff;border-radius:6px;padding:.15em .7em;font-weight:600}
p{margin:.3em 0}.faint{color:#777}table{border-collapse:collapse;width:100%;font-size:.93em}
th,td{text-align:right;padding:.22em .6em;border-bottom:1px solid #e6e6e6}th{color:#777;
font-weight:500}td:first-child,th:first-child{text-align:left}pre{background:#f5f5f5;padding:.7em;
border-radius:6px;white-space:pre-wrap;font-size:.87em}svg{width:100%;height:auto;display:block}
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
  """The page; `notes` are lines of advice and other layouts, `train` is the command that runs the
  plan, `command` the one that made it."""
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
      "<h2>Memory of each device</h2>",
      _memory(plan),
      "<h2>Least time of a step</h2>",
      _times(plan),
      f"<p>{html.escape(plan_text.ceiling(plan))}. {html.escape(plan_text.expected(plan))}.</p>",
      "<h2>What is sent in a step, by each device</h2>",
      _collectives(plan),
      "<h2>FLOPs of a step on each device, by part</h2>",
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
  """One bar from 0 to what is needed or there, whichever is more; a line where the memory ends."""
  memory = plan.memory
  scale = (_WIDTH - 20) / max(memory.limit, memory.total)
  shapes, x = [], 10.0
  end = 10 + memory.limit * scale
  shapes.append(svg.rect(10, 26, memory.limit * scale, 44, "#f0f0f0"))
  for name, size in memory.parts.items():
    shapes.append(svg.rect(x, 26, size * scale, 44, _COLORS[name], plan_text.MEMORY[name]))
    x += size * scale
  shapes.append(f'<path d="M{end:.1f} 18V78" stroke="{svg.INK}" stroke-width="2"/>')
  # Each label stands where the other does not.
  is_left = end < _WIDTH / 2
  limit = f"{plan_text.gigabytes(memory.limit)} GB in {plan.chip.name}"
  needed = f"{plan_text.gigabytes(memory.total)} GB needed"
  shapes.append(svg.text(end, 13, limit, anchor="start" if is_left else "end"))
  if is_left:
    shapes.append(svg.text(_WIDTH - 10, 13, needed, anchor="end", weight=600))
  else:
    shapes.append(svg.text(10, 13, needed, weight=600))
  for index, (name, size) in enumerate(memory.parts.items()):
    column, row = index % 3, index // 3
    left, top = 10 + column * 285, 92 + row * 24
    shapes.append(svg.rect(left, top, 13, 13, _COLORS[name]))
    words = f"{plan_text.MEMORY[name]}  {plan_text.gigabytes(size)} GB"
    shapes.append(svg.text(left + 20, top + 11, words))
  return svg.svg(_WIDTH, 142, shapes)


def _times(plan: Plan) -> str:
  """A bar for each resource; the longest is what binds."""
  times = plan.roofline
  bars = []
  for name, seconds in times.times.items():
    words = plan_text.RESOURCES.get(name, name)
    if name == "ICI" and plan.chip.platform == "gpu":
      words = "NVLink"
    value = f"{1e3 * seconds:,.1f} ms" + (", binds" if name == times.bound else "")
    bars.append((words, seconds, value, _TIMES[name]))
  return _bars(bars)


def _collectives(plan: Plan) -> str:
  """A bar for each kind and axes, by time; violet where it crosses slices."""
  if not plan.collectives:
    return "<p>Nothing: one device, or nothing split.</p>"
  across = "slices" if plan.chip.platform == "tpu" else "nodes"
  sent = sorted(plan.collectives, key=lambda one: -(one.link_seconds + one.network_seconds))
  bars = []
  for one in sent[:12]:
    seconds = one.link_seconds + one.network_seconds
    crossing = f", crosses {across}" if one.crosses else ""
    value = (
      f"{1e3 * seconds:,.1f} ms, {plan_text.gigabytes(one.bytes)} GB, {one.times:,} times{crossing}"
    )
    color = _TIMES["DCN"] if one.crosses else _TIMES["ICI"]
    bars.append((f"{one.kind} over {'+'.join(one.axes)}", seconds, value, color))
  left_out = len(sent) - len(bars)
  more = f'<p class="faint">and {left_out} smaller ones, below</p>' if left_out else ""
  return _bars(bars) + more


def _flops(plan: Plan) -> str:
  tokens = plan.tokens_per_step / plan.machine.num_devices
  bars = []
  for part in plan.flops.counted:
    value = f"{3 * part.flops * tokens / 1e12:,.2f} TFLOP, {part.flops / plan.flops.forward:.0%}"
    bars.append((part.words, part.flops, value, _TIMES["compute"]))
  return _bars(bars)


def _bars(bars: Sequence[tuple[str, float, str, str]]) -> str:
  """Rows of (label, size, words behind it, color)."""
  left, room = 230, 300
  most = max(size for _, size, _, _ in bars) or 1.0
  shapes = []
  for index, (label, size, value, color) in enumerate(bars):
    top = 6 + index * 28
    width = room * size / most
    shapes.append(svg.text(left - 10, top + 14, label, anchor="end"))
    shapes.append(svg.rect(left, top, max(width, 1.0), 18, color))
    shapes.append(svg.text(left + width + 8, top + 14, value))
  return svg.svg(_WIDTH, 12 + 28 * len(bars), shapes)
