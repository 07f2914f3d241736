"""The terms in which a layer's config says what the layer costs, without building it.

A layer's config answers for one layer, a block's config (models/residual_block.py) adds its layers
up, and train/planning sums over blocks, microbatches and passes. Bytes of activations are for each
token of a device. Where the answer depends on a kernel, the config must name it
(`DecoderConfig.resolved`).
"""

import dataclasses
from typing import Literal, NamedTuple


class KernelPass(NamedTuple):
  """A custom kernel of a compiled step, whose FLOPs the compiler does not know."""

  name: str  # the beginning of its name in the program
  share: float  # FLOPs of the products that it forms, over those of the forward pass
  is_backward: bool


@dataclasses.dataclass(frozen=True, kw_only=True)
class FlopsPart:
  """Forward FLOPs of one token in one part of a block; a multiply-add is 2 FLOPs.

  name        in records; parts of equal name are added up
  words       in reports
  kind        "matmul": products with weights; "attention": products of queries with keys, formed
              inside a kernel and once more in its backward pass; "elementwise": on the vector unit,
              in no total
  batched     of a "matmul", the FLOPs of batched products, whose results no remat keeps
  last        of a "matmul", the FLOPs of the layer's last product: where it is also the block's
              last, nothing needs its result a second time
  multiplied  of "attention", the FLOPs that its kernel executes, masked products too; None: `flops`
  kernels     of "attention", the kernels that may form it
  scope       of "attention", the named scope that the kernels' time is counted in
  """

  name: str
  words: str
  flops: float
  kind: Literal["matmul", "attention", "elementwise"] = "matmul"
  batched: float = 0.0
  last: float = 0.0
  multiplied: float | None = None
  kernels: tuple[KernelPass, ...] = ()
  scope: str = ""

  @property
  def executed(self) -> float:
    """What the forward pass multiplies."""
    return self.flops if self.multiplied is None else self.multiplied


class LeastTokens(NamedTuple):
  """How many tokens of a row each device must have, and the end of the sentence "fewer than the 3
  that ..."."""

  tokens: int
  reason: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shard:
  """What one device has of a step: one of `sequence` parts of each of its `rows` rows, and one of
  `tensor` parts of wide dimensions. `itemsize` is the bytes of a number of an activation."""

  rows: float
  row_length: int
  tensor: int
  sequence: int
  itemsize: int
  remat: str
  is_unrolled: bool

  @property
  def tokens(self) -> float:
    return self.rows * self.row_length / self.sequence


class LayerActivations(NamedTuple):
  """Bytes of one layer or block, for each token of a device.

  products     results of products with weights, which remat "matmuls" keeps
  batched      results that only remat "none" keeps: of attention and scans, of Triton kernels
  forward      moved through HBM by the forward pass
  elementwise  of that, moved by elementwise work or inside a kernel
  working      alive at the peak of the backward pass, beside what is kept
  """

  products: float
  batched: float
  forward: float
  elementwise: float
  working: float


class Sent(NamedTuple):
  """Equal collectives of a step over the mesh axis `axis`: how many for each microbatch, and the
  bytes of all of them for all rows."""

  kind: str
  axis: Literal["sequence", "tensor"]
  times: int
  bytes: float


class Sends(NamedTuple):
  """What shards send each other: once for all equal blocks, and for each of them."""

  once: tuple[Sent, ...] = ()
  each: tuple[Sent, ...] = ()
