"""Every implementation of the linear recurrence against one that goes token by token."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from kernels import linear_scan
from sharding.mesh import MeshShape, make_mesh
from tests.draws import Draws
from tests.tolerances import assert_close

# Those of any device; tests/kernels/test_pallas_gpu.py has the GPU's.
every_implementation = pytest.mark.parametrize(
  "implementation", ["reference", "associative", "chunked"]
)


def _slow(x_BTD, a_BTD, h0_BD, reverse):
  """h_t = a_t h_{t-1} + x_t in float64."""
  h_BD, y_BTD = np.float64(h0_BD), np.zeros(x_BTD.shape)
  order = range(x_BTD.shape[1])
  for t in reversed(order) if reverse else order:
    h_BD = np.float64(a_BTD[:, t]) * h_BD + np.float64(x_BTD[:, t])
    y_BTD[:, t] = h_BD
  return y_BTD, h_BD


def _inputs(shape, dtype, seed=0):
  batch, _, width = shape
  draws = Draws(seed)
  x_BTD, a_BTD = draws.normal(*shape, dtype=dtype), jnp.asarray(draws.decays(shape))
  return x_BTD, a_BTD, draws.normal(batch, width), draws


# Compiled as in a model, which is also faster than operation by operation.
_scan = jax.jit(linear_scan.linear_scan, static_argnames=("implementation", "reverse"))

SHAPES = [(2, 1, 3), (2, 63, 5), (3, 64, 8), (1, 257, 4)]


@every_implementation
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_states_are_those_of_the_recurrence(implementation, reverse, dtype, shape):
  x_BTD, a_BTD, h0_BD, _ = _inputs(shape, dtype)
  y_BTD, hT_BD = _scan(x_BTD, a_BTD, h0_BD, implementation=implementation, reverse=reverse)
  assert y_BTD.dtype == x_BTD.dtype
  assert hT_BD.dtype == jnp.float32
  expected_BTD, expected_BD = _slow(*map(np.asarray, (x_BTD, a_BTD, h0_BD)), reverse)
  assert_close(y_BTD, expected_BTD, dtype=dtype)
  # The carry is float32 whatever the dtype of x.
  assert_close(hT_BD, expected_BD, dtype="float32", reduction=4)


@every_implementation
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("shape", [(2, 1, 3), (2, 63, 3), (1, 65, 4)], ids=str)
def test_gradients_are_those_of_the_recurrence(implementation, reverse, shape):
  x_BTD, a_BTD, h0_BD, draws = _inputs(shape, "float32")
  weights_BTD, weights_BD = draws.normal(*shape), draws.normal(*h0_BD.shape)

  def loss(x_BTD, a_BTD, h0_BD):
    y_BTD, hT_BD = linear_scan.linear_scan(
      x_BTD, a_BTD, h0_BD, implementation=implementation, reverse=reverse
    )
    return jnp.sum(y_BTD * weights_BTD) + jnp.sum(hT_BD * weights_BD)

  def plain_loss(x_BTD, a_BTD, h0_BD):
    def step(h_BD, t):
      h_BD = a_BTD[:, t] * h_BD + x_BTD[:, t]
      return h_BD, jnp.sum(h_BD * weights_BTD[:, t])

    order = jnp.arange(shape[1])
    h_BD, terms = jax.lax.scan(step, h0_BD, order[::-1] if reverse else order)
    return jnp.sum(terms) + jnp.sum(h_BD * weights_BD)

  actual = jax.jit(jax.grad(loss, (0, 1, 2)))(x_BTD, a_BTD, h0_BD)
  expected = jax.jit(jax.grad(plain_loss, (0, 1, 2)))(x_BTD, a_BTD, h0_BD)
  for grad, expected_grad in zip(actual, expected, strict=True):
    assert_close(grad, expected_grad, dtype="float32", reduction=16)


@every_implementation
def test_gradients_in_bfloat16_have_the_dtypes_of_the_inputs(implementation):
  x_BTD, a_BTD, h0_BD, _ = _inputs((2, 33, 4), "bfloat16")

  def loss(x_BTD, a_BTD, h0_BD):
    y_BTD, hT_BD = linear_scan.linear_scan(x_BTD, a_BTD, h0_BD, implementation=implementation)
    return jnp.sum(y_BTD.astype(jnp.float32) ** 2) + jnp.sum(hT_BD)

  gradients = jax.jit(jax.grad(loss, (0, 1, 2)))
  low = gradients(x_BTD, a_BTD, h0_BD)
  high = gradients(x_BTD.astype(jnp.float32), a_BTD, h0_BD)
  assert [g.dtype for g in low] == [jnp.bfloat16, jnp.float32, jnp.float32]
  for grad, expected in zip(low, high, strict=True):
    assert_close(grad, expected, dtype="bfloat16", reduction=4)


@every_implementation
@pytest.mark.parametrize("reverse", [False, True])
def test_nothing_crosses_a_decay_of_zero(implementation, reverse):
  x_BTD, a_BTD, h0_BD, draws = _inputs((1, 150, 3), "float32")
  a_BTD = a_BTD.at[:, 70].set(0.0)
  mine = slice(0, 71) if reverse else slice(70, 150)
  weights = draws.normal(1, 150, 3)

  def loss(x_BTD, a_BTD, h0_BD):
    y_BTD, _ = linear_scan.linear_scan(
      x_BTD, a_BTD, h0_BD, implementation=implementation, reverse=reverse
    )
    return jnp.sum((y_BTD * weights)[:, mine]), y_BTD[:, mine]

  run = jax.jit(jax.value_and_grad(loss, (0, 1, 2), has_aux=True))
  other = jnp.ones((150,), bool).at[mine].set(False)[None, :, None]
  original = run(x_BTD, a_BTD, h0_BD)
  changed = run(
    jnp.where(other, 1e4 * x_BTD + 3, x_BTD), jnp.where(other, 0.5, a_BTD), h0_BD - 100.0
  )
  (_, y), (dx, da, dh0) = original
  (_, other_y), (other_dx, other_da, other_dh0) = changed
  np.testing.assert_array_equal(y, other_y)
  np.testing.assert_array_equal(dx[:, mine], other_dx[:, mine])
  inside = np.arange(150)[mine] != 70  # the reset's own decay: its gradient is what came before
  np.testing.assert_array_equal(da[:, mine][:, inside], other_da[:, mine][:, inside])
  assert not np.where(other, dx, 0).any()
  assert not np.where(other, da, 0).any()
  assert not dh0.any()
  assert not other_dh0.any()


@every_implementation
def test_a_split_sequence_with_its_state_is_the_whole(implementation):
  x_BTD, a_BTD, h0_BD, _ = _inputs((2, 100, 3), "float32")
  scan = functools.partial(_scan, implementation=implementation)
  whole, last = scan(x_BTD, a_BTD, h0_BD)
  parts, h_BD = [], h0_BD
  for start, end in ((0, 1), (1, 40), (40, 99), (99, 100)):
    y_BTD, h_BD = scan(x_BTD[:, start:end], a_BTD[:, start:end], h_BD)
    parts.append(y_BTD)
  assert_close(jnp.concatenate(parts, axis=1), whole, dtype="float32", reduction=4)
  assert_close(h_BD, last, dtype="float32", reduction=4)


def test_wrong_shapes_and_names_are_refused():
  x = jnp.zeros((2, 3, 4))
  with pytest.raises(ValueError, match=r"h0 \(2, 5\)"):
    linear_scan.linear_scan(x, x, jnp.zeros((2, 5)), implementation="reference")
  with pytest.raises(ValueError, match="time is 0"):
    linear_scan.linear_scan(x[:, :0], x[:, :0], jnp.zeros((2, 4)), implementation="reference")
  with pytest.raises(ValueError, match=r"'fast' is none of reference, associative, .*auto"):
    linear_scan.resolve("fast")


@every_implementation
def test_the_last_output_is_the_last_state(implementation):
  x_BTD, a_BTD, h0_BD, _ = _inputs((2, 45, 3), "float32")
  for reverse, last in ((False, -1), (True, 0)):
    y_BTD, hT_BD = linear_scan.linear_scan(
      x_BTD, a_BTD, h0_BD, implementation=implementation, reverse=reverse
    )
    np.testing.assert_array_equal(y_BTD[:, last], hT_BD)


@pytest.mark.parametrize("implementation", ["reference", "associative", "chunked"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_no_step_rewrites_what_earlier_steps_wrote(implementation, dtype):
  """XLA on CPU widens a whole bfloat16 array to write one row: in each step, that is quadratic."""
  shape = (2, 512, 16)
  x_BTD = jax.ShapeDtypeStruct(shape, dtype)
  a_BTD, h0_BD = (jax.ShapeDtypeStruct(s, jnp.float32) for s in (shape, (2, 16)))

  def loss(x_BTD, a_BTD, h0_BD):
    y_BTD, _ = linear_scan.linear_scan(x_BTD, a_BTD, h0_BD, implementation=implementation)
    return jnp.sum(y_BTD.astype(jnp.float32) ** 2)

  text = jax.jit(jax.grad(loss, (0, 1, 2))).lower(x_BTD, a_BTD, h0_BD).compile().as_text()
  for computation in text.split("\n\n"):
    if "dynamic-update-slice(" not in computation:
      continue
    for dimensions in re.findall(r"\[([\d,]+)\]\S* convert\(", computation):
      assert np.prod(list(map(int, dimensions.split(",")))) < np.prod(shape), computation


@every_implementation
def test_shards_with_a_shared_state_are_the_whole(implementation):
  """Batch and channels split by jax.shard_map, the first state the same on every data shard."""
  x_BTD, a_BTD, h0_BD, draws = _inputs((4, 19, 8), "float32")
  weights_BTD, h0_D = draws.normal(*x_BTD.shape), h0_BD[0]
  mesh = make_mesh(MeshShape(data=2, tensor=4))
  split = P("data", None, "tensor")

  def run(x_BTD, a_BTD, h0_D):
    h0_BD = jnp.broadcast_to(h0_D, (x_BTD.shape[0], x_BTD.shape[2]))
    return linear_scan.linear_scan(x_BTD, a_BTD, h0_BD, implementation=implementation)

  def gradients(run):
    def loss(*arrays):
      y_BTD, hT_BD = run(*arrays)
      return jnp.sum(y_BTD * weights_BTD) + jnp.sum(jnp.sin(hT_BD))

    return jax.jit(jax.grad(loss, (0, 1, 2)))(x_BTD, a_BTD, h0_D)

  on_shards = jax.shard_map(
    run, mesh=mesh, in_specs=(split, split, P("tensor")), out_specs=(split, P("data", "tensor"))
  )
  for actual, expected in zip(gradients(on_shards), gradients(run), strict=True):
    assert_close(actual, expected, dtype="float32", reduction=16)
