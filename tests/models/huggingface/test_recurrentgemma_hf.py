"""Hugging Face RecurrentGemma directories: what transformers wrote, and what it read of ours.

The recordings come from make_recurrentgemma_hf.py and check_saved_with_transformers.py in
tests/golden/.
"""

import dataclasses
import json
import pathlib
import shutil

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from models import decoder, griffin, hawk, transformer
from models.huggingface import recurrentgemma as recurrentgemma_hf
from models.huggingface import recurrentgemma_config
from tests.golden import save_for_transformers
from tests.golden.save_for_transformers import CONFIGS, FOLDER, spread_params

THEIRS = np.load(FOLDER / "logits.npz")
OURS = np.load(FOLDER / "ours_logits.npz")
GATE = "model.layers.1.temporal_block.rg_lru.input_gate_weight"

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


def _logits(config, params, tokens_BT):
  tokens_BT = jnp.asarray(tokens_BT)
  return jax.jit(decoder.build(config).logits)(params, tokens_BT, jnp.ones_like(tokens_BT))


def _assert_trees_equal(first, second):
  assert jax.tree.structure(first) == jax.tree.structure(second)
  for path, leaf in jax.tree_util.tree_leaves_with_path(first):
    other = dict(jax.tree_util.tree_leaves_with_path(second))[path]
    assert leaf.dtype == other.dtype, path
    np.testing.assert_array_equal(leaf, other, err_msg=str(path))


def _copy(name, tmp_path):
  shutil.copytree(FOLDER / name, tmp_path / name)
  return tmp_path / name


def _edit_config(directory, **settings):
  path = directory / "config.json"
  path.write_text(json.dumps(json.loads(path.read_text()) | settings))


def _edit_tensors(directory, edit):
  path = directory / "model.safetensors"
  tensors = safetensors.numpy.load_file(path)
  edit(tensors)
  safetensors.numpy.save_file(tensors, path, metadata={"format": "pt"})


@pytest.mark.parametrize("name", ["single", "sharded", "hawk"])
def test_a_directory_of_transformers_gives_its_logits(name):
  config, params = recurrentgemma_hf.load(FOLDER / name, param_dtype="float32")
  assert config.dtype == config.param_dtype == "float32"
  logits_BTV = _logits(config, params, THEIRS[f"{name}/tokens_BT"])
  np.testing.assert_allclose(logits_BTV, THEIRS[f"{name}/logits_BTV"], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", list(CONFIGS))
def test_transformers_opened_what_save_writes_and_got_our_logits(name, tmp_path):
  """The bytes are those that transformers opened when its logits were recorded."""
  params = save_for_transformers.save(tmp_path / name, name)
  files = sorted(path.name for path in (FOLDER / name).iterdir())
  assert sorted(path.name for path in (tmp_path / name).iterdir()) == files
  for file in files:
    assert (tmp_path / name / file).read_bytes() == (FOLDER / name / file).read_bytes(), (
      f"{name}/{file} is not what transformers opened; run the two commands in "
      "tests/golden/save_for_transformers.py"
    )
  config = dataclasses.replace(CONFIGS[name], dtype="float32", param_dtype="float32")
  params = jax.tree.map(lambda leaf: leaf.astype(np.float32), params)
  logits_BTV = _logits(config, params, OURS[f"{name}/tokens_BT"])
  np.testing.assert_allclose(logits_BTV, OURS[f"{name}/logits_BTV"], atol=1e-5, rtol=1e-5)


def test_the_released_configs_are_the_presets():
  for preset, more in (
    (griffin.recurrentgemma_2b(), {}),
    (
      griffin.recurrentgemma_9b(),
      {"hidden_size": 4096, "lru_width": 4096, "intermediate_size": 24576, "head_dim": 256}
      | {"num_attention_heads": 16, "num_hidden_layers": 38},
    ),
  ):
    config = recurrentgemma_config.from_json(
      RELEASED_2B | more, source=pathlib.Path("config.json"), dtype="bfloat16"
    )
    assert config == dataclasses.replace(preset, dtype="bfloat16", param_dtype="bfloat16")


def test_spelled_out_block_types_are_scanned_in_groups():
  spelled = {"_block_types": (["recurrent", "recurrent", "attention"] * 9)[:26]}
  config = recurrentgemma_config.from_json(
    RELEASED_2B | spelled, source=pathlib.Path("config.json"), dtype="float32"
  )
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
  as_jax = jax.tree.map(jnp.asarray, params)
  recurrentgemma_hf.save(tmp_path / "saved", config, as_jax, max_shard_bytes=10_000)
  assert (tmp_path / "saved" / "model.safetensors.index.json").exists()
  loaded_config, loaded = recurrentgemma_hf.load(tmp_path / "saved")
  assert recurrentgemma_config.to_json(loaded_config) == recurrentgemma_config.to_json(config)
  assert loaded_config.param_dtype == config.param_dtype
  _assert_trees_equal(loaded, params)


def test_a_cap_given_as_a_whole_number_is_saved_as_transformers_reads_it():
  settings = recurrentgemma_config.to_json(dataclasses.replace(CONFIGS["ours"], logit_cap=30))
  assert json.dumps(settings["logits_soft_cap"]) == "30.0"


def test_dtypes_are_as_stored_or_as_asked():
  config, params = recurrentgemma_hf.load(FOLDER / "sharded")
  assert config.dtype == config.param_dtype == "bfloat16"
  dtypes, expected = (
    jax.tree.map(lambda leaf: str(leaf.dtype), tree)
    for tree in (params, decoder.build(config).shapes)
  )
  assert dtypes == expected
  config32, params32 = recurrentgemma_hf.load(FOLDER / "sharded", param_dtype="float32")
  assert config32.param_dtype == "float32"
  widened = jax.tree.map(lambda leaf: leaf.astype(np.float32), params)
  _assert_trees_equal(params32, widened)


@pytest.mark.parametrize(
  "rope_parameters", [{"rope_type": "default", "rope_theta": 10_000.0}, {"rope_theta": 1e4}, None]
)
def test_rope_parameters_may_leave_defaults_out(rope_parameters, tmp_path):
  directory = _copy("single", tmp_path)
  _edit_config(directory, rope_parameters=rope_parameters, partial_rotary_factor=0.5)
  assert recurrentgemma_hf.load(directory)[0] == recurrentgemma_hf.load(FOLDER / "single")[0]


def test_settings_of_attention_do_not_matter_without_attention(tmp_path):
  """transformers writes as many key-value heads as heads where a Hawk's maker gave none."""
  directory = _copy("hawk", tmp_path)
  _edit_config(directory, num_key_value_heads=2, rope_theta=1e6, attention_bias=True)
  config, params = recurrentgemma_hf.load(directory)
  expected_config, expected = recurrentgemma_hf.load(FOLDER / "hawk")
  assert config == expected_config
  _assert_trees_equal(params, expected)


def test_no_bit_is_rounded_away_unasked(tmp_path):
  directory = _copy("single", tmp_path)

  def half(tensors):
    name = "model.embed_tokens.weight"
    tensors[name] = tensors[name].astype(ml_dtypes.bfloat16)

  _edit_tensors(directory, half)
  with pytest.raises(ValueError, match=r"model\.layers\.\S+ is float32 where the embedding is bf"):
    recurrentgemma_hf.load(directory)
  config, params = recurrentgemma_hf.load(directory, param_dtype="bfloat16")
  assert config.param_dtype == "bfloat16"
  assert params["groups"]["0"]["mixer"]["w_gates_GI2J"].dtype == ml_dtypes.bfloat16


def test_float16_beside_bfloat16_is_not_rounded_unasked(tmp_path):
  directory = _copy("single", tmp_path)

  def halves(tensors):
    for name, array in tensors.items():
      tensors[name] = array.astype(np.float16 if name == GATE else ml_dtypes.bfloat16)

  _edit_tensors(directory, halves)
  with pytest.raises(ValueError, match=r"input_gate_weight is float16 where the embedding is bf"):
    recurrentgemma_hf.load(directory)


def test_float16_is_widened(tmp_path):
  directory = _copy("single", tmp_path)
  tensors = {}

  def halve(of_file):
    of_file |= {name: array.astype(np.float16) for name, array in of_file.items()}
    tensors.update(of_file)

  _edit_tensors(directory, halve)
  config, params = recurrentgemma_hf.load(directory)
  assert config.param_dtype == "float32"
  table_VD = params["embedding"]["table_VD"]
  assert table_VD.dtype == np.float32
  np.testing.assert_array_equal(table_VD, tensors["model.embed_tokens.weight"])


def test_a_bfloat16_directory_is_saved_again_bit_for_bit(tmp_path):
  recurrentgemma_hf.save(tmp_path / "again", *recurrentgemma_hf.load(FOLDER / "sharded"))
  again = safetensors.numpy.load_file(tmp_path / "again" / "model.safetensors")
  first = {}
  for path in (FOLDER / "sharded").glob("*.safetensors"):
    first |= safetensors.numpy.load_file(path)
  _assert_trees_equal(again, first)


def test_a_tied_unembedding_with_a_nan_is_tied(tmp_path):
  directory = _copy("hawk", tmp_path)

  def with_nan(tensors):
    tensors["model.embed_tokens.weight"][3, 2] = np.nan
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].copy()

  _edit_tensors(directory, with_nan)
  _, params = recurrentgemma_hf.load(directory)
  assert np.argwhere(np.isnan(params["embedding"]["table_VD"])).tolist() == [[3, 2]]


def _reshaped(tensors):
  tensors[GATE] = tensors[GATE].reshape(12, 2, 12)


def _doubled(tensors):
  tensors[GATE] = tensors[GATE].astype(np.float64)


def _untied(tensors):
  tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] + 1


@pytest.mark.parametrize(
  ("edit", "message"),
  [
    (lambda t: t.pop(GATE), rf"missing .*{GATE}"),
    (lambda t: t.update({"model.layers.9.x": t[GATE]}), r"not of the model .*model\.layers\.9\.x"),
    (_reshaped, rf"{GATE} has shape \(12, 2, 12\), config\.json asks for \(2, 12, 12\)"),
    (_doubled, rf"{GATE} is F64; known are \['BF16', 'F16', 'F32'\]"),
    (_untied, r"lm_head\.weight differs from model\.embed_tokens\.weight"),
  ],
)
def test_a_wrong_tensor_is_named(edit, message, tmp_path):
  directory = _copy("single", tmp_path)
  _edit_tensors(directory, edit)
  with pytest.raises(ValueError, match=message):
    recurrentgemma_hf.load(directory)


def test_a_stored_copy_of_the_tied_unembedding_is_no_error(tmp_path):
  directory = _copy("hawk", tmp_path)
  _edit_tensors(
    directory, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].copy()})
  )
  _assert_trees_equal(
    recurrentgemma_hf.load(directory)[1], recurrentgemma_hf.load(FOLDER / "hawk")[1]
  )


@pytest.mark.parametrize("name", ["single", "sharded"])
def test_a_model_saved_without_its_head_is_loaded(name, tmp_path):
  """RecurrentGemmaModel's own names, as save_pretrained of AutoModel writes them."""
  directory = _copy(name, tmp_path)
  for path in directory.glob("*.safetensors"):
    tensors = safetensors.numpy.load_file(path)
    headless = {key.removeprefix("model."): array for key, array in tensors.items()}
    safetensors.numpy.save_file(headless, path, metadata={"format": "pt"})
  for path in directory.glob("*.index.json"):
    path.write_text(path.read_text().replace('"model.', '"'))
  config, params = recurrentgemma_hf.load(directory)
  expected_config, expected = recurrentgemma_hf.load(FOLDER / name)
  assert config == expected_config
  _assert_trees_equal(params, expected)


def test_broken_files_are_named(tmp_path):
  with pytest.raises(ValueError, match=r"config\.json does not exist"):
    recurrentgemma_hf.load(tmp_path)

  directory = _copy("hawk", tmp_path)
  whole = (directory / "model.safetensors").read_bytes()
  (directory / "model.safetensors").write_bytes(whole[:-100])
  with pytest.raises(ValueError, match=r"model\.safetensors: not a whole safetensors file"):
    recurrentgemma_hf.load(directory)
  (directory / "model.safetensors").unlink()
  with pytest.raises(ValueError, match=r"must hold either model\.safetensors or .*index\.json"):
    recurrentgemma_hf.load(directory)
  (directory / "config.json").write_text("{")
  with pytest.raises(ValueError, match=r"config\.json: not JSON"):
    recurrentgemma_hf.load(directory)

  directory = _copy("sharded", tmp_path)
  index = directory / "model.safetensors.index.json"
  contents = json.loads(index.read_text())
  moved = dict(contents["weight_map"])
  del moved[GATE]
  index.write_text(json.dumps({"weight_map": moved}))
  with pytest.raises(ValueError, match=rf"not of the model \(by {index.name}\): {GATE}"):
    recurrentgemma_hf.load(directory)
  index.write_text(json.dumps(contents))
  (directory / "model-00002-of-00003.safetensors").unlink()
  with pytest.raises(ValueError, match=r"names model-00002-of-00003\.safetensors, which does not"):
    recurrentgemma_hf.load(directory)


@pytest.mark.parametrize(
  ("file", "message"),
  [
    ("renamed.safetensors", r"names renamed\.safetensors, which does not exist"),
    (3, rf"weight_map has 3 for {GATE}; it must name a file"),
    (["a"], rf"weight_map has \['a'\] for {GATE}; it must name a file"),
  ],
)
def test_an_index_that_names_no_file_is_named(file, message, tmp_path):
  directory = _copy("sharded", tmp_path)
  index = directory / "model.safetensors.index.json"
  contents = json.loads(index.read_text())
  contents["weight_map"][GATE] = file
  index.write_text(json.dumps(contents))
  with pytest.raises(ValueError, match=rf"index\.json: {message}"):
    recurrentgemma_hf.load(directory)


@pytest.mark.parametrize(
  ("key", "value"),
  [
    ("model_type", "gemma"),
    ("hidden_activation", "relu"),
    ("num_key_value_heads", 2),
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
    ("num_hidden_layers", 0),
    ("block_types", ["recurrent", "mamba"]),
    ("block_types", []),
    ("quantization_config", {"bits": 4}),
  ],
)
def test_a_setting_that_cannot_be_followed_is_named(key, value, tmp_path):
  directory = _copy("single", tmp_path)
  _edit_config(directory, **{key: value})
  with pytest.raises(ValueError, match=rf"config\.json: {key} "):
    recurrentgemma_hf.load(directory)


@pytest.mark.parametrize(("num_heads", "head_size"), [(3, 5), (32, 0)])
def test_heads_that_cannot_be_rotated_are_named(num_heads, head_size, tmp_path):
  directory = _copy("single", tmp_path)
  _edit_config(directory, num_attention_heads=num_heads, head_dim=head_size, lru_width=96)
  with pytest.raises(
    ValueError, match=rf"config\.json: num_attention_heads {num_heads} makes heads of {head_size} "
  ):
    recurrentgemma_hf.load(directory)


@pytest.mark.parametrize("key", ["model_type", "num_key_value_heads", "hidden_size", "block_types"])
def test_a_missing_setting_is_named(key, tmp_path):
  directory = _copy("single", tmp_path)
  settings = json.loads((directory / "config.json").read_text())
  del settings[key]
  (directory / "config.json").write_text(json.dumps(settings))
  with pytest.raises(ValueError, match=key):
    recurrentgemma_hf.load(directory)


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
    (_with_mixer(CONFIGS["ours"], 2, head_size=4), "head_size 4 .* width // num_heads, 8"),
    (_with_mixer(CONFIGS["ours"], 0, num_gate_blocks=4), r"num_gate_blocks and num_heads .*2, 4"),
    (_with_mixer(CONFIGS["ours"], 0, rnn_width=48), r"rnn_width must be the same .*\[24, 48\]"),
  ],
)
def test_what_recurrentgemma_cannot_express_is_not_saved(config, message, tmp_path):
  with pytest.raises(ValueError, match=message):
    recurrentgemma_hf.save(tmp_path / "saved", config, spread_params(config, seed=0))
  assert not list(tmp_path.iterdir())


def test_parameters_of_another_config_are_not_saved(tmp_path):
  config = CONFIGS["ours"]
  for other, message in (
    (CONFIGS["ours_hawk"], r"do not both have .*groups"),
    (dataclasses.replace(config, vocab_size=38), r"table_VD.* \(38, 16\), the config asks"),
    (CONFIGS["ours_bfloat16"], r"table_VD.* is bfloat16 .* asks for float32"),
  ):
    with pytest.raises(ValueError, match=message):
      recurrentgemma_hf.save(tmp_path / "saved", config, spread_params(other, seed=0))
  assert not list(tmp_path.iterdir())


def test_a_save_is_whole_or_absent(tmp_path, monkeypatch):
  config = hawk.hawk(
    vocab_size=7, width=8, rnn_width=8, num_blocks=1, mlp_width=8, num_gate_blocks=2
  )
  config = dataclasses.replace(config, embedding_scale="sqrt_width", logit_cap=30.0)
  params = spread_params(config, seed=0)

  def full_disk(*args, **settings):
    raise OSError("no space left")

  with monkeypatch.context() as patch:
    patch.setattr(safetensors.numpy, "save_file", full_disk)
    with pytest.raises(OSError, match="no space"):
      recurrentgemma_hf.save(tmp_path / "saved", config, params)
  assert not list(tmp_path.iterdir())
  recurrentgemma_hf.save(tmp_path / "saved", config, params)
  with pytest.raises(ValueError, match="is not an empty directory"):
    recurrentgemma_hf.save(tmp_path / "saved", config, params)
  recurrentgemma_hf.load(tmp_path / "saved")


@pytest.mark.parametrize("name", ["link", "dangling"])
def test_a_link_is_followed_and_stays(name, tmp_path):
  target = tmp_path / "target"
  if name == "link":
    target.mkdir()
  (tmp_path / name).symlink_to("target")
  config = CONFIGS["ours_hawk"]
  recurrentgemma_hf.save(tmp_path / name, config, spread_params(config, seed=0))
  assert sorted(path.name for path in target.iterdir()) == ["config.json", "model.safetensors"]
  assert {path.name for path in tmp_path.iterdir()} == {name, "target"}


def test_the_working_directory_is_not_replaced(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  config = CONFIGS["ours_hawk"]
  with pytest.raises(ValueError, match=f"{tmp_path} is the working directory"):
    recurrentgemma_hf.save(".", config, spread_params(config, seed=0))
