"""The record of a run in each of its checkpoints, and what may change when the run goes on."""

import dataclasses
import fnmatch
import hashlib
import importlib.metadata
import json
import platform
from typing import Any

import jax

from data.token_store import read_manifest
from models import kernel_fields
from models.decoder import Model
from sharding import xla_flags
from train import recorded
from train.config import Run

# Paths of settings that leave the model and its batches as they are, as those of a record's kernels
# do. All others may not change.
MAY_CHANGE = (
  "name",
  "init_from",  # read before the first step only
  "total_steps",  # the schedule of the learning rate follows it
  "eval_every",
  "num_microbatches",
  "z_loss",
  "optimizer*",
  "mesh*",
  "zero_stage",
  "gradient_sums",
  "checkpoint*",
  "metrics*",
  "statistics*",
  "bad_steps*",
  "watchdog*",
  "xla_flags*",
  "model.remat",
  "model.layers",
  "data.at_end",  # the batches up to the end are the same
  "data.num_epochs",
  "data.eval_source",
  "data.eval_rows",
  "data.read_threads",
  "data.prefetch_batches",
)
# Exceptions to MAY_CHANGE: the arrays of the checkpoint have this dtype.
_FIXED = ("optimizer.moment_dtype",)
_PACKAGES = ("jax", "jaxlib", "flax", "grain", "numpy", "optax", "orbax-checkpoint")


def run_record(run: Run, model: Model) -> dict[str, Any]:
  """All that is needed to repeat or continue `run`, as plain JSON values.

  identity: path -> value of every setting. Kernels are named by what runs, XLA flags have their
  values for the devices at hand, and token stores are known by content, not by place.
  kernels: which paths of identity name a kernel. defaults: see train/recorded.py.
  versions and devices are for people.
  """
  # The name of what runs, not "auto": it may mean another kernel on the next machine.
  run = dataclasses.replace(run, model=run.model.resolved())
  identity = {
    path: value
    for path, value in recorded.settings(run).items()
    if not path.startswith("data.sources")
  }
  device_kind = jax.devices()[0].device_kind
  for name, value in run.xla_flags.resolved(xla_flags.key_of(device_kind)).items():
    identity[f"xla_flags.{name}"] = value
  for index, (path, weight) in enumerate(run.data.sources):
    manifest = read_manifest(path)
    identity[f"data.sources[{index}].weight"] = weight
    identity[f"data.sources[{index}].fingerprint"] = manifest.fingerprint
    for name, value in dataclasses.asdict(manifest.vocabulary).items():
      identity[f"data.sources[{index}].vocabulary.{name}"] = value
  identity["model.parameters"] = _fingerprint(model)
  record = {
    "identity": identity,
    "kernels": [f"model.{field.path}" for field in kernel_fields.marked(run.model)],
    "defaults": recorded.defaults(run),
    "sources": [path for path, _ in run.data.sources],
    "versions": {
      "python": platform.python_version(),
      **{name: importlib.metadata.version(name) for name in _PACKAGES},
    },
    "devices": {
      "kind": device_kind,
      "count": jax.device_count(),
      "processes": jax.process_count(),
    },
  }
  return json.loads(json.dumps(record))


def compare_records(saved: dict[str, Any], now: dict[str, Any]) -> list[str]:
  """Lines "path: was -> is" for what differs and may; ValueError for what may not change.

  A setting that `saved` lacks is no difference while it is at its default. One that this version
  lacks is refused: what it meant is not known here.
  """
  then, current = saved["identity"], now["identity"]
  # Records from before kernels were marked have no such list.
  kernels = {*saved.get("kernels", ()), *now["kernels"]}
  allowed, refused = [], []
  for path in sorted({*then, *current} - recorded.new_at_default(then, current, now["defaults"])):
    was, is_now = then.get(path, "(not there)"), current.get(path, "(not there)")
    if was == is_now:
      continue
    may_change = path in kernels or any(fnmatch.fnmatchcase(path, one) for one in MAY_CHANGE)
    may_change = may_change and path not in _FIXED
    (allowed if may_change else refused).append((path, was, is_now))
  if refused:
    lines = [
      f"{path} is {was!r} in the checkpoint, {is_now!r} now" for path, was, is_now in refused
    ]
    raise ValueError(
      f"this run cannot go on from its checkpoint: {'; '.join(lines)}. Set back what is named, or "
      "start a new run with another --workdir"
    )
  return [f"{path}: {was!r} -> {is_now!r}" for path, was, is_now in allowed]


def _fingerprint(model: Model) -> str:
  """sha256 over name, shape and dtype of every parameter."""
  arrays = [
    (jax.tree_util.keystr(path, simple=True, separator="/"), list(x.shape), str(x.dtype))
    for path, x in jax.tree_util.tree_leaves_with_path(model.shapes)
  ]
  return hashlib.sha256(json.dumps(arrays).encode()).hexdigest()
