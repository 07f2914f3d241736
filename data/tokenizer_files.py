"""A vocabulary as the files that `transformers.AutoTokenizer` opens."""

import json
from typing import Any, NamedTuple

import sentencepiece
import tokenizers
from sentencepiece import sentencepiece_model_pb2
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors

from data.vocabulary import VocabularyRecord

# Where tokenizers of other rules part: spaces, lines, accents in two forms, other scripts, bytes.
_PROBES = (
  "Friends, Romans, countrymen",
  " a  b   c ",
  "tab\tline\n\nend \x00.",
  "déjà de\u0301ja\u0300 ﬁ Ⅷ ｱ",
  "日本 🎭 مرحبا",
  "▁ _ 1234567 don't",
)


class TokenizerFiles(NamedTuple):
  """Files by name, and what a reader of them does not get, in one sentence; "" if nothing."""

  files: dict[str, bytes]
  lacking: str


def tokenizer_files(record: VocabularyRecord, content: bytes) -> TokenizerFiles:
  """The files for a vocabulary and the content of its own file, which is empty for bytes.

  A tokenizer.json is given as it is. Bytes and SentencePiece models become one: it gives the ids of
  the vocabulary for text and starts documents with its bos; SentencePiece's only if it agrees with
  the model on texts of many kinds. The model itself is given as tokenizer.model.
  """
  if record.kind == "byte":
    return _written(record, _of_bytes(record), {})
  if not content:
    return TokenizerFiles(
      {}, f"no tokenizer: the store does not keep that of its {record.kind} ids"
    )
  if record.kind == "huggingface":
    return _as_given(record, content)
  if record.kind == "sentencepiece":
    return _of_sentencepiece(record, content)
  raise ValueError(f"vocabulary: {record.kind} vocabularies have no file")


def _as_given(record: VocabularyRecord, content: bytes) -> TokenizerFiles:
  tokenizer = tokenizers.Tokenizer.from_str(content.decode("utf-8"))
  lacking = ""
  if record.bos is not None and tokenizer.encode("a").ids[:1] != [record.bos]:
    lacking = (
      "a bos: tokenizer.json does not begin texts with it as the documents of the store do; give "
      f"the model token {record.bos} first"
    )
  files = {"tokenizer.json": content, "tokenizer_config.json": _config(record, tokenizer)}
  return TokenizerFiles(files, lacking)


def _of_bytes(record: VocabularyRecord) -> tokenizers.Tokenizer:
  # The two bytes that no text has in it are bos and eos.
  names = {record.bos: "<s>", record.eos: "</s>"}
  ids = {names.get(byte, character): byte for byte, character in enumerate(_byte_characters())}
  tokenizer = tokenizers.Tokenizer(models.BPE(vocab=ids, merges=[]))
  tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
  tokenizer.decoder = decoders.ByteLevel()
  tokenizer.add_special_tokens(["<s>", "</s>"])
  return tokenizer


def _byte_characters() -> list[str]:
  """The character that stands for each byte in byte-level vocabularies: itself if it is printed,
  else the next one from 256 on."""
  printed = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
  others = iter(range(256, 512))
  return [chr(byte if byte in printed else next(others)) for byte in range(256)]


def _of_sentencepiece(record: VocabularyRecord, content: bytes) -> TokenizerFiles:
  model = {"tokenizer.model": content}
  tokenizer = _converted(content)
  processor = sentencepiece.SentencePieceProcessor()
  processor.LoadFromSerializedProto(content)
  for text in _PROBES:
    expected = processor.EncodeAsIds(text)
    # What is unknown is written in another way by each.
    is_same = processor.unk_id() in expected or (
      tokenizer.decode(expected) == processor.DecodeIds(expected)
    )
    if tokenizer.encode(text).ids != expected or not is_same:
      return TokenizerFiles(
        model,
        f"a tokenizer.json: made of the SentencePiece model it is another for {text!r}; "
        "tokenizer.model is the model itself, for the sentencepiece package",
      )
  return _written(record, tokenizer, model)


def _converted(content: bytes) -> tokenizers.Tokenizer:
  """The rules of a SentencePiece model as a tokenizer; not all models' can be expressed."""
  proto = sentencepiece_model_pb2.ModelProto.FromString(content)  # pyright: ignore
  trainer, normal = proto.trainer_spec, proto.normalizer_spec
  pieces = [(piece.piece, piece.score) for piece in proto.pieces]
  if trainer.model_type == trainer.BPE:
    ids = {piece: index for index, (piece, _) in enumerate(pieces)}
    made = models.BPE(
      vocab=ids,
      merges=_merges(ids),
      unk_token=pieces[trainer.unk_id][0],
      fuse_unk=True,
      byte_fallback=trainer.byte_fallback,
    )
  else:
    made = models.Unigram(pieces, unk_id=trainer.unk_id, byte_fallback=trainer.byte_fallback)
  tokenizer = tokenizers.Tokenizer(made)
  steps: list[Any] = []
  if normal.precompiled_charsmap:
    steps.append(normalizers.Precompiled(normal.precompiled_charsmap))
  if normal.remove_extra_whitespaces:
    steps += [normalizers.Strip(), normalizers.Replace(tokenizers.Regex(" {2,}"), " ")]
  if normal.add_dummy_prefix:
    steps.append(normalizers.Prepend("▁"))
  tokenizer.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", "▁")])
  back: list[Any] = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
  if normal.add_dummy_prefix or normal.remove_extra_whitespaces:
    back.append(decoders.Strip(" ", 1, 0))
  tokenizer.decoder = decoders.Sequence(back)
  control = [piece.piece for piece in proto.pieces if piece.type == piece.CONTROL]
  tokenizer.add_special_tokens([AddedToken(name, normalized=False) for name in control])
  user = [piece.piece for piece in proto.pieces if piece.type == piece.USER_DEFINED]
  tokenizer.add_tokens([AddedToken(name, normalized=False) for name in user])
  return tokenizer


def _merges(ids: dict[str, int]) -> list[tuple[str, str]]:
  """Every pair of pieces that makes a piece, that of the lowest id first: the best score."""
  made = []
  for piece, index in ids.items():
    pairs = [(piece[:cut], piece[cut:]) for cut in range(1, len(piece))]
    known = [(ids[a], ids[b], a, b) for a, b in pairs if a in ids and b in ids]
    made += [(index, *pair) for pair in sorted(known)]
  return [(a, b) for *_, a, b in sorted(made)]


def _written(
  record: VocabularyRecord, tokenizer: tokenizers.Tokenizer, beside: dict[str, bytes]
) -> TokenizerFiles:
  if record.bos is not None:
    bos = str(tokenizer.id_to_token(record.bos))
    tokenizer.post_processor = processors.TemplateProcessing(
      single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, record.bos)]
    )
  files = {
    "tokenizer.json": tokenizer.to_str(pretty=True).encode(),
    "tokenizer_config.json": _config(record, tokenizer),
  }
  return TokenizerFiles(files | beside, "")


def _config(record: VocabularyRecord, tokenizer: tokenizers.Tokenizer) -> bytes:
  settings: dict[str, Any] = {
    "tokenizer_class": "PreTrainedTokenizerFast",
    "clean_up_tokenization_spaces": False,
  }
  special = {i for i, token in tokenizer.get_added_tokens_decoder().items() if token.special}
  for part in ("bos", "eos", "pad"):
    index = getattr(record, part)
    # Id 0 for a vocabulary without padding is a token of text; transformers would cut it out.
    if index is not None and (part != "pad" or index in special):
      settings[f"{part}_token"] = tokenizer.id_to_token(index)
  return (json.dumps(settings, indent=2, sort_keys=True, ensure_ascii=False) + "\n").encode()
