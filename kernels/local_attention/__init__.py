"""Causal attention within documents and a window: many query heads, one or more key-value heads.

  o_BTNH = local_attention(q_BTNH, k_BSEH, v_BSEH, q_documents_BT, k_documents_BS, window=1024,
                           implementation="auto")

E divides N: query head n uses key-value head n // (N / E). E = 1 is multi-query attention, E = N
multi-head attention; no implementation makes a copy of k or v for each query head.

Keys and queries are aligned at the end: query t is at the place of key S - T + t, and the first
S - T keys belong to an earlier chunk of a split row. Query t sees key s if both have the same
document number and

  0 <= (S - T + t) - s <= window

so it sees itself and `window` keys before it: window + 1 in all. `window=None` lets it see every
earlier key of its document. Logits are scaled by H^-0.5; logits and softmax are float32, the result
has the dtype of q. What a query does not see has a weight of exactly 0. The backward pass
recomputes the weights: kept are q, k, v, the output and one number per query and head.

  reference   the whole T x S matrix, as the definition reads
  banded      one block of queries at a time against the keys that it can reach, or against all keys
              with window=None: O(T x window) time, and logits of one block alone in memory
  splash_tpu  the same in JAX's TPU kernels, logits in VMEM; head sizes that are multiples of 128.
              Fewer than 128 queries do not fill a block: such a call (a decoding step, the end of a
              prompt) is computed as banded says, by its shape alone
  pallas_gpu  the same in Triton kernels for Hopper and Ampere; head sizes 16, 32, 64, 128 and 256

"auto" is splash_tpu on TPU and pallas_gpu on NVIDIA's GPUs from Ampere on, for the head sizes that
they support. Otherwise, on other GPUs, and on CPU it is banded. The kernels run on whole arrays, or
inside jax.shard_map with check_vma=False (`tracks_varying`). splash_tpu lowers for TPU alone;
pallas_gpu is interpreted, slowly, on CPU.

cuDNN's attention (jax.nn.dot_product_attention) is not among them. It has a causal window, but it
takes documents only as lengths, with a fixed number of documents per row (one on GPUs before
Hopper), or as a mask of T x S. Here a row has any number of documents.
"""

import functools

import jax
from absl import logging

from kernels import dispatch, shapes
from kernels.local_attention import banded, pallas_gpu, reference, splash_tpu
from kernels.varying import varying_alike

_ATTENTIONS = {
  "reference": reference.attention,
  "banded": banded.attention,
  "splash_tpu": splash_tpu.attention,
  "pallas_gpu": pallas_gpu.attention,
}
IMPLEMENTATIONS = tuple(_ATTENTIONS)
_DEFAULTS = {"cpu": "banded", "gpu": "pallas_gpu", "tpu": "splash_tpu"}


def resolve(requested: str, *, head_size: int) -> str:
  """The implementation that `requested` stands for on this platform; see kernels/dispatch.py.

  ValueError for a kernel that is asked for by name and does not support the head size.
  """
  fits_splash = head_size % splash_tpu.LANES == 0
  fits_gpu = head_size in pallas_gpu.HEAD_SIZES
  if requested == "splash_tpu" and not fits_splash:
    raise ValueError(
      "local_attention: splash_tpu needs a head size that is a multiple of "
      f"{splash_tpu.LANES}, not {head_size}; name reference, banded or auto"
    )
  if requested == "pallas_gpu" and not fits_gpu:
    raise ValueError(
      f"local_attention: pallas_gpu needs a head size of {pallas_gpu.HEAD_SIZES}, not {head_size}; "
      "name reference, banded or auto"
    )
  fits = {"cpu": True, "gpu": fits_gpu, "tpu": fits_splash}
  defaults = {platform: _DEFAULTS[platform] if fits[platform] else "banded" for platform in fits}
  defaults = dispatch.gpu_defaults(defaults, otherwise="banded")
  return dispatch.resolve(
    "local_attention", requested, available=IMPLEMENTATIONS, defaults=defaults
  )


def tracks_varying(implementation: str) -> bool:
  """Whether jax.shard_map can check over which axes this implementation's arrays vary."""
  return implementation in ("reference", "banded")


def local_attention(
  q_BTNH: jax.Array,
  k_BSEH: jax.Array,
  v_BSEH: jax.Array,
  q_documents_BT: jax.Array,
  k_documents_BS: jax.Array,
  *,
  window: int | None,
  implementation: str,
) -> jax.Array:
  """Attention as the module says, [batch, time, heads, head size] in the dtype of q."""
  if q_BTNH.ndim != 4 or k_BSEH.ndim != 4 or not q_BTNH.shape[1]:
    raise ValueError(
      f"local_attention: q {q_BTNH.shape} must be [batch, time, heads, head size] and k "
      f"{k_BSEH.shape} [batch, keys, key-value heads, head size], with at least one query"
    )
  batch, time, heads, head_size = q_BTNH.shape
  keys, kv_heads = k_BSEH.shape[1:3]
  if not kv_heads or heads % kv_heads:
    raise ValueError(
      f"local_attention: {heads} query heads are not divisible by {kv_heads} key-value heads"
    )
  expected = {
    "k": (k_BSEH.shape, (batch, keys, kv_heads, head_size)),
    "v": (v_BSEH.shape, (batch, keys, kv_heads, head_size)),
    "q_documents": (q_documents_BT.shape, (batch, time)),
    "k_documents": (k_documents_BS.shape, (batch, keys)),
  }
  shapes.check("local_attention", f"q {q_BTNH.shape}", expected)
  if keys < time:
    raise ValueError(
      f"local_attention: {keys} keys are fewer than the {time} queries they end with"
    )
  if window is not None and window < 1:
    raise ValueError(f"local_attention: window {window} must be at least 1, or None")
  name = resolve(implementation, head_size=head_size)
  if name == "splash_tpu" and time < splash_tpu.LANES:
    name = "banded"
    _log_few_queries(time)
  arrays = varying_alike(q_BTNH, k_BSEH, v_BSEH, q_documents_BT, k_documents_BS)
  return _ATTENTIONS[name](*arrays, window=window)


@functools.cache
def _log_few_queries(time: int) -> None:
  logging.info("local_attention: banded for %d queries, too few for a block of splash_tpu", time)
