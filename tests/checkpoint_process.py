"""One process of a job that saves and restores, for train/checkpoint/test_checkpoint_processes.py.

`python -m tests.checkpoint_process PORT COUNT INDEX DIRECTORY` trains 40 steps from where it is.
"""

import sys

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from train.checkpoint.checkpoints import CheckpointConfig, Checkpoints

# As if hours passed between steps: whenever process 0 is asked for the time, something is due.
CONFIG = CheckpointConfig(every_steps=20, temporary_minutes=1e-9, on_damage="previous")


def shardings(mesh: jax.sharding.Mesh) -> dict[str, NamedSharding]:
  return {
    "step": NamedSharding(mesh, PartitionSpec()),
    "w_DF": NamedSharding(mesh, PartitionSpec("a", "b")),
  }


def init() -> dict[str, jax.Array]:
  return {"step": jnp.int32(0), "w_DF": jnp.arange(64.0).reshape(8, 8)}


def update(state: dict[str, jax.Array]) -> dict[str, jax.Array]:
  return {"step": state["step"] + 1, "w_DF": state["w_DF"] * 1.01}


def make_mesh() -> jax.sharding.Mesh:
  devices = np.array(jax.devices()[:4]).reshape(2, 2)
  return jax.sharding.Mesh(devices, ("a", "b"), axis_types=(AxisType.Auto,) * 2)


def abstract(mesh: jax.sharding.Mesh) -> dict[str, jax.ShapeDtypeStruct]:
  return jax.tree.map(
    lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
    jax.eval_shape(init),
    shardings(mesh),
  )


def train(directory: str, *, num_steps: int) -> None:
  """So many steps from the newest checkpoint; tells each save, and where it started."""
  mesh = make_mesh()
  layout = shardings(mesh)
  with Checkpoints(directory, CONFIG) as checkpoints:
    restored = checkpoints.restore(abstract(mesh))
    state = jax.jit(init, out_shardings=layout)() if restored is None else restored.state
    start = int(state["step"])
    print("start", start, flush=True)
    step_fn = jax.jit(update, out_shardings=layout)
    for step in range(start + 1, start + num_steps + 1):
      state = jax.block_until_ready(step_fn(state))
      if kind := checkpoints.due(step):
        print(kind, step, flush=True)
        checkpoints.save(step, state, {}, kind=kind)


def main() -> None:
  logging.set_verbosity(logging.FATAL)
  port, count, index, directory = sys.argv[1:]
  jax.distributed.initialize(
    f"localhost:{port}", int(count), int(index), heartbeat_timeout_seconds=20
  )
  train(directory, num_steps=40)


if __name__ == "__main__":
  main()
