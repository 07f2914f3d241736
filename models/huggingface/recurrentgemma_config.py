"""RecurrentGemma's config.json and our DecoderConfig, each from the other.

Every key is either followed, or has one value that we can follow, or has no bearing on the logits;
anything else is refused by name. transformers' own traps: intermediate_size is twice the width of
the MLP, num_attention_heads is the number of gate blocks as well, block_types is a cycle.
"""

import pathlib
from typing import Any

from models.block import BlockConfig
from models.decoder import DecoderConfig, DType
from models.layers import attention, gated_mlp, rg_lru

# What every RecurrentGemma has; another value would be another function than ours.
_FIXED = {
  "model_type": "recurrent_gemma",
  "hidden_activation": "gelu_pytorch_tanh",
  "num_key_value_heads": 1,
  "attention_bias": False,
  "attention_dropout": 0.0,
  "rms_norm_eps": 1e-6,
  "rope_theta": 10_000.0,
  "partial_rotary_factor": 0.5,
  "rope_scaling": None,
  "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5},
  "embeddings_scale_by_sqrt_dim": True,
  "tie_word_embeddings": True,
}
# Absent, transformers takes another value than ours for these.
_FIXED_AND_WRITTEN = ("model_type", "num_key_value_heads")
# Read by attention alone: without it transformers writes its defaults, other than ours.
_OF_ATTENTION = {
  "num_key_value_heads", "attention_bias", "attention_dropout",
  "rope_theta", "partial_rotary_factor", "rope_scaling", "rope_parameters",
}  # fmt: skip
_READ = {
  "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
  "head_dim", "lru_width", "conv1d_width", "attention_window_size", "logits_soft_cap",
  "block_types", "_block_types",
}  # fmt: skip
# No bearing on the logits: how it was made, initialised and is sampled from.
_IGNORED = {
  "architectures", "_name_or_path", "transformers_version", "dtype", "torch_dtype", "use_cache",
  "bos_token_id", "eos_token_id", "pad_token_id", "w_init_variance_scale",
  "final_w_init_variance_scale", "initializer_range", "max_position_embeddings",
}  # fmt: skip


def from_json(settings: dict[str, Any], *, source: pathlib.Path, dtype: DType) -> DecoderConfig:
  """The config that `settings` describe, `dtype` for matrices and activations alike.

  ValueError names the key of `source` that we cannot follow.
  """
  kinds = settings.get("block_types", settings.get("_block_types"))
  unread = _OF_ATTENTION if isinstance(kinds, list) and "attention" not in kinds else set()
  for key, value in settings.items():
    if key == "rope_parameters" and isinstance(value, dict | None):
      value = _FIXED[key] | (value or {})  # transformers fills in what is left out
    if key in _FIXED and key not in unread and value != _FIXED[key]:
      raise ValueError(f"{source}: {key} {value!r} cannot be loaded, only {_FIXED[key]!r}")
    if key not in _FIXED and key not in _READ and key not in _IGNORED:
      raise ValueError(
        f"{source}: {key} {value!r} is not a known setting of RecurrentGemma; delete it if the "
        "logits do not depend on it"
      )
  for key in _FIXED_AND_WRITTEN:
    if key not in settings and key not in unread:
      raise ValueError(f"{source}: {key} is missing; only {_FIXED[key]!r} can be loaded")

  def integer(key: str) -> int:
    value = settings.get(key)
    if type(value) is not int or value < 1:
      raise ValueError(f"{source}: {key} {value!r} must be a whole number of at least 1")
    return value

  width, num_heads = integer("hidden_size"), integer("num_attention_heads")
  if settings.get("head_dim", width // num_heads) != width // num_heads:
    raise ValueError(
      f"{source}: head_dim {settings['head_dim']!r} must be hidden_size // num_attention_heads, "
      f"{width // num_heads}"
    )
  if integer("intermediate_size") % 2:
    raise ValueError(
      f"{source}: intermediate_size {settings['intermediate_size']} must be even: it is twice the "
      "width of the MLP"
    )
  cap = settings.get("logits_soft_cap")
  if isinstance(cap, bool) or not isinstance(cap, int | float) or not 0 < cap < float("inf"):
    raise ValueError(f"{source}: logits_soft_cap {cap!r} must be a finite number above 0")

  def mixer(kind: str) -> rg_lru.Config | attention.Config:
    match kind:
      case "recurrent":
        rnn_width = width if settings.get("lru_width") is None else integer("lru_width")
        if rnn_width % num_heads:
          raise ValueError(
            f"{source}: lru_width {rnn_width} must be divisible by num_attention_heads, "
            f"{num_heads}: the gates have that many blocks"
          )
        return rg_lru.Config(
          rnn_width=rnn_width,
          num_gate_blocks=num_heads,
          conv_taps=integer("conv1d_width"),
          decay_init="recurrentgemma",
        )
      case "attention":
        if width < num_heads or width // num_heads % 4:
          raise ValueError(
            f"{source}: num_attention_heads {num_heads} makes heads of {width // num_heads} "
            f"(hidden_size {width}); only multiples of 4 can be loaded: half is rotated, in pairs"
          )
        return attention.Config(
          num_heads=num_heads,
          head_size=width // num_heads,
          window=integer("attention_window_size"),
        )
    raise ValueError(f"{source}: block_types has {kind!r}; known are 'recurrent' and 'attention'")

  if not isinstance(kinds, list) or not kinds:
    raise ValueError(f"{source}: block_types {kinds!r} must be a list of at least one kind")
  num_blocks = integer("num_hidden_layers")
  mlp = gated_mlp.Config(mlp_width=integer("intermediate_size") // 2)
  return DecoderConfig(
    vocab_size=integer("vocab_size"),
    width=width,
    num_blocks=num_blocks,
    pattern=tuple(
      BlockConfig(mixer=mixer(kind), mlp=mlp) for kind in _shortest_cycle(kinds, num_blocks)
    ),
    embedding_scale="sqrt_width",
    logit_cap=float(cap),
    dtype=dtype,
    param_dtype=dtype,
  )


def _shortest_cycle(kinds: list[str], num_blocks: int) -> list[str]:
  """`kinds`, or what it repeats where it spells out every block: that can be scanned."""
  if len(kinds) != num_blocks:
    return kinds
  return next(
    kinds[:length]
    for length in range(1, num_blocks + 1)
    if all(kind == kinds[index % length] for index, kind in enumerate(kinds))
  )


def to_json(config: DecoderConfig) -> dict[str, Any]:
  """The content of config.json; ValueError names what RecurrentGemma has no word for."""
  if config.embedding_scale != "sqrt_width":
    raise ValueError(
      f"save: embedding_scale {config.embedding_scale!r} cannot be saved: RecurrentGemma always "
      "multiplies embeddings by sqrt(width)"
    )
  if config.logit_cap is None:
    raise ValueError("save: logit_cap None cannot be saved: RecurrentGemma always caps its logits")
  mixers = [block.mixer for block in config.pattern]
  recurrent = [mixer for mixer in mixers if isinstance(mixer, rg_lru.Config)]
  local = [mixer for mixer in mixers if isinstance(mixer, attention.Config)]
  if len(recurrent) + len(local) < len(mixers):
    raise ValueError("save: only blocks of the RG-LRU and of attention can be saved")
  num_heads = _only(
    "num_gate_blocks and num_heads",
    [mixer.num_gate_blocks for mixer in recurrent] + [mixer.num_heads for mixer in local],
  )
  if config.width // num_heads < 1:
    raise ValueError(f"save: width {config.width} cannot be saved with {num_heads} gate blocks")
  for mixer in local:
    if mixer.head_size != config.width // num_heads:
      raise ValueError(
        f"save: head_size {mixer.head_size} cannot be saved: RecurrentGemma's is "
        f"width // num_heads, {config.width // num_heads}"
      )
    if mixer.window is None:
      raise ValueError(
        "save: window None (global attention) cannot be saved; RecurrentGemma's is local"
      )
  mlp_width = _only("mlp_width", [block.mlp.mlp_width for block in config.pattern])
  settings: dict[str, Any] = {key: value for key, value in _FIXED.items() if value is not None}
  settings |= {
    "architectures": ["RecurrentGemmaForCausalLM"],
    "block_types": [
      "recurrent" if isinstance(mixer, rg_lru.Config) else "attention" for mixer in mixers
    ],
    "dtype": config.param_dtype,
    "head_dim": config.width // num_heads,
    "hidden_size": config.width,
    "intermediate_size": 2 * mlp_width,
    "logits_soft_cap": float(config.logit_cap),  # transformers refuses 30 where it means 30.0
    "num_attention_heads": num_heads,
    "num_hidden_layers": config.num_blocks,
    "torch_dtype": config.param_dtype,
    "vocab_size": config.vocab_size,
  }
  if recurrent:
    settings["lru_width"] = _only("rnn_width", [mixer.rnn_width for mixer in recurrent])
    settings["conv1d_width"] = _only("conv_taps", [mixer.conv_taps for mixer in recurrent])
  if local:
    settings["attention_window_size"] = _only("window", [mixer.window for mixer in local])
  return settings


def _only(name: str, values: list[Any]) -> Any:
  """The one value that all blocks share."""
  if len(set(values)) != 1:
    raise ValueError(
      f"save: {name} must be the same in every block to be saved as RecurrentGemma; here "
      f"{sorted(set(values))}"
    )
  return values[0]
