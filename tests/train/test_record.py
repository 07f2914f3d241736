"""The run record: what may not change is refused by name, with both values and the way out."""

import dataclasses
import json

import numpy as np
import pytest

from data.pipeline import DataConfig
from data.token_store import write
from data.vocabulary import VocabularyRecord
from kernels import linear_scan
from models import decoder
from models.griffin import griffin
from sharding import xla_flags
from sharding.mesh import MeshShape
from train.checkpoint.checkpoints import CheckpointConfig
from train.config import Run
from train.optimizer import AdamW, WarmupStableDecay
from train.record import compare_records, run_record
from train.telemetry.metrics import MetricsConfig


def _vocabulary(**changes) -> VocabularyRecord:
  values = {"kind": "byte", "size": 16, "bos": None, "eos": 1, "pad": 0, "fingerprint": "abc"}
  return VocabularyRecord(**{**values, **changes})


def _store(path, vocabulary: VocabularyRecord, seed: int = 0) -> str:
  random = np.random.default_rng(seed)
  documents = [random.integers(2, 16, 20).astype(vocabulary.dtype) for _ in range(4)]
  write(str(path), documents, vocabulary, text_bytes=80)
  return str(path)


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> str:
  return _store(tmp_path_factory.mktemp("data") / "store", _vocabulary())


def _run(store: str, **changes) -> Run:
  sizes = {"num_blocks": 3, "num_heads": 2, "head_size": 4, "window": 4, "mlp_width": 24}
  values = {
    "name": "test",
    "model": griffin(vocab_size=16, width=8, rnn_width=16, **sizes),
    "data": DataConfig(sources=((store, 1.0),), row_length=8),
    "optimizer": AdamW(peak_lr=1e-3, warmup_steps=1),
    "batch_size": 4,
    "total_steps": 10,
  }
  return Run(**{**values, **changes})


def _record(run: Run) -> dict:
  return run_record(run, decoder.build(run.model))


def _with_model(run: Run, **changes) -> Run:
  return dataclasses.replace(run, model=dataclasses.replace(run.model, **changes))


def _with_data(run: Run, **changes) -> Run:
  return dataclasses.replace(run, data=dataclasses.replace(run.data, **changes))


def test_a_record_survives_json_and_equals_itself(store):
  record = _record(_run(store))
  assert json.loads(json.dumps(record)) == record
  assert compare_records(record, _record(_run(store))) == []


def test_what_leaves_model_and_batches_alone_may_change_and_is_told(store):
  run = _run(store)
  changed = dataclasses.replace(
    _with_data(_with_model(run, remat="none", layers="unroll"), eval_rows=7, read_threads=1),
    name="renamed",
    total_steps=20,
    num_microbatches=2,
    mesh=MeshShape(fsdp=-1),
    zero_stage=1,
    optimizer=AdamW(peak_lr=2e-3, warmup_steps=1, schedule=WarmupStableDecay()),
    checkpoint=CheckpointConfig(every_steps=3),
    metrics=MetricsConfig(log_every=3),
  )
  changes = compare_records(_record(run), _record(changed))
  assert "total_steps: 10 -> 20" in changes
  assert "optimizer.peak_lr: 0.001 -> 0.002" in changes
  assert (
    "optimizer.schedule: 'train.optimizer.Cosine' -> 'train.optimizer.WarmupStableDecay'" in changes
  )


def test_the_kernel_may_change_and_the_rest_of_a_block_may_not(store):
  run = _run(store)

  def with_mixers(**changes):
    *recurrent, attention = run.model.pattern
    changed = [
      dataclasses.replace(block, mixer=dataclasses.replace(block.mixer, **changes))
      for block in recurrent
    ]
    return _with_model(run, pattern=(*changed, attention))

  used = linear_scan.resolve("auto")
  other = next(name for name in linear_scan.IMPLEMENTATIONS if name != used)
  changes = compare_records(_record(run), _record(with_mixers(scan=other)))
  assert changes == [
    f"model.pattern[{index}].mixer.scan: {used!r} -> {other!r}" for index in range(2)
  ]
  old = _record(run)
  del old["kernels"]  # as in older checkpoints
  assert compare_records(old, _record(with_mixers(scan=other))) == changes
  # "auto" is recorded as what it stands for.
  assert compare_records(_record(run), _record(with_mixers(scan=used))) == []
  with pytest.raises(ValueError, match=r"model.pattern\[0\].mixer.decay_init is 'paper' in the"):
    compare_records(_record(run), _record(with_mixers(decay_init="recurrentgemma")))


def test_xla_flags_are_recorded_as_programs_are_compiled_with_them_and_may_change(store):
  run = _run(store)
  record = _record(run)
  (flag, *_) = xla_flags.TABLE["cpu"]
  assert record["identity"][f"xla_flags.{flag.name}"] == flag.value
  without = dataclasses.replace(run, xla_flags=xla_flags.XlaFlags(drop=flag.name))
  changes = compare_records(record, _record(without))
  assert f"xla_flags.{flag.name}: {flag.value!r} -> '(not there)'" in changes


def test_a_setting_that_a_record_of_before_lacks_is_compared_with_its_default(store):
  run = _run(store)
  before = _record(run)
  del before["identity"]["model.logit_cap"], before["identity"]["model.pattern[0].mixer.conv_taps"]
  assert compare_records(before, _record(run)) == []
  capped = _with_model(run, logit_cap=30.0)
  with pytest.raises(ValueError, match=r"model\.logit_cap is '\(not there\)' in the .*, 30\.0 now"):
    compare_records(before, _record(capped))


def test_a_setting_that_only_the_checkpoint_knows_is_refused(store):
  run = _run(store)
  later = _record(run)
  later["identity"]["model.later"] = 1
  with pytest.raises(ValueError, match=r"model\.later is 1 in the checkpoint, '\(not there\)' now"):
    compare_records(later, _record(run))


CHANGES = {
  "model.num_blocks is 3 in the checkpoint, 6 now": lambda run: _with_model(run, num_blocks=6),
  "model.dtype is 'bfloat16' in the checkpoint, 'float32' now": lambda run: _with_model(
    run, dtype="float32"
  ),
  "batch_size is 4 in the checkpoint, 8 now": lambda run: dataclasses.replace(run, batch_size=8),
  "optimizer.moment_dtype is 'float32' in the checkpoint, 'bfloat16' now": lambda run: (
    dataclasses.replace(
      run, optimizer=dataclasses.replace(run.optimizer, moment_dtype="bfloat16", b2=0.95)
    )
  ),
  "seed is 0 in the checkpoint, 1 now": lambda run: dataclasses.replace(run, seed=1),
  "data.seed is 0 in the checkpoint, 1 now": lambda run: _with_data(run, seed=1),
  "data.row_length is 8 in the checkpoint, 4 now": lambda run: _with_data(run, row_length=4),
  "data.sources[0].weight is 1.0 in the checkpoint, 2.0 now": lambda run: _with_data(
    run, sources=((run.data.sources[0][0], 2.0),)
  ),
}


@pytest.mark.parametrize("expected", CHANGES)
def test_a_change_of_model_batch_or_seed_is_refused_by_name(store, expected):
  run = _run(store)
  with pytest.raises(ValueError, match="cannot go on from its checkpoint") as caught:
    compare_records(_record(run), _record(CHANGES[expected](run)))
  assert expected in str(caught.value)
  assert "Set back what is named, or start a new run with another --workdir" in str(caught.value)


def test_a_token_store_may_move_but_not_change(store, tmp_path):
  run = _run(store)
  moved = _store(tmp_path / "moved", _vocabulary())
  assert compare_records(_record(run), _record(_run(moved))) == []
  edited = _store(tmp_path / "edited", _vocabulary(), seed=1)
  with pytest.raises(ValueError, match=r"data\.sources\[0\]\.fingerprint is '"):
    compare_records(_record(run), _record(_run(edited)))


def test_another_vocabulary_is_refused_by_name(store, tmp_path):
  other = _store(tmp_path / "store", _vocabulary(fingerprint="xyz", eos=2))
  with pytest.raises(ValueError, match="cannot go on") as caught:
    compare_records(_record(_run(store)), _record(_run(other)))
  assert "data.sources[0].vocabulary.fingerprint is 'abc' in the checkpoint, 'xyz' now" in str(
    caught.value
  )
  assert "data.sources[0].vocabulary.eos is 1 in the checkpoint, 2 now" in str(caught.value)


def test_a_source_more_or_less_is_refused(store, tmp_path):
  run = _run(store)
  second = _store(tmp_path / "second", _vocabulary(), seed=1)
  both = _with_data(run, sources=((store, 1.0), (second, 1.0)))
  with pytest.raises(ValueError, match=r"sources\[1\].fingerprint is '\(not there\)'"):
    compare_records(_record(run), _record(both))
  with pytest.raises(ValueError, match=r"sources\[1\].fingerprint is .*, '\(not there\)' now"):
    compare_records(_record(both), _record(run))
