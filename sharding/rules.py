"""Which dimension is split over which mesh axis: the tables, and nothing else.

Tensor parallelism (Megatron) is the same in all of them: heads, MLP, recurrence, gate blocks and
vocabulary are split over `tensor`. So are the weights of several key-value heads where `tensor`
divides their number; else, as those of one alone, they are whole on every device.

Of activations, rows are split over `data` and `fsdp`, their time over `sequence`; no parameter,
gradient or moment is split over `sequence`.

ZeRO splits the state over `fsdp`: stage 1 the optimizer's moments, stage 2 gradients too, stage 3
parameters too. It takes the "embed" dimension of matrices and the "gate_in" dimension of the gates.
Parameters with neither stay whole over `fsdp`: norms, biases, decay and convolution, about 23 x
width of the 13 x width^2 numbers of a block (0.2% at width 1024). "gate_in" is rnn_width / 16 (64
to 512 in the published sizes), which a large `fsdp` does not always divide; then the gates, about
1% of the parameters, stay whole as well.
"""

from sharding.logical import IfDivisible, Rules, Table

_TENSOR: Table = {
  "vocab": "tensor",
  "mlp": "tensor",
  "heads": "tensor",
  "kv_heads": IfDivisible("tensor"),
  "rnn": "tensor",
  "gate_block": "tensor",
  "embed": None,
  "gate_in": None,
  "gate_out": None,
  "head": None,
  "branch": None,
  "tap": None,
  "norm": None,
  "layers": None,
}
_TENSOR_AND_FSDP: Table = {**_TENSOR, "embed": "fsdp", "gate_in": IfDivisible("fsdp")}

_ACTIVATIONS: Table = {
  "batch": ("data", "fsdp"),
  "time": "sequence",
  "width": None,
  "mlp": "tensor",
  "heads": "tensor",
  "head": None,
  "rnn": "tensor",
  "gate_block": "tensor",
  "vocab": "tensor",
}

ZERO1 = Rules(
  parameters=_TENSOR,
  compute=_TENSOR,
  gradients=_TENSOR,
  moments=_TENSOR_AND_FSDP,
  activations=_ACTIVATIONS,
)
ZERO2 = Rules(
  parameters=_TENSOR,
  compute=_TENSOR,
  gradients=_TENSOR_AND_FSDP,
  moments=_TENSOR_AND_FSDP,
  activations=_ACTIVATIONS,
)
ZERO3 = Rules(
  parameters=_TENSOR_AND_FSDP,
  compute=_TENSOR,
  gradients=_TENSOR_AND_FSDP,
  moments=_TENSOR_AND_FSDP,
  activations=_ACTIVATIONS,
)


def check_tensor_degree(degree: int, *, sizes: dict[str, int]) -> None:
  """Raises unless `degree` divides every size, naming those it does not and the degrees that do.

  `sizes` is what tensor parallelism splits, by the name a user knows it by: num_heads, gate blocks,
  rnn_width, mlp_width, vocab_size.
  """
  wrong = [f"{name} {size}" for name, size in sizes.items() if degree < 1 or size % degree]
  if wrong:
    smallest = min(sizes.values())
    degrees = [
      candidate
      for candidate in range(1, smallest + 1)
      if all(size % candidate == 0 for size in sizes.values())
    ]
    raise ValueError(
      f"tensor degree {degree} does not divide {', '.join(wrong)}; degrees that work: "
      f"{', '.join(map(str, degrees))}"
    )
