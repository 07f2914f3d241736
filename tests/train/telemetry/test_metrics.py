"""Metrics: each step once through restarts, fields explained, rates by definition, a picture."""

import json
import math
import os
import pathlib
import struct

import pytest
from absl import logging
from tensorboardX.proto.event_pb2 import Event

from tests import drawn
from train.drawing import colors
from train.telemetry.loss_curve import plot_losses
from train.telemetry.metrics import (
  FIELDS,
  Metrics,
  MetricsConfig,
  console_line,
  fields_table,
)
from train.telemetry.throughput import Rates, Throughput, mfu
from train.workdir.jsonl import read_jsonl, series


def _metrics(workdir, start_step: int = 0, **config) -> Metrics:
  settings = MetricsConfig(**{"tensorboard": False, **config})
  return Metrics(
    workdir, settings, name="test", settings={"seed": 0}, start_step=start_step, total_steps=100
  )


def _steps(workdir) -> list[int]:
  return [record["step"] for record in read_jsonl(workdir / "metrics.jsonl")]


def test_each_step_is_there_once_through_restarts(tmp_path):
  with _metrics(tmp_path) as metrics:
    for step in (1, 10, 20, 30):
      metrics.write(step, {"train/loss": 5.0 - step / 10})
      metrics.write_layers(step, {"param_norm": [1.0]}, about=())
  # Killed, and restored from step 10: 20 and 30 are trained again.
  with _metrics(tmp_path, start_step=10) as metrics:
    assert [line["step"] for line in read_jsonl(tmp_path / "statistics.jsonl")] == [1, 10]
    for step in (20, 30):
      metrics.write(step, {"train/loss": 7.0})
  assert _steps(tmp_path) == [1, 10, 20, 30]
  assert read_jsonl(tmp_path / "metrics.jsonl")[-1]["train/loss"] == 7.0
  # A new start where nothing was ever saved.
  with _metrics(tmp_path) as metrics:
    metrics.write(1, {"train/loss": 6.0})
  assert _steps(tmp_path) == [1]


@pytest.mark.parametrize(
  "torn",
  [
    b'{"step": 20, "tra',
    b'{"step": 20}',
    b"\x00\xff\n",
    b"[1]\n",
    b'{"step": "5"}\n{"step": null}',
  ],
)
def test_a_torn_last_line_costs_only_itself(tmp_path, torn):
  with _metrics(tmp_path) as metrics:
    metrics.write(10, {"train/loss": 2.0})
  with (tmp_path / "metrics.jsonl").open("ab") as file:
    file.write(torn)
  with _metrics(tmp_path, start_step=10) as metrics:
    metrics.write(20, {"train/loss": 1.0})
  assert _steps(tmp_path) == [10, 20]
  for line in (tmp_path / "metrics.jsonl").read_text().splitlines():
    json.loads(line)


def test_what_is_not_finite_is_still_json(tmp_path):
  with _metrics(tmp_path) as metrics:
    metrics.write(1, {"train/loss": math.nan, "train/grad_norm": math.inf})

  def refuse(name):
    raise AssertionError(name)

  record = json.loads((tmp_path / "metrics.jsonl").read_text(), parse_constant=refuse)
  assert math.isnan(float(record["train/loss"]))
  assert float(record["train/grad_norm"]) == math.inf


def test_the_console_line_shows_labelled_fields_in_their_order(caplog, tmp_path):
  values = {
    "train/seconds_left": 3723.4,
    "train/mfu": 0.4567,
    "train/tokens_per_second": 12345.6,
    "train/z_loss": 1.0,
    "train/learning_rate": 3e-4,
    "train/loss": 2.30258,
  }
  expected = (
    "step    7/1000 | loss 2.3026 | lr 3.00e-04 | tokens/s 12,346 | MFU 45.7% | left 1:02:03"
  )
  assert console_line(7, 1000, values) == expected
  verbosity = logging.get_verbosity()
  logging.set_verbosity(logging.INFO)
  try:
    with _metrics(tmp_path) as metrics:
      metrics.write(7, values)
  finally:
    logging.set_verbosity(verbosity)
  assert "step   7/100 | loss 2.3026" in caplog.text


def test_every_field_is_named_once_and_explained():
  names = [field.name for field in FIELDS]
  labels = [field.label for field in FIELDS if field.label is not None]
  assert len(set(names)) == len(names)
  assert len(set(labels)) == len(labels)
  for field in FIELDS:
    assert len(field.meaning) > 10
    assert f"| {field.label or ''} | `{field.name}` | {field.meaning} |" in fields_table()
    assert field.show(1.0)


def test_a_value_without_a_meaning_is_refused(tmp_path):
  with (
    _metrics(tmp_path) as metrics,
    pytest.raises(ValueError, match="'train/lots' is not in FIELDS"),
  ):
    metrics.write(1, {"train/lots": 1.0})


def test_the_first_step_the_last_and_every_tenth_are_due(tmp_path):
  with _metrics(tmp_path, start_step=13, log_every=10) as metrics:
    assert [step for step in range(14, 101) if metrics.due(step)] == [14, *range(20, 101, 10)]


def _events(file) -> list[Event]:
  data, events = file.read_bytes(), []
  while data:
    (length,) = struct.unpack("<Q", data[:8])
    events.append(Event.FromString(data[12 : 12 + length]))
    data = data[16 + length :]
  return events


def test_tensorboard_has_the_scalars(tmp_path):
  with _metrics(tmp_path, start_step=5, tensorboard=True) as metrics:
    metrics.write(6, {"train/loss": 2.5})
    (file,) = (tmp_path / "tensorboard").iterdir()
    events = _events(file)  # already: the process may be killed
  assert _events(file) == events
  scalars = [(e.step, v.tag, v.simple_value) for e in events for v in e.summary.value]
  assert scalars == [(6, "train/loss", 2.5)]
  # What an earlier run wrote of later steps is hidden by the restart.
  assert any(event.session_log.status == 1 and event.step == 6 for event in events)


def test_a_disk_that_is_full_for_tensorboard_alone_is_told_and_not_waited_for(tmp_path):
  metrics = _metrics(tmp_path, tensorboard=True)
  metrics.write(1, {"train/loss": 2.5})
  (file,) = (tmp_path / "tensorboard").iterdir()
  (descriptor,) = [fd for fd in pathlib.Path("/proc/self/fd").iterdir() if fd.resolve() == file]
  with open("/dev/full", "wb") as full:
    os.dup2(full.fileno(), int(descriptor.name))
  with pytest.raises(OSError, match="No space left"):
    metrics.write(2, {"train/loss": 2.0})
  with pytest.raises(OSError, match="No space left"):
    metrics.close()
  assert _steps(tmp_path) == [1, 2]


def test_wandb_works_offline_with_one_id_through_restarts(tmp_path, monkeypatch):
  monkeypatch.setenv("WANDB_CACHE_DIR", str(tmp_path / "cache"))
  for start_step in (0, 10):
    with _metrics(tmp_path, start_step=start_step, wandb="offline") as metrics:
      metrics.write(start_step + 1, {"train/loss": 2.0})
  run_id = (tmp_path / "wandb_run_id").read_text().strip()
  folders = list((tmp_path / "wandb").glob("offline-run-*"))
  assert folders
  # Two starts in one second: wandb adds a number to the second folder's name.
  assert all(f"-{run_id}" in folder.name for folder in folders)


@pytest.mark.parametrize(
  ("settings", "message"),
  [({"log_every": 0}, "log_every 0 must be"), ({"wandb": "on"}, "'on' is none of 'disabled'")],
)
def test_a_setting_that_cannot_work_is_refused(settings, message):
  with pytest.raises(ValueError, match=message):
    MetricsConfig(**settings)


class Clock:
  def __init__(self):
    self.now = 1000.0

  def __call__(self) -> float:
    return self.now


def test_rates_count_training_and_nothing_else():
  clock = Clock()
  throughput = Throughput(tokens_per_step=512, start_step=10, total_steps=20, clock=clock)
  for _ in range(4):
    with throughput.waiting():
      clock.now += 0.1
    clock.now += 0.4
    throughput.count_step()
  with throughput.excluded():
    clock.now += 8.0  # evaluation, saving
  assert throughput.read() == pytest.approx(
    Rates(tokens_per_second=1024.0, step_seconds=0.5, data_wait=0.2, seconds_left=6 * 10.0 / 4)
  )
  # The window starts anew; the time left is that of the whole run.
  clock.now += 0.25
  throughput.count_step()
  assert throughput.read() == pytest.approx(
    Rates(tokens_per_second=2048.0, step_seconds=0.25, data_wait=0.0, seconds_left=5 * 10.25 / 5)
  )


def test_rates_of_a_stopped_clock_are_finite():
  throughput = Throughput(tokens_per_step=1, start_step=0, total_steps=1, clock=lambda: 0.0)
  throughput.count_step()
  assert all(math.isfinite(rate) for rate in throughput.read())


def test_mfu_is_what_the_model_needs_over_what_the_chips_can():
  assert mfu(flops_per_token=6e9, tokens_per_second=1e5, peak_flops=8 * 2e14) == 0.375


def _write(path, *records):
  path.write_text("".join(json.dumps(record) + "\n" for record in records))


def test_losses_are_one_per_step_and_finite(tmp_path):
  path = tmp_path / "metrics.jsonl"
  _write(
    path,
    {"step": 10, "train/loss": 3.0},
    {"step": 20, "train/loss": 2.0},
    {"step": 20, "eval/loss": 2.5},
    {"step": 10, "train/loss": 4.0},
    {"step": 30, "train/loss": "nan"},
  )
  assert list(series(read_jsonl(path), "train/loss").items()) == [(10, 4.0), (20, 2.0)]
  assert series(read_jsonl(path), "eval/loss") == {20: 2.5}


@pytest.mark.parametrize("num_records", [1, 2, 50])
def test_the_picture_is_a_png(tmp_path, num_records):
  records = [{"step": step + 1, "train/loss": 3.0 / (step + 1)} for step in range(num_records)]
  _write(tmp_path / "metrics.jsonl", *records, {"step": num_records, "eval/loss": 1.0})
  assert plot_losses(tmp_path / "metrics.jsonl", tmp_path / "loss.png", name="a")
  data = (tmp_path / "loss.png").read_bytes()
  assert data.startswith(b"\x89PNG")
  assert struct.unpack(">II", data[16:24]) == (1200, 675)


def test_the_picture_says_both_losses_at_the_end_and_appears_whole_or_not_at_all(
  tmp_path, monkeypatch
):
  records = [{"step": step, "train/loss": 10.0 - step / 10} for step in range(1, 41)]
  held_out = [{"step": 20, "eval/loss": 9.0}, {"step": 40, "eval/loss": 7.0}]
  _write(tmp_path / "metrics.jsonl", *records, *held_out)
  said = []

  def torn(picture, **_):
    svg = picture.svg()
    said.extend(drawn.words(svg))
    assert drawn.color_of(svg, "training 6.100") == colors.of_family("hawk").color
    return b"half"

  def full(descriptor):
    raise OSError("no space")

  monkeypatch.setattr("train.drawing.picture.Picture.png", torn)
  monkeypatch.setattr("os.fsync", full)
  (tmp_path / "loss.png").write_bytes(b"an earlier one")
  with pytest.raises(OSError, match="no space"):
    plot_losses(tmp_path / "metrics.jsonl", tmp_path / "loss.png", name="hawk-1b")
  words = {"hawk-1b: loss over training steps", "training 6.100", "held out 7.000"}
  assert words | {"steps", "loss (nats per token)"} <= set(said)
  assert (tmp_path / "loss.png").read_bytes() == b"an earlier one"


def test_no_picture_of_no_losses(tmp_path):
  assert not plot_losses(tmp_path / "metrics.jsonl", tmp_path / "loss.png", name="a")
  assert not (tmp_path / "loss.png").exists()
