"""What README and docs/ say is what the code has; every command on them could start.

"Tried" means here: the program exists, has the flags, and builds the run of the config with its
overrides. The commands themselves run in tests of their own (tests/launch, tests/data, ...).
"""

import json
import re
import subprocess

import pytest

from tests import documented_commands
from tests.documented_commands import PAGES, ROOT
from train.telemetry.metrics import FIELDS, fields_table

README = (ROOT / "README.md").read_text()
DOCS = {path.name: path.read_text() for path in sorted((ROOT / "docs").glob("*.md"))}
ALL = README + "".join(DOCS.values())
# The words with which a page says what a command needs.
NEEDS = ("minutes", "hour", "GPU", "gcloud", "Slurm", "extra", "docker", "cluster")


def test_the_readme_is_short_and_links_every_page():
  assert len(README.splitlines()) <= 160
  assert {f"docs/{name}" for name in DOCS} == set(re.findall(r"\]\((docs/\w+\.md)\)", README))


def test_every_console_field_is_explained():
  """If this fails, put the output of train.telemetry.metrics.fields_table() into the page."""
  assert fields_table().strip() in DOCS["training.md"]


def test_the_lines_they_show_have_todays_fields():
  shown = [
    re.findall(r"\| ([a-zA-Z/]+) ", line)
    for line in ALL.splitlines()
    if re.search(r"step +\d+/\d+ \| loss", line)
  ]
  assert len(shown) > 5
  # A run on CPUs to which nothing bad has happened.
  left_out = {"eval", "bits/byte", "MFU", "skipped", "passed over"}
  fields = [field.label for field in FIELDS if field.label and field.label not in left_out]
  assert all(names == fields for names in shown)


def test_what_their_commands_write_leaves_a_checkout_clean(tmp_path):
  """launch/tpu.sh and slurm.sh ship commits: they refuse a checkout with files of its own."""
  (tmp_path / ".gitignore").write_bytes((ROOT / ".gitignore").read_bytes())
  written = {"report.html", "plan.html", "launch/cluster.env", ".venv/bin", "runs/smoke/loss.png"}
  assert all(
    name in ALL for name in ("launch.report runs/smoke", "--html=plan.html", "cluster.env")
  )
  for words in (["init", "--quiet"], ["check-ignore", *written]):
    done = subprocess.run(["git", "-C", tmp_path, *words], capture_output=True, text=True)
  assert set(done.stdout.split()) == written


@pytest.mark.parametrize("page", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_command_of_a_page_could_start(page):
  text = page.read_text()
  for block in documented_commands.blocks(text):
    if block.language == "sh":
      for words in documented_commands.commands(block.text):
        documented_commands.check(words)
  for span in documented_commands.spans(text):
    if re.match(r"(python -m|launch/\w+\.sh) ", span):
      documented_commands.check(documented_commands.commands(span)[0], is_whole=False)


@pytest.mark.parametrize("page", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_commands_stand_in_fenced_blocks(page):
  """Elsewhere the checks here would pass over them."""
  text = documented_commands.without_blocks(page.read_text())
  assert not re.findall(r"^ +(?:python|make|launch/|pip|\.venv).*$", text, re.MULTILINE)


@pytest.mark.parametrize("page", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_block_of_commands_says_what_it_needs(page):
  for block in documented_commands.blocks(page.read_text()):
    if block.language == "sh":
      wanted = [
        documented_commands.needs(words) for words in documented_commands.commands(block.text)
      ]
      missing = [word for word in wanted if word not in block.needs]
      assert not missing, f'write "Needs: ..." with {missing} above:\n{block.text}'
      assert not block.needs or any(word in block.needs for word in NEEDS), block.needs


def test_a_command_that_could_not_start_is_found():
  """The checks above can fail."""
  lines: list[str] = [
    "python -m launch.trian --config=configs/smoke.py",
    "python -m launch.train --config=configs/smoke.py --workdri=runs/a",
    "python -m launch.train --config=configs/smoke.py --config.optimizer.peak_rl=1",
    "python -m launch.train --config=configs/griffin.py:2b",
    "python -m launch.plan --config=configs/smoke.py --topology=v9:2x2",
    "launch/tpu.sh upp -- --config=configs/smoke.py",
    "launch/slurm.sh submit --nods=4 -- --config=configs/smoke.py",
    "launch/local.sh -n 2 -- --config=configs/smoke.py --config.mesh.fdsp=2",
    "make tests",
    "gsutil ls",
  ]
  for line in lines:
    with pytest.raises((AssertionError, ValueError, AttributeError)):
      documented_commands.check(line.split())


@pytest.mark.parametrize("name", [name for name, text in DOCS.items() if "```python" in text])
def test_the_python_of_a_page_runs(name):
  for block in documented_commands.blocks(DOCS[name]):
    if block.language == "python":
      variables: dict = {}
      exec(block.text, variables)
      if "get_config" in variables:
        variables["get_config"]()


@pytest.mark.parametrize("page", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_file_and_link_of_a_page_exists(page):
  text = page.read_text()
  folders = "configs|tests|train|models|docs|launch|kernels|sharding|data"
  for span in documented_commands.spans(text):
    if re.fullmatch(rf"(?:{folders})/[\w./]+\.(?:py|md|sh|jsonl?|svg)", span):
      assert (ROOT / span).exists(), span
  for target in re.findall(r"(?:\]\(|src=\")([^)\"]+)[)\"]", text):
    if "://" in target:
      continue
    path, _, anchor = target.partition("#")
    file = (page.parent / path).resolve() if path else page
    assert file.exists(), target
    if anchor:
      headings = re.findall(r"^#+ (.*)$", file.read_text(), re.MULTILINE)
      assert anchor in [
        re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in headings
      ]


def test_the_table_of_presets_is_that_of_the_records():
  """If this fails, put the lines that it prints into docs/benchmarks.md."""
  records = [json.loads(line) for line in (ROOT / "docs/plans.jsonl").read_text().splitlines()]
  cells: dict[str, list[str]] = {}
  for machine in ("v5e:16x16", "v5p:4x4x8", "8 x H100 SXM"):
    for record in records:
      if record["machine"] == machine:
        cells.setdefault(record["config"], []).append(_preset_cell(record))
  lines = [f"| {name} | {' | '.join(row)} |" for name, row in cells.items()]
  missing = [line for line in lines if line not in DOCS["benchmarks.md"]]
  assert not missing, "\n".join(missing)


def _preset_cell(record):
  """Layout, remat and gigabytes of one compiled preset."""
  mesh = " x ".join(f"{axis} {size}" for axis, size in record["mesh"].items() if size > 1)
  zero = "" if record["zero_stage"] == 3 else f", ZeRO {record['zero_stage']}"
  count = record["num_microbatches"]
  microbatches = "" if count == 1 else f", {count} microbatches"
  memory = record["memory_bytes"]["total"] / 1e9
  return f"{mesh}{zero}, {record['remat']}{microbatches}: {memory:.2f}"


def test_an_extra_that_there_is_not_installs_nothing():
  """pip would only warn, and a machine with GPUs would train on its CPU."""
  command = ["make", "--dry-run", "--directory", ROOT, "train"]
  for extra, status in (("gpu", 2), ("cuda", 0)):
    done = subprocess.run([*command, f"EXTRA={extra}"], capture_output=True, text=True)
    assert done.returncode == status, done.stderr
    assert (f"EXTRA={extra} is none of cpu tpu cuda" in done.stderr) is (status == 2)
