"""Parts of a store in the making: which are used again, how they are put together, who may."""

import fcntl

import pytest

from data import parts


def test_a_lock_that_its_holder_removed_since_it_was_opened_is_taken_anew(tmp_path, monkeypatch):
  path = tmp_path / "work" / "lock"
  first = parts.held(path)
  first.__enter__()
  flock, has_ended = fcntl.flock, []

  def after_the_first_has_ended(file, how):
    if not has_ended:
      has_ended.append(True)
      first.__exit__(None, None, None)
      path.parent.rmdir()
    flock(file, how)

  monkeypatch.setattr(fcntl, "flock", after_the_first_has_ended)
  with parts.held(path):
    assert path.exists()
    with pytest.raises(ValueError, match="another prepare is at work"), parts.held(path):
      pass
  assert not path.exists()


def test_without_locks_a_prepare_says_so_and_goes_on(tmp_path, monkeypatch, caplog):
  def refuse(file, how):
    raise OSError("locks are not supported")

  monkeypatch.setattr(fcntl, "flock", refuse)
  with caplog.at_level("WARNING", logger="absl"), parts.held(tmp_path / "lock"):
    assert f"{tmp_path}: no locks here (locks are not supported)" in caplog.text
  assert not list(tmp_path.iterdir())
