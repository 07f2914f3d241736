"""The matrix products of the layers, and how their gradients compile for a CPU."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models.layers.projection import branches, project, project_each
from sharding import logical, rules
from sharding.mesh import MeshShape, make_mesh
from sharding.xla_flags import XlaFlags
from tests.draws import Draws
from tests.tolerances import assert_close

BATCH, TIME = 4, 96
PRODUCTS = {
  "two matrices": (project, (48,), (48, 2, 80)),
  "heads, in": (project, (48,), (48, 4, 32)),
  "heads, out": (lambda x, w: project(x, w, inputs=2), (4, 32), (4, 32, 48)),
  "out": (project, (80,), (80, 48)),
}


@pytest.mark.parametrize("name", PRODUCTS)
def test_a_cpu_copies_no_activation_for_a_gradient(name):
  """JAX's own x^T dy, of [batch, time, ...], writes a transposed copy for every product."""
  product, inputs, weights = PRODUCTS[name]
  x, w = jnp.ones((BATCH, TIME, *inputs)), jnp.ones(weights)
  y, transposed = jax.vjp(product, x, w)
  program = jax.jit(lambda x, w, dy: jax.vjp(product, x, w)[1](dy))
  text = program.lower(x, w, y).compile(XlaFlags().resolved("cpu")).as_text()
  shapes = re.findall(r"= f32\[([\d,]+)\]\S* (?:copy|transpose)\(", text)
  sizes = [np.prod([int(size) for size in shape.split(",")]) for shape in shapes]
  assert max(sizes, default=0) <= w.size < min(x.size, y.size)
  assert transposed(y)[1].shape == weights


def test_what_is_kept_of_a_branch_is_its_product():
  """With its bias it would be one more array to write, where blocks are unrolled."""
  x, w, b = jnp.ones((2, 3, 8)), jnp.ones((8, 2, 16)), jnp.ones((2, 16))
  jaxpr = jax.make_jaxpr(lambda x, w, b: branches(x, w, b, axis="mlp"))(x, w, b)
  named = [eqn for eqn in jaxpr.eqns if eqn.primitive.name == "name"]
  kept = [eqn.outvars[0] for eqn in named if eqn.params["name"] == "projection"]
  added = [eqn.invars[0] for eqn in jaxpr.eqns if eqn.primitive.name == "add"]
  assert len(kept) == 2
  assert kept == added
  assert [
    eqn.outvars[0] for eqn in jaxpr.eqns if eqn.primitive.name == "add"
  ] == jaxpr.jaxpr.outvars


def test_gradients_of_several_products_are_added_before_devices_sum_them():
  """Queries, and keys and values of as many heads: four devices send one gradient of x."""
  draws = Draws()
  arrays = draws.normal(2, 3, 8), (draws.normal(8, 4, 5), draws.normal(8, 2, 4, 5))

  def loss(x_BTD, weights):
    axes = (("heads", "head"), (None, "heads", "head"))
    products = project_each(x_BTD, weights, axes=axes, split="heads")
    return sum(jnp.sum(jnp.sin(y)) for y in products)

  alone = jax.jit(jax.grad(loss, (0, 1)))(*arrays)
  mesh = make_mesh(MeshShape(tensor=4), devices=jax.devices()[:4])
  with logical.placement(mesh, rules.ZERO1):
    split = jax.jit(jax.grad(loss, (0, 1))).lower(*arrays).compile()
  jax.tree.map(
    lambda a, b: assert_close(a, b, dtype="float32", reduction=40), split(*arrays), alone
  )
  assert len(re.findall(r" all-reduce(?:-start)?\(", split.as_text())) == 1
