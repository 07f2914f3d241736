"""Makes a token store of text: `python -m launch.prepare --input 'books/*.txt' --output STORE`.

Reads .txt and .md (one document each) and .jsonl (one per line), also with .gz, .zst or .xz.
Killed, it goes on when the same command is given again; finished, it says so and does nothing. What
was used is in STORE/manifest.json. Exit status: 0 done, 1 stopped by an error.

With --holdout_every=N, every N-th document, counted over all inputs in their order, goes whole into
--holdout_output instead.
"""

import concurrent.futures.process
import contextlib
import dataclasses
import fcntl
import os
import pathlib
import re
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import tqdm
from absl import app, flags, logging

from data import documents, encode, origins, parts, token_store
from data.documents import ErrorPolicy, Piece
from data.encode import Settings
from data.parts import Part
from data.token_store import Writer
from data.vocabulary import VocabularyRecord

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

# Starting a process costs about as much as encoding so much text.
_BYTES_PER_WORKER = 1 << 22
_PART_FILE = re.compile(r"[0-9a-f]{32}\.(tokens|sizes|json)(\.\d+)?")


def main(argv: Sequence[str]) -> None:
  logging.set_verbosity(logging.INFO)
  try:
    job = _job([*_INPUT.value, *argv[1:]])
    prepare(job)
  except (ValueError, OSError, concurrent.futures.process.BrokenProcessPool) as error:
    logging.error("%s", error)
    sys.exit(1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Job:
  """One call of this program. holdout_every is 0 and holdout_output "" to hold out nothing."""

  inputs: tuple[str, ...]
  output: str
  settings: Settings
  num_workers: int
  holdout_every: int
  holdout_output: str
  work_dir: pathlib.Path


def prepare(job: Job) -> None:
  """Makes the store or stores of a job, from where the last attempt was killed."""
  record = job.settings.load().record
  origin = _origin(job, record)
  if _is_done(job, origin):
    return
  with _working_folder(job.work_dir):
    made = _encode(job, record, origin)
    for file in origin["inputs"]:
      pieces = [part.digest for piece, part in made if piece.path == file["path"]]
      file["digest"] = origins.join_digests(pieces)
    _assemble(job, record, [part for _, part in made], origin)


def _job(inputs: list[str]) -> Job:
  """The flags as one value; ValueError for those that do not go together."""
  errors: ErrorPolicy = "replace" if _ERRORS.value == "replace" else "strict"
  output, holdout = _OUTPUT.value, _HOLDOUT_OUTPUT.value
  if not inputs:
    raise ValueError("--input: nothing to read; give files or globs")
  if bool(_HOLDOUT_EVERY.value) != bool(holdout) or _HOLDOUT_EVERY.value == 1:
    raise ValueError(
      f"--holdout_every={_HOLDOUT_EVERY.value} --holdout_output={holdout!r}: give both, the first "
      "at least 2, or neither"
    )
  if holdout and holdout == output:
    raise ValueError(f"--holdout_output {holdout!r} is --output; give it another place")
  if "://" in output and not _WORK_DIR.value:
    raise ValueError(f"--output {output!r} is remote: give a local folder with --work_dir")
  return Job(
    inputs=tuple(inputs),
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


def _origin(job: Job, record: VocabularyRecord) -> dict[str, Any]:
  """All that decides what is in the stores, for the manifest."""
  return {
    "settings": {
      "vocabulary": dataclasses.asdict(record),
      "text_field": job.settings.text_field,
      "errors": job.settings.errors,
      "holdout_every": job.holdout_every,
    },
    "inputs": [origins.file(path) for path in documents.find(job.inputs)],
  }


def _is_done(job: Job, origin: dict[str, Any]) -> bool:
  """Whether the job's stores are there; ValueError if there is something else in their place."""
  for path in filter(None, (job.output, job.holdout_output)):
    if token_store.is_complete(path):
      changed = origins.difference(token_store.read_manifest(path).origin, origin)
      if changed:
        raise ValueError(
          f"{path} is complete, and it was made of something else: {changed}; remove it to make it "
          "anew, or choose another --output"
        )
  if not token_store.is_complete(job.output):
    return False
  if job.holdout_output and not token_store.is_complete(job.holdout_output):
    raise ValueError(
      f"{job.output} is complete, its held-out store {job.holdout_output} is not there; remove the "
      "first to make both"
    )
  _report("is complete, nothing to do", job)
  return True


def _encode(job: Job, record: VocabularyRecord, origin: dict[str, Any]) -> list[tuple[Piece, Part]]:
  """The parts of all pieces, in order; those that a killed attempt left are not made again."""
  named = []
  for file in origin["inputs"]:
    for piece in documents.pieces(file["path"]):
      named.append((piece, parts.part_name([origin["settings"], file, piece])))
  waiting = [
    (piece, name) for piece, name in named if not parts.load(job.work_dir, name, record.dtype)
  ]
  if len(waiting) < len(named):
    logging.info("%d of %d pieces are there already", len(named) - len(waiting), len(named))
  num_bytes = sum(piece.stop - piece.start for piece, _ in waiting)
  num_workers = max(1, min(job.num_workers, len(waiting), num_bytes // _BYTES_PER_WORKER))
  logging.info(
    "encoding %d bytes of %d files with %d workers", num_bytes, len(origin["inputs"]), num_workers
  )
  with tqdm.tqdm(desc="encode", total=num_bytes, unit="B", unit_scale=True, disable=None) as bar:
    encode.encode_all(
      waiting,
      folder=job.work_dir,
      settings=job.settings,
      num_workers=num_workers,
      on_bytes=bar.update,
    )
  for file in origin["inputs"]:
    if origins.file(file["path"]) != file:
      raise ValueError(f"{file['path']}: it was changed while it was read; start again")
  made = []
  for piece, name in named:
    part = parts.load(job.work_dir, name, record.dtype)
    if part is None:
      raise ValueError(f"{job.work_dir}: the part of {piece.path} is gone; start again")
    made.append((piece, part))
  return made


def _assemble(job: Job, record: VocabularyRecord, made: list[Part], origin: dict[str, Any]) -> None:
  """Writes the stores, the held-out one first: the other's manifest says that all is done."""
  num_documents = sum(part.num_documents for part in made)
  _warn("empty documents left out", made, "empty")
  _warn("documents with bytes that are not UTF-8, replaced by U+FFFD", made, "replaced")
  if not num_documents:
    raise ValueError(f"{', '.join(job.inputs)}: no document with text in it")
  if job.holdout_every > num_documents:
    raise ValueError(
      f"--holdout_every={job.holdout_every}: there are {num_documents} documents, so none is held "
      "out; give a smaller number"
    )
  if job.holdout_output:
    # It is there if the last attempt was killed between the two manifests.
    token_store.remove(job.holdout_output)
  train = Writer(job.output, record, origin=origin)
  holdout = Writer(job.holdout_output, record, origin=origin) if job.holdout_output else None
  num_tokens = sum(part.num_tokens for part in made)
  with tqdm.tqdm(desc="store", total=num_tokens, unit="tok", unit_scale=True, disable=None) as bar:
    parts.assemble(
      made,
      folder=job.work_dir,
      dtype=record.dtype,
      train=train,
      holdout=holdout,
      holdout_every=job.holdout_every,
      on_tokens=bar.update,
    )
    if holdout:
      holdout.close()
    train.close()
  _report("is made", job)


def _report(what: str, job: Job) -> None:
  for path in filter(None, (job.output, job.holdout_output)):
    manifest = token_store.read_manifest(path)
    logging.info(
      "%s %s: %d documents, %d tokens, %d bytes of text, vocabulary %s of %d, fingerprint %s",
      path,
      what,
      manifest.num_documents,
      manifest.num_tokens,
      manifest.text_bytes,
      manifest.vocabulary.kind,
      manifest.vocabulary.size,
      manifest.fingerprint[:16],
    )
    if manifest.num_unknown:
      logging.warning(
        "%s: %d tokens are unknown: text that the vocabulary cannot spell is lost",
        path,
        manifest.num_unknown,
      )


def _warn(what: str, made: list[Part], kind: str) -> None:
  count = sum(getattr(part, f"num_{kind}") for part in made)
  if count:
    names = [name for part in made for name in getattr(part, kind)]
    logging.warning("%d %s: %s%s", count, what, ", ".join(names[:5]), ", ..." * (count > 5))


@contextlib.contextmanager
def _working_folder(folder: pathlib.Path) -> Iterator[None]:
  """Holds the folder for this process alone; if all went well, removes what is ours in it."""
  folder.mkdir(parents=True, exist_ok=True)
  with (folder / "lock").open("w") as lock:
    try:
      fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
      raise ValueError(f"{folder}: another prepare is at work here; wait for it") from error
    yield
    for file in folder.iterdir():
      if _PART_FILE.fullmatch(file.name):
        file.unlink()
    (folder / "lock").unlink()
  if not any(folder.iterdir()):
    folder.rmdir()


if __name__ == "__main__":
  app.run(main)
