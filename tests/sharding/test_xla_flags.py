"""XLA flags: each compiler takes those of its chips, runs change them, unknown ones are refused."""

import dataclasses

import jax
import pytest

from sharding import machine as machines
from sharding.mesh import MeshShape
from sharding.xla_flags import TABLE, XlaFlags, key_of
from tests import tiny
from train import program as programs

_SMALLEST = {"v3": "2x2", "v4": "2x2x1", "v5e": "2x2", "v5p": "2x2x1", "v6e": "2x2"}


def _lowered(device):
  sharding = jax.sharding.SingleDeviceSharding(device)
  x = jax.ShapeDtypeStruct((8, 128), "float32", sharding=sharding)
  return jax.jit(lambda x: x + 1.0).lower(x)


@pytest.mark.parametrize("chip", [*_SMALLEST, "cpu"])
def test_the_compiler_of_each_chip_takes_its_flags(chip):
  if chip == "cpu":
    device = jax.devices()[0]
  else:
    device = machines.of_topology(f"{chip}:{_SMALLEST[chip]}").devices()[0]
  flags = XlaFlags().resolved(key_of(device.device_kind))
  assert flags == {flag.name: flag.value for flag in TABLE.get(chip, ())}
  _lowered(device).compile(flags)


def test_every_flag_says_why_and_who_says_so():
  for flags in TABLE.values():
    assert len({flag.name for flag in flags}) == len(flags)
    assert all(flag.name.startswith("xla_") and flag.reason and flag.source for flag in flags)


@pytest.mark.parametrize("topology", ["v5e:2x2", None])
def test_a_flag_that_the_compiler_does_not_know_is_refused(topology, tmp_path):
  devices = machines.of_topology(topology).devices() if topology else jax.devices()[:4]
  changes = XlaFlags(set="xla_tpu_invented_flag=true")
  run = tiny.run(tmp_path, mesh=MeshShape(fsdp=4), xla_flags=changes)
  program = programs.build(run, devices=devices)
  with pytest.raises(ValueError, match=r"has no flag xla_tpu_invented_flag; leave it out"):
    programs.compile_step(program, _lowered(devices[0]))


def test_a_program_is_compiled_with_the_flags_of_its_devices(tmp_path):
  told = []

  class Lowered:
    def compile(self, options):
      told.append(options)

  run = tiny.run(tmp_path, mesh=MeshShape(fsdp=4), xla_flags=XlaFlags(set="xla_some_flag=3"))
  for devices in (jax.devices()[:4], machines.of_topology("v5e:2x2").devices()):
    programs.compile_step(programs.build(run, devices=devices), Lowered())
    chip = key_of(devices[0].device_kind)
    table = {flag.name: flag.value for flag in TABLE.get(chip, ())}
    assert told.pop() == {**table, "xla_some_flag": 3}


def test_a_run_adds_flags_and_leaves_some_out():
  name, level = "xla_backend_optimization_level", TABLE["cpu"][0].value
  assert XlaFlags().resolved("cpu")[name] == level
  assert name not in XlaFlags(drop=name).resolved("cpu")
  assert XlaFlags(drop="all").resolved("cpu") == {}
  changed = XlaFlags(drop="all", set=f"{name}=3, xla_a=true,xla_b=0.5")
  assert changed.resolved("cpu") == {name: 3, "xla_a": True, "xla_b": "0.5"}
  with pytest.raises(ValueError, match="drop names xla_c, which we do not set for cpu; we set"):
    XlaFlags(drop="xla_c").resolved("cpu")


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"set": "tpu_flag=1"}, "'tpu_flag=1' of set is not xla_NAME=VALUE"),
    ({"set": "xla_a"}, "'xla_a' of set"),
    ({"set": "--xla_a=1"}, "'--xla_a=1' of set"),
    ({"drop": "xla_a=1"}, "'xla_a=1' of drop is neither"),
  ],
)
def test_what_is_no_flag_is_refused(changes, message):
  with pytest.raises(ValueError, match=message):
    dataclasses.replace(XlaFlags(), **changes)
