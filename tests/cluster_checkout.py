"""A committed checkout of the launch scripts, and stand-ins for programs of a cluster's hosts."""

import os
import pathlib
import subprocess

ROOT = pathlib.Path(__file__).parents[1]
# `make` leaves a python that runs the test's job, $CLOUD/job.sh.
PROGRAMS = {
  "hostname": 'echo "$HOST"',
  "python3.11": "true",
  "make": """
    echo "$HOST $*" >>"$CLOUD/made"
    mkdir -p .venv/bin && printf '#!/bin/bash\\nexec bash "$CLOUD/job.sh" "$@"\\n' >.venv/bin/python
    chmod +x .venv/bin/python && touch "${@: -1}"
  """,
}


def make_checkout(folder: pathlib.Path) -> pathlib.Path:
  """A repository in `folder` with our launch scripts, committed."""
  (folder / "launch").mkdir()
  for path in [
    *(ROOT / "launch").glob("*.sh"),
    ROOT / "pyproject.toml",
    ROOT / "requirements.lock",
  ]:
    copy = folder / path.relative_to(ROOT)
    copy.write_bytes(path.read_bytes())
    copy.chmod(0o755)
  git(folder, "init", "--quiet")
  git(folder, "add", "--all")
  git(folder, "commit", "--quiet", "--message", "a commit")
  return folder


def git(folder: pathlib.Path, *words: str) -> str:
  who = ["-c", "user.name=test", "-c", "user.email=test@localhost"]
  return subprocess.check_output(["git", "-C", folder, *who, *words], text=True).strip()


def environment(folder: pathlib.Path, programs: dict[str, str]) -> dict[str, str]:
  """Environment variables of a shell that finds `programs` (name -> bash text) and has $CLOUD."""
  (folder / "bin").mkdir()
  (folder / "tmp").mkdir()
  for name, text in {**PROGRAMS, **programs}.items():
    (folder / "bin" / name).write_text(f"#!/bin/bash\n{text}\n")
    (folder / "bin" / name).chmod(0o755)
  path = f"{folder / 'bin'}:{os.environ['PATH']}"
  return {**os.environ, "PATH": path, "CLOUD": str(folder), "TMPDIR": str(folder / "tmp")}


class Script:
  """A script of launch/ with an env_file, run against what is pretended in a folder."""

  def __init__(
    self, name: str, env_file: pathlib.Path, checkout: pathlib.Path, environment: dict[str, str]
  ):
    self.name, self.env_file, self.folder = name, env_file, env_file.parent
    self.checkout, self.environment = checkout, environment

  def command(self, *words: str) -> list[str]:
    script = str(self.checkout / "launch" / self.name)
    return ["bash", script, words[0], f"--env_file={self.env_file}", *words[1:]]

  def run(self, *words: str, status: int = 0) -> str:
    """What it printed, stdout and then stderr, after checking its exit status."""
    done = subprocess.run(
      self.command(*words), env=self.environment, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == status, done.stdout + done.stderr
    return done.stdout + done.stderr


def golden_flags(name: str) -> dict[str, set[str]]:
  """command -> its flags, of a file in tests/golden with lines `COMMAND: --FLAG ...`."""
  lines = (ROOT / "tests/golden" / name).read_text().splitlines()
  pairs = [line.split(":", 1) for line in lines if not line.startswith("#")]
  return {command: set(flags.split()) for command, flags in pairs}
