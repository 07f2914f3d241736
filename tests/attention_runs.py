"""Inputs and gradients of attention, and one property, for the tests of its kernels."""

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


def assert_unnoticed(implementation, q, k, v, *, mine, window):
  """Asserts that the document in the middle of one row, tokens `mine`, has the same bits whatever
  the documents beside it are, and that its gradient is 0 outside it."""
  time = q.shape[1]
  lengths = (mine.start, mine.stop - mine.start, time - mine.stop)
  documents = jnp.asarray(np.repeat([1, 2, 3], lengths)[None], jnp.int32)
  other = jnp.ones((time,), bool).at[mine].set(False)[None, :, None, None]
  weights = jnp.where(other, 0, Draws(9).normal(*q.shape))

  def loss(q, k, v):
    out = local_attention.local_attention(
      q, k, v, documents, documents, window=window, implementation=implementation
    )
    return jnp.sum(out * weights), out[:, mine]

  run = jax.jit(jax.value_and_grad(loss, (0, 1, 2), has_aux=True))
  (_, out), grads = run(q, k, v)
  (_, other_out), other_grads = run(
    jnp.where(other, 5 * q, q), jnp.where(other, -7 * k, k), jnp.where(other, v + 50, v)
  )
  np.testing.assert_array_equal(out, other_out)
  for grad, other_grad in zip(grads, other_grads, strict=True):
    np.testing.assert_array_equal(grad, other_grad)
    assert not np.delete(np.asarray(grad), np.r_[mine], axis=1).any()
