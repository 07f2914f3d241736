"""Writes recurrentgemma_hf/ours*/ and llama_hf/ours*/: directories that our `save` made.

  .venv/bin/python -m tests.golden.save_for_transformers
  ~/oracle/bin/python tests/golden/check_saved_with_transformers.py

Run both when `save` changes what it writes: the second opens the directories in transformers and
records its logits. test_recurrentgemma.py and test_llama.py ask `save` for the same bytes.
"""

import dataclasses
import pathlib
import shutil
from typing import Any

import jax
import numpy as np

from models import decoder, griffin, hawk
from models.decoder import DecoderConfig, DType, Params
from models.huggingface import llama
from models.huggingface.directory import save
from models.huggingface.name_map import Settings

FOLDER = pathlib.Path(__file__).parent / "recurrentgemma_hf"
LLAMA_FOLDER = pathlib.Path(__file__).parent / "llama_hf"
_GRIFFIN = griffin.griffin(
  vocab_size=37,
  width=16,
  rnn_width=24,
  num_blocks=5,
  num_heads=2,
  head_size=8,
  window=12,
  mlp_width=40,
  num_gate_blocks=2,
  decay_init="recurrentgemma",
  embedding_scale="sqrt_width",
  logit_cap=20.0,
  dtype="float32",
)
_HAWK = hawk.hawk(
  vocab_size=37, width=16, rnn_width=24, num_blocks=2, mlp_width=40, num_gate_blocks=4
)
CONFIGS = {
  "ours": _GRIFFIN,
  "ours_bfloat16": dataclasses.replace(_GRIFFIN, dtype="bfloat16", param_dtype="bfloat16"),
  "ours_hawk": dataclasses.replace(
    _HAWK, embedding_scale="sqrt_width", logit_cap=30.0, dtype="float32"
  ),
}
_LLAMA = {
  "vocab_size": 37,
  "hidden_size": 16,
  "intermediate_size": 24,
  "num_hidden_layers": 2,
  "num_attention_heads": 4,
  "num_key_value_heads": 2,
  "head_dim": 8,
  "rms_norm_eps": 1e-5,
}
_SCALED = {
  "rope_type": "llama3",
  "rope_theta": 500.0,
  "factor": 32.0,
  "low_freq_factor": 1.0,
  "high_freq_factor": 4.0,
  "original_max_position_embeddings": 32,
}
_TIED = {
  "num_key_value_heads": 1,
  "mlp_bias": True,
  "tie_word_embeddings": True,
  "rope_parameters": _SCALED,
}


def _llama(settings: dict[str, Any], dtype: DType) -> DecoderConfig:
  return llama.NAME_MAP.from_json(Settings(settings, "config.json"), dtype=dtype)


LLAMAS = {
  "ours": _llama(_LLAMA, "float32"),
  "ours_tied_bfloat16": _llama(_LLAMA | _TIED, "bfloat16"),
}


# Small enough that these directories have several files.
_MAX_FILE_BYTES = {"ours_bfloat16": 30_000, "ours_tied_bfloat16": 6_000}


def write(directory: pathlib.Path, config: DecoderConfig) -> Params:
  """Writes a directory by the name of one that is recorded; gives back its parameters."""
  params = spread_params(config, seed=5)
  max_file_bytes = _MAX_FILE_BYTES.get(directory.name, 2**30)
  save(directory, config, params, eos_token_id=1, max_file_bytes=max_file_bytes)
  return params


def spread_params(config: DecoderConfig, *, seed: int) -> Params:
  """Parameters that all have an effect, multiples of 2^-10 (rounded to bfloat16 where asked)."""
  random = np.random.RandomState(seed)  # its stream is promised not to change

  def draw(path: tuple[jax.tree_util.DictKey, ...], leaf: jax.ShapeDtypeStruct) -> np.ndarray:
    normal = random.normal(size=leaf.shape)
    match path[-1].key:
      case "decay_R":
        values = random.uniform(-6.0, 1.0, leaf.shape)
      case "w_conv_KR":
        values = 0.5 * normal
      case name if name.startswith("w_"):
        values = normal / 4  # 1 / sqrt(width), about
      case _:
        values = 0.3 * normal
    return (np.round(values * 1024) / 1024).astype(leaf.dtype)

  return jax.tree_util.tree_map_with_path(draw, decoder.build(config).shapes)


if __name__ == "__main__":
  for folder, configs in ((FOLDER, CONFIGS), (LLAMA_FOLDER, LLAMAS)):
    for name, config in configs.items():
      shutil.rmtree(folder / name, ignore_errors=True)
      write(folder / name, config)
