"""Initial values of weight matrices: a choice in the config of a layer."""

import dataclasses
from typing import ClassVar, Protocol

from models.param import Initializer, normal


class InitialWeights(Protocol):
  """A frozen dataclass that initializes all matrices of a layer."""

  recorded_as: ClassVar[str]

  def inside(self, inputs: int) -> Initializer:
    """For a matrix whose result, a sum of `inputs` terms, stays in the layer."""
    ...

  def into_stream(self, inputs: int, num_blocks: int) -> Initializer:
    """For a matrix whose result is added to the residual stream in each of `num_blocks` blocks."""
    ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class FanIn:
  """Normal of variance 1 / inputs, and 2 / (blocks x inputs) into the residual stream, which then
  keeps its scale at any depth."""

  recorded_as: ClassVar[str] = "models.initial_weights.FanIn"

  def inside(self, inputs: int) -> Initializer:
    return normal(1.0 / inputs)

  def into_stream(self, inputs: int, num_blocks: int) -> Initializer:
    return normal(2.0 / (num_blocks * inputs))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Normal:
  """Normal of the same standard deviation everywhere."""

  recorded_as: ClassVar[str] = "models.initial_weights.Normal"

  std: float

  def __post_init__(self):
    if not 0.0 < self.std < float("inf"):
      raise ValueError(f"Normal: std {self.std} must be above 0 and finite")

  def inside(self, inputs: int) -> Initializer:
    del inputs
    return normal(self.std**2)

  def into_stream(self, inputs: int, num_blocks: int) -> Initializer:
    del inputs, num_blocks
    return normal(self.std**2)
