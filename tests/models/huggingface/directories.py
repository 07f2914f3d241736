"""Copies of recorded directories for tests to edit, and how models of directories are compared."""

import json
import pathlib
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import safetensors.numpy

from models import decoder


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
