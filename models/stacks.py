"""Each block's own parameters, out of the stacks of equal blocks that a decoder has, and back."""

import itertools

import jax
import jax.numpy as jnp

from models.block import BlockConfig
from models.decoder import DecoderConfig, Params


def split_blocks(config: DecoderConfig, params: Params) -> list[Params]:
  """Each block's own parameters, first block to last."""
  blocks = []
  num_groups, num_left = divmod(config.num_blocks, len(config.pattern))
  for tree, pattern, repeats in (
    ("groups", config.pattern, range(num_groups)),
    ("remainder", config.pattern[:num_left], [...]),
  ):
    for group in repeats:
      for name, (_, equal) in enumerate(itertools.groupby(pattern)):
        run = params[tree][f"{name}"]
        for index in range(len(list(equal))):
          place = (index,) if group is ... else (group, index)
          blocks.append(jax.tree.map(lambda leaf, place=place: leaf[place], run))
  return blocks


def join_blocks(config: DecoderConfig, blocks: list[Params]) -> Params:
  """The "groups" and "remainder" of the parameters, from each block's own: undoes split_blocks."""
  if len(blocks) != config.num_blocks:
    raise ValueError(f"join_blocks: {len(blocks)} blocks given, config has {config.num_blocks}")
  size = len(config.pattern)
  num_groups, num_left = divmod(config.num_blocks, size)

  def stack(trees: list[Params]) -> Params:
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)

  def runs(pattern: tuple[BlockConfig, ...]) -> list[range]:
    ends = list(itertools.accumulate(len(list(equal)) for _, equal in itertools.groupby(pattern)))
    return [range(start, end) for start, end in zip([0, *ends[:-1]], ends)]

  groups = {
    f"{name}": stack([stack([blocks[g * size + i] for i in run]) for g in range(num_groups)])
    for name, run in enumerate(runs(config.pattern) if num_groups else [])
  }
  left = blocks[num_groups * size :]
  remainder = {
    f"{name}": stack([left[i] for i in run])
    for name, run in enumerate(runs(config.pattern[:num_left]))
  }
  return {"groups": groups, "remainder": remainder}
