"""Activations of one block by kind: what is kept for the backward pass, what is moved through HBM.

Everything is bytes for each token of a device, with a = bytes of an activation (2 in bfloat16, as
counted below), D the model's width, F the MLP's, R the recurrence's, N x H the query heads'; F, R
and N x H are a tensor shard's own. Matrix products read their operand and write their result;
elementwise work between two of them is one pass: it reads the results before, and writes the
operand after. A kernel that an op has for itself keeps what is inside it out of HBM.
"""

import dataclasses
from collections.abc import Mapping
from typing import NamedTuple

from models.block import BlockConfig
from models.layers import attention, rg_lru

_FLOAT32 = 4
# Implementations that form gates and decays in HBM, with float32 arrays of width R.
UNFUSED_SCANS = ("reference", "associative", "chunked")
# Implementations that write logits to HBM.
_UNFUSED_ATTENTION = ("reference", "banded")
# Found by compiling for TPU; docs/plans.jsonl has the errors that are left. Arrays alive at the
# peak of a block's backward pass: of the MLP's width, of the stream's, and float32 ones of the
# recurrence's.
_MLP_WORKING = 9
_STREAM_WORKING = 6
_UNFUSED_WORKING = 15
_FUSED_WORKING = 11


@dataclasses.dataclass(frozen=True, kw_only=True)
class Activations:
  """Bytes per token and device of one block.

  saved    kept from the forward to the backward pass
  forward  moved by the forward pass; the backward pass moves twice that: it reads what the forward
           pass read and the gradient of what it wrote, and writes the gradient of what it read
  again    moved to compute again what was not kept
  working  alive at the peak of the backward pass, beside what is kept
  """

  saved: float
  forward: float
  again: float
  working: float

  @property
  def moved(self) -> float:
    return 3.0 * self.forward + self.again


class _Part(NamedTuple):
  """Half a block: the bytes of its matrix products' results, of all it moves, and of what it moves
  elementwise or inside its kernel; what it holds at once in the backward pass."""

  products: float  # results that remat "matmuls" keeps
  batched: float  # results that "none" keeps beside: attention, states, those of Triton kernels
  forward: float
  elementwise: float
  working: float


def of_block(
  block: BlockConfig,
  *,
  width: int,
  row_length: int,
  remat: str,
  tensor: int,
  sequence: int,
  itemsize: int,
  kernels: Mapping[str, str],
  is_unrolled: bool = False,
) -> Activations:
  """The activations of one block whose wide dimensions are split over `tensor` devices, and rows
  over `sequence`."""
  match block.mixer:
    case rg_lru.Config() as mixer:
      mixed = _recurrent(
        mixer, width, tensor, itemsize, kernels, splits_rows=sequence > 1, is_unrolled=is_unrolled
      )
    case attention.Config() as mixer:
      mixed = _attention(mixer, width, row_length, tensor, sequence, itemsize, kernels)
    case mixer:
      raise TypeError(f"activations: no rule for the mixer {type(mixer).__qualname__}")
  mlp = _mlp(width, block.mlp.mlp_width / tensor, itemsize)
  parts = (mixed, mlp)
  # A norm reads the stream and writes its result; the sum reads stream and branch, writes the
  # stream: 5 D for each half.
  stream = 2 * 5 * width * itemsize
  forward = stream + sum(part.forward for part in parts)
  elementwise = stream + sum(part.elementwise for part in parts)
  kept = width * itemsize  # the block's input
  match remat:
    case "block":
      saved, again = kept, forward
    case "matmuls":
      saved = kept + sum(part.products for part in parts)
      again = elementwise
    case _:
      saved = kept + sum(part.products + part.batched for part in parts)
      again = elementwise
  working = _STREAM_WORKING * width * itemsize + sum(part.working for part in parts)
  return Activations(saved=saved, forward=forward, again=again, working=working)


def _mlp(width: int, mlp_width: float, itemsize: int) -> _Part:
  """up: reads D, writes 2 F; gelu x up: reads 2 F, writes F; down: reads F, writes D."""
  a = itemsize
  return _Part(
    products=a * (2 * mlp_width + width),
    batched=0.0,
    forward=a * (2 * width + 6 * mlp_width),
    elementwise=a * 3 * mlp_width,
    working=a * _MLP_WORKING * mlp_width,
  )


def _recurrent(
  mixer: rg_lru.Config,
  width: int,
  tensor: int,
  itemsize: int,
  kernels: Mapping[str, str],
  *,
  splits_rows: bool,
  is_unrolled: bool,
) -> _Part:
  """in: D -> 2 R; conv: R -> R; gates: R -> 2 R; RG-LRU; gelu x h: 2 R -> R; out: R -> D.

  Fused, the RG-LRU reads x and two gates and writes h. Otherwise the gates are float32, and decays
  (float32) and inputs are written by one pass and read by the scan. A shard of a row scans twice:
  for what it tells the others, and from what they tell it. Not counted: what XLA for TPU copies
  around gates that are "einsum" (kernels/block_diagonal). Of blocks written out, remat "none" keeps
  what the Triton kernels of gates and convolution give out.
  """
  a, r = itemsize, mixer.rnn_width / tensor
  is_fused = kernels["rg_lru"] not in UNFUSED_SCANS
  gates = 2 * r * (a if is_fused else _FLOAT32)
  rg = a * 2 * r + gates
  if not is_fused:
    rg += 2 * r * (a + _FLOAT32)
  if splits_rows:
    rg *= 2
  elementwise = a * (2 * r + 3 * r) + rg
  kept = 1
  if is_unrolled:
    kept += 2 * (kernels["block_diagonal"] == "pallas_gpu") + (kernels["causal_conv"] != "shifts")
  return _Part(
    products=a * (2 * r + width),
    batched=a * kept * r,
    forward=a * (2 * width + 4 * r) + gates + elementwise,
    elementwise=elementwise,
    working=_FLOAT32 * r * (_FUSED_WORKING if is_fused else _UNFUSED_WORKING),
  )


def _attention(
  mixer: attention.Config,
  width: int,
  row_length: int,
  tensor: int,
  sequence: int,
  itemsize: int,
  kernels: Mapping[str, str],
) -> _Part:
  """q: D -> N H; k and v: D -> 2 H; rotation: N H -> N H; attention: N H -> N H; out: N H -> D.

  Unfused, logits of the keys in reach are written and read in float32: once made, once normalised.
  A shard of a row holds the keys and values of all of it for global attention, and their gradients.
  """
  a, heads = itemsize, mixer.num_heads * mixer.head_size / tensor
  keys_values = 2 * mixer.head_size
  reach = row_length if mixer.window is None else min(row_length, mixer.window + 128)
  logits = 0.0
  if kernels["local_attention"] in _UNFUSED_ATTENTION:
    logits = mixer.num_heads / tensor * reach * (2 * _FLOAT32 + 2 * a)
  gathered = keys_values * sequence if mixer.window is None and sequence > 1 else 0
  elementwise = a * 2 * heads + a * 2 * heads + logits
  return _Part(
    products=a * (heads + keys_values + width),
    batched=a * heads,
    forward=a * (3 * width + 2 * heads + keys_values) + elementwise,
    elementwise=elementwise,
    working=a * (4 * heads + 2 * gathered),
  )
