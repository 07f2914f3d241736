"""What the bench times beside steps (launch/bench.py)."""

import dataclasses

import pytest

from launch import bench
from tests import tiny
from tests.fake_gcs import serving


def _timed(run, monkeypatch) -> tuple[tuple[str, float], ...]:
  """The token stores that the bench reads for a run."""
  read = []
  monkeypatch.setattr(bench, "_read", lambda config, _: read.append(config.sources) or 1.0)
  bench._loader_tokens_per_second(run)
  return read[0]


def _of(run, *paths: str):
  data = dataclasses.replace(run.data, sources=tuple((path, 1.0) for path in paths))
  return dataclasses.replace(run, data=data)


@pytest.mark.parametrize("place", ["folder", "bucket"])
def test_the_loader_is_timed_on_the_configs_own_stores_where_all_are_complete(
  place, tmp_path, monkeypatch
):
  run = tiny.run(tmp_path)
  with serving():
    path = tiny.store(f"gs://bucket/{place}" if place == "bucket" else tmp_path / "store")
    own = _of(run, path)
    assert _timed(own, monkeypatch) == own.data.sources
    unfinished = tmp_path / "unfinished"
    unfinished.mkdir()
    assert _timed(_of(run, path, str(unfinished)), monkeypatch)[0][0] not in (path, str(unfinished))
