"""Softmax cross-entropy over a large vocabulary, in chunks of it: the logits are never whole.

  log_z_BT, target_logit_BT = log_z_and_target_logit(x_BTD, unembed_VD, targets_BT, logit_cap=None)

log_z = log sum_v exp(logit_v) and the target's logit, both float32; their difference is the loss,
and log_z^2 the z-loss. Products take the dtype of x, to which the unembedding is rounded chunk by
chunk, and are summed in float32. The backward pass forms the logits again, chunk by chunk: it keeps
x, the unembedding and log_z. A target outside of the vocabulary has a logit of 0 and no gradient.

Inside `jax.shard_map` with the vocabulary split over `axis_name`, `unembed_VD` is a device's own
[V / shards, D] and targets are global ids; two small all-reduces make log_z and the target's logit.
"""

import functools
from typing import cast

import jax
import jax.numpy as jnp

from kernels import dispatch
from kernels.varying import varying_alike

# A vocabulary of this many entries is one chunk; of a larger one never more than a quarter is.
_LEAST_CHUNK = 1024
# Entries of a chunk on GPUs. Every chunk adds to the float32 gradient of all hidden states, 8 D
# bytes of a token, which take as long there as the products of 400 entries.
_GPU_CHUNK = 4096
# Logits of a chunk, unless that is the least chunk: 16 MiB in float32.
_MAX_LOGITS = 1 << 22


def log_z_and_target_logit(
  x_BTD: jax.Array,
  unembed_VD: jax.Array,
  targets_BT: jax.Array,
  *,
  logit_cap: float | None,
  chunk: int | None = None,
  axis_name: str | tuple[str, ...] | None = None,
) -> tuple[jax.Array, jax.Array]:
  """log Z and the target's logit of every token, float32 [batch, time].

  `logit_cap` c makes logits c tanh(logits / c). `chunk` is the number of vocabulary entries at a
  time; by default as many as keep a chunk's logits within 16 MiB, at least 1024 (4096 on GPUs) and,
  beyond 1024, at most a quarter of the vocabulary.
  """
  is_of_rank = (x_BTD.ndim, unembed_VD.ndim) == (3, 2)
  if (
    not is_of_rank or x_BTD.shape[:2] != targets_BT.shape or x_BTD.shape[-1] != unembed_VD.shape[-1]
  ):
    raise ValueError(
      f"cross_entropy: x {x_BTD.shape}, unembedding {unembed_VD.shape} and targets "
      f"{targets_BT.shape} do not fit as [B, T, D], [V, D], [B, T]"
    )
  if not targets_BT.size:
    raise ValueError(f"cross_entropy: targets {targets_BT.shape} are none; give at least one")
  vocab_size = unembed_VD.shape[0]
  if chunk is None:
    chunk = _default_chunk(vocab_size, targets_BT.size)
  if chunk < 1:
    raise ValueError(f"cross_entropy: chunk {chunk} must be at least 1, or None")
  chunk = min(chunk, vocab_size)
  if axis_name is not None:
    targets_BT = targets_BT - jax.lax.axis_index(axis_name) * vocab_size
  arrays = varying_alike(x_BTD, unembed_VD, targets_BT)
  log_z_BT, target_logit_BT = cast(tuple[jax.Array, jax.Array], _chunked(*arrays, logit_cap, chunk))
  if axis_name is None:
    return log_z_BT, target_logit_BT
  # The largest log Z of all shards needs no gradient: it cancels.
  largest_BT = jax.lax.pmax(jax.lax.stop_gradient(log_z_BT), axis_name)
  sum_BT = jax.lax.psum(jnp.exp(log_z_BT - largest_BT), axis_name)
  return largest_BT + jnp.log(sum_BT), jax.lax.psum(target_logit_BT, axis_name)


def _default_chunk(vocab_size: int, num_tokens: int) -> int:
  wanted = _MAX_LOGITS // num_tokens
  if dispatch.target_platform() == "gpu":
    wanted = max(wanted, _GPU_CHUNK)
  most = max(_LEAST_CHUNK, min(wanted, vocab_size // 4))
  if vocab_size <= most:
    return vocab_size
  # Equal chunks, so that there is little padding, of whole tiles of 128.
  num_chunks = -(-vocab_size // most)
  return min(most, -(-vocab_size // (num_chunks * 128)) * 128)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def _chunked(x_BTD, unembed_VD, targets_BT, logit_cap, chunk):
  return _forward_only(x_BTD, unembed_VD, targets_BT, logit_cap, chunk)


def _forward_only(x_BTD, unembed_VD, targets_BT, logit_cap, chunk):
  def one_chunk(carry, inputs):
    largest_BT, sum_BT, target_BT = carry
    logits_BTC, _, is_target_BTC = _logits(x_BTD, targets_BT, inputs, unembed_VD, logit_cap)
    new_BT = jnp.maximum(largest_BT, jnp.max(logits_BTC, axis=-1))
    sum_BT = sum_BT * jnp.exp(largest_BT - new_BT)
    sum_BT += jnp.sum(jnp.exp(logits_BTC - new_BT[..., None]), axis=-1)
    target_BT += jnp.sum(jnp.where(is_target_BTC, logits_BTC, 0.0), axis=-1)
    return (new_BT, sum_BT, target_BT), None

  # From x, to vary over the same mesh axes; finite, as -inf minus -inf would be no number.
  zeros_BT = jnp.zeros_like(x_BTD[..., 0], jnp.float32)
  carry = (zeros_BT - 1e30, zeros_BT, zeros_BT)
  (largest_BT, sum_BT, target_BT), _ = _over_chunks(one_chunk, carry, unembed_VD, chunk)
  return largest_BT + jnp.log(sum_BT), target_BT


def _forward(x_BTD, unembed_VD, targets_BT, logit_cap, chunk):
  log_z_BT, target_BT = _forward_only(x_BTD, unembed_VD, targets_BT, logit_cap, chunk)
  return (log_z_BT, target_BT), (x_BTD, unembed_VD, targets_BT, log_z_BT)


def _backward(logit_cap, chunk, residuals, cotangents):
  x_BTD, unembed_VD, targets_BT, log_z_BT = residuals
  dlog_z_BT1, dtarget_BT1 = (cotangent[..., None] for cotangent in cotangents)

  def one_chunk(dx_BTD, inputs):
    embed_CD, _ = inputs
    logits_BTC, slope_BTC, is_target_BTC = _logits(x_BTD, targets_BT, inputs, unembed_VD, logit_cap)
    dlogits_BTC = dlog_z_BT1 * jnp.exp(logits_BTC - log_z_BT[..., None])
    dlogits_BTC += jnp.where(is_target_BTC, dtarget_BT1, 0.0)
    dlogits_BTC = (dlogits_BTC * slope_BTC).astype(x_BTD.dtype)
    product = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)
    dx_BTD += product("BTC,CD->BTD", dlogits_BTC, embed_CD.astype(x_BTD.dtype))
    return dx_BTD, product("BTC,BTD->CD", dlogits_BTC, x_BTD).astype(unembed_VD.dtype)

  dx_BTD, dunembed_VD = _over_chunks(
    one_chunk, jnp.zeros_like(x_BTD, jnp.float32), unembed_VD, chunk
  )
  return dx_BTD.astype(x_BTD.dtype), dunembed_VD, None


_chunked.defvjp(_forward, _backward)


def _over_chunks(one_chunk, carry, unembed_VD, chunk):
  """Scans over the vocabulary and joins the chunks' outputs along it. One chunk: no loop."""
  vocab_size, width = unembed_VD.shape
  if chunk == vocab_size:
    return one_chunk(carry, (unembed_VD, 0))
  num_chunks = -(-vocab_size // chunk)
  padded_VD = jnp.pad(unembed_VD, ((0, num_chunks * chunk - vocab_size), (0, 0)))
  starts = jnp.arange(num_chunks) * chunk
  carry, outputs = jax.lax.scan(
    one_chunk, carry, (padded_VD.reshape(num_chunks, chunk, width), starts)
  )
  return carry, None if outputs is None else outputs.reshape(-1, width)[:vocab_size]


def _logits(x_BTD, targets_BT, inputs, unembed_VD, logit_cap):
  """The logits of one chunk, their derivative by the uncapped ones, and where the targets are."""
  embed_CD, start = inputs
  embed_CD = embed_CD.astype(x_BTD.dtype)
  logits_BTC = jnp.einsum("BTD,CD->BTC", x_BTD, embed_CD, preferred_element_type=jnp.float32)
  slope_BTC = jnp.float32(1.0)
  if logit_cap is not None:
    tanh_BTC = jnp.tanh(logits_BTC / logit_cap)
    logits_BTC, slope_BTC = logit_cap * tanh_BTC, 1.0 - jnp.square(tanh_BTC)
  entries_C = start + jnp.arange(embed_CD.shape[0])
  # The padding of the last chunk is not part of the vocabulary. Its numbers are those of the first
  # entries of the next shard, which may be targets.
  is_entry_C = entries_C < unembed_VD.shape[0]
  logits_BTC = jnp.where(is_entry_C, logits_BTC, -1e30)
  return logits_BTC, slope_BTC, is_entry_C & (targets_BT[..., None] == entries_C)
