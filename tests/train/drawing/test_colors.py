"""A family has one color, in every picture, that everybody can tell from the others."""

import itertools

import numpy as np
import pytest

from train.drawing import colors

# What eyes that lack one kind of cone see of linear red, green and blue (G. Machado, M. Oliveira
# and L. Fernandes, doi:10.1109/TVCG.2009.113, severity 1).
SEEN_BY = {
  "all": np.eye(3),
  "protanopes": [
    [0.152286, 1.052583, -0.204868],
    [0.114503, 0.786281, 0.099216],
    [-0.003882, -0.048116, 1.051998],
  ],
  "deuteranopes": [
    [0.367322, 0.860646, -0.227968],
    [0.280085, 0.672501, 0.047413],
    [-0.011820, 0.042940, 0.968881],
  ],
  "tritanopes": [
    [1.255528, -0.076749, -0.178779],
    [-0.078411, 0.930809, 0.147602],
    [0.004733, 0.691367, 0.303900],
  ],
}


def _linear(color):
  parts = np.array([int(color[at : at + 2], 16) for at in (1, 3, 5)]) / 255
  return np.where(parts <= 0.04045, parts / 12.92, ((parts + 0.055) / 1.055) ** 2.4)


def _oklab(linear):
  """B. Ottosson's, in which equal distances look alike."""
  cones = np.array(
    [
      [0.4122214708, 0.5363325363, 0.0514459929],
      [0.2119034982, 0.6806995451, 0.1073969566],
      [0.0883024619, 0.2817188376, 0.6299787005],
    ]
  )
  opponents = np.array(
    [
      [0.2104542553, 0.7936177850, -0.0040720468],
      [1.9779984951, -2.4285922050, 0.4505937099],
      [0.0259040371, 0.7827717662, -0.8086757660],
    ]
  )
  return opponents @ np.cbrt(cones @ np.clip(linear, 0, 1))


@pytest.mark.parametrize("eyes", SEEN_BY)
def test_families_are_told_apart_by_all_eyes(eyes):
  known = {name: look.color for name, look in colors.FAMILIES.items()}
  known["held out"] = colors.HELD_OUT
  seen = {name: _oklab(SEEN_BY[eyes] @ _linear(color)) for name, color in known.items()}
  distances = {
    pair: np.linalg.norm(seen[pair[0]] - seen[pair[1]]) for pair in itertools.combinations(known, 2)
  }
  assert min(distances.values()) > 0.07, min(distances, key=distances.get)


@pytest.mark.parametrize("color", [*colors.DISTINCT, colors.of_family("of tomorrow").color])
def test_words_in_a_color_are_read_on_white(color):
  luminance = _linear(color) @ [0.2126, 0.7152, 0.0722]
  assert 1.05 / (luminance + 0.05) > 3


def test_a_family_is_known_by_its_name_and_that_of_a_preset():
  assert colors.of_family("griffin-1b") == colors.of_family("Griffin") == colors.FAMILIES["griffin"]
  assert colors.of_family("mamba-2-370m") == colors.FAMILIES["mamba-2"]
  assert colors.of_family("mamba-370m") == colors.FAMILIES["mamba"]
  assert colors.of_family("Gated DeltaNet") == colors.FAMILIES["gated-deltanet"]
  assert colors.of_family("hawkish") not in colors.FAMILIES.values()


def test_a_family_of_tomorrow_has_a_color_of_its_own():
  look = colors.of_family("xlstm")
  assert look == colors.of_family("xlstm")
  assert look.color != colors.of_family("rwkv").color
  assert look.color not in {known.color for known in colors.FAMILIES.values()}


def test_runs_have_the_color_of_their_family_and_no_two_the_same():
  names = ["hawk-1b", "griffin-1b", "griffin-400m", "smoke"]
  found = colors.of_runs(names)
  assert found[:2] == [colors.FAMILIES[name].color for name in ("hawk", "griffin")]
  assert len(set(found)) == 4
  assert colors.of_runs(["smoke"]) == [colors.DISTINCT[0]]
  assert colors.of_runs(["same"] * 8) == list(colors.DISTINCT)


def test_things_in_an_order_go_from_dark_to_light():
  ramp = [_linear(colors.in_order(index, 9)) @ [0.2126, 0.7152, 0.0722] for index in range(9)]
  assert ramp == sorted(ramp)
