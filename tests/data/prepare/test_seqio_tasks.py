"""seqio: the store holds the stream that seqio gives, id for id; nothing else needs TensorFlow."""

import io
import json
import os
import pathlib
import re
import subprocess
import sys

import numpy as np
import pytest
import sentencepiece

from data import token_store, vocabulary
from data.token_store import TokenStore

ROOT = pathlib.Path(__file__).parents[3]
# All tests share an export that takes half a minute: one worker of pytest-xdist makes it.
pytestmark = [
  pytest.mark.xdist_group("seqio"),
  pytest.mark.skipif(sys.version_info >= (3, 14), reason="TensorFlow has no packages for 3.14"),
]

# Tasks of bytes and of SentencePiece pieces, one without eos, and a Mixture of two.
TASKS = """
import functools
import seqio
import tensorflow as tf

def texts(split, shuffle_files, seed=None, *, count):
  lines = [f"document {n} of {split}: " + "é" * (97 * n) for n in range(count)]
  return tf.data.Dataset.from_tensor_slices({"text": lines})

def add(name, count, vocabulary, eos=True):
  steps = [
    functools.partial(seqio.preprocessors.rekey, key_map={"targets": "text"}),
    seqio.preprocessors.tokenize,
  ]
  seqio.TaskRegistry.add(
    name,
    source=seqio.FunctionDataSource(
      functools.partial(texts, count=count), splits=["train", "validation"]
    ),
    preprocessors=steps + [seqio.preprocessors.append_eos] * eos,
    output_features={"targets": seqio.Feature(vocabulary, add_eos=eos)},
  )

add("few", 6, seqio.ByteVocabulary())
add("many", 40, seqio.ByteVocabulary())
add("no_eos", 3, seqio.ByteVocabulary(), eos=False)
add("pieces", 6, seqio.SentencePieceVocabulary("bpe.model"))
seqio.MixtureRegistry.add("mixed", [("few", 1.0), ("many", 3.0)])
"""

# One process: importing seqio takes 20 seconds.
SCRIPT = """
import itertools
import json
import seqio
from absl import flags, logging
from data.prepare import seqio_tasks
from launch import prepare
from launch.prepare import _job

logging.set_verbosity(logging.INFO)

def run(*arguments):
  for name in flags.FLAGS.flags_by_module_dict()["launch.prepare"]:
    name.unparse()
  flags.FLAGS(["prepare", "--seqio_module=tasks", *arguments])
  prepare.prepare(_job([]))

def stream(name, split, take=None):
  epochs = None if take else 1
  dataset = seqio.get_mixture_or_task(name).get_dataset(
    None, split, shuffle=False, num_epochs=epochs
  )
  examples = itertools.islice(dataset.as_numpy_iterator(), take)
  return [example["targets"].tolist() for example in examples]

streams, errors = {}, {}
for name in ("few", "mixed", "no_eos", "pieces"):
  run(f"--seqio_task={name}", f"--output={name}")
  streams[name] = stream(name, "train")
run("--seqio_task=mixed", "--output=mixed_25", "--seqio_documents=25")
streams["mixed_25"] = stream("mixed", "train", take=25)
run(
  "--seqio_task=few", "--output=train", "--seqio_split=validation",
  "--holdout_every=3", "--holdout_output=held",
)
streams["validation"] = stream("few", "validation")
run("--seqio_task=few", "--output=few")
for name, arguments in {
  "task": ["--seqio_task=fwe"],
  "split": ["--seqio_task=few", "--seqio_split=test"],
  "flag": ["--seqio_task=few", "--errors=strict"],
  "changed": ["--seqio_task=few", "--seqio_documents=2", "--output=few"],
}.items():
  try:
    run("--output=wrong", *arguments)
  except ValueError as error:
    errors[name] = str(error)
for name in ("absent.tasks", "needs_absent"):
  try:
    seqio_tasks.load("few", module=name)
  except ValueError as error:
    errors[name] = str(error)
few = seqio_tasks.load("few", module="")
try:
  seqio_tasks.record(few, feature="inputs")
except ValueError as error:
  errors["feature"] = str(error)
json.dump({"streams": streams, "errors": errors}, open("result.json", "w"))
"""


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
  """The folder with the stores, the streams as seqio gives them, and the messages of errors."""
  folder = tmp_path_factory.mktemp("seqio")
  (folder / "tasks.py").write_text(TASKS)
  (folder / "export.py").write_text(SCRIPT)
  (folder / "needs_absent.py").write_text("import absent")
  (folder / "bpe.model").write_bytes(_sentencepiece_model())
  done = subprocess.run(
    [sys.executable, "export.py"],
    cwd=folder,
    env={**os.environ, "PYTHONPATH": f"{ROOT}:{folder}"},
    capture_output=True,
    text=True,
    timeout=300,
  )
  assert done.returncode == 0, done.stderr[-3000:]
  result = json.loads((folder / "result.json").read_text())
  return folder, result["streams"], result["errors"], done.stderr


def _sentencepiece_model() -> bytes:
  model = io.BytesIO()
  sentencepiece.SentencePieceTrainer.Train(
    sentence_iterator=iter(["document 0 of train: é", "of validation"] * 20),
    model_writer=model,
    vocab_size=300,
    byte_fallback=True,
    model_type="bpe",
    pad_id=0,
    eos_id=1,
    unk_id=2,
    bos_id=-1,
    minloglevel=2,
  )
  return model.getvalue()


def _documents(path: pathlib.Path) -> list[list[int]]:
  store = TokenStore(str(path))
  flat = store.read(np.array([0]), store.manifest.num_tokens)[0]
  return [document.tolist() for document in np.split(flat, store.starts[1:])]


@pytest.mark.parametrize("name", ["few", "mixed", "mixed_25", "no_eos", "pieces"])
def test_the_store_is_the_stream_that_seqio_gives(exported, name):
  folder, streams, _, _ = exported
  assert _documents(folder / name) == streams[name]


def test_no_document_is_cut_to_a_length(exported):
  folder, *_ = exported
  assert len(_documents(folder / "few")[5]) == len("document 5 of train: ") + 2 * 97 * 5 + 1


def test_documents_are_held_out_of_a_task_too(exported):
  folder, streams, _, _ = exported
  stream = streams["validation"]
  assert _documents(folder / "held") == [stream[2], stream[5]]
  assert _documents(folder / "train") == [stream[n] for n in (0, 1, 3, 4)]


def test_the_manifest_has_the_vocabulary_of_the_task(exported):
  folder, streams, _, _ = exported
  manifest = token_store.read_manifest(str(folder / "few"))
  record = manifest.vocabulary
  assert (record.kind, record.size, record.bos, record.eos, record.pad) == (
    "seqio",
    259,
    None,
    1,
    0,
  )
  # Each byte is a token, and eos is no text.
  assert manifest.text_bytes == manifest.num_tokens - len(streams["few"])


def test_a_sentencepiece_task_can_be_mixed_with_text_of_the_same_model(exported):
  folder, *_ = exported
  record = token_store.read_manifest(str(folder / "pieces")).vocabulary
  loaded = vocabulary.load(str(folder / "bpe.model"), bos_token="none")
  assert record == loaded.record
  assert token_store.vocabulary_file(str(folder / "pieces")) == loaded.file
  assert token_store.vocabulary_file(str(folder / "few")) == b""


def test_a_mixture_says_what_its_epoch_leaves_out(exported):
  *_, log = exported
  assert "mixed is a Mixture (few 0.25, many 0.75): an epoch of it ends with the first Task" in log


def test_a_finished_export_is_left_alone(exported):
  *_, log = exported
  assert "few is complete, nothing to do: 6 documents" in log


@pytest.mark.parametrize(
  ("name", "message"),
  [
    ("task", "--seqio_task 'fwe': neither a Task nor a Mixture .* there are few, many, mixed"),
    ("split", "few: no split 'test'; it has train, validation"),
    ("flag", "--errors has no effect with --seqio_task"),
    ("feature", "few: no output feature 'inputs'; it has targets"),
    ("absent.tasks", "--seqio_module 'absent.tasks': No module named 'absent'"),
    ("needs_absent", "--seqio_module 'needs_absent': No module named 'absent'"),
    ("changed", "few is complete, and it was made of something else: seqio was"),
  ],
)
def test_what_cannot_be_exported_is_named(exported, name, message):
  _, _, errors, _ = exported
  assert re.search(message, errors[name])


def test_without_the_extra_one_line_says_what_to_install(tmp_path):
  # A package that is not there: it cannot be imported.
  (tmp_path / "seqio.py").write_text("import tensorflow_that_is_absent")
  done = subprocess.run(
    [sys.executable, "-m", "launch.prepare", "--seqio_task=few", f"--output={tmp_path / 'store'}"],
    cwd=tmp_path,
    env={**os.environ, "PYTHONPATH": f"{tmp_path}:{ROOT}"},
    capture_output=True,
    text=True,
    timeout=60,
  )
  assert done.returncode == 1
  assert "No module named 'tensorflow_that_is_absent': .venv/bin/pip install" in done.stderr
  assert "'.[seqio]'" in done.stderr
  assert "Traceback" not in done.stderr


def test_loading_and_preparing_text_import_no_tensorflow():
  program = (
    "import sys; from data import pipeline; from launch import prepare; "
    "assert not {'tensorflow', 'seqio'} & set(sys.modules)"
  )
  subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=True, timeout=60)
