"""A workdir in a bucket: tokens, metrics, restarts and bad steps, with a Cloud Storage on this
machine."""

import json
import os
import pathlib
import signal
import socket
import subprocess
import sys
import time

import numpy as np
import pytest

from data import token_store
from data.token_store import TokenStore
from tests import faulty_config, tiny
from tests.commands import ROOT, Commands
from tests.fake_gcs import serving
from tests.faulty_config import NAN
from train.checkpoint.storage import steps
from train.workdir import mirror

URL = "gs://bucket/run"
PLACE = f"{URL}/checkpoints"
CONFIG = """
import dataclasses
from tests import tiny_config
from train.checkpoint.checkpoints import CheckpointConfig

def get_config(source):
  run = tiny_config.get_config({folder!r})
  data = dataclasses.replace(run.data, sources=((source, 1.0),))
  saving = CheckpointConfig(every_steps=5)
  return dataclasses.replace(run, data=data, total_steps=20, checkpoint=saving)
"""
# Saves a step more than the last time, and ends with 76 until there are four.
SAVES = """
import json, sys, urllib.request
url = sys.argv[1]
open_url = urllib.request.build_opener(urllib.request.ProxyHandler({})).open
def ask(path, data=None):
  return json.load(open_url(url + path, data))
names = ask("/storage/v1/b/bucket/o?prefix=run/checkpoints/")["items"]
name = f"run/checkpoints/{len(names) + 1:08d}.json"
ask(f"/upload/storage/v1/b/bucket/o?name={name}", b"{}")
sys.exit(76 if len(names) < 4 else 0)
"""


@pytest.fixture(scope="module")
def server():
  with serving() as server:
    yield server


@pytest.fixture(autouse=True)
def empty(server):
  server.refuse = None
  server.objects.clear()


@pytest.fixture(scope="module")
def commands(server):
  commands = Commands()
  yield commands
  commands.close()


def test_small_files_follow_and_come_back(server, tmp_path):
  here, there = tmp_path / "here", tmp_path / "there"
  (here / "tensorboard").mkdir(parents=True)
  with mirror.Mirror(here, URL):
    (here / "metrics.jsonl").write_text("1\n")
    (here / "tensorboard/events").write_text("x")
  assert server.names() == ["run/files/metrics.jsonl", "run/files/tensorboard/events"]
  there.mkdir()
  with mirror.Mirror(there, URL):
    assert (there / "metrics.jsonl").read_text() == "1\n"
    with (there / "metrics.jsonl").open("a") as file:
      file.write("2\n")
  with (here / "metrics.jsonl").open("a") as file:
    file.write("other\n")
  with mirror.Mirror(here, URL):
    assert (here / "metrics.jsonl").read_text() == "1\n2\n"
  (here / "metrics.jsonl").write_text("1\n2\n3\n")  # not copied when it was killed
  with mirror.Mirror(here, URL):
    assert (here / "metrics.jsonl").read_text() == "1\n2\n3\n"
  # Another machine has gone on, and what is here was written anew, not appended to.
  (there / "passed_over.json").write_text("[1]")
  (here / "passed_over.json").write_text("[2]")
  (here / "failure.json").write_text("{}")
  with mirror.Mirror(here, URL):
    pass
  with mirror.Mirror(there, URL):
    assert (there / "passed_over.json").read_text() == "[2]"
    assert not (there / "failure.json").exists()  # of the other machine's supervisor
    (there / "passed_over.json").write_text("[2, 3]")
  # Killed before it was copied: here is what is newer.
  (there / "passed_over.json").write_text("[4]")
  with mirror.Mirror(there, URL):
    assert (there / "passed_over.json").read_text() == "[4]"


def test_a_file_that_cannot_be_copied_now_holds_up_no_other_and_is_copied_later(server, tmp_path):
  for name in ("a.json", "b.json", "c.json.tmp"):
    (tmp_path / name).write_text("old")
  with mirror.Mirror(tmp_path, URL) as copies:
    server.refuse = "a.json"
    copies.copy()
    assert server.names() == ["run/files/b.json"]
    server.refuse = None
    copies.copy()
    assert server.names() == ["run/files/a.json", "run/files/b.json"]
    (tmp_path / "a.json").write_text("new")  # as long as before
    copies.copy()
    assert server.objects["bucket", "run/files/a.json"][0] == b"new"


def test_a_run_in_a_bucket_ends_like_one_in_a_folder(server, commands, tmp_path):
  """Its tokens are in the bucket too; killed, and continued by a machine without its files."""
  tiny.run(tmp_path)
  store = token_store.TokenStore(str(tmp_path / "train"))
  tokens = store.read(np.array([0]), store.manifest.num_tokens)[0]
  documents = np.split(tokens, store.starts[1:])
  token_store.write(
    "gs://bucket/train",
    documents,
    store.manifest.vocabulary,
    text_bytes=store.manifest.text_bytes,
  )
  (tmp_path / "config.py").write_text(CONFIG.format(folder=str(tmp_path)))
  config = f"--config={tmp_path / 'config.py'}"
  status, output = commands.run(
    "launch.train",
    [f"{config}:{tmp_path / 'train'}", f"--workdir={tmp_path / 'plain'}"],
    tmp_path / "plain.txt",
  )
  assert status == 0, output
  ours = [f"{config}:gs://bucket/train", f"--workdir={URL}"]
  pid = commands.start(
    "launch.train", [*ours, f"--local_workdir={tmp_path / 'first'}"], tmp_path / "first.txt"
  )
  deadline = time.monotonic() + 60
  while not steps(PLACE):
    assert time.monotonic() < deadline, (tmp_path / "first.txt").read_text()
    time.sleep(0.02)
  os.kill(pid, signal.SIGKILL)
  commands.wait(pid)
  status, output = commands.run(
    "launch.train", [*ours, f"--local_workdir={tmp_path / 'second'}"], tmp_path / "second.txt"
  )
  assert status == 0, output
  assert "restored" in output
  metrics = server.objects["bucket", "run/files/metrics.jsonl"][0].decode().splitlines()
  plain = (tmp_path / "plain/metrics.jsonl").read_text().splitlines()
  # Each step once and in order: what the first machine wrote up to its checkpoint is not lost.
  losses = [(r["step"], r["train/loss"]) for r in map(json.loads, metrics)]
  assert losses == [(r["step"], r["train/loss"]) for r in map(json.loads, plain)]
  assert {"run/files/config.json", "run/files/loss.png"} <= set(server.names())


def test_two_machines_roll_back_though_only_one_has_the_workdirs_files(server, commands, tmp_path):
  tiny.run(tmp_path)  # its stores
  faulty_config.store(tmp_path / "marked", {50: NAN})  # in batch 3, in a row of process 1
  train = [f"--config=tests/faulty_config.py:{tmp_path}", f"--workdir={URL}"]
  train += ["--config.total_steps=12", "--config.bad_steps.non_finite=rollback"]
  with socket.socket() as listener:
    listener.bind(("127.0.0.1", 0))
    port = listener.getsockname()[1]
  together = ["--config.mesh.fsdp=2", "--heartbeat_seconds=10", "--num_processes=2"]
  together += [f"--coordinator=127.0.0.1:{port}"]
  pids = [
    commands.start(
      "launch.train",
      [*train, *together, f"--process_id={index}", f"--local_workdir={tmp_path / str(index)}"],
      tmp_path / f"{index}.txt",
    )
    for index in range(2)
  ]
  statuses = [commands.wait(pid, seconds=60.0) for pid in pids]
  assert statuses == [0, 0], (tmp_path / "0.txt").read_text() + (tmp_path / "1.txt").read_text()
  notes = json.loads(server.objects["bucket", "run/files/passed_over.json"][0])["rollbacks"]
  assert [note["batches"] for note in notes] == [[3]]
  metrics = server.objects["bucket", "run/files/metrics.jsonl"][0].decode().splitlines()
  assert [json.loads(line)["step"] for line in metrics] == list(range(1, 13))
  # A third machine looks at it.
  status, shown = commands.run(
    "launch.train",
    [*train, f"--local_workdir={tmp_path / 'third'}", "--replay_step=4"],
    tmp_path / "replay.txt",
  )
  assert status == 0, shown
  assert "step 4, batch 3, run again from the beginning" in shown
  assert "loss       nan, bit for bit what the run told" in shown


def _supervise(folder: pathlib.Path, *command: str) -> tuple[int, str]:
  options = [f"--workdir={URL}", f"--local_workdir={folder}", "--backoff_seconds=0.01"]
  done = subprocess.run(
    [sys.executable, "-m", "launch.supervise", *options, "--max_restarts=2", "--", *command],
    cwd=ROOT,
    capture_output=True,
    text=True,
    timeout=60,
    check=False,
  )
  return done.returncode, done.stdout


def test_a_supervisor_sees_progress_in_the_bucket_and_failures_beside_it(server, tmp_path):
  server.objects["bucket", "run/checkpoints/lock"] = (b"process 1 on elsewhere", 5)
  python = [sys.executable, "-S", "-c"]
  status, output = _supervise(tmp_path, *python, SAVES, server.url)
  assert (status, output.count("at step")) == (0, 3), output
  assert "at step 4; restart 1 of 2" in output
  fails = "import pathlib, sys; pathlib.Path(sys.argv[1]).write_text(sys.argv[2]); sys.exit(1)"
  failure = json.dumps({"step": 9, "error": "ValueError: no"})
  status, output = _supervise(tmp_path, *python, fails, str(tmp_path / "failure.json"), failure)
  assert status == 1
  assert "giving up: the same failure 3 times at step 9: ValueError: no" in output


def test_a_token_store_is_prepared_in_a_bucket_and_gone_on_with(server, commands, tmp_path):
  (tmp_path / "a.txt").write_text("one thousand words")
  (tmp_path / "b.jsonl").write_text("".join(f'{{"text": "number {n}"}}\n' for n in range(50)))
  prepare = [f"--input={tmp_path}/*.*", "--holdout_every=5", "--workers=1"]
  here = [f"--output={tmp_path}/train", f"--holdout_output={tmp_path}/eval"]
  there = ["--output=gs://bucket/train", "--holdout_output=gs://bucket/eval"]
  status, output = commands.run("launch.prepare", [*prepare, *there], tmp_path / "output")
  assert status == 1
  assert "is remote: give a local folder with --work_dir" in output
  there.append(f"--work_dir={tmp_path}/work")
  server.refuse = "train/manifest.json"
  status, output = commands.run("launch.prepare", [*prepare, *there], tmp_path / "output")
  assert status == 1, output
  assert "403" in output
  server.refuse = None
  assert not token_store.is_complete("gs://bucket/train")
  status, output = commands.run("launch.prepare", [*prepare, *there], tmp_path / "output")
  assert status == 0, output
  assert "2 of 2 pieces are there already" in output
  status, output = commands.run("launch.prepare", [*prepare, *there], tmp_path / "output")
  assert status == 0
  assert "gs://bucket/train is complete, nothing to do" in output
  status, output = commands.run("launch.prepare", [*prepare, *here], tmp_path / "output")
  assert status == 0, output
  for name in ("train", "eval"):
    local, remote = TokenStore(str(tmp_path / name)), TokenStore(f"gs://bucket/{name}")
    remote.verify()
    assert remote.manifest.fingerprint == local.manifest.fingerprint
    files = [path for path in (tmp_path / name).rglob("*") if path.is_file()]
    assert server.names(name) == sorted(p.relative_to(tmp_path).as_posix() for p in files)
