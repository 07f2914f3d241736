"""The GPU's attention kernels: interpreted on CPU, and lowered for CUDA without a GPU."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from kernels import dispatch, local_attention
from kernels.local_attention import measure, pallas_gpu
from sharding.mesh import MeshShape, make_mesh
from tests import attention_runs
from tests.tolerances import assert_close


@pytest.fixture
def small_blocks(monkeypatch):
  """Blocks of 16 queries and keys."""
  monkeypatch.setattr(pallas_gpu, "_BLOCK", 16)


def _inputs(**case):
  return attention_runs.inputs(**{"time": 50, "size": 16, "start_probability": 0.05, **case})


# Blocks whole and not, windows beside them, keys of an earlier chunk, single queries; one key-value
# head, some, and one for each query head.
CASES = [
  {"time": 50, "window": 7, "batch": 2},
  {"time": 64, "window": 32},
  {"time": 37, "window": 60, "size": 32},
  {"time": 40, "window": 9, "history": 30},
  {"time": 40, "window": 20, "history": 5},
  {"time": 1, "window": 5, "history": 40},
  {"time": 50, "window": None, "heads": 3},
  {"time": 20, "window": None, "history": 21},
  {"time": 40, "window": 9, "history": 5, "heads": 4, "kv_heads": 2, "batch": 2},
  {"time": 20, "window": None, "heads": 3, "kv_heads": 3},
]


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("case", CASES, ids=str)
def test_values_and_gradients_are_those_of_the_reference(case):
  case = dict(case)
  window = case.pop("window")
  arrays = _inputs(**case)
  for actual, expected in zip(
    attention_runs.run("pallas_gpu", arrays, window),
    attention_runs.run("reference", arrays, window),
    strict=True,
  ):
    assert_close(actual, expected, dtype="float32", reduction=16, floor=1.0)


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("programs", [1, 10])
def test_gradients_of_keys_are_those_of_all_query_heads(monkeypatch, programs):
  """One program sums those of a key-value head, or two do, with two query heads each."""
  monkeypatch.setattr(pallas_gpu, "_PROGRAMS", programs)
  arrays = _inputs(time=40, heads=8, kv_heads=2)
  for actual, expected in zip(
    attention_runs.run("pallas_gpu", arrays, 9),
    attention_runs.run("reference", arrays, 9),
    strict=True,
  ):
    assert_close(actual, expected, dtype="float32", reduction=16, floor=1.0)


@pytest.mark.usefixtures("small_blocks")
def test_bfloat16_rounds_and_sums_in_float32():
  arrays = _inputs(time=120, dtype="bfloat16")
  exact = tuple(x.astype(jnp.float32) for x in arrays[:3]) + arrays[3:]
  for actual, expected in zip(
    attention_runs.run("pallas_gpu", arrays, 30),
    attention_runs.run("reference", exact, 30),
    strict=True,
  ):
    assert actual.dtype == jnp.bfloat16
    error = np.asarray(actual, np.float64) - np.asarray(expected, np.float64)
    # The rounding of what comes out is 0.0017 of the root mean square; the weights and the
    # gradients on their way are rounded as well.
    assert np.sqrt(np.mean(error**2)) <= 0.005 * np.sqrt(np.mean(np.float64(expected) ** 2))


@pytest.mark.usefixtures("small_blocks")
def test_a_document_does_not_notice_that_another_changes():
  q, k, v, _, _ = _inputs(time=60)
  attention_runs.assert_unnoticed("pallas_gpu", q, k, v, mine=slice(21, 45), window=30)


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("number", [0, -1])
def test_what_fills_up_blocks_is_seen_by_no_document(number):
  """It is loaded as document 0."""
  q, k, v, q_documents, k_documents = _inputs(time=20, history=3, heads=1)
  documents = (jnp.full_like(q_documents, number), jnp.full_like(k_documents, number))
  for actual, expected in zip(
    attention_runs.run("pallas_gpu", (q, k, v, *documents), 40),
    attention_runs.run("reference", (q, k, v, *documents), 40),
    strict=True,
  ):
    assert_close(actual, expected, dtype="float32", reduction=16, floor=1.0)


@pytest.mark.usefixtures("small_blocks")
def test_shards_of_heads_share_one_key_and_value():
  arrays = _inputs(batch=2, time=20, heads=2)
  mesh = make_mesh(MeshShape(data=2, tensor=2), devices=jax.devices()[:4])
  heads, batch = P("data", None, "tensor"), P("data")
  attend = functools.partial(local_attention.local_attention, window=9, implementation="pallas_gpu")
  on_shards = jax.shard_map(
    attend, mesh=mesh, in_specs=(heads, batch, batch, batch, batch), out_specs=heads,
    check_vma=local_attention.tracks_varying("pallas_gpu"),
  )  # fmt: skip

  def gradients(attend):
    return jax.jit(jax.grad(lambda *arrays: jnp.sum(jnp.sin(attend(*arrays))), (0, 1, 2)))

  for actual, expected in zip(
    gradients(on_shards)(*arrays), gradients(attend)(*arrays), strict=True
  ):
    assert_close(actual, expected, dtype="float32", reduction=16)


def test_a_head_size_that_it_cannot_do_is_refused():
  with pytest.raises(ValueError, match=r"pallas_gpu needs a head size of .*, not 96; name .* auto"):
    local_attention.resolve("pallas_gpu", head_size=96)


@pytest.mark.parametrize(
  ("time", "history", "heads", "kv_heads", "size", "window"),
  [(4096, 0, 10, 1, 128, 1024), (2048, 2048, 10, 1, 256, 2048), (1000, 0, 8, 2, 64, None)],
)
def test_it_lowers_for_cuda_without_the_matrix(time, history, heads, kv_heads, size, window):
  keys = time + history
  arrays = [
    jax.ShapeDtypeStruct(shape, dtype)
    for shape, dtype in [
      ((2, time, heads, size), jnp.bfloat16), ((2, keys, kv_heads, size), jnp.bfloat16),
      ((2, keys, kv_heads, size), jnp.bfloat16), ((2, time), jnp.int32), ((2, keys), jnp.int32),
    ]
  ]  # fmt: skip

  def loss(*arrays):
    out = local_attention.local_attention(*arrays, window=window, implementation="pallas_gpu")
    return jnp.sum(out.astype(jnp.float32) ** 2)

  with dispatch.targeting("gpu"):
    traced = jax.jit(jax.grad(loss, (0, 1, 2))).trace(*arrays)
    text = traced.lower(lowering_platforms=("cuda",)).as_text()
  # The output, the gradient of q, that of k and v.
  assert text.count("custom_call @__gpu$xla.gpu.triton") == 3
  assert f"{time}x{keys}x" not in text


def test_measuring_works_anywhere(capsys):
  measure.main(["1,20,2,8,4", "1,20,4,8,0,2"], product_size=64)
  records = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
  assert [record["window"] for record in records] == [4, None]
  assert [record["kv_heads"] for record in records] == [1, 2]
  for record in records:
    assert record["product_flops_per_second"] > 0
    (name,) = record["implementations"]  # on a CPU
    assert name == "banded"
    for part in ("forward", "forward_backward"):
      assert record["implementations"][name][f"{part}_ms"] > 0
      assert record["implementations"][name][f"{part}_of_product"] > 0
