"""RecurrentGemma as Hugging Face has it: its config.json and its tensors' names.

Every key of config.json is either followed, or has one value that we can follow, or has no bearing
on the logits; anything else is refused by name. transformers' own traps: intermediate_size is twice
the width of the MLP, num_attention_heads is the number of gate blocks as well, block_types is a
cycle.

Two things to know before comparing with `transformers`: it has no document masks, and where a row
is longer than the window its attention sees other keys than ours: one less in 5.23.0, all before in
4.40.2 and 4.57.1 without a cache. For T <= window both agree.
"""

from typing import Any

import numpy as np

from models import residual_block, stacks
from models.decoder import DecoderConfig, DType, Params
from models.huggingface.name_map import NameMap, Settings, residual, the_only
from models.layers import attention, mlp, rg_lru

# What every RecurrentGemma has; another value would be another function than ours.
_FIXED = {
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
# Read by attention alone: without it transformers writes its defaults, other than ours.
_OF_ATTENTION = {
  "num_key_value_heads", "attention_bias", "attention_dropout",
  "rope_theta", "partial_rotary_factor", "rope_scaling", "rope_parameters",
}  # fmt: skip
_READ = {
  "model_type", "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers",
  "num_attention_heads", "head_dim", "lru_width", "conv1d_width", "attention_window_size",
  "logits_soft_cap", "block_types", "_block_types",
}  # fmt: skip
_UNUSED = {"w_init_variance_scale", "final_w_init_variance_scale"}


def _from_json(settings: Settings, *, dtype: DType) -> DecoderConfig:
  kinds = settings.get("block_types", settings.get("_block_types"))
  if not isinstance(kinds, list) or not kinds:
    raise ValueError(
      f"{settings.source}: block_types {kinds!r} must be a list of at least one kind"
    )
  _check_fixed(settings, unread=_OF_ATTENTION if "attention" not in kinds else set())
  width, num_heads = settings.integer("hidden_size"), settings.integer("num_attention_heads")
  if settings.values.get("head_dim", width // num_heads) != width // num_heads:
    raise ValueError(
      f"{settings.source}: head_dim {settings.values['head_dim']!r} must be hidden_size // "
      f"num_attention_heads, {width // num_heads}"
    )
  if settings.integer("intermediate_size") % 2:
    raise ValueError(
      f"{settings.source}: intermediate_size {settings.integer('intermediate_size')} must be even: "
      "it is twice the width of the MLP"
    )
  num_blocks = settings.integer("num_hidden_layers")
  geglu = mlp.Config(mlp_width=settings.integer("intermediate_size") // 2)
  return DecoderConfig(
    vocab_size=settings.integer("vocab_size"),
    width=width,
    num_blocks=num_blocks,
    pattern=tuple(
      residual_block.Config(mixer=_mixer(settings, kind), mlp=geglu)
      for kind in _shortest_cycle(kinds, num_blocks)
    ),
    embedding_scale="sqrt_width",
    logit_cap=settings.number("logits_soft_cap"),
    dtype=dtype,
    param_dtype=dtype,
  )


def _check_fixed(settings: Settings, *, unread: set[str]) -> None:
  values = {key: value for key, value in settings.values.items() if key not in unread}
  rope = values.get("rope_parameters", {})
  if isinstance(rope, dict | None):  # transformers fills in what is left out
    values |= {"rope_parameters": _FIXED["rope_parameters"] | (rope or {})}
  if "num_key_value_heads" not in unread:
    # Absent, transformers takes another value than ours.
    values.setdefault("num_key_value_heads", None)
  settings._replace(values=values).check("RecurrentGemma", fixed=_FIXED, read=_READ, unused=_UNUSED)


def _mixer(settings: Settings, kind: Any) -> rg_lru.Config | attention.Config:
  width, num_heads = settings.integer("hidden_size"), settings.integer("num_attention_heads")
  match kind:
    case "recurrent":
      rnn_width = settings.integer("lru_width", absent=width)
      if rnn_width % num_heads:
        raise ValueError(
          f"{settings.source}: lru_width {rnn_width} must be divisible by num_attention_heads, "
          f"{num_heads}: the gates have that many blocks"
        )
      return rg_lru.Config(
        rnn_width=rnn_width,
        num_gate_blocks=num_heads,
        conv_taps=settings.integer("conv1d_width"),
        decay_init="recurrentgemma",
      )
    case "attention":
      if width < num_heads or width // num_heads % 4:
        raise ValueError(
          f"{settings.source}: num_attention_heads {num_heads} makes heads of "
          f"{width // num_heads} (hidden_size {width}); only multiples of 4 can be loaded: half is "
          "rotated, in pairs"
        )
      return attention.Config(
        num_heads=num_heads,
        head_size=width // num_heads,
        window=settings.integer("attention_window_size"),
      )
  raise ValueError(
    f"{settings.source}: block_types has {kind!r}; known are 'recurrent' and 'attention'"
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


def _to_json(config: DecoderConfig) -> dict[str, Any]:
  if config.embedding_scale != "sqrt_width":
    raise ValueError(
      f"embedding_scale {config.embedding_scale!r}: it always multiplies embeddings by sqrt(width)"
    )
  if config.logit_cap is None:
    raise ValueError("logit_cap None: it always caps its logits")
  pattern = residual(config.pattern)
  mixers = [block.mixer for block in pattern]
  recurrent = [mixer for mixer in mixers if isinstance(mixer, rg_lru.Config)]
  local = [mixer for mixer in mixers if isinstance(mixer, attention.Config)]
  num_heads = the_only(
    "num_gate_blocks and num_heads",
    [mixer.num_gate_blocks for mixer in recurrent] + [mixer.num_heads for mixer in local],
  )
  if config.width // num_heads < 1:
    raise ValueError(f"width {config.width}: with {num_heads} gate blocks its heads are empty")
  for mixer in local:
    if mixer.head_size != config.width // num_heads:
      raise ValueError(
        f"head_size {mixer.head_size}: its own is width // num_heads, {config.width // num_heads}"
      )
    if mixer.window is None:
      raise ValueError("window None (global attention): its own is local")
  mlps = [block.mlp for block in pattern if isinstance(block.mlp, mlp.Config)]
  if len(mlps) < len(config.pattern):
    raise ValueError("mlp: each of its blocks has a gated MLP")
  mlp_width = the_only("mlp_width", [mlp.mlp_width for mlp in mlps])
  settings: dict[str, Any] = {key: value for key, value in _FIXED.items() if value is not None}
  settings |= {
    "block_types": [
      "recurrent" if isinstance(mixer, rg_lru.Config) else "attention" for mixer in mixers
    ],
    "head_dim": config.width // num_heads,
    "hidden_size": config.width,
    "intermediate_size": 2 * mlp_width,
    "logits_soft_cap": float(config.logit_cap),  # transformers refuses 30 where it means 30.0
    "num_attention_heads": num_heads,
    "num_hidden_layers": config.num_blocks,
    "vocab_size": config.vocab_size,
  }
  if recurrent:
    settings["lru_width"] = the_only("rnn_width", [mixer.rnn_width for mixer in recurrent])
    settings["conv1d_width"] = the_only("conv_taps", [mixer.conv_taps for mixer in recurrent])
  if local:
    settings["attention_window_size"] = the_only("window", [mixer.window for mixer in local])
  return settings


def _tensors(config: DecoderConfig, params: Params) -> dict[str, np.ndarray]:
  views = {
    "model.embed_tokens.weight": params["embedding"]["table_VD"],
    "model.final_norm.weight": params["final_norm"]["scale_D"],
  }
  for index, (block, p) in enumerate(
    zip(residual(config.blocks), stacks.split_blocks(config, params))
  ):
    of_mixer = _recurrent if isinstance(block.mixer, rg_lru.Config) else _attention
    of_block = {
      "temporal_pre_norm.weight": p["mixer_norm"]["scale_D"],
      "channel_pre_norm.weight": p["mlp_norm"]["scale_D"],
      **{f"temporal_block.{name}": view for name, view in of_mixer(p["mixer"]).items()},
      "mlp_block.gate_proj.weight": p["mlp"]["w_up_D2F"][:, 0].T,
      "mlp_block.gate_proj.bias": p["mlp"]["b_up_2F"][0],
      "mlp_block.up_proj.weight": p["mlp"]["w_up_D2F"][:, 1].T,
      "mlp_block.up_proj.bias": p["mlp"]["b_up_2F"][1],
      "mlp_block.down_proj.weight": p["mlp"]["w_down_FD"].T,
      "mlp_block.down_proj.bias": p["mlp"]["b_down_D"],
    }
    views |= {f"model.layers.{index}.{name}": view for name, view in of_block.items()}
  return views


def _recurrent(p: Params) -> dict[str, np.ndarray]:
  return {
    "linear_y.weight": p["w_in_D2R"][:, 0].T,
    "linear_y.bias": p["b_in_2R"][0],
    "linear_x.weight": p["w_in_D2R"][:, 1].T,
    "linear_x.bias": p["b_in_2R"][1],
    "conv_1d.weight": p["w_conv_KR"].T[:, None],  # the last tap is the current token's, in both
    "conv_1d.bias": p["b_conv_R"],
    "rg_lru.recurrent_gate_weight": p["w_gates_GI2J"][:, :, 0],
    "rg_lru.recurrent_gate_bias": p["b_gates_G2J"][:, 0],
    "rg_lru.input_gate_weight": p["w_gates_GI2J"][:, :, 1],
    "rg_lru.input_gate_bias": p["b_gates_G2J"][:, 1],
    "rg_lru.recurrent_param": p["decay_R"],
    "linear_out.weight": p["w_out_RD"].T,
    "linear_out.bias": p["b_out_D"],
  }


def _attention(p: Params) -> dict[str, np.ndarray]:
  width = p["b_out_D"].shape[0]
  # copy=False: a copy would silently stay empty when loading.
  return {
    "q_proj.weight": p["w_q_DNH"].reshape(width, -1, copy=False).T,
    "k_proj.weight": p["w_kv_D2H"][:, 0].T,
    "v_proj.weight": p["w_kv_D2H"][:, 1].T,
    "o_proj.weight": p["w_out_NHD"].reshape(-1, width, copy=False).T,
    "o_proj.bias": p["b_out_D"],
  }


NAME_MAP = NameMap(
  family="RecurrentGemma",
  model_type="recurrent_gemma",
  architecture="RecurrentGemmaForCausalLM",
  mixers=(rg_lru.Config, attention.Config),
  from_json=_from_json,
  to_json=_to_json,
  tensors=_tensors,
)
