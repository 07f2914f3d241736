"""The GPU kernels of the recurrence: interpreted on CPU, and lowered for CUDA without a GPU."""

import functools
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels import dispatch, linear_scan, rg_lru
from kernels.block_diagonal import measure as block_diagonal_measure
from kernels.linear_scan import pallas_gpu as plain
from kernels.rg_lru import measure
from kernels.rg_lru import pallas_gpu as fused
from tests.draws import Draws
from tests.tolerances import assert_close
from tests.triton_tiles import small_tiles

# Tokens of a chunk, and its parts.
CHUNKS = {"long chunks": (16, 1), "short chunks": (4, 1), "parts": (8, 4)}


@pytest.fixture(params=CHUNKS)
def mode(request):
  steps, warps = CHUNKS[request.param]
  with small_tiles(steps=steps, warps=warps):
    yield


in_all_kinds_of_chunks = pytest.mark.usefixtures("mode")

# One token; tails of steps, chunks and channels; whole chunks and channels.
SHAPES = [(1, 1, 3), (2, 37, 40), (1, 64, 32)]


def _scan_results(scan, reverse, dtype, shape):
  draws = Draws()
  arrays = (draws.normal(*shape, dtype=dtype), draws.decays(shape), draws.normal(*shape[::2]))
  return jax.jit(functools.partial(scan, reverse=reverse))(*arrays)


@in_all_kinds_of_chunks
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize(
  ("dtype", "shape"), [("float32", shape) for shape in SHAPES] + [("bfloat16", (2, 37, 40))]
)
def test_the_scan_is_the_reference_one(reverse, dtype, shape):
  y_BTD, hT_BD = _scan_results(plain.scan, reverse, dtype, shape)
  expected_BTD, expected_BD = _scan_results(linear_scan._SCANS["reference"], reverse, dtype, shape)
  assert y_BTD.dtype == expected_BTD.dtype
  assert hT_BD.dtype == jnp.float32
  assert_close(y_BTD, expected_BTD, dtype=dtype)
  # The carry is float32 whatever the dtype of x.
  assert_close(hT_BD, expected_BD, dtype="float32", reduction=4)


def _inputs(shape, dtype, starts):
  """x, r, i, decay, is_start, h0, and the cotangents of y and hT."""
  batch, time, width = shape
  draws = Draws(1)
  x_BTR, r_BTR, i_BTR, dy_BTR = (draws.normal(*shape, dtype=dtype) for _ in range(4))
  decay_R = draws.uniform(width, low=-6.0, high=0.0)
  is_start_BT = {
    "some": draws.uniform(batch, time) < 0.1,
    "none": np.zeros((batch, time), bool),
    "all": np.ones((batch, time), bool),
    # The first and the last step of every chunk of 8, every group of 4.
    "borders": np.broadcast_to(np.isin(np.arange(time) % 8, [0, 3, 7]), (batch, time)),
  }[starts]
  h0_BR, dhT_BR = (draws.normal(batch, width) for _ in range(2))
  return x_BTR, r_BTR, i_BTR, decay_R, jnp.asarray(is_start_BT), h0_BR, dy_BTR, dhT_BR


@jax.jit
def _reference(x_BTR, r_BTR, i_BTR, decay_R, is_start_BT, h0_BR, dy_BTR, dhT_BR):
  """States and gradients by JAX, one step at a time, all in float32."""

  def run(x_BTR, r_BTR, i_BTR, decay_R, h0_BR):
    arrays = (x_BTR, r_BTR, i_BTR, decay_R, is_start_BT, h0_BR)
    return rg_lru.rg_lru(*arrays, implementation="reference")

  wide = (z_BTR.astype(jnp.float32) for z_BTR in (x_BTR, r_BTR, i_BTR))
  results, pull_back = jax.vjp(run, *wide, decay_R, h0_BR)
  return *results, *pull_back((dy_BTR.astype(jnp.float32), dhT_BR))


def _ours(x_BTR, r_BTR, i_BTR, decay_R, is_start_BT, h0_BR, dy_BTR, dhT_BR):
  inputs = (x_BTR, r_BTR, i_BTR, decay_R, is_start_BT, h0_BR)
  # New functions, which JAX has not traced in another mode.
  forward, backward = map(functools.partial, (fused.forward, fused.backward))
  y_BTR, hT_BR = jax.jit(forward)(*inputs)
  gradients = jax.jit(backward)(*inputs, y_BTR, dy_BTR, dhT_BR)
  return y_BTR, hT_BR, *gradients


@in_all_kinds_of_chunks
@pytest.mark.parametrize(
  ("dtype", "shape", "starts"),
  [
    ("float32", (1, 1, 3), "none"),
    ("float32", (2, 37, 40), "some"),
    ("float32", (1, 64, 32), "borders"),
    ("float32", (1, 21, 32), "all"),
    ("bfloat16", (2, 37, 40), "some"),
  ],
)
def test_values_and_every_gradient_are_those_of_the_reference(dtype, shape, starts):
  inputs = _inputs(shape, dtype, starts)
  names = ("y", "hT", "dx", "dr", "di", "ddecay", "dh0")
  for name, actual, expected in zip(names, _ours(*inputs), _reference(*inputs), strict=True):
    is_state = name in ("hT", "ddecay", "dh0")
    assert actual.dtype == (jnp.float32 if is_state else jnp.dtype(dtype)), name
    # h_{t-1} is read from y, in its dtype; hT and dh0 do not depend on a bfloat16 state.
    kind = "float32" if name in ("hT", "dh0") else dtype
    assert_close(actual, expected, dtype=kind, reduction=16)


@in_all_kinds_of_chunks
def test_decays_of_exactly_zero_and_one():
  """softplus(-200) is 0 in float32, and exp(-8 * 200 * sigmoid(r)) as well."""
  x, r, i, _, is_start, h0, dy, dhT = _inputs((1, 37, 40), "float32", "none")
  decay_R = jnp.where(jnp.arange(40) % 2 == 0, -200.0, 200.0)
  ours, reference = (f(x, r, i, decay_R, is_start, h0, dy, dhT) for f in (_ours, _reference))
  np.testing.assert_array_equal(ours[1][:, ::2], h0[:, ::2])  # a is 1, and nothing enters
  for actual, expected in zip(ours, reference, strict=True):
    assert_close(actual, expected, dtype="float32", reduction=16)


@in_all_kinds_of_chunks
def test_a_document_changes_no_bit_of_the_next():
  x, r, i, decay, _, h0, dy, dhT = _inputs((1, 37, 32), "float32", "none")
  is_start = jnp.zeros((1, 37), bool).at[:, 18].set(True)
  before = (jnp.arange(37) < 18)[None, :, None]
  y, _, dx, dr, di, *_ = _ours(x, r, i, decay, is_start, h0, jnp.where(before, 0, dy), dhT)
  other = (jnp.where(before, 5.0 - z, z) for z in (x, r, i))
  other_y, _, *other_grads = _ours(*other, decay, is_start, -h0, jnp.where(before, 0, dy), dhT)
  np.testing.assert_array_equal(y[:, 18:], other_y[:, 18:])
  for grad, other_grad in zip((dx, dr, di), other_grads[:3], strict=True):
    np.testing.assert_array_equal(grad[:, 18:], other_grad[:, 18:])
    assert not grad[:, :18].any()
  assert not other_grads[4].any()


def _struct(shape, dtype=jnp.bfloat16):
  return jax.ShapeDtypeStruct(shape, dtype)


def _lowered(f, *arrays) -> str:
  with dispatch.targeting("gpu"):
    return jax.jit(f).trace(*arrays).lower(lowering_platforms=("cuda",)).as_text()


_KERNEL = "custom_call @__gpu$xla.gpu.triton"
BIG = [(8, 2048, 2560), (1, 65536, 2560)]


# Triton's IR is made here, machine code where a GPU is.
@pytest.mark.parametrize("chunks", [(32, 1), (64, 4)], ids=str)
@pytest.mark.parametrize("shape", BIG, ids=str)
def test_the_fused_kernels_lower_for_cuda_and_write_no_float32_activation(
  shape, chunks, monkeypatch
):
  for name in ("", "_BACKWARD"):
    monkeypatch.setattr(fused, f"{name}_STEPS", chunks[0])
    monkeypatch.setattr(fused, f"{name}_WARPS", chunks[1])
  x, h0 = _struct(shape), _struct(shape[::2], jnp.float32)
  inputs = (x, x, x, _struct(shape[2:], jnp.float32), _struct(shape[:2], jnp.bool_), h0)
  for f, more in ((fused.forward, ()), (fused.backward, (x, x, h0))):
    text = _lowered(f, *inputs, *more)
    assert text.count(_KERNEL) == 1
    assert "x".join(map(str, shape)) + "xbf16" in text
    assert "x".join(map(str, shape)) + "xf32" not in text


@pytest.mark.parametrize("shape", [*BIG, (2, 1001, 1536), (3, 77, 5632)], ids=str)
def test_the_scan_lowers_for_cuda(shape):
  arrays = (_struct(shape), _struct(shape, jnp.float32), _struct(shape[::2], jnp.float32))
  for reverse in (False, True):
    text = _lowered(functools.partial(plain.scan, reverse=reverse), *arrays)
    assert text.count(_KERNEL) == 1


@pytest.mark.parametrize(
  ("shape", "steps", "grid", "window"),
  [
    ((8, 2048, 2560), 32, (40, 8, 64), 4),
    ((1, 65536, 2560), 32, (40, 1, 2048), 12),
    ((2, 65536, 2560), 32, (40, 2, 2048), 12),
    ((2, 65536, 2560), 64, (40, 2, 1024), 6),
    ((2, 1001, 1000), 32, (16, 2, 32), 12),
    ((1, 1, 64), 32, (1, 1, 1), 12),
  ],
)
def test_every_chunk_of_a_row_has_a_program(shape, steps, grid, window):
  """Chunks are the grid's slowest index, so that no program waits for one that cannot start."""
  tiles = plain.Tiles.of(shape, steps=steps, warps=1)
  assert (tiles.grid, tiles.window) == (grid, window)


def test_a_row_of_more_chunks_than_a_grid_has_is_refused():
  with pytest.raises(ValueError, match=r"2097153 tokens of a row .* axis sequence"):
    plain.Tiles.of((1, 65_535 * 32 + 33, 64), steps=32, warps=1)


def test_flags_are_packed_in_the_order_of_the_recurrence(monkeypatch):
  monkeypatch.setattr(plain, "GROUP", 4)
  flags_BT = jnp.zeros((1, 10), bool).at[0, jnp.array([0, 5, 9])].set(True)
  tiles = plain.Tiles.of((1, 10, 1), steps=8, warps=2)
  assert tiles.packed(flags_BT, reverse=False).tolist() == [[0b0001, 0b0010, 0b0010, 0]]
  assert tiles.packed(flags_BT, reverse=True).tolist() == [[0b0001, 0b0001, 0b0010, 0]]


@pytest.mark.parametrize(
  ("module", "implementations"),
  [
    (measure, {"reference", "associative", "chunked"}),
    (block_diagonal_measure, {"einsum", "einsum_rounded"}),
  ],
)
def test_measuring_works_anywhere(capsys, module, implementations):
  module.main(["2,16,32"])
  record = json.loads(capsys.readouterr().out)
  assert record["shape"] == [2, 16, 32]
  assert record["command"] == f"python -m {module.__name__} 2,16,32"
  assert re.fullmatch(r"\d{4}-\d\d-\d\d", record["date"])
  assert record["copy_bytes_per_second"] > 0
  # On a CPU: those that run there.
  assert set(record["implementations"]) == implementations
  for result in record["implementations"].values():
    for part in ("forward", "forward_backward"):
      assert result[f"{part}_ms"] > 0
      assert result[f"{part}_of_copy"] > 0
