"""One call of `launch.prepare`: from files, or a seqio Task, to one or two token stores.

Killed at any time, the same job goes on from the parts that are complete.
"""

import contextlib
import dataclasses
import os
import pathlib
from typing import Any

import tqdm
from absl import logging

from data import token_store
from data.bucket import is_url
from data.prepare import documents, encode, origins, parts
from data.prepare.documents import Document, Piece
from data.prepare.encode import Settings
from data.prepare.parts import Part, PartWriter
from data.token_store import Writer
from data.vocabulary import VocabularyRecord

# Starting a process costs about as much as encoding so much text.
_BYTES_PER_WORKER = 1 << 22


@dataclasses.dataclass(frozen=True, kw_only=True)
class SeqioSource:
  """Documents of a registered Task or Mixture; as in data/prepare/seqio_tasks.py."""

  task: str
  module: str
  split: str
  feature: str
  num_documents: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Job:
  """One call of this program. holdout_every is 0 and holdout_output "" to hold out nothing.

  The documents come from the files of `inputs`, or from `seqio`, which `settings` do not touch.
  """

  inputs: tuple[str, ...]
  seqio: SeqioSource | None = None
  output: str
  settings: Settings
  num_workers: int
  holdout_every: int
  holdout_output: str
  work_dir: pathlib.Path


def prepare(job: Job) -> None:
  """Makes the store or stores of a job, from where the last attempt was killed."""
  _check_places(job)
  if job.seqio is not None:
    _prepare_seqio(job, job.seqio)
    return
  words = job.settings.load()
  record = words.record
  settings = {"text_field": job.settings.text_field, "errors": job.settings.errors}
  folders = [path for path in (job.output, job.holdout_output, str(job.work_dir)) if path]
  inputs = [origins.file(path) for path in documents.find(job.inputs, made=folders)]
  origin = _origin(job, record, settings, inputs)
  if _is_done(job, origin):
    return
  with parts.working_folder(job.work_dir):
    made = _encode(job, record, origin)
    for file in origin["inputs"]:
      pieces = [part.digest for piece, part in made if piece.path == file["path"]]
      file["digest"] = origins.join_digests(pieces)
    _assemble(job, record, words.file, [part for _, part in made], origin)


def _check_places(job: Job) -> None:
  """ValueError unless the stores can lie where the job wants them, each in a folder of its own."""
  if not job.output:
    raise ValueError("--output '' is no place; name a folder")
  for path in filter(None, (job.output, job.holdout_output)):
    if os.path.exists(path) and not os.path.isdir(path):
      raise ValueError(f"{path} is a file; a token store is a folder: choose another place")
    token_store.check_place(path)
  if job.holdout_output and os.path.realpath(job.holdout_output) == os.path.realpath(job.output):
    raise ValueError(f"--holdout_output {job.holdout_output!r} is --output; give it another place")


def _origin(
  job: Job, record: VocabularyRecord, settings: dict[str, Any], inputs: list[dict[str, Any]]
) -> dict[str, Any]:
  """All that decides what is in the stores, for the manifest."""
  common = {"vocabulary": dataclasses.asdict(record), "holdout_every": job.holdout_every}
  return {"settings": {**common, **settings}, "inputs": inputs}


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


def _prepare_seqio(job: Job, source: SeqioSource) -> None:
  # TensorFlow takes 20 seconds to import, and only this needs it.
  try:
    from data.prepare import seqio_tasks
  except ModuleNotFoundError as error:
    raise ValueError(
      f"--seqio_task={source.task}: {error}: .venv/bin/pip install --constraint "
      "requirements.lock '.[seqio]' installs it"
    ) from error

  provider = seqio_tasks.load(source.task, module=source.module)
  record = seqio_tasks.record(provider, feature=source.feature)
  origin = _origin(job, record, {"seqio": dataclasses.asdict(source)}, [])
  if _is_done(job, origin):
    return
  if rates := seqio_tasks.rates(provider):
    sources = ", ".join(f"{task} {rate:.4g}" for task, rate in rates.items())
    logging.warning(
      "%s is a Mixture (%s): an epoch of it ends with the first Task that is used up; for all of "
      "each, prepare them one by one and give the stores to DataConfig.sources with these rates",
      source.task,
      sources,
    )
  with parts.working_folder(job.work_dir):
    with (
      tqdm.tqdm(desc="encode", unit="doc", disable=None) as bar,
      PartWriter(job.work_dir, parts.part_name(origin), record.dtype) as writer,
    ):
      stream = seqio_tasks.documents(
        provider,
        split=source.split,
        feature=source.feature,
        num_documents=source.num_documents,
      )
      for number, (ids, text_bytes) in enumerate(stream, start=1):
        bar.update()
        if len(ids):
          writer.append(ids, text_bytes=text_bytes, num_unknown=0)
        else:
          writer.note(Document("", f"{source.task} document {number}", False))
      part = writer.close(digest="")
    words = seqio_tasks.vocabulary_file(provider, feature=source.feature)
    _assemble(job, record, words, [part], origin)


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


def _assemble(
  job: Job,
  record: VocabularyRecord,
  vocabulary_file: bytes,
  made: list[Part],
  origin: dict[str, Any],
) -> None:
  """Writes the stores, the held-out one first: the other's manifest says that all is done."""
  num_documents = sum(part.num_documents for part in made)
  _warn("empty documents left out", made, "empty")
  _warn("documents with bytes that are not UTF-8, replaced by U+FFFD", made, "replaced")
  if not num_documents:
    raise ValueError(f"{', '.join(job.inputs) or 'the Task'}: no document with text in it")
  if job.holdout_every > num_documents:
    raise ValueError(
      f"--holdout_every={job.holdout_every}: there are {num_documents} documents, so none is held "
      "out; give a smaller number"
    )
  with contextlib.ExitStack() as stack:
    for path in filter(None, (job.output, job.holdout_output)):
      if not is_url(path):
        stack.enter_context(parts.held(pathlib.Path(path) / "store.lock"))
    # With another --work_dir or --output, another prepare may have made a store here meanwhile.
    if _is_done(job, origin):
      return
    _write_stores(job, record, vocabulary_file, made, origin)
  _report("is made", job)


def _write_stores(
  job: Job,
  record: VocabularyRecord,
  vocabulary_file: bytes,
  made: list[Part],
  origin: dict[str, Any],
) -> None:
  def writer(path: str) -> Writer:
    return Writer(path, record, vocabulary_file=vocabulary_file, origin=origin)

  if job.holdout_output:
    # It is there if the last attempt was killed between the two manifests.
    token_store.remove(job.holdout_output)
  train = writer(job.output)
  holdout = writer(job.holdout_output) if job.holdout_output else None
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
