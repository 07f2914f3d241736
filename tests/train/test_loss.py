"""Sums over targets, and the loss of each row, from plain logits."""

import jax
import jax.numpy as jnp
import numpy as np

from data.rows import Batch
from tests.draws import Draws
from train.loss import loss_sums, row_losses

_ROWS, _TIME, _WIDTH, _VOCAB = 3, 7, 8, 11


def test_sums_and_rows_are_those_of_plain_logits():
  draws, random = Draws(), np.random.default_rng(0)
  x_BTD, unembed_VD = draws.normal(_ROWS, _TIME, _WIDTH), draws.normal(_VOCAB, _WIDTH)
  targets_BT = random.integers(0, _VOCAB, (_ROWS, _TIME), dtype=np.int32)
  weights_BT = (random.random((_ROWS, _TIME)) < 0.6).astype(np.float32)
  weights_BT[1] = 0.0  # a row of padding
  batch = Batch(targets_BT, targets_BT, np.ones_like(targets_BT), weights_BT)

  logits_BTV = 4.0 * np.tanh(np.float64(x_BTD) @ np.float64(unembed_VD).T / 4.0)
  log_z_BT = np.log(np.exp(logits_BTV).sum(-1))
  loss_BT = log_z_BT - np.take_along_axis(logits_BTV, targets_BT[..., None], -1)[..., 0]

  def both(x_BTD, unembed_VD):
    return [f(x_BTD, unembed_VD, batch, logit_cap=4.0) for f in (loss_sums, row_losses)]

  sums, loss_B = jax.jit(both)(x_BTD, unembed_VD)
  expected = [(weights_BT * loss_BT).sum(), (weights_BT * log_z_BT**2).sum(), weights_BT.sum()]
  np.testing.assert_allclose(sums, expected, rtol=1e-5)
  for row in (0, 2):
    np.testing.assert_allclose(
      loss_B[row], np.average(loss_BT[row], weights=weights_BT[row]), rtol=1e-5
    )
  assert jnp.isnan(loss_B[1])
