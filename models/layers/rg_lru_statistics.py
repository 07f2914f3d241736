"""What an RG-LRU has learned to remember, and what its gates do, over the tokens of a batch.

The memory horizon of a channel is -1 / ln a, in tokens: after so many, the state has fallen to 1/e.
With a_t = exp(-8 softplus(decay) r_t), n tokens multiply the state by the n-th power of the decay
at the mean gate r, so the horizon is 1 / (8 softplus(decay) mean(r)); with the gate wide open
(r = 1) it is 1 / (8 softplus(decay)), the shortest that the channel can have. Document starts,
where the state is forgotten, do not count.
"""

import jax
import jax.numpy as jnp

from kernels.rg_lru.gates import C
from models.observe import rms
from models.statistics import QUANTILES, Column, Picture, Statistics

STATISTICS = Statistics(
  title="What the recurrence does",
  note="The memory horizon of a channel is -1 / ln a, at the mean of its recurrence gate over a "
  "batch: after so many tokens its state has fallen to 1/e. Rings: the median with the gate wide "
  "open. Gates are saturated below 0.05 (recurrence: the state is kept; input: closed) or above "
  "0.95 (the state fades as fast as it can; open).",
  columns=(
    Column("horizon", "memory horizon -1 / ln a in tokens at the mean gate"),
    Column("horizon_open", "the same with the gate wide open (r = 1): the shortest possible"),
    Column("recurrence_gate_low", "share of recurrence gates below 0.05 (the state is kept)"),
    Column("recurrence_gate_high", "share of recurrence gates above 0.95 (it decays fastest)"),
    Column("input_gate_low", "share of input gates below 0.05 (closed)"),
    Column("input_gate_high", "share of input gates above 0.95 (open)"),
    Column("state_rms", "root mean square of the recurrent states"),
  ),
  pictures=(
    Picture(
      "Memory horizon of the median channel", "tokens", "lines", ("horizon",), in_summary=True
    ),
    Picture(
      "Memory horizons of the channels now",
      "tokens",
      "quantiles",
      ("horizon", "horizon_open"),
      ring="median with the gate wide open",
    ),
    Picture(
      "Saturated recurrence gates",
      "share of a batch (%)",
      "shares",
      ("recurrence_gate_low", "recurrence_gate_high"),
    ),
    Picture(
      "Saturated input gates",
      "share of a batch (%)",
      "shares",
      ("input_gate_low", "input_gate_high"),
    ),
    Picture("Recurrent state h of each block", "root mean square", "lines", ("state_rms",)),
  ),
)
_LOW, _HIGH = 0.05, 0.95  # beyond them a gate counts as saturated


def statistics(
  r_BTR: jax.Array, i_BTR: jax.Array, h_BTR: jax.Array, decay_R: jax.Array
) -> dict[str, jax.Array]:
  """Float32 scalars, and a horizon for each of QUANTILES; r and i as they enter the sigmoid.

  horizon, horizon_open: of the channels, at the mean gate and with it wide open, in tokens.
  recurrence_gate_low, _high, input_gate_low, _high: the share of gates below 0.05, above 0.95.
  state_rms: of the states h.
  """
  rate_R = C * jax.nn.softplus(decay_R.astype(jnp.float32))
  r_BTR, i_BTR = (jax.nn.sigmoid(gate.astype(jnp.float32)) for gate in (r_BTR, i_BTR))
  quantiles = jnp.asarray(QUANTILES)
  return {
    "horizon": jnp.quantile(1 / (rate_R * jnp.mean(r_BTR, axis=(0, 1))), quantiles),
    "horizon_open": jnp.quantile(1 / rate_R, quantiles),
    "recurrence_gate_low": jnp.mean(r_BTR < _LOW, dtype=jnp.float32),
    "recurrence_gate_high": jnp.mean(r_BTR > _HIGH, dtype=jnp.float32),
    "input_gate_low": jnp.mean(i_BTR < _LOW, dtype=jnp.float32),
    "input_gate_high": jnp.mean(i_BTR > _HIGH, dtype=jnp.float32),
    "state_rms": rms(h_BTR),
  }
