"""The XPK command in launch/gke.md is one that xpk takes, and starts what it should."""

import re
import shlex

from tests.cluster_checkout import ROOT

PAGE = (ROOT / "launch/gke.md").read_text()
LINES = (ROOT / "tests/golden/xpk_flags.txt").read_text().splitlines()
# flag -> [switch or value, and required or one-of if it is]
FLAGS = {flag: kind for flag, *kind in (line.split() for line in LINES if line[0] != "#")}


def _command() -> dict[str, str | None]:
  """The flags of the command in the document, with their values."""
  (block,) = re.findall(r"```sh\n(xpk workload create.*?)```", PAGE, re.DOTALL)
  words = shlex.split(block.replace("\\\n", " "))
  assert words[:3] == ["xpk", "workload", "create"]
  pairs = [word.partition("=") for word in words[3:]]
  return {flag: value if equals else None for flag, equals, value in pairs}


def test_xpk_takes_the_command():
  command = _command()
  assert not set(command) - set(FLAGS)
  for flag, value in command.items():
    assert (value is None) == (FLAGS[flag][0] == "switch"), flag
  assert {flag for flag, kind in FLAGS.items() if kind[1:] == ["required"]} <= set(command)
  assert len([flag for flag in command if FLAGS[flag][1:] == ["one-of"]]) == 1


def test_it_starts_our_program_so_that_it_can_save_and_come_back():
  command = _command()
  words = shlex.split(command["--command"])
  assert words[:4] == ["exec", "python", "-m", "launch.supervise"]
  train = words[words.index("--") + 1 :]
  assert train[:3] == ["python", "-m", "launch.train"]
  supervised, place = [word.partition("=")[2] for word in words if word.startswith("--workdir=")]
  assert supervised == place
  assert place.startswith("gs://")
  config = next(word for word in train if word.startswith("--config="))
  assert (ROOT / config.removeprefix("--config=").split(":")[0]).is_file()
  assert command["--restart-on-exit-codes"].split(",") == ["75"]
  assert int(command["--max-restarts"]) > 0


def test_the_image_has_what_the_command_needs():
  text = (ROOT / "launch/Dockerfile").read_text()
  assert "ENV PATH=/code/.venv/bin" in text  # the command says `python`
  for name in re.search(r"COPY (.*) \./\n", text).group(1).split():
    assert (ROOT / name).is_file()
