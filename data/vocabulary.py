"""Text to token ids: raw bytes, a Hugging Face tokenizer.json, or a SentencePiece .model.

launch/prepare calls `load`; training reads the `VocabularyRecord` that the token store keeps.
"""

import dataclasses
import hashlib
import json
import pathlib
from collections.abc import Callable, Sequence
from typing import Any, Literal

import numpy as np
import sentencepiece
import tokenizers

Kind = Literal["byte", "huggingface", "sentencepiece", "seqio"]

# 0xFE and 0xFF never occur in UTF-8, so no text contains them. Byte 0 can occur in text; padding is
# recognised by segment 0.
_BYTE_BOS, _BYTE_EOS, _BYTE_PAD = 0xFE, 0xFF, 0x00

# The names of special tokens in published tokenizer.json files, used where no file beside them says
# which token is which.
_NAMES = {
  "bos": ("<s>", "<bos>", "<|begin_of_text|>", "<|startoftext|>", "[BOS]"),
  "eos": ("</s>", "<eos>", "<|end_of_text|>", "<|endoftext|>", "[EOS]"),
  "pad": ("<pad>", "<|pad|>", "<|finetune_right_pad_id|>", "[PAD]"),
}
_DOES = {"bos": "start", "eos": "end"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class VocabularyRecord:
  """What training needs to know of a vocabulary: ids are 0 .. size - 1.

  bos is None where documents have an end token only. fingerprint: sha256 of the vocabulary's file.
  """

  kind: Kind
  size: int
  bos: int | None
  eos: int
  pad: int
  fingerprint: str

  def __post_init__(self):
    for name in ("bos", "eos", "pad"):
      token = getattr(self, name)
      if token is not None and not 0 <= token < self.size:
        raise ValueError(f"vocabulary: {name} {token} is not an id below the size {self.size}")

  @property
  def dtype(self) -> np.dtype:
    """The smallest unsigned type that holds every id."""
    return np.min_scalar_type(self.size - 1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Vocabulary:
  """A vocabulary that can encode; `unknown` is its id for text it cannot express, if it has one.

  file: the content of its file, whose sha256 is the record's fingerprint; empty for bytes.
  """

  record: VocabularyRecord
  file: bytes
  unknown: int | None
  encode_text: Callable[[str], Sequence[int] | np.ndarray]
  decode_ids: Callable[[list[int]], str]

  def encode(self, text: str) -> np.ndarray:
    """The ids of one document: bos if there is one, the text, eos. ValueError where the text
    contains bos or eos, which would be read as the start or the end of a document."""
    ids = np.asarray(self.encode_text(text), dtype=np.int64)
    before = [] if self.record.bos is None else [self.record.bos]
    ids = np.concatenate([before, ids, [self.record.eos]]).astype(np.int64)
    if ids.max() >= self.record.size or ids.min() < 0:
      raise ValueError(
        f"vocabulary: token id {ids.max()} is not below the vocabulary size {self.record.size}"
      )
    encoded = ids.astype(self.record.dtype)
    if self.record.kind != "byte":  # UTF-8 never contains its bos and eos
      self._check_text(encoded[len(before) : -1])
    return encoded

  def _check_text(self, ids: np.ndarray) -> None:
    for part, token in (("bos", self.record.bos), ("eos", self.record.eos)):
      if token is not None and np.count_nonzero(ids == token):
        raise ValueError(
          f"vocabulary: the text has {self.decode_ids([token])!r} in it, which this vocabulary "
          f"reads as its {part} (token {token}): a document would {_DOES[part]} there. Choose a "
          f"token that no text has in it with --{part}_token, or write it another way in the text"
        )

  def encode_beginning(self, text: str) -> np.ndarray:
    """The ids of the beginning of a document: bos if there is one, then `text`. ValueError where
    there are none, or `text` is not UTF-8."""
    try:
      text.encode("utf-8")
    except UnicodeEncodeError as error:
      raise ValueError(f"vocabulary: {text!r} is not UTF-8: {error.reason}") from error
    ids = self.encode(text)[:-1]
    if not len(ids):
      raise ValueError(
        f"vocabulary: {text!r} has no token, and no token starts a document here: give some text"
      )
    return ids

  def decode(self, ids: Sequence[int] | np.ndarray) -> str:
    """The text of ids. bos and eos are dropped; bytes that are not UTF-8 become �."""
    special = {self.record.bos, self.record.eos}
    return self.decode_ids([int(token) for token in ids if int(token) not in special])


def load(
  vocabulary: str,
  *,
  bos_token: str = "auto",
  eos_token: str = "auto",
  pad_token: str = "auto",
) -> Vocabulary:
  """The vocabulary "byte", or that of the file PATH/tokenizer.json or PATH/NAME.model.

  The three names are tokens in the file. "auto" takes the token that a tokenizer_config.json beside
  the file names, else the one usual name that the file has. "none" does without (not for eos).
  """
  names = {"bos": bos_token, "eos": eos_token, "pad": pad_token}
  if eos_token == "none":
    raise ValueError("vocabulary: eos_token none: documents must end with a token")
  if vocabulary == "byte":
    if set(names.values()) != {"auto"}:
      raise ValueError("vocabulary: byte has its own bos, eos and pad; they cannot be named")
    return _byte()
  path = pathlib.Path(vocabulary)
  if not path.is_file():
    raise ValueError(
      f"vocabulary {vocabulary!r}: no such file; give byte, a tokenizer.json or a .model file"
    )
  if path.suffix == ".json":
    return _huggingface(path, names)
  if path.suffix == ".model":
    return _sentencepiece(path, names)
  raise ValueError(
    f"vocabulary {vocabulary!r}: the name ends with neither .json (a Hugging Face tokenizer) "
    "nor .model (SentencePiece), and is not byte"
  )


def read_file(path: str, record: VocabularyRecord) -> bytes:
  """The content of the file that `record` was made of; ValueError if `path` is another."""
  file = pathlib.Path(path)
  if not file.is_file():
    raise ValueError(f"vocabulary {path!r}: no such file")
  content = file.read_bytes()
  if record.kind == "huggingface":
    content = content.replace(b"\r\n", b"\n")  # as it was read for the fingerprint
  if hashlib.sha256(content).hexdigest() != record.fingerprint:
    raise ValueError(
      f"vocabulary {path!r} is not the one that the token store was made with ({record.kind} of "
      f"{record.size} ids, fingerprint {record.fingerprint[:12]})"
    )
  return content


def _byte() -> Vocabulary:
  record = VocabularyRecord(
    kind="byte",
    size=256,
    bos=_BYTE_BOS,
    eos=_BYTE_EOS,
    pad=_BYTE_PAD,
    fingerprint=hashlib.sha256(b"byte: utf-8, bos 254, eos 255, pad 0").hexdigest(),
  )
  return Vocabulary(
    record=record,
    file=b"",
    unknown=None,
    encode_text=lambda text: np.frombuffer(text.encode("utf-8"), np.uint8),
    decode_ids=lambda ids: bytes(ids).decode("utf-8", errors="replace"),
  )


def _huggingface(path: pathlib.Path, names: dict[str, str]) -> Vocabulary:
  try:
    content = path.read_text(encoding="utf-8")
    tokenizer = tokenizers.Tokenizer.from_str(content)
  # The library raises a bare Exception for every fault of the file.
  except Exception as error:
    raise ValueError(f"vocabulary {path}: not a Hugging Face tokenizer.json: {error}") from error
  tokenizer.no_truncation()
  tokenizer.no_padding()
  # The characters "</s>" in a document are text, and must not end it.
  tokenizer.encode_special_tokens = True
  if isinstance(tokenizer.model, tokenizers.models.BPE):
    # Dropout would give different ids for the same text each time.
    tokenizer.model.dropout = None
    # Without unk_token it drops characters that it lacks; with one that does not exist it raises.
    tokenizer.model.unk_token = tokenizer.model.unk_token or "<no unk_token>"

  ids = tokenizer.get_vocab(with_added_tokens=True)
  chosen = _huggingface_specials(path, names, ids)
  bos, pad = chosen["bos"], chosen["pad"]
  # A token that was added as an ordinary one would still be recognised in the text.
  tokenizer.add_special_tokens(
    [
      tokenizers.AddedToken(added.content, special=True)
      for added in tokenizer.get_added_tokens_decoder().values()
      if added.content in (bos, chosen["eos"]) and not added.special
    ]
  )
  record = VocabularyRecord(
    kind="huggingface",
    size=max(ids.values()) + 1,
    bos=None if bos is None else ids[bos],
    eos=ids[str(chosen["eos"])],
    pad=0 if pad is None else ids[pad],
    fingerprint=hashlib.sha256(content.encode()).hexdigest(),
  )
  model = json.loads(content)["model"]

  def encode_text(text: str) -> list[int]:
    try:
      return tokenizer.encode(text, add_special_tokens=False).ids
    # A bare Exception again, for text that a vocabulary without an unknown token cannot spell.
    except Exception as error:
      raise ValueError(
        f"vocabulary {path}: it cannot spell the text: {error}; add an unknown token to it"
      ) from error

  return Vocabulary(
    record=record,
    file=content.encode(),
    # A Unigram model gives the id, the others the token.
    unknown=model.get("unk_id", ids.get(model.get("unk_token"))),
    encode_text=encode_text,
    decode_ids=lambda ids: tokenizer.decode(ids, skip_special_tokens=False),
  )


def _huggingface_specials(
  path: pathlib.Path, names: dict[str, str], ids: dict[str, int]
) -> dict[str, str | None]:
  """The token for each part: named by a flag, by tokenizer_config.json, or by a usual name."""
  beside = path.with_name("tokenizer_config.json")
  try:
    config: Any = json.loads(beside.read_text("utf-8")) if beside.is_file() else {}
  except ValueError as error:
    raise ValueError(f"vocabulary {path}: {beside} is not JSON: {error}") from error
  if not isinstance(config, dict):
    raise ValueError(f"vocabulary {path}: {beside} is a {type(config).__name__}, no JSON object")
  chosen: dict[str, str | None] = {}
  for part, name in names.items():
    flag = f"--{part}_token"
    if name not in ("auto", "none"):
      if name not in ids:
        raise ValueError(f"vocabulary {path}: {flag} {name!r} is not in it")
      chosen[part] = name
      continue
    said = config.get(f"{part}_token")
    said = said.get("content") if isinstance(said, dict) else said
    said = (said,) if isinstance(said, str) and said in ids else _NAMES[part]
    usual = [token for token in said if token in ids]
    if name == "none" or (not usual and part != "eos"):
      chosen[part] = None
    elif len(usual) == 1:
      chosen[part] = usual[0]
    else:
      found = f"it has {' and '.join(usual)}" if usual else f"it has none of {_NAMES[part]}"
      raise ValueError(f"vocabulary {path}: which token is {part}? {found}; name it with {flag}")
  return chosen


def _sentencepiece(path: pathlib.Path, names: dict[str, str]) -> Vocabulary:
  content = path.read_bytes()
  processor = sentencepiece.SentencePieceProcessor()
  try:
    processor.LoadFromSerializedProto(content)
  except RuntimeError as error:
    raise ValueError(f"vocabulary {path}: not a SentencePiece model: {error}") from error
  own = {"bos": processor.bos_id(), "eos": processor.eos_id(), "pad": processor.pad_id()}
  chosen: dict[str, int] = {}
  for part, name in names.items():
    if name not in ("auto", "none"):
      own[part] = processor.PieceToId(name)
      if processor.IdToPiece(own[part]) != name:
        raise ValueError(f"vocabulary {path}: --{part}_token {name!r} is not in it")
    chosen[part] = -1 if name == "none" else own[part]
  if chosen["eos"] < 0:
    raise ValueError(f"vocabulary {path}: it has no eos; name a piece with --eos_token")
  record = VocabularyRecord(
    kind="sentencepiece",
    size=processor.GetPieceSize(),
    bos=None if chosen["bos"] < 0 else chosen["bos"],
    eos=chosen["eos"],
    pad=max(chosen["pad"], 0),
    fingerprint=hashlib.sha256(content).hexdigest(),
  )
  return Vocabulary(
    record=record,
    file=content,
    unknown=processor.unk_id(),
    encode_text=processor.EncodeAsIds,
    decode_ids=processor.DecodeIds,
  )
