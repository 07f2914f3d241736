"""The seven published sizes: Table 2 of arXiv:2402.19427; each family has an `of_size`."""

import dataclasses


@dataclasses.dataclass(frozen=True, kw_only=True)
class Size:
  """One row of the table. `num_heads` = width / 128; `tokens` is the budget of the scaling runs."""

  width: int
  rnn_width: int
  num_blocks: int
  num_heads: int
  tokens: float
  head_size: int = 128

  @property
  def mlp_width(self) -> int:
    """The expansion factor is 3 at every size."""
    return 3 * self.width


SIZES = {
  "100m": Size(width=768, rnn_width=1024, num_blocks=12, num_heads=6, tokens=1.9e9),
  "200m": Size(width=1024, rnn_width=1536, num_blocks=12, num_heads=8, tokens=3.9e9),
  "400m": Size(width=1536, rnn_width=2048, num_blocks=12, num_heads=12, tokens=7.8e9),
  # "1.3B" in the table, "1B" in the paper's text.
  "1b": Size(width=2048, rnn_width=2560, num_blocks=24, num_heads=16, tokens=25e9),
  "3b": Size(width=3072, rnn_width=4096, num_blocks=24, num_heads=24, tokens=60e9),
  "7b": Size(width=4096, rnn_width=5632, num_blocks=32, num_heads=32, tokens=132.5e9),
  # Trained as a Griffin only; the other two families at this size are ours.
  "14b": Size(width=5120, rnn_width=8192, num_blocks=40, num_heads=40, tokens=300e9),
}


def size(name: str) -> Size:
  """The row called `name`; ValueError lists the names."""
  if name not in SIZES:
    raise ValueError(f"size {name!r} is none of the published ones: {', '.join(SIZES)}")
  return SIZES[name]
