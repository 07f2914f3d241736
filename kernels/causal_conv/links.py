"""Which taps of a token belong to its document, as the bits of a word for each token."""

import jax
import jax.numpy as jnp


def link_words(
  same: list[jax.Array], shape: tuple[int, ...], kernel: str, most_taps: int
) -> jax.Array:
  """[batch, time] int32: bit d of a token's word is `same[d - 1]`, whether the token d before it
  belongs to the same document. ValueError for more taps than an implementation takes."""
  if len(same) >= most_taps:
    raise ValueError(
      f"causal_conv: {len(same) + 1} taps are more than the {most_taps} of {kernel}; use fewer, or "
      "implementation shifts"
    )
  bits = [jnp.where(same_BT, 1 << distance, 0) for distance, same_BT in enumerate(same, start=1)]
  return sum(bits, jnp.zeros(shape[:2], jnp.int32))
