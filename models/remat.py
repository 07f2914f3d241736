"""Which values the forward pass of a block keeps for its backward pass, by their names.

A layer or a kernel names a value with jax.ad_checkpoint.checkpoint_name. The config of the layer
declares every such name, those of its kernels too, in `saved_names()`. A name that a block uses and
its config does not declare is an error when a gradient is traced; otherwise the value would be
computed again without notice.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, Literal

import jax

Remat = Literal["none", "block", "matmuls"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class SavedNames:
  """The names of a block's values, by the setting of remat that keeps them; "block" keeps none.

  matmuls   remat "matmuls" and "none"
  none      remat "none"
  unrolled  remat "none" where blocks are unrolled; a loop would copy them into arrays of all
            blocks, which costs more than to compute them again
  """

  matmuls: frozenset[str] = frozenset()
  none: frozenset[str] = frozenset()
  unrolled: frozenset[str] = frozenset()

  def __or__(self, other: "SavedNames") -> "SavedNames":
    return SavedNames(
      matmuls=self.matmuls | other.matmuls,
      none=self.none | other.none,
      unrolled=self.unrolled | other.unrolled,
    )

  @property
  def all(self) -> frozenset[str]:
    return self.matmuls | self.none | self.unrolled

  def kept(self, remat: Remat, *, is_unrolled: bool) -> frozenset[str]:
    match remat:
      case "block":
        return frozenset()
      case "matmuls":
        return self.matmuls
      case "none":
        return self.matmuls | self.none | (self.unrolled if is_unrolled else frozenset())


@functools.cache
def policy(remat: Remat, names: SavedNames, *, is_unrolled: bool) -> Callable[..., bool]:
  """The policy for jax.checkpoint of a block that declares `names`."""
  policies = jax.checkpoint_policies
  keeps = policies.nothing_saveable
  if remat != "block":
    keeps = policies.save_from_both_policies(
      policies.dots_with_no_batch_dims_saveable,  # not the gates'
      policies.save_only_these_names(*names.kept(remat, is_unrolled=is_unrolled)),
    )

  def checked(primitive: Any, *args: Any, **params: Any) -> bool:
    if primitive.name == "name" and params["name"] not in names.all:
      raise ValueError(
        f"remat: a value of a block is named {params['name']!r}, and the block's layers declare "
        f"{', '.join(sorted(names.all)) or 'none'}; add the name to saved_names() of the layer's "
        "config (models/remat.py)"
      )
    return keeps(primitive, *args, **params)

  return checked
