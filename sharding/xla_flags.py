"""XLA flags for each chip, each with its reason.

They are compile options of every program and not environment variables, so a program compiled for a
machine that is not here is the one that would run there.
"""

import dataclasses
import functools
from typing import ClassVar

import jax
from absl import logging

from sharding.topology import chip_of

Value = bool | int | str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Flag:
  """A flag by XLA's name, our value, the reason, and who recommends it or where it was measured."""

  name: str
  value: Value
  reason: str
  source: str


_OPTIMIZATION_LEVEL = Flag(
  name="xla_backend_optimization_level",
  value=1,
  reason="A CPU step is matrix products, which are a library's: LLVM compiles the rest in three "
  "quarters of the time, and the step takes as long as at level 3.",
  source="docs/benchmarks.md",
)
_FUSION_EMITTERS = Flag(
  name="xla_cpu_use_fusion_emitters",
  value=False,
  reason="The older emitters compile in two thirds of the time; steps take as long.",
  source="docs/benchmarks.md",
)

# By the key of sharding/topology.py, and "cpu". Releases after jax 0.10 have no older emitters.
# TPUs and GPUs have none: what their maintainers recommend changed nothing in the compiled step, or
# made it worse (docs/benchmarks.md, "XLA flags that were tried").
TABLE: dict[str, tuple[Flag, ...]] = {
  "cpu": (
    (_OPTIMIZATION_LEVEL, _FUSION_EMITTERS)
    if jax.__version_info__ < (0, 11)
    else (_OPTIMIZATION_LEVEL,)
  ),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class XlaFlags:
  """What a run changes of its chip's table.

  set   flags to add, or to give another value: "xla_some_flag=true,xla_other=3"
  drop  flags of the table to leave to the compiler: "xla_some_flag", or "all"
  """

  recorded_as: ClassVar[str] = "sharding.xla_flags.XlaFlags"

  set: str = ""
  drop: str = ""

  def __post_init__(self):
    for written in _parts(self.set):
      name, equals, value = written.partition("=")
      if not (name.startswith("xla_") and equals and value):
        raise ValueError(f"XlaFlags: {written!r} of set is not xla_NAME=VALUE")
    for name in _parts(self.drop):
      if name != "all" and not (name.startswith("xla_") and "=" not in name):
        raise ValueError(f"XlaFlags: {name!r} of drop is neither the name of a flag nor 'all'")

  def resolved(self, chip: str) -> dict[str, Value]:
    """The flags to compile with for `chip`, a key of TABLE or a chip that we set none for.

    ValueError if `drop` names a flag that its table does not have.
    """
    flags = {flag.name: flag.value for flag in TABLE.get(chip, ())}
    for name in _parts(self.drop):
      if name == "all":
        flags = {}
      elif name in flags:
        del flags[name]
      else:
        raise ValueError(
          f"XlaFlags: drop names {name}, which we do not set for {chip}; we set "
          f"{', '.join(flags) or 'none'}"
        )
    for written in _parts(self.set):
      name, _, value = written.partition("=")
      flags[name] = _value(value)
    return flags


def key_of(device_kind: str) -> str:
  """The key of the chip that JAX calls `device_kind`; the kind itself where none is, as "cpu"."""
  chip = chip_of(device_kind)
  return device_kind if chip is None else chip.key


@functools.cache
def log_once(chip: str, flags: tuple[tuple[str, Value], ...]) -> None:
  """Logs the flags that programs are compiled with."""
  words = ", ".join(f"{name}={value}" for name, value in flags) or "none"
  logging.info("XLA flags for %s: %s", chip, words)


def _parts(written: str) -> list[str]:
  return [part.strip() for part in written.split(",") if part.strip()]


def _value(written: str) -> Value:
  match written.lower():
    case "true" | "false":
      return written.lower() == "true"
    case number if number.lstrip("-").isdigit():
      return int(number)
  return written
