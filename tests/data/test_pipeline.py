"""Batches: the same for any number of processes and any start; their end, errors, held-out set."""

import dataclasses
import time

import numpy as np
import pytest

from data import pipeline, token_store, vocabulary
from data.pipeline import DataConfig
from data.rows import Batch, Rows
from data.token_store import TokenStore

BYTE = vocabulary.load("byte").record
T = 16


def _write(path, num_documents: int, *, seed: int, record=BYTE) -> str:
  rng = np.random.default_rng(seed)
  documents = [
    np.concatenate([[254], rng.integers(1, 250, rng.integers(1, 40)), [255]])
    for _ in range(num_documents)
  ]
  num_bytes = sum(len(document) - 2 for document in documents)
  token_store.write(str(path), documents, record, text_bytes=num_bytes)
  return str(path)


@pytest.fixture(scope="module")
def stores(tmp_path_factory):
  root = tmp_path_factory.mktemp("stores")
  return tuple(_write(root / name, n, seed=n) for name, n in [("a", 40), ("b", 25), ("eval", 12)])


@pytest.fixture
def config(stores):
  a, b, held_out = stores
  return DataConfig(sources=((a, 0.7), (b, 0.3)), row_length=T, seed=5, eval_source=held_out)


def _take(config: DataConfig, count: int, **arguments) -> list[Batch]:
  with pipeline.train_batches(config, **arguments) as batches:
    return [next(batches) for _ in range(count)]


def _assert_equal(left: Batch, right: Batch) -> None:
  for a, b in zip(left, right, strict=True):
    np.testing.assert_array_equal(a, b)


def _join(parts: list[Batch]) -> Batch:
  return Batch(*(np.concatenate(arrays) for arrays in zip(*parts)))


@pytest.mark.parametrize("process_count", [1, 2, 4])
@pytest.mark.parametrize("start_step", [0, 1, 9])
def test_batches_are_the_same_for_any_processes_and_any_start(config, process_count, start_step):
  expected = _take(config, 14, batch_size=8, start_step=0)
  parts = [
    _take(
      config, 5, batch_size=8, start_step=start_step, process_index=p, process_count=process_count
    )
    for p in range(process_count)
  ]
  for step in range(5):
    _assert_equal(_join([part[step] for part in parts]), expected[start_step + step])


@pytest.mark.parametrize(("read_threads", "prefetch_batches"), [(1, 1), (4, 16)])
def test_reading_ahead_changes_no_batch(config, read_threads, prefetch_batches):
  other = dataclasses.replace(config, read_threads=read_threads, prefetch_batches=prefetch_batches)
  for left, right in zip(
    _take(config, 6, batch_size=4, start_step=0), _take(other, 6, batch_size=4, start_step=0)
  ):
    _assert_equal(left, right)


def test_another_seed_gives_another_order_of_the_same_rows(config):
  config = dataclasses.replace(config, sources=config.sources[:1])
  other = dataclasses.replace(config, seed=6)
  num_rows = len(Rows(TokenStore(config.sources[0][0]), T))
  one = _join(_take(config, num_rows, batch_size=1, start_step=0)).tokens_BT
  two = _join(_take(other, num_rows, batch_size=1, start_step=0)).tokens_BT
  assert (one != two).any()
  assert sorted(map(tuple, one.tolist())) == sorted(map(tuple, two.tolist()))


def test_the_rows_of_a_step_can_be_read_again(config):
  batch = _take(config, 1, batch_size=8, start_step=23)[0]
  addresses = pipeline.batch_addresses(config, position=23, batch_size=8)
  assert {address.source for address in addresses} == {0, 1}
  _assert_equal(pipeline.read_rows(config, addresses), batch)
  _assert_equal(pipeline.read_rows(config, [addresses[6]]), Batch(*(array[6:7] for array in batch)))


@pytest.mark.parametrize("passed_over", [(0,), (2, 3), (11, 4, 2), (40,)])
def test_batches_that_are_passed_over_are_the_only_ones_missing(config, passed_over):
  every = _take(config, 15, batch_size=8, start_step=0)
  kept = [batch for index, batch in enumerate(every) if index not in passed_over]
  for start in (0, 1, 4):
    found = _take(config, 5, batch_size=8, start_step=start, passed_over=passed_over)
    for batch, expected in zip(found, kept[start:]):
      _assert_equal(batch, expected)
  ends = dataclasses.replace(config, at_end="stop")
  available = pipeline.num_steps_available(ends, batch_size=8)
  missing = sum(batch < available for batch in passed_over)
  left = pipeline.num_steps_available(ends, batch_size=8, passed_over=passed_over)
  assert left == available - missing


def test_nothing_is_read_where_every_batch_is_passed_over(config):
  config = dataclasses.replace(config, at_end="stop")
  num_batches = pipeline.num_steps_available(config, batch_size=8)
  assert num_batches
  every = range(num_batches)
  with pipeline.train_batches(config, batch_size=8, start_step=0, passed_over=every) as batches:
    assert next(batches, None) is None


def test_a_row_names_the_documents_that_it_holds_tokens_of(config):
  addresses = pipeline.batch_addresses(config, position=7, batch_size=8)
  batch = pipeline.read_rows(config, addresses)
  for row, content in enumerate(pipeline.row_contents(config, addresses)):
    np.testing.assert_array_equal(content.tokens, batch.tokens_BT[row])
    store = TokenStore(config.sources[addresses[row].source][0])
    first = addresses[row].row * T
    ends = [*store.starts[1:].tolist(), store.manifest.num_tokens]
    held = [
      number
      for number, (start, end) in enumerate(zip(store.starts.tolist(), ends))
      if start < first + T and end > first
    ]
    assert list(content.documents) == held
    assert len(held) == batch.segments_BT[row].max()


def test_repeat_goes_on_after_the_last_row(config):
  num_rows = sum(len(Rows(TokenStore(path), T)) for path, _ in config.sources)
  assert pipeline.num_steps_available(config, batch_size=8) is None
  addresses = pipeline.batch_addresses(config, position=3 * num_rows // 8, batch_size=8)
  assert min(address.epoch for address in addresses) >= 1
  _take(config, 1, batch_size=8, start_step=10**12)


@pytest.mark.parametrize("num_epochs", [1, 3])
def test_stop_ends_at_the_same_step_on_every_process(config, num_epochs):
  config = dataclasses.replace(config, at_end="stop", num_epochs=num_epochs)
  num_steps = pipeline.num_steps_available(config, batch_size=4)
  assert num_steps is not None
  for process in range(2):
    with pipeline.train_batches(
      config, batch_size=4, start_step=0, process_index=process, process_count=2
    ) as batches:
      assert sum(1 for _ in batches) == num_steps
  addresses = [
    a for s in range(num_steps) for a in pipeline.batch_addresses(config, position=s, batch_size=4)
  ]
  # No row more than num_epochs times, and one source nearly used up.
  assert max(addresses.count(address) for address in set(addresses)) == 1
  assert max(address.epoch for address in addresses) == num_epochs - 1
  with pipeline.train_batches(config, batch_size=4, start_step=num_steps) as batches:
    assert next(batches, None) is None
  with pytest.raises(ValueError, match=rf"start_step {num_steps + 1} is not in"):
    pipeline.train_batches(config, batch_size=4, start_step=num_steps + 1)


@pytest.mark.parametrize("process_count", [1, 2, 4])
@pytest.mark.parametrize("batch_size", [4, 8, 64])
def test_every_held_out_row_counts_once(config, process_count, batch_size):
  rows = Rows(TokenStore(config.eval_source), T)
  everything = rows.read(np.arange(len(rows)))
  parts = []
  for process in range(process_count):
    with pipeline.eval_batches(
      config, batch_size=batch_size, process_index=process, process_count=process_count
    ) as batches:
      parts.append(list(batches))
  whole = _join([_join(list(step)) for step in zip(*parts, strict=True)])
  assert whole.tokens_BT.shape == (-(-len(rows) // batch_size) * batch_size, T)
  _assert_equal(Batch(*(array[: len(rows)] for array in whole)), everything)
  assert not whole.weights_BT[len(rows) :].any()


def test_fewer_held_out_rows_are_spread_over_the_store(config):
  rows = Rows(TokenStore(config.eval_source), T)
  config = dataclasses.replace(config, eval_rows=5)
  with pipeline.eval_batches(config, batch_size=8) as batches:
    (batch,) = batches
  chosen = rows.read(np.arange(5) * len(rows) // 5)
  _assert_equal(Batch(*(array[:5] for array in batch)), chosen)


def test_bytes_per_target_counts_the_end_of_documents(config):
  # One byte is one token, and each document has one more target, its eos.
  manifest = token_store.read_manifest(config.eval_source)
  expected = manifest.text_bytes / (manifest.text_bytes + manifest.num_documents)
  assert pipeline.bytes_per_target(config) == expected
  with pipeline.eval_batches(config, batch_size=8) as batches:
    num_targets = sum(int(batch.weights_BT.sum()) for batch in batches)
  assert num_targets * pipeline.bytes_per_target(config) == pytest.approx(manifest.text_bytes)


def test_fingerprints_and_vocabulary_need_manifests_only(config, stores):
  assert list(pipeline.fingerprints(config)) == list(stores)
  assert len(set(pipeline.fingerprints(config).values())) == 3
  assert pipeline.vocabulary(config) == BYTE


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"sources": ()}, "sources is empty"),
    ({"sources": (("a", 0.0),)}, r"weight 0.0 of 'a' must be a finite number above 0"),
    ({"sources": (("a", 1.0), ("b", -2))}, r"weight -2 of 'b'"),
    ({"sources": (("a", float("nan")),)}, r"weight nan of 'a'"),
    ({"sources": (("a", "1"),)}, r"weight '1' of 'a' is not a number"),
    ({"sources": ("a",)}, r"'a' is not a \(path, weight\)"),
    ({"row_length": 0}, "row_length 0 must be at least 1"),
    ({"eval_rows": 0}, "eval_rows 0"),
    ({"read_threads": 0}, "read_threads 0"),
    ({"seed": -1}, "seed -1"),
    ({"at_end": "loop"}, "at_end 'loop' is neither"),
    ({"num_epochs": 2}, "num_epochs 2 has no effect with at_end 'repeat'"),
  ],
)
def test_a_config_that_cannot_be_is_refused_by_name(config, changes, message):
  with pytest.raises(ValueError, match=message):
    dataclasses.replace(config, **changes)


def test_fewer_rows_than_a_batch_are_refused(config):
  with pytest.raises(ValueError, match="rows of 16 tokens are fewer than a batch of 1000"):
    pipeline.train_batches(config, batch_size=1000, start_step=0)
  # Enough rows in all, but the source with the larger share ends before a batch is full.
  uneven = dataclasses.replace(
    config, sources=((config.sources[0][0], 1), (config.sources[1][0], 1000)), at_end="stop"
  )
  with pytest.raises(ValueError, match="in these proportions the data ends after"):
    pipeline.train_batches(uneven, batch_size=60, start_step=0)


@pytest.mark.parametrize(
  ("arguments", "message"),
  [
    ({"batch_size": 6, "process_count": 4}, "batch_size 6 is not divisible by .* processes 4"),
    (
      {"batch_size": 8, "process_count": 4, "process_index": 4},
      r"process_index 4 is not in 0 .. 3",
    ),
    ({"batch_size": 0}, "batch_size 0"),
    ({"batch_size": 8, "start_step": -1}, "start_step -1"),
  ],
)
def test_a_shard_that_cannot_be_is_refused(config, arguments, message):
  with pytest.raises(ValueError, match=message):
    pipeline.train_batches(config, **{"start_step": 0, **arguments})


@pytest.mark.parametrize("place", ["sources", "eval_source"])
def test_stores_of_two_vocabularies_are_refused_by_name(config, tmp_path, place):
  other = dataclasses.replace(BYTE, pad=1)
  path = _write(tmp_path / "other", 30, seed=0, record=other)
  value = (*config.sources, (path, 1.0)) if place == "sources" else path
  config = dataclasses.replace(config, **{place: value})
  first = config.sources[0][0]
  with pytest.raises(ValueError, match=rf"{first} and {path} have different .*pad 0.*pad 1"):
    pipeline.train_batches(config, batch_size=4, start_step=0)


def test_an_edited_store_stops_training_before_the_first_batch(config, tmp_path):
  path = _write(tmp_path / "s", 30, seed=0)
  file = tmp_path / "s" / "tokens" / "c" / "0"
  content = bytearray(file.read_bytes())
  content[5] ^= 1
  file.write_bytes(bytes(content))
  config = dataclasses.replace(config, sources=((path, 1.0),))
  with pytest.raises(ValueError, match=rf"token store {path}: truncated or edited"):
    pipeline.train_batches(config, batch_size=4, start_step=0)


def test_no_held_out_store_is_an_error_only_where_it_is_needed(config):
  config = dataclasses.replace(config, eval_source=None)
  _take(config, 1, batch_size=4, start_step=0)
  for function in (pipeline.bytes_per_target, lambda c: pipeline.eval_batches(c, batch_size=4)):
    with pytest.raises(ValueError, match="eval_source is None"):
      function(config)


def test_a_closed_iterator_gives_nothing_more(config):
  batches = pipeline.train_batches(config, batch_size=4, start_step=0)
  next(batches)
  batches.close()
  with pytest.raises(ValueError, match="closed"):
    next(batches)


def test_the_loader_is_20_times_faster_than_the_smoke_config_trains(tmp_path):
  # The smoke config (16 rows of 256) trains at about 10,000 tokens/s on two cores; this loads
  # millions, so a slow or loaded machine passes too.
  rng = np.random.default_rng(0)
  documents = [np.concatenate([[254], rng.integers(1, 250, 5000), [255]]) for _ in range(100)]
  token_store.write(str(tmp_path / "s"), documents, BYTE, text_bytes=500_000)
  config = DataConfig(sources=((str(tmp_path / "s"), 1.0),), row_length=256)
  with pipeline.train_batches(config, batch_size=16, start_step=0) as batches:
    next(batches)
    start = time.perf_counter()
    for _ in range(100):
      next(batches)
    seconds = time.perf_counter() - start
  assert 100 * 16 * 256 / seconds > 20 * 10_000
