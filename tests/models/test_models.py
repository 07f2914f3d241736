"""The published models: sizes, parameter counts, FLOPs, and a compile time that ignores depth."""

import dataclasses
import importlib.util
import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models import decoder, stacks
from models.flops import count_params, flops_per_token
from models.griffin import griffin, recurrentgemma_2b, recurrentgemma_9b
from models.hawk import hawk
from models.layers import attention, rg_lru
from models.llama import llama
from models.sizes import SIZES
from models.transformer import mqa_transformer
from sharding import logical, rules
from sharding.mesh import MeshShape, make_mesh
from tests.jaxprs import equations
from tests.triton_tiles import small_tiles

CONFIGS = pathlib.Path(__file__).parents[2] / "configs"

# Millions without embedding, from the formulas of the paper's shapes (arXiv:2402.19427, Table 2);
# Llamas are made to be as large as the Transformer.
PARAMS = {
  "100m": {"transformer": 80.3, "hawk": 93.8, "griffin": 89.3, "llama": 79.6},
  "200m": {"transformer": 141.7, "hawk": 173.7, "griffin": 163.0, "llama": 142.4},
  "400m": {"transformer": 316.3, "hawk": 374.8, "griffin": 355.3, "llama": 315.0},
  "1b": {"transformer": 1120.4, "hawk": 1304.2, "griffin": 1242.9, "llama": 1120.0},
  "3b": {"transformer": 2511.0, "hawk": 2996.5, "griffin": 2834.6, "llama": 2505.7},
  "7b": {"transformer": 5940.4, "hawk": 7176.4, "griffin": 6790.2, "llama": 5947.8},
  "14b": {"transformer": 11588.8, "hawk": 14811.2, "griffin": 13763.9, "llama": 11587.2},
}
BLOCKS = {"100m": (8, 4), "1b": (16, 8), "7b": (22, 10), "14b": (27, 13)}


def _run(family, size):
  spec = importlib.util.spec_from_file_location(family, CONFIGS / f"{family}.py")
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module.get_config(size)


@pytest.mark.parametrize("size", PARAMS)
@pytest.mark.parametrize("family", ["transformer", "hawk", "griffin", "llama"])
def test_parameter_counts_are_the_published_ones(family, size):
  config = _run(family, size).model
  count = count_params(config)
  assert round(count.rest / 1e6, 1) == PARAMS[size][family]
  assert count.embedding == 32_000 * SIZES[size].width


@pytest.mark.parametrize(
  ("name", "total"),
  [
    ("2-7b", 6_738_415_616),
    ("2-13b", 13_015_864_320),
    ("3-8b", 8_030_261_248),
    ("3.2-1b", 1_235_814_400),
    ("3.2-3b", 3_212_749_824),
  ],
)
def test_llama_has_the_parameters_of_the_released_model(name, total):
  run = _run("llama", name)
  assert count_params(run.model).total == total
  assert run.batch_size * run.data.row_length == 1 << 22


def test_an_unknown_llama_lists_the_known_ones():
  with pytest.raises(ValueError, match=r"'2-8b' is none of 2-7b, .*3\.2-3b, 100m, .*14b"):
    _run("llama", "2-8b")
  with pytest.raises(ValueError, match="width 100 is not divisible by num_heads 3"):
    llama(vocab_size=8, width=100, num_blocks=1, num_heads=3, num_kv_heads=3, mlp_width=8)


@pytest.mark.parametrize("size", PARAMS)
def test_the_long_rows_are_those_of_griffin_over_a_pod(size):
  run, griffin_run = _run("long_row", size), _run("griffin", size)
  assert run.model == griffin_run.model
  assert run.data.row_length == 1_048_576
  mesh = run.mesh.resolved(256)
  assert run.batch_size % (mesh.data * mesh.fsdp) == 0
  assert run.data.row_length % mesh.sequence == 0
  tokens = run.total_steps * run.batch_size * run.data.row_length
  assert abs(tokens / SIZES[size].tokens - 1) < 0.01
  assert run.optimizer.warmup_steps < run.total_steps


@pytest.mark.parametrize(
  ("config", "rest", "total"),
  [(recurrentgemma_2b(), 2.03, 2.68), (recurrentgemma_9b(), 7.53, 8.58)],
  ids=["2b", "9b"],
)
def test_recurrentgemma_has_the_released_size(config, rest, total):
  count = count_params(config)
  assert (round(count.rest / 1e9, 2), round(count.total / 1e9, 2)) == (rest, total)
  assert config.embedding_scale == "sqrt_width"
  assert config.logit_cap == 30.0


@pytest.mark.parametrize("size", BLOCKS)
def test_griffin_is_two_recurrent_blocks_to_one_of_attention(size):
  blocks = _run("griffin", size).model.blocks
  recurrent = [isinstance(block.mixer, rg_lru.Config) for block in blocks]
  assert (sum(recurrent), len(recurrent) - sum(recurrent)) == BLOCKS[size]
  assert recurrent[:6] == [True, True, False] * 2
  gate_blocks = {b.mixer.num_gate_blocks for b in blocks if isinstance(b.mixer, rg_lru.Config)}
  windows = {b.mixer.window for b in blocks if isinstance(b.mixer, attention.Config)}
  assert gate_blocks == {16}
  assert windows == {1024}


def test_equal_blocks_that_name_other_kernels_are_refused():
  """Equal blocks are one stack of parameters. Other kernels would make two, with other values."""
  config = _run("griffin", "100m").model
  first, second, attention = config.pattern

  def naming(block, **kernels):
    return dataclasses.replace(block, mixer=dataclasses.replace(block.mixer, **kernels))

  other = naming(first, scan="chunked")
  with pytest.raises(ValueError, match=r"pattern\[0\] and pattern\[1\].*name the same in both"):
    dataclasses.replace(config, pattern=(other, second, attention))
  model = decoder.build(dataclasses.replace(config, pattern=(other, other, attention)))
  assert jax.tree.structure(model.shapes) == jax.tree.structure(decoder.build(config).shapes)


def test_an_unknown_size_lists_the_known_ones():
  with pytest.raises(ValueError, match=r"size '2b' is none of .*100m, 200m, 400m, 1b, 3b, 7b, 14b"):
    _run("griffin", "2b")


# GFLOP per token in training without logits at row 2048, the recurrence's elementwise work
# included.
@pytest.mark.parametrize(
  ("family", "size", "gflops"),
  [
    ("transformer", "1b", 7.32),
    ("hawk", "1b", 7.82),
    ("griffin", "1b", 7.61),
    ("griffin", "14b", 83.19),
  ],
)
def test_flops_are_those_of_the_layers(family, size, gflops):
  flops = flops_per_token(_run(family, size).model, 2048)
  body = flops.train - 3 * flops["logits"] + 3 * flops.as_dict().get("recurrence", 0.0)
  assert round(body / 1e9, 2) == gflops


TINY = {
  "griffin": griffin(
    vocab_size=512, width=128, rnn_width=256, num_blocks=3, num_heads=4, head_size=32, window=15,
    mlp_width=384, dtype="float32", remat="none",
  ),
  "hawk": hawk(
    vocab_size=512, width=128, rnn_width=256, num_blocks=2, mlp_width=384, dtype="float32",
    remat="none",
  ),
  "transformer": mqa_transformer(
    vocab_size=512, width=128, num_blocks=2, num_heads=4, head_size=32, mlp_width=384,
    dtype="float32", remat="none",
  ),
  "llama": llama(
    vocab_size=512, width=128, num_blocks=2, num_heads=4, num_kv_heads=2, mlp_width=384,
    dtype="float32", remat="none",
  ),
}  # fmt: skip


@pytest.mark.parametrize("family", TINY)
def test_flops_are_those_that_the_compiler_counts(family):
  """The reference attention multiplies every key, so every key is counted here."""
  config = TINY[family]
  pattern = tuple(
    dataclasses.replace(block, mixer=dataclasses.replace(block.mixer, implementation="reference"))
    if isinstance(block.mixer, attention.Config)
    else block
    for block in config.pattern
  )
  # Unrolled: the compiler counts the body of a loop once, whatever its trip count.
  model = decoder.build(dataclasses.replace(config, pattern=pattern, layers="unroll"))
  time = 64
  tokens = jax.ShapeDtypeStruct((1, time), jnp.int32)
  compiled = jax.jit(model.logits).lower(model.shapes, tokens, tokens).compile()
  flops = flops_per_token(config, time)
  keys = sum(
    4 * block.mixer.num_heads * block.mixer.head_size * time
    for block in config.blocks
    if isinstance(block.mixer, attention.Config)
  )
  expected = time * (flops.forward - flops.as_dict().get("attention_keys", 0.0) + keys)
  counted = compiled.cost_analysis()["flops"]
  # The rest is elementwise: norms, gates, softmax.
  assert expected <= counted <= 1.06 * expected


# Of a Hawk block's seven products (two in, gates, out, two up, down), "none" and "matmuls" make
# that of the gates again, "block" all but the last, whose result no gradient needs.
@pytest.mark.parametrize(("remat", "again"), [("none", 1), ("matmuls", 1), ("block", 6)])
@pytest.mark.parametrize("float32_sums", [False, True])
def test_remat_makes_again_the_products_that_it_says(remat, again, float32_sums):
  config = dataclasses.replace(TINY["hawk"], remat=remat, layers="unroll")
  model = decoder.build(config)
  tokens = jax.ShapeDtypeStruct((8, 32), jnp.int32)
  gradient = jax.grad(lambda params, tokens: model.logits(params, tokens, tokens).sum())
  layout = dataclasses.replace(rules.ZERO3, float32_sums=float32_sums)
  with logical.placement(make_mesh(MeshShape(data=8)), layout):
    products = str(jax.make_jaxpr(gradient)(model.shapes, tokens)).count("dot_general[")
  unembedding = 3
  assert products == unembedding + config.num_blocks * (3 * 7 + again)


def _triton(config):
  """With the kernels of NVIDIA's GPUs, interpreted here."""
  mixer = dataclasses.replace(
    config.pattern[0].mixer, scan="pallas_gpu", gates="pallas_gpu", conv="pallas_gpu"
  )
  block = dataclasses.replace(config.pattern[0], mixer=mixer)
  return dataclasses.replace(config, pattern=(block,), dtype="bfloat16", remat="none")


@pytest.mark.parametrize(("layers", "passes"), [("unroll", 1), ("scan", 2)])
def test_unrolled_blocks_keep_the_outputs_of_triton_kernels(layers, passes):
  """A loop computes gates and convolution again, because it would copy what it keeps."""
  config = _triton(TINY["hawk"])
  if layers == "unroll":
    config = dataclasses.replace(config, num_blocks=1)
  model = decoder.build(dataclasses.replace(config, layers=layers))
  tokens = jnp.ones((1, 8), jnp.int32)
  gradient = jax.grad(lambda params: model.apply(params, tokens, tokens)[0].astype("float32").sum())
  jaxpr = jax.make_jaxpr(gradient)(model.shapes)
  calls = [
    str(one.params["name"])
    for one in equations(jaxpr.jaxpr)
    if one.primitive.name == "pallas_call" and not one.params["interpret"]
  ]
  for kernel in ("causal_conv_forward", "block_diagonal_forward"):
    assert calls.count(kernel) == passes, kernel
  assert calls.count("rg_lru_forward") == 1


def test_a_model_with_triton_kernels_is_the_model():
  """bfloat16: two rows of several documents, loss and every gradient."""
  plain = dataclasses.replace(TINY["hawk"], dtype="bfloat16", remat="none")
  tokens = jax.random.randint(jax.random.key(1), (2, 40), 0, plain.vocab_size)
  segments = 1 + jnp.cumsum(jax.random.uniform(jax.random.key(2), (2, 40)) < 0.1, axis=1)
  params = jax.jit(decoder.build(plain).init)(jax.random.key(0))

  def results(config):
    model = decoder.build(config)
    weights = jax.random.normal(jax.random.key(3), (2, 40, plain.vocab_size))
    loss = lambda params: jnp.mean(model.logits(params, tokens, segments) * weights)  # noqa: E731
    return jax.jit(jax.value_and_grad(loss))(params)

  with small_tiles(steps=8, warps=4):
    triton = results(_triton(TINY["hawk"]))
  expected = jax.tree.leaves(results(dataclasses.replace(plain, dtype="float32")))
  errors = [
    [
      np.linalg.norm(np.asarray(got) - wanted) / np.linalg.norm(wanted)
      for got, wanted in zip(jax.tree.leaves(found), expected, strict=True)
    ]
    for found in (triton, results(plain))
  ]
  for ours, theirs in zip(*errors, strict=True):
    # As exact as the default in bfloat16 is.
    assert ours < 1.5 * theirs + 1e-2


def _kept(model):
  """Shape and dtype of each array that the backward pass keeps, for a row of 8 tokens."""
  tokens = jnp.ones((1, 8), jnp.int32)

  def pull_back(params):
    return jax.vjp(lambda params: model.apply(params, tokens, tokens)[0], params)[1]

  return jax.tree.leaves(jax.eval_shape(pull_back, model.shapes))


def test_unrolled_blocks_keep_their_matrices_as_they_are_multiplied():
  """A group's part of float32 parameters would be a copy, twice as large and cast again."""
  config = dataclasses.replace(TINY["hawk"], dtype="bfloat16", layers="unroll")
  model = decoder.build(config)
  matrices = {leaf.shape[1:]: leaf.dtype for leaf in jax.tree.leaves(model.shapes["groups"])}
  kept = [
    leaf.dtype.name
    for leaf in _kept(model)
    if leaf.size >= config.width**2 and leaf.shape in matrices
  ]
  assert kept
  assert set(kept) == {"bfloat16"}


def test_gradients_of_unrolled_blocks_are_joined_and_not_added_up():
  """When they were padded with zeros and added, XLA evaluated all of them for every parameter: 65
  of the 330 ms of a step of the 1b Transformer on an H100."""
  config = dataclasses.replace(TINY["griffin"], num_blocks=9, layers="unroll", remat="none")
  model = decoder.build(config)
  tokens = jax.ShapeDtypeStruct((1, 16), jnp.int32)
  gradient = jax.grad(lambda params, tokens: model.logits(params, tokens, tokens).sum())
  program = jax.jit(gradient).lower(model.shapes, tokens).as_text()
  stacked = {leaf.shape for leaf in jax.tree.leaves(model.shapes["groups"])}
  assert len({shape[0] for shape in stacked}) == 1
  joined, padded = (_results(program, op) for op in ("concatenate", "pad"))
  assert stacked <= set(joined.values())
  assert not stacked & set(padded.values())
  # Not once more in each pass of the optimizer that reads it.
  waited_for = set(re.findall(r"stablehlo\.optimization_barrier (%\w+) ", program))
  assert {name for name, shape in joined.items() if shape in stacked} <= waited_for


def _results(program, operation):
  """Name -> shape of the results of an operation in a StableHLO text."""
  found = re.findall(rf"(%\w+) = stablehlo\.{operation} .*-> tensor<([0-9x]+)x[a-z]", program)
  return {name: tuple(map(int, shape.split("x"))) for name, shape in found}


def test_branches_of_unrolled_blocks_are_cut_out_of_the_weights_once():
  """The backward pass used to cut them out again, and kept the whole weights for it."""
  config = dataclasses.replace(TINY["transformer"], layers="unroll", remat="none", num_blocks=2)
  model = decoder.build(config)
  kept = [leaf.shape for leaf in _kept(model)]
  [width, _, mlp_width] = model.shapes["groups"]["0"]["mlp"]["w_up_D2F"].shape[-3:]
  assert kept.count((width, mlp_width)) == 2 * 2
  assert not [shape for shape in kept if shape[-3:] == (width, 2, mlp_width)]


def test_remat_survives_the_compiler_where_the_blocks_of_a_group_are_unrolled():
  def flops(remat):
    config = dataclasses.replace(TINY["griffin"], num_blocks=6, remat=remat)
    model = decoder.build(config)
    tokens = jax.ShapeDtypeStruct((1, 32), jnp.int32)
    gradient = jax.grad(lambda params, tokens: model.logits(params, tokens, tokens).sum())
    return jax.jit(gradient).lower(model.shapes, tokens).compile().cost_analysis()["flops"]

  assert flops("block") > 1.15 * flops("none")


@pytest.mark.parametrize(("family", "barriers"), [("griffin", 3), ("hawk", 0)])
def test_blocks_in_one_loop_are_computed_again_one_after_the_other(family, barriers):
  """Without a barrier before each, a TPU held the recomputed values of all three at once: 2.2 GB
  more for griffin-7b on v5e:16x16 (docs/plans.jsonl)."""
  model = decoder.build(dataclasses.replace(TINY[family], num_blocks=6, remat="block"))
  tokens = jax.ShapeDtypeStruct((1, 32), jnp.int32)
  gradient = jax.grad(lambda params, tokens: model.logits(params, tokens, tokens).sum())
  program = jax.jit(gradient).lower(model.shapes, tokens).as_text()
  assert program.count("optimization_barrier") == barriers


def test_what_is_compiled_does_not_grow_with_depth():
  def program_size(num_blocks):
    model = decoder.build(dataclasses.replace(TINY["griffin"], num_blocks=num_blocks))
    tokens = jax.ShapeDtypeStruct((1, 32), jnp.int32)
    loss = jax.grad(lambda params, tokens: model.logits(params, tokens, tokens).sum())
    return len(jax.jit(loss).lower(model.shapes, tokens).as_text().splitlines())

  # Of three groups and more: with two, parameters and a remainder of two blocks have one shape, and
  # small functions are shared.
  assert program_size(38) <= 1.01 * program_size(11)
  assert program_size(39) <= 1.01 * program_size(12)


def test_blocks_can_be_taken_apart_and_joined():
  config = dataclasses.replace(TINY["griffin"], num_blocks=8)
  model = decoder.build(config)
  params = jax.jit(model.init)(jax.random.key(0))
  blocks = stacks.split_blocks(config, params)
  assert ["decay_R" in block["mixer"] for block in blocks] == [True, True, False] * 2 + [True, True]
  joined = stacks.join_blocks(config, blocks)
  jax.tree.map(
    np.testing.assert_array_equal,
    joined,
    {"groups": params["groups"], "remainder": params["remainder"]},
  )


def test_initialisation_has_the_variances_of_the_table():
  model = decoder.build(dataclasses.replace(TINY["griffin"], num_blocks=6))
  params = jax.jit(model.init)(jax.random.key(0))
  recurrent, local = params["groups"]["0"], params["groups"]["1"]
  expected = [
    (params["embedding"]["table_VD"], 1 / 128),
    (recurrent["mixer"]["w_in_D2R"], 1 / 128),
    (recurrent["mixer"]["w_conv_KR"], 0.01 / 4),
    (recurrent["mixer"]["w_gates_GI2J"], 1 / 16),
    (recurrent["mixer"]["w_out_RD"], 2 / 6 / 256),
    (recurrent["mlp"]["w_up_D2F"], 1 / 128),
    (recurrent["mlp"]["w_down_FD"], 2 / 6 / 384),
    (local["mixer"]["w_q_DNH"], 1 / 128),
    (local["mixer"]["w_kv_D2H"], 1 / 128),
    (local["mixer"]["w_out_NHD"], 2 / 6 / 128),
  ]
  for w, variance in expected:
    assert np.var(w) == pytest.approx(variance, rel=0.1)
    assert abs(np.mean(w)) < 4 * np.sqrt(variance / w.size)
  # Two layers of one run begin differently.
  assert (recurrent["mixer"]["decay_R"][0, 0] != recurrent["mixer"]["decay_R"][0, 1]).any()
  assert (recurrent["mixer"]["decay_R"][0, 0] != recurrent["mixer"]["decay_R"][1, 0]).any()
