"""Compares the kernels with their references on this machine: `python -m kernels.check`.

The tests run them in Pallas' interpreter, and compile them for chips that are not there. This runs
every implementation that this device has, on rows of several documents, of odd lengths and widths,
and compares results and every gradient with the reference on the CPU, in float32 from the same
inputs. One line each: the largest difference over what rounding allows, and where it is. Exit
status 1 if one is above 1, or does not run. Run it before the first long job on a kind of chip, and
after every new version of jax, of its compiler or of a driver; it takes a minute.
"""

import os
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from kernels import block_diagonal, causal_conv, linear_scan, local_attention, rg_lru, timing
from kernels.local_attention import splash_tpu

# Relative to the largest value of an array. bfloat16: inputs are exact; what a kernel stores and
# returns is rounded, by 2^-9 each time. float32: exponentials of accelerators are good to 1e-5.
_ALLOWED = {"bfloat16": 2e-2, "float32": 1e-3}
# Nearly all of the time is compilation: about 4 s a line, 117 lines, on an H100's host.
_COMPILERS = min(8, os.cpu_count() or 1)


class Case(NamedTuple):
  """A kernel on inputs: `call(implementation, *arrays)` is differentiated by every array."""

  kernel: str
  text: str
  dtype: str
  names: tuple[str, ...]
  arrays: tuple[jax.Array, ...]
  call: Callable[..., Any]
  implementations: tuple[str, ...]
  reference: str


class Shapes(NamedTuple):
  """What the kernels are run on."""

  recurrences: tuple[tuple[int, int, int], ...]  # [batch, time, width]
  attention: tuple[tuple[int, int, int, int], ...]  # [batch, time, heads, head size]
  gates: tuple[tuple[tuple[int, int, int], int], ...]  # [batch, time, width] and how many blocks


# GPUs cut one row of few channels into chunks, but not many rows; widths that end within a tile.
# Gates: few tokens, and enough that programs on Hopper keep the weights.
DEVICE_SHAPES = Shapes(
  recurrences=((2, 301, 160), (1, 1031, 1536), (8, 133, 2560)),
  attention=tuple((2, 523, 4, size) for size in (64, 128, 256)),
  gates=(((2, 301, 512), 4), ((1, 2101, 2560), 16)),
)


def cases(shapes: Shapes) -> Iterator[Case]:
  """Every kernel on rows of these shapes."""
  for dtype in ("bfloat16", "float32"):
    for shape in shapes.recurrences:
      yield _rg_lru(shape, dtype)
      for reverse in (False, True):
        yield _linear_scan(shape, dtype, reverse)
      yield _causal_conv(shape, dtype)
  for shape in shapes.attention:
    for kv_heads, window in ((1, 200), (1, None), (2, 200)):
      yield _local_attention(shape, kv_heads, window)
  for shape, blocks in shapes.gates:
    yield _block_diagonal(shape, blocks)


def expected_of(case: Case) -> dict[str, np.ndarray]:
  """The reference's results, and its gradient of each array, in float32 on the CPU."""
  with jax.default_device(jax.devices("cpu")[0]), jax.default_matmul_precision("highest"):
    arrays = [jnp.asarray(np.asarray(x), jnp.float32) for x in case.arrays]
    return jax.device_get(_with_gradients(case, case.reference, arrays))


def differences(
  case: Case, implementation: str, expected: dict[str, np.ndarray]
) -> dict[str, float]:
  """The largest difference of each result and gradient, over the allowed one; NaN if not finite."""
  actual = jax.device_get(_with_gradients(case, implementation, case.arrays))
  found = {}
  for name, wanted in expected.items():
    value = np.asarray(actual[name], np.float64)
    allowed = np.abs(wanted).max() * _ALLOWED[case.dtype]
    found[name] = float(np.abs(value - wanted).max() / allowed)
  return found


def _with_gradients(case: Case, implementation: str, arrays: Any) -> dict[str, jax.Array]:
  def run(*arrays):
    results = case.call(implementation, *arrays)
    return results if isinstance(results, tuple) else (results,)

  @jax.jit
  def both(*arrays):
    results, pull_back = jax.vjp(run, *arrays)
    # Rounded in the same way for both.
    cotangents = tuple(
      _normal(7 + index, y.shape, case.dtype).astype(y.dtype) for index, y in enumerate(results)
    )
    gradients = pull_back(cotangents)
    return {
      **{f"result {index}": y for index, y in enumerate(results)},
      **{f"gradient of {name}": dx for name, dx in zip(case.names, gradients, strict=True)},
    }

  return both(*arrays)


def _normal(index: int, shape: tuple[int, ...], dtype: str = "float32") -> jax.Array:
  return jax.random.normal(jax.random.key(index), shape).astype(dtype)


def _starts(batch: int, time: int) -> jax.Array:
  """Where documents begin: near 1 token in 50, at one place two in a row."""
  return (jax.random.uniform(jax.random.key(9), (batch, time)) < 0.02).at[:, 5:7].set(True)


def _documents(batch: int, time: int) -> jax.Array:
  return jnp.cumsum(_starts(batch, time), axis=1, dtype=jnp.int32)


def _rg_lru(shape: tuple[int, int, int], dtype: str) -> Case:
  batch, time, width = shape
  is_start_BT = _starts(batch, time)

  def call(implementation, x_BTR, r_BTR, i_BTR, decay_R, h0_BR):
    arrays = (x_BTR, r_BTR, i_BTR, decay_R, is_start_BT, h0_BR)
    return rg_lru.rg_lru(*arrays, implementation=implementation)

  arrays = (
    *(_normal(index, shape, dtype) for index in range(3)),
    jnp.linspace(-9.0, -1.0, width),
    _normal(3, (batch, width)),
  )
  names = ("x", "r", "i", "decay", "h0")
  return Case("rg_lru", f"{shape}", dtype, names, arrays, call, rg_lru.IMPLEMENTATIONS, "reference")


def _linear_scan(shape: tuple[int, int, int], dtype: str, reverse: bool) -> Case:
  batch, _, width = shape

  def call(implementation, x_BTD, a_BTD, h0_BD):
    return linear_scan.linear_scan(
      x_BTD, a_BTD, h0_BD, implementation=implementation, reverse=reverse
    )

  uniform_BTD = jax.random.uniform(jax.random.key(1), shape)
  # Decays of exactly 0 and 1 are among them.
  a_BTD = jnp.where(uniform_BTD < 0.02, 0.0, jnp.minimum(1.0, 0.9 + 0.11 * uniform_BTD))
  arrays = (_normal(0, shape, dtype), a_BTD, _normal(2, (batch, width)))
  text = f"{shape}, reverse" if reverse else f"{shape}"
  names = ("x", "a", "h0")
  implementations = linear_scan.IMPLEMENTATIONS
  return Case("linear_scan", text, dtype, names, arrays, call, implementations, "reference")


def _local_attention(shape: tuple[int, int, int, int], kv_heads: int, window: int | None) -> Case:
  batch, time, _, size = shape
  documents_BT = _documents(batch, time)

  def call(implementation, q_BTNH, k_BSEH, v_BSEH):
    arrays = (q_BTNH, k_BSEH, v_BSEH, documents_BT, documents_BT)
    return local_attention.local_attention(*arrays, window=window, implementation=implementation)

  keys = (batch, time, kv_heads, size)
  arrays = (
    _normal(0, shape, "bfloat16"), _normal(1, keys, "bfloat16"), _normal(2, keys, "bfloat16")
  )  # fmt: skip
  implementations = tuple(
    name
    for name in local_attention.IMPLEMENTATIONS
    if name != "splash_tpu" or size % splash_tpu.LANES == 0
  )
  text = f"{shape}, {kv_heads} kv, window {window}"
  return Case(
    "local_attention", text, "bfloat16", ("q", "k", "v"), arrays, call, implementations, "reference"
  )


def _block_diagonal(shape: tuple[int, int, int], blocks: int) -> Case:
  def call(implementation, x_BTR, w_GI2J, b_G2J):
    return block_diagonal.products(x_BTR, w_GI2J, b_G2J, implementation=implementation)

  size = shape[-1] // blocks
  arrays = (
    _normal(0, shape, "bfloat16"),
    (_normal(1, (blocks, size, 2, size)) * size**-0.5).astype("bfloat16"),
    _normal(2, (blocks, 2, size)),
  )
  names, text = ("x", "w", "b"), f"{shape}, {blocks} blocks"
  implementations = block_diagonal.IMPLEMENTATIONS
  return Case("block_diagonal", text, "bfloat16", names, arrays, call, implementations, "einsum")


def _causal_conv(shape: tuple[int, int, int], dtype: str) -> Case:
  batch, time, width = shape
  documents_BT = _documents(batch, time)

  def call(implementation, x_BTR, b_in_R, w_KR, b_R):
    return causal_conv.convolve(
      x_BTR, b_in_R, w_KR, b_R, documents_BT, implementation=implementation
    )

  vectors = (_normal(1, (width,)), _normal(2, (4, width)), _normal(3, (width,)))
  arrays = (_normal(0, shape, dtype), *vectors)
  names, implementations = ("x", "b_in", "w", "b"), causal_conv.IMPLEMENTATIONS
  return Case("causal_conv", f"{shape}", dtype, names, arrays, call, implementations, "shifts")


def check(cases: Iterator[Case]) -> bool:
  """Prints a line for each case and implementation that runs here; whether all are right."""
  held = []
  with ThreadPoolExecutor(_COMPILERS) as pool:
    for case in cases:
      # Before those that wait for it.
      expected = pool.submit(expected_of, case)
      for name in filter(timing.runs_here, case.implementations):
        held.append(pool.submit(_held, case, name, expected))
    for each in held:
      sys.stdout.write(f"{each.result()[1]}\n")
  return all(each.result()[0] for each in held)


def _held(
  case: Case, implementation: str, expected: Future[dict[str, np.ndarray]]
) -> tuple[bool, str]:
  """Whether it is right, and the line that says so."""
  what = f"{case.kernel:16}{implementation:15}{case.dtype:9} {case.text:24}"
  wanted = expected.result()
  try:
    found = differences(case, implementation, wanted)
  # Any error of the compiler or the device is a finding.
  except Exception as error:
    return False, f"{what} FAILED: " + f"{type(error).__name__}: {error}".splitlines()[0]
  worst = max(found, key=lambda key: np.nan_to_num(found[key], nan=np.inf))
  is_close = found[worst] <= 1
  verdict = "" if is_close else "WRONG: "
  return is_close, f"{what} {verdict}{found[worst]:.2g} of what is allowed, {worst}"


def main() -> int:
  platforms = os.environ.get("JAX_PLATFORMS")
  if platforms and "cpu" not in platforms.split(","):
    jax.config.update("jax_platforms", f"{platforms},cpu")
  device = jax.devices()[0]
  sys.stdout.write(f"{device.device_kind}, jax {jax.__version__}\n")
  is_right = check(cases(DEVICE_SHAPES))
  if is_right:
    return 0
  sys.stdout.write(
    "A kernel is wrong here. Until it is repaired name another in the model's config, as in "
    "--config.model.pattern[0].mixer.scan=chunked, and report the lines above.\n"
  )
  return 1


if __name__ == "__main__":
  sys.exit(main())
