"""AdamW: the learning rate of every step, which parameters decay, moments in float32 or bfloat16.

Steps are numbered from 1: step t is the update that leaves TrainState.step == t. Clipping is apart
from the transformation, so that the train step measures the gradient's norm once, logs it, and
knows of a non-finite one before any moment changes.
"""

import dataclasses
import types
from collections.abc import Callable
from typing import Any, ClassVar, Literal, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
import optax

# For annotations in other files: optax is imported only here.
GradientTransformation: TypeAlias = optax.GradientTransformation
apply_updates = optax.apply_updates

# bfloat16 has 8 bits: beyond this b * x rounds back to x, and the mean never falls again.
_MAX_BFLOAT16_BETA = 1 - 2**-8


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cosine:
  """Half a cosine from the peak to `final_fraction` of it, reached in the last step."""

  recorded_as: ClassVar[str] = "train.optimizer.Cosine"

  final_fraction: float = 0.1

  def __post_init__(self):
    if not 0 <= self.final_fraction <= 1:
      raise ValueError(f"Cosine: final_fraction {self.final_fraction} is not between 0 and 1")

  def check(self, *, warmup_steps: int, total_steps: int) -> None:
    """Fits any run that its warm-up fits."""

  def fraction(self, t: Any, *, warmup_steps: int, total_steps: int) -> Any:
    """Learning rate of step t, after the warm-up, as a fraction of the peak."""
    xp = _numpy_of(t)
    progress = _ramp(t, warmup_steps, total_steps)
    return self.final_fraction + (1 - self.final_fraction) * 0.5 * (1 + xp.cos(xp.pi * progress))


@dataclasses.dataclass(frozen=True, kw_only=True)
class WarmupStableDecay:
  """The peak, then over the last `decay_fraction` of all steps down to `final_fraction` of it.

  shape "linear", or "sqrt": 1 - sqrt(progress), which falls faster at first (arXiv:2405.18392).
  """

  recorded_as: ClassVar[str] = "train.optimizer.WarmupStableDecay"

  decay_fraction: float = 0.2
  final_fraction: float = 0.0
  shape: Literal["linear", "sqrt"] = "linear"

  def __post_init__(self):
    if not 0 <= self.final_fraction <= 1:
      raise ValueError(
        f"WarmupStableDecay: final_fraction {self.final_fraction} is not between 0 and 1"
      )
    if not 0 < self.decay_fraction <= 1:
      raise ValueError(
        f"WarmupStableDecay: decay_fraction {self.decay_fraction} must be above 0 and at most 1; "
        "for no decay at all use Constant()"
      )
    if self.shape not in ("linear", "sqrt"):
      raise ValueError(f"WarmupStableDecay: shape {self.shape!r} is none of 'linear', 'sqrt'")

  def check(self, *, warmup_steps: int, total_steps: int) -> None:
    """Raises if the schedule does not fit into the run."""
    decay_steps = self._decay_steps(total_steps)
    if warmup_steps + decay_steps > total_steps:
      raise ValueError(
        f"WarmupStableDecay: warmup_steps {warmup_steps} and a decay of {decay_steps} steps "
        f"(decay_fraction {self.decay_fraction}) are more than total_steps {total_steps}"
      )

  def fraction(self, t: Any, *, warmup_steps: int, total_steps: int) -> Any:
    """Learning rate of step t, after the warm-up, as a fraction of the peak."""
    del warmup_steps
    progress = _ramp(t, total_steps - self._decay_steps(total_steps), total_steps)
    fallen = progress if self.shape == "linear" else _numpy_of(t).sqrt(progress)
    return 1 - (1 - self.final_fraction) * fallen

  def _decay_steps(self, total_steps: int) -> int:
    return max(1, round(self.decay_fraction * total_steps))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Constant:
  """The peak to the end, as the published toy tasks are trained."""

  recorded_as: ClassVar[str] = "train.optimizer.Constant"

  def check(self, *, warmup_steps: int, total_steps: int) -> None:
    """Fits any run that its warm-up fits."""

  def fraction(self, t: Any, *, warmup_steps: int, total_steps: int) -> Any:
    """Learning rate of step t, after the warm-up, as a fraction of the peak."""
    del warmup_steps, total_steps
    return _numpy_of(t).ones_like(t, dtype=np.float32)


@dataclasses.dataclass(frozen=True, kw_only=True)
class AdamW:
  """Adam with decoupled weight decay (arXiv:1711.05101), which is multiplied by the learning rate.

  The learning rate rises linearly over `warmup_steps` to `peak_lr`, then follows `schedule`.
  clip_norm bounds the global norm of the gradient (None: no clipping); the train step applies it.
  moment_dtype holds both moments; the update is computed in float32 in either case.
  """

  recorded_as: ClassVar[str] = "train.optimizer.AdamW"

  peak_lr: float
  warmup_steps: int
  schedule: Cosine | WarmupStableDecay | Constant = Cosine()
  b1: float = 0.9
  b2: float = 0.95
  eps: float = 1e-8
  weight_decay: float = 0.1
  clip_norm: float | None = 1.0
  moment_dtype: Literal["float32", "bfloat16"] = "float32"

  def __post_init__(self):
    for name in ("peak_lr", "eps"):
      if not 0 < getattr(self, name) < float("inf"):
        raise ValueError(f"AdamW: {name} {getattr(self, name)} must be positive and finite")
    for name in ("warmup_steps", "weight_decay"):
      if not 0 <= getattr(self, name) < float("inf"):
        raise ValueError(f"AdamW: {name} {getattr(self, name)} must not be negative")
    if self.clip_norm is not None and not self.clip_norm > 0:
      raise ValueError(f"AdamW: clip_norm {self.clip_norm} must be positive; None is no clipping")
    if self.moment_dtype not in ("float32", "bfloat16"):
      raise ValueError(
        f"AdamW: moment_dtype {self.moment_dtype!r} is none of 'float32', 'bfloat16'"
      )
    for name in ("b1", "b2"):
      beta = getattr(self, name)
      if not 0 <= beta < 1:
        raise ValueError(f"AdamW: {name} {beta} must be at least 0 and below 1")
      if self.moment_dtype == "bfloat16" and beta > _MAX_BFLOAT16_BETA:
        raise ValueError(
          f"AdamW: {name} {beta} is above {_MAX_BFLOAT16_BETA:.4f}, where a bfloat16 mean rounds "
          f"back to itself and never falls; lower {name} or set moment_dtype='float32'"
        )

  def learning_rate(self, step: int | jax.Array, *, total_steps: int) -> Any:
    """The learning rate of step `step` (from 1): a number on the host, traced for a traced step."""
    xp = _numpy_of(step)
    t = xp.asarray(step, dtype=np.float32)
    sizes = {"warmup_steps": self.warmup_steps, "total_steps": total_steps}
    after = self.schedule.fraction(t, **sizes)
    rising = t / max(1, self.warmup_steps)
    return self.peak_lr * xp.where(t < self.warmup_steps, rising, after)

  def check(self, *, total_steps: int) -> None:
    """Raises unless warm-up and schedule fit into a run of `total_steps`."""
    if self.warmup_steps > total_steps:
      raise ValueError(
        f"AdamW: warmup_steps {self.warmup_steps} is more than total_steps {total_steps}"
      )
    self.schedule.check(warmup_steps=self.warmup_steps, total_steps=total_steps)

  def build(self, *, total_steps: int, decay_mask: Any) -> optax.GradientTransformation:
    """The transformation of a run of `total_steps`; `decay_mask` has a bool for every parameter."""
    self.check(total_steps=total_steps)
    moment_dtype = jnp.dtype(self.moment_dtype)

    def init(params: Any) -> AdamWState:
      mu, nu = (
        jax.tree.map(lambda w: jnp.zeros(jnp.shape(w), moment_dtype), params) for _ in range(2)
      )
      return AdamWState(jnp.zeros((), jnp.int32), mu, nu)

    def update(grads: Any, state: AdamWState, params: Any = None) -> tuple[Any, AdamWState]:
      count = state.count + 1
      lr = self.learning_rate(count, total_steps=total_steps)
      direction = self._direction(count)

      def one(g, mu, nu, w, decays):
        g32 = g.astype(jnp.float32)
        mu32 = self.b1 * mu.astype(jnp.float32) + (1 - self.b1) * g32
        nu32 = self.b2 * nu.astype(jnp.float32) + (1 - self.b2) * jnp.square(g32)
        change = direction(mu32, nu32)
        if decays:
          change += self.weight_decay * w.astype(jnp.float32)
        return _Leaf(-lr * change, mu32.astype(moment_dtype), nu32.astype(moment_dtype))

      leaves = jax.tree.map(one, grads, state.mu, state.nu, params, decay_mask)
      updates, mu, nu = (_take(leaves, index) for index in range(3))
      return updates, AdamWState(count, mu, nu)

    return optax.GradientTransformation(init, update)  # pyright: ignore[reportArgumentType]

  def last_update(
    self, state: "AdamWState", params: Any, *, total_steps: int, decay_mask: Any
  ) -> Any:
    """What the update that ended in `state` and `params` added to the parameters, float32.

    Exact up to the rounding of stored moments and parameters. The update was
    u = -lr (d + weight_decay (w - u)), where w is the parameter after it: solved here for u.
    """
    lr = self.learning_rate(state.count, total_steps=total_steps)
    direction = self._direction(state.count)

    def one(mu, nu, w, decays):
      change = direction(mu.astype(jnp.float32), nu.astype(jnp.float32))
      if not decays:
        return -lr * change
      return (
        -lr * (change + self.weight_decay * w.astype(jnp.float32)) / (1 - lr * self.weight_decay)
      )

    return jax.tree.map(one, state.mu, state.nu, params, decay_mask)

  def _direction(self, count: jax.Array) -> Callable[[jax.Array, jax.Array], jax.Array]:
    """(mu, nu) after `count` updates -> the step of Adam, before the learning rate."""
    t = count.astype(jnp.float32)
    # The moments start at zero; without this the first steps would be too small.
    mu_scale, nu_scale = 1 / (1 - self.b1**t), 1 / (1 - self.b2**t)
    return lambda mu, nu: mu * mu_scale / (jnp.sqrt(nu * nu_scale) + self.eps)


class AdamWState(NamedTuple):
  """`count` finished updates (int32), and the moments in the tree of the parameters."""

  count: jax.Array
  mu: Any
  nu: Any


class _Leaf(NamedTuple):
  update: jax.Array
  mu: jax.Array
  nu: jax.Array


def _take(leaves: Any, index: int) -> Any:
  return jax.tree.map(lambda leaf: leaf[index], leaves, is_leaf=lambda x: isinstance(x, _Leaf))


def global_norm(square_norms: Any) -> jax.Array:
  """sqrt of the sum over everything in a tree of sums of squares, float32."""
  sums = [jnp.sum(x.astype(jnp.float32)) for x in jax.tree.leaves(square_norms)]
  return jnp.sqrt(jnp.sum(jnp.stack(sums)))


def clip_factor(norm: jax.Array, max_norm: float | None) -> jax.Array:
  """The factor that scales gradients of global norm `norm` to at most `max_norm` (None: 1).

  A norm that is not finite gives NaN, and so makes every gradient NaN: clipping hides nothing.
  """
  if max_norm is None:
    return jnp.ones_like(norm)
  # Infinity would scale to zero gradients, which look like a step that went well.
  return jnp.where(jnp.isfinite(norm), max_norm / jnp.maximum(norm, max_norm), jnp.nan)


def _ramp(t: Any, start: int, end: int) -> Any:
  """0 up to `start`, 1 from `end`, linear between."""
  return _numpy_of(t).clip((t - start) / max(1, end - start), 0.0, 1.0)


def _numpy_of(x: Any) -> types.ModuleType:
  """numpy for what is on the host, so that logging a learning rate never waits for the device."""
  return jnp if isinstance(x, jax.Array) else np
