"""Layouts follow from names; placement changes where arrays lie, never their values."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from sharding import logical
from sharding.logical import IfDivisible, Rules
from sharding.mesh import MeshShape, make_mesh

_COMPUTE = {"embed": None, "mlp": "tensor", "layers": None}
_STORED = {"embed": "fsdp", "mlp": "tensor", "layers": None}
_ACTIVATIONS = {"batch": ("data", "fsdp"), "width": None, "mlp": "tensor"}
_RULES = Rules(
  parameters=_STORED,
  compute=_COMPUTE,
  gradients=_STORED,
  moments=_STORED,
  activations=_ACTIVATIONS,
)


def _mesh(**sizes):
  return make_mesh(MeshShape(**(sizes or {"data": 2, "fsdp": 2, "tensor": 2})))


def test_a_spec_is_the_table_of_the_names():
  table = {"batch": ("data", "fsdp"), "embed": "fsdp", "mlp": "tensor", "norm": None}
  assert logical.spec(("embed", "mlp"), table) == P("fsdp", "tensor")
  assert logical.spec(("batch", None, "mlp"), table) == P(("data", "fsdp"), None, "tensor")
  assert logical.spec(("norm",), table) == P(None)
  assert logical.spec((), table) == P()


def test_if_divisible_splits_only_sizes_that_it_divides():
  mesh, table = _mesh(fsdp=8), {"gate_in": IfDivisible("fsdp")}
  assert logical.spec(("gate_in",), table, shape=(16,), mesh=mesh) == P("fsdp")
  assert logical.spec(("gate_in",), table, shape=(12,), mesh=mesh) == P(None)
  with pytest.raises(ValueError, match="give shape and mesh"):
    logical.spec(("gate_in",), table)


@pytest.mark.parametrize(
  ("axes", "shape", "message"),
  [
    (("embed", "mpl"), (8, 8), r"w: unknown axis 'mpl' in \('embed', 'mpl'\); the table has"),
    (("embed", "mlp"), (8, 9), r"w: axis 'mlp' of size 9 is not divisible by mesh tensor 2"),
    (("batch", "mlp"), (6, 8), r"w: axis 'batch' of size 6 is not .* mesh data 2 x fsdp 2"),
    (("embed", "mlp"), (8, 8, 8), r"w: shape \(8, 8, 8\) and axes .* differ in length"),
    (("embed", "embed"), (8, 8), r"'embed' and 'embed' of .* both split over mesh axis 'fsdp'"),
  ],
)
def test_a_layout_that_cannot_be_is_an_error_with_the_name(axes, shape, message):
  table = {**_ACTIVATIONS, **_STORED}
  with pytest.raises(ValueError, match=message):
    logical.spec(axes, table, shape=shape, mesh=_mesh(), name="w")


def test_the_shardings_of_a_tree_name_the_wrong_parameter():
  axes = {"block": {"w_DF": ("embed", "mlp")}, "b_F": ("mlp",)}
  shapes = {"block": {"w_DF": np.zeros((4, 6))}, "b_F": np.zeros((6,))}
  mesh = _mesh()
  assert logical.shardings(axes, shapes, _STORED, mesh) == {
    "block": {"w_DF": NamedSharding(mesh, P("fsdp", "tensor"))},
    "b_F": NamedSharding(mesh, P("tensor")),
  }
  shapes["block"]["w_DF"] = np.zeros((4, 7))
  with pytest.raises(ValueError, match="block/w_DF: axis 'mlp' of size 7"):
    logical.shardings(axes, shapes, _STORED, mesh)


def test_without_a_placement_nothing_happens():
  x_BD, w_DF, f = jnp.ones((3, 5)), jnp.ones((5, 7)), jnp.sin
  assert logical.constrain(x_BD, "no", "such") is x_BD
  assert logical.use(w_DF, ("no", "such")) is w_DF
  assert logical.gathered({"w": w_DF}, {"w": ("no", "such")})["w"] is w_DF
  assert logical.constrain_gradients(w_DF, ("no", "such")) is w_DF
  assert logical.on_shards(f, in_axes=(("no",),), out_axes=("no",)) is f
  assert logical.mesh_axis("no") is None


def test_a_jitted_function_is_traced_again_under_another_placement():
  f = jax.jit(lambda x: logical.constrain(2 * x, "batch", "mlp"))
  x = jnp.ones((8, 8))
  assert len(f(x).sharding.device_set) == 1
  for mesh in (_mesh(), _mesh(data=8), _mesh()):
    with logical.placement(mesh, _RULES):
      layout = NamedSharding(mesh, P(("data", "fsdp"), "tensor"))
      assert f(x).sharding.is_equivalent_to(layout, 2)
  assert len(f(x).sharding.device_set) == 1


def test_an_activation_that_does_not_divide_is_an_error():
  with (
    logical.placement(_mesh(), _RULES),
    pytest.raises(ValueError, match="'batch' of size 6 is not divisible by mesh data 2 x fsdp 2"),
  ):
    logical.constrain(jnp.ones((6, 2)), "batch", "width")


def test_a_used_parameter_is_gathered_and_its_gradient_is_not():
  mesh = _mesh()
  w_DF = jax.random.normal(jax.random.key(0), (8, 6))
  x_BD = jax.random.normal(jax.random.key(1), (4, 8))
  layouts = []

  def loss(w_DF):
    used_DF = logical.use(w_DF, ("embed", "mlp"))
    jax.debug.inspect_array_sharding(used_DF, callback=layouts.append)
    return jnp.sum(jnp.tanh(x_BD @ used_DF))

  with logical.placement(mesh, _RULES):
    stored = jax.device_put(w_DF, logical.shardings(("embed", "mlp"), w_DF, _STORED, mesh))
    gradient = jax.jit(jax.grad(loss))(stored)
  assert [layout.spec for layout in layouts] == [P(None, "tensor")]
  assert gradient.sharding == NamedSharding(mesh, P("fsdp", "tensor"))
  np.testing.assert_allclose(gradient, jax.grad(loss)(w_DF), rtol=1e-6, atol=1e-6)


def test_stacked_layers_are_used_inside_a_scan():
  mesh = _mesh()
  axes = {"w": ("layers", "embed", "mlp"), "v": ("layers", "mlp", "embed")}
  one_layer = {name: names[1:] for name, names in axes.items()}
  keys = jax.random.split(jax.random.key(0), 3)
  params = {
    "w": jax.random.normal(keys[0], (3, 8, 6)),
    "v": jax.random.normal(keys[1], (3, 6, 8)),
  }
  x_BD = jax.random.normal(keys[2], (4, 8))

  def loss(params):
    def layer(x_BD, layer_params):
      used = logical.gathered(layer_params, one_layer)
      x_BD = logical.constrain(x_BD + jnp.tanh(x_BD @ used["w"]) @ used["v"], "batch", "width")
      return x_BD, None

    return jnp.sum(jnp.square(jax.lax.scan(layer, x_BD, params)[0]))

  expected = jax.grad(loss)(params)
  with logical.placement(mesh, _RULES):
    layouts = logical.shardings(axes, params, _STORED, mesh)
    gradients = jax.jit(jax.grad(loss))(jax.device_put(params, layouts))
  assert jax.tree.map(lambda g: g.sharding, gradients) == layouts
  jax.tree.map(
    lambda g, e: np.testing.assert_allclose(g, e, rtol=1e-4, atol=1e-3), gradients, expected
  )


def test_layers_that_save_their_activations_do_not_save_gathered_parameters():
  mesh = _mesh(fsdp=8)
  num_layers, width = 16, 64
  w_LDF = jax.ShapeDtypeStruct(
    (num_layers, width, width),
    jnp.float32,
    sharding=NamedSharding(mesh, P(None, "fsdp")),
  )
  x_BD = jnp.ones((8, width))

  def loss(w_LDF):
    def layer(x_BD, w_DF):
      return jnp.tanh(x_BD @ logical.use(w_DF, ("embed", "mlp"))), None

    # What remat="none" keeps of a block (models/decoder.py): products, and so no gathered weight.
    kept = jax.checkpoint_policies.dots_saveable
    body = jax.checkpoint(layer, policy=kept, prevent_cse=False)
    return jnp.sum(jax.lax.scan(body, x_BD, w_LDF)[0])

  with logical.placement(mesh, _RULES):
    memory = jax.jit(jax.grad(loss)).lower(w_LDF).compile().memory_analysis()
  assert memory.argument_size_in_bytes < 1.1 * w_LDF.size * 4 / 8
  assert memory.temp_size_in_bytes < w_LDF.size * 4 / 2


def _lookup_and_sum(table_VF, index_B, x_BF, scale):
  """Arguments in every layout: split, whole on some axes, whole on all."""
  axis = logical.mesh_axis("mlp")
  rows_BF = table_VF[index_B] * x_BF * scale
  total_B = jnp.sum(jnp.sin(rows_BF), axis=-1)
  return rows_BF, total_B if axis is None else jax.lax.psum(total_B, axis)


@pytest.mark.parametrize("check_vma", [True, False])
@pytest.mark.parametrize("sizes", [{}, {"data": 8}, {"tensor": 8}, {"fsdp": 4, "tensor": 2}])
def test_on_shards_gives_the_values_and_gradients_of_one_device(sizes, check_vma):
  keys = jax.random.split(jax.random.key(0), 3)
  table_VF = jax.random.normal(keys[0], (5, 16))
  index_B = jax.random.randint(keys[1], (8,), 0, 5)
  x_BF = jax.random.normal(keys[2], (8, 16))

  def loss(table_VF, x_BF, scale):
    rows_BF, total_B = logical.on_shards(
      _lookup_and_sum,
      in_axes=((None, "mlp"), ("batch",), ("batch", "mlp"), ()),
      out_axes=(("batch", "mlp"), ("batch",)),
      check_vma=check_vma,
    )(table_VF, index_B, x_BF, scale)
    return jnp.sum(jnp.square(rows_BF)) + jnp.sum(jnp.cos(total_B))

  arguments = (table_VF, x_BF, jnp.float32(1.5))
  step = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2)))
  expected = step(*arguments)
  with logical.placement(_mesh(**sizes), _RULES):
    found = step(*arguments)
  jax.tree.map(lambda f, e: np.testing.assert_allclose(f, e, rtol=2e-5, atol=2e-5), found, expected)


def test_inside_on_shards_nothing_is_constrained():
  def f(x):
    return logical.on_shards(jnp.sin, in_axes=(("batch",),), out_axes=("batch",))(
      logical.constrain(x, "batch", "mlp")
    )

  mesh, x = _mesh(), jnp.ones((8, 6))
  with logical.placement(mesh, _RULES):
    mapped = logical.on_shards(f, in_axes=(("batch", "mlp"),), out_axes=("batch", "mlp"))
    assert jax.jit(mapped)(x).sharding == NamedSharding(mesh, P(("data", "fsdp"), "tensor"))
    with pytest.raises(ValueError, match="'batch' of size 6 is not divisible"):
      mapped(jnp.ones((6, 6)))


def test_on_shards_of_one_device_is_the_function_itself():
  mesh = make_mesh(MeshShape(), devices=jax.devices()[:1])
  with logical.placement(mesh, _RULES):
    assert logical.on_shards(jnp.sin, in_axes=(("batch",),), out_axes=("batch",)) is jnp.sin
