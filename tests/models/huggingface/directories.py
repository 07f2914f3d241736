"""Copies of recorded directories for tests to edit, and how models of directories are compared."""

import dataclasses
import json
import pathlib
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import safetensors.numpy

from models import decoder
from tests.golden import save_for_transformers


def copy(source: pathlib.Path, folder: pathlib.Path) -> pathlib.Path:
  return pathlib.Path(shutil.copytree(source, folder / source.name))


def edit_config(directory: pathlib.Path, **settings) -> None:
  """Sets keys of config.json; `...` takes one away."""
  path = directory / "config.json"
  edited = json.loads(path.read_text()) | settings
  kept = {key: value for key, value in edited.items() if value is not ...}
  path.write_text(json.dumps(kept))


def tensors(directory: pathlib.Path) -> dict[str, np.ndarray]:
  """All tensors of a directory, as the safetensors package reads them."""
  found = {}
  for path in directory.glob("*.safetensors"):
    found |= safetensors.numpy.load_file(path)
  return found


def edit_tensors(directory: pathlib.Path, edit) -> None:
  """Calls `edit` on the tensors of each file, by name."""
  for path in directory.glob("*.safetensors"):
    edited = safetensors.numpy.load_file(path)
    edit(edited)
    safetensors.numpy.save_file(edited, path, metadata={"format": "pt"})


def logits(config: decoder.DecoderConfig, params, tokens_BT) -> jax.Array:
  """Of rows that are one document each."""
  tokens_BT = jnp.asarray(tokens_BT)
  return jax.jit(decoder.build(config).logits)(params, tokens_BT, jnp.ones_like(tokens_BT))


def assert_trees_equal(first, second) -> None:
  assert jax.tree.structure(first) == jax.tree.structure(second)
  others = dict(jax.tree_util.tree_leaves_with_path(second))
  for path, leaf in jax.tree_util.tree_leaves_with_path(first):
    assert leaf.dtype == others[path].dtype, path
    np.testing.assert_array_equal(leaf, others[path], err_msg=str(path))


def assert_saved_as_opened(
  config: decoder.DecoderConfig, directory: pathlib.Path, recorded: pathlib.Path, arrays
) -> None:
  """Asserts that `save` writes the bytes in `recorded`, which transformers opened, and that we have
  the logits that it had then: `arrays` of ours_logits.npz."""
  name = recorded.name
  params = save_for_transformers.write(directory, config)
  files = sorted(path.name for path in recorded.iterdir())
  assert sorted(path.name for path in directory.iterdir()) == files
  for file in files:
    assert (directory / file).read_bytes() == (recorded / file).read_bytes(), (
      f"{name}/{file} is not what transformers opened; run the two commands in "
      "tests/golden/save_for_transformers.py"
    )
  config = dataclasses.replace(config, dtype="float32", param_dtype="float32")
  params = jax.tree.map(lambda leaf: leaf.astype(np.float32), params)
  logits_BTV = logits(config, params, arrays[f"{name}/tokens_BT"])
  np.testing.assert_allclose(logits_BTV, arrays[f"{name}/logits_BTV"], atol=1e-5, rtol=1e-5)
