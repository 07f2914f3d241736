"""The token embedding, the unembedding, and whole logits, as for sampling."""

from typing import cast

import jax
import jax.numpy as jnp
from flax import nnx

from kernels.varying import varying_alike
from models.param import normal, param
from sharding import logical


class Embedding(nnx.Module):
  """Tokens to vectors by a [vocab_size, width] table, normal with variance 1 / width."""

  def __init__(self, vocab_size: int, width: int, *, rngs: nnx.Rngs):
    self.table_VD = param(
      normal(1.0 / width), (vocab_size, width), ("vocab", "embed"), decays=False, rngs=rngs
    )

  def __call__(self, tokens_BT: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """The tokens' rows of the table, in `dtype`."""
    with jax.named_scope("embedding"):
      lookup = logical.on_shards(
        _lookup, in_axes=(("vocab", None), ("batch", "time")), out_axes=("batch", "time", "width")
      )
      return lookup(self.table_VD[...].astype(dtype), tokens_BT)


class Unembedding(nnx.Module):
  """A separate table [vocab_size, width] for the logits, initialized as Embedding's. Weight decay
  applies to it, unlike Embedding's: it is the matrix of a product."""

  def __init__(self, vocab_size: int, width: int, *, rngs: nnx.Rngs):
    self.table_VD = param(normal(1.0 / width), (vocab_size, width), ("vocab", "embed"), rngs=rngs)


def _lookup(table_VD: jax.Array, tokens_BT: jax.Array) -> jax.Array:
  """Each shard looks up the tokens of its part of the vocabulary; the results are summed over
  shards."""
  axis = logical.mesh_axis("vocab")
  if axis is None:
    return _rows(table_VD, tokens_BT)
  shard_size = table_VD.shape[0]
  local_BT = tokens_BT - jax.lax.axis_index(axis) * shard_size
  is_here_BT1 = ((local_BT >= 0) & (local_BT < shard_size))[..., None]
  rows_BTD = _rows(table_VD, jnp.clip(local_BT, 0, shard_size - 1))
  return jax.lax.psum(jnp.where(is_here_BT1, rows_BTD, 0), axis)


def _rows(table_VD: jax.Array, tokens_BT: jax.Array) -> jax.Array:
  """table[tokens]. A frequent token's gradient is a sum of thousands: float32, rounded once."""
  return cast(jax.Array, _take(*varying_alike(table_VD, tokens_BT)))


@jax.custom_vjp
def _take(table_VD, tokens_BT):
  return table_VD[tokens_BT]


def _take_forward(table_VD, tokens_BT):
  return table_VD[tokens_BT], (table_VD, tokens_BT)


def _take_backward(kept, dx_BTD):
  table_VD, tokens_BT = kept
  sums_VD = jnp.zeros_like(table_VD, jnp.float32).at[tokens_BT].add(dx_BTD.astype(jnp.float32))
  return sums_VD.astype(table_VD.dtype), None


_take.defvjp(_take_forward, _take_backward)


def cap_logits(x_BTD: jax.Array, unembed_VD: jax.Array, logit_cap: float | None) -> jax.Array:
  """Float32 logits [batch, time, vocabulary], c tanh(logits / c) where a cap c is given."""
  logits_BTV = jnp.einsum("BTD,VD->BTV", x_BTD, unembed_VD, preferred_element_type=jnp.float32)
  return logits_BTV if logit_cap is None else logit_cap * jnp.tanh(logits_BTV / logit_cap)
