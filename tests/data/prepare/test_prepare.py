"""launch.prepare: what goes in comes out once, faults are named, a killed run goes on."""

import dataclasses
import gzip
import json
import lzma
import os
import pathlib
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import zstandard

from data import token_store, vocabulary
from data.prepare import documents, parts
from data.prepare import job as job_module
from data.prepare.encode import Settings
from data.prepare.job import Job, prepare
from data.token_store import TokenStore

ROOT = pathlib.Path(__file__).parents[3]
BYTE = vocabulary.load("byte")
COMPRESS = {
  ".gz": gzip.compress,
  ".zst": zstandard.ZstdCompressor().compress,
  ".xz": lzma.compress,
}


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)


def _job(*inputs: str, **changes) -> Job:
  job = Job(
    inputs=inputs,
    output="store",
    settings=Settings(vocabulary="byte"),
    num_workers=1,
    holdout_every=0,
    holdout_output="",
    work_dir=pathlib.Path("store.partial"),
  )
  return dataclasses.replace(job, **changes)


def _texts(path: str = "store") -> list[str]:
  store = TokenStore(path)
  flat = store.read(np.array([0]), store.manifest.num_tokens)[0]
  return [BYTE.decode(document) for document in np.split(flat, store.starts[1:])]


def _jsonl(path: str, texts: list[str], field: str = "text") -> None:
  lines = [json.dumps({"id": n, field: text}) for n, text in enumerate(texts)]
  pathlib.Path(path).write_text("\n".join(lines) + "\n")


def test_every_format_gives_its_documents_in_order():
  pathlib.Path("a.txt").write_bytes("déjà\r\nvu\n".encode())
  pathlib.Path("b.md").write_bytes(b"\xef\xbb\xbfafter a byte order mark")
  _jsonl("c.jsonl", ["one", "two\nlines"])
  pathlib.Path("c.jsonl").write_text(pathlib.Path("c.jsonl").read_text().rstrip("\n"))
  expected = ["déjà\r\nvu\n", "after a byte order mark", "one", "two\nlines"]
  prepare(_job("*.txt", "*.md", "*.jsonl"))
  assert _texts() == expected
  manifest = token_store.read_manifest("store")
  assert manifest.text_bytes == sum(len(text.encode()) for text in expected)
  assert not pathlib.Path("store.partial").exists()


@pytest.mark.parametrize("suffix", list(COMPRESS))
def test_compressed_files_are_read_to_the_end(suffix):
  text = "".join(f"line {n}\n" for n in range(1000))
  compress = COMPRESS[suffix]
  # Two members, as `cat a.gz b.gz` makes and parallel compressors write.
  pathlib.Path(f"a.txt{suffix}").write_bytes(compress(text.encode()) + compress(b"and more"))
  prepare(_job("a.txt.*"))
  assert _texts() == [text + "and more"]


@pytest.mark.parametrize("suffix", [".gz", ".xz"])
def test_padding_between_members_may_be_longer_than_what_is_read_at_once(suffix, monkeypatch):
  member = COMPRESS[suffix](b"text")
  padding = bytes(4 * 100)
  pathlib.Path(f"a.txt{suffix}").write_bytes(member + padding + member + padding)
  for chunk in (len(member), 64, 1 << 20):
    monkeypatch.setattr(documents, "_CHUNK", chunk)
    prepare(_job(f"a.txt{suffix}", output=f"store{chunk}"))
    assert _texts(f"store{chunk}") == ["texttext"]
  pathlib.Path(f"b.txt{suffix}").write_bytes(padding)
  with pytest.raises(ValueError, match=rf"b\.txt{suffix}: (damaged|truncated)"):
    prepare(_job(f"b.txt{suffix}"))


@pytest.mark.parametrize("suffix", list(COMPRESS))
@pytest.mark.parametrize("fault", ["truncated", "damaged"])
def test_a_compressed_file_that_is_cut_off_or_damaged_is_named(suffix, fault):
  content = COMPRESS[suffix](os.urandom(5000).hex().encode())
  path = pathlib.Path(f"a.txt{suffix}")
  path.write_bytes(content[:-20] if fault == "truncated" else b"nonsense" + content)
  with pytest.raises(ValueError, match=rf"a\.txt{suffix}: {fault}"):
    prepare(_job(str(path)))
  assert not token_store.is_complete("store")


def test_inputs_are_read_once_in_the_order_given():
  for name in ("b.txt", "a.txt", "sub/c.txt"):
    pathlib.Path(name).parent.mkdir(exist_ok=True)
    pathlib.Path(name).write_text(name)
  prepare(_job("b.txt", "**/*.txt"))
  assert _texts() == ["b.txt", "a.txt", "sub/c.txt"]


def test_a_file_is_read_once_under_all_its_names():
  pathlib.Path("sub").mkdir()
  pathlib.Path("sub/a.txt").write_text("once")
  pathlib.Path("sub/b.txt").symlink_to("a.txt")
  # A loop, which ** follows some 40 times.
  pathlib.Path("sub/loop").symlink_to("..")
  prepare(_job("sub/*.txt", "./sub/a.txt", os.path.abspath("sub/a.txt"), "**/*.txt"))
  assert _texts() == ["once"]
  assert [file["path"] for file in token_store.read_manifest("store").origin["inputs"]] == [
    "sub/a.txt"
  ]


@pytest.mark.parametrize(
  ("pattern", "message"),
  [
    ("nothing*.txt", r"'nothing\*\.txt': nothing matches"),
    ("sub", r"'sub': a folder; give sub/\*\*/\*\.txt"),
    ("table.csv", r"table\.csv: not one of \.txt, \.md, \.jsonl"),
    ("archive.gz", r"archive\.gz: not one of"),
    ("pipe.txt", r"pipe\.txt: a pipe or a device"),
  ],
)
def test_an_input_that_cannot_be_read_is_named(pattern, message):
  pathlib.Path("sub").mkdir()
  os.mkfifo("pipe.txt")
  for name in ("table.csv", "archive.gz"):
    pathlib.Path(name).write_text("x")
  with pytest.raises(ValueError, match=message):
    prepare(_job(pattern))


def test_bytes_that_are_not_utf8_are_named_with_their_place():
  pathlib.Path("a.txt").write_bytes("é".encode() + b"abc\xff")
  with pytest.raises(ValueError, match=r"a\.txt: not UTF-8: byte 5 .* 0xff.*--errors=replace"):
    prepare(_job("a.txt"))
  pathlib.Path("b.jsonl").write_bytes(b'{"text": "ok"}\n{"text": "\xe9"}\n')
  with pytest.raises(ValueError, match=r"b\.jsonl:2: not UTF-8: byte 25 .* 0xe9"):
    prepare(_job("b.jsonl"))
  with gzip.open("c.txt.gz", "wb") as file:
    file.write(b"ab\xc3")
  with pytest.raises(ValueError, match=r"c\.txt\.gz: not UTF-8: byte 2 .* 0xc3: unexpected end"):
    prepare(_job("c.txt.gz"))


def test_bytes_that_are_not_utf8_are_replaced_if_asked(caplog):
  pathlib.Path("a.txt").write_bytes(b"ab\xff")
  _jsonl("b.jsonl", ["half \ud800 pair", "fine"])
  with caplog.at_level("WARNING", logger="absl"):
    prepare(_job("a.txt", "b.jsonl", settings=Settings(vocabulary="byte", errors="replace")))
  assert "2 documents with bytes that are not UTF-8, replaced by U+FFFD: a.txt, b.jsonl:1" in (
    caplog.text
  )
  assert _texts() == ["ab\ufffd", "half \ufffd pair", "fine"]


@pytest.mark.parametrize(
  ("line", "message"),
  [
    ('{"text": "a"', r"a\.jsonl:2: not JSON: "),
    ('["text"]', r"a\.jsonl:2: a list, not a JSON object"),
    ('{"n": ' + "9" * 5000 + "}", r"a\.jsonl:2: not JSON: .* digits"),
    ("[" * 100_000, r"a\.jsonl:2: not JSON: .* recursion"),
    ('{"body": "a", "id": 1}', r"a\.jsonl:2: no field 'text'; it has body, id .*--text_field"),
    ('{"text": null}', r"a\.jsonl:2: field 'text' is a NoneType, not a string"),
    ('{"text": "\\ud800"}', r"a\.jsonl:2: character 0 is half of a surrogate pair"),
  ],
)
def test_a_line_that_is_no_document_is_named(line, message):
  pathlib.Path("a.jsonl").write_text('{"text": "fine"}\n' + line + "\n")
  with pytest.raises(ValueError, match=message):
    prepare(_job("a.jsonl"))
  assert not token_store.is_complete("store")


def test_the_field_of_the_text_can_be_named():
  _jsonl("a.jsonl", ["one"], field="body")
  prepare(_job("a.jsonl", settings=Settings(vocabulary="byte", text_field="body")))
  assert _texts() == ["one"]


def test_empty_documents_are_left_out_and_reported(caplog):
  pathlib.Path("a.txt").write_text("")
  pathlib.Path("b.txt").write_text(" \n")
  pathlib.Path("c.jsonl").write_text('{"text": "one"}\n\n{"text": ""}\n')
  pathlib.Path("d.jsonl").write_text("")
  pathlib.Path("e.txt.zst").write_bytes(zstandard.compress(b""))
  with caplog.at_level("WARNING", logger="absl"):
    prepare(_job("*.txt", "*.jsonl", "*.zst"))
  assert _texts() == ["one"]
  assert (
    "6 empty documents left out: a.txt, b.txt, c.jsonl:2, c.jsonl:3, d.jsonl, ..." in caplog.text
  )


def test_inputs_without_any_text_are_an_error():
  pathlib.Path("a.txt").write_text("")
  with pytest.raises(ValueError, match=r"a\.txt: no document with text in it"):
    prepare(_job("a.txt"))


def test_every_nth_document_is_held_out_whole():
  _jsonl("a.jsonl", [f"document {n}" for n in range(7)])
  _jsonl("b.jsonl", [f"document {n}" for n in range(7, 11)])
  prepare(_job("*.jsonl", holdout_every=3, holdout_output="held"))
  assert _texts("held") == [f"document {n}" for n in (2, 5, 8)]
  assert _texts() == [f"document {n}" for n in range(11) if n not in (2, 5, 8)]
  both = [token_store.read_manifest(path) for path in ("store", "held")]
  assert [m.text_bytes for m in both] == [8 * 10 + 1, 3 * 10]


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"output": ""}, "--output '' is no place"),
    ({"output": "a.jsonl"}, "a.jsonl is a file; a token store is a folder"),
    ({"holdout_output": "./store/", "holdout_every": 2}, "'./store/' is --output"),
  ],
)
def test_a_store_needs_a_folder_of_its_own(changes, message):
  _jsonl("a.jsonl", ["one", "two"])
  with pytest.raises(ValueError, match=message):
    prepare(_job("a.jsonl", **changes))
  assert os.listdir() == ["a.jsonl"]


@pytest.mark.parametrize("name", ["tokens", "starts"])
@pytest.mark.parametrize("role", ["output", "holdout_output"])
def test_files_where_the_arrays_of_a_store_go_are_refused_and_not_deleted(name, role):
  file = pathlib.Path(f"corpus/{name}/sub/a.jsonl")
  file.parent.mkdir(parents=True)
  _jsonl(str(file), ["one", "two"])
  changes = {"output": "store", "holdout_output": "held", "holdout_every": 2, role: "corpus"}
  with pytest.raises(ValueError, match=rf"corpus: {name}/sub/a\.jsonl lies where a token store"):
    prepare(_job(str(file), **changes))
  assert file.exists()
  assert os.listdir() == ["corpus"]


def test_too_few_documents_to_hold_one_out_are_an_error():
  _jsonl("a.jsonl", ["one", "two"])
  with pytest.raises(ValueError, match="--holdout_every=3: there are 2 documents"):
    prepare(_job("a.jsonl", holdout_every=3, holdout_output="held"))


def test_unknown_tokens_are_counted_and_reported(tmp_path, caplog):
  tokenizer = {
    "version": "1.0",
    "added_tokens": [],
    "model": {
      "type": "WordLevel",
      "vocab": {"</s>": 0, "<unk>": 1, "a": 2, "b": 3},
      "unk_token": "<unk>",
    },
    "pre_tokenizer": {"type": "Whitespace"},
  }
  pathlib.Path("tokenizer.json").write_text(json.dumps(tokenizer))
  _jsonl("a.jsonl", ["a b c", "c c", "a"])
  settings = Settings(vocabulary="tokenizer.json")
  with caplog.at_level("WARNING", logger="absl"):
    prepare(_job("a.jsonl", settings=settings, holdout_every=2, holdout_output="held"))
  assert token_store.read_manifest("store").num_unknown == 1
  assert token_store.read_manifest("held").num_unknown == 2
  assert "held: 2 tokens are unknown" in caplog.text


MODELS = {
  "WordLevel": {"type": "WordLevel", "vocab": {"</s>": 0, "a": 1}, "unk_token": "<unk>"},
  "WordPiece": {
    "type": "WordPiece",
    "vocab": {"</s>": 0, "a": 1},
    "unk_token": "[UNK]",
    "continuing_subword_prefix": "##",
    "max_input_chars_per_word": 100,
  },
  "Unigram": {"type": "Unigram", "unk_id": None, "vocab": [["</s>", 0.0], ["a", -1.0]]},
  "BPE": {"type": "BPE", "vocab": {"</s>": 0, "a": 1}, "merges": []},
}


def _tokenizer(model: dict) -> Settings:
  tokenizer = {"version": "1.0", "added_tokens": [], "pre_tokenizer": {"type": "WhitespaceSplit"}}
  pathlib.Path("tokenizer.json").write_text(json.dumps({**tokenizer, "model": model}))
  return Settings(vocabulary="tokenizer.json")


@pytest.mark.parametrize("model", list(MODELS))
def test_a_document_that_the_vocabulary_cannot_spell_is_named(model):
  _jsonl("a.jsonl", ["a a", "a b"])
  with pytest.raises(ValueError, match=r"a\.jsonl:2: vocabulary tokenizer\.json: it cannot spell"):
    prepare(_job("a.jsonl", settings=_tokenizer(MODELS[model])))


def test_unknown_tokens_of_a_unigram_model_are_counted():
  vocab = [["</s>", 0.0], ["<unk>", 0.0], ["a", -1.0]]
  _jsonl("a.jsonl", ["a b", "a"])
  settings = _tokenizer({"type": "Unigram", "unk_id": 1, "vocab": vocab})
  prepare(_job("a.jsonl", settings=settings))
  assert token_store.read_manifest("store").num_unknown == 1


def test_stores_keep_the_file_of_their_vocabulary():
  _jsonl("a.jsonl", ["a", "a"])
  settings = _tokenizer({"type": "Unigram", "unk_id": None, "vocab": [["</s>", 0.0], ["a", -1.0]]})
  prepare(_job("a.jsonl", settings=settings, holdout_every=2, holdout_output="held"))
  content = pathlib.Path("tokenizer.json").read_bytes()
  assert token_store.vocabulary_file("store") == token_store.vocabulary_file("held") == content
  pathlib.Path("held/vocabulary_file").write_bytes(content + b" ")
  with pytest.raises(ValueError, match="held: vocabulary_file is not the vocabulary of the tokens"):
    token_store.vocabulary_file("held")
  _jsonl("b.jsonl", ["a"])
  prepare(_job("b.jsonl", output="bytes"))
  assert token_store.vocabulary_file("bytes") == b""


def test_a_finished_store_is_left_alone_and_says_so(caplog):
  _jsonl("a.jsonl", ["one", "two", "three"])
  job = _job("a.jsonl", holdout_every=2, holdout_output="held")
  prepare(job)
  before = {path: path.stat().st_mtime_ns for path in pathlib.Path("store").rglob("*")}
  # As after a fresh checkout: another time, the same content.
  os.utime("a.jsonl", ns=(1, 1))
  with caplog.at_level("INFO", logger="absl"):
    prepare(job)
  assert "store is complete, nothing to do: 2 documents" in caplog.text
  assert {path: path.stat().st_mtime_ns for path in pathlib.Path("store").rglob("*")} == before


@pytest.mark.parametrize(
  ("change", "message"),
  [
    (lambda: _jsonl("a.jsonl", ["one", "twice"]), r"a\.jsonl had \d+ bytes, it has"),
    (lambda: _jsonl("a.jsonl", ["one", "TWO"]), r"a\.jsonl was edited"),
    (lambda: _jsonl("0.jsonl", ["new"]), r"0\.jsonl is new"),
    (lambda: os.rename("b.jsonl", "b.txt"), r"b\.jsonl is not among the inputs"),
  ],
)
def test_a_finished_store_of_other_inputs_is_refused_with_the_reason(change, message):
  _jsonl("a.jsonl", ["one", "two"])
  _jsonl("b.jsonl", ["three"])
  prepare(_job("*.jsonl"))
  change()
  with pytest.raises(ValueError, match=rf"store is complete.* something else: {message}"):
    prepare(_job("*.jsonl"))


def test_a_finished_store_of_other_settings_is_refused_with_the_reason():
  _jsonl("a.jsonl", ["one", "two"])
  prepare(_job("a.jsonl"))
  with pytest.raises(ValueError, match="errors was 'strict', it is 'replace'"):
    prepare(_job("a.jsonl", settings=Settings(vocabulary="byte", errors="replace")))
  with pytest.raises(ValueError, match="holdout_every was 0, it is 2"):
    prepare(_job("a.jsonl", holdout_every=2, holdout_output="held"))
  with pytest.raises(ValueError, match=r"vocabulary was .*'byte'.* it is .*'huggingface'"):
    prepare(_job("a.jsonl", settings=_tokenizer(MODELS["BPE"])))
  for output, origin in (("other", {}), ("third", {"by": "another program"})):
    writer = token_store.Writer(output, BYTE.record, origin=origin)
    writer.append(np.array([254, 255]), np.array([2]), text_bytes=0)
    writer.close()
    with pytest.raises(ValueError, match="it does not say what"):
      prepare(_job("a.jsonl", output=output))


def test_a_finished_store_of_its_inputs_in_another_order_is_refused():
  for name in ("a", "b"):
    pathlib.Path(f"{name}.txt").write_text(name)
  prepare(_job("a.txt", "b.txt"))
  with pytest.raises(ValueError, match="the inputs are in another order"):
    prepare(_job("b.txt", "a.txt"))


def test_a_damaged_finished_store_is_not_called_complete():
  _jsonl("a.jsonl", ["one", "two"])
  prepare(_job("a.jsonl"))
  os.truncate("store/tokens/c/0", 10)
  with pytest.raises(ValueError, match="tokens/c/0 has 10 bytes"):
    prepare(_job("a.jsonl"))


def test_a_missing_held_out_store_is_named():
  _jsonl("a.jsonl", ["one", "two"])
  job = _job("a.jsonl", holdout_every=2, holdout_output="held")
  prepare(job)
  token_store.remove("held")
  with pytest.raises(ValueError, match="its held-out store held is not there"):
    prepare(job)
  # After a kill between the two manifests the other one is missing: both are made again.
  prepare(_job("a.jsonl", output="s2", holdout_every=2, holdout_output="h2"))
  token_store.remove("s2")
  prepare(_job("a.jsonl", output="s2", holdout_every=2, holdout_output="h2"))
  assert _texts("s2") + _texts("h2") == ["one", "two"]


def test_a_held_out_store_that_another_prepare_made_meanwhile_is_not_replaced(monkeypatch):
  _jsonl("a.jsonl", ["one", "two"])
  _jsonl("b.jsonl", ["three", "four"])
  original = job_module._encode

  def encode_slowly(job, *arguments):
    if job.output == "slow":
      prepare(_job("a.jsonl", holdout_every=2, holdout_output="held"))
    return original(job, *arguments)

  monkeypatch.setattr(job_module, "_encode", encode_slowly)
  slow = _job(
    "b.jsonl",
    output="slow",
    holdout_every=2,
    holdout_output="held",
    work_dir=pathlib.Path("slow.partial"),
  )
  with pytest.raises(ValueError, match="held is complete, and it was made of something else"):
    prepare(slow)
  assert _texts("held") == ["two"]
  assert not token_store.is_complete("slow")


@pytest.mark.parametrize("path", ["store", "held"])
def test_a_store_that_another_prepare_is_writing_is_left_to_it(path):
  _jsonl("a.jsonl", ["one", "two"])
  job = _job("a.jsonl", holdout_every=2, holdout_output="held")
  busy = pytest.raises(ValueError, match=f"{path}: another prepare is at work here")
  with parts.held(pathlib.Path(path) / "store.lock"), busy:
    prepare(job)
  prepare(job)
  assert _texts() + _texts("held") == ["one", "two"]
  assert sorted(os.listdir("store")) == ["manifest.json", "starts", "tokens"]


def test_one_large_jsonl_is_shared_among_workers_without_changing_the_store(monkeypatch):
  texts = [f"document {n}: " + "x" * (n % 50) for n in range(3000)]
  _jsonl("a.jsonl", texts)
  prepare(_job("a.jsonl", output="whole"))
  monkeypatch.setattr(documents, "PIECE_BYTES", 10_000)
  monkeypatch.setattr(job_module, "_BYTES_PER_WORKER", 1)
  assert len(documents.pieces("a.jsonl")) > 5
  prepare(_job("a.jsonl", num_workers=2))
  assert _texts() == texts
  left, right = (token_store.read_manifest(path) for path in ("whole", "store"))
  assert left.fingerprint == right.fingerprint


def test_a_fault_in_a_later_piece_has_the_line_of_the_file(monkeypatch):
  lines = [json.dumps({"text": str(n) * 20}) for n in range(500)]
  lines[400] = "{"
  pathlib.Path("a.jsonl").write_text("\n".join(lines))
  monkeypatch.setattr(documents, "PIECE_BYTES", 1000)
  with pytest.raises(ValueError, match=r"a\.jsonl:401: not JSON"):
    prepare(_job("a.jsonl"))


def test_after_an_error_what_was_done_is_not_done_again(monkeypatch):
  _jsonl("a.jsonl", ["one"])
  pathlib.Path("b.txt").write_bytes(b"\xff")
  with pytest.raises(ValueError, match=r"b\.txt: not UTF-8"):
    prepare(_job("a.jsonl", "b.txt"))
  pathlib.Path("b.txt").write_text("two")
  encoded = []
  original = job_module.encode.encode_all

  def spy(named, **arguments):
    encoded.extend(piece.path for piece, _ in named)
    original(named, **arguments)

  monkeypatch.setattr(job_module.encode, "encode_all", spy)
  prepare(_job("a.jsonl", "b.txt"))
  assert encoded == ["b.txt"]
  assert _texts() == ["one", "two"]


def test_the_working_folder_keeps_what_is_not_ours():
  pathlib.Path("mine").mkdir()
  pathlib.Path("mine/notes.json").write_text("{}")
  pathlib.Path("mine/lock").write_text("of mine")
  _jsonl("a.jsonl", ["one"])
  prepare(_job("a.jsonl", work_dir=pathlib.Path("mine")))
  assert sorted(os.listdir("mine")) == ["lock", "notes.json"]
  assert pathlib.Path("mine/lock").read_text() == "of mine"


def _command(*arguments: str) -> list[str]:
  return [sys.executable, "-m", "launch.prepare", *arguments]


def _run(*arguments: str, cwd: pathlib.Path) -> subprocess.CompletedProcess[str]:
  environment = {**os.environ, "PYTHONPATH": str(ROOT)}
  return subprocess.run(
    _command(*arguments), cwd=cwd, env=environment, capture_output=True, text=True, timeout=100
  )


def test_the_command_reports_one_line_and_its_exit_status(tmp_path):
  _jsonl("a.jsonl", ["one", "two"])
  done = _run("--input=a.jsonl", "--output=store", cwd=tmp_path)
  assert done.returncode == 0, done.stderr
  assert "store is made: 2 documents, 10 tokens, 6 bytes of text" in done.stderr
  wrong = _run("--input=b*.jsonl", "--output=other", cwd=tmp_path)
  assert wrong.returncode == 1
  assert "nothing matches" in wrong.stderr
  assert "Traceback" not in wrong.stderr
  for flags in (["--holdout_every=3"], ["--holdout_output=h"], ["--output=gs://bucket/s"]):
    wrong = _run("--input=a.jsonl", "--output=other", *flags, cwd=tmp_path)
    assert wrong.returncode == 1
    assert "Traceback" not in wrong.stderr


@pytest.mark.parametrize("workers", [1, 2])
def test_a_full_disk_is_named_and_the_unfinished_file_goes_away(tmp_path, workers):
  for name in ("a.txt", "b.txt"):
    pathlib.Path(name).write_text("x" * 5_000_000)
  arguments = ["--input=*.txt", "--output=store", f"--workers={workers}"]
  environment = {**os.environ, "PYTHONPATH": str(ROOT)}
  # A limit on the size of files fails like a full disk: in the middle of a write.
  command = ["sh", "-c", 'ulimit -f 2000; exec "$@"', "sh", *_command(*arguments)]
  full = subprocess.run(
    command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=100
  )
  assert full.returncode == 1
  assert "'store.partial'; free space, the same command goes on from here" in full.stderr
  assert "Traceback" not in full.stderr
  assert os.listdir("store.partial") == ["prepare.lock"]
  assert _run(*arguments, cwd=tmp_path).returncode == 0
  assert [len(text) for text in _texts()] == [5_000_000] * 2


def test_inputs_may_lie_around_the_store():
  pathlib.Path("text").mkdir()
  pathlib.Path("text/a.txt").write_text("one")
  pathlib.Path("text/b.txt").write_bytes(b"\xff")
  job = _job(
    "text/**",
    output="text/store",
    holdout_every=2,
    holdout_output="text/held",
    work_dir=pathlib.Path("text/store.partial"),
  )
  with pytest.raises(ValueError, match=r"b\.txt: not UTF-8"):
    prepare(job)
  # In each state: parts in the working folder, a store that is not finished, all done.
  pathlib.Path("text/b.txt").write_text("two")
  token_store.Writer("text/store", BYTE.record)
  for _ in range(2):
    prepare(job)
    assert _texts("text/store") + _texts("text/held") == ["one", "two"]
  pathlib.Path("text/table.csv").write_text("x")
  with pytest.raises(ValueError, match=r"table\.csv: not one of"):
    prepare(job)


@pytest.mark.parametrize("seed", range(3))
def test_killed_at_any_moment_it_goes_on_to_the_same_store(tmp_path, seed):
  rng = np.random.default_rng(seed)
  for file in range(12):
    _jsonl(f"{file:02d}.jsonl", ["word " * int(n) for n in rng.integers(1, 400, 400)])
  prepare(_job("*.jsonl", output="straight", holdout_every=5, holdout_output="straight_held"))
  arguments = ["--input=*.jsonl", "--output=store", "--holdout_every=5", "--holdout_output=held"]
  environment = {**os.environ, "PYTHONPATH": str(ROOT)}
  kills = 0
  for attempt in range(3):
    process = subprocess.Popen(
      _command(*arguments), cwd=tmp_path, env=environment, stderr=subprocess.DEVNULL
    )
    # From the first sign of work on; imports take much longer than the work.
    deadline = time.monotonic() + 60
    while not pathlib.Path("store.partial").exists() and process.poll() is None:
      assert time.monotonic() < deadline
      time.sleep(0.001)
    # The first at once: at any later moment a fast machine may have finished.
    time.sleep(float(rng.uniform(0, 0.25)) if attempt else 0.0)
    if seed == attempt == 0:
      process.send_signal(signal.SIGINT)  # Ctrl-C: a line and no traceback
      assert process.wait() == 130
      kills += 1
      continue
    process.send_signal(signal.SIGKILL)
    kills += process.wait() == -signal.SIGKILL
  done = _run(*arguments, cwd=tmp_path)
  assert done.returncode == 0, done.stderr
  for path, straight in (("store", "straight"), ("held", "straight_held")):
    TokenStore(path)
    left, right = token_store.read_manifest(path), token_store.read_manifest(straight)
    assert left.fingerprint == right.fingerprint
    assert left.origin == right.origin
  assert kills
