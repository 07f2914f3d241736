"""The matrix products of the layers: what a CPU makes of their gradients."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models.layers.projection import project, project_blocks
from train.program import _COMPILER_OPTIONS

BATCH, TIME = 4, 96
PRODUCTS = {
  "two matrices": (project, (48,), (48, 2, 80)),
  "heads, in": (project, (48,), (48, 4, 32)),
  "heads, out": (lambda x, w: project(x, w, inputs=2), (4, 32), (4, 32, 48)),
  "out": (project, (80,), (80, 48)),
}


@pytest.mark.parametrize("name", PRODUCTS)
def test_a_cpu_copies_no_activation_for_a_gradient(name):
  """JAX's own x^T dy, of [batch, time, ...], has a transpose written out for every product."""
  product, inputs, weights = PRODUCTS[name]
  x, w = jnp.ones((BATCH, TIME, *inputs)), jnp.ones(weights)
  y, transposed = jax.vjp(product, x, w)
  program = jax.jit(lambda x, w, dy: jax.vjp(product, x, w)[1](dy))
  text = program.lower(x, w, y).compile(_COMPILER_OPTIONS["cpu"]).as_text()
  shapes = re.findall(r"= f32\[([\d,]+)\]\S* (?:copy|transpose)\(", text)
  sizes = [np.prod([int(size) for size in shape.split(",")]) for shape in shapes]
  assert max(sizes, default=0) <= w.size < min(x.size, y.size)
  assert transposed(y)[1].shape == weights


def test_blocks_have_matrices_of_their_own():
  keys = jax.random.split(jax.random.key(0))
  x_BTGI = jax.random.normal(keys[0], (2, 5, 3, 4))
  w_GIKO = jax.random.normal(keys[1], (3, 4, 2, 6))
  y_BTGKO = project_blocks(x_BTGI, w_GIKO)
  for block in range(3):
    expected = np.einsum("BTI,IKO->BTKO", x_BTGI[:, :, block], w_GIKO[block])
    np.testing.assert_allclose(y_BTGKO[:, :, block], expected, rtol=1e-5, atol=1e-5)
