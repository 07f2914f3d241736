"""Remat keeps values by name, and every name is declared."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from models import decoder, residual_block
from models.decoder import DecoderConfig
from models.layers import attention, mlp, rg_lru
from models.remat import SavedNames
from tests.commands import ROOT


@dataclasses.dataclass(frozen=True)
class _Config:
  """A mixer that names a value "cube", and declares the name or not."""

  saved: SavedNames = SavedNames()

  def saved_names(self):
    return self.saved

  def build(self, width, *, num_blocks, rngs):
    return _Mixer()


class _Mixer(nnx.Module):
  def __call__(self, x_BTD, segments, state):
    return checkpoint_name(x_BTD**3, "cube") ** 2, state


def _gradient(saved: SavedNames, remat: decoder.Remat, layers="scan") -> str:
  block = residual_block.Config(mixer=_Config(saved), mlp=mlp.Config(mlp_width=6))
  sizes = {"vocab_size": 8, "width": 4, "num_blocks": 2, "pattern": (block,), "dtype": "float32"}
  model = decoder.build(DecoderConfig(**sizes, remat=remat, layers=layers))
  ones_BT = jnp.ones((1, 2), jnp.int32)

  def loss(params):
    return model.logits(params, ones_BT, ones_BT).sum()

  return str(jax.make_jaxpr(jax.grad(loss))(model.shapes))


@pytest.mark.parametrize("remat", ["none", "matmuls", "block"])
def test_a_name_that_no_layer_declares_is_an_error_that_says_where_to(remat):
  message = r"named 'cube', and the block's layers declare projection, weights; add the name to sav"
  with pytest.raises(ValueError, match=message):
    _gradient(SavedNames(), remat)


@pytest.mark.parametrize(
  ("declared", "keeping"),
  [
    ("matmuls", {("matmuls", "scan"), ("none", "scan"), ("none", "unroll"), ("matmuls", "unroll")}),
    ("none", {("none", "scan"), ("none", "unroll")}),
    ("unrolled", {("none", "unroll")}),
  ],
)
def test_a_declared_name_is_computed_again_but_where_it_is_kept(declared, keeping):
  saved = SavedNames(**{declared: frozenset({"cube"})})
  for remat in ("none", "matmuls", "block"):
    for layers in ("scan", "unroll"):
      blocks = 1 if layers == "scan" else 2
      cubes = _gradient(saved, remat, layers).count("name=cube")
      # Once forward; and where it is computed again, once more.
      assert cubes == blocks * (1 if (remat, layers) in keeping else 2), (remat, layers)


def test_every_name_in_the_sources_is_declared():
  """Also the names in kernels for other platforms, which no test differentiates under remat."""
  used = set()
  for folder in ("models", "kernels"):
    for path in sorted((ROOT / folder).rglob("*.py")):
      used |= set(re.findall(r"checkpoint_name(?:\(.*,|=)\s*\"(\w+)\"", path.read_text()))
  configs = (
    rg_lru.Config(rnn_width=16),
    attention.Config(num_heads=1, head_size=4, window=None),
    mlp.Config(mlp_width=1),
  )
  declared = SavedNames()
  for config in configs:
    declared |= config.saved_names()
  assert used == declared.all
