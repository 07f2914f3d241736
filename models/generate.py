"""Sampling: prefill the prompts, then one token at a time from the carried state."""

import functools

import jax
import jax.numpy as jnp

from models.decoder import Model, Params, State
from models.layers.embedding import cap_logits
from models.layers.segments import check_rows


def generate(
  model: Model,
  params: Params,
  prompt_BT: jax.Array,
  segments_BT: jax.Array,
  *,
  num_tokens: int,
  temperature: float,
  key: jax.Array,
) -> jax.Array:
  """`num_tokens` sampled tokens for each prompt, int32 [batch, num_tokens].

  Prompts are padded on the left: segment 0 there, 1 on the prompt. temperature 0 takes the
  likeliest token. Nothing stops at an end-of-document token: cut there.
  """
  # Not `temperature < 0`, which is False for NaN.
  if num_tokens < 1 or not temperature >= 0:
    raise ValueError(
      f"generate: num_tokens {num_tokens} must be at least 1, temperature {temperature} at least 0"
    )
  if not prompt_BT.size:
    raise ValueError("generate: the prompt is empty; give at least a begin-of-document token")
  check_rows(prompt_BT, segments_BT)
  return _generate(
    params,
    prompt_BT,
    segments_BT,
    jnp.float32(temperature),
    key,
    model=_Static(model),
    num_tokens=num_tokens,
  )


class _Static:
  """A model as a static argument of jit: equal to itself only."""

  def __init__(self, model: Model):
    self.model = model


@functools.partial(jax.jit, static_argnames=("model", "num_tokens"))
def _generate(
  params: Params,
  prompt_BT: jax.Array,
  segments_BT: jax.Array,
  temperature: jax.Array,
  key: jax.Array,
  *,
  model: _Static,
  num_tokens: int,
) -> jax.Array:
  built = model.model
  batch, prompt_length = prompt_BT.shape
  # Cast once: otherwise every token would read the stored weights, which have twice the bytes.
  params = built.cast(params)

  def sample(x_BTD: jax.Array, unembed_VD: jax.Array, key: jax.Array) -> jax.Array:
    logits_BV = cap_logits(x_BTD[:, -1:], unembed_VD, built.config.logit_cap)[:, 0]
    drawn_B = jax.random.categorical(key, logits_BV / jnp.maximum(temperature, 1e-6))
    return jnp.where(temperature > 0, drawn_B, jnp.argmax(logits_BV, axis=-1)).astype(jnp.int32)

  context = prompt_length + num_tokens
  x_BTD, unembed_VD, state = built.prefill(params, prompt_BT, segments_BT, context)
  keys = jax.random.split(key, num_tokens)
  first_B = sample(x_BTD, unembed_VD, keys[0])
  segment_B1 = jnp.ones((batch, 1), jnp.int32)

  def step(carry: tuple[jax.Array, State], key: jax.Array):
    token_B, state = carry
    x_BTD, unembed_VD, state = built.extend(params, token_B[:, None], segment_B1, state)
    token_B = sample(x_BTD, unembed_VD, key)
    return (token_B, state), token_B

  _, rest_TB = jax.lax.scan(step, (first_B, state), keys[1:])
  return jnp.concatenate([first_B[None], rest_TB]).T
