"""Rotary position embedding against complex numbers in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models.layers.rope import Llama3Scaling, Rope, apply_rope
from tests.draws import Draws

SHAPE = (2, 7, 3, 16)
POSITION = np.array([[0, 1, 2, 3, 0, 1, 2], [5, 6, 1000, 1001, 0, 0, 1]], np.int32)
HALF = Rope()


def _rotated(x, *, share=0.5, theta=10_000.0, back=False):
  """Pairs (i, i + R/2) of the first R = share x H dimensions as complex numbers, turned."""
  half = int(share * x.shape[-1]) // 2
  angle = POSITION[:, :, None, None] * theta ** (-np.arange(half) / half)
  x = np.asarray(x, np.float64)
  z = (x[..., :half] + 1j * x[..., half : 2 * half]) * np.exp(-1j * angle if back else 1j * angle)
  return np.concatenate([z.real, z.imag, x[..., 2 * half :]], axis=-1)


@pytest.mark.parametrize(("share", "theta"), [(0.5, 10_000.0), (1.0, 5e5), (0.25, 1e7)])
def test_pairs_of_the_first_dimensions_turn_and_the_rest_passes(share, theta):
  x = Draws().normal(*SHAPE)
  turned = apply_rope(x, POSITION, Rope(share=share, theta=theta))
  np.testing.assert_allclose(turned, _rotated(x, share=share, theta=theta), atol=1e-4)


def test_in_bfloat16_results_are_rounded_once_and_gradients_with_each_term():
  """Summed in float32, a compiled step of the 1b Transformer takes 1.2 % longer on TPUs."""
  x = Draws().normal(*SHAPE, dtype="bfloat16")
  turned, pull_back = jax.vjp(lambda x: apply_rope(x, POSITION, HALF), x)
  [gradient] = pull_back(x)
  x = np.asarray(x, np.float64)
  first, second, rest = np.split(x, (4, 8), axis=-1)
  terms = np.sqrt(2.0) * np.concatenate(2 * [np.hypot(first, second)] + [0.0 * rest], axis=-1)
  for actual, wanted, rounded in (
    (turned, _rotated(x), 0.0),
    (gradient, _rotated(x, back=True), terms),
  ):
    assert actual.dtype == jnp.bfloat16
    # Half a unit in the last place of 8 bits each, and what the angle is rounded by.
    allowed = 2.0**-8 * (np.abs(wanted) + rounded) + 5e-4
    assert np.all(np.abs(np.asarray(actual, np.float64) - wanted) <= allowed)


# Frequencies of Llama 3.1 (8b) and 3.2 (1b) by pair, as transformers 5.24.0 has them.
@pytest.mark.parametrize(
  ("head_size", "factor", "expected"),
  [
    (128, 8.0, {28: 0.003211446, 33: 3.126936e-4, 36: 7.784655e-5, 63: 3.068926e-7}),
    (64, 32.0, {17: 9.708286e-5, 20: 8.570256e-6}),
  ],
)
def test_scaled_frequencies_are_those_of_llama_3(head_size, factor, expected):
  scaling = Llama3Scaling(factor=factor, original_context=8192)
  frequencies = Rope(share=1.0, theta=5e5, scaling=scaling).frequencies(head_size)
  assert frequencies.shape == (head_size // 2,)
  for pair, frequency in expected.items():
    np.testing.assert_allclose(frequencies[pair], frequency, rtol=1e-6)
  # Pairs that turn often enough in the old context stay as they are.
  unscaled = Rope(share=1.0, theta=5e5).frequencies(head_size)
  np.testing.assert_array_equal(frequencies[: head_size // 8], unscaled[: head_size // 8])


@pytest.mark.parametrize(
  ("make", "message"),
  [
    (lambda: Rope(share=0.0), "share 0.0 must be above 0 and at most 1"),
    (lambda: Rope(theta=1.0), "theta 1.0 must be above 1"),
    (lambda: Rope(share=0.5).rotated(6), "share 0.5 of head_size 6 is 3 dimensions"),
    (lambda: Rope(share=0.3).rotated(8), "share 0.3 of head_size 8 is 2.4 dimensions"),
    (lambda: Llama3Scaling(factor=0.5, original_context=8), "factor 0.5 .* at least 1"),
    (
      lambda: Llama3Scaling(factor=2.0, original_context=8, low_frequency_factor=4.0),
      "low_frequency_factor 4.0 must be above 0 and below high_frequency_factor 4.0",
    ),
  ],
)
def test_settings_without_a_meaning_are_refused(make, message):
  with pytest.raises(ValueError, match=message):
    make()
