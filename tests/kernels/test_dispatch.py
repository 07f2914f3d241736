"""Which implementation of a kernel runs."""

import logging

import jax
import pytest

from kernels import block_diagonal, causal_conv, dispatch, linear_scan, local_attention, rg_lru
from models import decoder
from tests import tiny
from train.state import abstract_state

_AVAILABLE = ("a", "b")


def test_auto_is_the_default_of_the_platform():
  assert (
    dispatch.resolve("kernel", "auto", available=_AVAILABLE, defaults={"cpu": "b", "tpu": "a"})
    == "b"
  )


def test_a_name_is_never_replaced():
  for name in _AVAILABLE:
    assert dispatch.resolve("kernel", name, available=_AVAILABLE, defaults={"cpu": "b"}) == name


@pytest.mark.parametrize("name", ["c", "", "AUTO", "B"])
def test_an_unknown_name_is_refused_with_those_that_are_known(name):
  with pytest.raises(ValueError, match=f"kernel: implementation '{name}' is none of a, b, auto"):
    dispatch.resolve("kernel", name, available=_AVAILABLE, defaults={"cpu": "b"})


def test_auto_without_a_default_is_refused():
  with pytest.raises(ValueError, match="no default for platform 'cpu'; name one of a, b"):
    dispatch.resolve("kernel", "auto", available=_AVAILABLE, defaults={"tpu": "a"})


def test_a_decision_is_logged_once(caplog):
  with caplog.at_level(logging.INFO, logger="absl"):
    for _ in range(3):
      dispatch.resolve("logged once", "auto", available=_AVAILABLE, defaults={"cpu": "b"})
  assert [record.getMessage() for record in caplog.records] == [
    "logged once: b, the default on cpu"
  ]


@pytest.mark.parametrize(
  ("kernel", "arguments"),
  [
    (linear_scan, {}),
    (rg_lru, {}),
    (block_diagonal, {}),
    (causal_conv, {}),
    (local_attention, {"head_size": 128}),
  ],
)
def test_every_default_is_an_implementation(kernel, arguments):
  assert set(kernel._DEFAULTS) == {"cpu", "gpu", "tpu"}
  assert set(kernel._DEFAULTS.values()) <= set(kernel.IMPLEMENTATIONS)
  for name in kernel.IMPLEMENTATIONS:
    assert kernel.resolve(name, **arguments) == name


def test_a_state_for_another_platform_asks_for_no_kernel_of_this_one(caplog, tmp_path):
  """A plan for a TPU logged the kernels of a CPU, where its state was traced."""
  run = tiny.run(tmp_path)
  with dispatch.targeting("tpu"):
    model = decoder.build(run.model)
  tx = run.optimizer.build(total_steps=run.total_steps, decay_mask=model.decays)
  dispatch._log_once.cache_clear()
  with caplog.at_level(logging.INFO, logger="absl"):
    state = abstract_state(model, tx)
  assert state.params == model.shapes
  assert not caplog.records


@pytest.mark.parametrize(
  ("kind", "expected"), [("TPU v3", "einsum"), ("TPU v4", "pallas_tpu"), ("", "pallas_tpu")]
)
def test_gates_on_old_tpus_are_xlas(kind, expected):
  with dispatch.targeting("tpu", device_kind=kind):
    assert block_diagonal.resolve("auto") == expected


class _Device:
  """A GPU that is not here."""

  device_kind = "some GPU"

  def __init__(self, platform_version, compute_capability):
    self.client, self.compute_capability = self, compute_capability
    self.platform_version = platform_version


@pytest.mark.parametrize(
  ("version", "capability", "is_default"),
  [
    ("PJRT C API\ncuda 13000", "8.0", True),
    ("PJRT C API\ncuda 13000", "9.0", True),
    ("PJRT C API\ncuda 12090", "12.0", True),
    ("PJRT C API\ncuda 12090", "7.5", False),
    ("PJRT C API\nrocm 60300", "gfx942", False),
  ],
)
def test_triton_kernels_are_the_default_from_ampere_on(
  monkeypatch, version, capability, is_default
):
  monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
  monkeypatch.setattr(jax, "devices", lambda: [_Device(version, capability)])
  kernels = (linear_scan, rg_lru, block_diagonal, causal_conv)
  expected = ["chunked", "chunked", "einsum", "shifts", "banded"]
  if is_default:
    expected = ["pallas_gpu"] * 5
  resolved = [kernel.resolve("auto") for kernel in kernels]
  assert [*resolved, local_attention.resolve("auto", head_size=128)] == expected
  # Tensor cores have no float32.
  expected = "einsum_rounded" if is_default else "einsum"
  assert block_diagonal.resolve("auto", itemsize=4) == expected
  assert local_attention.resolve("auto", head_size=96) == "banded"


def test_a_gpu_that_is_planned_for_runs_triton_kernels():
  with dispatch.targeting("gpu"):
    assert rg_lru.resolve("auto") == "pallas_gpu"
    assert local_attention.resolve("auto", head_size=256) == "pallas_gpu"
    assert local_attention.resolve("auto", head_size=192) == "banded"
  assert rg_lru.resolve("auto") == "reference"
