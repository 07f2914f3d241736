"""A directory of a run: `python -m launch.export --config=... --workdir=... --output=DIR`.

Writes the parameters of the run's newest checkpoint as a Hugging Face directory, which
`transformers` opens and a run begins with (--config.init_from=DIR). The ids at which it stops and
with which it pads are those of the run's token store, and so is the tokenizer that is written along
for AutoTokenizer; what it does not get is said. Exit status: 0 written, 2 refused.
"""

import pathlib
from typing import Any

import jax
from absl import flags, logging

from data import pipeline, vocabulary
from data.tokenizer_files import tokenizer_files
from launch.console import log_for_people, refuse, writing
from launch.overrides import run_app
from models.huggingface import directory
from train.config import Run
from train.trained import newest

_WORKDIR = flags.DEFINE_string("workdir", None, "Folder or URL of the run.", required=True)
_VOCABULARY = flags.DEFINE_string(
  "vocabulary",
  None,
  "As given to launch.prepare: for old token stores, which do not keep the file.",
)
_OUTPUT = flags.DEFINE_string("output", None, "A new or empty folder.", required=True)


def main(run: Run, overridden: dict[str, tuple[Any, Any]]) -> None:
  del overridden
  log_for_people()
  try:
    words = pipeline.vocabulary(run.data)
    content = (
      vocabulary.read_file(_VOCABULARY.value, words)
      if _VOCABULARY.value
      else pipeline.vocabulary_file(run.data)
    )
    tokenizer = tokenizer_files(words, content)
    _, step, params = newest(run, _WORKDIR.value)
    with writing(pathlib.Path(_OUTPUT.value)):
      directory.save(
        _OUTPUT.value,
        run.model,
        jax.device_get(params),
        bos_token_id=words.bos,
        eos_token_id=words.eos,
        pad_token_id=words.pad,
        max_position_embeddings=run.data.row_length,
        files=tokenizer.files,
      )
  except ValueError as error:
    refuse(error)
  if tokenizer.lacking:
    logging.warning("%s lacks %s", _OUTPUT.value, tokenizer.lacking)
  logging.info("step %d of %s: written to %s", step, _WORKDIR.value, _OUTPUT.value)


if __name__ == "__main__":
  run_app(main)
