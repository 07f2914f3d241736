"""What each family's file gives to directory.py, and what those files share."""

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import numpy as np

from models import residual_block
from models.block import BlockConfig
from models.decoder import DecoderConfig, DType, Params

# Keys of config.json that no logit depends on, in any family: how a model was made, initialised,
# is run and sampled from.
UNUSED_KEYS = frozenset({
  "architectures", "auto_map", "_name_or_path", "transformers_version", "dtype", "torch_dtype",
  "use_cache", "bos_token_id", "eos_token_id", "pad_token_id", "initializer_range",
  "max_position_embeddings", "output_attentions", "output_hidden_states", "return_dict",
  "_attn_implementation", "attn_implementation", "_attn_implementation_autoset",
})  # fmt: skip


def residual(blocks: tuple[BlockConfig, ...]) -> list[residual_block.Config]:
  """`blocks`, all residual ones; ValueError names the config of one that is not."""
  for block in blocks:
    if not isinstance(block, residual_block.Config):
      kind = f"{type(block).__module__}.{type(block).__qualname__}"
      raise ValueError(
        f"{kind} has no Hugging Face form; the blocks that have one are residual_block.Config"
      )
  return [block for block in blocks if isinstance(block, residual_block.Config)]


class FromJson(Protocol):
  def __call__(self, settings: "Settings", *, dtype: DType) -> DecoderConfig: ...


class NameMap(NamedTuple):
  """One family's form: its config.json and its tensors' names.

  `mixers` are the config classes of the mixers that it can express. `from_json` gives the config
  that config.json describes, with `dtype` for matrices and activations alike; ValueError names the
  key that we cannot follow. `to_json` gives the keys that decide the logits; ValueError says why
  the family cannot express the config. `tensors` gives views of all arrays of a tree like the
  parameters, by the names and in the shapes of Hugging Face: loading writes into the views and
  saving reads them, so neither can forget a tensor or turn it another way than the other.
  `embedding` is the name of the embedding's.
  """

  family: str
  model_type: str
  architecture: str
  mixers: tuple[type, ...]
  from_json: FromJson
  to_json: Callable[[DecoderConfig], dict[str, Any]]
  tensors: Callable[[DecoderConfig, Params], dict[str, np.ndarray]]
  embedding: str = "model.embed_tokens.weight"


class Settings(NamedTuple):
  """The keys of a config.json; errors begin with `source`, its path."""

  values: dict[str, Any]
  source: str

  def get(self, key: str, absent: Any = None) -> Any:
    """The value of a key; `absent` too where the file has null."""
    value = self.values.get(key)
    return absent if value is None else value

  def integer(self, key: str, absent: int | None = None) -> int:
    """ValueError unless it is whole and above 0, and there, or there is a value for `absent`."""
    value = self.get(key, absent)
    if type(value) is not int or value < 1:
      raise ValueError(f"{self.source}: {key} {value!r} must be a whole number of at least 1")
    return value

  def number(self, key: str, absent: float | None = None) -> float:
    """ValueError unless it is finite and above 0, and there, or there is a value for `absent`."""
    value = self.get(key, absent)
    if isinstance(value, int | float) and value is not True and 0 < value < float("inf"):
      return float(value)
    raise ValueError(f"{self.source}: {key} {value!r} must be a finite number above 0")

  def truth(self, key: str, absent: bool) -> bool:
    """ValueError unless it is true, false or not there."""
    value = self.get(key, absent)
    if not isinstance(value, bool):
      raise ValueError(f"{self.source}: {key} {value!r} must be true or false")
    return value

  def check(self, family: str, *, fixed: dict[str, Any], read: set[str], unused: set[str]) -> None:
    """ValueError unless each key is read, unused, or has the value of `fixed`, the only one that
    the family's file can follow."""
    for key, value in self.values.items():
      if key in unused or key in UNUSED_KEYS or key in read:
        continue
      if key not in fixed:
        raise ValueError(
          f"{self.source}: {key} {value!r} is not a known setting of {family}; delete it if the "
          "logits do not depend on it"
        )
      if value != fixed[key]:
        raise ValueError(f"{self.source}: {key} {value!r} cannot be loaded, only {fixed[key]!r}")


def the_only(name: str, values: list[Any]) -> Any:
  """The one value that all blocks share; ValueError if they do not."""
  if len(set(values)) != 1:
    raise ValueError(f"{name} must be the same in every block; here {sorted(set(values))}")
  return values[0]
