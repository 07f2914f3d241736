"""Fits log L(N, D) = log(E + A N^-alpha + B D^-beta) by the Huber loss, to many data sets at once:
a bootstrap has hundreds."""

import numpy as np

# In log L: points further from the law than this pull no harder. The published value is 1e-3, which
# is below the scatter of small runs: it would fit a median, whose intervals are a fifth wider.
HUBER_DELTA = 1e-2
_GRID_ALPHA = (0.1, 0.2, 0.35, 0.5, 0.8, 1.2)
_ITERATIONS = 20


def fit_surfaces(
  log_N: np.ndarray, log_D: np.ndarray, log_L: np.ndarray, first: np.ndarray
) -> np.ndarray:
  """For each row of log_L [R, n] the constants [R, 5] = (log E, log A, log B, alpha, beta) of the
  smallest Huber loss that is found from the starts `first` [S, 5]."""
  num_rows, num_starts = len(log_L), len(first)
  theta = np.tile(first, (num_rows, 1))
  target = np.repeat(log_L, num_starts, axis=0)
  theta, cost = _levenberg_marquardt(theta, target, log_N, log_D)
  best = np.argmin(cost.reshape(num_rows, num_starts), axis=1)
  return theta.reshape(num_rows, num_starts, 5)[np.arange(num_rows), best]


def starts(log_N: np.ndarray, log_D: np.ndarray, log_L: np.ndarray) -> np.ndarray:
  """Starts [S, 5]: a grid of both exponents, with E, A and B solved for each."""
  L = np.exp(log_L)
  found = []
  for alpha in _GRID_ALPHA:
    for beta in _GRID_ALPHA:
      columns = [np.ones_like(L), np.exp(-alpha * log_N), np.exp(-beta * log_D)]
      design = np.stack(columns, axis=1) / L[:, None]
      scale = np.abs(design).max(axis=0)
      linear = np.linalg.lstsq(design / scale, np.ones_like(L), rcond=None)[0]
      linear = np.maximum(linear, 1e-3) / scale
      found.append([*np.log(linear), alpha, beta])
  return np.array(found)


def log_surface(theta: np.ndarray, log_N: np.ndarray, log_D: np.ndarray) -> np.ndarray:
  """log L [R, n] of constants [R, 5]."""
  return np.log(_terms(theta, log_N, log_D).sum(axis=0))


def _terms(theta: np.ndarray, log_N: np.ndarray, log_D: np.ndarray) -> np.ndarray:
  """E, A N^-alpha and B D^-beta: [3, R, n]."""
  e, a, b, alpha, beta = (column[:, None] for column in theta.T)
  exponents = [e + 0 * log_N, a - alpha * log_N, b - beta * log_D]
  return np.exp(np.stack(exponents))


_LOWEST = np.array([-8.0, -20.0, -20.0, 1e-3, 1e-3])
_HIGHEST = np.array([8.0, 80.0, 80.0, 4.0, 4.0])


def _levenberg_marquardt(
  theta: np.ndarray, target: np.ndarray, log_N: np.ndarray, log_D: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
  """The constants [R, 5] of the smallest Huber loss near `theta`, and that loss, for all rows."""
  damping = np.full(len(theta), 1e-2)
  cost = _huber(log_surface(theta, log_N, log_D) - target)
  for _ in range(_ITERATIONS):
    terms = _terms(theta, log_N, log_D)
    total = terms.sum(axis=0)
    shares = terms / total
    residual = np.log(total) - target
    jacobian = np.stack(
      [shares[0], shares[1], shares[2], -log_N * shares[1], -log_D * shares[2]], axis=2
    )
    weight = np.minimum(1.0, HUBER_DELTA / np.maximum(np.abs(residual), 1e-300))
    weighted = jacobian * weight[:, :, None]
    gradient = np.einsum("rni,rn->ri", weighted, residual)
    hessian = np.einsum("rni,rnj->rij", weighted, jacobian)
    diagonal = np.einsum("rii->ri", hessian)
    lift = damping[:, None] * (diagonal + 1e-9 * diagonal.max(axis=1, keepdims=True)) + 1e-14
    step = np.linalg.solve(hessian + lift[:, :, None] * np.eye(5), -gradient[:, :, None])[:, :, 0]
    trial = np.clip(theta + step, _LOWEST, _HIGHEST)
    trial_cost = _huber(log_surface(trial, log_N, log_D) - target)
    better = trial_cost < cost
    theta = np.where(better[:, None], trial, theta)
    cost = np.where(better, trial_cost, cost)
    damping = np.clip(np.where(better, damping / 3, damping * 5), 1e-9, 1e9)
  return theta, cost


def _huber(residual: np.ndarray) -> np.ndarray:
  size = np.abs(residual)
  inside = 0.5 * size**2
  outside = HUBER_DELTA * (size - 0.5 * HUBER_DELTA)
  return np.where(size <= HUBER_DELTA, inside, outside).sum(axis=1)
