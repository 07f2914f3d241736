"""Llama (arXiv:2302.13971, arXiv:2307.09288, arXiv:2407.21783) as Hugging Face has it.

Rotary settings are read in both forms: `rope_theta` and `rope_scaling` at the top (transformers 4),
or `rope_parameters` with all of them (transformers 5); both are written. A key that is absent has
transformers' default.
"""

from typing import Any

import numpy as np

from models import residual_block, stacks
from models.decoder import DecoderConfig, DType, Params
from models.huggingface.name_map import NameMap, Settings, residual
from models.layers import attention, mlp, norms
from models.layers.rope import Llama3Scaling, Rope

# What every Llama that we can follow has; another value would be another function than ours.
_FIXED = {
  "hidden_act": "silu",
  "attention_bias": False,
  "attention_dropout": 0.0,
  "partial_rotary_factor": 1.0,
  "rope_interleaved": False,
  "quantization_config": None,
}
_READ = {
  "model_type", "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers",
  "num_attention_heads", "num_key_value_heads", "head_dim", "rms_norm_eps", "tie_word_embeddings",
  "mlp_bias", "rope_theta", "rope_scaling", "rope_parameters",
}  # fmt: skip
# pretraining_tp splits products into sums of parts: the same but for rounding.
_UNUSED = {"pretraining_tp"}
_SCALING = {
  "factor": "factor",
  "low_freq_factor": "low_frequency_factor",
  "high_freq_factor": "high_frequency_factor",
  "original_max_position_embeddings": "original_context",
}
_ROPE_FIXED = {"partial_rotary_factor": 1.0}


def _from_json(settings: Settings, *, dtype: DType) -> DecoderConfig:
  settings.check("Llama", fixed=_FIXED, read=_READ, unused=_UNUSED)
  width, num_heads = settings.integer("hidden_size"), settings.integer("num_attention_heads")
  num_kv_heads = settings.integer("num_key_value_heads", absent=num_heads)
  if num_heads % num_kv_heads:
    raise ValueError(
      f"{settings.source}: num_key_value_heads {num_kv_heads} must divide num_attention_heads, "
      f"{num_heads}"
    )
  head_size = settings.integer("head_dim", absent=width // num_heads)
  if head_size % 2:
    raise ValueError(
      f"{settings.source}: head_dim {head_size} (hidden_size // num_attention_heads unless given) "
      "must be even: it is rotated in pairs"
    )
  mixer = attention.Config(
    num_heads=num_heads,
    num_kv_heads=num_kv_heads,
    head_size=head_size,
    window=None,
    rope=_rope(settings),
    output_bias=False,
  )
  swiglu = mlp.Config(
    mlp_width=settings.integer("intermediate_size"),
    activation="silu",
    biases=settings.truth("mlp_bias", absent=False),
  )
  norm = norms.Config(weight="scale", epsilon=settings.number("rms_norm_eps", absent=1e-6))
  return DecoderConfig(
    vocab_size=settings.integer("vocab_size"),
    width=width,
    num_blocks=settings.integer("num_hidden_layers"),
    pattern=(residual_block.Config(mixer=mixer, mlp=swiglu, norm=norm),),
    final_norm=norm,
    unembedding="tied" if settings.truth("tie_word_embeddings", absent=False) else "own",
    dtype=dtype,
    param_dtype=dtype,
  )


def _rope(settings: Settings) -> Rope:
  theta = settings.get("rope_theta")
  values: dict[str, Any] = {} if theta is None else {"rope_theta": theta}
  for key in ("rope_parameters", "rope_scaling"):
    given = settings.get(key, {})
    if not isinstance(given, dict):
      raise ValueError(f"{settings.source}: {key} {given!r} must be an object")
    for name, value in given.items():
      name = "rope_type" if name == "type" else name  # as older files have it
      if values.setdefault(name, value) != value:
        raise ValueError(
          f"{settings.source}: {key} has {name} {value!r}, which is {values[name]!r} in another "
          "place; delete one of them"
        )
  found = Settings(values, f"{settings.source}: rope_parameters")
  kind = found.get("rope_type", "default")
  if kind not in ("default", "llama3"):
    raise ValueError(f"{found.source}: rope_type {kind!r} cannot be loaded, only 'llama3' and none")
  read = {"rope_type", "rope_theta"} | (set(_SCALING) if kind == "llama3" else set())
  found.check("Llama's rotation", fixed=_ROPE_FIXED, read=read, unused=set())
  theta = found.number("rope_theta", absent=10_000.0)
  if kind == "default":
    return Rope(share=1.0, theta=theta)
  scaling = Llama3Scaling(
    factor=found.number("factor"),
    low_frequency_factor=found.number("low_freq_factor"),
    high_frequency_factor=found.number("high_freq_factor"),
    original_context=found.integer("original_max_position_embeddings"),
  )
  return Rope(share=1.0, theta=theta, scaling=scaling)


def _to_json(config: DecoderConfig) -> dict[str, Any]:
  # Of the first block: where another one differs, or Llama has no word for something, the caller
  # finds it when this is read back.
  block = residual(config.pattern)[0]
  mixer, swiglu, norm = block.mixer, block.mlp, config.final_norm
  if not isinstance(mixer, attention.Config) or not isinstance(swiglu, mlp.Config):
    raise ValueError("mixer and mlp: its own are attention and a gated MLP")
  if not isinstance(norm, norms.Config):
    raise ValueError("final_norm: its own is that of models/layers/norms.py")
  rope: dict[str, Any] = {"rope_type": "default"}
  if mixer.rope.scaling is not None:
    rope = {"rope_type": "llama3"}
    rope |= {theirs: getattr(mixer.rope.scaling, ours) for theirs, ours in _SCALING.items()}
  return {
    "attention_bias": False,
    "head_dim": mixer.head_size,
    "hidden_act": "silu",
    "hidden_size": config.width,
    "intermediate_size": swiglu.mlp_width,
    "mlp_bias": swiglu.biases,
    "num_attention_heads": mixer.num_heads,
    "num_hidden_layers": config.num_blocks,
    "num_key_value_heads": mixer.num_kv_heads,
    "rms_norm_eps": norm.epsilon,
    "rope_parameters": {**rope, "rope_theta": mixer.rope.theta},
    "rope_scaling": None if mixer.rope.scaling is None else rope,
    "rope_theta": mixer.rope.theta,
    "tie_word_embeddings": config.unembedding == "tied",
    "vocab_size": config.vocab_size,
  }


def _tensors(config: DecoderConfig, params: Params) -> dict[str, np.ndarray]:
  views = {
    "model.embed_tokens.weight": params["embedding"]["table_VD"],
    "model.norm.weight": params["final_norm"]["scale_D"],
  }
  if "unembedding" in params:
    views["lm_head.weight"] = params["unembedding"]["table_VD"]
  for index, p in enumerate(stacks.split_blocks(config, params)):
    of_block = {
      "input_layernorm.weight": p["mixer_norm"]["scale_D"],
      "post_attention_layernorm.weight": p["mlp_norm"]["scale_D"],
      **{f"self_attn.{name}.weight": view for name, view in _attention(p["mixer"]).items()},
      "mlp.gate_proj.weight": p["mlp"]["w_up_D2F"][:, 0].T,
      "mlp.up_proj.weight": p["mlp"]["w_up_D2F"][:, 1].T,
      "mlp.down_proj.weight": p["mlp"]["w_down_FD"].T,
    }
    if "b_up_2F" in p["mlp"]:
      of_block |= {
        "mlp.gate_proj.bias": p["mlp"]["b_up_2F"][0],
        "mlp.up_proj.bias": p["mlp"]["b_up_2F"][1],
        "mlp.down_proj.bias": p["mlp"]["b_down_D"],
      }
    views |= {f"model.layers.{index}.{name}": view for name, view in of_block.items()}
  return views


def _attention(p: Params) -> dict[str, np.ndarray]:
  width = p["w_q_DNH"].shape[0]
  w_kv_D2X = p["w_kv_D2EH"] if "w_kv_D2EH" in p else p["w_kv_D2H"]
  # copy=False: a copy would silently stay empty when loading.
  w_k_DX, w_v_DX = (w_kv_D2X[:, i].reshape(width, -1, copy=False) for i in (0, 1))
  return {
    "q_proj": p["w_q_DNH"].reshape(width, -1, copy=False).T,
    "k_proj": w_k_DX.T,
    "v_proj": w_v_DX.T,
    "o_proj": p["w_out_NHD"].reshape(-1, width, copy=False).T,
  }


NAME_MAP = NameMap(
  family="Llama",
  model_type="llama",
  architecture="LlamaForCausalLM",
  mixers=(attention.Config,),
  from_json=_from_json,
  to_json=_to_json,
  tensors=_tensors,
)
