"""The files that AutoTokenizer opens: they are those that transformers opened, and give our ids.

The recordings come from make_tokenizers_hf.py and check_saved_with_transformers.py in
tests/golden/.
"""

import io
import json

import pytest
import sentencepiece

from data import vocabulary
from data.tokenizer_files import tokenizer_files
from tests.golden.make_tokenizers_hf import FOLDER

FILES = {
  "byte": "byte",
  "bpe": "bpe/tokenizer.json",
  "sentencepiece": "sentencepiece/tokenizer.model",
}
IDS = json.loads((FOLDER / "ids.json").read_text())


def _load(name):
  return vocabulary.load("byte" if name == "byte" else str(FOLDER / FILES[name]))


@pytest.mark.parametrize("name", list(FILES))
def test_the_files_are_those_that_transformers_opened(name):
  words = _load(name)
  made = tokenizer_files(words.record, words.file)
  assert not made.lacking
  assert made.files == {path.name: path.read_bytes() for path in (FOLDER / name).iterdir()}


@pytest.mark.parametrize("name", list(FILES))
def test_transformers_gives_the_ids_of_the_beginning_of_a_document(name):
  words = _load(name)
  record = words.record
  assert IDS[name]["special"] == [
    record.bos, record.eos, None if name == "byte" else record.pad
  ]  # fmt: skip
  for text, ids in IDS[name]["texts"].items():
    assert words.encode_beginning(text).tolist() == ids, text


def test_what_a_tokenizer_does_not_get_is_said():
  words = _load("bpe")
  without = json.loads(words.file) | {"post_processor": None}
  made = tokenizer_files(words.record, json.dumps(without).encode())
  assert made.lacking.startswith("a bos: tokenizer.json does not begin texts with it")
  assert list(made.files) == ["tokenizer.json", "tokenizer_config.json"]
  made = tokenizer_files(words.record, b"")
  assert made == ({}, "no tokenizer: the store does not keep that of its huggingface ids")


def test_padding_that_is_a_token_of_text_is_no_special_token():
  words = vocabulary.load(str(FOLDER / FILES["bpe"]), pad_token="none", bos_token="none")
  config = json.loads(tokenizer_files(words.record, words.file).files["tokenizer_config.json"])
  assert config["eos_token"] == "</s>"
  assert "bos_token" not in config


def _model(**options):
  model = io.BytesIO()
  sentencepiece.SentencePieceTrainer.Train(
    sentence_iterator=iter(["a few words of text, and some more", "don't ﬁ déjà"] * 20),
    model_writer=model,
    minloglevel=2,
    **options,
  )
  return model.getvalue()


@pytest.mark.parametrize(
  "options",
  [
    {"model_type": "bpe", "vocab_size": 300, "byte_fallback": True},
    {"model_type": "unigram", "vocab_size": 27},
    {"model_type": "bpe", "vocab_size": 300, "byte_fallback": True, "add_dummy_prefix": False},
  ],
)
def test_a_sentencepiece_model_becomes_a_tokenizer_with_its_ids(options, tmp_path):
  path = tmp_path / "some.model"
  path.write_bytes(_model(**options))
  words = vocabulary.load(str(path))
  made = tokenizer_files(words.record, words.file)
  assert not made.lacking
  (tmp_path / "tokenizer.json").write_bytes(made.files["tokenizer.json"])
  converted = vocabulary.load(str(tmp_path / "tokenizer.json"))
  for text in ("more text, some words", "déjà  ﬁ\tx\n", " lead 日本"):
    assert converted.encode(text).tolist() == words.encode(text).tolist()


def test_a_sentencepiece_model_of_other_rules_keeps_its_own_form(tmp_path):
  """Pieces of whole words with spaces after them: no tokenizer of ours has such."""
  path = tmp_path / "suffix.model"
  path.write_bytes(
    _model(model_type="bpe", vocab_size=300, byte_fallback=True, treat_whitespace_as_suffix=True)
  )
  words = vocabulary.load(str(path))
  made = tokenizer_files(words.record, words.file)
  assert made.files == {"tokenizer.model": words.file}
  assert "tokenizer.model is the model itself" in made.lacking
