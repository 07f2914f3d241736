"""Token stores: what was written is read; a store that is cut off or edited is found."""

import dataclasses
import json
import pathlib

import numpy as np
import pytest

from data import token_store, vocabulary
from data.token_store import TokenStore, Writer, read_manifest
from tests.fake_gcs import serving

BYTE = vocabulary.load("byte").record


def _documents(count: int = 40, *, seed: int = 0, longest: int = 900) -> list[np.ndarray]:
  rng = np.random.default_rng(seed)
  # Zeros too: a block of zeros must not look like a missing one.
  return [
    np.concatenate([[BYTE.bos], rng.integers(0, 2, rng.integers(1, longest)), [BYTE.eos]])
    for _ in range(count)
  ]


@pytest.fixture
def store(tmp_path):
  path = tmp_path / "a store"
  token_store.write(str(path), _documents(), BYTE, text_bytes=123)
  return path


@pytest.mark.parametrize("in_memory_bytes", [0, 1 << 30])
def test_reads_are_slices_of_the_concatenated_documents(store, in_memory_bytes):
  documents = _documents()
  flat = np.concatenate(documents)
  opened = TokenStore(str(store), in_memory_bytes=in_memory_bytes)
  assert opened.manifest.num_tokens == len(flat)
  assert opened.manifest.num_documents == len(documents)
  assert opened.manifest.text_bytes == 123
  lengths = np.array([len(document) for document in documents])
  np.testing.assert_array_equal(opened.starts, np.cumsum(lengths) - lengths)
  starts = np.array([0, 7, 8190, len(flat) - 3, len(flat)])
  tokens = opened.read(starts, 65)
  padded = np.concatenate([flat, np.full(65, BYTE.pad)])
  np.testing.assert_array_equal(tokens, [padded[start : start + 65] for start in starts])
  assert tokens.dtype == np.int32


def test_a_store_of_several_shards_is_the_same_however_it_was_written(tmp_path, monkeypatch):
  monkeypatch.setattr(token_store, "_SHARD", 2 * token_store._BLOCK)
  documents = _documents(200)
  flat, lengths = np.concatenate(documents), np.array([len(d) for d in documents])
  one = token_store.write(str(tmp_path / "one"), documents, BYTE, text_bytes=9)
  writer = Writer(str(tmp_path / "two"), BYTE)
  writer.append(flat, lengths, text_bytes=9)
  two = writer.close()
  assert len(one.token_digests) > 3
  assert one.fingerprint == two.fingerprint
  assert one.files == two.files
  opened = TokenStore(str(tmp_path / "two"), in_memory_bytes=0)
  opened.verify()
  np.testing.assert_array_equal(opened.read(np.array([0]), len(flat))[0], flat)


def test_a_url_opens_as_a_path_does(store):
  by_path, by_url = TokenStore(str(store)), TokenStore(store.absolute().as_uri())
  assert by_path.manifest == by_url.manifest
  starts = np.array([5])
  np.testing.assert_array_equal(by_path.read(starts, 100), by_url.read(starts, 100))


def test_every_token_document_and_the_vocabulary_are_in_the_fingerprint(tmp_path):
  documents = _documents(3)
  changed = [documents[0], documents[1].copy(), documents[2]]
  changed[1][1] ^= 1
  joined = [np.concatenate(documents[:2]), documents[2]]
  other = vocabulary.VocabularyRecord(
    kind="byte", size=256, bos=254, eos=255, pad=1, fingerprint=BYTE.fingerprint
  )
  fingerprints = {
    token_store.write(str(tmp_path / str(i)), d, v, text_bytes=1).fingerprint
    for i, (d, v) in enumerate(
      [(documents, BYTE), (changed, BYTE), (joined, BYTE), (documents, other)]
    )
  }
  assert len(fingerprints) == 4


def test_an_id_beyond_the_vocabulary_is_refused(tmp_path):
  small = vocabulary.VocabularyRecord(kind="byte", size=250, bos=None, eos=1, pad=0, fingerprint="")
  for wrong in (250, -1):
    with pytest.raises(ValueError, match=f"id {wrong} is .*not below the vocabulary size 250"):
      token_store.write(str(tmp_path / "s"), [np.array([3, wrong, 1])], small, text_bytes=1)


def test_a_finished_store_is_not_overwritten(store):
  with pytest.raises(ValueError, match="it exists"):
    Writer(str(store), BYTE)


def test_a_store_is_not_there_before_it_is_finished(tmp_path):
  path = str(tmp_path / "s")
  writer = Writer(path, BYTE)
  writer.append(np.array([254, 255]), np.array([2]), text_bytes=0)
  assert not token_store.is_complete(path)
  with pytest.raises(ValueError, match="not finished"):
    read_manifest(path)
  # The remains of a killed writer do not disturb.
  token_store.write(path, _documents(), BYTE, text_bytes=1)
  TokenStore(path).verify()


def test_an_empty_store_is_refused(tmp_path):
  with pytest.raises(ValueError, match="no document"):
    token_store.write(str(tmp_path / "s"), [], BYTE, text_bytes=0)


@pytest.mark.parametrize("name", ["tokens/c/0", "starts/c/0", "tokens/zarr.json"])
def test_a_truncated_file_is_found_at_opening_and_named(store, name):
  content = (store / name).read_bytes()
  (store / name).write_bytes(content[:-1])
  with pytest.raises(ValueError, match=rf"{name} has {len(content) - 1} bytes.*truncated"):
    read_manifest(str(store))


def test_a_missing_file_is_named(store):
  (store / "tokens/c/0").unlink()
  with pytest.raises(ValueError, match=r"tokens/c/0 is missing"):
    read_manifest(str(store))


@pytest.mark.parametrize("name", ["tokens/c/0", "starts/c/0"])
@pytest.mark.parametrize("where", [0.01, 0.5, 0.99])
def test_a_flipped_bit_is_found_at_opening(store, name, where):
  _flip(store / name, where)
  with pytest.raises(ValueError, match="truncated or edited"):
    TokenStore(str(store))


def test_a_flipped_bit_of_a_large_store_is_found_when_the_block_is_read(store):
  _flip(store / "tokens/c/0", 0.01)
  opened = TokenStore(str(store), in_memory_bytes=0)
  with pytest.raises(ValueError, match="truncated or edited"):
    opened.read(np.array([0]), 10)
  with pytest.raises(ValueError, match="truncated or edited"):
    opened.verify()


def test_a_flipped_bit_among_ids_of_several_bytes_is_found_when_the_block_is_read(tmp_path):
  wide = dataclasses.replace(BYTE, size=70_000)
  token_store.write(str(tmp_path), [np.arange(20_000) + 40_000], wide, text_bytes=1)
  opened = TokenStore(str(tmp_path), in_memory_bytes=0)
  np.testing.assert_array_equal(opened.read(np.array([19_998]), 2), [[59_998, 59_999]])
  _flip(tmp_path / "tokens/c/0", 0.01)
  with pytest.raises(ValueError, match="truncated or edited"):
    TokenStore(str(tmp_path), in_memory_bytes=0).read(np.array([0]), 2000)


def test_a_lost_object_of_a_large_store_is_not_read_as_zeros():
  with serving() as server:
    token_store.write("gs://bucket/train", _documents(), BYTE, text_bytes=1)
    store = TokenStore("gs://bucket/train", in_memory_bytes=0)
    del server.objects["bucket", "train/tokens/c/0"]
    with pytest.raises(ValueError, match="truncated or edited"):
      store.read(np.array([0]), 10)


def test_tokens_edited_through_tensorstore_are_found(store):
  # Every CRC is right; only the fingerprint shows the change.
  url = token_store._url(str(store), "tokens")
  array = token_store.ts.open({"driver": "zarr3", "kvstore": url}, open=True).result()
  array[3] = 1 - int(array[3].read().result())
  with pytest.raises(ValueError, match=r"tokens 0 to .* fingerprint"):
    TokenStore(str(store))
  large = TokenStore(str(store), in_memory_bytes=0)
  with pytest.raises(ValueError, match=r"tokens 0 to .* fingerprint"):
    large.verify()


@pytest.mark.parametrize(
  ("edit", "message"),
  [
    (lambda values: values.update(num_tokens=5), "manifest.json was edited"),
    (lambda values: values.update(text_bytes=124), "manifest.json was edited"),
    (lambda values: values["vocabulary"].update(eos=3), "manifest.json was edited"),
    (lambda values: values.update(format="token_store 0"), "format 'token_store 0'"),
    (lambda values: values.pop("files"), "truncated or edited"),
    (lambda values: values.update(files=None), "truncated or edited"),
    (lambda values: values.update(origin=[1]), "truncated or edited"),
    (lambda values: values["vocabulary"].update(size=9), "truncated or edited"),
    (lambda values: values.update(extra=1), "truncated or edited"),
  ],
)
def test_an_edited_manifest_is_found(store, edit, message):
  values = json.loads((store / "manifest.json").read_text())
  edit(values)
  (store / "manifest.json").write_text(json.dumps(values))
  with pytest.raises(ValueError, match=message):
    read_manifest(str(store))


def test_a_flipped_bit_in_the_manifest_is_found_and_the_store_named(store):
  content = (store / "manifest.json").read_bytes()
  fingerprint = read_manifest(str(store)).fingerprint
  messages, fingerprints = [], set()
  for index in range(0, len(content), 3):
    for bit in (0x01, 0x80):
      changed = bytearray(content)
      changed[index] ^= bit
      (store / "manifest.json").write_bytes(changed)
      try:
        fingerprints.add(read_manifest(str(store)).fingerprint)
      except ValueError as error:
        messages.append(str(error))
  assert all(message.startswith(f"token store {store}: ") for message in messages)
  # The number of unknown tokens may differ: it is not in the fingerprint.
  assert fingerprints <= {fingerprint}
  assert len(messages) > len(content) / 2


def test_a_truncated_manifest_is_found(store):
  content = (store / "manifest.json").read_text()
  (store / "manifest.json").write_text(content[: len(content) // 2])
  with pytest.raises(ValueError, match=r"manifest\.json is truncated"):
    read_manifest(str(store))


def test_a_folder_that_is_no_store_says_so(tmp_path):
  with pytest.raises(ValueError, match=r"no manifest\.json"):
    TokenStore(str(tmp_path / "nothing"))


def _flip(path: pathlib.Path, where: float) -> None:
  """Flips one bit at this fraction of the file."""
  content = bytearray(path.read_bytes())
  content[int(where * len(content))] ^= 1
  path.write_bytes(bytes(content))
