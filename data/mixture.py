"""The order of a weighted mixture: which row of which source comes at index i, in O(1).

Rows are dealt out so that after any number of them each source has had its share, give or take one
per source. Each source is read in a new shuffled order every epoch.
"""

import dataclasses
import fractions
import math
from typing import NamedTuple

from data.rows import shuffled


class RowAddress(NamedTuple):
  """One row as it was read: which source of the config, which epoch of it, which row of it."""

  source: int
  epoch: int
  row: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Mixture:
  """Sources with `num_rows[k]` rows and share `shares[k] / sum(shares)`; endless."""

  num_rows: tuple[int, ...]
  shares: tuple[int, ...]
  seed: int

  def address(self, index: int) -> RowAddress:
    """Where row `index` of the mixture comes from."""
    source, position = self._deal(index)
    size = self.num_rows[source]
    epoch, position = divmod(position, size)
    return RowAddress(source, epoch, shuffled(position, size, seed=(self.seed, source, epoch)))

  def counts(self, num_rows: int) -> tuple[int, ...]:
    """How many of the first `num_rows` rows each source has given."""
    counts, left = [], num_rows
    for share, rest in zip(self.shares, self._rests()):
      counts.append(_round(left * share, rest))
      left -= counts[-1]
    return tuple(counts)

  def num_rows_within(self, num_epochs: int) -> int:
    """The number of rows before any source would begin its epoch `num_epochs` + 1."""
    low, high = 0, num_epochs * sum(self.num_rows) + 1
    while high - low > 1:
      middle = (low + high) // 2
      counts = self.counts(middle)
      if all(count <= num_epochs * size for count, size in zip(counts, self.num_rows)):
        low = middle
      else:
        high = middle
    return low

  def _deal(self, index: int) -> tuple[int, int]:
    for source, (share, rest) in enumerate(zip(self.shares, self._rests())):
      before = _round(index * share, rest)
      if _round((index + 1) * share, rest) > before:
        return source, before
      index -= before
    raise AssertionError("the last source takes every row that is left")

  def _rests(self) -> list[int]:
    return [sum(self.shares[source:]) for source in range(len(self.shares))]


def integer_shares(weights: tuple[float, ...]) -> tuple[int, ...]:
  """Weights as written (0.7, 0.3) as exact integers (7, 3)."""
  exact = [fractions.Fraction(repr(float(weight))) for weight in weights]
  scale = math.lcm(*(fraction.denominator for fraction in exact))
  shares = [int(fraction * scale) for fraction in exact]
  return tuple(share // math.gcd(*shares) for share in shares)


def _round(numerator: int, denominator: int) -> int:
  return (2 * numerator + denominator) // (2 * denominator)
