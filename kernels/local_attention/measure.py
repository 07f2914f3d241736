"""Times attention: `python -m kernels.local_attention.measure 8,2048,10,256,2048 1,8192,8,64,0,2`.

For each batch, row length, heads, head size, window (0: none) and number of key-value heads (1
where it is not given), in bfloat16, one JSON line:
device, date, command, FLOP/s of a product of two [4096, 4096] matrices on the same device, and for
each implementation that runs here, except the reference, the median milliseconds forward and of
forward and backward together, compile seconds and temporary bytes of the latter, and the FLOP/s of
each pass over those of the product. Two products forward and five backward count, with the keys
that a query sees in a row of one document; masked products do not count.
"""

import functools
import json
import sys
from typing import Any

import jax
import jax.numpy as jnp

from kernels import timing
from kernels.local_attention import IMPLEMENTATIONS, local_attention

_PRODUCTS = {"forward": 2, "forward_backward": 7}


def measure(
  batch: int,
  row_length: int,
  heads: int,
  head_size: int,
  window: int | None,
  *,
  kv_heads: int,
  product_size: int,
) -> dict[str, Any]:
  """Medians over alternating runs, beside a product of matrices [product_size, product_size]."""
  keys = jax.random.split(jax.random.key(0), 4)
  q_BTNH, do_BTNH = (
    jax.random.normal(key, (batch, row_length, heads, head_size), jnp.bfloat16) for key in keys[:2]
  )
  k_BSEH, v_BSEH = (
    jax.random.normal(key, (batch, row_length, kv_heads, head_size), jnp.bfloat16)
    for key in keys[2:]
  )
  documents_BT = jnp.ones((batch, row_length), jnp.int32)

  def attend(q_BTNH, k_BSEH, v_BSEH, *, implementation):
    arrays = (q_BTNH, k_BSEH, v_BSEH, documents_BT, documents_BT)
    return (local_attention(*arrays, window=window, implementation=implementation),)

  runs = {
    name: functools.partial(attend, implementation=name)
    for name in filter(timing.runs_here, IMPLEMENTATIONS)
    if name != "reference"
  }
  programs, results = timing.two_passes(runs, (q_BTNH, k_BSEH, v_BSEH), (do_BTNH,))
  x_IJ = jax.random.normal(keys[0], (product_size, product_size), jnp.bfloat16)
  product = timing.compiled(jnp.matmul, (x_IJ, x_IJ))
  seconds = timing.medians({**programs, "product": product})
  flops_per_second = 2 * product_size**3 / seconds["product"]
  reach = row_length if window is None else window + 1
  seen = sum(min(t + 1, reach) for t in range(row_length))
  for name, part in programs:
    value = seconds[name, part]
    flops = _PRODUCTS[part] * 2 * batch * heads * head_size * seen
    results[name][f"{part}_ms"] = round(1e3 * value, 3)
    results[name][f"{part}_of_product"] = round(flops / value / flops_per_second, 4)
  return {"product_flops_per_second": round(flops_per_second), "implementations": results}


def main(shapes: list[str], *, product_size: int = 4096) -> None:
  for text in shapes:
    batch, row_length, heads, head_size, window, *rest = map(int, text.split(","))
    [kv_heads] = rest or [1]
    sizes = (batch, row_length, heads, head_size, window or None)
    record = {
      "batch": batch,
      "row_length": row_length,
      "heads": heads,
      "kv_heads": kv_heads,
      "head_size": head_size,
      "window": window or None,
      "dtype": "bfloat16",
      **timing.circumstances("kernels.local_attention.measure", text),
      **measure(*sizes, kv_heads=kv_heads, product_size=product_size),
    }
    sys.stdout.write(json.dumps(record) + "\n")


if __name__ == "__main__":
  main(sys.argv[1:])
