"""Times training with the `recurrentgemma` 1.0.1 package: the other side of the speed bars.

A plain loop of optax's AdamW around the package's Griffin, in the shape of configs/bench_cpu.py, in
the environment of make_recurrentgemma.py (and `pip install "optax==0.2.8"`):

  LOOP=tests/golden/recurrentgemma_train_loop.py
  ~/oracle/bin/python $LOOP                          its best
  ~/oracle/bin/python $LOOP --scan=native --remat    its default
  ~/oracle/bin/python $LOOP --blocks=24              compile time

Prints one JSON object with the definitions of launch/bench.py: tokens_per_second is the median over
the timed steps, compile_seconds is to trace, lower and compile the step, peak_bytes is of the
compiled step: arguments + temporaries + outputs that alias no argument.
"""

import argparse
import datetime
import itertools
import json
import os
import platform
import resource
import statistics
import time

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import jax.numpy as jnp
import numpy as np
import optax
from recurrentgemma import common
from recurrentgemma.jax import griffin

R, A = common.TemporalBlockType.RECURRENT, common.TemporalBlockType.ATTENTION
SCANS = {
  "associative": common.ScanType.ASSOCIATIVE_NATIVE,
  "native": common.ScanType.LINEAR_NATIVE,  # what AUTO resolves to on a CPU
}


def main():
  args = arguments()
  config = common.GriffinConfig(
    vocab_size=256,
    width=256,
    mlp_expanded_width=768,
    num_heads=4,
    lru_width=256,
    block_types=tuple(itertools.islice(itertools.cycle((R, R, A)), args.blocks)),
    embeddings_scale_by_sqrt_dim=False,
    attention_window_size=256,
    logits_soft_cap=0.0,
    scan_type=SCANS[args.scan],
  )
  model = griffin.Griffin(config, gradient_checkpointing=args.remat)
  optimizer = optax.adamw(1e-3, b1=0.9, b2=0.95, weight_decay=0.1)
  batches = rows(np.random.default_rng(0), batch=args.batch, time=args.row)
  tokens_BT, targets_BT, position_BT, weights_BT = next(batches)
  init = jax.jit(model.init)
  params = init(jax.random.key(0), tokens_BT[:1, :4], position_BT[:1, :4])["params"]
  state = (params, jax.jit(optimizer.init)(params))

  def step(state, tokens_BT, targets_BT, position_BT, weights_BT):
    def loss(params):
      logits_BTV, _ = model.apply({"params": params}, tokens_BT, position_BT, return_cache=False)
      each_BT = optax.softmax_cross_entropy_with_integer_labels(logits_BTV, targets_BT)
      return jnp.sum(weights_BT * each_BT) / jnp.sum(weights_BT)

    params, moments = state
    value, grads = jax.value_and_grad(loss)(params)
    updates, moments = optimizer.update(grads, moments, params)
    return (optax.apply_updates(params, updates), moments), value

  start = time.perf_counter()
  compiled = (
    jax.jit(step, donate_argnums=0)
    .lower(state, tokens_BT, targets_BT, position_BT, weights_BT)
    .compile()
  )
  compile_seconds = time.perf_counter() - start
  memory = compiled.memory_analysis()

  seconds, losses = [], []
  for index in range(args.warmup + args.steps):
    batch = next(batches)
    start = time.perf_counter()
    state, value = compiled(state, *batch)
    jax.block_until_ready((state, value))
    if index >= args.warmup:
      seconds.append(time.perf_counter() - start)
    losses.append(float(value))
  result = {
    "tokens_per_second": args.batch * args.row / statistics.median(seconds),
    "compile_seconds": compile_seconds,
    "peak_bytes": memory.argument_size_in_bytes
    + memory.temp_size_in_bytes
    + memory.output_size_in_bytes
    - memory.alias_size_in_bytes,
    "temp_bytes": memory.temp_size_in_bytes,
    "process_peak_bytes": 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss,
    "num_params": sum(leaf.size for leaf in jax.tree.leaves(state[0])),
    "step_seconds": seconds,
    "first_loss": losses[0],
    "last_loss": losses[-1],
    "settings": vars(args),
    "device": f"{jax.devices()[0].device_kind}, {os.cpu_count()} cores, {platform.machine()}",
    "load_average": os.getloadavg(),
    "jax": jax.__version__,
    "date": datetime.date.today().isoformat(),
  }
  print(json.dumps(result))


def arguments():
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--blocks", type=int, default=6)
  parser.add_argument("--scan", choices=sorted(SCANS), default="associative")
  parser.add_argument("--remat", action=argparse.BooleanOptionalAction, default=False)
  parser.add_argument("--batch", type=int, default=4)
  parser.add_argument("--row", type=int, default=1024)
  parser.add_argument("--steps", type=int, default=10)
  parser.add_argument("--warmup", type=int, default=2)
  return parser.parse_args()


def rows(rng, *, batch, time):
  """Batches of random bytes, packed in documents; a document's last token has no target."""
  while True:
    tokens_BT = rng.integers(0, 256, (batch, time + 1), np.int32)
    is_start_BT = rng.random((batch, time + 1)) < 1 / 300
    is_start_BT[:, 0] = True
    index_T = np.arange(time + 1, dtype=np.int32)
    position_BT = index_T - np.maximum.accumulate(np.where(is_start_BT, index_T, 0), axis=1)
    weights_BT = 1.0 - is_start_BT[:, 1:]
    yield tuple(
      jnp.asarray(x, dtype)
      for x, dtype in (
        (tokens_BT[:, :-1], jnp.int32),
        (tokens_BT[:, 1:], jnp.int32),
        (position_BT[:, :-1], jnp.int32),
        (weights_BT, jnp.float32),
      )
    )


if __name__ == "__main__":
  main()
