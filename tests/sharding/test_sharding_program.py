"""What the compiled train step holds and sends on eight devices, read from the program.

The batch is divisible by 5 and no dimension of a parameter is: an array whose size is divisible by
5 holds activations.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from data.rows import Batch
from models import decoder
from models.griffin import griffin
from sharding import collectives, logical, rules
from sharding.mesh import MeshShape, make_mesh
from tests.jaxprs import equations
from train.optimizer import AdamW, Constant
from train.state import TrainState, abstract_state, init_state, state_shardings
from train.step import NO_LIMITS, train_step

# One worker for all of them: they share the compiled programs.
pytestmark = pytest.mark.xdist_group("sharding_program")

_ROWS, _TIME, _WIDTH, _VOCAB, _HEAD_SIZE = 40, 24, 32, 64, 8
_NUM_RECURRENT, _NUM_ATTENTION = 4, 2
_NUM_BLOCKS = _NUM_RECURRENT + _NUM_ATTENTION
_RULES = {1: rules.ZERO1, 2: rules.ZERO2, 3: rules.ZERO3}
_BYTES = 4  # of a float32
# In such a small model, vectors and the convolution, which no stage splits, are a large part.
_WHOLE = 1.35


@dataclasses.dataclass(frozen=True)
class _Case:
  """A ZeRO stage (0: one device, no placement), a mesh and how activations are kept."""

  stage: int = 0
  mesh: MeshShape = dataclasses.field(default_factory=MeshShape)
  remat: str = "none"

  def __str__(self) -> str:
    sizes = [f"{name}{size}" for name, size in zip("dfst", self.mesh.sizes) if size > 1]
    return "-".join([f"zero{self.stage}", *sizes, self.remat])


_ALL_AXES = _Case(3, MeshShape(data=2, fsdp=2, tensor=2))
_TENSOR = _Case(3, MeshShape(tensor=8), remat="block")
_FSDP = tuple(_Case(stage, MeshShape(fsdp=8)) for stage in (1, 2, 3))
_DATA = _Case(1, MeshShape(data=8))
_CASES = (_ALL_AXES, _TENSOR, *_FSDP, _DATA)


def _model(remat="none", dtype="float32", width=_WIDTH):
  return decoder.build(
    griffin(
      vocab_size=_VOCAB,
      width=width,
      rnn_width=2 * width,
      num_blocks=_NUM_BLOCKS,
      num_heads=8,
      head_size=_HEAD_SIZE,
      window=8,
      mlp_width=3 * width,
      num_gate_blocks=8,
      dtype=dtype,
      remat=remat,
    )
  )


def _optimizer(model):
  return AdamW(peak_lr=1e-2, warmup_steps=0, schedule=Constant()).build(
    total_steps=10, decay_mask=model.decays
  )


def _batch() -> Batch:
  generator = np.random.default_rng(0)
  tokens = generator.integers(0, _VOCAB, (_ROWS, _TIME + 1), dtype=np.int32)
  segments = np.sort(generator.integers(1, 4, (_ROWS, _TIME), dtype=np.int32), axis=1)
  weights = (generator.random((_ROWS, _TIME)) < 0.9).astype(np.float32)
  return Batch(tokens[:, :-1], tokens[:, 1:], segments, weights)


class _Program:
  """The train step of one case, compiled, with the state it starts from."""

  def __init__(self, case: _Case):
    self.model = _model(case.remat)
    tx = _optimizer(self.model)
    step = functools.partial(
      train_step, model=self.model, tx=tx, num_microbatches=1, z_loss=1e-4, clip_norm=None
    )
    init = functools.partial(init_state, model=self.model, tx=tx)
    state = abstract_state(self.model, tx)
    if not case.stage:
      self.init = jax.jit(init).lower(jax.random.key(0)).compile()
      self.step = jax.jit(step).lower(state, _batch(), NO_LIMITS).compile()
      self.batch = _batch()
      return
    self.mesh, tables = make_mesh(case.mesh), _RULES[case.stage]
    rows = NamedSharding(self.mesh, P(("data", "fsdp")))
    self.batch = jax.device_put(_batch(), rows)
    with logical.placement(self.mesh, tables):
      shardings = state_shardings(self.model, mesh=self.mesh, rules=tables)
      self.init = jax.jit(init, out_shardings=shardings).lower(jax.random.key(0)).compile()
      state = jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), state, shardings
      )
      jitted = jax.jit(step, donate_argnums=0, out_shardings=(shardings, None))
      self.step = jitted.lower(state, self.batch, NO_LIMITS).compile()
    self.collectives = collectives.read(self.step.as_text(), self.mesh)

  @functools.cached_property
  def after_two_steps(self):
    """(first state's host copy, losses, gradients of the first step, their square norms)."""
    state: TrainState = self.init(jax.random.key(0))
    params = jax.device_get(state.params)
    state, metrics = self.step(state, self.batch, NO_LIMITS)
    # The first moment starts at zero: after one step it is the gradient times 1 - b1.
    gradients = jax.tree.map(lambda mu: np.asarray(mu) / 0.1, state.opt_state.mu)
    state, metrics_2 = self.step(state, self.batch, NO_LIMITS)
    return params, (metrics.loss, metrics_2.loss), gradients, metrics.square_norms


@functools.cache
def _program(case: _Case) -> _Program:
  return _Program(case)


def _num_params(model=None) -> int:
  return sum(math.prod(x.shape) for x in jax.tree.leaves((model or _model()).shapes))


def _moved(case: _Case, *axes: str, activations: bool | None = None):
  """(collective, array size, times) of what moves over any of `axes`."""
  for one in _program(case).collectives:
    for _, shape in one.arrays if set(axes) & set(one.axes) else ():
      size = math.prod(shape)
      if activations is None or activations == (size % 5 == 0):
        yield one, size, one.times


# Values


@pytest.mark.parametrize("case", _CASES, ids=str)
def test_sharded_training_is_training_on_one_device(case):
  params, losses, gradients, square_norms = _program(case).after_two_steps
  expected_params, *expected = _program(_Case(remat=case.remat)).after_two_steps
  jax.tree.map(np.testing.assert_array_equal, params, expected_params)
  np.testing.assert_allclose(losses, expected[0], rtol=2e-5)
  assert losses[1] < losses[0]

  def close(path, found, reference):
    scale = np.abs(reference).max()
    np.testing.assert_allclose(found, reference, rtol=1e-4, atol=2e-5 * scale, err_msg=str(path))

  jax.tree_util.tree_map_with_path(close, gradients, expected[1])
  jax.tree_util.tree_map_with_path(close, square_norms, expected[2])


# Memory


def _bytes_per_device(tree) -> int:
  return sum(x.addressable_shards[0].data.nbytes for x in jax.tree.leaves(tree))


@pytest.mark.parametrize("case", _FSDP, ids=str)
def test_a_device_holds_its_part_of_parameters_and_moments(case):
  program, whole = _program(case), _num_params() * _BYTES
  state = program.init(jax.random.key(0))
  eighth = (whole / 8, _WHOLE * whole / 8)
  params = _bytes_per_device(state.params)
  if case.stage == 3:
    assert eighth[0] <= params <= eighth[1]
  else:
    assert params == whole
  moments = [_bytes_per_device(moment) for moment in (state.opt_state.mu, state.opt_state.nu)]
  assert moments[0] == moments[1]
  assert eighth[0] <= moments[0] <= eighth[1]
  # The program takes exactly this state, and returns it in place.
  memory = program.step.memory_analysis()
  batch = 4 * _ROWS * _TIME * 4 // 8
  taken = memory.argument_size_in_bytes - batch - params - sum(moments)
  assert 0 <= taken < 64
  assert memory.alias_size_in_bytes >= params + sum(moments)


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_a_device_holds_its_part_of_the_gradients(stage):
  model, mesh, tables = _model(remat="block"), make_mesh(MeshShape(fsdp=8)), _RULES[stage]

  def loss(params, tokens_BT):
    x_BTD, unembed_VD = model.apply(params, tokens_BT, jnp.ones_like(tokens_BT))
    return jnp.sum(jnp.sin(x_BTD)) + jnp.sum(jnp.sin(unembed_VD))

  with logical.placement(mesh, tables):
    params = jax.tree.map(
      lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
      model.shapes,
      logical.shardings(model.axes, model.shapes, tables.parameters, mesh),
    )
    tokens = jax.ShapeDtypeStruct(
      (_ROWS, _TIME), jnp.int32, sharding=NamedSharding(mesh, P("fsdp"))
    )
    # No layout is requested for the result: it is that of the backward pass.
    compiled = jax.jit(jax.grad(loss)).lower(params, tokens).compile()
  held = sum(
    math.prod(sharding.shard_shape(x.shape))
    for sharding, x in zip(
      jax.tree.leaves(compiled.output_shardings), jax.tree.leaves(model.shapes)
    )
  )
  assert compiled.memory_analysis().output_size_in_bytes < held * _BYTES + 1024
  if stage == 1:
    assert held == _num_params()
  else:
    assert _num_params() / 8 <= held <= _WHOLE * _num_params() / 8


@pytest.mark.parametrize("mesh_shape", [MeshShape(fsdp=8), MeshShape(tensor=8)], ids=str)
def test_no_device_holds_the_whole_model_while_it_is_made(mesh_shape):
  model, mesh = _model(width=256), make_mesh(mesh_shape)
  tx = _optimizer(model)
  shardings = state_shardings(model, mesh=mesh, rules=rules.ZERO3)
  init = functools.partial(init_state, model=model, tx=tx)
  compiled = jax.jit(init, out_shardings=shardings).lower(jax.random.key(0)).compile()
  assert collectives.read(compiled.as_text(), mesh) == []
  memory, params = compiled.memory_analysis(), _num_params(model) * _BYTES
  assert memory.output_size_in_bytes < 1.1 * 3 * params / 8
  # The state and all temporaries: less than the parameters alone.
  assert memory.output_size_in_bytes + memory.temp_size_in_bytes < 0.8 * params


# Collectives


@pytest.mark.parametrize("case", [_ALL_AXES, _TENSOR], ids=str)
def test_one_all_reduce_over_tensor_per_sub_layer_and_direction(case):
  rows = _ROWS // (case.mesh.data * case.mesh.fsdp)
  counts = {"forward": {}, "backward": {}, "again": {}}
  for one, size, times in _moved(case, "tensor", activations=True):
    assert one.kind == "all-reduce"
    assert one.axes == ("tensor",)
    if size != rows * _TIME * _WIDTH:
      continue
    names = ("recurrent", "attention", "mlp", "embedding", "loss")
    found = [name for name in names if name in one.op_name]
    direction = "backward" if "transpose" in one.op_name else "forward"
    if "rematted_computation" in one.op_name:
      direction = "again"
      # The compiler may send what several mixers recompute in one go.
      found = ["mixer" if set(found) <= {"recurrent", "attention"} else "another"]
    (scope,) = found
    counts[direction][scope] = counts[direction].get(scope, 0) + times
  blocks = {"recurrent": _NUM_RECURRENT, "attention": _NUM_ATTENTION, "mlp": _NUM_BLOCKS}
  assert counts["forward"] == {**blocks, "embedding": 1}
  assert counts["backward"] == {**blocks, "loss": 1}
  # Recomputing a block needs its mixer's output again, and of the MLP only what comes before.
  assert counts["again"] == ({"mixer": _NUM_BLOCKS} if case.remat == "block" else {})


@pytest.mark.parametrize("case", [_ALL_AXES, _TENSOR], ids=str)
def test_the_key_value_head_and_the_loss_send_little_over_tensor(case):
  rows = _ROWS // (case.mesh.data * case.mesh.fsdp)
  small = {}
  for _, size, times in _moved(case, "tensor", activations=True):
    if size != rows * _TIME * _WIDTH:
      small[size // rows] = small.get(size // rows, 0) + times
  # Each gradient of the one key and value, summed over heads once; log-sum-exp and target logit.
  assert small == {_TIME * _HEAD_SIZE: 2 * _NUM_ATTENTION, _TIME: 3}


@pytest.mark.parametrize("case", _CASES, ids=str)
def test_nothing_is_sent_in_convolution_gates_and_scan(case):
  for one in _program(case).collectives:
    for scope in ("conv", "gates", "scan"):
      if f"/{scope}/" in one.op_name:
        # Only the gradients of their parameters, summed over the batch's parts.
        assert "tensor" not in one.axes
        assert all(math.prod(shape) % 5 for _, shape in one.arrays), one


@pytest.mark.parametrize("case", _CASES, ids=str)
def test_no_activations_move_over_data_or_fsdp(case):
  assert [one for one, _, _ in _moved(case, "data", "fsdp", activations=True)] == []


def test_gradients_move_over_data_once_and_only_in_parts():
  moved = sum(size * times for _, size, times in _moved(_ALL_AXES, "data"))
  # The embedding's comes twice, from both its uses; vectors are whole over fsdp.
  assert _num_params() / 4 < moved < 1.25 * (_num_params() + _VOCAB * _WIDTH) / 4


@pytest.mark.parametrize("case", _FSDP, ids=str)
def test_each_stage_gathers_what_it_splits(case):
  gathered = sum(
    size * times for one, size, times in _moved(case, "fsdp") if one.kind == "all-gather"
  )
  # Stages 1 and 2: the new parameters. Stage 3: parameters, for the forward and the backward pass.
  expected = _num_params() * (2 if case.stage == 3 else 1)
  assert 0.8 * expected < gathered <= expected


def test_replicas_exchange_gradients_and_nothing_else():
  kinds = {one.kind for one in _program(_DATA).collectives}
  moved = sum(size * times for _, size, times in _moved(_DATA, "data"))
  assert kinds == {"all-reduce"}
  assert _num_params() <= moved < 1.1 * (_num_params() + _VOCAB * _WIDTH)


def test_activations_and_gathered_matrices_are_bfloat16_on_the_wire():
  """Looks at the program before compilation: XLA for CPU sends bfloat16 as float32."""
  model, mesh = _model(dtype="bfloat16"), make_mesh(_ALL_AXES.mesh)
  tokens_BT = jnp.ones((_ROWS, _TIME), jnp.int32)
  with logical.placement(mesh, rules.ZERO3):
    jaxpr = jax.make_jaxpr(model.apply)(model.shapes, tokens_BT, tokens_BT)
  moved = [
    equation.outvars[0].aval
    for equation in equations(jaxpr.jaxpr)
    if equation.primitive.name in ("sharding_constraint", "linear_call", "psum_invariant")
  ]
  matrices = [aval for aval in moved if math.prod(aval.shape) >= _WIDTH * 16]
  assert len(matrices) > 10
  assert {str(aval.dtype) for aval in matrices} == {"bfloat16"}
