"""`python -m kernels.check` tells right kernels from wrong ones."""

import functools

import numpy as np
import pytest

from kernels import check, linear_scan, local_attention
from kernels.local_attention import splash_tpu

# A little more than one tile of channels; a head size that every attention kernel takes, and a row
# longer than the window; two tiles of tokens. Each kernel's own tests reach every branch of it.
_SHAPES = check.Shapes(
  recurrences=((2, 37, 40),), attention=((1, 261, 4, 128),), gates=(((1, 67, 64), 4),)
)


def _is_right(capsys, held=lambda case: True) -> tuple[bool, list[str]]:
  is_right = check.check(filter(held, check.cases(_SHAPES)))
  return is_right, capsys.readouterr().out.splitlines()


def test_what_runs_here_is_right(capsys):
  is_right, lines = _is_right(capsys)
  assert is_right
  assert {tuple(line.split()[:2]) for line in lines} == {
    *(("rg_lru", name) for name in ("reference", "associative", "chunked")),
    *(("linear_scan", name) for name in ("reference", "associative", "chunked")),
    ("local_attention", "reference"),
    ("local_attention", "banded"),
    ("block_diagonal", "einsum"),
    ("block_diagonal", "einsum_rounded"),
    ("causal_conv", "shifts"),
  }


@pytest.mark.parametrize(
  ("error", "said"),
  [
    (lambda y, hT: (y.at[:, -1, -1].add(1.0), hT), "WRONG: "),
    (lambda y, hT: (y.at[0, 0, 0].set(np.nan), hT), "WRONG: nan "),
    (lambda y, hT: (y[:, :-1], hT), "FAILED: "),
  ],
)
def test_a_wrong_kernel_is_named(monkeypatch, capsys, error, said):
  """One element of many, a NaN, and what does not run at all."""
  scan = linear_scan._SCANS["chunked"]
  wrong = lambda *arrays, reverse: error(*scan(*arrays, reverse=reverse))  # noqa: E731
  monkeypatch.setitem(linear_scan._SCANS, "chunked", wrong)
  is_right, lines = _is_right(
    capsys, lambda case: case.dtype == "float32" and "chunked" in case.implementations
  )
  assert not is_right
  named = [line for line in lines if "WRONG" in line or "FAILED" in line]
  assert all(said in line for line in named)
  assert {tuple(line.split()[:2]) for line in named} == {
    ("rg_lru", "chunked"),
    ("linear_scan", "chunked"),
  }


@pytest.mark.parametrize("name", ["pallas_gpu", "pallas_tpu", "splash_tpu"])
def test_accelerators_kernels_are_held_in_the_interpreter(monkeypatch, name):
  """The calls that run on a device, as far as they can be checked without one."""
  interpreter = functools.partial(splash_tpu.attention, interpret=True)
  monkeypatch.setitem(local_attention._ATTENTIONS, "splash_tpu", interpreter)
  held = [
    case
    for case in check.cases(_SHAPES)
    if name in case.implementations and case.dtype == "bfloat16" and "None" not in case.text
  ]
  assert {case.kernel for case in held} == {
    "pallas_gpu": {"rg_lru", "linear_scan", "local_attention", "block_diagonal", "causal_conv"},
    "pallas_tpu": {"rg_lru", "linear_scan", "block_diagonal", "causal_conv"},
    "splash_tpu": {"local_attention"},
  }[name]
  for case in held:
    found = check.differences(case, name, check.expected_of(case))
    assert max(found.values()) <= 1, (case.kernel, found)
