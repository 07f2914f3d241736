"""Writes tests/golden/recurrentgemma_hf/ours*/: directories that our `save` made.

  .venv/bin/python -m tests.golden.save_for_transformers
  ~/oracle/bin/python tests/golden/check_saved_with_transformers.py

Run both when `save` changes what it writes: the second opens the directories in transformers and
records its logits. models/huggingface/test_hf_directory.py asks `save` for the same bytes.
"""

import dataclasses
import pathlib
import shutil

import jax
import numpy as np

from models import decoder, griffin, hawk
from models.decoder import DecoderConfig, Params
from models.huggingface.directory import save

FOLDER = pathlib.Path(__file__).parent / "recurrentgemma_hf"
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
# Small enough that the bfloat16 directory has several files.
MAX_SHARD_BYTES = {"ours": 2**30, "ours_bfloat16": 30_000, "ours_hawk": 2**30}


def write(directory: pathlib.Path, name: str) -> Params:
  """Writes the directory called `name`; gives back its parameters."""
  params = spread_params(CONFIGS[name], seed=5)
  save(directory, CONFIGS[name], params, eos_token_id=1, max_file_bytes=MAX_SHARD_BYTES[name])
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
  for directory_name in CONFIGS:
    shutil.rmtree(FOLDER / directory_name, ignore_errors=True)
    write(FOLDER / directory_name, directory_name)
