"""The recurrence with its row split over the shards of a mesh axis: what a shard starts from.

A shard takes the state s before it to l + p s: l is its last state from zero, p the product of its
decays. The shards exchange only these pairs, [2, batch, width] in float32, in one all-gather. Over
the pairs the recurrence is a linear scan again, with one step for each shard. So a shard reads x
and a twice: once for its pair, once for its states.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from kernels.linear_scan import reference

Scan = Callable[..., tuple[jax.Array, jax.Array]]


def is_first(*, reverse: bool, axis_name: str | tuple[str, ...]) -> jax.Array:
  """Whether the recurrence begins in this shard."""
  return jax.lax.axis_index(axis_name) == (jax.lax.axis_size(axis_name) - 1 if reverse else 0)


def states_between(
  scan: Scan,
  x_BTD: jax.Array,
  a_BTD: jax.Array,
  h0_BD: jax.Array,
  *,
  reverse: bool,
  axis_name: str | tuple[str, ...],
) -> tuple[jax.Array, jax.Array]:
  """The state before this shard's tokens, and the row's last one (the same on every shard).

  Float32 [batch, width]. `h0_BD` counts on the shard where the recurrence enters the row.
  """
  start_BD = start_of_shard(h0_BD, reverse=reverse, axis_name=axis_name)
  _, last_BD = scan(x_BTD, a_BTD, start_BD, reverse=reverse)
  product_BD = jnp.prod(a_BTD.astype(jnp.float32), axis=1)
  return joined(last_BD, product_BD, h0_BD, reverse=reverse, axis_name=axis_name)


def start_of_shard(
  h0_BD: jax.Array, *, reverse: bool, axis_name: str | tuple[str, ...]
) -> jax.Array:
  """The state from which a shard's l starts: 0, or on the first shard the row's own h0.

  So no other shard needs h0.
  """
  return jnp.where(is_first(reverse=reverse, axis_name=axis_name), h0_BD, 0.0)


def joined(
  last_BD: jax.Array,
  product_BD: jax.Array,
  h0_BD: jax.Array,
  *,
  reverse: bool,
  axis_name: str | tuple[str, ...],
) -> tuple[jax.Array, jax.Array]:
  """`states_between`, from the l and p of this shard."""
  # Shards take the place of time.
  pairs_2BTD = jax.lax.all_gather(jnp.stack([last_BD, product_BD]), axis_name, axis=2)
  after_BTD, row_last_BD = reference.scan(
    pairs_2BTD[0], pairs_2BTD[1], jnp.zeros_like(last_BD), reverse=reverse
  )
  shards, index = jax.lax.axis_size(axis_name), jax.lax.axis_index(axis_name)
  neighbour = jnp.clip(index + (1 if reverse else -1), 0, shards - 1)
  before_BD = jax.lax.dynamic_index_in_dim(after_BTD, neighbour, axis=1, keepdims=False)
  starts_row = is_first(reverse=reverse, axis_name=axis_name)
  return jnp.where(starts_row, h0_BD, before_BD), row_last_BD
