"""Numbers as people read them."""

import math

_SUPERSCRIPTS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


def short(value: float) -> str:
  """A number with a letter for thousands: 950, 1.5k, 20M, 3B, 1.2T; powers of ten beyond."""
  if value == 0 or not math.isfinite(value):
    return "0" if value == 0 else "?"
  size = abs(value)
  if size >= 1e15:
    return scientific(value)
  for scale, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
    if size >= 0.9995 * scale:
      return f"{value / scale:.3g}{letter}"
  if size >= 1e-3:
    return f"{value:.3g}"
  factor, _, exponent = f"{value:.1e}".partition("e")
  return f"{factor.removesuffix('.0')}e{int(exponent)}"


def scientific(value: float) -> str:
  """A number above 0 as a factor and a power of ten: 2.5·10¹⁸, 10⁻³."""
  exponent = math.floor(math.log10(abs(value)) + 1e-9)
  factor = f"{value / 10.0**exponent:.3g}"
  power = "10" + str(exponent).translate(_SUPERSCRIPTS)
  return power if factor == "1" else f"{factor}·{power}"
