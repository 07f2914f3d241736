"""Our models and layers against the `recurrentgemma` 1.0.1 package, in float32 on the CPU.

The recordings come from tests/golden/make_recurrentgemma.py: logits to 1e-5, every gradient to 1e-4
of its largest entry.
"""

import functools
import json
import pathlib
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from kernels import linear_scan
from kernels import rg_lru as rg_lru_kernel
from kernels.rg_lru import gates
from models import decoder, residual_block, stacks
from models.decoder import DecoderConfig
from models.layers import attention, mlp, norms, rg_lru
from models.layers import segments as segments_lib
from models.layers.rope import Rope, apply_rope

FOLDER = pathlib.Path(__file__).parents[1] / "golden" / "recurrentgemma"
LAYERS = np.load(FOLDER / "layers.npz")
CASES = [
  ("griffin", "plain"),
  ("griffin", "packed"),
  ("hawk", "packed"),
  ("attention", "plain"),
  ("attention", "packed"),
  ("gates16", "packed"),
]


class _Golden(NamedTuple):
  """One recorded model; `arrays` as in make_recurrentgemma.py."""

  arrays: dict[str, np.ndarray]
  config: DecoderConfig

  def params(self, prefix):
    """The package's tree under `prefix`, as our parameters."""
    num_heads = json.loads(str(self.arrays["config"]))["num_heads"]
    blocks = [
      _block({
        name.removeprefix(f"{prefix}/blocks.{index}/"): array
        for name, array in self.arrays.items()
        if name.startswith(f"{prefix}/blocks.{index}/")
      }, num_heads)
      for index in range(self.config.num_blocks)
    ]  # fmt: skip
    return {
      "embedding": {"table_VD": self.arrays[f"{prefix}/embedder/input_embedding"]},
      "final_norm": {"scale_D": self.arrays[f"{prefix}/final_norm/scale"]},
      **stacks.join_blocks(self.config, blocks),
    }


def _golden(name):
  arrays = dict(np.load(FOLDER / f"{name}.npz"))
  package = json.loads(str(arrays["config"]))
  width, num_heads = package["width"], package["num_heads"]
  geglu = mlp.Config(mlp_width=package["mlp_expanded_width"])
  mixers = {
    "recurrent": rg_lru.Config(rnn_width=package["lru_width"], num_gate_blocks=num_heads),
    "attention": attention.Config(
      num_heads=num_heads,
      head_size=width // num_heads,
      window=package["attention_window_size"],
    ),
  }
  kinds = {"griffin": ("recurrent", "recurrent", "attention"), "gates16": package["block_types"]}
  kinds = kinds.get(name, package["block_types"][:1])
  config = DecoderConfig(
    vocab_size=package["vocab_size"],
    width=width,
    num_blocks=len(package["block_types"]),
    pattern=tuple(residual_block.Config(mixer=mixers[kind], mlp=geglu) for kind in kinds),
    embedding_scale="sqrt_width" if package["embeddings_scale_by_sqrt_dim"] else "none",
    logit_cap=package["logits_soft_cap"] or None,
    dtype="float32",
    remat="none",
  )
  assert [mixers[kind] for kind in package["block_types"]] == [b.mixer for b in config.blocks]
  return _Golden(arrays, config)


def _block(p, num_heads):
  """One block of the package as one of ours."""
  mixer = (
    _recurrent({name.removeprefix("recurrent_block/"): w for name, w in p.items()})
    if "recurrent_block/linear_x/kernel" in p
    else _attention({name.removeprefix("attention_block/"): w for name, w in p.items()}, num_heads)
  )
  return {
    "mixer_norm": {"scale_D": p["temporal_pre_norm/scale"]},
    "mixer": mixer,
    "mlp_norm": {"scale_D": p["channel_pre_norm/scale"]},
    "mlp": _mlp({name.removeprefix("mlp_block/"): w for name, w in p.items()}),
  }


def _recurrent(p):
  return {
    "w_in_D2R": np.stack([p["linear_y/kernel"], p["linear_x/kernel"]], axis=1),
    "b_in_2R": np.stack([p["linear_y/bias"], p["linear_x/bias"]]),
    "w_conv_KR": p["conv_1d/w"],
    "b_conv_R": p["conv_1d/b"],
    "w_gates_GI2J": np.stack([p["rg_lru/a_gate/w"], p["rg_lru/input_gate/w"]], axis=2),
    "b_gates_G2J": np.stack([p["rg_lru/a_gate/b"], p["rg_lru/input_gate/b"]], axis=1),
    "decay_R": p["rg_lru/a_param"],
    "w_out_RD": p["linear_out/kernel"],
    "b_out_D": p["linear_out/bias"],
  }


def _attention(p, num_heads):
  width = p["proj_final/bias"].shape[0]
  return {
    "w_q_DNH": p["proj_q/kernel"].reshape(width, num_heads, -1),
    "w_kv_D2H": np.stack([p["proj_k/kernel"], p["proj_v/kernel"]], axis=1),
    "w_out_NHD": p["proj_final/kernel"].reshape(num_heads, -1, width),
    "b_out_D": p["proj_final/bias"],
  }


def _mlp(p):
  return {
    "w_up_D2F": p["ffw_up/w"].transpose(1, 0, 2),
    "b_up_2F": p["ffw_up/b"][:, 0, 0],
    "w_down_FD": p["ffw_down/kernel"],
    "b_down_D": p["ffw_down/bias"],
  }


def _segments(segment_pos_BT):
  """Segment ids from the package's positions: 0 where it has -1, else the document's number."""
  return np.where(segment_pos_BT < 0, 0, np.cumsum(segment_pos_BT == 0, axis=1)).astype(np.int32)


def _assert_gradients(ours, theirs):
  assert jax.tree.structure(ours) == jax.tree.structure(theirs)
  pairs = zip(jax.tree_util.tree_leaves_with_path(ours), jax.tree.leaves(theirs))
  for (path, gradient), expected in pairs:
    np.testing.assert_allclose(
      gradient,
      expected,
      rtol=0,
      atol=1e-4 * np.abs(expected).max(),
      err_msg=jax.tree_util.keystr(path),
    )


@pytest.mark.parametrize(("name", "case"), CASES)
def test_logits_and_gradients_are_the_packages(name, case):
  golden = _golden(name)
  given = {key: golden.arrays[f"{case}/{key}"] for key in ("tokens_BT", "targets_BT", "weights_BT")}
  mix_BTV = golden.arrays[f"{case}/mix_BTV"]
  segments_BT = _segments(golden.arrays[f"{case}/segment_pos_BT"])
  model = decoder.build(golden.config)

  def loss(params):
    logits_BTV = model.logits(params, jnp.asarray(given["tokens_BT"]), jnp.asarray(segments_BT))
    log_p_BT = jnp.take_along_axis(
      jax.nn.log_softmax(logits_BTV), given["targets_BT"][..., None], axis=-1
    )[..., 0]
    each_BT = -log_p_BT + 0.1 * jnp.sum(mix_BTV * logits_BTV, axis=-1)
    return jnp.sum(given["weights_BT"] * each_BT) / given["weights_BT"].sum(), logits_BTV

  params = golden.params("params")
  (value, logits_BTV), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(params)
  # Padding is a document of its own here, and part of the document before it in the package.
  is_token_BT = given["weights_BT"] > 0
  expected_BTV = golden.arrays[f"{case}/logits_BTV"]
  np.testing.assert_allclose(
    np.asarray(logits_BTV)[is_token_BT], expected_BTV[is_token_BT], atol=1e-5, rtol=0
  )
  np.testing.assert_allclose(value, golden.arrays[f"{case}/loss"], rtol=1e-6)
  _assert_gradients(grads, golden.params(f"{case}/grads"))


@pytest.mark.parametrize("prompt", [1, 2, 5, 12])
def test_prefill_and_decoding_give_the_packages_logits(prompt):
  golden = _golden("griffin")
  tokens_BT = jnp.asarray(golden.arrays["plain/tokens_BT"])
  model = decoder.build(golden.config)
  params = jax.tree.map(jnp.asarray, golden.params("params"))

  @jax.jit
  def extend(tokens_BT, state):
    x_BTD, unembed_VD, state = model.extend(params, tokens_BT, jnp.ones_like(tokens_BT), state)
    logits_BTV = jnp.einsum("BTD,VD->BTV", x_BTD, unembed_VD)
    cap = golden.config.logit_cap
    return cap * jnp.tanh(logits_BTV / cap), state

  batch, time = tokens_BT.shape
  logits_BTV, state = extend(tokens_BT[:, :prompt], model.initial_state(batch, context=time))
  pieces = [logits_BTV]
  for t in range(prompt, time):
    logits_B1V, state = extend(tokens_BT[:, t : t + 1], state)
    pieces.append(logits_B1V)
  np.testing.assert_allclose(
    jnp.concatenate(pieces, axis=1),
    golden.arrays[f"decode/{prompt}/logits_BTV"],
    atol=1e-5,
    rtol=0,
  )


def _layer(name):
  """Recorded arrays of one layer: inputs, "grads/...", outputs and their cotangents."""
  return {
    key.removeprefix(f"{name}/"): value
    for key, value in LAYERS.items()
    if key.startswith(f"{name}/")
  }


@functools.partial(jax.jit, static_argnums=0)
def _with_gradients(f, inputs, cotangents):
  """f(*inputs) and the gradient of each input."""
  y, pull = jax.vjp(f, *inputs)
  return y, pull(cotangents)


@pytest.mark.parametrize("implementation", ["reference", "associative", "chunked"])
@pytest.mark.parametrize("direction", ["forward", "reverse"])
def test_scan_is_the_packages(direction, implementation):
  golden = _layer(f"scan_{direction}")
  outputs, gradients = _with_gradients(
    lambda *given: linear_scan.linear_scan(
      *given, implementation=implementation, reverse=direction == "reverse"
    ),
    [golden[key] for key in ("x_BTD", "a_BTD", "h0_BD")],
    (golden["cotangent0"], golden["cotangent1"]),
  )
  for index, y in enumerate(outputs):
    np.testing.assert_allclose(y, golden[f"y{index}"], atol=1e-5, rtol=1e-5)
  for key, gradient in zip(("x_BTD", "a_BTD", "h0_BD"), gradients):
    np.testing.assert_allclose(gradient, golden[f"grads/{key}"], atol=1e-5, rtol=1e-5)


def test_square_root_and_its_bounded_derivative_are_the_packages():
  golden = _layer("sqrt")
  y, pull = jax.vjp(gates.bounded_sqrt, golden["z"])
  np.testing.assert_allclose(y, golden["y0"], rtol=1e-6)
  np.testing.assert_allclose(
    pull(jnp.asarray(golden["cotangent0"]))[0], golden["grads/z"], rtol=1e-6
  )


def test_rotary_embedding_is_the_packages():
  """Positions to 4096; the angle itself is rounded in float32, and differently by both."""
  golden = _layer("rope")
  y_BTNH, pull = jax.vjp(lambda x: apply_rope(x, golden["positions"], Rope()), golden["inputs"])
  np.testing.assert_allclose(y_BTNH, golden["y0"], atol=2e-3)
  np.testing.assert_allclose(y_BTNH[0], golden["y0"][0], atol=1e-5)
  gradient = pull(jnp.asarray(golden["cotangent0"]))[0]
  np.testing.assert_allclose(gradient[0], golden["grads/inputs"][0], atol=1e-5)


def test_rg_lru_is_the_packages():
  """Gates, decay, input scale and recurrence without the convolution around them."""
  golden = _layer("rg_lru")
  starts_BT = golden["segment_pos"] == 0
  names = ("a_gate/w", "a_gate/b", "input_gate/w", "input_gate/b", "a_param")

  def rg_lru_alone(x_BTR, w_a_GIJ, b_a_GJ, w_x_GIJ, b_x_GJ, decay_R):
    x_BTGI = x_BTR.reshape(*x_BTR.shape[:2], *w_a_GIJ.shape[:2])
    r_BTR, i_BTR = (
      (jnp.einsum("BTGI,GIJ->BTGJ", x_BTGI, w) + b).reshape(x_BTR.shape)
      for w, b in ((w_a_GIJ, b_a_GJ), (w_x_GIJ, b_x_GJ))
    )
    h0_BR = jnp.zeros_like(x_BTR[:, 0])
    return rg_lru_kernel.rg_lru(
      x_BTR, r_BTR, i_BTR, decay_R, starts_BT, h0_BR, implementation="reference"
    )[0]

  inputs = [golden["x"], *(golden[f"params/{n}"] for n in names)]
  y_BTR, gradients = _with_gradients(rg_lru_alone, inputs, golden["cotangent0"])
  np.testing.assert_allclose(y_BTR, golden["y0"], atol=1e-5, rtol=1e-5)
  expected = [golden["grads/x"], *(golden[f"grads/params/{n}"] for n in names)]
  _assert_gradients(dict(zip(("x", *names), gradients)), dict(zip(("x", *names), expected)))


@pytest.mark.parametrize("name", ["recurrent_block", "attention_block", "mlp_block", "rms_norm"])
def test_layer_is_the_packages(name):
  """Values, and gradients for the input and every parameter, on packed rows."""
  golden = _layer(name)
  width, rngs = golden["x"].shape[-1], nnx.Rngs(0)
  match name:
    case "recurrent_block":
      config = rg_lru.Config(rnn_width=16, num_gate_blocks=4)
      module, ours = config.build(width, num_blocks=1, rngs=rngs), _recurrent
    case "attention_block":
      config = attention.Config(num_heads=3, head_size=4, window=5)
      module = config.build(width, num_blocks=1, rngs=rngs)
      ours = lambda p: _attention(p, 3)  # noqa: E731
    case "mlp_block":
      config = mlp.Config(mlp_width=20)
      module, ours = config.build(width, num_blocks=1, rngs=rngs), _mlp
    case _:
      module, ours = norms.Config().build(width, rngs=rngs), lambda p: {"scale_D": p["scale"]}
  state = {}
  if name in ("recurrent_block", "attention_block"):
    segments_BT = jnp.asarray(_segments(golden["segment_pos"]))
    segments, _ = segments_lib.segments(segments_BT, segments_lib.initial_state(len(segments_BT)))
    state = {"segments": segments, "state": None}
  graph, abstract = nnx.split(module)

  def call(x_BTD, params):
    filled = jax.tree.map(lambda leaf: leaf, abstract)
    nnx.replace_by_pure_dict(filled, params)
    y = nnx.merge(graph, filled)(x_BTD, **state)
    return y[0] if state else y

  def under(prefix):
    return {k.removeprefix(prefix): v for k, v in golden.items() if k.startswith(prefix)}

  inputs = [golden["x"], ours(under("params/"))]
  y_BTD, (x_gradient, gradients) = _with_gradients(call, inputs, golden["cotangent0"])
  np.testing.assert_allclose(y_BTD, golden["y0"], atol=1e-5, rtol=1e-5)
  _assert_gradients(
    {"x": x_gradient, **gradients}, {"x": golden["grads/x"], **ours(under("grads/params/"))}
  )
