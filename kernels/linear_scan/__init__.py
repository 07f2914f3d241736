"""The linear recurrence h_t = a_t h_{t-1} + x_t, channel by channel.

  y_BTD, hT_BD = linear_scan(x_BTD, a_BTD, h0_BD, implementation="auto")

y_t = h_t in the dtype of x; the carry, a, h0 and the last state hT are float32. `reverse=True` runs
from the last token to the first (h_t = a_t h_{t+1} + x_t, hT is then h at token 0). Decays of
exactly 0 (a document starts) and 1 are exact: nothing divides by a, and no sum of logarithms is
formed, so what comes before a 0 changes no bit of what comes after.

The gradient is written once, here. With g the gradient that reaches h,

  g_t = dy_t + a_{t+1} g_{t+1},   g_T = dy_T + dhT     the same recurrence, reversed
  dx_t = g_t    da_t = g_t h_{t-1}    dh0 = a_1 g_1

so an implementation is a function `scan(x_BTD, a_BTD, h0_BD, *, reverse)` and nothing more:

  reference     one step at a time (jax.lax.scan): least memory traffic, T dependent steps
  chunked       all chunks of a row at once, twice, their carries between: near 3 sqrt(T) dependent
                steps; x and a are read twice
  associative   a tree (jax.lax.associative_scan): log T dependent steps, several times the traffic
"""

import functools
from typing import cast

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from kernels import dispatch
from kernels.linear_scan import associative, chunked, reference
from kernels.varying import varying_alike

_SCANS = {
  "reference": reference.scan,
  "associative": associative.scan,
  "chunked": chunked.scan,
}
IMPLEMENTATIONS = tuple(_SCANS)
# cpu: the fastest at every shape of kernels/linear_scan/measured_cpu.jsonl. tpu: not measured by
# us; sequential beat associative there (arXiv:2402.19427, appendix D). gpu: not measured by us; one
# step at a time is one kernel launch each there.
_DEFAULTS = {"cpu": "reference", "tpu": "reference", "gpu": "chunked"}


def resolve(requested: str) -> str:
  """The implementation that `requested` stands for on this platform; see kernels/dispatch.py."""
  return dispatch.resolve("linear_scan", requested, available=IMPLEMENTATIONS, defaults=_DEFAULTS)


def linear_scan(
  x_BTD: jax.Array,
  a_BTD: jax.Array,
  h0_BD: jax.Array,
  *,
  implementation: str,
  reverse: bool = False,
) -> tuple[jax.Array, jax.Array]:
  """All states (in x's dtype) and the last one (float32) of the recurrence; see the module."""
  if x_BTD.ndim != 3 or x_BTD.shape != a_BTD.shape or h0_BD.shape != x_BTD.shape[::2]:
    raise ValueError(
      f"linear_scan: x {x_BTD.shape} and a {a_BTD.shape} must be equal [batch, time, width], and "
      f"h0 {h0_BD.shape} [batch, width]"
    )
  if x_BTD.shape[1] == 0:
    raise ValueError("linear_scan: time is 0; give at least one token")
  arrays = varying_alike(x_BTD, a_BTD, h0_BD.astype(jnp.float32))
  results = _linear_scan(*arrays, resolve(implementation), reverse)
  y_BTD, hT_BD = cast(tuple[jax.Array, jax.Array], results)
  return y_BTD, hT_BD


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def _linear_scan(
  x_BTD: jax.Array, a_BTD: jax.Array, h0_BD: jax.Array, implementation: str, reverse: bool
) -> tuple[jax.Array, jax.Array]:
  return _SCANS[implementation](x_BTD, a_BTD, h0_BD, reverse=reverse)


def _forward(x_BTD, a_BTD, h0_BD, implementation, reverse):
  y_BTD, hT_BD = _SCANS[implementation](x_BTD, a_BTD, h0_BD, reverse=reverse)
  # A remat policy can keep what is named: the states, rather than run the recurrence again.
  y_BTD = checkpoint_name(y_BTD, "scan")
  return (y_BTD, hT_BD), (y_BTD, a_BTD, h0_BD)


def _backward(implementation, reverse, residuals, cotangents):
  y_BTD, a_BTD, h0_BD = residuals
  dy_BTD, dhT_BD = cotangents
  first = -1 if reverse else 0
  # The decay that g_{t+1} meets on its way to g_t; dhT enters the last token whole.
  next_a_BTD = _shifted(a_BTD, jnp.ones_like(a_BTD[:, 0]), forward=reverse)
  g_BTD, g_BD = _SCANS[implementation](dy_BTD, next_a_BTD, dhT_BD, reverse=not reverse)
  before_BTD = _shifted(y_BTD.astype(jnp.float32), h0_BD, forward=not reverse)
  da_BTD = g_BTD.astype(jnp.float32) * before_BTD
  return g_BTD, da_BTD.astype(a_BTD.dtype), a_BTD[:, first].astype(jnp.float32) * g_BD


_linear_scan.defvjp(_forward, _backward)


def _shifted(x_BTD: jax.Array, edge_BD: jax.Array, *, forward: bool) -> jax.Array:
  """x moved by one token, forward (t-1 stands at t) or backward, with `edge` where none is left."""
  parts = [edge_BD[:, None], x_BTD[:, :-1]] if forward else [x_BTD[:, 1:], edge_BD[:, None]]
  return jnp.concatenate(parts, axis=1)
