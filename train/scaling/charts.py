"""Pictures of a sweep, one for each question: what does compute buy, which size is best for a
budget, how does the best size grow."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from train.drawing import colors
from train.drawing.line_chart import Axis, dress, label_ends
from train.drawing.numbers import scientific, short
from train.drawing.picture import TITLE_HEIGHT, Picture, drawing
from train.scaling.law import Isoflop, Minimum, Power, Runs

if TYPE_CHECKING:
  from matplotlib.axes import Axes

_LEFT, _BOTTOM, _LAW_LABELS = 66.0, 44.0, 195.0
_PANEL, _GAP, _BUDGET_LABELS = 265.0, 18.0, 90.0
_LOSS = "held-out loss (nats per token)"
_COMPUTE = "training compute C (FLOPs)"
End = tuple[tuple[float, float], str, str]  # a point, words beside it and their color


def loss_chart(runs: Mapping[str, Runs], laws: Mapping[str, Isoflop]) -> Picture:
  """Loss over FLOPs: every run faint, the best of each budget with its interval, and the law."""
  title = "The best held-out loss at each budget"
  with drawing(900, 480, title=title) as picture:
    axes = picture.axes(_LEFT, 900 - _LAW_LABELS, TITLE_HEIGHT + 8, 480 - _BOTTOM)
    losses = [float(loss) for own in runs.values() for loss in own.losses]
    dress(axes, "y", Axis(_LOSS, "log", show="{:g}".format), losses, pad=0.08)
    _dress_budgets(axes, runs)
    ends: list[End] = []
    for family, law in laws.items():
      own, look = runs[family], colors.of_family(family)
      axes.scatter(own.budgets, own.losses, s=16, color=look.color, alpha=0.35, linewidths=0)
      for budget, size, loss in zip(own.budgets, own.parameters, own.losses):
        words = f"{family}, {short(size)} parameters\n{scientific(budget)} FLOPs, loss {loss:.4f}"
        picture.tooltip(axes, (budget, budget), (loss, loss), words)
      if law.loss is not None:
        ends.append(_law(axes, family, law, law.loss, look.color))
      for one in law.minima:
        _minimum(picture, axes, family, one, "loss")
    label_ends(picture, axes, ends)
  return picture


def isoflop_chart(runs: Mapping[str, Runs], laws: Mapping[str, Isoflop]) -> Picture:
  """Loss over size, a panel for each family and a curve for each budget, with its minimum."""
  budgets = sorted({float(budget) for own in runs.values() for budget in own.budgets})
  width = _LEFT + len(runs) * _PANEL + (len(runs) - 1) * _GAP + _BUDGET_LABELS
  losses = [float(loss) for own in runs.values() for loss in own.losses]
  sizes = [float(size) for own in runs.values() for size in own.parameters]
  title = "Loss over size, a curve for each budget; diamonds: the best size"
  with drawing(width, 440, title=title) as picture:
    for place, (family, own) in enumerate(runs.items()):
      left = _LEFT + place * (_PANEL + _GAP)
      top = TITLE_HEIGHT + 28
      axes = picture.axes(left, left + _PANEL, top, 440 - _BOTTOM)
      color = colors.of_family(family).color
      picture.words(left, top - 8, family.capitalize(), color=color, weight="bold")
      y = Axis("" if place else _LOSS, "log", show="{:g}".format)
      dress(axes, "y", y, losses, pad=0.08)
      dress(axes, "x", Axis("parameters N", "log"), sizes, pad=0.04, most=5)
      axes.grid(True, axis="y")
      if place:
        axes.tick_params(axis="y", labelleft=False)
      ends = _curves(picture, axes, family, own, laws[family], budgets)
      if place == len(runs) - 1:
        label_ends(picture, axes, ends)
        right = left + _PANEL + 8
        picture.words(right, top - 8, "FLOPs", color=colors.FAINT)
  return picture


def optimal_chart(runs: Mapping[str, Runs], laws: Mapping[str, Isoflop]) -> Picture:
  """The best size over FLOPs, with its law."""
  title = "The best size at each budget"
  with drawing(900, 440, title=title) as picture:
    axes = picture.axes(_LEFT, 900 - _LAW_LABELS, TITLE_HEIGHT + 8, 440 - _BOTTOM)
    sizes = [float(size) for own in runs.values() for size in own.parameters]
    dress(axes, "y", Axis("best number of parameters N", "log"), sizes, pad=0.08)
    _dress_budgets(axes, runs)
    ends: list[End] = []
    for family, law in laws.items():
      if law.parameters is not None:
        color = colors.of_family(family).color
        ends.append(_law(axes, family, law, law.parameters, color))
      for one in law.minima:
        _minimum(picture, axes, family, one, "parameters")
    label_ends(picture, axes, ends)
  return picture


def _dress_budgets(axes: "Axes", runs: Mapping[str, Runs]) -> None:
  """An axis with the budgets of the grid as its numbers."""
  budgets = sorted({float(budget) for own in runs.values() for budget in own.budgets})
  dress(axes, "x", Axis(_COMPUTE, "log", show=scientific, at=budgets), budgets, pad=0.05)
  axes.grid(True, axis="y")


def _curves(
  picture: Picture,
  axes: "Axes",
  family: str,
  runs: Runs,
  law: Isoflop,
  budgets: Sequence[float],
) -> list[End]:
  """A curve for each budget, light to dark; what stands at their ends."""
  minima, ends = {one.budget: one for one in law.minima}, []
  for place, budget in enumerate(budgets):
    color = colors.in_order(len(budgets) - 1 - place, len(budgets))
    chosen = runs.budgets == budget
    if not chosen.any():
      continue
    order = np.argsort(runs.parameters[chosen])
    N, L = runs.parameters[chosen][order], runs.losses[chosen][order]
    if (best := minima.get(budget)) is not None:
      x = np.geomspace(N[0], N[-1], 60)
      axes.plot(x, np.exp(np.polyval(best.curve, np.log(x))), color=color, linewidth=1.6)
      look = {"markersize": 7.5, "markerfacecolor": "#ffffff", "markeredgewidth": 1.8}
      axes.plot(best.parameters.value, best.loss.value, "D", color=color, zorder=4, **look)
    else:
      axes.plot(N, L, color=color, linewidth=1.0, linestyle=":")
    axes.plot(N, L, "o", color=color, markersize=4.5, zorder=3)
    for size, loss in zip(N, L):
      words = f"{family}, {scientific(budget)} FLOPs\n{short(size)} parameters: loss {loss:.4f}"
      picture.tooltip(axes, (size, size), (loss, loss), words)
    if best is not None:
      size, loss = best.parameters.value, best.loss.value
      words = f"{family}, {scientific(budget)} FLOPs\nbest: {short(size)} parameters, {loss:.4f}"
      picture.tooltip(axes, (size, size), (loss, loss), words)
    ends.append(((float(N[-1]), float(L[-1])), scientific(budget), color))
  return ends


def _law(axes: "Axes", family: str, law: Isoflop, power: Power, color: str) -> End:
  """A power law over the budgets, with its band; what stands at its end."""
  budgets = [one.budget for one in law.minima]
  x = np.geomspace(min(budgets), max(budgets), 60)
  low, high = power.band(x)
  axes.fill_between(x, low, high, color=color, alpha=0.13, linewidth=0)
  axes.plot(x, power.at(x), color=color)
  label = f"{family.capitalize()}: {_power_words(power)}"
  return (float(x[-1]), float(power.at(x[-1:])[0])), label, color


def _minimum(picture: Picture, axes: "Axes", family: str, one: Minimum, name: str) -> None:
  """The best of a budget, with its interval where that is finite."""
  look, interval = colors.of_family(family), getattr(one, name)
  axes.plot(one.budget, interval.value, look.marker, color=look.color, markersize=7, zorder=4)
  between = ""
  if np.isfinite(interval.low) and np.isfinite(interval.high):
    axes.plot([one.budget] * 2, [interval.low, interval.high], color=look.color, linewidth=1.4)
    between = f" ({interval.low:.4g} to {interval.high:.4g})"
  words = f"{family}, best of {scientific(one.budget)} FLOPs\n{name} {interval.value:.4g}{between}"
  picture.tooltip(axes, (one.budget, one.budget), (interval.value, interval.value), words)


def _power_words(power: Power) -> str:
  """ "1.7 + 2.1 C^-0.05"."""
  floor = f"{power.floor.value:.3g} + " if power.floor.value else ""
  factor = power.coefficient.value
  number = f"{factor:.3g}" if 1e-3 <= factor < 1e4 else scientific(factor)
  return f"{floor}{number} C^{power.exponent.value:.3f}"
