"""A run as it is left on a disk, and the words of its page: for tests of reports."""

import html.parser
import json
import time

from launch.pages import report_page
from tests import drawn
from train.telemetry import history

QUANTILES = [1.0, 2.0, 4.0, 8.0, 16.0]


def write(path, lines):
  path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def killed_run(folder, *, name="one", steps=40, outcome="complete", statistics=True):
  """A run that was killed in step 25 and went on from step 20."""
  folder.mkdir(parents=True)
  began = time.time() - 1000
  about = {"name": name, "total_steps": 40, "tokens_per_step": 1000, "row_length": 256}
  about |= {"flops_per_token": 6e6, "devices": "8 x TPU v5e"}
  events = [
    {"time": began, "kind": "start", **about},
    {"time": began, "kind": "resume", "step": 0},
    {"time": began + 10, "kind": "compile"},
    {"time": began + 110, "kind": "step", "steps": [1, 20], "data_wait": 10.0},
    {"time": began + 120, "kind": "checkpoint"},
    {"time": began + 145, "kind": "step", "steps": [21, 25]},
    {"time": began + 200, "kind": "start", **about},
    {"time": began + 210, "kind": "init"},
    {"time": began + 210, "kind": "resume", "step": 20},
    {"time": began + 210 + 5 * (steps - 20), "kind": "step", "steps": [21, steps]},
  ]
  if outcome:
    events.append({"time": began + 210 + 5 * (steps - 20), "kind": "end", "outcome": outcome})
  write(folder / "events.jsonl", events)
  metrics = []
  for step in range(1, steps + 1):
    values = {"train/loss": 6 / step**0.3, "train/grad_norm": 1 + 5 / step}
    values |= {"train/tokens_per_second": 5000.0, "train/learning_rate": 1e-3}
    metrics.append({"step": step, "time": began + 10 + 5 * step, **values})
    if step % 10 == 0:
      metrics.append({"step": step, "time": began + 10 + 5 * step, "eval/loss": 6.1 / step**0.3})
  write(folder / "metrics.jsonl", metrics)
  if statistics:
    layers = [
      {
        "step": step,
        "mixers": ["rg_lru", "attention"],
        **{name: [1.0, 2.0] for name in ("param_norm", "grad_norm", "update_norm", "output_rms")},
        "horizon": [[step * x for x in QUANTILES], None],
        "horizon_open": [QUANTILES, None],
        "state_rms": [0.5, None],
        **{
          f"{gate}_gate_{end}": [0.1, None]
          for gate in ("recurrence", "input")
          for end in ("low", "high")
        },
      }
      for step in range(10, steps + 1, 10)
    ]
    write(folder / "statistics.jsonl", layers)
  return folder


class _Checker(html.parser.HTMLParser):
  """Fails on tags that are not closed, and keeps what is written in the pictures."""

  def __init__(self):
    super().__init__()
    self.open, self.words = [], []

  def handle_starttag(self, tag, attrs):
    if tag not in ("meta", "br"):
      self.open.append(tag)

  def handle_startendtag(self, tag, attrs):
    for name, value in attrs:
      assert "nan" not in str(value), f"<{tag} {name}={value}>"

  def handle_endtag(self, tag):
    assert self.open.pop() == tag

  def handle_data(self, data):
    self.words.append(data)


def page_words(*folders) -> str:
  """What is written on the page of these runs, after checking that it is whole and alone."""
  page = report_page.page([history.read(folder) for folder in folders], command="a < b")
  checker = _Checker()
  checker.feed(page)
  assert not checker.open
  assert not drawn.outside(page)
  return "\n".join(checker.words)
