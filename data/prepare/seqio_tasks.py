"""A seqio Task or Mixture as documents for a token store: the one file that imports seqio.

Needs the extra `seqio` (TensorFlow). It runs where data is prepared; training never imports it.
"""

import hashlib
import importlib
import itertools
from collections.abc import Iterator
from typing import Any

import numpy as np
import seqio
import tensorflow as tf

from data.vocabulary import VocabularyRecord

Provider = seqio.Task | seqio.Mixture


def load(name: str, *, module: str) -> Provider:
  """The Task or Mixture registered under `name` once `module` is imported; "" imports nothing."""
  # TensorFlow would take the whole memory of a GPU that it does not need.
  tf.config.set_visible_devices([], "GPU")
  if module:
    try:
      importlib.import_module(module)
    except ModuleNotFoundError as error:
      raise ValueError(
        f"--seqio_module {module!r}: {error} (Python looks in the current folder and PYTHONPATH)"
      ) from error
  try:
    return seqio.get_mixture_or_task(name)
  except ValueError as error:
    known = sorted([*seqio.TaskRegistry.names(), *seqio.MixtureRegistry.names()])
    raise ValueError(
      f"--seqio_task {name!r}: neither a Task nor a Mixture of that name is registered by "
      f"--seqio_module {module!r}; there are {', '.join(known) or 'none'}"
    ) from error


def record(provider: Provider, *, feature: str) -> VocabularyRecord:
  """The vocabulary of a feature; bos is None, because documents start as the preprocessors made
  them.

  A SentencePiece vocabulary without extra ids is the same as that of `--vocabulary PATH.model
  --bos_token none`, so such stores can be mixed.
  """
  if feature not in provider.output_features:
    features = ", ".join(provider.output_features)
    raise ValueError(f"{provider.name}: no output feature {feature!r}; it has {features}")
  words = provider.output_features[feature].vocabulary
  if words.eos_id is None:
    raise ValueError(f"{provider.name}: the vocabulary of {feature!r} has no eos")
  kind = "seqio"
  content = f"{type(words).__name__} {words.vocab_size} {words.eos_id} {words.pad_id}".encode()
  if isinstance(words, seqio.SentencePieceVocabulary):
    model = tf.io.gfile.GFile(words.sentencepiece_model_file, "rb").read()
    kind = "seqio" if words.extra_ids else "sentencepiece"
    content = model + content if words.extra_ids else model
  return VocabularyRecord(
    kind=kind,
    size=words.vocab_size,
    bos=None,
    eos=words.eos_id,
    pad=words.pad_id,
    fingerprint=hashlib.sha256(content).hexdigest(),
  )


def vocabulary_file(provider: Provider, *, feature: str) -> bytes:
  """The SentencePiece model that alone makes the ids of a feature; empty if none does."""
  words = provider.output_features[feature].vocabulary
  if isinstance(words, seqio.SentencePieceVocabulary) and not words.extra_ids:
    return tf.io.gfile.GFile(words.sentencepiece_model_file, "rb").read()
  return b""


def documents(
  provider: Provider, *, split: str, feature: str, num_documents: int
) -> Iterator[tuple[np.ndarray, int]]:
  """(ids, bytes of text) of each document in seqio's stream, unshuffled and not truncated.

  num_documents 0: one epoch, which for a Mixture ends when its first Task runs out. Otherwise this
  many documents of the endless stream. Bytes are those of "FEATURE_pretokenized" where that is
  text, else those of the decoded ids.
  """
  if split not in provider.splits:
    splits = ", ".join(provider.splits)
    raise ValueError(f"{provider.name}: no split {split!r}; it has {splits} (--seqio_split)")
  arguments: dict[str, Any] = {}
  if isinstance(provider, seqio.Mixture):
    arguments["copy_pretokenized"] = True
  dataset = provider.get_dataset(
    # With a length, documents would be truncated there.
    sequence_length=None,
    split=split,
    shuffle=False,
    num_epochs=None if num_documents else 1,
    **arguments,
  )
  words = provider.output_features[feature].vocabulary
  for example in itertools.islice(dataset.as_numpy_iterator(), num_documents or None):
    ids = np.asarray(example[feature])
    if ids.ndim != 1 or not np.issubdtype(ids.dtype, np.integer):
      raise ValueError(
        f"{provider.name}: {feature!r} is {ids.dtype}{list(ids.shape)}, not a row of token ids"
      )
    if len(ids) and not 0 <= ids.min() <= ids.max() < words.vocab_size:
      wrong = ids.min() if ids.min() < 0 else ids.max()
      raise ValueError(
        f"{provider.name}: token id {wrong} is not below the vocabulary size {words.vocab_size}"
      )
    text = example.get(f"{feature}_pretokenized")
    if not isinstance(text, bytes):
      text = words.decode(ids.tolist()).encode("utf-8")
    yield ids, len(text)


def rates(provider: Provider) -> dict[str, float]:
  """Task -> share of a Mixture; empty for a Task."""
  if not isinstance(provider, seqio.Mixture):
    return {}
  total = sum(float(provider.get_rate(task)) for task in provider.tasks)
  return {task.name: float(provider.get_rate(task)) / total for task in provider.tasks}
