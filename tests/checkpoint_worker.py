"""A training run that can be killed, for train/checkpoint/test_checkpoint_kills.py.

`python -m tests.checkpoint_worker` imports everything once, and then forks a run for every line of
JSON on stdin, so that a start costs a second and not five. It answers with lines of its own: the
process id, "ready STEP" once the run has restored, and how it ended.
"""

import json
import os
import pathlib
import shutil
import signal
import sys
import time
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from train.checkpoint import checkpoints, folder
from train.checkpoint.checkpoints import CheckpointConfig, Checkpoints

# To be killed: a temporary checkpoint a hundredth of a second after the last one begins, so that
# a run is saving or removing one for most of its time.
BUSY = CheckpointConfig(every_steps=100, keep_permanent=2, temporary_minutes=0.01 / 60)
CALM = CheckpointConfig(every_steps=100, keep_permanent=2)


class State(NamedTuple):
  step: jax.Array
  params: dict[str, jax.Array]


def _update(state: State) -> State:
  step = state.step + 1
  w_DF = state.params["w_DF"]
  g_DF = jax.random.normal(jax.random.fold_in(jax.random.key(0), step), w_DF.shape)
  mean_F = (0.9 * state.params["mean_F"] + jnp.mean(w_DF, axis=0)).astype(jnp.bfloat16)
  return State(step, {"w_DF": 0.99 * w_DF + g_DF * jnp.cos(w_DF), "mean_F": mean_F})


def _init() -> State:
  return State(jnp.int32(0), {"w_DF": jnp.ones((8, 32)), "mean_F": jnp.zeros((32,), jnp.bfloat16)})


def _shardings() -> State:
  devices = np.array(jax.devices()).reshape(2, 2)
  mesh = jax.sharding.Mesh(devices, ("a", "b"), axis_types=(AxisType.Auto,) * 2)
  specs = State(PartitionSpec(), {"w_DF": PartitionSpec("a", "b"), "mean_F": PartitionSpec("b")})
  return jax.tree.map(
    lambda spec: NamedSharding(mesh, spec), specs, is_leaf=lambda x: isinstance(x, PartitionSpec)
  )


def run(directory: str | None, result: str | None, total_steps: int, die_in: str | None) -> None:
  """Trains to `total_steps` and writes the state to `result`, if that is asked for.

  Without a directory nothing is saved; with one and without `result` the run is to be killed.
  """
  shardings = _shardings()
  update = jax.jit(_update, donate_argnums=0, out_shardings=shardings)
  if directory is None:
    state = jax.jit(_init, out_shardings=shardings)()
    for _ in range(total_steps):
      # Simulated devices share few threads: with many steps in flight their collectives deadlock.
      state = jax.block_until_ready(update(state))
  else:
    if die_in is not None:
      _die_in(die_in)
    with Checkpoints(directory, CALM if result else BUSY) as saved:
      abstract = jax.tree.map(
        lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
        jax.eval_shape(_init),
        shardings,
      )
      restored = saved.restore(abstract)
      state = jax.jit(_init, out_shardings=shardings)() if restored is None else restored.state
      start = int(state.step)
      assert restored is None or start == restored.step == restored.record["step"]
      update = update.lower(abstract).compile()
      _say(f"ready {start}")
      for step in range(start + 1, total_steps + 1):
        state = jax.block_until_ready(update(state))
        time.sleep(0.0 if result else 0.01)
        if kind := saved.due(step):
          saved.save(step, state, {"step": step}, kind=kind)
  if result is not None:
    arrays = {"w_DF": state.params["w_DF"], "mean_F": state.params["mean_F"].view(jnp.uint16)}
    np.savez(result, step=state.step, **arrays)


def _die_in(place: str) -> None:
  """Makes this process kill itself at that place, the third time it comes there."""
  times = 0

  def dying(function):
    def wrapper(*arguments):
      nonlocal times
      times += 1
      if times >= 3:
        os.kill(os.getpid(), signal.SIGKILL)
      return function(*arguments)

    return wrapper

  def remove_half(path: pathlib.Path) -> None:
    shutil.rmtree(path / "state")

  match place:
    case "before the arrays are copied":
      checkpoints.checksums = dying(checkpoints.checksums)
    case "before the folder is renamed":
      folder.FolderWriter._flush = dying(folder.FolderWriter._flush)
    case "after the folder is renamed":
      flush = folder.flush_to_disk
      in_parent = dying(flush)

      def flush_parent(path: pathlib.Path) -> None:
        is_parent = (path / "lock").exists()
        (in_parent if is_parent else flush)(path)

      folder.flush_to_disk = flush_parent
    case "before an old one is removed":
      folder.FolderWriter.remove = dying(folder.FolderWriter.remove)
    case "while an old one is removed":
      half, whole = dying(lambda path: None), folder.remove_tree

      def remove(path: pathlib.Path) -> None:
        remove_half(path)
        half(path)
        whole(path)

      folder.remove_tree = remove
    case _:
      raise ValueError(place)


def _say(text: str) -> None:
  os.write(1, f"{text}\n".encode())


def main() -> None:
  logging.set_verbosity(logging.ERROR)
  for line in sys.stdin:
    pid = os.fork()
    if pid == 0:
      run(**json.loads(line))
      os._exit(0)
    _say(f"pid {pid}")
    _, status = os.waitpid(pid, 0)
    _say(f"end {os.waitstatus_to_exitcode(status)}")


if __name__ == "__main__":
  main()
