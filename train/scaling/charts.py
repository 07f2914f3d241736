"""Pictures of a sweep, one for each question, as SVG: what does compute buy, which size is best for
a budget, how does the best size grow. Colours are told apart by the colour-blind (Okabe and Ito),
and markers differ too; what a line is stands at its end."""

import io
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from train.scaling.law import Isoflop, Power, Runs

# Okabe and Ito's, in an order in which neighbours differ most.
_COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
_MARKERS = ("o", "s", "^", "D", "v", "P")
_INK, _FAINT = "#222222", "#8a8a8a"
_STYLE: dict[Any, Any] = {
  "svg.fonttype": "none",
  "svg.hashsalt": "scaling",
  "font.family": "sans-serif",
  "font.sans-serif": ["Helvetica", "Arial", "DejaVu Sans"],
  "font.size": 11,
  "text.color": _INK,
  "axes.labelcolor": _INK,
  "axes.edgecolor": "#b0b0b0",
  "axes.spines.top": False,
  "axes.spines.right": False,
  "axes.titlesize": 12,
  "axes.titleweight": "bold",
  "axes.titlelocation": "left",
  "xtick.color": "#b0b0b0",
  "ytick.color": "#b0b0b0",
  "xtick.labelcolor": _INK,
  "ytick.labelcolor": _INK,
  "grid.color": "#e8e8e8",
  "grid.linewidth": 0.8,
}


def loss_chart(
  runs: Mapping[str, Runs], laws: Mapping[str, Isoflop], *, format: str = "svg"
) -> bytes:
  """Loss over FLOPs: every run faint, the best of each budget with its interval, and the law."""
  with _Figure(width=8.6, height=5.0) as figure:
    axes = figure.subplots()
    ends = []
    for index, (family, law) in enumerate(laws.items()):
      color, marker = _look(index)
      own = runs[family]
      axes.scatter(own.budgets, own.losses, s=14, color=color, alpha=0.22, linewidths=0)
      if law.loss is not None:
        ends.append(_law(axes, family, law, law.loss, color))
      _minima(axes, law, "loss", color, marker)
    axes.set_xscale("log")
    axes.set_yscale("log")
    _limits(axes, [loss for own in runs.values() for loss in own.losses])
    _label_ends(axes, ends)
    _plain_log(axes.yaxis)
    _budget_ticks(axes.xaxis, [budget for own in runs.values() for budget in own.budgets])
    axes.set_xlabel("training compute C (FLOPs)")
    axes.set_ylabel("held-out loss (nats per token)")
    axes.grid(True, axis="y")
    axes.set_title("What compute buys: the best loss at each budget")
    return figure.save(format)


def isoflop_chart(
  runs: Mapping[str, Runs], laws: Mapping[str, Isoflop], *, format: str = "svg"
) -> bytes:
  """Loss over size, a panel for each family and a curve for each budget, with its minimum."""
  budgets = sorted({budget for own in runs.values() for budget in own.budgets})
  with _Figure(width=4.0 * len(runs) + 0.6, height=4.6) as figure:
    panels = figure.subplots(1, len(runs), sharex=True, sharey=True, squeeze=False)[0]
    for axes, (family, own) in zip(panels, runs.items()):
      law = laws[family]
      curves = {one.budget: one for one in law.minima}
      for place, budget in enumerate(budgets):
        color = _shade(place, len(budgets))
        chosen = own.budgets == budget
        if not chosen.any():
          continue
        order = np.argsort(own.parameters[chosen])
        N, L = own.parameters[chosen][order], own.losses[chosen][order]
        if budget in curves:
          x = np.geomspace(N[0], N[-1], 100)
          fitted = np.exp(np.polyval(curves[budget].curve, np.log(x)))
          axes.plot(x, fitted, color=color, linewidth=1.6)
          best = curves[budget]
          _best(axes, best.parameters.value, best.loss.value, color)
        else:
          axes.plot(N, L, color=color, linewidth=1.0, linestyle=":")
        axes.plot(N, L, "o", color=color, markersize=4.5, zorder=3)
        if axes is panels[-1]:
          axes.annotate(
            _scientific(budget),
            (N[-1], L[-1]),
            xytext=(8, 0),
            textcoords="offset points",
            va="center",
            color=color,
            fontsize=10.5,
            annotation_clip=False,
          )
      axes.set_xscale("log")
      axes.set_yscale("log")
      _plain_log(axes.yaxis)
      _size_ticks(axes.xaxis)
      axes.grid(True, axis="y")
      axes.set_title(family.capitalize())
      axes.set_xlabel("parameters N")
    panels[0].set_ylabel("held-out loss (nats per token)")
    _best(panels[0], 0.05, 0.05, _FAINT, transform=panels[0].transAxes)
    panels[0].text(
      0.08, 0.05, "best size", color=_FAINT, va="center", transform=panels[0].transAxes
    )
    panels[-1].annotate(
      "FLOPs",
      (1, 1),
      xycoords="axes fraction",
      xytext=(8, 2),
      textcoords="offset points",
      color=_FAINT,
      fontsize=10.5,
    )
    return figure.save(format)


def optimal_chart(
  runs: Mapping[str, Runs], laws: Mapping[str, Isoflop], *, format: str = "svg"
) -> bytes:
  """The best size over FLOPs, with its law."""
  with _Figure(width=8.6, height=4.6) as figure:
    axes = figure.subplots()
    ends = []
    for index, (family, law) in enumerate(laws.items()):
      color, marker = _look(index)
      if law.parameters is not None:
        ends.append(_law(axes, family, law, law.parameters, color))
      _minima(axes, law, "parameters", color, marker)
    axes.set_xscale("log")
    axes.set_yscale("log")
    _limits(axes, [size for own in runs.values() for size in own.parameters])
    _label_ends(axes, ends)
    _size_ticks(axes.yaxis)
    _budget_ticks(axes.xaxis, [budget for own in runs.values() for budget in own.budgets])
    axes.set_xlabel("training compute C (FLOPs)")
    axes.set_ylabel("best number of parameters N")
    axes.grid(True, axis="y")
    axes.set_title("How large a model a budget is best spent on")
    return figure.save(format)


class _Figure:
  """A matplotlib figure in our style; nothing of it is global."""

  def __init__(self, *, width: float, height: float):
    self._size = (width, height)

  def __enter__(self) -> "_Figure":
    # Imported where it is drawn: it takes a second or more of every start.
    import matplotlib
    from matplotlib.figure import Figure

    self._context = matplotlib.rc_context(_STYLE)
    self._context.__enter__()
    self._figure = Figure(figsize=self._size, dpi=110, layout="constrained")
    return self

  def __exit__(self, *exception: object) -> None:
    self._context.__exit__(None, None, None)

  def subplots(self, *shape: int, **options: Any) -> Any:
    return self._figure.subplots(*shape, **options)

  def save(self, format: str) -> bytes:
    file = io.BytesIO()
    # No date: the same sweep gives the same bytes.
    metadata = {"Date": None} if format == "svg" else {}
    self._figure.savefig(file, format=format, metadata=metadata)
    return file.getvalue()


def _look(index: int) -> tuple[str, str]:
  return _COLORS[index % len(_COLORS)], _MARKERS[index % len(_MARKERS)]


def _shade(place: int, count: int) -> Any:
  """Light to dark with the budget."""
  import matplotlib

  return matplotlib.colormaps["viridis_r"](0.18 + 0.74 * place / max(1, count - 1))


def _span(budgets: Sequence[float]) -> np.ndarray:
  return np.geomspace(min(budgets), max(budgets), 60)


def _law(axes: Any, family: str, law: Isoflop, power: Power, color: str) -> tuple[float, str, str]:
  """A power law over the budgets, with its band; what `_label_ends` writes at its end."""
  x = _span([one.budget for one in law.minima])
  low, high = power.band(x)
  axes.fill_between(x, low, high, color=color, alpha=0.13, linewidth=0)
  axes.plot(x, power.at(x), color=color, linewidth=1.8)
  label = f"{family.capitalize()}  {_power_words(power, 'C')}"
  return float(power.at(x[-1:])[0]), label, color


def _minima(axes: Any, law: Isoflop, name: str, color: str, marker: str) -> None:
  """The best of each budget, with its interval where that is finite."""
  for one in law.minima:
    interval = getattr(one, name)
    axes.plot(one.budget, interval.value, marker, color=color, markersize=7, zorder=4)
    if np.isfinite(interval.low) and np.isfinite(interval.high):
      axes.plot([one.budget] * 2, [interval.low, interval.high], color=color, linewidth=1.4)


def _best(axes: Any, x: float, y: float, color: Any, **placed: Any) -> None:
  """The mark of an isoFLOP curve's minimum."""
  look = {"markersize": 7, "markerfacecolor": "white", "markeredgewidth": 1.8}
  axes.plot(x, y, marker="D", markeredgecolor=color, zorder=4, **look, **placed)


def _label_ends(axes: Any, ends: Sequence[tuple[float, str, str]]) -> None:
  """Labels (height of the line's end, words, colour) right of the axes, moved apart where they
  would lie on each other; the limits of the axes stand."""
  bottom, top = (np.log(limit) for limit in axes.get_ylim())
  last = -1.0
  for y, words, color in sorted(ends):
    last = max((np.log(y) - bottom) / (top - bottom), last + 0.075)
    axes.text(1.015, last, words, color=color, transform=axes.transAxes, va="center", weight="bold")


def _limits(axes: Any, values: Sequence[float]) -> None:
  """A logarithmic axis around these values: bands and intervals may leave the picture."""
  low, high = np.log(min(values)), np.log(max(values))
  room = 0.08 * (high - low) or 0.1
  axes.set_ylim(np.exp(low - room), np.exp(high + room))


def _plain_log(axis: Any) -> None:
  """Ticks as plain numbers: a loss runs over less than a decade."""
  from matplotlib.ticker import MaxNLocator, NullLocator

  axis.set_major_locator(MaxNLocator(nbins=6, steps=[1, 2, 2.5, 5, 10]))
  axis.set_minor_locator(NullLocator())
  axis.set_major_formatter(lambda value, place: f"{value:g}")


def _budget_ticks(axis: Any, budgets: Sequence[float]) -> None:
  """Ticks where the grid has its budgets."""
  from matplotlib.ticker import FixedLocator, NullLocator

  axis.set_major_locator(FixedLocator(sorted(set(budgets))))
  axis.set_minor_locator(NullLocator())
  axis.set_major_formatter(lambda value, place: _scientific(value))


def _size_ticks(axis: Any) -> None:
  """Ticks at 1, 2 and 5 of each decade: 20k, 5M."""
  from matplotlib.ticker import LogLocator, NullLocator

  axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
  axis.set_minor_locator(NullLocator())
  axis.set_major_formatter(lambda value, place: _short(value))


def _short(value: float) -> str:
  for size, unit in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
    if value >= size:
      return f"{value / size:g}{unit}"
  return f"{value:g}"


def _power_words(power: Power, letter: str) -> str:
  """ "2.1 C^-0.05" in matplotlib's own mathematics."""
  floor = f"{power.floor.value:.3g} + " if power.floor.value else ""
  return f"{floor}{_number(power.coefficient.value)} {letter}$^{{{power.exponent.value:.3f}}}$"


def _number(value: float) -> str:
  return f"{value:.3g}" if 1e-3 <= value < 1e4 else _scientific(value)


def _scientific(value: float) -> str:
  digits, _, exponent = f"{value:.1e}".partition("e")
  mantissa = f"{float(digits):g}"
  times = "" if mantissa == "1" else f"{mantissa}×"
  return f"{times}10$^{{{int(exponent)}}}$"
