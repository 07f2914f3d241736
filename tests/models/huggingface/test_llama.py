"""Llama's directories: transformers' logits and gradients, its keys in both forms, and ours in it.

The recordings come from make_llama_hf.py and check_saved_with_transformers.py in tests/golden/.
"""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models import decoder
from models import llama as llama_models
from models.huggingface import llama
from models.huggingface.directory import load, save
from models.huggingface.name_map import Settings
from models.same_model import differences
from tests.golden.save_for_transformers import LLAMA_FOLDER as FOLDER
from tests.golden.save_for_transformers import LLAMAS
from tests.models.huggingface.directories import (
  assert_saved_as_opened,
  assert_trees_equal,
  copy,
  edit_config,
  edit_tensors,
  tensors,
)

GOLDEN = np.load(FOLDER / "golden.npz")
OURS = np.load(FOLDER / "ours_logits.npz")
HEAD = "lm_head.weight"
# The config.json files of the released models, but for keys without meaning.
_LLAMA = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu"}
LLAMA_2_7B = _LLAMA | {
  "hidden_size": 4096,
  "intermediate_size": 11008,
  "num_attention_heads": 32,
  "num_hidden_layers": 32,
  "num_key_value_heads": 32,
  "pretraining_tp": 1,
  "rms_norm_eps": 1e-05,
  "rope_scaling": None,
  "tie_word_embeddings": False,
  "vocab_size": 32000,
}
LLAMA_3_8B = LLAMA_2_7B | {
  "attention_bias": False,
  "attention_dropout": 0.0,
  "intermediate_size": 14336,
  "num_key_value_heads": 8,
  "rope_theta": 500000.0,
  "vocab_size": 128256,
}
LLAMA_32_1B = LLAMA_3_8B | {
  "head_dim": 64,
  "hidden_size": 2048,
  "intermediate_size": 8192,
  "mlp_bias": False,
  "num_hidden_layers": 16,
  "rope_scaling": {
    "factor": 32.0,
    "high_freq_factor": 4.0,
    "low_freq_factor": 1.0,
    "original_max_position_embeddings": 8192,
    "rope_type": "llama3",
  },
  "tie_word_embeddings": True,
}


def _read(settings):
  return llama.NAME_MAP.from_json(Settings(settings, "config.json"), dtype="float32")


@functools.cache
def _loss_and_gradients(name):
  """The model of a recorded directory, and the recorded loss as a function of parameters."""
  config, params = load(FOLDER / name, param_dtype="float32")
  model = decoder.build(dataclasses.replace(config, remat="none"))

  def loss(params, tokens_BT, segments_BT, mix_BTV):
    logits_BTV = model.logits(params, tokens_BT, segments_BT)
    is_token_BT = segments_BT > 0
    is_target_BT = is_token_BT[:, 1:] & (segments_BT[:, 1:] == segments_BT[:, :-1])
    log_p_BTV = jax.nn.log_softmax(logits_BTV[:, :-1])
    log_p_BT = jnp.take_along_axis(log_p_BTV, tokens_BT[:, 1:, None], axis=-1)[..., 0]
    entropy = -jnp.sum(log_p_BT * is_target_BT) / jnp.sum(is_target_BT)
    mixed = jnp.sum(is_token_BT[..., None] * mix_BTV * logits_BTV) / jnp.sum(is_token_BT)
    return entropy + mixed, logits_BTV

  return config, params, jax.jit(jax.value_and_grad(loss, has_aux=True))


@pytest.mark.parametrize("case", ["plain", "packed"])
@pytest.mark.parametrize("name", ["scaled", "tied", "multi"])
def test_logits_and_gradients_are_those_of_transformers(name, case):
  """Rows of several documents against each document alone."""
  config, params, loss_and_gradients = _loss_and_gradients(name)
  prefix = f"{name}/{case}/"
  golden = {key.removeprefix(prefix): GOLDEN[key] for key in GOLDEN if key.startswith(prefix)}
  given = [golden[key] for key in ("tokens_BT", "segments_BT", "mix_BTV")]
  (value, logits_BTV), gradients = loss_and_gradients(params, *given)
  is_token_BT = golden["segments_BT"] > 0
  np.testing.assert_allclose(
    np.asarray(logits_BTV)[is_token_BT], golden["logits_BTV"][is_token_BT], atol=1e-5, rtol=0
  )
  np.testing.assert_allclose(value, golden["loss"], rtol=1e-6)
  ours = llama.NAME_MAP.tensors(config, jax.tree.map(np.asarray, gradients))
  theirs = {key.removeprefix("grads/"): golden[key] for key in golden if key.startswith("grads/")}
  assert ours.keys() == theirs.keys()
  for key, expected in theirs.items():
    atol = 1e-4 * np.abs(expected).max()
    np.testing.assert_allclose(ours[key], expected, rtol=0, atol=atol, err_msg=key)


# Rows of 16 tokens of a model that is filled by a rule: [row, token, :4] of the logits, computed in
# float64 with NumPy alone, of rows of one document and of documents that begin at 0 and 6.
_FILLED = {
  "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4,
  "num_key_value_heads": 2, "rms_norm_eps": 1e-5, "vocab_size": 32, "model_type": "llama",
}  # fmt: skip
_FILLED_LOGITS = {
  (0, 0): [-0.00277296, 0.19739603, 0.28437162, 1.57994683],
  (0, 8): [-0.75987189, 1.02339224, 0.40189454, -0.25540577],
  (1, 15): [-0.49518941, 1.00917057, 0.43162320, -0.96717352],
}
_PACKED_LOGITS = {
  (0, 6): [0.87908977, -0.83104696, 0.80730325, 0.59025452],
  (1, 15): [-0.06924992, 0.37052193, 0.40112757, -0.11807554],
}
_GRADIENT_NORMS = {
  "model.embed_tokens": 0.2286134, "lm_head": 0.6542528,
  "model.layers.0.self_attn.q_proj": 0.07626366, "model.layers.0.self_attn.k_proj": 0.07012453,
  "model.layers.0.self_attn.v_proj": 0.274731, "model.layers.0.self_attn.o_proj": 0.2279588,
  "model.layers.0.mlp.gate_proj": 0.2303303, "model.layers.0.mlp.down_proj": 0.236796,
}  # fmt: skip


def _fill(view, index, *, spread, mean):
  """Values of a hash of the flat index, from mean - spread to mean + spread."""
  x = (np.arange(1, view.size + 1, dtype=np.uint64) + 1_000_003 * index).astype(np.uint32)
  x ^= x >> 16
  x *= np.uint32(0x7FEB352D)
  x ^= x >> 15
  x *= np.uint32(0x846CA68B)
  x ^= x >> 16
  view[...] = (mean + spread * (x / 2.0**31 - 1)).reshape(view.shape)


def test_a_filled_model_has_the_logits_of_an_independent_program():
  config = dataclasses.replace(_read(_FILLED), remat="none")
  model = decoder.build(config)
  params = jax.tree.map(lambda leaf: np.empty(leaf.shape, leaf.dtype), model.shapes)
  for index, (name, view) in enumerate(sorted(llama.NAME_MAP.tensors(config, params).items())):
    spread = 1.0 if "embed" in name else 0.1 if "norm" in name else 0.3
    _fill(view, index, spread=spread, mean=1.0 if "norm" in name else 0.0)
  b, t = np.mgrid[:2, :17]
  tokens_BT = (7 * t + 3 * b + t * t) % 32
  one_BT, two_BT = np.ones((2, 16), np.int32), np.where(t[:, :16] < 6, 1, 2).astype(np.int32)

  @jax.jit
  @functools.partial(jax.value_and_grad, has_aux=True)
  def loss_and_gradients(params, segments_BT):
    logits_BTV = model.logits(params, jnp.asarray(tokens_BT[:, :16]), segments_BT)
    log_p_BTV = jax.nn.log_softmax(logits_BTV)
    return -jnp.mean(jnp.take_along_axis(log_p_BTV, tokens_BT[:, 1:, None], -1)), logits_BTV

  (value, logits_BTV), gradients = loss_and_gradients(params, one_BT)
  (_, packed_BTV), _ = loss_and_gradients(params, two_BT)
  for found, expected in ((logits_BTV, _FILLED_LOGITS), (packed_BTV, _PACKED_LOGITS)):
    for place, values in expected.items():
      np.testing.assert_allclose(found[place][:4], values, atol=1e-5)
  np.testing.assert_allclose(jnp.sum(logits_BTV), 57.38278132725899, rtol=5e-6)
  np.testing.assert_allclose(jnp.sum(logits_BTV**2), 527.4230104652474, rtol=5e-6)
  np.testing.assert_allclose(jnp.sum(packed_BTV**2), 487.9106879984398, rtol=5e-6)
  np.testing.assert_allclose(value, 3.4075442586252236, rtol=1e-6)
  of_tensors = llama.NAME_MAP.tensors(config, jax.tree.map(np.asarray, gradients))
  for name, norm in _GRADIENT_NORMS.items():
    np.testing.assert_allclose(np.linalg.norm(of_tensors[f"{name}.weight"]), norm, rtol=1e-5)


@pytest.mark.parametrize("name", list(LLAMAS))
def test_transformers_opened_what_save_writes_and_got_our_logits(name, tmp_path):
  assert_saved_as_opened(LLAMAS[name], tmp_path / name, FOLDER / name, OURS)


@pytest.mark.parametrize("name", ["scaled", "tied", "multi"])
def test_what_was_loaded_is_saved_again_bit_for_bit(name, tmp_path):
  config, params = load(FOLDER / name)
  assert config.param_dtype == ("bfloat16" if name == "tied" else "float32")
  save(tmp_path / "again", config, params, max_file_bytes=6_000)
  assert_trees_equal(tensors(tmp_path / "again"), tensors(FOLDER / name))
  before, after = (
    json.loads((directory / "config.json").read_text())
    for directory in (FOLDER / name, tmp_path / "again")
  )
  for key in {"dtype", "torch_dtype", *llama.NAME_MAP.to_json(config)} & before.keys():
    assert after[key] == before[key], key
  assert _read(after) == _read(before)


def test_a_head_of_its_own_is_there_just_where_the_config_says_so(tmp_path):
  directory = copy(FOLDER / "multi", tmp_path)
  _, params = load(directory)
  assert not np.array_equal(params["unembedding"]["table_VD"], params["embedding"]["table_VD"])
  edit_config(directory, tie_word_embeddings=True)
  with pytest.raises(ValueError, match=r"lm_head\.weight differs from model\.embed_tokens\.weight"):
    load(directory)
  edit_config(directory, tie_word_embeddings=...)  # transformers' default: a head of its own
  edit_tensors(directory, lambda t: t.pop(HEAD))
  with pytest.raises(ValueError, match=rf"missing .*{HEAD}"):
    load(directory)


def test_the_released_configs_are_the_presets():
  for settings, name in ((LLAMA_2_7B, "2-7b"), (LLAMA_3_8B, "3-8b"), (LLAMA_32_1B, "3.2-1b")):
    assert not differences(_read(settings), llama_models.published(name)), name


def test_rotary_settings_are_read_in_both_forms():
  scaling = LLAMA_32_1B["rope_scaling"]
  new = {key: value for key, value in LLAMA_32_1B.items() if not key.startswith("rope")}
  new |= {"rope_parameters": scaling | {"rope_theta": 500000.0}}
  assert _read(new) == _read(LLAMA_32_1B) == _read(new | LLAMA_32_1B)
  plain = {key: value for key, value in LLAMA_3_8B.items() if not key.startswith("rope")}
  assert _read(plain | {"rope_parameters": {"rope_theta": 5e5}}) == _read(LLAMA_3_8B)
  assert _read(plain) == _read(plain | {"rope_theta": 10_000.0})
  with pytest.raises(ValueError, match=r"rope_scaling has factor 8\.0, which is 32\.0 in another"):
    _read(new | {"rope_scaling": scaling | {"factor": 8.0}})


@pytest.mark.parametrize(
  ("key", "value"),
  [
    ("hidden_act", "gelu"),
    ("attention_bias", True),
    ("mlp_bias", "none"),
    ("num_key_value_heads", 5),
    ("num_key_value_heads", 0),
    ("head_dim", 7),
    ("rms_norm_eps", 0.0),
    ("tie_word_embeddings", "yes"),
    ("hidden_size", ...),
    ("quantization_config", {"bits": 4}),
    ("sliding_window", 4096),
    ("rope_scaling", "linear"),
    ("rope_parameters: rope_type", {"rope_type": "yarn"}),
    ("rope_parameters: factor", {"rope_type": "llama3"}),
    ("rope_parameters: partial_rotary_factor", {"partial_rotary_factor": 0.5}),
    ("rope_parameters: beta_fast", {"rope_type": "llama3", "beta_fast": 32}),
  ],
)
def test_a_setting_that_cannot_be_followed_is_named(key, value):
  settings = LLAMA_3_8B | {key.partition(":")[0]: value}
  with pytest.raises(ValueError, match=rf"config\.json: {key} "):
    _read({name: value for name, value in settings.items() if value is not ...})
