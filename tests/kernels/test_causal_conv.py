"""The short convolution by every implementation: values, every gradient, documents, borders."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels import causal_conv, dispatch
from kernels.causal_conv import measure, pallas_tpu
from models.layers import rg_lru
from sharding import logical, rules
from sharding.mesh import MeshShape, make_mesh
from tests.draws import Draws
from tests.jaxprs import equations
from tests.tolerances import assert_close

_NAMES = ("y", "the other y", "dx", "db_in", "dw", "db")
# Odd lengths, tails of tiles of channels, one tap, rows shorter than the taps, several chunks.
SHAPES = [
  (2, 37, 96, 4),
  (1, 64, 64, 4),
  (2, 3, 40, 4),
  (1, 66, 70, 2),
  (2, 5, 33, 1),
  (1, 1, 64, 4),
  (1, 67, 160, 6),
]


def _inputs(batch, time, width, taps, dtype="float32"):
  """x, b_in, w, b; documents, and gradients of both results."""
  draws = Draws()
  x_BTR, *dy = (draws.normal(batch, time, width, dtype=dtype) for _ in range(3))
  b_in_R, b_R = (draws.normal(width) for _ in range(2))
  w_KR = draws.normal(taps, width)
  document_BT = jnp.cumsum(draws.uniform(batch, time) < 0.2, axis=1)
  return (x_BTR, b_in_R, w_KR, b_R), document_BT, tuple(dy)


@functools.partial(jax.jit, static_argnums=3)
def _run(arrays, document_BT, dy, convolve):
  y, vjp = jax.vjp(lambda *arrays: convolve(*arrays, document_BT), *arrays)
  return *y, *vjp(tuple(z.astype(one.dtype) for z, one in zip(dy, y, strict=True)))


def _implementation(name):
  return functools.partial(causal_conv.convolve, implementation=name)


def _by_definition(x_BTR, b_in_R, w_KR, b_R, document_BT):
  """Adds for each tap the token that far before t, if it is in the same document."""
  taps, time = w_KR.shape[0], document_BT.shape[1]
  t, s = np.indices((time, time))
  same_BTS = document_BT[:, :, None] == document_BT[:, None]
  takes_KBTS = jnp.stack([same_BTS & (s == t - (taps - 1 - tap)) for tap in range(taps)])
  takes_KBTS = takes_KBTS.astype(jnp.float32)
  y_BTR = b_R + jnp.einsum("KBTS,KR,BSR->BTR", takes_KBTS, w_KR, x_BTR + b_in_R)
  return y_BTR, y_BTR


@functools.cache
def _expected(shape):
  return _run(*_inputs(*shape), _by_definition)


@pytest.mark.parametrize(
  ("shape", "name"), [*itertools.product(SHAPES, causal_conv.IMPLEMENTATIONS)], ids=str
)
def test_it_is_the_definition(shape, name):
  """Values, and the gradients of x, both biases and the taps."""
  inputs = _inputs(*shape)
  actual = _run(*inputs, _implementation(name))
  expected = _expected(shape)
  batch, time, _, taps = shape
  terms = (taps, taps, taps, batch * time, batch * time, batch * time)
  for what, got, wanted, reduction in zip(_NAMES, actual, expected, terms, strict=True):
    assert got.dtype == jnp.float32, what
    assert_close(got, wanted, dtype="float32", reduction=reduction)


@pytest.mark.parametrize("name", causal_conv.IMPLEMENTATIONS)
def test_bfloat16_is_rounded_once_each_way(name):
  """Compared with the definition in float32, from the same bfloat16 inputs."""
  (x_BTR, *vectors), document_BT, dy = _inputs(2, 70, 96, 4, "bfloat16")
  # What enters is rounded with its bias.
  z_BTR = (x_BTR.astype(jnp.float32) + vectors[0]).astype(jnp.bfloat16).astype(jnp.float32)
  actual = _run((x_BTR, *vectors), document_BT, dy, _implementation(name))
  wide_dy = tuple(z.astype(jnp.float32) for z in dy)
  wide = (z_BTR, jnp.zeros_like(vectors[0]), *vectors[1:])
  expected = _run(wide, document_BT, wide_dy, _by_definition)
  kinds = ("bfloat16", "bfloat16", "bfloat16", "float32", "float32", "float32")
  assert tuple(z.dtype.name for z in actual) == kinds
  for got, wanted in zip(actual[:3], expected[:3], strict=True):
    assert_close(got, wanted, dtype="bfloat16", reduction=1)
  for what, got, wanted in zip(_NAMES[3:], actual[3:], expected[3:], strict=True):
    # "shifts" rounds the sum of both gradients before it is summed over tokens.
    error = np.linalg.norm(got - wanted) / np.linalg.norm(wanted)
    assert error < (4e-3 if name == "shifts" else 1e-5), what


@pytest.mark.parametrize("name", causal_conv.IMPLEMENTATIONS)
def test_no_number_of_another_document_is_touched(name):
  """NaN in one document does not reach the others, forward or backward."""
  (x_BTR, *vectors), _, dy = _inputs(1, 40, 64, 4)
  document_BT = jnp.arange(40)[None] // 10
  bad = (document_BT == 1)[..., None]
  poisoned = (jnp.where(bad, jnp.nan, x_BTR), *vectors)
  poisoned_dy = tuple(jnp.where(bad, jnp.nan, z) for z in dy)
  convolve = _implementation(name)
  clean = _run((x_BTR, *vectors), document_BT, dy, convolve)
  dirty = _run(poisoned, document_BT, poisoned_dy, convolve)
  for got, wanted in zip(dirty[:3], clean[:3], strict=True):
    np.testing.assert_array_equal(got[:, :10], wanted[:, :10])
    np.testing.assert_array_equal(got[:, 20:], wanted[:, 20:])


@pytest.mark.parametrize("cut", [1, 2, 5])
def test_a_row_goes_on_from_what_was_before_it(cut):
  (x_BTR, b_in_R, w_KR, b_R), document_BT, _ = _inputs(2, 12, 32, 4)
  whole, _ = causal_conv.convolve(x_BTR, b_in_R, w_KR, b_R, document_BT, implementation="shifts")
  z_BSR = jnp.pad(x_BTR + b_in_R, ((0, 0), (3, 0), (0, 0)))
  document_BS = jnp.pad(document_BT, ((0, 0), (3, 0)), constant_values=-1)
  rest, _ = causal_conv.convolve(
    x_BTR[:, cut:],
    b_in_R,
    w_KR,
    b_R,
    document_BT[:, cut:],
    z_BSR[:, cut : cut + 3],
    document_BS[:, cut : cut + 3],
    implementation="pallas_gpu",  # computed by "shifts", as documented
  )
  np.testing.assert_array_equal(rest, whole[:, cut:])


@pytest.mark.parametrize("name", ["pallas_gpu", "pallas_tpu"])
@pytest.mark.parametrize(
  "mesh", [MeshShape(data=2, fsdp=2, tensor=2), MeshShape(fsdp=2, sequence=4)], ids=str
)
def test_shards_have_the_gradients_of_one_device(mesh, name):
  """Gradients of taps and biases are summed over all devices with other rows; as the layer does."""
  arrays, document_BT, dy = _inputs(4, 12, 32, 4)
  row, channels = ("batch", "time", "rnn"), ("rnn",)

  def on_shards(*arrays):
    convolve = logical.on_shards(
      functools.partial(rg_lru._convolve, implementation=name),
      in_axes=(row, channels, (None, "rnn"), channels, ("batch", "time")),
      out_axes=(row, row),
      check_vma=causal_conv.tracks_varying(name),
    )
    return convolve(*arrays)

  expected = _run(arrays, document_BT, dy, _implementation("shifts"))
  with logical.placement(make_mesh(mesh), rules.ZERO3):
    actual = _run(arrays, document_BT, dy, on_shards)
  for what, got, wanted in zip(_NAMES, actual, expected, strict=True):
    np.testing.assert_allclose(got, wanted, rtol=1e-5, atol=1e-5, err_msg=what)


def test_triton_kernels_lower_for_cuda():
  arrays, document_BT, dy = _inputs(2, 128, 160, 4, "bfloat16")
  with dispatch.targeting("gpu"):
    traced = _run.trace(arrays, document_BT, dy, _implementation("pallas_gpu"))
    text = traced.lower(lowering_platforms=("cuda",)).as_text()
  assert "causal_conv_forward" in text
  assert "causal_conv_backward" in text


@pytest.mark.parametrize("name", ["pallas_gpu", "pallas_tpu"])
def test_a_remat_policy_keeps_the_output_of_the_kernel(name):
  (x_BTR, *vectors), document_BT, _ = _inputs(1, 8, 16, 4)

  def passes(policy):
    def loss(x_BTR):
      y, again = causal_conv.convolve(x_BTR, *vectors, document_BT, implementation=name)
      return jnp.sum(jnp.sin(y) * again)

    jaxpr = jax.make_jaxpr(jax.grad(jax.checkpoint(loss, policy=policy)))(x_BTR)
    calls = [each for each in equations(jaxpr.jaxpr) if each.primitive.name == "pallas_call"]
    forward = [each for each in calls if "causal_conv_forward" in str(each.params)]
    # Each call has a branch for each of two platforms.
    return len(forward) / 2

  kept = passes(jax.checkpoint_policies.save_only_these_names("conv"))
  assert (kept, passes(jax.checkpoint_policies.nothing_saveable)) == (1, 2)


@pytest.mark.parametrize(
  ("change", "message"),
  [
    ({"x": jnp.zeros((3, 4))}, r"x \(3, 4\)"),
    ({"w": jnp.zeros((4, 5))}, r"w \(5,\) must be \(8,\)"),
    ({"b_in": jnp.zeros(3)}, r"b_in \(3,\) must be \(8,\)"),
    ({"document": jnp.zeros((1, 3), int)}, r"document \(1, 3\) must be \(1, 6\)"),
  ],
)
def test_shapes_that_do_not_fit_are_named(change, message):
  arrays = {
    "x": jnp.zeros((1, 6, 8)),
    "b_in": jnp.zeros(8),
    "w": jnp.zeros((4, 8)),
    "b": jnp.zeros(8),
    "document": jnp.zeros((1, 6), int),
    **change,
  }
  with pytest.raises(ValueError, match=message):
    causal_conv.convolve(*arrays.values(), implementation="shifts")


@pytest.mark.parametrize(("name", "most"), [("pallas_gpu", 31), ("pallas_tpu", 17)])
def test_more_taps_than_a_kernel_takes_are_refused(name, most):
  (x_BTR, b_in_R, _, b_R), document_BT, _ = _inputs(1, 4, 8, 1)
  w_KR = jnp.zeros((most + 1, 8))
  with pytest.raises(ValueError, match=f"{most + 1} taps are more than the {most} of {name}"):
    causal_conv.convolve(x_BTR, b_in_R, w_KR, b_R, document_BT, implementation=name)


@pytest.mark.parametrize("shape", [(2, 300, 300, 4), (1, 40, 130, 17)], ids=str)
def test_tiles_of_time_and_channels_join(shape):
  """Rows of several tiles, with tails in both dimensions; as many taps as the kernel allows."""
  inputs = _inputs(*shape)
  (x_BTR, b_in_R, w_KR, b_R), document_BT, (dy_BTR, more_dy_BTR) = inputs
  same = causal_conv._all_same(document_BT, w_KR)
  tile = (128, 128)
  y_BTR = pallas_tpu.forward(x_BTR, b_in_R, w_KR, b_R, same, tile=tile)
  found = pallas_tpu.backward(x_BTR, b_in_R, w_KR, same, dy_BTR, more_dy_BTR, tile=tile)
  expected = _run(*inputs, _by_definition)
  batch, time, _, taps = shape
  terms = (taps, taps, taps, batch * time, batch * time, batch * time)
  for what, got, wanted, reduction in zip(
    _NAMES, (y_BTR, y_BTR, *found), expected, terms, strict=True
  ):
    assert_close(got, wanted, dtype="float32", reduction=reduction), what


def test_measuring_works_anywhere():
  found = measure.measure(1, 16, 8)["implementations"]
  assert set(found) == {"shifts"}
  assert found["shifts"]["forward_backward_ms"] > 0
