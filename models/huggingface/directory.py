"""Hugging Face directories in and out: config.json, safetensors files, and what lies beside them.

The family's file (NameMap) says what its keys and tensors are called, this one does the rest. What
cannot be expressed in the other format is refused by name.
"""

import dataclasses
import json
import os
import pathlib
import re
import shutil
from collections.abc import Mapping
from typing import Any, Literal

import jax
import numpy as np

from models import decoder
from models.decoder import DecoderConfig, DType, Params
from models.huggingface import llama, recurrentgemma, tensor_files
from models.huggingface.name_map import NameMap, Settings, residual
from models.huggingface.tensor_files import StoredTensor
from models.same_model import differences

_NAME_MAPS = (recurrentgemma.NAME_MAP, llama.NAME_MAP)
_HEAD = "lm_head.weight"
# Tensors of old files that no logit depends on: they are computed again from config.json.
_UNUSED_TENSORS = re.compile(r"(^|\.)(rotary_emb\.inv_freq|num_batches_tracked)$")


def load(
  directory: str | os.PathLike[str], *, param_dtype: DType | Literal["as_stored"] = "as_stored"
) -> tuple[DecoderConfig, Params]:
  """The model in `directory`: its config, and its parameters as numpy arrays on the host.

  Lay them out with `jax.device_put`; nothing is put on a device here.

  "as_stored" gives the matrices in the dtype of the files, float32 for float16, which we do not
  compute in; "float32" or "bfloat16" converts them.
  Parameters that are always float32, such as norms and decays, are so here. Activations get the
  matrices' dtype; change that with `dataclasses.replace(config, dtype=...)`. ValueError names what
  is missing, unknown or wrong.
  """
  directory = pathlib.Path(directory)
  source = directory / "config.json"
  settings = Settings(tensor_files.read_json(source), str(source))
  names = _of_settings(settings)
  stored = _used_tensors(tensor_files.stored_tensors(directory), names)
  embedding = stored.get(names.embedding)
  stored_dtype = tensor_files.DTYPES.get(embedding.dtype, "float32") if embedding else "float32"
  dtype: Any = stored_dtype if param_dtype == "as_stored" else param_dtype
  config = names.from_json(settings, dtype=dtype)
  shapes = decoder.build(config).shapes
  params = jax.tree.map(lambda leaf: np.empty(leaf.shape, leaf.dtype), shapes)
  views = names.tensors(config, params)
  is_tied = _HEAD not in views
  tensor_files.check_names(
    directory, set(views), set(stored) - ({_HEAD} if is_tied else set()), source="config.json"
  )
  for name, view in views.items():
    tensor = stored[name].read(view.shape)
    # Not by their sizes: float16 has as many bytes as bfloat16 and more bits of precision.
    if (
      param_dtype == "as_stored"
      and view.dtype == "bfloat16" != tensor_files.DTYPES[stored[name].dtype]
    ):
      raise ValueError(
        f"{stored[name].path}: {name} is {tensor.dtype} where the embedding is {stored_dtype}; "
        "give load(param_dtype='float32') to keep every bit, or 'bfloat16' to round"
      )
    view[...] = tensor
  if is_tied and _HEAD in stored:
    _check_tied(stored[_HEAD], stored[names.embedding], views[names.embedding].shape)
  return config, params


def save(
  directory: str | os.PathLike[str],
  config: DecoderConfig,
  params: Params,
  *,
  bos_token_id: int | None = None,
  eos_token_id: int | None = None,
  pad_token_id: int | None = None,
  max_position_embeddings: int | None = None,
  files: Mapping[str, bytes] | None = None,
  max_file_bytes: int = 4 * 2**30,
) -> None:
  """Writes `directory`, which must not exist or be empty: whole, or not at all.

  `params` is any tree of the parameters' shapes in float32 and bfloat16, so gradients too. Each
  array keeps its dtype, with one exception: where the embedding is bfloat16 and all float32 arrays
  hold bfloat16 values only, as `load` gave them, they are written as bfloat16, so that what was
  loaded is saved again bit for bit. Beside `params` one array at a time is copied.

  The token ids, None for a vocabulary without such a token, are those at which `generate` in
  transformers stops and with which it pads. max_position_embeddings: how long a row programs that
  read the directory may expect; None leaves it to them. `files` are written along, by name:
  a tokenizer's. ValueError if no family can express the config, or the arrays are not its own.
  """
  directory = pathlib.Path(directory).resolve()  # what a link names is replaced, not the link
  names, settings = _of_config(config)
  _check_params(config, params)
  if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
    raise ValueError(f"save: {directory} exists and is not an empty directory; give a new one")
  if directory == pathlib.Path.cwd():
    raise ValueError(f"save: {directory} is the working directory; give a new one")
  views = _narrowed(names, names.tensors(config, jax.tree.map(np.asarray, params)))
  dtype = str(views[names.embedding].dtype)
  settings |= {
    "architectures": [names.architecture],
    "model_type": names.model_type,
    "dtype": dtype,
    "torch_dtype": dtype,  # its name before transformers 5
    "bos_token_id": bos_token_id,
    "eos_token_id": eos_token_id,
    "pad_token_id": pad_token_id,
  }
  if max_position_embeddings is not None:
    settings["max_position_embeddings"] = max_position_embeddings
  directory.parent.mkdir(parents=True, exist_ok=True)
  partial = directory.with_name(f".{directory.name}.{os.getpid()}.partial")
  partial.mkdir()
  try:
    for name, content in (files or {}).items():
      (partial / name).write_bytes(content)
    (partial / "config.json").write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n")
    tensor_files.write(partial, views, max_file_bytes)
    os.replace(partial, directory)
  finally:
    shutil.rmtree(partial, ignore_errors=True)


def _of_settings(settings: Settings) -> NameMap:
  """The family that config.json names by its model_type, or else by its architecture."""
  model_type, architectures = settings.get("model_type"), settings.get("architectures", [])
  for names in _NAME_MAPS:
    if model_type == names.model_type or (
      model_type is None and architectures == [names.architecture]
    ):
      return names
  known = " and ".join(f"{names.model_type!r} ({names.family})" for names in _NAME_MAPS)
  raise ValueError(
    f"{settings.source}: model_type {model_type!r} (architectures {architectures!r}) cannot be "
    f"loaded; known are {known}"
  )


def _of_config(config: DecoderConfig) -> tuple[NameMap, dict[str, Any]]:
  """The family that can express `config`, and the keys of its config.json that do."""
  for block in residual(config.pattern):
    if not any(isinstance(block.mixer, names.mixers) for names in _NAME_MAPS):
      known = "; ".join(
        f"{names.family}: {', '.join(_name(mixer) for mixer in names.mixers)}"
        for names in _NAME_MAPS
      )
      raise ValueError(
        f"save: {_name(type(block.mixer))} has no Hugging Face form; the mixers that have one are "
        f"of {known}"
      )
  reasons = []
  for names in _NAME_MAPS:
    try:
      settings = names.to_json(config)
      _check_reads_back(names, settings, config)
      return names, settings
    except ValueError as error:
      reasons.append(f"as {names.family}: {error}")
  raise ValueError(f"save: the model cannot be saved {'; '.join(reasons)}")


def _check_reads_back(names: NameMap, settings: dict[str, Any], config: DecoderConfig) -> None:
  """ValueError unless `settings` describe the model of `config`: a name map need not know every
  choice that our configs offer."""
  read = names.from_json(Settings(settings, "config.json"), dtype=config.param_dtype)
  ours, theirs = (dataclasses.replace(c, pattern=c.blocks) for c in (config, read))
  for path, value, its_value in differences(ours, theirs):
    raise ValueError(f"{path} {value!r}: its own is {its_value!r}")


def _name(mixer: type) -> str:
  return f"{mixer.__module__.removeprefix('models.layers.')}.{mixer.__qualname__}"


def _used_tensors(stored: dict[str, StoredTensor], names: NameMap) -> dict[str, StoredTensor]:
  """The tensors that logits depend on, by the names of the model with its head."""
  prefix, _, inner = names.embedding.partition(".")
  if inner in stored:  # saved without the head
    stored = {f"{prefix}.{name}": tensor for name, tensor in stored.items()}
  return {name: tensor for name, tensor in stored.items() if not _UNUSED_TENSORS.search(name)}


def _check_tied(head: StoredTensor, embedding: StoredTensor, shape: tuple[int, ...]) -> None:
  if not np.array_equal(head.read(shape), embedding.read(shape), equal_nan=True):
    raise ValueError(
      f"{head.path}: {head.name} differs from {embedding.name}, and config.json has "
      "tie_word_embeddings; a tied unembedding must be the same"
    )


def _check_params(config: DecoderConfig, params: Params) -> None:
  expected = jax.tree_util.tree_leaves_with_path(decoder.build(config).shapes)
  given = dict(jax.tree_util.tree_leaves_with_path(params))
  if given.keys() != {path for path, _ in expected}:
    different = sorted(jax.tree_util.keystr(p) for p in given.keys() ^ {p for p, _ in expected})
    raise ValueError(f"save: the config and the parameters do not both have {different}")
  for path, shape in expected:
    leaf = given[path]
    if leaf.shape != shape.shape or str(leaf.dtype) not in ("float32", "bfloat16"):
      raise ValueError(
        f"save: parameter {jax.tree_util.keystr(path)} is {leaf.dtype} {leaf.shape}, the config "
        f"asks for float32 or bfloat16 {shape.shape}"
      )


def _narrowed(names: NameMap, views: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
  """Of a bfloat16 model all tensors in bfloat16 if that loses no bit of any, else as they are."""
  dtype = views[names.embedding].dtype
  if dtype != "bfloat16":
    return views
  narrow = {}
  for name, view in views.items():
    narrow[name] = view.astype(dtype, copy=False)
    if view.dtype != dtype and not (narrow[name] == view).all():
      return views
  return narrow
