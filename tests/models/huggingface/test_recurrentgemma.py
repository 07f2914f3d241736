"""RecurrentGemma's directories: what transformers wrote, and what it read of ours.

The recordings come from make_recurrentgemma_hf.py and check_saved_with_transformers.py in
tests/golden/.
"""

import dataclasses
import json

import numpy as np
import pytest

from models import griffin, transformer
from models.huggingface import recurrentgemma
from models.huggingface.directory import load, save
from models.huggingface.name_map import Settings
from tests.golden.save_for_transformers import CONFIGS, FOLDER, spread_params
from tests.models.huggingface.directories import (
  assert_saved_as_opened,
  assert_trees_equal,
  copy,
  edit_config,
  logits,
)

THEIRS = np.load(FOLDER / "logits.npz")
OURS = np.load(FOLDER / "ours_logits.npz")

# The hub's config.json of google/recurrentgemma-2b, but for keys without meaning.
RELEASED_2B = {
  "_block_types": ["recurrent", "recurrent", "attention"],
  "architectures": ["RecurrentGemmaForCausalLM"],
  "attention_bias": False,
  "attention_dropout": 0.0,
  "attention_window_size": 2048,
  "conv1d_width": 4,
  "embeddings_scale_by_sqrt_dim": True,
  "head_dim": 256,
  "hidden_activation": "gelu_pytorch_tanh",
  "hidden_size": 2560,
  "intermediate_size": 15360,
  "logits_soft_cap": 30.0,
  "lru_width": 2560,
  "model_type": "recurrent_gemma",
  "num_attention_heads": 10,
  "num_hidden_layers": 26,
  "num_key_value_heads": 1,
  "partial_rotary_factor": 0.5,
  "rms_norm_eps": 1e-06,
  "rope_theta": 10000.0,
  "torch_dtype": "bfloat16",
  "vocab_size": 256000,
}


@pytest.mark.parametrize("name", ["single", "sharded", "hawk"])
def test_a_directory_of_transformers_gives_its_logits(name):
  config, params = load(FOLDER / name, param_dtype="float32")
  assert config.dtype == config.param_dtype == "float32"
  logits_BTV = logits(config, params, THEIRS[f"{name}/tokens_BT"])
  np.testing.assert_allclose(logits_BTV, THEIRS[f"{name}/logits_BTV"], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", list(CONFIGS))
def test_transformers_opened_what_save_writes_and_got_our_logits(name, tmp_path):
  assert_saved_as_opened(CONFIGS[name], tmp_path / name, FOLDER / name, OURS)


def test_the_released_configs_are_the_presets():
  of_9b = {"hidden_size": 4096, "lru_width": 4096, "intermediate_size": 24576, "head_dim": 256}
  of_9b |= {"num_attention_heads": 16, "num_hidden_layers": 38}
  for preset, more in ((griffin.recurrentgemma_2b(), {}), (griffin.recurrentgemma_9b(), of_9b)):
    settings = Settings(RELEASED_2B | more, "config.json")
    config = recurrentgemma.NAME_MAP.from_json(settings, dtype="bfloat16")
    assert config == dataclasses.replace(preset, dtype="bfloat16", param_dtype="bfloat16")


def test_spelled_out_block_types_are_scanned_in_groups():
  spelled = {"_block_types": (["recurrent", "recurrent", "attention"] * 9)[:26]}
  settings = Settings(RELEASED_2B | spelled, "config.json")
  config = recurrentgemma.NAME_MAP.from_json(settings, dtype="float32")
  assert len(config.pattern) == 3
  assert config.blocks == griffin.recurrentgemma_2b().blocks


_TRANSFORMER = transformer.mqa_transformer(
  vocab_size=19, width=16, num_blocks=2, num_heads=4, head_size=4, mlp_width=24, window=5
)


@pytest.mark.parametrize(
  "config",
  [
    *CONFIGS.values(),
    dataclasses.replace(_TRANSFORMER, embedding_scale="sqrt_width", logit_cap=3.0, dtype="float32"),
  ],
)
def test_loading_gives_back_what_was_saved(config, tmp_path):
  params = spread_params(config, seed=1)
  save(tmp_path / "saved", config, params, max_file_bytes=10_000)
  assert (tmp_path / "saved" / "model.safetensors.index.json").exists()
  loaded_config, loaded = load(tmp_path / "saved")
  to_json = recurrentgemma.NAME_MAP.to_json
  assert to_json(loaded_config) == to_json(config)
  assert loaded_config.param_dtype == config.param_dtype
  assert_trees_equal(loaded, params)


def test_a_cap_given_as_a_whole_number_is_saved_as_transformers_reads_it():
  settings = recurrentgemma.NAME_MAP.to_json(dataclasses.replace(CONFIGS["ours"], logit_cap=30))
  assert json.dumps(settings["logits_soft_cap"]) == "30.0"


def test_rope_parameters_may_leave_defaults_out():
  expected = recurrentgemma.NAME_MAP.from_json(
    Settings(RELEASED_2B, "config.json"), dtype="float32"
  )
  for rope in ({"rope_type": "default", "rope_theta": 10_000.0}, {"rope_theta": 1e4}, None):
    settings = Settings(RELEASED_2B | {"rope_parameters": rope}, "config.json")
    assert recurrentgemma.NAME_MAP.from_json(settings, dtype="float32") == expected


def test_settings_of_attention_do_not_matter_without_attention(tmp_path):
  """transformers writes as many key-value heads as heads where a Hawk's maker gave none."""
  directory = copy(FOLDER / "hawk", tmp_path)
  edit_config(directory, num_key_value_heads=2, rope_theta=1e6, attention_bias=True)
  config, params = load(directory)
  expected_config, expected = load(FOLDER / "hawk")
  assert config == expected_config
  assert_trees_equal(params, expected)


@pytest.mark.parametrize(
  ("key", "value"),
  [
    ("hidden_activation", "relu"),
    ("num_key_value_heads", 2),
    ("num_key_value_heads", ...),
    ("attention_bias", True),
    ("rms_norm_eps", 1e-5),
    ("tie_word_embeddings", False),
    ("embeddings_scale_by_sqrt_dim", False),
    ("rope_parameters", {"rope_type": "linear", "rope_theta": 1e4, "partial_rotary_factor": 0.5}),
    ("rope_parameters", {"rope_theta": 1e6}),
    ("rope_parameters", "default"),
    ("logits_soft_cap", 0.0),
    ("logits_soft_cap", None),
    ("logits_soft_cap", float("inf")),
    ("logits_soft_cap", True),
    ("lru_width", 25),
    ("head_dim", 16),
    ("intermediate_size", 81),
    ("hidden_size", "16"),
    ("hidden_size", ...),
    ("num_hidden_layers", 0),
    ("block_types", ["recurrent", "mamba"]),
    ("block_types", []),
    ("block_types", ...),
    ("quantization_config", {"bits": 4}),
  ],
)
def test_a_setting_that_cannot_be_followed_is_named(key, value, tmp_path):
  directory = copy(FOLDER / "single", tmp_path)
  edit_config(directory, **{key: value})
  with pytest.raises(ValueError, match=rf"config\.json: {key} "):
    load(directory)


@pytest.mark.parametrize(("num_heads", "head_size"), [(3, 5), (32, 0)])
def test_heads_that_cannot_be_rotated_are_named(num_heads, head_size, tmp_path):
  directory = copy(FOLDER / "single", tmp_path)
  edit_config(directory, num_attention_heads=num_heads, head_dim=head_size, lru_width=96)
  with pytest.raises(
    ValueError, match=rf"config\.json: num_attention_heads {num_heads} makes heads of {head_size} "
  ):
    load(directory)


def _with_mixer(config, index, **changes):
  pattern = list(config.pattern)
  mixer = dataclasses.replace(pattern[index].mixer, **changes)
  pattern[index] = dataclasses.replace(pattern[index], mixer=mixer)
  return dataclasses.replace(config, pattern=tuple(pattern))


@pytest.mark.parametrize(
  ("config", "message"),
  [
    (dataclasses.replace(CONFIGS["ours"], embedding_scale="none"), "embedding_scale 'none'"),
    (dataclasses.replace(CONFIGS["ours"], logit_cap=None), "logit_cap None"),
    (_with_mixer(CONFIGS["ours"], 2, window=None), r"window None \(global attention\)"),
    (_with_mixer(CONFIGS["ours"], 2, head_size=4), "head_size 4.* width // num_heads, 8"),
    (_with_mixer(CONFIGS["ours"], 2, num_kv_heads=2), ".*num_kv_heads 2: its own is 1"),
    (_with_mixer(CONFIGS["ours"], 0, num_gate_blocks=4), r"num_gate_blocks and num_heads .*2, 4"),
    (_with_mixer(CONFIGS["ours"], 0, rnn_width=48), r"rnn_width must be the same .*\[24, 48\]"),
  ],
)
def test_what_recurrentgemma_cannot_express_is_not_saved(config, message, tmp_path):
  with pytest.raises(ValueError, match=f"cannot be saved .*as RecurrentGemma: {message}"):
    save(tmp_path / "saved", config, spread_params(config, seed=0))
  assert not list(tmp_path.iterdir())
