"""The traffic model's collectives between shards of a row are those of the compiled step."""

import dataclasses

import pytest

from models import residual_block
from models.decoder import DecoderConfig
from models.layers import attention, mlp, rg_lru
from sharding import collectives as compiled
from sharding import machine as machines
from sharding.mesh import MeshShape
from tests import tiny
from train import program as programs
from train.planning.traffic import collectives

_RECURRENT = rg_lru.Config(rnn_width=32, scan="reference")
_LOCAL = attention.Config(num_heads=2, head_size=8, window=12, implementation="banded")
_GLOBAL = attention.Config(
  num_heads=4, num_kv_heads=2, head_size=8, window=None, implementation="reference"
)


@pytest.mark.parametrize(
  ("mixers", "mesh", "remat", "parts"),
  [
    # A shard of 8 tokens is shorter than the window: it needs those of two others.
    ((_RECURRENT, _LOCAL), MeshShape(fsdp=2, sequence=4), "block", 1),
    ((_RECURRENT,), MeshShape(sequence=4, tensor=2), "none", 2),
    ((_GLOBAL,), MeshShape(data=2, sequence=4), "matmuls", 1),
  ],
)
def test_shards_of_a_row_send_what_the_model_says(mixers, mesh, remat, parts, tmp_path):
  run = tiny.run(tmp_path)
  pattern = tuple(residual_block.Config(mixer=one, mlp=mlp.Config(mlp_width=48)) for one in mixers)
  run = dataclasses.replace(
    run,
    model=DecoderConfig(
      vocab_size=256,
      width=24,
      num_blocks=2 * len(mixers),
      pattern=pattern,
      dtype="float32",
      remat=remat,
    ),
    data=dataclasses.replace(run.data, row_length=32),
    mesh=mesh,
    num_microbatches=parts,
  )
  program = programs.build(run)
  step = programs.compile_step(program, programs.lower_train_step(program))
  sent = compiled.summary(compiled.read(step.as_text(), program.mesh))
  said = collectives(run, mesh, machines.of_topology("v5e:2x4"))
  modelled = {one.kind: (one.times, one.bytes) for one in said if one.axes == ("sequence",)}
  # Sums over shards are those of parameters' gradients.
  modelled.pop("all-reduce", None)
  assert modelled == {
    kind: total
    for (kind, axes), total in sent.items()
    if "sequence" in axes and kind != "all-reduce"
  }
