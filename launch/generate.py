"""Text from a trained model: `python -m launch.generate --config=... --workdir=... --prompt='Now'`.

Reads the newest checkpoint of the run and samples from the prompt. The vocabulary is that of the
run's token store: bytes, or the file named by --vocabulary.
"""

import sys
from typing import Any

import jax
import jax.numpy as jnp
from absl import flags, logging

from data import pipeline, vocabulary
from launch.console import log_for_people, must_be_finite, refuse
from launch.overrides import run_app
from models.generate import generate
from train.config import Run
from train.trained import newest

_WORKDIR = flags.DEFINE_string("workdir", None, "Folder or URL of the run.", required=True)
_PROMPT = flags.DEFINE_string("prompt", "", "What the text begins with.")
_VOCABULARY = flags.DEFINE_string("vocabulary", "byte", "As given to launch.prepare.")
# All are sampled, in memory, before any is shown.
_NUM_TOKENS = flags.DEFINE_integer(
  "num_tokens", 300, "Tokens to sample.", lower_bound=1, upper_bound=10**6
)
_TEMPERATURE = flags.DEFINE_float("temperature", 0.8, "0 is the likeliest token.", lower_bound=0)
_SEED = flags.DEFINE_integer("seed", 0, "Of the sampling.", lower_bound=0, upper_bound=2**32 - 1)
must_be_finite(_TEMPERATURE)


def main(run: Run, overridden: dict[str, tuple[Any, Any]]) -> None:
  del overridden
  log_for_people()
  try:
    words = vocabulary.load(_VOCABULARY.value)
    prompt = words.encode_beginning(_PROMPT.value)
    if words.record != pipeline.vocabulary(run.data):
      raise ValueError("--vocabulary is not the one that the run's token store was made with")
    program, step, params = newest(run, _WORKDIR.value)
    if words.unknown is not None and words.unknown in prompt:
      logging.warning("the vocabulary cannot spell all of the prompt: what it cannot is unknown")
    prompt_BT = jnp.asarray(prompt, jnp.int32)[None]
    # On one device, however the run was split: a step of decoding is too small to share.
    tokens_BT = generate(
      program.model,
      jax.device_put(params, jax.devices()[0]),
      prompt_BT,
      jnp.ones_like(prompt_BT),
      num_tokens=_NUM_TOKENS.value,
      temperature=_TEMPERATURE.value,
      key=jax.random.key(_SEED.value),
    )
  except ValueError as error:
    refuse(error)
  tokens = [int(token) for token in tokens_BT[0]]
  if words.record.eos in tokens:
    tokens = tokens[: tokens.index(words.record.eos)]
  logging.info("step %d of %s", step, _WORKDIR.value)
  sys.stdout.write(_PROMPT.value + words.decode(tokens) + "\n")


if __name__ == "__main__":
  run_app(main)
