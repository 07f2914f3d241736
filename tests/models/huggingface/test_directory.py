"""Directories of any family: files, dtypes and faults, on those that transformers wrote."""

import dataclasses
import json
import tracemalloc

import jax
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from models.huggingface import recurrentgemma, tensor_files
from models.huggingface.directory import load, save
from models.layers import attention
from tests.golden.save_for_transformers import CONFIGS, FOLDER, spread_params
from tests.models.huggingface.directories import (
  assert_trees_equal,
  copy,
  edit_config,
  edit_tensors,
  tensors,
)

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
GATE = "model.layers.1.temporal_block.rg_lru.input_gate_weight"
SHARDED = FOLDER / "sharded"


def test_the_family_is_that_of_the_model_type_or_else_of_the_architecture(tmp_path):
  directory = copy(FOLDER / "single", tmp_path)
  expected, _ = load(directory)
  edit_config(directory, model_type=...)
  assert load(directory)[0] == expected
  edit_config(directory, architectures=...)
  with pytest.raises(ValueError, match=r"config\.json: model_type None .* known are 'recurrent_g"):
    load(directory)
  edit_config(directory, model_type="gemma")
  with pytest.raises(ValueError, match=r"config\.json: model_type 'gemma' .* known are"):
    load(directory)


def test_dtypes_are_as_stored_or_as_asked():
  config, params = load(SHARDED)
  assert config.dtype == config.param_dtype == "bfloat16"
  assert params["embedding"]["table_VD"].dtype == ml_dtypes.bfloat16
  assert params["final_norm"]["scale_D"].dtype == np.float32
  config32, params32 = load(SHARDED, param_dtype="float32")
  assert config32.param_dtype == "float32"
  assert_trees_equal(params32, jax.tree.map(lambda leaf: leaf.astype(np.float32), params))


def _half(array):
  return array.astype(np.float16)


def _bfloat16(array):
  return array.astype(ml_dtypes.bfloat16)


@pytest.mark.parametrize(
  ("stored", "message"),
  [
    (
      lambda name, array: _bfloat16(array) if name == EMBEDDING else array,
      r"model\.layers\.\S+ is float32 where the embedding is bf",
    ),
    (
      lambda name, array: _half(array) if name == GATE else _bfloat16(array),
      r"input_gate_weight is float16 where the embedding is bf",
    ),
  ],
  ids=["float32", "float16"],
)
def test_no_bit_is_rounded_away_unasked(stored, message, tmp_path):
  directory = copy(FOLDER / "single", tmp_path)
  edit_tensors(directory, lambda t: t.update({name: stored(name, t[name]) for name in t}))
  with pytest.raises(ValueError, match=message):
    load(directory)
  config, params = load(directory, param_dtype="bfloat16")
  assert config.param_dtype == "bfloat16"
  assert params["groups"]["0"]["mixer"]["w_gates_GI2J"].dtype == ml_dtypes.bfloat16


def test_float16_is_widened(tmp_path):
  directory = copy(FOLDER / "single", tmp_path)
  edit_tensors(directory, lambda t: t.update({name: _half(t[name]) for name in t}))
  config, params = load(directory)
  assert config.param_dtype == "float32"
  table_VD = params["embedding"]["table_VD"]
  assert table_VD.dtype == np.float32
  np.testing.assert_array_equal(table_VD, tensors(directory)[EMBEDDING])


@pytest.mark.parametrize("name", ["single", "sharded", "hawk"])
def test_what_was_loaded_is_saved_again_bit_for_bit(name, tmp_path):
  config, params = load(FOLDER / name)
  save(tmp_path / "again", config, params, max_file_bytes=10_000)
  assert_trees_equal(tensors(tmp_path / "again"), tensors(FOLDER / name))
  before, after = (
    json.loads((directory / "config.json").read_text())
    for directory in (FOLDER / name, tmp_path / "again")
  )
  ours = {"model_type", "architectures", "dtype", *recurrentgemma.NAME_MAP.to_json(config)}
  # Without attention they mean nothing, and transformers writes defaults of its own.
  ours -= {"num_key_value_heads"} if name == "hawk" else set()
  for key in ours & before.keys():
    assert after[key] == before[key], key


def test_gradients_are_saved_like_parameters(tmp_path):
  """Float32 beside bfloat16 parameters, whose shapes they have."""
  config = CONFIGS["ours_bfloat16"]
  gradients = jax.tree.map(lambda w: (w.astype(np.float32) + 1) / 3, spread_params(config, seed=2))
  save(tmp_path / "gradients", config, gradients)
  assert_trees_equal(load(tmp_path / "gradients")[1], gradients)


def test_a_save_copies_one_tensor_at_a_time(tmp_path):
  """Views that are not contiguous, as of stacked and transposed parameters."""
  views = {f"{i}": np.ones((500, 1000), np.float32).T for i in range(8)}
  tracemalloc.start()
  try:
    tensor_files.write(tmp_path, views, max_file_bytes=2**30)
    _, peak = tracemalloc.get_traced_memory()
  finally:
    tracemalloc.stop()
  assert_trees_equal(tensors(tmp_path), views)
  assert peak < 1.5 * views["0"].nbytes


def _reshaped(tensors):
  tensors[GATE] = tensors[GATE].reshape(12, 2, 12)


def _doubled(tensors):
  tensors[GATE] = tensors[GATE].astype(np.float64)


def _untied(tensors):
  tensors[HEAD] = tensors[EMBEDDING] + 1


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
  directory = copy(FOLDER / "single", tmp_path)
  edit_tensors(directory, edit)
  with pytest.raises(ValueError, match=message):
    load(directory)


def test_tensors_that_no_logit_depends_on_are_passed_over(tmp_path):
  """A copy of the tied unembedding, with a NaN too, and frequencies that are computed anyway."""
  directory = copy(FOLDER / "hawk", tmp_path)

  def add(tensors):
    tensors[EMBEDDING][3, 2] = np.nan
    tensors[HEAD] = tensors[EMBEDDING].copy()
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(3, np.float32)

  edit_tensors(directory, add)
  _, params = load(directory)
  assert np.argwhere(np.isnan(params["embedding"]["table_VD"])).tolist() == [[3, 2]]


@pytest.mark.parametrize("name", ["single", "sharded"])
def test_a_model_saved_without_its_head_is_loaded(name, tmp_path):
  """RecurrentGemmaModel's own names, as save_pretrained of AutoModel writes them."""
  directory = copy(FOLDER / name, tmp_path)
  for path in directory.glob("*.safetensors"):
    headless = {
      key.removeprefix("model."): array for key, array in safetensors.numpy.load_file(path).items()
    }
    safetensors.numpy.save_file(headless, path, metadata={"format": "pt"})
  for path in directory.glob("*.index.json"):
    path.write_text(path.read_text().replace('"model.', '"'))
  config, params = load(directory)
  expected_config, expected = load(FOLDER / name)
  assert config == expected_config
  assert_trees_equal(params, expected)


def test_broken_files_are_named(tmp_path):
  with pytest.raises(ValueError, match=r"config\.json does not exist"):
    load(tmp_path)

  directory = copy(FOLDER / "hawk", tmp_path)
  whole = (directory / "model.safetensors").read_bytes()
  (directory / "model.safetensors").write_bytes(whole[:-100])
  with pytest.raises(ValueError, match=r"model\.safetensors: not a whole safetensors file"):
    load(directory)
  (directory / "model.safetensors").unlink()
  with pytest.raises(ValueError, match=r"must hold either model\.safetensors or .*index\.json"):
    load(directory)
  (directory / "config.json").write_text("{")
  with pytest.raises(ValueError, match=r"config\.json: not JSON"):
    load(directory)


def test_an_index_of_other_files_or_tensors_is_named(tmp_path):
  directory = copy(SHARDED, tmp_path)
  index = directory / "model.safetensors.index.json"
  contents = json.loads(index.read_text())
  wrong = {
    "renamed.safetensors": r"names renamed\.safetensors, which does not exist",
    3: rf"weight_map has 3 for {GATE}; it must name a file",
    ("a",): rf"weight_map has \['a'\] for {GATE}; it must name a file",
    None: rf"weight_map has None for {GATE}",
  }
  for file, message in wrong.items():
    index.write_text(json.dumps({"weight_map": contents["weight_map"] | {GATE: file}}))
    with pytest.raises(ValueError, match=rf"index\.json: {message}"):
      load(directory)
  moved = {name: file for name, file in contents["weight_map"].items() if name != GATE}
  index.write_text(json.dumps({"weight_map": moved}))
  with pytest.raises(ValueError, match=rf"not of the model \(by {index.name}\): {GATE}"):
    load(directory)
  index.write_text(json.dumps(contents))
  (directory / "model-00002-of-00003.safetensors").unlink()
  with pytest.raises(ValueError, match=r"names model-00002-of-00003\.safetensors, which does not"):
    load(directory)


@dataclasses.dataclass(frozen=True, kw_only=True)
class _RunningMean:
  """A mixer of nobody's."""


def test_a_mixer_without_a_hugging_face_form_is_named(tmp_path):
  config = CONFIGS["ours"]
  pattern = (dataclasses.replace(config.pattern[0], mixer=_RunningMean()), *config.pattern[1:])
  with pytest.raises(
    ValueError,
    match=r"_RunningMean has no Hugging Face form; .* RecurrentGemma: rg_lru\.Config, attention\.C",
  ):
    save(tmp_path / "saved", dataclasses.replace(config, pattern=pattern), {})
  assert not list(tmp_path.iterdir())


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Sparse(attention.Config):
  """Attention with a choice that no name map knows."""

  every: int = 2


def test_a_choice_that_a_name_map_does_not_know_is_not_lost(tmp_path):
  config = CONFIGS["ours"]
  local = config.pattern[2].mixer
  assert isinstance(local, attention.Config)
  sparse = _Sparse(num_heads=local.num_heads, head_size=local.head_size, window=local.window)
  pattern = (*config.pattern[:2], dataclasses.replace(config.pattern[2], mixer=sparse))
  with pytest.raises(
    ValueError, match=r"as RecurrentGemma: pattern\[2\]\.mixer .*_Sparse': its own"
  ):
    save(tmp_path / "saved", dataclasses.replace(config, pattern=pattern), {})
  assert not list(tmp_path.iterdir())


def test_parameters_of_another_config_are_not_saved(tmp_path):
  config = CONFIGS["ours"]
  params = spread_params(config, seed=0)
  for other, message in (
    (spread_params(CONFIGS["ours_hawk"], seed=0), r"do not both have .*groups"),
    (
      spread_params(dataclasses.replace(config, vocab_size=38), seed=0),
      r"table_VD.* is float32 \(38, 16\), the config asks for float32 or bfloat16 \(37, 16\)",
    ),
    (jax.tree.map(_half, params), "is float16 .* asks for float32 or bfloat16"),
  ):
    with pytest.raises(ValueError, match=message):
      save(tmp_path / "saved", config, other)
  assert not list(tmp_path.iterdir())


def test_a_save_is_whole_or_absent(tmp_path, monkeypatch):
  config = CONFIGS["ours_hawk"]
  params = spread_params(config, seed=0)

  def full_disk(*args):
    raise OSError("no space left")

  with monkeypatch.context() as patch:
    patch.setattr(tensor_files, "_write_file", full_disk)
    with pytest.raises(OSError, match="no space"):
      save(tmp_path / "saved", config, params)
  assert not list(tmp_path.iterdir())
  save(tmp_path / "saved", config, params, files={"tokenizer.json": b"{}"})
  assert (tmp_path / "saved" / "tokenizer.json").read_bytes() == b"{}"
  with pytest.raises(ValueError, match="is not an empty directory"):
    save(tmp_path / "saved", config, params)
  load(tmp_path / "saved")


@pytest.mark.parametrize("name", ["link", "dangling"])
def test_a_link_is_followed_and_stays(name, tmp_path):
  target = tmp_path / "target"
  if name == "link":
    target.mkdir()
  (tmp_path / name).symlink_to("target")
  config = CONFIGS["ours_hawk"]
  save(tmp_path / name, config, spread_params(config, seed=0))
  assert sorted(path.name for path in target.iterdir()) == ["config.json", "model.safetensors"]
  assert {path.name for path in tmp_path.iterdir()} == {name, "target"}


def test_the_working_directory_is_not_replaced(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  config = CONFIGS["ours_hawk"]
  with pytest.raises(ValueError, match=f"{tmp_path} is the working directory"):
    save(".", config, spread_params(config, seed=0))
