"""Rows: each token a target once, segments and weights follow documents, the order is fixed."""

import numpy as np
import pytest

from data import token_store, vocabulary
from data.mixture import Mixture, integer_shares
from data.rows import Rows, num_rows, shuffled
from data.token_store import TokenStore

BYTE = vocabulary.load("byte").record
GOLDEN_ORDER = [9, 4, 8, 7, 5, 3, 0, 6, 2, 1]
GOLDEN_MIXTURE = [
  (0, 0, 7),
  (1, 0, 1),
  (0, 0, 1),
  (0, 0, 9),
  (1, 0, 3),
  (0, 0, 8),
  (0, 0, 6),
  (1, 0, 2),
]


def _store(path, lengths, *, seed=0) -> TokenStore:
  """A store of documents with these numbers of tokens, bos and eos included."""
  rng = np.random.default_rng(seed)
  documents = [
    np.concatenate([[BYTE.bos], rng.integers(1, 250, length - 2), [BYTE.eos]]) for length in lengths
  ]
  token_store.write(str(path), documents, BYTE, text_bytes=sum(lengths))
  return TokenStore(str(path))


def test_a_packed_row_by_hand(tmp_path):
  documents = [np.array([254, 1, 2, 255]), np.array([254, 3, 255]), np.array([254, 4, 5, 255])]
  token_store.write(str(tmp_path / "s"), documents, BYTE, text_bytes=5)
  batch = Rows(TokenStore(str(tmp_path / "s")), 6).read(np.array([0, 1]))
  assert batch.tokens_BT.tolist() == [[254, 1, 2, 255, 254, 3], [255, 254, 4, 5, 255, 0]]
  assert batch.targets_BT.tolist() == [[1, 2, 255, 254, 3, 255], [254, 4, 5, 255, 0, 0]]
  assert batch.segments_BT.tolist() == [[1, 1, 1, 1, 2, 2], [1, 2, 2, 2, 2, 0]]
  assert batch.weights_BT.tolist() == [[1, 1, 1, 0, 1, 1], [0, 1, 1, 1, 0, 0]]
  assert [array.dtype.name for array in batch] == ["int32", "int32", "int32", "float32"]


@pytest.mark.parametrize("row_length", [1, 7, 64, 1000])
@pytest.mark.parametrize(
  "lengths", [[2], [2, 2, 2], [130, 2, 3, 64, 65, 63], [1000, 5]], ids=lambda ls: f"{len(ls)}docs"
)
def test_every_token_is_a_target_exactly_once(tmp_path, lengths, row_length):
  store = _store(tmp_path / "s", lengths)
  rows = Rows(store, row_length)
  batch = rows.read(np.arange(len(rows)))
  flat = store.read(np.array([0]), store.manifest.num_tokens)[0]
  is_real = batch.targets_BT.reshape(-1)[: len(flat) - 1]
  np.testing.assert_array_equal(is_real, flat[1:])
  # All but the first token of each document count, also where a row ends within one.
  assert batch.weights_BT.sum() == sum(lengths) - len(lengths)
  expected = np.ones(len(flat))
  expected[store.starts] = 0
  np.testing.assert_array_equal(batch.weights_BT.reshape(-1)[: len(flat) - 1], expected[1:])
  assert batch.weights_BT.reshape(-1)[len(flat) - 1 :].sum() == 0


@pytest.mark.parametrize("row_length", [7, 64])
def test_segments_change_exactly_where_documents_start(tmp_path, row_length):
  store = _store(tmp_path / "s", [130, 2, 3, 64, 65, 63, 4, 4])
  rows = Rows(store, row_length)
  batch = rows.read(np.arange(len(rows)))
  for row, segments_T in enumerate(batch.segments_BT):
    positions = row * row_length + np.arange(row_length)
    real = segments_T[positions < store.manifest.num_tokens]
    assert segments_T[0] == 1
    assert not segments_T[len(real) :].any()
    changes = positions[1 : len(real)][np.diff(real) == 1]
    starts = [s for s in store.starts if positions[0] < s <= positions[len(real) - 1]]
    assert changes.tolist() == starts
    assert set(np.diff(real).tolist()) <= {0, 1}


def test_a_row_is_the_same_whatever_is_read_with_it(tmp_path):
  rows = Rows(_store(tmp_path / "s", [50] * 20), 16)
  together = rows.read(np.array([5, 0, 11, 5]))
  for place, index in enumerate([5, 0, 11, 5]):
    alone = rows.read(np.array([index]))
    for a, b in zip(alone, together):
      np.testing.assert_array_equal(a[0], b[place])


def test_index_minus_one_is_a_row_of_padding(tmp_path):
  rows = Rows(_store(tmp_path / "s", [50]), 16)
  batch = rows.read(np.array([-1, 0]))
  assert not batch.segments_BT[0].any()
  assert not batch.weights_BT[0].any()
  assert (batch.tokens_BT[0] == BYTE.pad).all()
  assert batch.segments_BT[1].all()


def test_a_row_that_is_not_there_is_refused(tmp_path):
  rows = Rows(_store(tmp_path / "s", [50]), 16)
  with pytest.raises(ValueError, match="has 4 rows"):
    rows.read(np.array([4]))
  with pytest.raises(ValueError, match="row_length 0"):
    Rows(rows.store, 0)


@pytest.mark.parametrize(("num_tokens", "rows"), [(0, 0), (1, 0), (2, 1), (9, 1), (10, 2), (17, 2)])
def test_number_of_rows(num_tokens, rows):
  assert num_rows(num_tokens, 8) == rows


@pytest.mark.parametrize("size", [1, 2, 3, 7, 64, 65, 1000])
def test_the_shuffle_is_a_permutation(size):
  for seed in range(3):
    order = [shuffled(position, size, seed=(seed,)) for position in range(size)]
    assert sorted(order) == list(range(size))


def test_the_shuffle_leaves_no_trace_of_the_order():
  orders = np.array([[shuffled(p, 500, seed=(s, 0)) for p in range(500)] for s in range(20)])
  # Mean 0, standard deviation 1/sqrt(500) for a uniform permutation.
  for order in orders:
    assert abs(np.corrcoef(order, np.arange(500))[0, 1]) < 0.2
    assert abs(np.corrcoef(order[1:], order[:-1])[0, 1]) < 0.2
    assert (np.diff(order) == 1).sum() < 8
  assert len({tuple(order) for order in orders}) == 20


def test_the_order_of_rows_is_what_checkpoints_rely_on():
  # Do not update: with another order, a resumed run would read other rows than before.
  assert [shuffled(p, 10, seed=(0, 0, 0)) for p in range(10)] == GOLDEN_ORDER
  mixture = Mixture(num_rows=(10, 4), shares=(2, 1), seed=1)
  assert [tuple(mixture.address(index)) for index in range(8)] == GOLDEN_MIXTURE


@pytest.mark.parametrize(
  ("weights", "shares"),
  [((1.0,), (1,)), ((0.7, 0.3), (7, 3)), ((2, 4), (1, 2)), ((1e-3, 1), (1, 1000))],
)
def test_weights_are_taken_as_written(weights, shares):
  assert integer_shares(weights) == shares


@pytest.mark.parametrize("shares", [(1,), (7, 3), (1, 1, 1), (5, 3, 1, 1000), (1, 97)])
def test_a_mixture_gives_each_source_its_share_at_every_length(shares):
  mixture = Mixture(num_rows=tuple(50 for _ in shares), shares=shares, seed=3)
  given = np.zeros(len(shares))
  for index in range(1500):
    given[mixture.address(index).source] += 1
    assert tuple(given) == mixture.counts(index + 1)
    assert np.abs(given - (index + 1) * np.array(shares) / sum(shares)).max() < len(shares)


def test_each_epoch_of_a_source_is_all_its_rows_in_another_order():
  mixture = Mixture(num_rows=(30, 20), shares=(3, 1), seed=0)
  addresses = [mixture.address(index) for index in range(400)]
  first = [a.row for a in addresses if a.source == 0 and a.epoch == 0]
  second = [a.row for a in addresses if a.source == 0 and a.epoch == 1]
  assert sorted(first) == sorted(second) == list(range(30))
  assert first != second
  other = [a.row for a in addresses if a.source == 1 and a.epoch == 0]
  assert sorted(other) == list(range(20))


@pytest.mark.parametrize("num_epochs", [1, 2])
def test_a_mixture_ends_before_a_source_would_start_over(num_epochs):
  mixture = Mixture(num_rows=(30, 20), shares=(1, 1), seed=0)
  available = mixture.num_rows_within(num_epochs)
  assert max(mixture.address(index).epoch for index in range(available)) == num_epochs - 1
  assert mixture.address(available).epoch == num_epochs
  assert available in (40 * num_epochs, 40 * num_epochs + 1)
