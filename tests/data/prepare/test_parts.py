"""Parts of an unfinished store: which are used again, how they are joined, who may use them."""

import contextlib
import fcntl
import os
import pathlib
import signal
import subprocess
import time

import pytest

from data import token_store
from data.prepare import job as job_module
from data.prepare import parts
from data.prepare.encode import Settings
from data.prepare.job import prepare
from tests.data.prepare.test_prepare import ROOT, _command, _job, _jsonl, _texts


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)


def _stop_before_last(*inputs: str) -> None:
  """Runs a prepare that fails at last.txt and leaves the other parts; then repairs last.txt."""
  pathlib.Path("last.txt").write_bytes(b"\xff")
  with pytest.raises(ValueError, match=r"last\.txt: not UTF-8"):
    prepare(_job(*inputs, "last.txt"))
  pathlib.Path("last.txt").write_text("last")


def test_a_part_of_a_file_that_was_edited_since_is_not_used():
  _jsonl("a.jsonl", ["one"])
  _stop_before_last("a.jsonl")
  _jsonl("a.jsonl", ["TWO"])
  os.utime("a.jsonl", ns=(1, 1))
  prepare(_job("a.jsonl", "last.txt"))
  assert _texts() == ["TWO", "last"]


def test_a_part_of_other_settings_is_not_used():
  pathlib.Path("a.jsonl").write_text('{"text": "one", "body": "TWO"}\n')
  _stop_before_last("a.jsonl")
  prepare(_job("a.jsonl", "last.txt", settings=Settings(vocabulary="byte", text_field="body")))
  assert _texts() == ["TWO", "last"]


@pytest.mark.parametrize("suffix", ["tokens", "sizes"])
def test_a_part_that_is_cut_off_is_made_again(suffix):
  _jsonl("a.jsonl", ["one", "two"])
  _stop_before_last("a.jsonl")
  (part,) = pathlib.Path("store.partial").glob(f"*.{suffix}")
  # Of the sizes a whole document, so that what is left can be read.
  os.truncate(part, part.stat().st_size - (24 if suffix == "sizes" else 1))
  prepare(_job("a.jsonl", "last.txt"))
  assert _texts() == ["one", "two", "last"]


@pytest.mark.parametrize("block_tokens", [1, 25, 60])
def test_a_part_of_many_blocks_is_put_together_without_loss(block_tokens, monkeypatch):
  monkeypatch.setattr(parts, "_BLOCK_TOKENS", block_tokens)
  texts = [f"document {n}" for n in range(20)]
  _jsonl("a.jsonl", texts)
  prepare(_job("a.jsonl", holdout_every=3, holdout_output="held"))
  assert _texts("held") == texts[2::3]
  assert _texts() == [text for n, text in enumerate(texts) if n % 3 != 2]


def test_a_file_that_changes_while_it_is_read_is_named(monkeypatch):
  _jsonl("a.jsonl", ["one"])
  original = job_module.encode.encode_all

  def encode_and_grow(named, **arguments):
    original(named, **arguments)
    with open("a.jsonl", "a") as file:
      file.write('{"text": "two"}\n')

  monkeypatch.setattr(job_module.encode, "encode_all", encode_and_grow)
  with pytest.raises(ValueError, match=r"a\.jsonl: it was changed while it was read"):
    prepare(_job("a.jsonl"))
  assert not token_store.is_complete("store")


def test_ended_before_the_held_out_store_is_complete_it_goes_on(monkeypatch):
  _jsonl("a.jsonl", ["one", "two"])
  job = _job("a.jsonl", holdout_every=2, holdout_output="held")
  original = token_store.Writer.close

  def close(writer):
    if writer._path == "held":
      raise KeyboardInterrupt
    return original(writer)

  with monkeypatch.context() as patch:
    patch.setattr(token_store.Writer, "close", close)
    with pytest.raises(KeyboardInterrupt):
      prepare(job)
  prepare(job)
  assert _texts() + _texts("held") == ["one", "two"]


def test_workers_end_with_a_prepare_that_is_killed():
  for number in range(40):
    with open(f"{number:02d}.txt", "wb") as file:
      file.truncate(1 << 23)
  process = subprocess.Popen(
    _command("--input=*.txt", "--output=store", "--workers=2"),
    env={**os.environ, "PYTHONPATH": str(ROOT)},
    stderr=subprocess.DEVNULL,
    start_new_session=True,
  )
  try:
    _wait_until(lambda: any(pathlib.Path("store.partial").glob("*.json")))
    assert len(_alive(process.pid)) >= 3
    process.kill()
    assert process.wait() == -signal.SIGKILL
    _wait_until(lambda: not _alive(process.pid))
  finally:
    with contextlib.suppress(ProcessLookupError):
      os.killpg(process.pid, signal.SIGKILL)


def test_a_lock_that_its_holder_removed_since_it_was_opened_is_taken_anew(tmp_path, monkeypatch):
  path = tmp_path / "work" / "lock"
  first = parts.held(path)
  first.__enter__()
  flock, has_ended = fcntl.flock, []

  def after_the_first_has_ended(file, how):
    if not has_ended:
      has_ended.append(True)
      first.__exit__(None, None, None)
      path.parent.rmdir()
    flock(file, how)

  monkeypatch.setattr(fcntl, "flock", after_the_first_has_ended)
  with parts.held(path):
    assert path.exists()
    with pytest.raises(ValueError, match="another prepare is at work"), parts.held(path):
      pass
  assert not path.exists()


def test_without_locks_a_prepare_says_so_and_goes_on(tmp_path, monkeypatch, caplog):
  def refuse(file, how):
    raise OSError("locks are not supported")

  monkeypatch.setattr(fcntl, "flock", refuse)
  with caplog.at_level("WARNING", logger="absl"), parts.held(tmp_path / "lock"):
    assert f"{tmp_path}: this file system has no locks (locks are not supported)" in caplog.text
  assert not list(tmp_path.iterdir())


def _wait_until(condition) -> None:
  deadline = time.monotonic() + 30
  while not condition():
    assert time.monotonic() < deadline
    time.sleep(0.02)


def _alive(group: int) -> list[int]:
  """The processes of a group, without zombies."""
  found = []
  for path in pathlib.Path("/proc").glob("[0-9]*/stat"):
    with contextlib.suppress(OSError):
      state, _, process_group, *_ = path.read_text().rpartition(")")[2].split()
      if int(process_group) == group and state != "Z":
        found.append(int(path.parent.name))
  return found
