"""What a recurrent block costs (models/costs.py), from the sizes and kernels of its config."""

from models.costs import FlopsPart, LayerActivations, LeastTokens, Sends, Sent, Shard

SCOPES = ("recurrent", "gates", "conv", "scan")

_FLOAT32 = _INT32 = 4
# Gate nonlinearities, decay, input scale and the step itself, for each channel (arXiv:2402.19427).
_ELEMENTWISE_PER_CHANNEL = 20
# Implementations that form gates and decays in HBM, with float32 arrays of width R.
_UNFUSED = ("reference", "associative", "chunked")
# Float32 arrays of the recurrence's width alive at the peak of a block's backward pass, found by
# compiling for TPU; docs/plans.jsonl has the errors that are left.
_UNFUSED_WORKING = 15
_FUSED_WORKING = 11


def flops(width: int, *, rnn_width: int, gate_width: int, conv_taps: int) -> tuple[FlopsPart, ...]:
  """Linear layers, gates and convolution; separately the elementwise recurrence."""
  out = 2.0 * width * rnn_width
  gates = 2.0 * 2 * rnn_width * gate_width
  conv = 2.0 * conv_taps * rnn_width
  return (
    FlopsPart(
      name="recurrent_matmul",
      words="recurrent blocks",
      flops=3 * out + gates + conv,
      batched=gates,
      last=out,
    ),
    FlopsPart(
      name="recurrence",
      words="recurrence, elementwise",
      flops=float(_ELEMENTWISE_PER_CHANNEL * rnn_width),
      kind="elementwise",
    ),
  )


def least_tokens_per_shard(conv_taps: int) -> LeastTokens:
  return LeastTokens(conv_taps - 1, "the convolution takes from the device before")


def activations(
  width: int, shard: Shard, *, rnn_width: int, scan: str, gates: str, conv: str
) -> LayerActivations:
  """in: D -> 2 R; conv: R -> R; gates: R -> 2 R; RG-LRU; gelu x h: 2 R -> R; out: R -> D.

  Fused, the RG-LRU reads x and two gates and writes h. Otherwise the gates are float32, and decays
  (float32) and inputs are written by one pass and read by the scan. A shard of a row scans twice:
  for what it sends to the others, and from what it receives. Not counted: what XLA for TPU copies
  around gates that are "einsum" (kernels/block_diagonal). Of unrolled blocks, remat "none" keeps
  the outputs of the Triton kernels of gates and convolution.
  """
  a, r = shard.itemsize, rnn_width / shard.tensor
  is_fused = scan not in _UNFUSED
  gates_bytes = 2 * r * (a if is_fused else _FLOAT32)
  rg = a * 2 * r + gates_bytes
  if not is_fused:
    rg += 2 * r * (a + _FLOAT32)
  if shard.sequence > 1:
    rg *= 2
  elementwise = a * (2 * r + 3 * r) + rg
  kept = 1
  if shard.is_unrolled:
    kept += 2 * (gates == "pallas_gpu") + (conv != "shifts")
  return LayerActivations(
    products=a * (2 * r + width),
    batched=a * kept * r,
    forward=a * (2 * width + 4 * r) + gates_bytes + elementwise,
    elementwise=elementwise,
    working=_FLOAT32 * r * (_FUSED_WORKING if is_fused else _UNFUSED_WORKING),
  )


def sends(shard: Shard, *, rnn_width: int, conv_taps: int, scan: str) -> Sends:
  """Once for all layers: the documents for the convolution's halo. For each layer: every shard's
  product of decays and last state for a scan, the convolution's halo, and for an unfused scan the
  decay that the gradient needs at the border between shards."""
  width, taps = rnn_width / shard.tensor, conv_taps - 1
  # Forward and backward; again, unless states are kept. The convolution is never kept.
  scans = 2 if shard.remat == "none" else 3
  pairs = shard.sequence * 2 * shard.rows * width * _FLOAT32
  halo = shard.rows * taps * width * shard.itemsize
  each = [
    Sent("all-gather", "sequence", scans, scans * pairs),
    Sent("collective-permute", "sequence", 3, 3 * halo),
  ]
  if scan in _UNFUSED:
    each.append(Sent("collective-permute", "sequence", 1, shard.rows * width * _FLOAT32))
  documents = Sent("collective-permute", "sequence", 1, shard.rows * taps * _INT32)
  return Sends(once=(documents,), each=tuple(each))
