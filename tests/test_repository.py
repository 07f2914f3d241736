"""The shape of the repository: layers, owners of dependencies, names that resolve here."""

import ast
import importlib
import os
import pathlib
import subprocess

import pytest

from train.job import agreement

ROOT = pathlib.Path(__file__).parents[1]
FOLDERS = ("train", "models", "sharding", "data", "kernels", "configs", "launch")

# Who may import whom; docs/architecture.md says why.
ALLOWED = {
  "kernels": set(),
  "sharding": set(),
  "data": set(),
  "models": {"kernels", "sharding"},
  "train": {"models", "data", "sharding", "kernels"},
  "configs": {"train", "models", "data", "sharding"},
  "launch": {"train", "models", "data", "sharding"},
}
# Folders of code that serves any model.
_ANY_MODEL = ("train", "sharding", "data", "launch")
# Who may import a dependency: a folder or a file.
OWNERS = {
  "flax": ("models/",),
  "optax": ("train/optimizer.py",),
  "orbax": ("train/checkpoint/folder.py",),
  "grain": ("data/",),
  "seqio": ("data/prepare/seqio_tasks.py",),
  "tensorflow": ("data/prepare/seqio_tasks.py",),
  "tensorstore": ("data/token_store.py", "data/bucket.py"),
  "wandb": ("train/telemetry/metrics.py",),
  "tensorboardX": ("train/telemetry/tensorboard.py",),
  "ml_collections": ("launch/",),
  "matplotlib": ("train/drawing/", "train/scaling/charts.py"),
}


def _files() -> list[pathlib.Path]:
  return [path for folder in FOLDERS for path in sorted((ROOT / folder).rglob("*.py"))]


def _imports(path: pathlib.Path) -> set[str]:
  """The dotted names that a file imports, wherever in the file."""
  names = set()
  for node in ast.walk(ast.parse(path.read_text())):
    if isinstance(node, ast.Import):
      names |= {alias.name for alias in node.names}
    elif isinstance(node, ast.ImportFrom) and node.module:
      names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
  return names


@pytest.mark.parametrize("folder", FOLDERS)
def test_folder_is_this_repositorys(folder):
  module = importlib.import_module(folder)
  assert pathlib.Path(module.__file__).parent == ROOT / folder


def test_layers_import_only_downward():
  wrong = [
    f"{path.relative_to(ROOT)} imports {name}"
    for path in _files()
    for name in _imports(path)
    if name.split(".")[0] in FOLDERS
    and name.split(".")[0] not in ALLOWED[path.relative_to(ROOT).parts[0]]
    and name.split(".")[0] != path.relative_to(ROOT).parts[0]
  ]
  assert not wrong
  configs = [
    f"{path.relative_to(ROOT)} imports {name}"
    for path in _files()
    for name in _imports(path)
    if name.split(".")[0] == "configs"
  ]
  assert not configs


def test_each_dependency_has_one_owner():
  wrong = [
    f"{relative} imports {name}; owned by {OWNERS[name.split('.')[0]]}"
    for path in _files()
    for name in _imports(path)
    for relative in [path.relative_to(ROOT).as_posix()]
    if name.split(".")[0] in OWNERS and not relative.startswith(OWNERS[name.split(".")[0]])
  ]
  assert not wrong


def test_private_names_of_jax_are_in_one_file():
  using = {
    path.relative_to(ROOT).as_posix()
    for path in _files()
    if any(name.startswith("jax._src") for name in _imports(path))
  }
  assert using == {"train/job/coordination.py"}


def test_the_processes_of_a_job_compare_every_source_file():
  """Wherever train/job/agreement.py lies: a root that is not ours would have nothing to compare."""
  assert list(agreement._sources()) == [path.relative_to(ROOT).as_posix() for path in _files()]


def test_no_module_loads_matplotlib():
  """It takes a second of every start: functions that draw import it, and annotations name it."""
  wrong = [
    path.relative_to(ROOT)
    for path in _files()
    for node in ast.parse(path.read_text()).body
    if isinstance(node, ast.Import | ast.ImportFrom) and "matplotlib" in ast.unparse(node)
  ]
  assert not wrong


def _outside_models() -> list[pathlib.Path]:
  return [path for path in _files() if path.relative_to(ROOT).parts[0] in _ANY_MODEL]


def test_what_serves_any_model_knows_no_layer():
  """Blocks answer for their layers: models/block.py."""
  wrong = [
    f"{path.relative_to(ROOT)} imports {name}"
    for path in _outside_models()
    for name in _imports(path)
    if name.startswith("models.layers")
  ]
  assert not wrong


def test_what_serves_any_model_lists_no_family():
  """A family is a config file; what is known of its runs is data, as recommended.jsonl."""
  families = {path.stem for path in (ROOT / "models").glob("*.py")} & {
    path.stem for path in (ROOT / "configs").glob("*.py")
  }
  assert {"griffin", "hawk", "transformer"} <= families
  wrong = [
    f"{path.relative_to(ROOT)}:{node.lineno} has {node.value!r}"
    for path in _outside_models()
    for node in ast.walk(ast.parse(path.read_text()))
    if isinstance(node, ast.Constant) and node.value in families
    if path != ROOT / "train" / "drawing" / "colors.py"  # a palette; others have a color as well
  ]
  assert not wrong


def test_data_never_imports_jax():
  wrong = [
    path.name
    for path in sorted((ROOT / "data").rglob("*.py"))
    if any(name.split(".")[0] in ("jax", "jaxlib") for name in _imports(path))
  ]
  assert not wrong


def test_every_folder_has_an_init_that_only_speaks():
  """A docstring and nothing else; of an operation of kernels/ it is the specification."""
  for folder in FOLDERS:
    for path in [ROOT / folder, *(p for p in (ROOT / folder).rglob("*") if p.is_dir())]:
      if not any(path.glob("*.py")):
        continue
      init = path / "__init__.py"
      assert init.is_file(), f"{path.relative_to(ROOT)} has no __init__.py"
      tree = ast.parse(init.read_text())
      assert ast.get_docstring(tree), f"{init.relative_to(ROOT)} has no docstring"
      is_operation = path.parent == ROOT / "kernels"
      assert is_operation or len(tree.body) == 1, f"{init.relative_to(ROOT)} has code in it"


@pytest.mark.xdist_group("group")
def test_a_group_of_tests_goes_to_one_worker(request):
  """Its name in the id is how pytest-xdist keeps it together; tests share what takes minutes."""
  if "PYTEST_XDIST_WORKER" in os.environ:
    assert request.node.nodeid.endswith("@group")


@pytest.mark.parametrize(("answer", "extras"), [("yes", "tpu,seqio,test"), ("", "tpu,test")])
def test_where_tensorflow_has_no_packages_seqio_is_left_out(tmp_path, answer, extras):
  """Python 3.14, when this was written: there `make test` ended with what pip could not find."""
  python = tmp_path / "python3"
  python.write_text(f"#!/bin/sh\necho {answer}\n")
  python.chmod(0o755)
  command = ["make", "--dry-run", "--always-make", ".venv/ready-test", f"PYTHON={python}"]
  told = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
  assert f"installing the pinned dependencies ({extras})" in told
