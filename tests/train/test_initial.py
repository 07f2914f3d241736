"""Runs that begin with the parameters of a Hugging Face directory, and their export as one."""

import dataclasses
import json
import pathlib
import resource
from typing import Any, NamedTuple

import jax
import numpy as np
import pytest

from data import vocabulary
from models import decoder
from models.huggingface.directory import save
from models.layers import rg_lru
from sharding.mesh import MeshShape
from tests import tiny
from train import program as programs
from train.initial import initial_state

_SETTINGS = {"embedding_scale": "sqrt_width", "logit_cap": 30.0}


def _run(folder, **of_model):
  """A Griffin that RecurrentGemma can express: it has as many gate blocks as heads."""
  run = tiny.run(folder, mesh=MeshShape(fsdp=4, tensor=2))
  pattern = tuple(
    dataclasses.replace(block, mixer=dataclasses.replace(block.mixer, num_gate_blocks=2))
    if isinstance(block.mixer, rg_lru.Config)
    else block
    for block in run.model.pattern
  )
  model = dataclasses.replace(run.model, pattern=pattern, **{**_SETTINGS, **of_model})
  return dataclasses.replace(run, model=model)


class _Saved(NamedTuple):
  """A folder of token stores, parameters that differ from a new run's, and their directory."""

  folder: pathlib.Path
  params: Any
  directory: str


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
  folder = tmp_path_factory.mktemp("saved")
  run = _run(folder)
  params = jax.device_get(jax.jit(decoder.build(run.model).init)(jax.random.key(7)))
  save(folder / "hf", run.model, params)
  return _Saved(folder, params, str(folder / "hf"))


@pytest.mark.parametrize("param_dtype", ["float32", "bfloat16"])
def test_a_run_begins_with_the_parameters_of_a_directory(saved, param_dtype):
  run = dataclasses.replace(_run(saved.folder, param_dtype=param_dtype), init_from=saved.directory)
  program = programs.build(run)
  state = initial_state(program)
  assert int(state.step) == 0
  assert all(not leaf.any() for leaf in jax.tree.leaves(state.opt_state.mu))

  def same(found, wanted, abstract):
    assert (found.shape, found.dtype) == (abstract.shape, abstract.dtype)
    assert found.sharding.is_equivalent_to(abstract.sharding, found.ndim)
    np.testing.assert_array_equal(found, wanted.astype(found.dtype))

  jax.tree.map(same, state.params, saved.params, program.abstract.params)


@pytest.mark.parametrize(
  ("of_model", "message"),
  [
    ({"logit_cap": None}, r"logit_cap is 30\.0 there, None in the config"),
    ({"embedding_scale": "none"}, "embedding_scale is 'sqrt_width' there, 'none' in the config"),
    ({"num_blocks": 3}, "num_blocks is 4 there, 3 in the config"),
    ({"width": 48}, "width is 32 there, 48 in the config"),
  ],
  ids=str,
)
def test_another_model_is_refused_by_what_differs(saved, monkeypatch, of_model, message):
  monkeypatch.setattr(programs, "initialize", None)  # nothing is drawn before
  run = dataclasses.replace(_run(saved.folder, **of_model), init_from=saved.directory)
  with pytest.raises(ValueError, match=rf"init_from .*/hf is of another model: {message}\. Set"):
    initial_state(programs.build(run))


def test_kernels_are_no_property_of_a_model(saved):
  run = _run(saved.folder)
  named = {"scan": "reference", "gates": "einsum", "conv": "shifts"}
  pattern = tuple(
    dataclasses.replace(block, mixer=dataclasses.replace(block.mixer, **named))
    if hasattr(block.mixer, "scan")
    else block
    for block in run.model.pattern
  )
  model = dataclasses.replace(run.model, pattern=pattern)
  run = dataclasses.replace(run, model=model, init_from=saved.directory)
  state = initial_state(programs.build(run))
  jax.tree.map(np.testing.assert_array_equal, state.params, saved.params)


def test_a_full_disk_is_the_disks_error_and_leaves_nothing(saved, tmp_path):
  limits = resource.getrlimit(resource.RLIMIT_FSIZE)
  resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limits[1]))
  try:
    with pytest.raises(OSError, match=r"File too large: .*model\.safetensors"):
      save(tmp_path / "hf", _run(saved.folder).model, saved.params)
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
  assert not list(tmp_path.iterdir())


def test_what_a_run_leaves_another_begins_with(commands, tmp_path):
  model = [f"--config.model.{name}={value}" for name, value in _SETTINGS.items()]
  model += [f"--config.model.pattern[{index}].mixer.num_gate_blocks=2" for index in (0, 1)]
  flags = [f"--config=tests/tiny_config.py:{tmp_path}", *model]
  flags += ["--config.total_steps=2", "--config.optimizer.warmup_steps=1"]
  first, second = f"--workdir={tmp_path / 'first'}", f"--workdir={tmp_path / 'second'}"
  output = f"--output={tmp_path / 'hf'}"

  def run(module, *more):
    return commands.run(module, [*flags, *more], tmp_path / "output")

  status, told = run("launch.export", first, output)
  assert status == 2
  assert "has no checkpoint; train first" in told.splitlines()[-1]
  assert run("launch.train", first)[0] == 0
  status, told = run("launch.export", first, output)
  assert status == 0, told
  assert "step 2 of" in told
  words = vocabulary.load("byte").record
  config = json.loads((tmp_path / "hf" / "config.json").read_text())
  ids = [config[f"{name}_token_id"] for name in ("bos", "eos", "pad")]
  assert ids == [words.bos, words.eos, words.pad]
  assert config["max_position_embeddings"] == 16
  tokenizer = vocabulary.load(str(tmp_path / "hf" / "tokenizer.json"))
  assert tokenizer.encode("aé").tolist() == vocabulary.load("byte").encode("aé").tolist()
  status, told = run("launch.export", first, output)
  assert status == 2
  assert "is not an empty directory" in told.splitlines()[-1]
  status, told = run("launch.export", first, f"--output={tmp_path / 'output'}/hf")
  assert status == 2
  assert "output: File exists: mend that" in told.splitlines()[-1]
  status, told = run("launch.export", first, output + "2", "--config.model.logit_cap=None")
  assert status == 2
  assert "model.logit_cap is 30.0 in the checkpoint, None now" in told.splitlines()[-1]

  init_from = f"--config.init_from={tmp_path / 'hf'}"
  status, told = run("launch.train", second, init_from)
  assert status == 0, told
  assert f"parameters from {tmp_path / 'hf'}" in told
  # From its own checkpoint now, and not from the directory again.
  status, told = run("launch.train", second, init_from, "--config.total_steps=3")
  assert status == 0, told
  assert "restored step 2" in told
  assert "parameters from" not in told
  status, told = run("launch.train", f"--workdir={tmp_path / 'third'}", init_from + "/none")
  assert status == 1
  assert "none/config.json does not exist" in told.splitlines()[-1]
  assert "Traceback" not in told
