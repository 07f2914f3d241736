"""The commands that pages show: found in their Markdown, parsed as the shell and our programs do.

A block of commands is fenced as `sh`. A paragraph "Needs: ..." right above it names what the
commands need beyond a checkout in which `make train` has run.
"""

import ast
import functools
import pathlib
import re
import shlex
import subprocess
from typing import NamedTuple

from absl import flags
from ml_collections import config_flags

from launch import overrides
from sharding import machine
from sharding.mesh import parse_mesh

ROOT = pathlib.Path(__file__).parents[1]
PAGES = [
  ROOT / "README.md",
  *sorted((ROOT / "docs").glob("*.md")),
  ROOT / "data/corpus/README.md",
  ROOT / "launch/gke.md",
]
_FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_SPAN = re.compile(r"`([^`]+)`")
# Programs of others, which are not checked; launch/gke.md has a test of its own for xpk.
_OTHERS = (".", "docker", "git", "kubectl", "pip", "unzip", "xpk")


class Block(NamedTuple):
  """A fenced block: its language, its text, and what the paragraph above says that it needs."""

  language: str
  text: str
  needs: str


def blocks(page: str) -> list[Block]:
  """The fenced blocks of a page, in order."""
  found = []
  for match in _FENCE.finditer(page):
    above = page[: match.start()].rstrip().rpartition("\n\n")[2].replace("\n", " ")
    needs = above.removeprefix("Needs: ") if above.startswith("Needs: ") else ""
    found.append(Block(match[1], match[2], needs))
  return found


def spans(page: str) -> list[str]:
  """What stands between backticks outside of the fenced blocks, each in one line."""
  return [" ".join(span.split()) for span in _SPAN.findall(without_blocks(page))]


def without_blocks(page: str) -> str:
  """A page without its fenced blocks."""
  return _FENCE.sub("", page)


def commands(text: str) -> list[list[str]]:
  """The commands of a shell text, as words; ValueError where a quote is not closed."""
  lines = text.replace("\\\n", " ").splitlines()
  return [words for line in lines if (words := shlex.split(line, comments=True))]


def check(words: list[str], *, is_whole: bool = True) -> None:
  """Raises where a command could not start: no such program, flag, config or field.

  One that is not whole, as pages mention it within a sentence, may leave flags out.
  """
  program, *rest = words
  if program in ("python", ".venv/bin/python") and rest[0] == "-m":
    _check_module(rest[1], rest[2:], is_whole=is_whole)
  elif program.startswith("launch/"):
    _check_script(program, rest, is_whole=is_whole)
  elif program == "make":
    _check_make(rest)
  elif program == "cp":
    assert (ROOT / rest[0]).is_file(), f"there is no {rest[0]}"
  elif program not in _OTHERS and "=" not in program:
    raise ValueError(f"{program!r} is a program that this test does not know")


def needs(words: list[str]) -> str:
  """A word that the block of this command has to say that it needs; "" for none."""
  text = " ".join(words)
  if words[0] in ("docker", "kubectl", "xpk"):
    return words[0]
  if words[0] == "launch/tpu.sh":
    return "gcloud"
  if "launch/slurm.sh" in text:
    return "Slurm"
  if re.search(r"launch\.plan .*--(topology|machine)=v|\.cycles\b|machine=v.* --compile\b", text):
    return "tpu extra"
  if re.search(r"--(topology|machine)=(h|a|b)\d+", text):
    return "cuda extra"
  if re.search(
    r"row_lengths .*--measure|kernels\.(?!linear_scan)\w+\.measure|kernels\.check", text
  ):
    return "GPU"
  if re.search(r"launch\.(train|export) .*configs/(griffin|hawk|transformer|recurrent)", text):
    return "GPUs"
  if "--seqio_task" in text:
    return "seqio extra"
  if re.search(r"launch\.(train|supervise|local)|local\.sh", text):
    return "minutes"
  if "launch.sweep" in text:
    return "hour"
  return ""


def _check_module(module: str, arguments: list[str], *, is_whole: bool) -> None:
  path = ROOT / (module.replace(".", "/") + ".py")
  assert path.is_file(), f"there is no module {module}"
  assert '__name__ == "__main__"' in path.read_text(), f"{module} is not a command"
  own, _, after = _split(arguments)
  known = flags_of(path)
  given = dict(_flag(word) for word in own if word.startswith("-"))
  for name in given:
    if name != "config" and not name.startswith("config."):
      assert name in known or name.removeprefix("no") in known, f"{module} has no flag --{name}"
  if module == "launch.sweep" and is_whole:
    file, _, grid = given["config"].partition(":")
    text = (ROOT / file).read_text()
    assert "\ndef get_sweep(" in text, f"{file} has no sweep"
    assert re.search(rf'"{grid}"', text), f"{file} has no grid {grid}"
  elif "run_app(main)" in path.read_text() and ("config" in given or is_whole):
    _check_config([word for word in own if word.startswith("--config")])
  if "mesh" in given:
    parse_mesh(given["mesh"])
  if "topology" in given:
    machine.of_topology(given["topology"])
  if "chip" in given:
    machine.of_chips(given["chip"], int(given.get("chips", 1)))
  if module == "launch.supervise" and is_whole:
    check(after)


def _check_config(words: list[str]) -> None:
  """Builds the run of --config with its overrides, in flags of its own."""
  spec, changes = overrides.said(words)
  preset = overrides.load(spec)
  _, rest = overrides.take_nones(preset, list(changes.values()))
  config = overrides.to_config_dict(preset)
  values = flags.FlagValues()
  arguments = ["command", *rest]
  config_flags.DEFINE_config_dict(
    "config", config, lock_config=True, flag_values=values, sys_argv=arguments
  )
  values(arguments)
  overrides.rebuild(preset, config)


def _check_script(program: str, arguments: list[str], *, is_whole: bool) -> None:
  own, has_more, after = _split(arguments)
  text = help_of(program)
  for word in own:
    if word.startswith("--") and word != "--help":
      name = _flag(word)[0]
      assert re.search(rf"--{name}\b", text), f"{program} has no flag --{name}"
    elif word != "--help" and program in ("launch/tpu.sh", "launch/slurm.sh"):
      assert re.search(rf"^  {word} ", text, re.MULTILINE), f"{program} has no command {word}"
  if has_more and "--" in after:  # launch/local.sh: options of launch.supervise come first
    after = after[after.index("--") + 1 :]
  if has_more and is_whole:
    _check_config([word for word in after if word.startswith("--config")])


def _check_make(arguments: list[str]) -> None:
  makefile = (ROOT / "Makefile").read_text()
  for word in arguments:
    name, equals, _ = word.partition("=")
    pattern = rf"\b{name}\b" if equals else rf"^{name}:"
    assert re.search(pattern, makefile, re.MULTILINE), f"make: no {word}"


@functools.cache
def help_of(script: str) -> str:
  """What a shell script prints with --help."""
  done = subprocess.run(
    ["bash", ROOT / script, "--help"], capture_output=True, text=True, check=True
  )
  return done.stdout


@functools.cache
def flags_of(path: pathlib.Path) -> frozenset[str]:
  """The names of the flags that a module and ours that it imports define, absl's or argparse's."""
  found: set[str] = set()
  for file in [path, *(ROOT / name for name in _own_imports(path))]:
    for node in ast.walk(ast.parse(file.read_text())):
      if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)):
        continue
      names = [str(word.value).lstrip("-") for word in node.args if isinstance(word, ast.Constant)]
      if node.func.attr.startswith("DEFINE_"):
        found |= set(names[:1])
      elif node.func.attr == "add_argument":
        found |= set(names)
  return frozenset(found)


@functools.cache
def _own_imports(path: pathlib.Path) -> frozenset[str]:
  """The files of launch/ that a module imports, as paths from the root."""
  found = set()
  for node in ast.walk(ast.parse(path.read_text())):
    if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "launch":
      candidates = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
      found |= {name.replace(".", "/") + ".py" for name in candidates}
  return frozenset(name for name in found if (ROOT / name).is_file())


def _split(arguments: list[str]) -> tuple[list[str], bool, list[str]]:
  """The arguments before the first --, whether there is one, and those after it."""
  if "--" not in arguments:
    return arguments, False, []
  at = arguments.index("--")
  return arguments[:at], True, arguments[at + 1 :]


def _flag(word: str) -> tuple[str, str]:
  name, _, value = word.lstrip("-").partition("=")
  return name.replace("-", "_"), value
