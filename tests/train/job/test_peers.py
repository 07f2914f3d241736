"""Whose failure it is, as process 0 judges: that of a process that is gone, or of one alive."""

import time

import pytest

from train.job.peers import Peers


class _Service:
  """The part of jax's coordination service that process 0 uses to judge."""

  def __init__(self):
    self.told = {}

  def key_value_set(self, key, value, allow_overwrite=False):
    assert allow_overwrite or key not in self.told
    self.told[key] = value

  def key_value_dir_get(self, name):
    return [(key, value) for key, value in self.told.items() if key.startswith(name)]


@pytest.mark.parametrize("lives", [False, True])
def test_one_whose_last_word_came_in_after_the_trouble_is_gone(monkeypatch, lives):
  """Killed just after it reported, before the service had the report: the error in the other's
  collective came first, and was taken for the other's own failure, with another status."""

  left = []
  monkeypatch.setattr(Peers, "leave", staticmethod(left.append))
  peers = Peers(None, index=0, hosts=("a", "b"), seconds=1.0)
  peers._client = service = _Service()
  peers._trouble = service.told["trouble/0"] = "Connection closed by peer"
  end, beat = time.monotonic() + 5.0, 0
  while time.monotonic() < end and not any(key.startswith("verdict/") for key in service.told):
    beat += 1
    service.told["alive/0"] = str(beat)
    # The second report arrives a beat after the trouble.
    if beat <= 2 or lives:
      service.told["alive/1"] = str(beat)
    peers._judge()
    time.sleep(peers._beat)
  if lives:
    assert not left
    assert service.told["verdict/failed"] == "process 0 (host a): Connection closed by peer"
  else:
    (message,) = left
    assert message.startswith("process 1 (host b): gone or hanging, not heard of for ")
    assert "process 0 (host a): Connection closed by peer" in message
