"""Checks the shapes of a kernel's arrays against the first of them."""

from collections.abc import Mapping

Shape = tuple[int, ...]


def check(kernel: str, beside: str, expected: Mapping[str, tuple[Shape, Shape]]) -> None:
  """ValueError for the first of `expected`, name -> (shape, required shape), whose shapes differ.

  `beside` describes what it has to fit, such as "x (2, 8, 16)".
  """
  for name, (actual, needed) in expected.items():
    if actual != needed:
      raise ValueError(f"{kernel}: {name} {actual} must be {needed} beside {beside}")
