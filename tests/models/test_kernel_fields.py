"""Fields that name kernels are found, resolved and set by their mark, in any config."""

import dataclasses

import pytest

from kernels import dispatch
from models import kernel_fields
from models.griffin import griffin
from models.kernel_fields import KernelField, kernel_field

_SIZES = {"vocab_size": 16, "width": 8, "rnn_width": 16, "num_blocks": 3, "num_heads": 2}
_MODEL = griffin(**_SIZES, head_size=4, window=4, mlp_width=24)


@dataclasses.dataclass(frozen=True)
class _Mean:
  """The config of an unknown mixer, with two fields of one op."""

  size: int = 3
  forward: str = kernel_field("mean")
  backward: str = kernel_field("mean")

  def kernels(self, dtype: str) -> dict[str, str]:
    return {
      field: f"{field} of {dtype}" if name == "auto" else name
      for field, name in (("forward", self.forward), ("backward", self.backward))
    }


def test_fields_are_found_by_their_mark_in_whatever_holds_them():
  config = ({"not": "a config"}, (_Mean(forward="loop"), 3))
  assert list(kernel_fields.marked(config)) == [
    KernelField("[1][0].forward", "mean", "loop"),
    KernelField("[1][0].backward", "mean", "auto"),
  ]


def test_auto_is_resolved_by_the_config_and_a_name_is_kept():
  config = (_Mean(forward="loop"), 3)
  assert kernel_fields.resolved(config, "float32") == (
    _Mean(forward="loop", backward="backward of float32"),
    3,
  )
  assert kernel_fields.with_kernels(config, {"mean": "loop", "other": "x"}) == (
    _Mean(forward="loop", backward="loop"),
    3,
  )
  assert kernel_fields.without_kernels(config) == (_Mean(), 3)


def test_a_config_that_does_not_resolve_what_it_marks_is_an_error_that_says_so():
  @dataclasses.dataclass
  class Unresolved:
    scan: str = kernel_field("scan")

  class Incomplete(_Mean):
    def kernels(self, dtype: str) -> dict[str, str]:
      return {"forward": "loop"}

  with pytest.raises(TypeError, match=r"Unresolved has kernel fields \['scan'\] and no method ker"):
    kernel_fields.resolved(Unresolved(), "float32")
  with pytest.raises(TypeError, match=r"Incomplete: kernels\(\) resolves .*, but the kernel fi"):
    kernel_fields.resolved((Incomplete(),), "float32")


def test_a_model_says_which_kernels_it_runs_on_a_platform():
  with dispatch.targeting("tpu"):
    assert _MODEL.kernels() == {
      "rg_lru": "pallas_tpu",
      "block_diagonal": "pallas_tpu",
      "causal_conv": "pallas_tpu",
      "local_attention": "banded",  # the TPU's kernel does not support a head size of 4
    }
  with dispatch.targeting("cpu"):
    named = _MODEL.resolved()
    assert named.kernels()["rg_lru"] == "reference"
  assert kernel_fields.without_kernels(named) == _MODEL
  with dispatch.targeting("tpu"):
    assert named.resolved() == named
    one = kernel_fields.with_kernels(_MODEL, {"rg_lru": "chunked"})
    assert one.kernels() == {**_MODEL.kernels(), "rg_lru": "chunked"}
