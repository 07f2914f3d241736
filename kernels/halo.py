"""Inside jax.shard_map with the time of a row split over a mesh axis: tokens of other shards.

Shard 0 holds the row's first tokens, the last shard its last ones; all shards are equally long.
"""

import jax
import jax.numpy as jnp


def tokens_before(
  x_BT: jax.Array, *, count: int, axis_name: str | tuple[str, ...], fill: int | float | bool = 0
) -> jax.Array:
  """The `count` tokens before this shard's first, [batch, count, ...]; `fill` before the row's.

  They come from as many shards as hold them, each by one collective permute of the tokens needed.
  The bytes sent do not depend on the length of the row.
  """
  time, shards = x_BT.shape[1], jax.lax.axis_size(axis_name)
  index = jax.lax.axis_index(axis_name)
  parts = []
  for distance in range(1, -(-count // time) + 1):
    length = min(time, count - (distance - 1) * time)
    part_BT = x_BT[:, time - length :]
    if distance < shards:
      pairs = [(source, source + distance) for source in range(shards - distance)]
      sent_BT = jax.lax.ppermute(part_BT, axis_name, pairs)
      part_BT = jnp.where(index >= distance, sent_BT, jnp.full_like(sent_BT, fill))
    else:
      part_BT = jnp.full_like(part_BT, fill)
    parts.insert(0, part_BT)
  return jnp.concatenate(parts, axis=1) if parts else x_BT[:, :0]


def from_neighbour(
  x: jax.Array, *, before: bool, axis_name: str | tuple[str, ...], edge: jax.Array
) -> jax.Array:
  """x of the shard before this one, or after it; `edge` where there is none."""
  shards, index = jax.lax.axis_size(axis_name), jax.lax.axis_index(axis_name)
  pairs = [(shard, shard + 1) for shard in range(shards - 1)]
  if not before:
    pairs = [(target, source) for source, target in pairs]
  is_edge = index == (0 if before else shards - 1)
  return jnp.where(is_edge, edge, jax.lax.ppermute(x, axis_name, pairs))
