"""Vocabularies: text comes back, documents begin and end, faults are named."""

import dataclasses
import io
import json

import numpy as np
import pytest
import sentencepiece
import tokenizers
from tokenizers import models, pre_tokenizers, trainers

from data import vocabulary

TEXTS = [
  "Friends, Romans, countrymen, lend me your ears.",
  "déjà vu — 日本 🎭\x00\n",
  "<s> spelt </s> in text",
]


@pytest.fixture(scope="module")
def huggingface(tmp_path_factory):
  """A byte-level BPE with the usual names."""
  tokenizer = tokenizers.Tokenizer(models.BPE())
  tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
  tokenizer.decoder = tokenizers.decoders.ByteLevel()
  trainer = trainers.BpeTrainer(
    vocab_size=300,
    special_tokens=["<s>", "</s>", "<pad>"],
    initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    show_progress=False,
  )
  tokenizer.train_from_iterator(TEXTS * 20, trainer)
  path = tmp_path_factory.mktemp("hf") / "tokenizer.json"
  tokenizer.save(str(path))
  return path


def _sentencepiece(path, **options):
  """Writes a byte-level BPE to `path`, and returns the path."""
  model = io.BytesIO()
  sentencepiece.SentencePieceTrainer.Train(
    sentence_iterator=iter(TEXTS * 20),
    model_writer=model,
    vocab_size=320,
    model_type="bpe",
    byte_fallback=True,
    minloglevel=2,
    **options,
  )
  path.write_bytes(model.getvalue())
  return path


@pytest.fixture(scope="module")
def sentencepiece_model(tmp_path_factory):
  return _sentencepiece(
    tmp_path_factory.mktemp("spm") / "bpe.model",
    normalization_rule_name="identity",
    remove_extra_whitespaces=False,
    add_dummy_prefix=False,
    pad_id=3,
  )


@pytest.fixture(params=["byte", "huggingface", "sentencepiece_model"])
def any_vocabulary(request):
  if request.param == "byte":
    return vocabulary.load("byte")
  return vocabulary.load(str(request.getfixturevalue(request.param)))


@pytest.mark.parametrize("text", TEXTS)
def test_text_comes_back_between_bos_and_eos(any_vocabulary, text):
  ids = any_vocabulary.encode(text)
  record = any_vocabulary.record
  assert ids[0] == record.bos
  assert ids[-1] == record.eos
  assert ids.dtype == record.dtype
  assert ids.max() < record.size
  assert any_vocabulary.decode(ids) == text


def test_a_beginning_is_a_document_without_its_end(any_vocabulary):
  ids = any_vocabulary.encode_beginning("to be")
  np.testing.assert_array_equal(ids, any_vocabulary.encode("to be")[:-1])
  # What a command line gives for bytes that are no UTF-8.
  with pytest.raises(ValueError, match=r"'\\udcff' is not UTF-8: surrogates not allowed"):
    any_vocabulary.encode_beginning("\udcff")
  without_bos = dataclasses.replace(
    any_vocabulary, record=dataclasses.replace(any_vocabulary.record, bos=None)
  )
  with pytest.raises(ValueError, match="'' has no token, and no token starts a document"):
    without_bos.encode_beginning("")


@pytest.mark.parametrize("text", TEXTS)
def test_text_never_spells_the_end_of_a_document(any_vocabulary, text):
  ids = any_vocabulary.encode(text)[1:-1]
  assert any_vocabulary.record.bos not in ids
  assert any_vocabulary.record.eos not in ids


@pytest.mark.parametrize("text", [*TEXTS, "<|end|>a <|end|> b<|start|>"])
def test_text_does_not_spell_a_token_that_was_added_as_an_ordinary_one(huggingface, tmp_path, text):
  tokenizer = tokenizers.Tokenizer.from_file(str(huggingface))
  tokenizer.add_tokens(["<|start|>", "<|end|>"])
  path = tmp_path / "added.json"
  tokenizer.save(str(path))
  loaded = vocabulary.load(str(path), bos_token="<|start|>", eos_token="<|end|>")
  ids = loaded.encode(text)
  assert (ids[0], ids[-1]) == (loaded.record.bos, loaded.record.eos)
  assert not {loaded.record.bos, loaded.record.eos} & set(ids[1:-1].tolist())
  assert loaded.decode(ids) == text


def test_bytes_are_their_own_ids():
  byte = vocabulary.load("byte")
  assert byte.encode("aé").tolist() == [254, 97, 0xC3, 0xA9, 255]
  assert (byte.record.size, byte.record.pad) == (256, 0)


@pytest.mark.parametrize(
  ("size", "dtype"), [(256, np.uint8), (257, np.uint16), (65536, np.uint16), (65537, np.uint32)]
)
def test_ids_take_the_smallest_type_that_holds_them(size, dtype):
  record = vocabulary.VocabularyRecord(
    kind="byte", size=size, bos=None, eos=1, pad=0, fingerprint=""
  )
  assert record.dtype == dtype


def test_a_special_id_outside_the_vocabulary_is_refused():
  with pytest.raises(ValueError, match="eos 256 is not an id below the size 256"):
    vocabulary.VocabularyRecord(kind="byte", size=256, bos=1, eos=256, pad=0, fingerprint="")


def test_the_fingerprint_follows_the_content(huggingface, tmp_path):
  moved, changed = tmp_path / "moved.json", tmp_path / "changed.json"
  moved.write_bytes(huggingface.read_bytes())
  changed.write_bytes(huggingface.read_bytes() + b"\n")
  original = vocabulary.load(str(huggingface)).record
  assert vocabulary.load(str(moved)).record == original
  assert vocabulary.load(str(changed)).record.fingerprint != original.fingerprint


def test_the_file_of_a_record_is_told_from_others(huggingface, sentencepiece_model, tmp_path):
  windows = tmp_path / "tokenizer.json"
  windows.write_bytes(huggingface.read_bytes().replace(b"\n", b"\r\n"))
  for path, of in (
    (huggingface, huggingface),
    (windows, huggingface),
    (sentencepiece_model, sentencepiece_model),
  ):
    words = vocabulary.load(str(of))
    assert vocabulary.read_file(str(path), words.record) == words.file
  with pytest.raises(ValueError, match="is not the one that the token store was made with"):
    vocabulary.read_file(str(sentencepiece_model), vocabulary.load(str(huggingface)).record)
  with pytest.raises(ValueError, match="no such file"):
    vocabulary.read_file(str(tmp_path / "none"), vocabulary.load(str(huggingface)).record)


def test_a_long_document_is_not_cut_by_the_tokenizers_own_limit(huggingface, tmp_path):
  tokenizer = tokenizers.Tokenizer.from_file(str(huggingface))
  tokenizer.enable_truncation(4)
  tokenizer.enable_padding(length=4)
  tokenizer.save(str(tmp_path / "short.json"))
  loaded = vocabulary.load(str(tmp_path / "short.json"))
  assert loaded.decode(loaded.encode(TEXTS[0])) == TEXTS[0]


def test_a_text_has_the_same_ids_each_time_whatever_dropout_it_was_trained_with(
  huggingface, tmp_path
):
  tokenizer = json.loads(huggingface.read_text())
  tokenizer["model"]["dropout"] = 0.5
  (tmp_path / "dropout.json").write_text(json.dumps(tokenizer))
  loaded = vocabulary.load(str(tmp_path / "dropout.json"))
  expected = vocabulary.load(str(huggingface)).encode(TEXTS[0])
  for _ in range(5):
    np.testing.assert_array_equal(loaded.encode(TEXTS[0]), expected)


def test_two_tokens_that_could_end_a_document_must_be_told_apart(huggingface, tmp_path):
  tokenizer = tokenizers.Tokenizer.from_file(str(huggingface))
  tokenizer.add_special_tokens(["<|endoftext|>"])
  path = tmp_path / "two.json"
  tokenizer.save(str(path))
  with pytest.raises(ValueError, match=r"which token is eos\? .*--eos_token"):
    vocabulary.load(str(path))
  chosen = vocabulary.load(str(path), eos_token="<|endoftext|>")
  assert chosen.record.eos == tokenizer.token_to_id("<|endoftext|>")
  # A publisher's tokenizer_config.json beside the file names it too.
  config = {"eos_token": {"content": "<|endoftext|>"}, "bos_token": None}
  (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
  assert vocabulary.load(str(path)).record.eos == chosen.record.eos
  (tmp_path / "tokenizer_config.json").write_text("{eos_token}")
  with pytest.raises(ValueError, match=r"two\.json: .*tokenizer_config\.json is not JSON"):
    vocabulary.load(str(path))
  (tmp_path / "tokenizer_config.json").write_text('["</s>"]')
  with pytest.raises(ValueError, match=r"tokenizer_config\.json is a list, no JSON object"):
    vocabulary.load(str(path))
  (tmp_path / "tokenizer_config.json").write_text('{"eos_token": ["</s>"]}')
  with pytest.raises(ValueError, match=r"which token is eos\?"):
    vocabulary.load(str(path))


def test_a_vocabulary_without_bos_only_ends_documents(huggingface):
  without = vocabulary.load(str(huggingface), bos_token="none")
  assert without.record.bos is None
  assert without.encode("a").tolist()[0] != vocabulary.load(str(huggingface)).record.bos


def test_the_special_tokens_are_those_of_the_file_unless_named(huggingface, sentencepiece_model):
  def specials(path, **names):
    loaded = vocabulary.load(str(path), **names)
    return loaded.record.bos, loaded.record.eos, loaded.record.pad

  # In the order in which the files were made.
  assert specials(huggingface) == (0, 1, 2)
  assert specials(huggingface, pad_token="none") == (0, 1, 0)
  assert specials(sentencepiece_model) == (1, 2, 3)
  named = {"bos_token": "none", "eos_token": "<s>", "pad_token": "</s>"}
  assert specials(sentencepiece_model, **named) == (None, 1, 2)


def test_the_unknown_token_of_a_sentencepiece_model_is_known(sentencepiece_model):
  assert vocabulary.load(str(sentencepiece_model)).unknown == 0


def test_ids_with_gaps_are_all_below_the_size(tmp_path):
  tokenizer = tokenizers.Tokenizer(models.WordLevel({"</s>": 0, "a": 9}, unk_token="<unk>"))
  tokenizer.save(str(tmp_path / "gaps.json"))
  loaded = vocabulary.load(str(tmp_path / "gaps.json"))
  assert loaded.record.size == 10
  assert loaded.encode("a").tolist() == [9, 0]


@pytest.mark.parametrize(
  ("arguments", "message"),
  [
    ({"eos_token": "none"}, "documents must end"),
    ({"eos_token": "<nothing>"}, "--eos_token '<nothing>' is not in it"),
    ({"pad_token": "<nothing>"}, "--pad_token '<nothing>' is not in it"),
  ],
)
@pytest.mark.parametrize("kind", ["huggingface", "sentencepiece_model"])
def test_a_special_token_that_cannot_be_is_named(kind, arguments, message, request):
  with pytest.raises(ValueError, match=message):
    vocabulary.load(str(request.getfixturevalue(kind)), **arguments)


def test_files_that_are_no_vocabulary_are_refused(tmp_path):
  for name, content, message in [
    ("a.json", b"{}", "not a Hugging Face tokenizer.json"),
    ("b.json", b"\xff\xfe{}", "b.json: not a Hugging Face tokenizer.json"),
    ("a.model", b"nonsense", "not a SentencePiece model"),
    ("a.txt", b"a", "neither .json"),
  ]:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
      vocabulary.load(str(tmp_path / name))
  with pytest.raises(ValueError, match="no such file; give byte"):
    vocabulary.load(str(tmp_path / "absent.json"))
  with pytest.raises(ValueError, match="byte has its own"):
    vocabulary.load("byte", eos_token="</s>")


def _spelt(kind: str, folder) -> str:
  """A vocabulary in which the text <|end|> is encoded as that token, as ordinary tokens are."""
  if kind == "sentencepiece":
    return str(_sentencepiece(folder / "user.model", user_defined_symbols=["<|end|>"]))
  words = {"a": 0, "</s>": 1, "<|end|>": 2}
  tokenizer = tokenizers.Tokenizer(models.WordLevel(words, unk_token="a"))
  tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
  tokenizer.save(str(folder / "words.json"))
  return str(folder / "words.json")


@pytest.mark.parametrize("kind", ["huggingface", "sentencepiece"])
@pytest.mark.parametrize("part", ["bos", "eos"])
def test_a_text_that_would_start_or_end_a_document_in_its_midst_is_refused(kind, part, tmp_path):
  path = _spelt(kind, tmp_path)
  names = {"bos_token": "none", "eos_token": "</s>", f"{part}_token": "<|end|>"}
  loaded = vocabulary.load(path, **names)
  assert loaded.encode("a a")[-1] == loaded.record.eos
  refused = rf"the text has '<\|end\|>' in it, .* as its {part} .* --{part}_token"
  with pytest.raises(ValueError, match=refused):
    loaded.encode("a <|end|> a")
  # The way out: a token that is neither bos nor eos is a token like others.
  other = vocabulary.load(path, bos_token="none", eos_token="</s>")
  assert np.count_nonzero(other.encode("a <|end|> a") == other.record.eos) == 1
