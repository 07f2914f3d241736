"""Makes a token store of text: `python -m launch.prepare --input 'books/*.txt' --output STORE`.

Reads .txt and .md (one document each) and .jsonl (one per line), also with .gz, .zst or .xz.
Killed, the same command continues; finished, it says so and does nothing. STORE/manifest.json
records what was used. Exit status: 0 done, 1 stopped by an error, 2 a wrong flag, 130 Ctrl-C.

With --holdout_every=N, every N-th document, counted over all inputs in their order, goes into
--holdout_output instead. With --seqio_task the documents are those of a seqio Task or Mixture, as
its preprocessors made them (extra `seqio`); that export starts from the beginning after a kill.
"""

import concurrent.futures.process
import errno
import os
import pathlib
import sys
from collections.abc import Sequence

from absl import app, flags, logging

from data.prepare.documents import ErrorPolicy
from data.prepare.encode import Settings
from data.prepare.job import Job, SeqioSource, prepare
from launch.console import log_for_people, parse_flags

_INPUT = flags.DEFINE_multi_string("input", [], "Files or globs (** too); repeat it for more.")
_OUTPUT = flags.DEFINE_string("output", None, "The token store to make.", required=True)
_VOCABULARY = flags.DEFINE_string(
  "vocabulary", "byte", "byte, a Hugging Face tokenizer.json, or a SentencePiece .model."
)
_BOS = flags.DEFINE_string("bos_token", "auto", "The token that starts a document; none: no token.")
_EOS = flags.DEFINE_string("eos_token", "auto", "The token that ends a document.")
_PAD = flags.DEFINE_string("pad_token", "auto", "The token of padding; none: id 0.")
_TEXT_FIELD = flags.DEFINE_string("text_field", "text", "The field of a JSONL line with the text.")
_ERRORS = flags.DEFINE_enum(
  "errors", "strict", ["strict", "replace"], "Bytes that are not UTF-8: refuse, or replace."
)
_WORKERS = flags.DEFINE_integer("workers", os.cpu_count() or 1, "At most so many processes.", 1)
_HOLDOUT_EVERY = flags.DEFINE_integer(
  "holdout_every", 0, "Hold out every N-th document; 0: none.", 0
)
_HOLDOUT_OUTPUT = flags.DEFINE_string("holdout_output", "", "The token store of those documents.")
_WORK_DIR = flags.DEFINE_string(
  "work_dir", "", "Local folder for what is not finished; OUTPUT.partial unless given."
)

_SEQIO_TASK = flags.DEFINE_string("seqio_task", "", "A Task or Mixture, in place of --input.")
_SEQIO_MODULE = flags.DEFINE_string("seqio_module", "", "The Python module that registers it.")
_SEQIO_SPLIT = flags.DEFINE_string("seqio_split", "train", "The split of it.")
_SEQIO_FEATURE = flags.DEFINE_string("seqio_feature", "targets", "The feature with the token ids.")
_SEQIO_DOCUMENTS = flags.DEFINE_integer(
  "seqio_documents", 0, "Take so many of the endless stream; 0: one epoch, as seqio ends it.", 0
)

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def main(argv: Sequence[str]) -> None:
  log_for_people()
  try:
    job = _job([*_INPUT.value, *argv[1:]])
    prepare(job)
  except (ValueError, OSError, concurrent.futures.process.BrokenProcessPool) as error:
    is_full = isinstance(error, OSError) and error.errno in _FULL
    logging.error("%s%s", error, "; free space, the same command goes on from here" * is_full)
    sys.exit(1)
  except KeyboardInterrupt:
    logging.error("stopped; the same command goes on from here")
    sys.exit(130)


def _job(inputs: list[str]) -> Job:
  """The flags as one value; ValueError for flags that contradict each other."""
  errors: ErrorPolicy = "replace" if _ERRORS.value == "replace" else "strict"
  output, holdout = _OUTPUT.value, _HOLDOUT_OUTPUT.value
  if bool(inputs) == bool(_SEQIO_TASK.value):
    raise ValueError("--input, --seqio_task: give files or globs, or the name of a Task")
  _refuse_flags_without_effect()
  if bool(_HOLDOUT_EVERY.value) != bool(holdout) or _HOLDOUT_EVERY.value == 1:
    raise ValueError(
      f"--holdout_every={_HOLDOUT_EVERY.value} --holdout_output={holdout!r}: give both, the first "
      "at least 2, or neither"
    )
  if "://" in output and not _WORK_DIR.value:
    raise ValueError(f"--output {output!r} is remote: give a local folder with --work_dir")
  seqio = SeqioSource(
    task=_SEQIO_TASK.value,
    module=_SEQIO_MODULE.value,
    split=_SEQIO_SPLIT.value,
    feature=_SEQIO_FEATURE.value,
    num_documents=_SEQIO_DOCUMENTS.value,
  )
  return Job(
    inputs=tuple(inputs),
    seqio=seqio if seqio.task else None,
    output=output,
    settings=Settings(
      vocabulary=_VOCABULARY.value,
      bos_token=_BOS.value,
      eos_token=_EOS.value,
      pad_token=_PAD.value,
      text_field=_TEXT_FIELD.value,
      errors=errors,
    ),
    num_workers=_WORKERS.value,
    holdout_every=_HOLDOUT_EVERY.value,
    holdout_output=holdout,
    work_dir=pathlib.Path(_WORK_DIR.value or f"{output.rstrip('/')}.partial"),
  )


def _refuse_flags_without_effect() -> None:
  text = ("vocabulary", "bos_token", "eos_token", "pad_token", "text_field", "errors", "workers")
  seqio = ("seqio_module", "seqio_split", "seqio_feature", "seqio_documents")
  for name in text if _SEQIO_TASK.value else seqio:
    if flags.FLAGS[name].present:
      present = "with" if _SEQIO_TASK.value else "without"
      raise ValueError(f"--{name} has no effect {present} --seqio_task")


if __name__ == "__main__":
  app.run(main, flags_parser=parse_flags)
