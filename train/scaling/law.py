"""Scaling laws of one family: isoFLOP minima, powers of compute, and the surface L(N, D).

  isoflop(runs)   for each budget a parabola of log L in log N (arXiv:2203.15556, approach 2), and
                  through their minima L(C) = a C^-b, N(C) and D(C)
  surface(runs)   L(N, D) = E + A N^-alpha + B D^-beta, fitted in log L with a Huber loss from a
                  grid of starts (the same paper, approach 3)

Intervals come from a residual bootstrap: the sizes and budgets stay, and the residuals of the fit,
scaled for its number of constants, are drawn anew. Because runs are few, percentiles are widened by
the ratio of Student's t quantile to the normal one. The intervals show scatter around the law, not
whether the law holds. N counts the tied embedding once; C is the runs' own FLOPs, logits included.
"""

import dataclasses
from typing import NamedTuple

import numpy as np
from scipy import stats

from train.scaling.surface_fit import fit_surfaces, log_surface, starts

LEVEL = 0.9  # of every interval
# With fewer budgets a floor looks the same as a smaller exponent.
_BUDGETS_FOR_A_FLOOR = 5
_CHANCE = 0.002  # of claiming a floor where there is none


@dataclasses.dataclass(frozen=True)
class Runs:
  """Finished runs of one family, an array each: FLOPs as budgeted and as spent, parameters, tokens,
  held-out losses in nats per token."""

  budgets: np.ndarray
  flops: np.ndarray
  parameters: np.ndarray
  tokens: np.ndarray
  losses: np.ndarray

  def __len__(self) -> int:
    return len(self.losses)


class Interval(NamedTuple):
  """An estimate with the ends of its interval of level LEVEL."""

  value: float
  low: float
  high: float


class Minimum(NamedTuple):
  """The best of an isoFLOP curve; `curve` are the coefficients of (log N)^2, log N and 1."""

  budget: float
  parameters: Interval
  tokens: float
  loss: Interval
  curve: tuple[float, float, float]


class Power(NamedTuple):
  """y = floor + coefficient * x^exponent; floor is 0 where the runs do not support one.

  `samples` [R, 3] are the bootstrap's (floor, log coefficient, exponent), for bands.
  """

  floor: Interval
  coefficient: Interval
  exponent: Interval
  samples: np.ndarray

  def at(self, x: np.ndarray) -> np.ndarray:
    return self.floor.value + self.coefficient.value * np.asarray(x) ** self.exponent.value

  def band(self, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The ends of the interval at each x."""
    floor, log_coefficient, exponent = (column[:, None] for column in self.samples.T)
    values = floor + np.exp(log_coefficient + exponent * np.log(x)[None])
    low, high = np.quantile(values, [(1 - LEVEL) / 2, (1 + LEVEL) / 2], axis=0)
    return low, high


class Isoflop(NamedTuple):
  """The minima, smallest budget first; `unbracketed` are the budgets whose best size lies outside
  of those that were trained (or whose curve has no minimum). The powers of C go through the minima,
  and are None where there are fewer than two."""

  minima: tuple[Minimum, ...]
  unbracketed: tuple[float, ...]
  loss: Power | None
  parameters: Power | None
  tokens: Power | None


class Surface(NamedTuple):
  """L(N, D) = E + A N^-alpha + B D^-beta. Compute-optimal N grows as C^optimal, which is
  beta / (alpha + beta)."""

  E: Interval
  A: Interval
  B: Interval
  alpha: Interval
  beta: Interval
  optimal: Interval
  residual: float  # root mean square, of log L

  def at(self, parameters: np.ndarray, tokens: np.ndarray) -> np.ndarray:
    return (
      self.E.value
      + self.A.value * parameters**-self.alpha.value
      + self.B.value * tokens**-self.beta.value
    )


def isoflop(runs: Runs, *, num_samples: int = 1000, seed: int = 0) -> Isoflop:
  """The parabola of each budget with at least three sizes, and the powers through their minima."""
  budgets = [
    budget for budget in np.unique(runs.budgets) if len(set(_of(runs, budget).parameters)) >= 3
  ]
  curves = [_Curve(_of(runs, budget), budget) for budget in budgets]
  rng = np.random.default_rng(seed)
  degrees = sum(len(curve.residuals) - 3 for curve in curves)
  sampled = _sampled_losses(
    np.concatenate([curve.fitted for curve in curves]) if curves else np.empty(0),
    np.concatenate([curve.residuals for curve in curves]) if curves else np.empty(0),
    degrees,
    num_samples,
    rng,
  )
  good: list[_Curve] = []
  start = 0
  for curve in curves:
    curve.sample(sampled[:, start : start + len(curve.fitted)])
    start += len(curve.fitted)
    if curve.is_bracketed:
      good.append(curve)
  minima = tuple(curve.minimum(degrees) for curve in good)
  unbracketed = tuple(float(curve.budget) for curve in curves if not curve.is_bracketed)
  if len(good) < 2:
    return Isoflop(minima, unbracketed, None, None, None)
  log_C = np.log([curve.budget for curve in good])

  def power(name: str, *, with_floor: bool = False) -> Power:
    log_y = np.array([getattr(curve, name) for curve in good])
    samples = np.stack([getattr(curve, f"{name}_samples") for curve in good], axis=1)
    return _power(log_C, log_y, samples, degrees, with_floor=with_floor)

  return Isoflop(
    minima,
    unbracketed,
    power("log_loss", with_floor=True),
    power("log_parameters"),
    power("log_tokens"),
  )


def surface(runs: Runs, *, num_samples: int = 400, seed: int = 0) -> Surface | None:
  """The law over all runs; None if there are too few runs to fit its five constants."""
  if len(runs) <= 6 or len(set(runs.parameters)) < 3 or len(set(runs.tokens)) < 3:
    return None
  log_N, log_D, log_L = np.log(runs.parameters), np.log(runs.tokens), np.log(runs.losses)
  theta = fit_surfaces(log_N, log_D, log_L[None], starts(log_N, log_D, log_L))[0]
  fitted = log_surface(theta[None], log_N, log_D)[0]
  degrees = len(runs) - 5
  rng = np.random.default_rng(seed)
  sampled = _sampled_losses(fitted, log_L - fitted, degrees, num_samples, rng)
  samples = fit_surfaces(log_N, log_D, sampled, theta[None])
  return _surface(theta, samples, degrees, residual=float(np.sqrt(np.mean((log_L - fitted) ** 2))))


class _Curve:
  """The isoFLOP parabola of one budget, and the bootstrap's of it; logarithms throughout."""

  def __init__(self, runs: Runs, budget: float):
    self.budget = float(budget)
    self._log_N, self._log_D = np.log(runs.parameters), np.log(runs.tokens)
    self._center = self._log_N.mean()
    self._pinv = np.linalg.pinv(np.vander(self._log_N - self._center, 3))
    log_L = np.log(runs.losses)
    self._coefficients = self._pinv @ log_L
    self.fitted = np.vander(self._log_N - self._center, 3) @ self._coefficients
    self.residuals = log_L - self.fitted
    # Tokens are nearly a power of N within a budget.
    self._tokens = np.polyfit(self._log_N - self._center, self._log_D, 2)
    place, height = _vertex(self._coefficients[None])
    low, high = self._log_N.min() - self._center, self._log_N.max() - self._center
    self.is_bracketed = bool(self._coefficients[0] > 0 and low < place[0] < high)
    # A sample whose parabola has no minimum near the sizes only shows that the minimum is far away.
    self._reach = (low - (high - low), high + (high - low))
    self.log_loss = float(height[0])
    self.log_parameters = float(place[0] + self._center)
    self.log_tokens = float(np.polyval(self._tokens, place[0]))

  def sample(self, log_L: np.ndarray) -> None:
    """Takes the minima of resampled losses [R, n]."""
    coefficients = log_L @ self._pinv.T
    place, self.log_loss_samples = _vertex(coefficients)
    place = np.clip(np.where(coefficients[:, 0] > 0, place, np.inf), *self._reach)
    self.log_parameters_samples = place + self._center
    self.log_tokens_samples = np.polyval(self._tokens, place)

  def minimum(self, degrees: int) -> Minimum:
    a, b, c = self._coefficients
    shift = self._center
    return Minimum(
      budget=self.budget,
      parameters=_exp(_interval(self.log_parameters, self.log_parameters_samples, degrees)),
      tokens=float(np.exp(self.log_tokens)),
      loss=_exp(_interval(self.log_loss, self.log_loss_samples, degrees)),
      curve=(float(a), float(b - 2 * a * shift), float(c - b * shift + a * shift**2)),
    )


def _vertex(coefficients: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """Place and height of the vertices of parabolas [R, 3]."""
  a, b, c = coefficients.T
  safe = np.where(np.abs(a) < 1e-12, 1e-12, a)
  place = -b / (2 * safe)
  return place, c - b**2 / (4 * safe)


def _power(
  log_x: np.ndarray, log_y: np.ndarray, samples: np.ndarray, degrees: int, *, with_floor: bool
) -> Power:
  """y = a x^b through the points, with a floor if one is wanted and the points support it."""
  straight = _straight(log_x, log_y[None])[0]
  sampled = _straight(log_x, samples)
  if with_floor and _supports_floor(log_x, log_y, samples):
    straight, sampled = _bent(log_x, log_y[None])[0], _bent(log_x, samples)
  floor, coefficient, exponent = (
    _interval(value, column, degrees) for value, column in zip(straight, sampled.T)
  )
  return Power(floor, _exp(coefficient), exponent, sampled)


def _supports_floor(log_x: np.ndarray, log_y: np.ndarray, samples: np.ndarray) -> bool:
  """Whether a floor explains more than it would if the law had none and the rest were scatter."""
  if len(log_x) < _BUDGETS_FOR_A_FLOOR:
    return False

  def gain(rows: np.ndarray) -> np.ndarray:
    costs = [
      np.sum((_log_power(one, log_x) - rows) ** 2, axis=1)
      for one in (_straight(log_x, rows), _bent(log_x, rows))
    ]
    return costs[0] - costs[1]

  without = _log_power(_straight(log_x, log_y[None]), log_x) + samples - log_y
  return bool(np.mean(gain(without) >= gain(log_y[None])) < _CHANCE)


def _log_power(theta: np.ndarray, log_x: np.ndarray) -> np.ndarray:
  """log y [R, n] of constants [R, 3]."""
  floor, log_coefficient, exponent = (column[:, None] for column in theta.T)
  return np.log(floor + np.exp(log_coefficient + exponent * log_x))


def _straight(log_x: np.ndarray, log_y: np.ndarray) -> np.ndarray:
  """[R, 3] = (0, log a, b) of y = a x^b, least squares in the logarithm."""
  design = np.stack([np.ones_like(log_x), log_x], axis=1)
  found = log_y @ np.linalg.pinv(design).T
  return np.concatenate([np.zeros((len(found), 1)), found], axis=1)


def _bent(log_x: np.ndarray, log_y: np.ndarray) -> np.ndarray:
  """[R, 3] = (E, log a, b) of y = E + a x^b: the best of the lines fitted for many floors."""
  y = np.exp(log_y)
  shares = np.concatenate([[0.0], 1 - np.geomspace(1.0, 0.02, 60)[1:]])
  floors = (shares[:, None] * y.min(axis=1)).ravel()
  above = np.tile(y, (len(shares), 1)) - floors[:, None]
  lines = _straight(log_x, np.log(above))
  lines[:, 0] = floors
  costs = np.sum((_log_power(lines, log_x) - np.tile(log_y, (len(shares), 1))) ** 2, axis=1)
  best = np.argmin(costs.reshape(len(shares), len(y)), axis=0)
  return lines.reshape(len(shares), len(y), 3)[best, np.arange(len(y))]


def _surface(theta: np.ndarray, samples: np.ndarray, degrees: int, *, residual: float) -> Surface:
  def optimal(rows: np.ndarray) -> np.ndarray:
    return rows[:, 4] / (rows[:, 3] + rows[:, 4])

  intervals = [
    _interval(value, column, degrees) for value, column in zip(theta, samples.T, strict=True)
  ]
  return Surface(
    E=_exp(intervals[0]),
    A=_exp(intervals[1]),
    B=_exp(intervals[2]),
    alpha=intervals[3],
    beta=intervals[4],
    optimal=_interval(float(optimal(theta[None])[0]), optimal(samples), degrees),
    residual=residual,
  )


def _sampled_losses(
  fitted: np.ndarray,
  residuals: np.ndarray,
  degrees: int,
  num_samples: int,
  rng: np.random.Generator,
) -> np.ndarray:
  """log L [R, n] with residuals drawn anew; the fit leaves `degrees` of freedom."""
  if degrees < 1:
    return np.tile(fitted, (num_samples, 1))
  scaled = residuals * np.sqrt(len(residuals) / degrees)
  return fitted + rng.choice(scaled, (num_samples, len(fitted)))


def _interval(value: float, samples: np.ndarray, degrees: int) -> Interval:
  """Percentiles around the estimate, widened; infinite where the fit leaves no freedom."""
  if degrees < 1:
    return Interval(float(value), -np.inf, np.inf)
  low, high = np.quantile(samples, [(1 - LEVEL) / 2, (1 + LEVEL) / 2], method="weibull")
  wider = stats.t.ppf((1 + LEVEL) / 2, degrees) / stats.norm.ppf((1 + LEVEL) / 2)
  return Interval(
    float(value), float(value + wider * (low - value)), float(value + wider * (high - value))
  )


def _exp(interval: Interval) -> Interval:
  return Interval(*(float(np.exp(x)) for x in interval))


def _of(runs: Runs, budget: float) -> Runs:
  chosen = runs.budgets == budget
  return Runs(*(getattr(runs, field.name)[chosen] for field in dataclasses.fields(runs)))
