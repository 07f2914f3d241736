"""The linear recurrence with its rows split over devices is that of whole rows."""

import functools
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from kernels import halo, linear_scan
from sharding import collectives
from sharding.mesh import MeshShape, make_mesh
from tests.draws import Draws
from tests.tolerances import assert_close
from tests.triton_tiles import small_tiles


@pytest.fixture(params=linear_scan.IMPLEMENTATIONS)
def implementation(request):
  if request.param != "pallas_gpu":
    yield request.param
    return
  # Two chunks to a shard, and ten to the row.
  with small_tiles(steps=4):
    yield request.param


def _mesh(shards):
  return make_mesh(MeshShape(data=-1, sequence=shards))


def _split(run, shards, *, check_vma=True):
  """`run` (x, a, h0) -> (y, hT) with time split; hT as every shard has it, [shards, B, D]."""
  row = P(None, "sequence")

  def on_shard(x_BTD, a_BTD, h0_BD):
    y_BTD, hT_BD = run(x_BTD, a_BTD, h0_BD)
    return y_BTD, hT_BD[None]

  return jax.shard_map(
    on_shard,
    mesh=_mesh(shards),
    in_specs=(row, row, P()),
    out_specs=(row, P("sequence")),
    check_vma=check_vma,
  )


def _inputs(time, dtype="float32", batch=2, width=3):
  draws, shape = Draws(time), (batch, time, width)
  a_BTD = draws.decays(shape, zero=0.05, one=0.2)
  # The borders of 8 shards: 0 on one, just before and just after others.
  shard = time // 8
  for start in (2 * shard, 4 * shard - 1, 5 * shard + 1):
    a_BTD[0, start] = 0.0
  x_BTD = draws.normal(*shape, dtype=dtype)
  return x_BTD, jnp.asarray(a_BTD), draws.normal(batch, width)


@pytest.mark.parametrize("reverse", [False, True])
def test_states_and_gradients_are_those_of_the_whole_row(implementation, reverse):
  arrays = _inputs(8 * 5)
  weights_BTD, weights_BD = Draws(1).normal(*arrays[0].shape), Draws(2).normal(*arrays[2].shape)
  run = functools.partial(linear_scan.linear_scan, implementation=implementation, reverse=reverse)

  def loss(run, *arrays):
    y_BTD, hT_BD = run(*arrays)
    # Every shard's copy of the last state counts, each with a weight of its own.
    share = jnp.arange(1.0, 1.0 + hT_BD.shape[0])[:, None, None]
    share = share / share.sum()
    return jnp.sum(y_BTD * weights_BTD) + jnp.sum(hT_BD * weights_BD * share), (y_BTD, hT_BD)

  def whole(*arrays):
    y_BTD, hT_BD = run(*arrays)
    return y_BTD, hT_BD[None]

  def gradients(run):
    return jax.jit(jax.grad(functools.partial(loss, run), (0, 1, 2), has_aux=True))(*arrays)

  expected_grads, (expected_y, expected_hT) = gradients(whole)
  split = functools.partial(run, axis_name="sequence")
  # A Triton kernel does not say over which axes its results vary; what can be checked is.
  checks = {"reference": (True, False), "pallas_gpu": (False,)}
  for shards, check_vma in itertools.product((2, 8), checks.get(implementation, (True,))):
    grads, (y_BTD, hT_SBD) = gradients(_split(split, shards, check_vma=check_vma))
    assert_close(y_BTD, expected_y, dtype="float32", reduction=4)
    for hT_BD in hT_SBD:
      np.testing.assert_array_equal(hT_BD, hT_SBD[0])
      assert_close(hT_BD, expected_hT[0], dtype="float32", reduction=4)
    for grad, expected in zip(grads, expected_grads, strict=True):
      assert_close(grad, expected, dtype="float32", reduction=16)


@pytest.mark.parametrize("reverse", [False, True])
def test_one_shard_is_the_plain_scan_bit_for_bit(reverse):
  arrays = _inputs(40)
  run = functools.partial(linear_scan.linear_scan, implementation="reference", reverse=reverse)
  y_BTD, hT_1BD = jax.jit(_split(functools.partial(run, axis_name="sequence"), 1))(*arrays)
  expected_BTD, expected_BD = jax.jit(run)(*arrays)
  np.testing.assert_array_equal(y_BTD, expected_BTD)
  np.testing.assert_array_equal(hT_1BD[0], expected_BD)


def test_bfloat16_rows_carry_float32_between_shards():
  x_BTD, a_BTD, h0_BD = _inputs(64, "bfloat16")
  run = functools.partial(linear_scan.linear_scan, implementation="reference", axis_name="sequence")
  y_BTD, hT_SBD = jax.jit(_split(run, 8))(x_BTD, a_BTD, h0_BD)
  expected, last = linear_scan.linear_scan(x_BTD, a_BTD, h0_BD, implementation="reference")
  assert y_BTD.dtype == jnp.bfloat16
  assert hT_SBD.dtype == jnp.float32
  assert_close(y_BTD, expected, dtype="bfloat16")
  assert_close(hT_SBD[0], last, dtype="float32", reduction=4)


@pytest.mark.parametrize("reverse", [False, True])
def test_nothing_crosses_a_border_with_a_decay_of_zero(reverse):
  x_BTD, a_BTD, h0_BD = _inputs(40, batch=1)
  border = 20
  a_BTD = a_BTD.at[:, border - 1 if reverse else border].set(0.0)
  mine = slice(0, border) if reverse else slice(border, 40)
  other = jnp.ones((40,), bool).at[mine].set(False)[None, :, None]
  run = functools.partial(
    linear_scan.linear_scan, implementation="reference", reverse=reverse, axis_name="sequence"
  )

  def loss(x_BTD, a_BTD, h0_BD):
    y_BTD, _ = _split(run, 8)(x_BTD, a_BTD, h0_BD)
    return jnp.sum(jnp.sin(y_BTD)[:, mine]), y_BTD[:, mine]

  gradient = jax.jit(jax.grad(loss, (0, 1, 2), has_aux=True))
  (dx, _, dh0), y = gradient(x_BTD, a_BTD, h0_BD)
  changed = (jnp.where(other, 1e4 * x_BTD + 3, x_BTD), jnp.where(other, 0.5, a_BTD), h0_BD - 100.0)
  (other_dx, _, other_dh0), other_y = gradient(*changed)
  np.testing.assert_array_equal(y, other_y)
  np.testing.assert_array_equal(dx, other_dx)
  assert not np.where(other, dx, 0).any()
  assert not dh0.any()
  assert not other_dh0.any()


@pytest.mark.parametrize("count", [0, 1, 3, 5, 8, 13, 40])
def test_the_tokens_before_a_shard_come_from_as_many_shards_as_hold_them(count):
  time, shards = 20, 4
  x_BT = jnp.arange(2.0 * time).reshape(2, time)

  def on_shard(x_BT):
    return halo.tokens_before(x_BT, count=count, axis_name="sequence", fill=-1)

  found = jax.jit(
    jax.shard_map(
      on_shard, mesh=_mesh(shards), in_specs=P(None, "sequence"), out_specs=P(None, "sequence")
    )
  )(x_BT)
  padded_BT = np.pad(np.asarray(x_BT), ((0, 0), (count, 0)), constant_values=-1)
  starts = range(0, time, time // shards)
  expected = np.concatenate([padded_BT[:, start : start + count] for start in starts], axis=1)
  np.testing.assert_array_equal(found, expected)


def test_what_is_sent_does_not_depend_on_the_length_of_the_row():
  batch, width, shards = 2, 3, 8

  def sent(time):
    arrays = _inputs(time, batch=batch, width=width)
    run = functools.partial(
      linear_scan.linear_scan, implementation="reference", axis_name="sequence"
    )

    def loss(*arrays):
      return jnp.sum(jnp.sin(_split(run, shards)(*arrays)[0]))

    text = jax.jit(jax.grad(loss, (0, 1, 2))).lower(*arrays).compile().as_text()
    found = collectives.read(text, _mesh(shards))
    assert {one.axes for one in found} == {("sequence",)}
    return sorted((one.kind, one.bytes) for one in found)

  pair = 4 * batch * width
  expected = [("all-gather", shards * 2 * pair)] * 2 + [("collective-permute", pair)]
  found = sent(16)
  # Beside them only sums of something [batch, width]: dhT and dh0 over the shards.
  assert [one for one in found if one[0] != "all-reduce"] == expected
  assert all(size == pair for kind, size in found if kind == "all-reduce")
  assert found == sent(16 * 64)
  assert math.prod((batch, 16 * 64, width)) * 4 > sum(size for _, size in found)
