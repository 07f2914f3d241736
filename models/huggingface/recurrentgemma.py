"""Hugging Face RecurrentGemma directories in and out: config.json and safetensors files.

Both directions use one list: `_tensors` names, by Hugging Face's names and in its shapes, views of
our parameters; loading writes into the views and saving reads them, so neither can forget a tensor
or turn it another way than the other. What cannot be said in the other format is refused by name.

Two things to know before comparing with `transformers`: it has no document masks, and where a row
is longer than the window its attention sees other keys than ours: one less in 5.23.0, all before in
4.40.2 and 4.57.1 without a cache. For T <= window both agree.
"""

import json
import os
import pathlib
import shutil
from typing import Any, Literal, NamedTuple

import jax
import numpy as np
import safetensors
import safetensors.numpy

from models import decoder
from models.decoder import DecoderConfig, DType, Params
from models.huggingface import recurrentgemma_config
from models.layers import rg_lru

_INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"
# The dtype that holds every value of a stored one.
_DTYPES = {"F32": "float32", "BF16": "bfloat16", "F16": "float32"}


def load(
  directory: str | os.PathLike[str], *, param_dtype: DType | Literal["as_stored"] = "as_stored"
) -> tuple[DecoderConfig, Params]:
  """The model in `directory`: its config, and its parameters as numpy arrays on the host.

  Lay them out with `jax.device_put`; nothing is put on a device here.

  "as_stored" gives the matrices in the dtype of the files, float32 for float16, which we do not
  compute in; "float32" or "bfloat16" converts them.
  Norms, gate biases and decay are float32 always. Activations get the matrices' dtype; change that
  with `dataclasses.replace(config, dtype=...)`. ValueError names what is missing, unknown or wrong.
  """
  directory = pathlib.Path(directory)
  settings = _read_json(directory / "config.json")
  stored = _stored_tensors(directory)
  if "embed_tokens.weight" in stored:  # the model without its head, which is tied anyway
    stored = {f"model.{name}": tensor for name, tensor in stored.items()}
  embedding = stored.get("model.embed_tokens.weight")
  stored_dtype = _DTYPES.get(embedding.dtype, "float32") if embedding else "float32"
  dtype: Any = stored_dtype if param_dtype == "as_stored" else param_dtype
  config = recurrentgemma_config.from_json(settings, source=directory / "config.json", dtype=dtype)
  shapes = decoder.build(config).shapes
  params = jax.tree.map(lambda leaf: np.empty(leaf.shape, leaf.dtype), shapes)
  views = _tensors(config, params)
  _check_names(directory, set(views), set(stored) - {"lm_head.weight"})
  for name, view in views.items():
    tensor = stored[name].read(view.shape)
    # Not by their sizes: float16 has as many bytes as bfloat16 and more bits of precision.
    if param_dtype == "as_stored" and view.dtype == "bfloat16" != _DTYPES[stored[name].dtype]:
      raise ValueError(
        f"{stored[name].path}: {name} is {tensor.dtype} where the embedding is {stored_dtype}; "
        "give load(param_dtype='float32') to keep every bit, or 'bfloat16' to round"
      )
    view[...] = tensor
  if "lm_head.weight" in stored:
    unembed_VD = stored["lm_head.weight"].read(views["model.embed_tokens.weight"].shape)
    embed_VD = stored["model.embed_tokens.weight"].read(unembed_VD.shape)
    if not np.array_equal(unembed_VD, embed_VD, equal_nan=True):
      raise ValueError(
        f"{directory}: lm_head.weight differs from model.embed_tokens.weight; only a tied "
        "unembedding can be loaded"
      )
  return config, params


def save(
  directory: str | os.PathLike[str],
  config: DecoderConfig,
  params: Params,
  *,
  bos_token_id: int | None = None,
  eos_token_id: int | None = None,
  pad_token_id: int | None = None,
  max_shard_bytes: int = 4 * 2**30,
) -> None:
  """Writes `directory`, which must not exist or be empty: whole, or not at all.

  Every array keeps its dtype, but for a bfloat16 model whose float32 arrays are all bfloat16 values
  still, as `load` gave them: they are written as such, so that what was loaded is saved again bit
  for bit. The token ids, None for a vocabulary without such a token, are what
  `generate` in transformers stops at and pads with. ValueError if RecurrentGemma cannot express the
  config, or the parameters are not the config's.
  """
  directory = pathlib.Path(directory).resolve()  # what a link names is replaced, not the link
  settings = recurrentgemma_config.to_json(config) | {
    "bos_token_id": bos_token_id,
    "eos_token_id": eos_token_id,
    "pad_token_id": pad_token_id,
  }
  _check_params(config, params)
  if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
    raise ValueError(f"save: {directory} exists and is not an empty directory; give a new one")
  if directory == pathlib.Path.cwd():
    raise ValueError(f"save: {directory} is the working directory; give a new one")
  views = _narrowed(config, _tensors(config, jax.tree.map(np.asarray, params)))
  directory.parent.mkdir(parents=True, exist_ok=True)
  partial = directory.with_name(f".{directory.name}.{os.getpid()}.partial")
  partial.mkdir()
  try:
    (partial / "config.json").write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n")
    _write_shards(partial, views, max_shard_bytes)
    os.replace(partial, directory)
  finally:
    shutil.rmtree(partial, ignore_errors=True)


def _narrowed(config: DecoderConfig, views: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
  """The tensors in the config's dtype if that loses no bit of any, else as they are."""
  narrow = {name: view.astype(config.param_dtype, copy=False) for name, view in views.items()}
  is_exact = all(
    (narrow[name] == view).all() for name, view in views.items() if view.dtype != config.param_dtype
  )
  return narrow if is_exact else views


def _tensors(config: DecoderConfig, params: Params) -> dict[str, np.ndarray]:
  """Views of every parameter under its Hugging Face name, in its Hugging Face shape."""
  views = {
    "model.embed_tokens.weight": params["embedding"]["table_VD"],
    "model.final_norm.weight": params["final_norm"]["scale_D"],
  }
  for index, (block, p) in enumerate(zip(config.blocks, decoder.split_blocks(config, params))):
    of_mixer = _recurrent if isinstance(block.mixer, rg_lru.Config) else _attention
    of_block = {
      "temporal_pre_norm.weight": p["mixer_norm"]["scale_D"],
      "channel_pre_norm.weight": p["mlp_norm"]["scale_D"],
      **{f"temporal_block.{name}": view for name, view in of_mixer(p["mixer"]).items()},
      "mlp_block.gate_proj.weight": p["mlp"]["w_up_D2F"][:, 0].T,
      "mlp_block.gate_proj.bias": p["mlp"]["b_up_2F"][0],
      "mlp_block.up_proj.weight": p["mlp"]["w_up_D2F"][:, 1].T,
      "mlp_block.up_proj.bias": p["mlp"]["b_up_2F"][1],
      "mlp_block.down_proj.weight": p["mlp"]["w_down_FD"].T,
      "mlp_block.down_proj.bias": p["mlp"]["b_down_D"],
    }
    views |= {f"model.layers.{index}.{name}": view for name, view in of_block.items()}
  return views


def _recurrent(p: Params) -> dict[str, np.ndarray]:
  return {
    "linear_y.weight": p["w_in_D2R"][:, 0].T,
    "linear_y.bias": p["b_in_2R"][0],
    "linear_x.weight": p["w_in_D2R"][:, 1].T,
    "linear_x.bias": p["b_in_2R"][1],
    "conv_1d.weight": p["w_conv_KR"].T[:, None],  # the last tap is the current token's, in both
    "conv_1d.bias": p["b_conv_R"],
    "rg_lru.recurrent_gate_weight": p["w_gates_GI2J"][:, :, 0],
    "rg_lru.recurrent_gate_bias": p["b_gates_G2J"][:, 0],
    "rg_lru.input_gate_weight": p["w_gates_GI2J"][:, :, 1],
    "rg_lru.input_gate_bias": p["b_gates_G2J"][:, 1],
    "rg_lru.recurrent_param": p["decay_R"],
    "linear_out.weight": p["w_out_RD"].T,
    "linear_out.bias": p["b_out_D"],
  }


def _attention(p: Params) -> dict[str, np.ndarray]:
  width = p["b_out_D"].shape[0]
  # copy=False: a copy would silently stay empty when loading.
  return {
    "q_proj.weight": p["w_q_DNH"].reshape(width, -1, copy=False).T,
    "k_proj.weight": p["w_kv_D2H"][:, 0].T,
    "v_proj.weight": p["w_kv_D2H"][:, 1].T,
    "o_proj.weight": p["w_out_NHD"].reshape(-1, width, copy=False).T,
    "o_proj.bias": p["b_out_D"],
  }


class _Stored(NamedTuple):
  """One tensor of a file, not yet read."""

  path: pathlib.Path
  name: str
  dtype: str

  def read(self, shape: tuple[int, ...]) -> np.ndarray:
    """Its values; ValueError unless it has `shape` and a dtype that we know."""
    if self.dtype not in _DTYPES:
      raise ValueError(f"{self.path}: {self.name} is {self.dtype}; known are {sorted(_DTYPES)}")
    with safetensors.safe_open(self.path, framework="np") as file:
      stored_shape = tuple(file.get_slice(self.name).get_shape())
      if stored_shape != shape:
        raise ValueError(
          f"{self.path}: {self.name} has shape {stored_shape}, config.json asks for {shape}"
        )
      return file.get_tensor(self.name)


def _read_json(path: pathlib.Path) -> dict[str, Any]:
  if not path.is_file():
    raise ValueError(f"load: {path} does not exist; give a directory that holds {path.name}")
  try:
    value = json.loads(path.read_text(encoding="utf-8"))
  except ValueError as error:
    raise ValueError(f"{path}: not JSON: {error}") from error
  if not isinstance(value, dict):
    raise ValueError(f"{path}: must hold a JSON object, holds {type(value).__name__}")
  return value


def _stored_tensors(directory: pathlib.Path) -> dict[str, _Stored]:
  """Every tensor of the directory's files, by name; an index must name just what the files hold."""
  single, index = directory / _SINGLE, directory / _INDEX
  if single.exists() == index.exists():
    found = sorted(path.name for path in directory.iterdir())
    raise ValueError(f"{directory}: must hold either {_SINGLE} or {_INDEX}; holds {found}")
  if single.exists():
    return _tensors_of_file(single)
  weight_map = _read_json(index).get("weight_map")
  if not isinstance(weight_map, dict):
    raise ValueError(f"{index}: weight_map is missing")
  for name, file in weight_map.items():
    if not isinstance(file, str):
      raise ValueError(f"{index}: weight_map has {file!r} for {name}; it must name a file")
    # All of them first: a file that is there would seem to hold tensors of the one that is not.
    if not (directory / file).is_file():
      raise ValueError(f"{index}: names {file}, which does not exist")
  stored: dict[str, _Stored] = {}
  for file in sorted(set(weight_map.values())):
    of_file = _tensors_of_file(directory / file)
    indexed = {name for name, where in weight_map.items() if where == file}
    _check_names(directory / file, indexed, set(of_file), source=_INDEX)
    stored |= of_file
  return stored


def _tensors_of_file(path: pathlib.Path) -> dict[str, _Stored]:
  try:
    with safetensors.safe_open(path, framework="np") as file:
      names = file.keys()
      return {name: _Stored(path, name, file.get_slice(name).get_dtype()) for name in names}
  except safetensors.SafetensorError as error:
    raise ValueError(f"{path}: not a whole safetensors file: {error}") from error


def _check_names(
  place: pathlib.Path, expected: set[str], found: set[str], *, source: str = "config.json"
) -> None:
  for problem, names in (("missing", expected - found), ("not of the model", found - expected)):
    if names:
      raise ValueError(
        f"{place}: tensors {problem} (by {source}): {', '.join(sorted(names)[:8])}"
        + (f" and {len(names) - 8} more" if len(names) > 8 else "")
      )


def _check_params(config: DecoderConfig, params: Params) -> None:
  expected = jax.tree_util.tree_leaves_with_path(decoder.build(config).shapes)
  given = dict(jax.tree_util.tree_leaves_with_path(params))
  if given.keys() != {path for path, _ in expected}:
    different = sorted(jax.tree_util.keystr(p) for p in given.keys() ^ {p for p, _ in expected})
    raise ValueError(f"save: the config and the parameters do not both have {different}")
  for path, shape in expected:
    leaf = given[path]
    if (leaf.shape, leaf.dtype) != (shape.shape, shape.dtype):
      raise ValueError(
        f"save: parameter {jax.tree_util.keystr(path)} is {leaf.dtype} {leaf.shape}, the config "
        f"asks for {shape.dtype} {shape.shape}"
      )


def _write_shards(
  directory: pathlib.Path, views: dict[str, np.ndarray], max_shard_bytes: int
) -> None:
  """One file, or several and an index where one would be larger than `max_shard_bytes`."""
  shards: list[list[str]] = [[]]
  size = 0
  for name, view in views.items():
    if shards[-1] and size + view.nbytes > max_shard_bytes:
      shards.append([])
      size = 0
    shards[-1].append(name)
    size += view.nbytes
  files = [_SINGLE]
  if len(shards) > 1:
    files = [f"model-{i + 1:05}-of-{len(shards):05}.safetensors" for i in range(len(shards))]
    index = {
      "metadata": {"total_size": sum(view.nbytes for view in views.values())},
      "weight_map": {name: file for file, names in zip(files, shards) for name in names},
    }
    (directory / _INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")
  for file, names in zip(files, shards):
    try:
      safetensors.numpy.save_file(
        {name: np.ascontiguousarray(views[name]) for name in names},
        directory / file,
        metadata={"format": "pt"},  # transformers reads no other
      )
    except safetensors.SafetensorError as error:
      # Its own error for a full disk.
      raise OSError(f"{directory / file}: {error}") from error
