"""What the README says is what the code has."""

import pathlib
import re
import subprocess

from train.telemetry.metrics import FIELDS, fields_table

ROOT = pathlib.Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def test_every_console_field_is_explained():
  """If this fails, put the output of train.telemetry.metrics.fields_table() into the README."""
  assert fields_table().strip() in README


def test_the_lines_it_shows_have_todays_fields():
  shown = [
    re.findall(r"\| ([a-zA-Z/]+) ", line)
    for line in README.splitlines()
    if re.search(r"step +\d+/\d+ \| loss", line)
  ]
  assert len(shown) > 5
  # A run on CPUs to which nothing bad has happened.
  left_out = {"eval", "bits/byte", "MFU", "skipped", "passed over"}
  fields = [field.label for field in FIELDS if field.label and field.label not in left_out]
  assert all(names == fields for names in shown)


def test_what_its_commands_write_leaves_a_checkout_clean(tmp_path):
  """launch/tpu.sh and slurm.sh ship commits: they refuse a checkout with files of its own."""
  (tmp_path / ".gitignore").write_bytes((ROOT / ".gitignore").read_bytes())
  written = {"report.html", "plan.html", "launch/cluster.env", ".venv/bin", "runs/smoke/loss.png"}
  assert all(name in README for name in ("writes report.html", "--html=plan.html", "cluster.env"))
  for words in (["init", "--quiet"], ["check-ignore", *written]):
    done = subprocess.run(["git", "-C", tmp_path, *words], capture_output=True, text=True)
  assert set(done.stdout.split()) == written


def test_every_command_and_file_it_names_exists():
  modules = set(re.findall(r"python -m ([\w.]+)", README))
  assert {"launch.prepare", "launch.train", "launch.generate"} <= modules
  for module in modules:
    assert (ROOT / (module.replace(".", "/") + ".py")).is_file(), module
  for path in re.findall(r"`((?:configs|tests|train|models|docs)/[\w/]+\.(?:py|md))", README):
    assert (ROOT / path).exists(), path
  targets = set(re.findall(r"make (train|test|lint)\b", README))
  makefile = (ROOT / "Makefile").read_text()
  assert targets == {"train", "test", "lint"}
  assert all(re.search(rf"^{target}:", makefile, re.MULTILINE) for target in targets)


def test_an_extra_that_there_is_not_installs_nothing():
  """pip would only warn, and a machine with GPUs would train on its CPU."""
  command = ["make", "--dry-run", "--directory", ROOT, "train"]
  for extra, status in (("gpu", 2), ("cuda", 0)):
    done = subprocess.run([*command, f"EXTRA={extra}"], capture_output=True, text=True)
    assert done.returncode == status, done.stderr
    assert (f"EXTRA={extra} is none of cpu tpu cuda" in done.stderr) is (status == 2)
