"""Writes tests/golden/tokenizers_hf/: what `launch.export` writes for vocabularies of three kinds.

  .venv/bin/python -m tests.golden.make_tokenizers_hf
  ~/oracle/bin/python tests/golden/check_saved_with_transformers.py

The second opens them with AutoTokenizer and records its ids in ids.json. bpe/ and sentencepiece/
are trained here on a few sentences; test_tokenizer_files.py asks for the same files again.
"""

import io
import pathlib
import shutil

import sentencepiece
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, processors, trainers

from data import vocabulary
from data.tokenizer_files import tokenizer_files

FOLDER = pathlib.Path(__file__).parent / "tokenizers_hf"
_TEXTS = ["Friends, Romans, countrymen, lend me your ears.", "déjà vu — 日本 🎭"] * 20


def main() -> None:
  shutil.rmtree(FOLDER, ignore_errors=True)
  for name in ("byte", "bpe", "sentencepiece"):
    (FOLDER / name).mkdir(parents=True)
  _bpe(FOLDER / "bpe" / "tokenizer.json")
  _sentencepiece(FOLDER / "sentencepiece" / "tokenizer.model")
  for name, file in (
    ("byte", None),
    ("bpe", "tokenizer.json"),
    ("sentencepiece", "tokenizer.model"),
  ):
    words = vocabulary.load("byte" if file is None else str(FOLDER / name / file))
    for path, content in tokenizer_files(words.record, words.file).files.items():
      (FOLDER / name / path).write_bytes(content)


def _bpe(path: pathlib.Path) -> None:
  tokenizer = tokenizers.Tokenizer(models.BPE())
  tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
  tokenizer.decoder = decoders.ByteLevel()
  trainer = trainers.BpeTrainer(
    vocab_size=300,
    special_tokens=["<s>", "</s>", "<pad>"],
    initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    show_progress=False,
  )
  tokenizer.train_from_iterator(_TEXTS, trainer)
  tokenizer.post_processor = processors.TemplateProcessing(
    single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", 0)]
  )
  tokenizer.save(str(path))


def _sentencepiece(path: pathlib.Path) -> None:
  model = io.BytesIO()
  sentencepiece.SentencePieceTrainer.Train(
    sentence_iterator=iter(_TEXTS),
    model_writer=model,
    vocab_size=320,
    model_type="bpe",
    byte_fallback=True,
    normalization_rule_name="identity",
    remove_extra_whitespaces=False,
    user_defined_symbols=["<sep>"],
    pad_id=3,
    minloglevel=2,
  )
  path.write_bytes(model.getvalue())


if __name__ == "__main__":
  main()
