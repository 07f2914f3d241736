"""The gates' products by every implementation: values and every gradient."""

import functools
import itertools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from kernels import block_diagonal, dispatch
from kernels.block_diagonal import pallas_gpu, pallas_tpu
from sharding.mesh import MeshShape, make_mesh
from tests.draws import Draws
from tests.tolerances import assert_close


def _inputs(batch, time, blocks, size, dtype):
  """x, w, b, and cotangents of both results."""
  draws, shape = Draws(), (batch, time, blocks * size)
  x_BTR = draws.normal(*shape, dtype=dtype)
  w_GI2J = (draws.normal(blocks, size, 2, size) / size**0.5).astype(dtype)
  b_G2J = draws.normal(blocks, 2, size)
  # Rounded, so that they are the same in both dtypes.
  dy = tuple(draws.normal(*shape, dtype="bfloat16") for _ in range(2))
  return (x_BTR, w_GI2J, b_G2J), dy


def _run(arrays, dy, products):
  """Both results, and the gradients of x, w and b."""
  y, vjp = jax.vjp(products, *arrays)
  return *y, *vjp(tuple(z.astype(one.dtype) for z, one in zip(dy, y, strict=True)))


def _products(name):
  """An implementation, or "einsum, split": einsum for arrays that the partitioner splits."""
  implementation, _, split = name.partition(", ")
  return functools.partial(
    block_diagonal.products, implementation=implementation, is_whole=not split
  )


def _by_definition(x_BTR, w_GI2J, b_G2J):
  """Float32, block by block."""
  blocks, size, _, _ = w_GI2J.shape
  results = []
  for branch in range(2):
    parts = [
      x_BTR[..., block * size : (block + 1) * size] @ w_GI2J[block, :, branch]
      + b_G2J[block, branch]
      for block in range(blocks)
    ]
    results.append(jnp.concatenate(parts, axis=-1))
  return tuple(results)


# Published widths; several tiles of tokens, the last not full; blocks that begin inside a register,
# tiles of channels that end inside one, more than one of them; single tokens. In the interpreter a
# tile has NaN past the edge of an array.
SHAPES = [
  (1, 3, 16, 96),
  (1, 3, 16, 160),
  (1, 3, 16, 352),
  (1, 601, 5, 160),
  (2, 37, 3, 40),
  (3, 1, 1, 160),
]


_BOTH = ("float32", "bfloat16")


@pytest.mark.parametrize(
  ("implementation", "shape", "dtype"),
  [
    *itertools.product(["einsum", "einsum, split"], [SHAPES[-2]], _BOTH),
    *itertools.product(["einsum_rounded"], SHAPES[-2:], _BOTH),
    *itertools.product(["pallas_tpu"], SHAPES, _BOTH),
    *itertools.product(["pallas_gpu"], [*SHAPES, (2, 64, 2, 24)], ["bfloat16"]),
  ],
  ids=str,
)
def test_products_are_those_of_the_definition(shape, implementation, dtype):
  arrays, dy = _inputs(*shape, dtype)
  wide = (*(z.astype(jnp.float32) for z in arrays[:2]), arrays[2])
  run = jax.jit(_run, static_argnums=2)
  actual = run(arrays, dy, _products(implementation))
  expected = run(wide, dy, _by_definition)
  rounded = "float32" if implementation in ("einsum", "einsum, split") else dtype
  assert [z.dtype.name for z in actual] == [rounded, rounded, dtype, dtype, "float32"]
  batch, time, _, size = shape
  terms = (size, size, 2 * size, batch * time, batch * time)
  for result, reference, reduction in zip(actual, expected, terms, strict=True):
    kind = result.dtype.name
    assert_close(result, reference, dtype=kind, reduction=reduction if kind == "float32" else 1)


_HOPPER, _AMPERE = "NVIDIA H100 80GB HBM3", "NVIDIA A100-SXM4-80GB"


@pytest.mark.parametrize("device_kind", [_HOPPER, _AMPERE])
def test_triton_kernels_lower_for_cuda(device_kind):
  """Checks that both are lowered, and that no array of results is reordered before or after."""
  arrays, dy = _inputs(2, 512, 16, 160, "bfloat16")
  with dispatch.targeting("gpu", device_kind=device_kind):
    run = jax.jit(functools.partial(_run, products=_products("pallas_gpu")))
    text = run.trace(arrays, dy).lower(lowering_platforms=("cuda",)).as_text()
  assert "block_diagonal_forward" in text
  assert "block_diagonal_backward" in text
  moved = re.findall(r"stablehlo.transpose.*-> tensor<(.*)>", text)
  assert not [shape for shape in moved if math.prod(map(int, shape.split("x")[:-1])) == 1024 * 2560]


_ONCE = pallas_gpu.Cut()


@pytest.mark.parametrize(
  ("device_kind", "tokens", "blocks", "size", "forward", "backward"),
  [
    (_HOPPER, 16384, 16, 160, (16, 2, 1), (32, 3, 2)),
    ("", 16384, 16, 160, (16, 2, 1), (32, 3, 2)),
    # Shards of few blocks, and few tokens: fewer tiles, so that every multiprocessor has a program.
    (_HOPPER, 16384, 2, 160, (4, 2, 1), (4, 3, 2)),
    (_HOPPER, 2048, 16, 160, (4, 2, 1), (4, 3, 2)),
    (_HOPPER, 257, 16, 160, _ONCE, _ONCE),
    # Blocks with too many weights, for dx or for everything; too few for half of the results.
    (_HOPPER, 16384, 16, 256, (16, 2, 1), _ONCE),
    (_HOPPER, 16384, 16, 352, _ONCE, _ONCE),
    (_HOPPER, 16384, 16, 64, _ONCE, (32, 3, 2)),
    (_AMPERE, 16384, 16, 160, _ONCE, _ONCE),
    ("NVIDIA B200", 16384, 16, 160, _ONCE, _ONCE),
  ],
)
def test_programs_keep_weights_where_a_hopper_has_room(
  device_kind, tokens, blocks, size, forward, backward
):
  x_PR = jax.ShapeDtypeStruct((tokens, blocks * size), jnp.bfloat16)
  with dispatch.targeting("gpu", device_kind=device_kind):
    assert pallas_gpu.Cut.forward(x_PR, blocks=blocks, size=size) == forward
    assert pallas_gpu.Cut.backward(x_PR, blocks=blocks, size=size) == backward


@pytest.mark.parametrize("size", [40, 160])
@pytest.mark.parametrize("tiles", [2, 3])
def test_weights_that_programs_keep_change_no_result(size, tiles, monkeypatch):
  """Only the biases' gradients are summed in another order. The last tiles are not full, and the
  last of three programs has tiles without tokens."""
  arrays, dy = _inputs(1, 201, 2, size, "bfloat16")
  expected = _run(arrays, dy, _products("pallas_gpu"))
  cuts = {"forward": (tiles, 2, 1), "backward": (tiles, 3)}
  for name, cut in cuts.items():
    monkeypatch.setattr(pallas_gpu.Cut, name, lambda *_, cut=cut, **__: pallas_gpu.Cut(*cut))
  actual = _run(arrays, dy, _products("pallas_gpu"))
  for got, wanted in zip(actual[:4], expected[:4], strict=True):
    np.testing.assert_array_equal(got, wanted)
  assert_close(actual[4], expected[4], dtype="float32", reduction=201)


def test_float32_is_refused_by_the_kernel_for_tensor_cores():
  (x_BTR, w_GI2J, b_G2J), _ = _inputs(1, 3, 2, 32, "float32")
  with pytest.raises(ValueError, match=r"2 bytes, not float32.*use einsum_rounded"):
    block_diagonal.products(x_BTR, w_GI2J, b_G2J, implementation="pallas_gpu")


def test_matrices_hold_every_weight_once():
  for blocks, size in ((8, 96), (5, 160), (3, 40), (2, 256), (1, 160)):
    bands = pallas_tpu.Bands(blocks, size)
    w_GI2J = 1.0 + jnp.arange(blocks * size * 2 * size).reshape(blocks, size, 2, size)
    packed = np.asarray(bands.packed(w_GI2J))
    assert packed.shape == (bands.num_tiles, bands.num_rows, 256)
    np.testing.assert_array_equal(np.sort(packed[packed > 0]), np.asarray(w_GI2J).ravel())
    np.testing.assert_array_equal(bands.unpacked(packed), w_GI2J)


@pytest.mark.parametrize("name", ["einsum, split", "einsum_rounded"])
def test_the_partitioner_splits_rows_tokens_and_blocks_and_moves_none(name):
  """The gradients of the weights are summed over devices, and nothing else is sent."""
  assert block_diagonal.is_partitioned(name)
  arrays, dy = _inputs(4, 6, 8, 20, "float32")
  mesh = make_mesh(MeshShape(data=2, sequence=2, tensor=2))
  row = NamedSharding(mesh, P("data", "sequence", "tensor"))
  blocks = NamedSharding(mesh, P("tensor"))
  run = jax.jit(
    functools.partial(_run, products=_products(name)),
    in_shardings=((row, blocks, blocks), (row, row)),
    out_shardings=(row, row, row, blocks, blocks),
  )
  for result, expected in zip(run(arrays, dy), _run(arrays, dy, _by_definition), strict=True):
    assert_close(result, expected, dtype="float32", reduction=40)
  text = run.lower(arrays, dy).compile().as_text()
  assert "all-reduce" in text
  assert not any(kind in text for kind in ("all-gather", "all-to-all", "collective-permute"))


@pytest.mark.parametrize(("name", "dtype"), [("pallas_tpu", "float32"), ("pallas_gpu", "bfloat16")])
def test_shards_are_the_whole(name, dtype):
  """Rows and blocks split by jax.shard_map; weights are the same on data shards."""
  arrays, dy = _inputs(4, 6, 8, 20, dtype)
  mesh = make_mesh(MeshShape(data=2, tensor=4))
  row = P("data", None, "tensor")
  on_shards = jax.shard_map(
    _products(name),
    mesh=mesh,
    in_specs=(row, P("tensor"), P("tensor")),
    out_specs=(row, row),
    check_vma=False,
  )
  actual = jax.jit(_run, static_argnums=2)(arrays, dy, on_shards)
  wide = tuple(z.astype(jnp.float32) for z in arrays)
  for result, expected in zip(actual, _run(wide, dy, _by_definition), strict=True):
    assert_close(result, expected, dtype=dtype, reduction=40 if dtype == "float32" else 1)


def test_shapes_that_do_not_agree_are_refused():
  (x_BTR, w_GI2J, b_G2J), _ = _inputs(1, 2, 3, 8, "float32")
  with pytest.raises(ValueError, match=r"block_diagonal: x \(1, 2, 23\).*\[batch, time, 24\]"):
    block_diagonal.products(x_BTR[..., 1:], w_GI2J, b_G2J, implementation="einsum")
  with pytest.raises(ValueError, match=r"block_diagonal: x \(2, 24\) must be \[batch, time, R\]"):
    block_diagonal.products(x_BTR[0], w_GI2J, b_G2J, implementation="einsum")
  with pytest.raises(ValueError, match=r"block_diagonal: .* w \(3, 8, 2\) \[blocks,"):
    block_diagonal.products(x_BTR, w_GI2J[..., 0], b_G2J, implementation="einsum")


@pytest.mark.parametrize("implementation", block_diagonal.IMPLEMENTATIONS)
def test_one_result_more_or_no_token_is_refused(implementation):
  (x_BTR, w_GI2J, b_G2J), _ = _inputs(1, 2, 3, 8, "bfloat16")
  w_GI3J = jnp.concatenate([w_GI2J, w_GI2J[:, :, :1]], axis=2)
  with pytest.raises(ValueError, match=r"w \(3, 8, 3, 8\) .* \(3, 8, 2, 8\)"):
    block_diagonal.products(x_BTR, w_GI3J, b_G2J, implementation=implementation)
  with pytest.raises(ValueError, match=r"x \(1, 0, 24\) .* at least one token"):
    block_diagonal.products(x_BTR[:, :0], w_GI2J, b_G2J, implementation=implementation)
