"""Parts of a weight and the gradient that joins theirs (models/layers/cut.py)."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels import dispatch
from models.layers.cut import cut
from sharding import logical, rules
from sharding.mesh import MeshShape, make_mesh
from tests.draws import Draws

DEVICES = {"cpu": "cpu", "gpu": "NVIDIA H100 80GB HBM3"}


@pytest.mark.parametrize("platform", DEVICES)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
  ("shape", "axis"), [((3, 4, 6), 0), ((3, 4, 6), 1), ((3, 4, 6), 2), ((3, 4, 5), 0), ((3,), 0)]
)
def test_parts_and_gradients_are_those_of_indexing(shape, axis, dtype, platform):
  draws = Draws()
  x = draws.normal(*shape, dtype=dtype)
  weights = [draws.normal(*np.delete(shape, axis), dtype=dtype) for _ in range(shape[axis])]

  def indexed(x, axis):
    return [jnp.take(x, index, axis) for index in range(shape[axis])]

  def loss(x, parts_of):
    return sum(jnp.sum(part * w) for part, w in zip(parts_of(x, axis), weights, strict=True))

  with dispatch.targeting(platform, device_kind=DEVICES[platform]):
    parts = cut(x, axis)
    gradient = jax.grad(loss)(x, cut)
  for part, wanted in zip(parts, indexed(x, axis), strict=True):
    np.testing.assert_array_equal(part, wanted)
  assert gradient.dtype == x.dtype
  np.testing.assert_array_equal(gradient, jax.grad(loss)(x, indexed))


def test_gradients_are_joined_as_words_for_one_gpu():
  """XLA's kernel for them moves one element at a time, whatever its size."""

  def operands(platform, num_devices):
    mesh = make_mesh(MeshShape(data=num_devices), devices=jax.devices()[:num_devices])
    target = dispatch.targeting(platform, device_kind=DEVICES[platform])
    with target, logical.placement(mesh, rules.ZERO1):
      pull_back = jax.vjp(lambda x: cut(x, 0), jnp.ones((3, 4, 6), jnp.bfloat16))[1]
      jaxpr = jax.make_jaxpr(pull_back)([jnp.ones((4, 6), jnp.bfloat16)] * 3)
    [joined] = [each for each in jaxpr.eqns if each.primitive.name in ("stack", "concatenate")]
    return {x.aval.dtype.name for x in joined.invars}

  assert operands("gpu", 1) == {"uint32"}
  assert operands("gpu", 2) == {"bfloat16"}
  assert operands("cpu", 1) == {"bfloat16"}
