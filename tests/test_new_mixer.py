"""A mixer that nothing but this file knows goes everywhere: one mixer, one file."""

import dataclasses
import json
from typing import ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from kernels import dispatch
from launch.pages.plan_text import plan_lines
from launch.pages.report_text import summary_lines
from models import decoder, observe, residual_block
from models.costs import FlopsPart, LayerActivations, LeastTokens, Sends, Sent, Shard
from models.decoder import DecoderConfig
from models.generate import generate
from models.huggingface import directory
from models.kernel_fields import kernel_field
from models.layers import mlp, projection
from models.layers.projection import project
from models.layers.segments import NO_DOCUMENT
from models.param import normal, param
from models.remat import SavedNames
from models.statistics import Column, Picture, Statistics
from sharding import machine as machines
from sharding.mesh import MeshShape
from tests import tiny
from tests.reported_runs import page_words
from train import loop
from train import program as programs
from train.layer_statistics import StatisticsConfig
from train.planning import plan as plans
from train.record import compare_records, run_record
from train.scaling.sweep import Point, compare, new_record
from train.telemetry import history
from train.workdir.jsonl import read_jsonl, series


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeanConfig:
  """The causal mean over the tokens of a document, in `mean_width` channels."""

  recorded_as: ClassVar[str] = "tests.test_new_mixer.MeanConfig"

  mean_width: int
  sums: str = kernel_field("running_sum")

  def kernels(self, dtype: str) -> dict[str, str]:
    del dtype
    defaults = {"cpu": "products", "gpu": "products", "tpu": "cumulative"}
    available = ("products", "cumulative")
    return {
      "sums": dispatch.resolve("running_sum", self.sums, available=available, defaults=defaults)
    }

  def build(self, width: int, *, num_blocks: int, rngs: nnx.Rngs) -> "Mean":
    del num_blocks
    return Mean(self, width, rngs=rngs)

  def saved_names(self) -> SavedNames:
    return projection.SAVED

  def scopes(self) -> tuple[str, ...]:
    return ("mean",)

  def statistics(self) -> Statistics:
    columns = (Column("mean_rms", "root mean square of the means"),)
    picture = Picture("Means of a document", "root mean square", "lines", ("mean_rms",), "", True)
    return Statistics("What the means do", "A <note>.", columns, (picture,))

  def tensor_sizes(self) -> dict[str, int]:
    return {"mean_width": self.mean_width}

  def least_tokens_per_shard(self) -> LeastTokens:
    return LeastTokens(2, "a mean of this test wants")

  def flops(self, width: int, row_length: int) -> tuple[FlopsPart, ...]:
    del row_length
    out = 2.0 * width * self.mean_width
    return (FlopsPart(name="mean", words="running means", flops=2 * out, last=out),)

  def activations(self, width: int, shard: Shard) -> LayerActivations:
    means = shard.itemsize * self.mean_width / shard.tensor
    stream = shard.itemsize * width
    # Float32 sums are written and read.
    return LayerActivations(means + stream, 0.0, 2 * stream + 8 * means, 6 * means, 4 * means)

  def sends(self, shard: Shard) -> Sends:
    sums = 4 * shard.rows * self.mean_width / shard.tensor
    return Sends(each=(Sent("all-gather", "sequence", 2, 2 * shard.sequence * sums),))


class MeanState(NamedTuple):
  """Of the last document: the sum of its tokens, how many they are, its number."""

  sum_BR: jax.Array
  count_B: jax.Array
  document_B: jax.Array


class Mean(nnx.Module):
  """y = (scale * mean(x w_in) + shift) w_out."""

  def __init__(self, config: MeanConfig, width: int, *, rngs: nnx.Rngs):
    (self.sums,) = config.kernels("float32").values()
    channels = config.mean_width
    self.w_in_DR = param(normal(1 / width), (width, channels), ("embed", "rnn"), rngs=rngs)
    self.w_out_RD = param(normal(1 / channels), (channels, width), ("rnn", "embed"), rngs=rngs)
    self.scale_2R = param(
      lambda key, shape: jnp.ones(shape) * jnp.array([[1.0], [0.0]]),
      (2, channels),
      ("branch", "rnn"),
      float32=True,
      decays=False,
      rngs=rngs,
    )

  def initial_state(self, batch, context, dtype):
    del context, dtype
    empty_BR = jnp.zeros((batch, self.w_in_DR.shape[1]), jnp.float32)
    return MeanState(empty_BR, jnp.zeros((batch,)), jnp.full((batch,), NO_DOCUMENT, jnp.int32))

  def __call__(self, x_BTD, segments, state):
    dtype, document_BT = x_BTD.dtype, segments.document_BT
    with jax.named_scope("mean"):
      u_BTR = project(x_BTD, self.w_in_DR[...].astype(dtype)).astype(jnp.float32)
      before = self.initial_state(len(document_BT), 0, dtype) if state is None else state
      goes_on_BT = document_BT == before.document_B[:, None]
      sum_BTR = self._sums(u_BTR, document_BT) + goes_on_BT[..., None] * before.sum_BR[:, None]
      one_BT1 = jnp.ones_like(u_BTR[..., :1])
      count_BT = self._sums(one_BT1, document_BT)[..., 0] + goes_on_BT * before.count_B[:, None]
      mean_BTR = self.scale_2R[0] * sum_BTR / count_BT[..., None] + self.scale_2R[1]
      if observe.is_on():
        observe.record(mean_rms=observe.rms(mean_BTR))
      y_BTD = project(mean_BTR.astype(dtype), self.w_out_RD[...].astype(dtype))
    after = MeanState(sum_BTR[:, -1], count_BT[:, -1], document_BT[:, -1])
    return y_BTD, None if state is None else after

  def _sums(self, u_BTR, document_BT):
    """Over the tokens of the same document up to each."""
    if self.sums == "products":
      is_same_BTS = document_BT[:, :, None] == document_BT[:, None, :]
      return jnp.einsum("BTS,BSR->BTR", jnp.tril(is_same_BTS).astype(jnp.float32), u_BTR)
    whole_BTR = jnp.cumsum(u_BTR, axis=1)
    first_BT = jax.vmap(lambda row_T: jnp.searchsorted(row_T, row_T))(document_BT)
    earlier_BTR = jnp.take_along_axis(whole_BTR - u_BTR, first_BT[..., None], axis=1)
    return whole_BTR - earlier_BTR


def _model(**settings) -> DecoderConfig:
  mean = MeanConfig(mean_width=16)
  return DecoderConfig(
    vocab_size=256,
    width=32,
    num_blocks=3,
    pattern=(
      residual_block.Config(mixer=mean, mlp=mlp.Config(mlp_width=48)),
      residual_block.Config(mixer=mean, mlp=None),
    ),
    **{"dtype": "float32", "remat": "none", **settings},
  )


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
  """A run of 4 steps that was resumed after 2, and its workdir."""
  folder = tmp_path_factory.mktemp("mean")
  run = tiny.run(
    folder,
    name="mean",
    model=_model(),
    mesh=MeshShape(fsdp=-1),
    total_steps=4,
    statistics=StatisticsConfig(every=1),
  )
  for total_steps in (2, 4):
    part = dataclasses.replace(run, total_steps=total_steps)
    assert loop.fit(part, folder / "run") == "complete"
  return run, folder / "run"


def test_it_trains_and_resumes(trained):
  _, workdir = trained
  losses = series(read_jsonl(workdir / "metrics.jsonl"), "train/loss")
  assert list(losses) == [1, 2, 3, 4]
  assert losses[4] < losses[1]
  starts = [start.step for start in history.read(workdir).log.starts]
  assert starts == [0, 2]


def test_its_record_names_its_kernel_and_refuses_another_width(trained):
  run, _ = trained
  record = run_record(run, decoder.build(run.model))
  mixer = "model.pattern[0].mixer"
  assert record["identity"][mixer] == MeanConfig.recorded_as
  assert record["identity"][f"{mixer}.sums"] == "products"
  named = dataclasses.replace(MeanConfig(mean_width=16), sums="cumulative")
  wide = MeanConfig(mean_width=8)

  def with_mixer(mixer):
    pattern = tuple(dataclasses.replace(block, mixer=mixer) for block in run.model.pattern)
    changed = dataclasses.replace(run.model, pattern=pattern)
    return run_record(dataclasses.replace(run, model=changed), decoder.build(changed))

  lines = compare_records(record, with_mixer(named))
  assert lines == [f"model.pattern[{i}].mixer.sums: 'products' -> 'cumulative'" for i in (0, 1)]
  with pytest.raises(ValueError, match=r"mixer\.mean_width is 16 in the checkpoint, 8 now"):
    compare_records(record, with_mixer(wide))


def test_its_parameters_are_what_they_were_declared_to_be():
  model = decoder.build(_model(dtype="bfloat16", param_dtype="bfloat16"))
  mixer, decays = (tree["groups"]["0"]["mixer"] for tree in (model.shapes, model.decays))
  assert mixer["scale_2R"].dtype == jnp.float32
  assert mixer["w_in_DR"].dtype == jnp.bfloat16
  assert decays == {"w_in_DR": True, "w_out_RD": True, "scale_2R": False}
  assert set(model.shapes["groups"]["1"]) == {"mixer", "mixer_norm"}


def test_a_plan_knows_its_parts(trained):
  run, _ = trained
  machine = machines.of_topology("v5e:2x4")
  split = dataclasses.replace(run, mesh=MeshShape(fsdp=2, sequence=2, tensor=2))
  plan = plans.modelled(split, machine)
  assert plan.kernels == {"running_sum": "cumulative"}
  assert plan.flops["mean"] == 3 * 2 * 2 * 32 * 16
  assert {("all-gather", ("sequence",)), ("all-reduce", ("tensor",))} <= {
    (one.kind, one.axes) for one in plan.collectives
  }
  assert "  running means" in "\n".join(plan_lines(plan, mfu=None, price=None))
  with pytest.raises(ValueError, match="leaves 1 tokens to each, fewer than the 2 that a mean"):
    programs.check_rows_split(split, 16)
  with pytest.raises(ValueError, match="mean_width 16"):
    programs.check_fits(split, MeshShape(tensor=32).abstract)


def test_the_compiled_step_has_its_part(trained):
  run, _ = trained
  plan = plans.compiled(
    dataclasses.replace(run, mesh=MeshShape(fsdp=8)), machines.of_topology("v5e:2x4")
  )
  assert plan.fits
  assert plan.program is not None
  assert {"mean", "mlp", "loss"} <= plan.program.parts.keys()
  assert plan.program.parts["mean"].flops > 0


def test_a_report_draws_what_it_recorded(trained):
  _, workdir = trained
  lines = [json.loads(line) for line in (workdir / "statistics.jsonl").read_text().splitlines()]
  assert ["about" in line for line in lines] == [True, False, True, False]
  assert all(len(line["mean_rms"]) == 3 for line in lines)
  words = page_words(workdir)
  for text in ("What the means do", "A <note>.", "Means of a document", "root mean square"):
    assert text in words
  assert "  means of a document: " in "\n".join(summary_lines(history.read(workdir), "mean"))


def test_a_sweep_takes_it(trained):
  run, _ = trained
  point = Point(name="mean/w32", family="mean", budget=None, run=run)
  record = new_record(point)
  assert record["parameters"] > 256 * 32
  assert not any(compare({point.name: record}, [point]))
  other = dataclasses.replace(run, seed=run.seed + 1)
  changes = compare({point.name: record}, [dataclasses.replace(point, run=other)])
  assert changes.altered == {point.name: ["seed 0 -> 1"]}


def test_what_it_generates_is_what_it_says_of_the_whole_row():
  model = decoder.build(_model())
  params = jax.jit(model.init)(jax.random.key(0))
  prompt = jnp.array([[5, 9, 2, 7], [0, 0, 3, 1]])
  segments = jnp.array([[1, 1, 1, 1], [0, 0, 1, 1]])
  told = generate(
    model, params, prompt, segments, num_tokens=4, temperature=0.0, key=jax.random.key(1)
  )
  tokens = jnp.concatenate([prompt, told], axis=1)
  segments = jnp.concatenate([segments, jnp.ones_like(told)], axis=1)
  likeliest = jnp.argmax(model.logits(params, tokens, segments), axis=-1)
  np.testing.assert_array_equal(likeliest[:, 3:-1], told)


def test_hugging_face_has_no_form_of_it(tmp_path):
  config = _model()
  with pytest.raises(ValueError, match=r"test_new_mixer\.MeanConfig has no Hugging Face form"):
    directory.save(tmp_path / "out", config, decoder.build(config).shapes)
