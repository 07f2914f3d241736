"""Writes tests/golden/recurrentgemma/*.npz: what the `recurrentgemma` 1.0.1 package computes.

The package pins typeguard below 3, so it lives in an environment of its own:

  python3.11 -m venv ~/oracle
  ~/oracle/bin/pip install "recurrentgemma[jax]==1.0.1" "jax==0.10.2" "flax==0.12.8"
  ~/oracle/bin/python tests/golden/make_recurrentgemma.py

Run from anywhere; the numbers depend on the CPU in the last bits only. Each model file holds its
config (JSON), the parameters in the package's tree ("params/blocks.0/..."), and for each case
("plain", "packed") the tokens, the positions, the float32 logits and the gradient of `loss` with
respect to every parameter. Parameters are multiples of 2^-10, so that the files compress.
"""

import json
import os
import pathlib

os.environ["JAX_PLATFORMS"] = "cpu"

import jax
import jax.numpy as jnp
import numpy as np
from recurrentgemma import common
from recurrentgemma.jax import griffin, layers, modules, scan

FOLDER = pathlib.Path(__file__).parent / "recurrentgemma"
R, A = common.TemporalBlockType.RECURRENT, common.TemporalBlockType.ATTENTION

# Griffin with a remainder and a window shorter than the row; recurrence only; attention that sees
# the whole row; 16 gate blocks, as the paper has.
MODELS = {
  "griffin": {"width": 32, "num_heads": 4, "lru_width": 48, "window": 6, "blocks": (R, R, A, R, R)},
  "hawk": {"width": 32, "num_heads": 4, "lru_width": 32, "window": 6, "blocks": (R, R, R)},
  "attention": {"width": 32, "num_heads": 2, "lru_width": 32, "window": 64, "blocks": (A, A)},
  "gates16": {"width": 64, "num_heads": 16, "lru_width": 64, "window": 5, "blocks": (R, A)},
}
UNSCALED = ("hawk",)  # neither embedding scale nor logit cap, as in the paper
ONLY_PACKED = ("hawk", "gates16")
VOCAB_SIZE, TIME = 61, 29
PROMPTS = (1, 2, 5, 12)

# Lengths of documents in each row; a negative one is padding, which the package marks by -1.
PACKED_ROWS = ((7, 1, 1, 13, -7), (-2, 3, -2, 20, 1, -1), (1, 28))


def main():
  jax.config.update("jax_default_matmul_precision", "highest")
  FOLDER.mkdir(exist_ok=True)
  for seed, (name, sizes) in enumerate(MODELS.items()):
    write(name, model_arrays(np.random.default_rng(seed), name, **sizes))
  write("layers", layer_arrays(np.random.default_rng(99)))


def write(name, arrays):
  path = FOLDER / f"{name}.npz"
  np.savez_compressed(path, **arrays)
  print(path.name, path.stat().st_size, "bytes")


def model_arrays(rng, name, *, width, num_heads, lru_width, window, blocks):
  """Everything that is recorded of one model."""
  settings = {
    "vocab_size": VOCAB_SIZE,
    "width": width,
    "mlp_expanded_width": 3 * width,
    "num_heads": num_heads,
    "lru_width": lru_width,
    "attention_window_size": window,
    "embeddings_scale_by_sqrt_dim": name not in UNSCALED,
    "logits_soft_cap": 0.0 if name in UNSCALED else 30.0,
  }
  config = common.GriffinConfig(
    **settings, block_types=blocks, scan_type=common.ScanType.ASSOCIATIVE_NATIVE
  )
  model = griffin.Griffin(config, gradient_checkpointing=False)
  shapes = jax.eval_shape(
    lambda: model.init(jax.random.key(0), jnp.ones((1, 4), jnp.int32), jnp.arange(4)[None])
  )["params"]
  params = random_tree(rng, shapes)
  settings["block_types"] = [block.name.lower() for block in blocks]
  arrays = {"config": np.array(json.dumps(settings)), **flat("params", params)}

  plain_BT = np.tile(np.arange(TIME, dtype=np.int32), (2, 1))
  packed_BT = np.stack([positions(row) for row in PACKED_ROWS])
  cases = {"packed": packed_BT} if name in ONLY_PACKED else {"plain": plain_BT, "packed": packed_BT}
  for case, segment_pos_BT in cases.items():
    shape = segment_pos_BT.shape
    tokens_BT = rng.integers(0, VOCAB_SIZE, shape, np.int32)
    targets_BT = rng.integers(0, VOCAB_SIZE, shape, np.int32)
    mix_BTV = (rng.normal(size=(*shape, VOCAB_SIZE)) * 64).round().astype(np.float32) / 64
    weights_BT = (segment_pos_BT >= 0).astype(np.float32)

    def loss(params, tokens_BT, segment_pos_BT, targets_BT, weights_BT, mix_BTV):
      """Cross-entropy, plus a term that pulls at every logit; padding has no weight."""
      logits_BTV, _ = model.apply({"params": params}, tokens_BT, segment_pos_BT, return_cache=False)
      log_p_BT = jnp.take_along_axis(
        jax.nn.log_softmax(logits_BTV), targets_BT[..., None], axis=-1
      )[..., 0]
      each_BT = -log_p_BT + 0.1 * jnp.sum(mix_BTV * logits_BTV, axis=-1)
      return jnp.sum(weights_BT * each_BT) / jnp.sum(weights_BT), logits_BTV

    given = [jnp.asarray(x) for x in (tokens_BT, segment_pos_BT, targets_BT, weights_BT, mix_BTV)]
    (value, logits_BTV), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(params, *given)
    arrays |= {
      f"{case}/tokens_BT": tokens_BT,
      f"{case}/segment_pos_BT": segment_pos_BT,
      f"{case}/targets_BT": targets_BT,
      f"{case}/weights_BT": weights_BT,
      f"{case}/mix_BTV": mix_BTV,
      f"{case}/loss": np.asarray(value),
      f"{case}/logits_BTV": np.asarray(logits_BTV),
      **flat(f"{case}/grads", grads),
    }
    print(name, case, "loss", float(value), "largest logit", float(jnp.abs(logits_BTV).max()))
  if name == "griffin":
    arrays |= decoded(model, params, arrays["plain/tokens_BT"])
  return arrays


def decoded(model, params, tokens_BT):
  """Logits of prefill and then one token at a time, for prompts short and past the window."""
  prefill = jax.jit(lambda p, tokens, pos: model.apply({"params": p}, tokens, pos))
  step = jax.jit(lambda p, tokens, pos, cache: model.apply({"params": p}, tokens, pos, cache))
  arrays = {}
  for prompt in PROMPTS:
    pos_BT = jnp.tile(jnp.arange(TIME, dtype=jnp.int32), (tokens_BT.shape[0], 1))
    tokens_BT = jnp.asarray(tokens_BT)
    logits_BTV, cache = prefill(params, tokens_BT[:, :prompt], pos_BT[:, :prompt])
    pieces = [logits_BTV]
    for t in range(prompt, TIME):
      one_B1V, cache = step(params, tokens_BT[:, t : t + 1], pos_BT[:, t : t + 1], cache)
      pieces.append(one_B1V)
    arrays[f"decode/{prompt}/logits_BTV"] = np.concatenate(pieces, axis=1)
  return arrays


def layer_arrays(rng):
  """The parts alone: values and gradients for a cotangent each."""
  arrays = {}

  def record(name, function, inputs, *, differentiable):
    """Inputs, output and the gradients of sum(cotangent * output)."""
    inputs = {key: jnp.asarray(value) for key, value in inputs.items()}
    outputs, pull = jax.vjp(
      lambda *args: function(**{**inputs, **dict(zip(differentiable, args))}),
      *(inputs[key] for key in differentiable),
    )
    cotangents = jax.tree.map(lambda y: jnp.asarray(quantized(rng.normal(size=y.shape))), outputs)
    arrays.update({f"{name}/{key}": np.asarray(value) for key, value in inputs.items()})
    for key, gradient in zip(differentiable, pull(cotangents)):
      arrays[f"{name}/grads/{key}"] = np.asarray(gradient)
    for index, y in enumerate(jax.tree.leaves(outputs)):
      arrays[f"{name}/y{index}"] = np.asarray(y)
      arrays[f"{name}/cotangent{index}"] = np.asarray(jax.tree.leaves(cotangents)[index])

  batch, time, width = 2, 29, 12
  x_BTD = quantized(rng.normal(size=(batch, time, width)))
  a_BTD = rng.uniform(0, 1, size=(batch, time, width)).astype(np.float32) ** 0.25
  a_BTD[:, 5::7] = 0.0
  a_BTD[:, 3::11] = 1.0
  h0_BD = quantized(rng.normal(size=(batch, width)))
  for direction in ("forward", "reverse"):
    record(
      f"scan_{direction}",
      lambda x_BTD, a_BTD, h0_BD, direction=direction: scan.linear_scan(
        x_BTD,
        a_BTD,
        h0_BD,
        reverse=direction == "reverse",
        scan_type=common.ScanType.LINEAR_NATIVE,
      ),
      {"x_BTD": x_BTD, "a_BTD": a_BTD, "h0_BD": h0_BD},
      differentiable=("x_BTD", "a_BTD", "h0_BD"),
    )

  z = np.array([0.0, 1e-12, 1e-9, 2.4e-7, 2.5e-7, 2.6e-7, 1e-4, 0.3, 1.0], np.float32)
  record(
    "sqrt",
    lambda z: layers.sqrt_bound_derivative(z, 1000.0),
    {"z": z},
    differentiable=("z",),
  )

  position_BT = np.stack([np.arange(time), np.arange(time) * 37 % 4096]).astype(np.int32)
  record(
    "rope",
    modules._apply_rope,
    {
      "inputs": quantized(rng.normal(size=(batch, time, 3, 16))),
      "positions": position_BT,
    },
    differentiable=("inputs",),
  )

  segment_pos_BT = np.stack([positions(row) for row in ((7, 1, 1, 20), (3, 2, 24))])
  for name, module in {
    "rms_norm": layers.RMSNorm(width=width),
    "rg_lru": layers.RGLRU(width=width, num_heads=3, scan_type=common.ScanType.ASSOCIATIVE_NATIVE),
    "recurrent_block": modules.RecurrentBlock(
      width=width, num_heads=4, lru_width=16, scan_type=common.ScanType.ASSOCIATIVE_NATIVE
    ),
    "attention_block": modules.LocalAttentionBlock(width=width, num_heads=3, window_size=5),
    "mlp_block": modules.MLPBlock(width=width, expanded_width=20),
  }.items():
    is_mixer = name not in ("rms_norm", "mlp_block")
    more = {"segment_pos": jnp.asarray(segment_pos_BT)} if is_mixer else {}
    shapes = jax.eval_shape(
      lambda module=module, more=more: module.init(jax.random.key(0), jnp.asarray(x_BTD), **more)
    )["params"]
    params = flat("params", random_tree(rng, shapes))

    def call(x, segment_pos=None, *, module=module, is_mixer=is_mixer, **params):
      tree = {"params": unflat(params)}
      return module.apply(tree, x, segment_pos)[0] if is_mixer else module.apply(tree, x)

    record(name, call, {"x": x_BTD, **more, **params}, differentiable=("x", *params))
  return arrays


def positions(lengths):
  """The package's segment_pos of a row of documents and padding."""
  return np.concatenate(
    [np.arange(n) if n > 0 else np.full(-n, -1) for n in lengths], dtype=np.int32
  )


def random_tree(rng, shapes):
  """Values that leave no parameter without effect; each kind has a spread that suits it."""

  def draw(path, shape):
    name = path[-1].key
    normal = rng.normal(size=shape.shape)
    if name == "input_embedding":
      return 1.5 * normal / np.sqrt(shape.shape[-1])
    if name == "a_param":
      return rng.uniform(-6.0, 1.0, shape.shape)
    if name in ("scale", "b", "bias"):
      return 0.3 * normal
    if name == "w" and len(shape.shape) == 2:  # the convolution's taps
      return 0.5 * normal
    return normal / np.sqrt(shape.shape[-2])

  return jax.tree_util.tree_map_with_path(
    lambda path, shape: jnp.asarray(quantized(draw(path, shape))), shapes
  )


def quantized(x):
  """The nearest multiple of 2^-10, float32."""
  return (np.round(np.asarray(x) * 1024) / 1024).astype(np.float32)


def flat(prefix, tree):
  """{"prefix/a/b": array} of a nested dict."""
  if not isinstance(tree, dict):
    return {prefix: np.asarray(tree)}
  return {
    name: leaf
    for key, inner in tree.items()
    for name, leaf in flat(f"{prefix}/{key}", inner).items()
  }


def unflat(arrays):
  """The nested dict under "params/" in names such as "params/a/b"."""
  tree = {}
  for name, array in arrays.items():
    *folders, leaf = name.split("/")[1:]
    inner = tree
    for folder in folders:
      inner = inner.setdefault(folder, {})
    inner[leaf] = array
  return tree


if __name__ == "__main__":
  main()
