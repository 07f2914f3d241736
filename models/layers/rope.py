"""Rotary position embedding (arXiv:2104.09864) on the first part of each head.

The first `share` of a head's dimensions are rotated and the rest pass through; inside the rotated
part of size R, dimension i is paired with i + R/2 and turns at theta^(-2i/R) per token. Letter of
this file: P such pairs.
"""

import dataclasses
import math
from typing import ClassVar

import jax
import jax.numpy as jnp


@dataclasses.dataclass(frozen=True, kw_only=True)
class Llama3Scaling:
  """Slower turning for longer contexts than pretraining had (Llama 3.1; arXiv:2407.21783).

  A pair that turns less than `low_frequency_factor` times in `original_context` tokens turns
  `factor` times more slowly, one that turns more than `high_frequency_factor` times as before; in
  between the share of the old frequency grows linearly with the number of turns.
  """

  recorded_as: ClassVar[str] = "models.layers.rope.Llama3Scaling"

  factor: float
  original_context: int
  low_frequency_factor: float = 1.0
  high_frequency_factor: float = 4.0

  def __post_init__(self):
    if self.factor < 1.0 or self.original_context < 1:
      raise ValueError(
        f"Llama3Scaling: factor {self.factor} and original_context {self.original_context} must be "
        "at least 1"
      )
    if not 0.0 < self.low_frequency_factor < self.high_frequency_factor:
      raise ValueError(
        f"Llama3Scaling: low_frequency_factor {self.low_frequency_factor} must be above 0 and "
        f"below high_frequency_factor {self.high_frequency_factor}"
      )

  def scaled(self, frequency_P: jax.Array) -> jax.Array:
    """The frequencies, in radians a token, that replace `frequency_P`."""
    turns_P = self.original_context * frequency_P / (2.0 * math.pi)
    span = self.high_frequency_factor - self.low_frequency_factor
    kept_P = jnp.clip((turns_P - self.low_frequency_factor) / span, 0.0, 1.0)
    return frequency_P * ((1.0 - kept_P) / self.factor + kept_P)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rope:
  """The defaults are Griffin's and RecurrentGemma's: the first half of each head, theta 10,000."""

  recorded_as: ClassVar[str] = "models.layers.rope.Rope"

  share: float = 0.5
  theta: float = 10_000.0
  scaling: Llama3Scaling | None = None

  def __post_init__(self):
    if not 0.0 < self.share <= 1.0:
      raise ValueError(f"Rope: share {self.share} must be above 0 and at most 1")
    if not 1.0 < self.theta < math.inf:
      raise ValueError(f"Rope: theta {self.theta} must be above 1 and finite")

  def rotated(self, head_size: int) -> int:
    """How many dimensions of a head are rotated; ValueError if they do not make whole pairs."""
    rotated = head_size * self.share
    if rotated % 2:
      raise ValueError(
        f"Rope: share {self.share} of head_size {head_size} is {rotated:g} dimensions, not a whole "
        "number of pairs; change head_size or share"
      )
    return int(rotated)

  def frequencies(self, head_size: int) -> jax.Array:
    """Radians a token of each pair, float32 [rotated / 2]."""
    rotated = self.rotated(head_size)
    frequency_P = self.theta ** (-2.0 * jnp.arange(rotated // 2, dtype=jnp.float32) / rotated)
    return frequency_P if self.scaling is None else self.scaling.scaled(frequency_P)


def apply_rope(x_BTNH: jax.Array, position_BT: jax.Array, rope: Rope) -> jax.Array:
  """x rotated by the token's position in its document; angles in float32, result in x's dtype."""
  rotated = rope.rotated(x_BTNH.shape[-1])
  frequency_P = rope.frequencies(x_BTNH.shape[-1])
  angle_BT1P = position_BT[:, :, None, None].astype(jnp.float32) * frequency_P
  sin_BT1P, cos_BT1P = jnp.sin(angle_BT1P), jnp.cos(angle_BT1P)
  first_BTNP, second_BTNP, rest_BTNI = jnp.split(x_BTNH, (rotated // 2, rotated), axis=-1)
  turned_first_BTNP = first_BTNP * cos_BT1P - second_BTNP * sin_BT1P
  turned_second_BTNP = second_BTNP * cos_BT1P + first_BTNP * sin_BT1P
  turned_BTNH = [turned_first_BTNP.astype(x_BTNH.dtype), turned_second_BTNP.astype(x_BTNH.dtype)]
  return jnp.concatenate([*turned_BTNH, rest_BTNI], axis=-1)
