"""The matrix products of the layers: what a CPU makes of their gradients."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models.layers.projection import project
from sharding.xla_flags import XlaFlags

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
  text = program.lower(x, w, y).compile(XlaFlags().resolved("cpu")).as_text()
  shapes = re.findall(r"= f32\[([\d,]+)\]\S* (?:copy|transpose)\(", text)
  sizes = [np.prod([int(size) for size in shape.split(",")]) for shape in shapes]
  assert max(sizes, default=0) <= w.size < min(x.size, y.size)
  assert transposed(y)[1].shape == weights
