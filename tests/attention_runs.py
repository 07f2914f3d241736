"""Inputs and gradients of attention, for the tests of its kernels."""

import jax
import jax.numpy as jnp
import numpy as np

from kernels import local_attention
from tests.draws import Draws


def inputs(
  *, time, size, start_probability, batch=1, history=0, heads=2, kv_heads=1, dtype="float32"
):
  """q, k, v and the documents of queries and of keys; a token begins one with that probability."""
  draws = Draws()
  q_BTNH = draws.normal(batch, time, heads, size, dtype=dtype)
  keys = (batch, history + time, kv_heads, size)
  k_BSEH, v_BSEH = (draws.normal(*keys, dtype=dtype) for _ in range(2))
  starts = np.random.default_rng(0).random((batch, history + time)) < start_probability
  documents_BS = jnp.asarray(np.cumsum(starts, axis=1), jnp.int32)
  return q_BTNH, k_BSEH, v_BSEH, documents_BS[:, history:], documents_BS


def run(implementation, arrays, window):
  """The output, and the gradients of q, k and v."""
  q, k, v, *documents = arrays
  weights = Draws(9).normal(*q.shape)

  def loss(q, k, v):
    out = local_attention.local_attention(
      q, k, v, *documents, window=window, implementation=implementation
    )
    return jnp.sum(out.astype(jnp.float32) * weights), out

  (_, out), grads = jax.jit(jax.value_and_grad(loss, (0, 1, 2), has_aux=True))(q, k, v)
  return out, *grads
