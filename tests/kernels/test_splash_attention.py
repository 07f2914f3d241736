"""Splash attention behind our specification: interpreted on CPU, and compiled for real TPUs."""

import functools
import logging
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from kernels import local_attention
from kernels.local_attention import splash_tpu
from models.layers import attention
from models.layers import segments as segments_lib
from models.layers.segments import NO_DOCUMENT
from sharding import logical, rules
from sharding.mesh import MeshShape, make_mesh
from tests import attention_runs
from tests.tolerances import assert_close


@pytest.fixture(autouse=True)
def interpreted(monkeypatch):
  """splash_tpu on CPU; what is compiled for a TPU below calls splash_tpu.attention itself."""
  interpreter = functools.partial(splash_tpu.attention, interpret=True)
  monkeypatch.setitem(local_attention._ATTENTIONS, "splash_tpu", interpreter)


def _inputs(**case):
  return attention_runs.inputs(**{"time": 200, "size": 128, "start_probability": 0.02, **case})


# Blocks of 128 and of 256, filled up and whole; keys of an earlier chunk, more and fewer than the
# window; documents that begin inside blocks, or one for all; one key-value head, some, or all.
CASES = [
  {"time": 200, "window": 70, "batch": 2},
  {"time": 256, "window": 9, "heads": 1},
  {"time": 520, "window": 520, "heads": 1},
  {"time": 300, "window": 70, "history": 70},
  {"time": 140, "window": 300, "history": 290},
  {"time": 256, "window": None, "heads": 1},
  {"time": 129, "window": None, "history": 40, "size": 256, "kv_heads": 2},
  {"time": 150, "window": 70, "batch": 2, "heads": 4, "kv_heads": 2},
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_values_and_gradients_are_those_of_the_reference(case):
  case = dict(case)
  window = case.pop("window")
  arrays = _inputs(**case)
  for actual, expected in zip(
    attention_runs.run("splash_tpu", arrays, window),
    attention_runs.run("reference", arrays, window),
    strict=True,
  ):
    assert_close(actual, expected, dtype="float32", reduction=32, floor=1.0)


def test_bfloat16_rounds_and_sums_in_float32():
  arrays = _inputs(time=400, dtype="bfloat16")
  exact = tuple(x.astype(jnp.float32) for x in arrays[:3]) + arrays[3:]
  for actual, expected in zip(
    attention_runs.run("splash_tpu", arrays, 130),
    attention_runs.run("reference", exact, 130),
    strict=True,
  ):
    assert actual.dtype == jnp.bfloat16
    error = np.asarray(actual, np.float64) - np.asarray(expected, np.float64)
    # The rounding of what comes out is 0.0017 of the root mean square; q, the weights and the
    # gradients on their way are rounded as well.
    assert np.sqrt(np.mean(error**2)) <= 0.006 * np.sqrt(np.mean(np.float64(expected) ** 2))


def test_a_query_sees_itself_and_window_tokens_before_it():
  """Equal keys: the output is the mean of the visible values, which tells how many there are."""
  time, window = 150, 4
  documents = jnp.zeros((1, time), jnp.int32)
  v_BSEH = jnp.arange(time, dtype=jnp.float32)[None, :, None, None]
  v_BSEH = jnp.broadcast_to(v_BSEH, (1, time, 1, 128))
  out = local_attention.local_attention(
    jnp.zeros((1, time, 1, 128)), jnp.zeros((1, time, 1, 128)), v_BSEH, documents, documents,
    window=window, implementation="splash_tpu",
  )  # fmt: skip
  expected = [np.mean(range(max(0, t - window), t + 1)) for t in range(time)]
  np.testing.assert_allclose(out[0, :, 0, 0], expected, rtol=1e-6)


def test_a_document_does_not_notice_that_another_changes():
  q, k, v, _, _ = _inputs(time=300)
  attention_runs.assert_unnoticed("splash_tpu", q, k, v, mine=slice(110, 200), window=150)


@pytest.mark.parametrize("number", [0, -(2**31)])
def test_what_fills_up_blocks_is_seen_by_no_document(number):
  q, k, v, q_documents, k_documents = _inputs(time=150, heads=1)
  documents = (jnp.full_like(q_documents, number), jnp.full_like(k_documents, number))
  for actual, expected in zip(
    attention_runs.run("splash_tpu", (q, k, v, *documents), 140),
    attention_runs.run("reference", (q, k, v, *documents), 140),
    strict=True,
  ):
    assert_close(actual, expected, dtype="float32", reduction=32, floor=1.0)


def test_keys_of_no_document_are_visible_to_nobody():
  """The halo before the first shard, and a state that holds nothing yet."""
  q, k, v, documents, k_documents = _inputs(time=130, history=60, heads=1)
  k_documents = k_documents.at[:, :60].set(NO_DOCUMENT)
  alone = attention_runs.run("splash_tpu", (q, k[:, 60:], v[:, 60:], documents, documents), 60)
  out, dq, dk, dv = attention_runs.run("splash_tpu", (q, k, v, documents, k_documents), 60)
  assert not dk[:, :60].any()
  assert not dv[:, :60].any()
  for actual, expected in zip((out, dq, dk[:, 60:], dv[:, 60:]), alone, strict=True):
    assert_close(actual, expected, dtype="float32", reduction=32, floor=1.0)


@pytest.mark.parametrize(("window", "offset"), [(70, 0), (300, 40), (None, 0), (None, 130)])
def test_the_schedule_is_that_of_the_whole_matrix(window, offset):
  """The blocks of the band by their corners are those that the library finds entry by entry."""
  shape = (512, 512 + 128 * 2)
  band = splash_tpu._Band(shape, (window, 0), offset)
  whole = splash_tpu.masks.LocalMask(shape, (window, 0), offset)
  for row in range(0, shape[0], 128):
    for column in range(0, shape[1], 256):
      block = (slice(row, row + 128), slice(column, column + 256))
      expected = whole[block]
      assert band[block].any() == expected.any()
      assert band[block].all() == expected.all()
      if expected.any() and not expected.all():
        np.testing.assert_array_equal(band[block], expected)


@pytest.mark.parametrize(
  ("length", "window", "block"),
  [(8192, 1024, 512), (8192, 2048, 512), (8192, None, 512), (4096, 512, 256), (4096, 100, 128),
   (640, 2048, 128), (2100, 2048, 256), (130, None, 128), (1, 1024, 128)],
)  # fmt: skip
def test_blocks_fit_the_row_and_the_window(length, window, block):
  assert splash_tpu.block_size(length, window) == block


def test_a_head_size_that_it_cannot_do_is_refused():
  with pytest.raises(ValueError, match=r"splash_tpu needs .* of 128, not 32; name .* auto"):
    local_attention.resolve("splash_tpu", head_size=32)
  with pytest.raises(ValueError, match="multiple of 128, not 192"):
    attention.Config(num_heads=2, head_size=192, window=8, implementation="splash_tpu").build(
      64, num_blocks=1, rngs=nnx.Rngs(0)
    )


def test_auto_on_tpu_follows_the_head_size(monkeypatch):
  monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
  assert local_attention.resolve("auto", head_size=128) == "splash_tpu"
  assert local_attention.resolve("auto", head_size=256) == "splash_tpu"
  assert local_attention.resolve("auto", head_size=64) == "banded"


def test_decoding_steps_are_banded_and_say_so(caplog):
  local_attention._log_few_queries.cache_clear()
  arrays = _inputs(time=1, history=40)
  with caplog.at_level(logging.INFO, logger="absl"):
    outputs = [
      attention_runs.run(name, arrays, 40)[0] for name in ("splash_tpu", "splash_tpu", "banded")
    ]
  np.testing.assert_array_equal(outputs[0], outputs[2])
  assert [record.getMessage() for record in caplog.records] == [
    "local_attention: banded for 1 queries, too few for a block of splash_tpu"
  ]


def test_the_layer_on_a_mesh_is_the_layer_alone():
  config = attention.Config(num_heads=2, head_size=128, window=40, implementation="splash_tpu")
  module = config.build(64, num_blocks=1, rngs=nnx.Rngs(0))
  graph, params = nnx.split(module, nnx.Param)
  x_BTD = jax.random.normal(jax.random.key(1), (2, 130, 64))
  ids_BT = jnp.asarray([[1] * 50 + [2] * 80, [1] * 130], jnp.int32)
  segments, _ = segments_lib.segments(ids_BT, segments_lib.initial_state(2))

  def loss(params, x_BTD):
    y_BTD, _ = nnx.merge(graph, params)(x_BTD, segments, None)
    return jnp.sum(jnp.sin(y_BTD)), y_BTD

  def run():
    return jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True))(params, x_BTD)

  alone = run()
  with logical.placement(
    make_mesh(MeshShape(data=2, tensor=2), devices=jax.devices()[:4]), rules.ZERO1
  ):
    sharded = run()
  for actual, expected in zip(jax.tree.leaves(sharded), jax.tree.leaves(alone), strict=True):
    assert_close(actual, expected, dtype="float32", reduction=130, floor=1.0)


def _compiled_gradient(
  monkeypatch, topology, *, time, history, size, window, policy, kv_heads=1
) -> str:
  """The optimised program of the gradients, batch and heads split over 2 x 2 devices."""
  monkeypatch.setenv("TPU_SKIP_MDS_QUERY", "1")
  monkeypatch.setenv("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
  devices = topologies.get_topology_desc(topology_name=topology, platform="tpu").devices
  mesh = Mesh(np.array(devices).reshape(2, 2), ("data", "tensor"))
  heads, batch, dtype = P("data", None, "tensor"), P("data"), jnp.bfloat16

  def struct(shape, dtype, layout):
    return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, layout))

  keys = time + history
  kv = batch if kv_heads == 1 else heads
  arrays = (
    struct((2, time, 4, size), dtype, heads),
    struct((2, keys, kv_heads, size), dtype, kv),
    struct((2, keys, kv_heads, size), dtype, kv),
    struct((2, time), jnp.int32, batch),
    struct((2, keys), jnp.int32, batch),
  )
  attend = jax.shard_map(
    functools.partial(splash_tpu.attention, window=window),
    mesh=mesh, in_specs=(heads, kv, kv, batch, batch), out_specs=heads, check_vma=False,
  )  # fmt: skip

  def loss(*arrays):
    return jnp.sum(jax.checkpoint(attend, policy=policy)(*arrays).astype(jnp.float32) ** 2)

  return jax.jit(jax.grad(loss, (0, 1, 2))).lower(*arrays).compile().as_text()


_KERNEL = 'custom_call_target="tpu_custom_call"'
_KEEPS = jax.checkpoint_policies.save_only_these_names("attention")


# The presets' head sizes and windows, rows with and without keys of an earlier chunk; on two shards
# of heads one key-value head that both have, or two of their own each.
@pytest.mark.parametrize(
  ("topology", "case"),
  [
    ("v5e:2x2", {"time": 4096, "history": 0, "size": 128, "window": 1024}),
    ("v5p:2x2x1", {"time": 4096, "history": 2048, "size": 256, "window": 2048, "kv_heads": 4}),
    ("v6e:2x2", {"time": 4000, "history": 0, "size": 128, "window": None}),
  ],
)
def test_it_compiles_for_a_tpu_without_the_matrix(monkeypatch, topology, case):
  time, history, size = case["time"], case["history"], case["size"]
  text = _compiled_gradient(monkeypatch, topology, policy=_KEEPS, **case)
  assert text.count(_KERNEL) == 3  # the output, the gradient of q, that of k and v
  keys = time + history
  shapes = re.findall(r"\b[a-z]+\d*\[([\d,]+)\]", text)
  largest = max(int(np.prod(list(map(int, shape.split(","))))) for shape in shapes)
  # One row's two heads, filled up to blocks, where two heads' logits would be 2 x T x S.
  assert largest <= 2 * (-(-keys // 512) * 512) * size < 2 * time * keys / 15


def test_without_the_policy_that_keeps_them_outputs_are_computed_again(monkeypatch):
  text = _compiled_gradient(
    monkeypatch, "v5e:2x2", time=256, history=0, size=128, window=128, policy=None
  )
  assert text.count(_KERNEL) == 4
