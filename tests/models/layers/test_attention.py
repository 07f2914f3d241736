"""The settings of the attention layer: which are refused, and which parameters they make."""

import jax
import numpy as np
import pytest
from flax import nnx

from models.initial_weights import Normal
from models.layers import attention
from models.layers.rope import Rope

_WIDTH = 32


def _params(**settings):
  config = attention.Config(num_heads=4, head_size=8, window=None, **settings)
  module = config.build(_WIDTH, num_blocks=2, rngs=nnx.Rngs(0))
  return nnx.to_pure_dict(nnx.state(module, nnx.Param))


def test_several_key_value_heads_are_an_axis_of_their_own():
  shapes = jax.tree.map(lambda w: w.shape, _params(num_kv_heads=2, output_bias=False))
  assert shapes == {
    "w_q_DNH": (_WIDTH, 4, 8), "w_kv_D2EH": (_WIDTH, 2, 2, 8), "w_out_NHD": (4, 8, _WIDTH),
  }  # fmt: skip
  assert {"w_kv_D2H", "b_out_D"} <= _params().keys()


def test_weights_begin_as_the_config_says():
  for w in _params(num_kv_heads=4, output_bias=False, initial_weights=Normal(std=0.02)).values():
    # Of 1024 numbers and more: three standard errors.
    np.testing.assert_allclose(np.std(w), 0.02, rtol=3 / np.sqrt(2 * w.size))
  with pytest.raises(ValueError, match=r"std 0\.0 must be above 0"):
    Normal(std=0.0)


@pytest.mark.parametrize(
  ("settings", "message"),
  [
    ({"num_kv_heads": 3}, "num_heads 4 is not divisible by num_kv_heads 3"),
    ({"num_kv_heads": 8}, "num_heads 4 is not divisible by num_kv_heads 8"),
    ({"num_kv_heads": 0}, "num_kv_heads 0 must be at least 1"),
    ({"rope": Rope(share=0.125)}, "share 0.125 of head_size 8 is 1 dimensions"),
  ],
)
def test_settings_that_fit_no_head_are_refused(settings, message):
  with pytest.raises(ValueError, match=message):
    attention.Config(num_heads=4, head_size=8, window=None, **settings)
