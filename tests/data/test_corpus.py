"""The shipped corpus is what its README says."""

import hashlib
import json
import pathlib
import re

import pytest
import zstandard

CORPUS = pathlib.Path(__file__).parents[2] / "data" / "corpus"
FILES = sorted(CORPUS.glob("*.jsonl.zst"))
ROW = re.compile(r"^\| (\S+\.zst) \| ([\d,]+) \| ([\d,]+) \| ([\d,]+) \| ([0-9a-f]{64}) \|$", re.M)


def _documents(path: pathlib.Path) -> list[dict[str, str]]:
  with zstandard.open(path, "rt", encoding="utf-8", newline="\n") as lines:
    return [json.loads(line) for line in lines]


def test_the_readme_lists_every_file():
  rows = ROW.findall((CORPUS / "README.md").read_text())
  assert [row[0] for row in rows] == [path.name for path in FILES]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_a_file_is_the_one_the_readme_describes(path):
  rows = {row[0]: row[1:] for row in ROW.findall((CORPUS / "README.md").read_text())}
  documents = _documents(path)
  num_bytes = sum(len(document["text"].encode()) for document in documents)
  data = path.read_bytes()
  found = (f"{len(documents):,}", f"{num_bytes:,}", f"{len(data):,}")
  assert (*found, hashlib.sha256(data).hexdigest()) == rows[path.name]


def test_documents_are_text_and_each_is_there_once():
  documents = [document for path in FILES for document in _documents(path)]
  assert all(set(document) == {"id", "text"} for document in documents)
  assert all(len(document["text"]) > 200 for document in documents)
  assert len({document["id"] for document in documents}) == len(documents)
  assert len({document["text"] for document in documents}) == len(documents)
  # The model would learn leftover Markdown, or an escape that was not undone.
  assert not [d["id"] for d in documents if re.search(r"\*\*|^#|\\", d["text"], re.MULTILINE)]


def test_the_corpus_stays_small_enough_for_git():
  sizes = [path.stat().st_size for path in FILES]
  assert max(sizes) < 3_000_000
  assert sum(sizes) < 5_000_000
