"""The run of tests/tiny_config.py with a fault in it: `--config=tests/faulty_config.py:FOLDER`.

A config is a program: it breaks what the run is about to use. Which rows break a step is in the
data: a target NAN or SPIKE multiplies its own loss.
"""

import ctypes
import dataclasses
import errno
import os
import pathlib
import resource
import time
from collections.abc import Callable

import jax.numpy as jnp
import numpy as np

from data import token_store, vocabulary
from data.pipeline import DataConfig
from sharding.xla_flags import XlaFlags
from tests import tiny_config
from train import loss
from train.bad_steps import BadStepPolicy
from train.checkpoint.checkpoints import CheckpointConfig, Checkpoints
from train.config import Run

NAN, SPIKE = 1, 2


def store(path: pathlib.Path, marks: dict[int, int]) -> str:
  """A store of 75 batches of 8 rows of 16 tokens in which document i holds a byte marks[i]."""
  rng = np.random.default_rng(0)
  words = vocabulary.load("byte")
  texts = [bytes(rng.integers(97, 123, 48).tolist()) for _ in range(195)]
  for document, mark in marks.items():
    texts[document] = texts[document][:20] + bytes([mark]) + texts[document][21:]
  encoded = [words.encode(text.decode()) for text in texts]
  token_store.write(str(path), encoded, words.record, text_bytes=sum(map(len, texts)))
  return str(path)


def data(folder: pathlib.Path) -> DataConfig:
  """Rows of the store FOLDER/marked."""
  return DataConfig(sources=((str(folder / "marked"), 1.0),), row_length=16)


def get_config(argument: str) -> Run:
  """60 steps on the store FOLDER/marked, a checkpoint every 10; "FOLDER,fault" with one of FAULTS
  from the checkpoint of step 30 on."""
  folder, _, fault = argument.partition(",")
  _break_marked_batches()
  if fault:
    _from_step(30, FAULTS[fault])
  run = tiny_config.get_config(folder)
  return dataclasses.replace(
    run,
    data=data(pathlib.Path(folder)),
    checkpoint=CheckpointConfig(every_steps=10),
    bad_steps=BadStepPolicy(spike_window=8),
    xla_flags=XlaFlags(set="xla_backend_optimization_level=0"),  # it runs for a second
  )


def _break_marked_batches() -> None:
  sound = loss.log_z_and_target_logit

  def broken(x_BTD, unembed_VD, targets_BT, **settings):
    log_z_BT, target_logit_BT = sound(x_BTD, unembed_VD, targets_BT, **settings)
    factor_BT = jnp.where(targets_BT == SPIKE, 1000.0, 1.0)
    factor_BT = jnp.where(targets_BT == NAN, jnp.nan, factor_BT)
    return factor_BT * log_z_BT, target_logit_BT

  loss.log_z_and_target_logit = broken


def _from_step(first: int, fault: Callable[[pathlib.Path], None]) -> None:
  """Lets the fault set in when the checkpoint of step `first` is about to be written."""
  sound = Checkpoints.save

  def save(self, step, state, record, *, kind):
    if step == first:
      self.wait()
      fault(pathlib.Path(str(self.storage)))
    sound(self, step, state, record, kind=kind)

  Checkpoints.save = save


def _full(directory: pathlib.Path) -> None:
  """No file grows over 64 KB, as on a disk without space: what is printed fits, arrays do not."""
  resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, 1 << 16))


def _read_only(directory: pathlib.Path) -> None:
  """Nobody may write there, nor may root: its privilege to do so all the same is given up."""
  header, none = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()
  assert ctypes.CDLL(None, use_errno=True).capset(header, none) == 0
  directory.chmod(0o555)


def _failing(directory: pathlib.Path) -> None:
  """The disk says so only when it is asked whether all is written, in the background."""

  def fsync(descriptor: int) -> None:
    raise OSError(errno.EIO, os.strerror(errno.EIO))

  os.fsync = fsync


def _slow(directory: pathlib.Path) -> None:
  """Every file takes so long that all take longer than the steps between two checkpoints."""
  sound = os.fsync

  def fsync(descriptor: int) -> None:
    time.sleep(0.005)
    sound(descriptor)

  os.fsync = fsync


FAULTS = {"full": _full, "read_only": _read_only, "failing": _failing, "slow": _slow}
