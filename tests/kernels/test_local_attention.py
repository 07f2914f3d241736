"""Banded attention against the definition, its band, and what it costs."""

import re

import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from kernels import local_attention
from sharding.mesh import MeshShape, make_mesh
from tests import attention_runs
from tests.draws import Draws
from tests.tolerances import assert_close

# Those for any head size; tests/kernels/test_splash_attention.py has the TPU's.
every_implementation = pytest.mark.parametrize("implementation", ["reference", "banded"])


def _inputs(**case):
  usual = {"batch": 2, "time": 50, "heads": 3, "size": 8, "start_probability": 0.06}
  return attention_runs.inputs(**{**usual, **case})


def _attend(*arrays, window, implementation="banded"):
  return local_attention.local_attention(*arrays, window=window, implementation=implementation)


def _slow(q_BTNH, k_BSEH, v_BSEH, q_documents_BT, k_documents_BS, window):
  """One query at a time, in float64."""
  q, k, v = (np.float64(np.asarray(x, np.float32)) for x in (q_BTNH, k_BSEH, v_BSEH))
  q_documents, k_documents = np.asarray(q_documents_BT), np.asarray(k_documents_BS)
  out = np.zeros(q.shape)
  batch, time, heads, size = q.shape
  for b in range(batch):
    for t in range(time):
      row = k.shape[1] - time + t
      seen = [
        s
        for s in range(row + 1)
        if k_documents[b, s] == q_documents[b, t] and (window is None or row - s <= window)
      ]
      for n in range(heads):
        shared = n // (heads // k.shape[2])
        logits = k[b, seen, shared] @ q[b, t, n] / np.sqrt(size)
        weights = np.exp(logits - logits.max())
        out[b, t, n] = weights @ v[b, seen, shared] / weights.sum()
  return out


# Windows beside blocks, rows shorter than the window, single queries, carried keys of any number;
# one key-value head, some, and one for each query head.
CASES = [
  {"time": 50, "window": 7},
  {"time": 300, "window": 70, "batch": 1},
  {"time": 64, "window": 64},
  {"time": 65, "window": 16},
  {"time": 17, "window": 40},
  {"time": 1, "window": 5},
  {"time": 1, "window": 5, "history": 5},
  {"time": 1, "window": 5, "history": 9},
  {"time": 3, "window": 6, "history": 6},
  {"time": 40, "window": 9, "history": 9},
  {"time": 40, "window": 9, "history": 30},
  {"time": 40, "window": 9, "history": 4},
  {"time": 50, "window": None},
  {"time": 200, "window": None, "batch": 1},
  {"time": 1, "window": None, "history": 12},
  {"time": 30, "window": None, "history": 12},
  {"time": 40, "window": 9, "history": 30, "heads": 4, "kv_heads": 2},
  {"time": 50, "window": None, "heads": 3, "kv_heads": 3},
  {"time": 1, "window": 5, "history": 9, "heads": 6, "kv_heads": 2},
]


@every_implementation
@pytest.mark.parametrize("case", CASES, ids=str)
def test_output_is_that_of_the_definition(implementation, case):
  case = dict(case)
  window = case.pop("window")
  arrays = _inputs(**case)
  actual = _attend(*arrays, window=window, implementation=implementation)
  assert_close(actual, _slow(*arrays, window), dtype="float32", reduction=8)


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_gradients_are_those_of_the_reference(case, dtype):
  case = dict(case)
  window = case.pop("window")
  q, k, v, *documents = _inputs(**case, dtype=dtype)
  weights = Draws(9).normal(*q.shape)

  def loss(q, k, v, implementation):
    out = _attend(q, k, v, *documents, window=window, implementation=implementation)
    assert out.dtype == q.dtype
    return jnp.sum(out.astype(jnp.float32) * weights)

  gradient = jax.jit(jax.grad(loss, (0, 1, 2)), static_argnums=3)
  for actual, expected in zip(
    gradient(q, k, v, "banded"), gradient(q, k, v, "reference"), strict=True
  ):
    assert actual.dtype == expected.dtype
    assert_close(actual, expected, dtype=dtype, reduction=16, floor=1.0)


@every_implementation
def test_a_query_sees_itself_and_window_tokens_before_it(implementation):
  """Equal keys: the output is the mean of the visible values, which tells how many there are."""
  time, window = 12, 4
  documents = jnp.zeros((1, time), jnp.int32)
  v_BSEH = jnp.arange(time, dtype=jnp.float32)[None, :, None, None]
  out = _attend(
    jnp.zeros((1, time, 1, 1)), jnp.zeros((1, time, 1, 1)), v_BSEH, documents, documents,
    window=window, implementation=implementation,
  )  # fmt: skip
  expected = [np.mean(range(max(0, t - window), t + 1)) for t in range(time)]
  np.testing.assert_allclose(out[0, :, 0, 0], expected, rtol=1e-6)


# Blocks of 16 and of 128 queries: the boundaries of the document lie inside blocks.
@every_implementation
@pytest.mark.parametrize(("window", "length"), [(9, 80), (None, 80), (40, 300), (None, 300)])
def test_a_document_does_not_notice_that_another_changes(window, length, implementation):
  mine = slice(3 * length // 8, 11 * length // 16)
  q, k, v, _, _ = _inputs(batch=1, time=length)
  attention_runs.assert_unnoticed(implementation, q, k, v, mine=mine, window=window)


@pytest.mark.parametrize("number", [0, -1, -(2**31), -(2**31) + 1, 2**31 - 1])
def test_every_document_number_is_one(number):
  """The padding of a row or a block belongs to no document, whatever the documents' numbers."""
  q, k, v, q_documents, k_documents = _inputs(time=70)
  documents = (jnp.full_like(q_documents, number), jnp.full_like(k_documents, number))
  arrays = (q, k, v, *documents)
  actual, expected = (
    _attend(*arrays, window=20, implementation=implementation)
    for implementation in ("banded", "reference")
  )
  assert_close(actual, expected, dtype="float32", reduction=8)


@pytest.mark.parametrize("window", [20, None])
def test_gradients_of_keys_are_summed_in_float32(window):
  """Many blocks add to the gradient of a key: a sum in bfloat16 would lose digits."""
  q, k, v, _, _ = _inputs(batch=1, time=700, size=16, dtype="bfloat16")
  documents = jnp.zeros((1, 700), jnp.int32)

  def gradients(implementation, dtype):
    def loss(q, k, v):
      out = _attend(q, k, v, documents, documents, window=window, implementation=implementation)
      return jnp.sum(out.astype(jnp.float32) * (1.0 + jnp.arange(3)[:, None]))

    return jax.jit(jax.grad(loss, (1, 2)))(*(x.astype(dtype) for x in (q, k, v)))

  exact = gradients("reference", "float32")
  for actual, expected in zip(gradients("banded", "bfloat16"), exact, strict=True):
    error = np.asarray(actual, np.float64) - np.asarray(expected, np.float64)
    # Rounding once to 8 bits: 0.0017 of the root mean square.
    assert np.sqrt(np.mean(error**2)) <= 0.0026 * np.sqrt(np.mean(np.float64(expected) ** 2))


def _largest_array(compiled) -> int:
  """Elements of the largest array that the compiled program names."""
  shapes = re.findall(r"\b(?:f32|bf16|pred|s32)\[([\d,]+)\]", compiled.as_text())
  return max(int(np.prod(list(map(int, shape.split(","))))) for shape in shapes)


def _product_flops(jaxpr) -> int:
  """FLOPs of all products, in a loop times its length: the compiler itself counts a loop once."""
  total = 0
  for equation in jaxpr.eqns:
    if equation.primitive.name == "dot_general":
      ((contracted, _), _) = equation.params["dimension_numbers"]
      terms = np.prod([equation.invars[0].aval.shape[dimension] for dimension in contracted])
      total += int(2 * terms * np.prod(equation.outvars[0].aval.shape))
    inner = sum(map(_product_flops, jax.extend.core.jaxprs_in_params(equation.params)))
    total += inner * equation.params.get("length", 1)
  return total


def _gradient_programs(lengths, *, window, heads=2, size=16):
  """For each row length, the compiled gradient and the flops of its products."""
  programs = {}
  for time in lengths:
    shapes = ((1, time, heads, size), (1, time, 1, size), (1, time, 1, size))
    arrays = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    documents = jax.ShapeDtypeStruct((1, time), jnp.int32)

    def loss(q, k, v, documents):
      return jnp.sum(_attend(q, k, v, documents, documents, window=window) ** 2)

    traced = jax.jit(jax.grad(loss, (0, 1, 2))).trace(*arrays, documents)
    programs[time] = traced.lower().compile(), _product_flops(traced.jaxpr.jaxpr)
  return programs


def test_time_and_memory_are_those_of_the_band():
  time, window, heads, size = 2048, 128, 2, 16
  programs = _gradient_programs((time, 2 * time), window=window, heads=heads, size=size)
  (short, flops), (long, long_flops) = programs[time], programs[2 * time]
  # No array is larger than the padded queries: a tenth of T x T.
  assert _largest_array(short) <= 1.1 * time * heads * size < time * time / 10
  assert _largest_array(long) <= 1.1 * 2 * time * heads * size
  assert (
    long.memory_analysis().temp_size_in_bytes <= 2.1 * short.memory_analysis().temp_size_in_bytes
  )
  # Two products forward, five backward; a band is longer than the window by a block.
  needed = 7 * 2 * time * (window + 1) * heads * size
  assert needed <= flops <= 1.3 * needed
  assert long_flops == 2 * flops


def test_global_attention_never_has_the_whole_matrix():
  programs = _gradient_programs((1024, 2048), window=None, size=4)
  (short, _), (long, _) = programs[1024], programs[2048]
  assert _largest_array(long) <= 2 * 128 * 2048
  assert (
    long.memory_analysis().temp_size_in_bytes <= 2.1 * short.memory_analysis().temp_size_in_bytes
  )


def test_wrong_shapes_are_refused():
  q, k, v, q_documents, k_documents = _inputs()
  with pytest.raises(ValueError, match=r"v .* must be"):
    _attend(q, k, v[..., :4], q_documents, k_documents, window=3)
  with pytest.raises(ValueError, match="fewer than the 50 queries"):
    _attend(q, k[:, :9], v[:, :9], q_documents, k_documents[:, :9], window=3)
  with pytest.raises(ValueError, match="window 0 must be at least 1"):
    _attend(q, k, v, q_documents, k_documents, window=0)
  with pytest.raises(ValueError, match=r"q \(2, 50, 8\) must be \[batch, time, heads, head size\]"):
    _attend(q[:, :, 0], k, v, q_documents, k_documents, window=3)
  with pytest.raises(ValueError, match=r"k \(1, 8\) \[batch, keys, key-value heads, head size\]"):
    _attend(q, k[0, 0], v, q_documents, k_documents, window=3)
  two = jnp.tile(k, (1, 1, 2, 1))
  with pytest.raises(ValueError, match="3 query heads are not divisible by 2 key-value heads"):
    _attend(q, two, two, q_documents, k_documents, window=3)


@pytest.mark.parametrize("implementation", ["reference", "banded", "pallas_gpu"])
def test_no_query_at_all_is_refused(implementation):
  q, k, v, q_documents, k_documents = _inputs(size=16)
  with pytest.raises(ValueError, match=r"q \(2, 0, 3, 16\) must be .* at least one query"):
    _attend(
      q[:, :0], k, v, q_documents[:, :0], k_documents, window=3, implementation=implementation
    )


@pytest.mark.parametrize("window", [9, None])
@every_implementation
def test_shards_of_heads_share_one_key_and_value(implementation, window):
  """Batch and heads split by jax.shard_map, keys and values the same on every shard of heads."""
  q, k, v, q_documents, k_documents = _inputs(batch=2, time=140, history=5, heads=4)
  weights = Draws(9).normal(*q.shape)
  heads, batch = P("data", None, "tensor"), P("data")

  def run(q, k, v):
    documents = (q_documents, k_documents)
    return _attend(q, k, v, *documents, window=window, implementation=implementation)

  on_shards = jax.shard_map(
    lambda *arrays: _attend(*arrays, window=window, implementation=implementation),
    mesh=make_mesh(MeshShape(data=2, tensor=4)),
    in_specs=(heads, batch, batch, batch, batch),
    out_specs=heads,
  )

  def gradients(run):
    return jax.jit(jax.grad(lambda *arrays: jnp.sum(run(*arrays) * weights), (0, 1, 2)))(q, k, v)

  sharded = gradients(lambda q, k, v: on_shards(q, k, v, q_documents, k_documents))
  for actual, expected in zip(sharded, gradients(run), strict=True):
    assert_close(actual, expected, dtype="float32", reduction=16)
