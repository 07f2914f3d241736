"""FLOPs and bytes are read from compiled programs: small ones, and forms of TPU programs."""

import jax
import jax.numpy as jnp
import pytest

from sharding import program_cost
from sharding.program_cost import memory_bytes, operations


def _operations(f, *shapes):
  arrays = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
  return operations(jax.jit(f).lower(*arrays).compile().as_text())


def test_products_in_a_loop_are_counted_for_every_trip():
  def f(x_BD, w_LDD):
    return jax.lax.scan(lambda x_BD, w_DD: (jnp.tanh(x_BD @ w_DD), None), x_BD, w_LDD)[0]

  found = _operations(f, (8, 64), (5, 64, 64))
  assert sum(one.flops * one.times for one in found) == 5 * 2 * 8 * 64 * 64


def test_of_an_array_that_is_cut_only_the_slice_is_moved():
  def f(x_LD, i):
    return jnp.sin(jax.lax.dynamic_index_in_dim(x_LD, i.astype(jnp.int32), keepdims=False))

  (found,) = _operations(f, (1000, 256), ())
  assert found.bytes == pytest.approx(2 * 256 * 4, abs=32)


_TPU = """HloModule step, is_scheduled=true

%fused (p.0: bf16[24,512,384], p.1: s32[], p.2: bf16[384,640]) -> bf16[512,640] {
  %p.0 = bf16[24,512,384]{2,1,0:T(8,128)(2,1)} parameter(0)
  %p.1 = s32[]{:T(128)S(6)} parameter(1)
  %p.2 = bf16[384,640]{1,0:T(8,128)(2,1)S(1)} parameter(2)
  %zero = s32[] constant(0)
  %cut = bf16[1,512,384]{2,1,0:T(8,128)(2,1)} dynamic-slice(%p.0, %p.1, %zero, %zero)
  %x = bf16[512,384]{1,0:T(8,128)(2,1)} bitcast(%cut)
  ROOT %out = bf16[512,640]{1,0:T(8,128)(2,1)} convolution(%x, %p.2), dim_labels=bf_io->bf
}

ENTRY %main (a: bf16[24,512,384], i: s32[], w: bf16[384,640]) -> bf16[512,640] {
  %a = bf16[24,512,384]{2,1,0:T(8,128)(2,1)} parameter(0)
  %i = s32[]{:T(128)S(6)} parameter(1)
  %w = bf16[384,640]{1,0:T(8,128)(2,1)S(1)} parameter(2)
  %scan.1 = bf16[512,640]{1,0:T(8,128)(2,1)} custom-call(%i), custom_call_target="tpu_custom_call"
  ROOT %f = bf16[512,640]{1,0:T(8,128)(2,1)} fusion(%a, %i, %w), kind=kOutput, calls=%fused, \
metadata={op_name="jit(step)/mlp/dot_general"}, backend_config={"estimated_cycles":"700"}
}
"""


def test_a_fused_product_of_a_tpu_program():
  kernel, fusion = operations(_TPU)
  assert fusion.flops == 2 * 512 * 384 * 640
  # The slice and the result; the weights are in VMEM.
  assert fusion.bytes == 2 * (512 * 384 + 512 * 640)
  assert (fusion.times, fusion.cycles, fusion.op_name) == (1, 700, "jit(step)/mlp/dot_general")
  assert (kernel.kernel, kernel.cycles, kernel.bytes) == ("scan", None, 2 * 512 * 640)


_GPU = """HloModule step, is_scheduled=true

ENTRY %main (q: bf16[8,2048,6,128], k: bf16[8,2048,128]) -> bf16[8,2048,6,128] {
  %q = bf16[8,2048,6,128]{3,2,1,0} parameter(0)
  %k = bf16[8,2048,128]{2,1,0} parameter(1)
  ROOT %pallas_call.59 = bf16[8,2048,6,128]{3,2,1,0} custom-call(%q, %k), \
custom_call_target="__gpu$xla.gpu.triton", \
metadata={op_name="jit(step)/attention/cond/branch_0_fun/local_attention_forward/pallas_call"}
}
"""


def test_a_triton_kernel_is_known_by_its_name():
  (kernel,) = operations(_GPU)
  assert kernel.kernel == "local_attention_forward"
  assert kernel.bytes == 2 * 8 * 2048 * 128 * (6 + 1 + 6)


_ASYNCHRONOUS = """HloModule step, is_scheduled=true

%fused (p.0: f32[24,512,384], p.1: s32[], p.2: f32[512,384]) -> f32[24,512,384] {
  %p.0 = f32[24,512,384]{2,1,0} parameter(0)
  %p.2 = f32[512,384]{1,0} parameter(2)
  %part = f32[1,512,384]{2,1,0} bitcast(%p.2)
  %p.1 = s32[] parameter(1)
  %zero = s32[] constant(0)
  ROOT %all = f32[24,512,384]{2,1,0} dynamic-update-slice(%p.0, %part, %p.1, %zero, %zero)
}

ENTRY %main (a: f32[24,512,384], i: s32[], x: f32[512,384]) -> f32[24,512,384] {
  %a = f32[24,512,384]{2,1,0} parameter(0)
  %i = s32[] parameter(1)
  %x = f32[512,384]{1,0} parameter(2)
  %start = ((f32[24,512,384]{2,1,0}, s32[], f32[512,384]{1,0}), f32[24,512,384]{2,1,0}, u32[]) \
fusion-start(%a, %i, %x), kind=kLoop, calls=%fused
  ROOT %done = f32[24,512,384]{2,1,0} fusion-done(%start)
}
"""


def test_a_fusion_that_others_run_beside_is_one_operation():
  (found,) = program_cost.operations(_ASYNCHRONOUS)
  assert found.name == "start"
  assert found.bytes == 2 * 512 * 384 * 4 + 4


def test_a_batch_that_is_a_dilated_window_is_multiplied_once():
  """A product of 16 blocks: the window of 16 covers an element once for each block."""
  written = "window={size=16 stride=15 pad=0_0 lhs_dilate=16}, dim_labels=0bf_0io->0bf"
  assert program_cost._meetings(written, 0, 16, 16) == 16
  causal = "window={size=4 pad=3_0}, dim_labels=b0f_0io->b0f"
  assert program_cost._meetings(causal, 0, 10, 10) == 4 * 10 - (3 + 2 + 1)


# A gather that runs beside a product on a TPU: its start, a fusion that it passes through, its end.
# All except the start pass their operands on.
_GATHER = """HloModule step, is_scheduled=true

%start (p.0: bf16[16,256]) -> (bf16[16,256], bf16[64,256], u32[]) {
  %p.0 = bf16[16,256]{1,0:T(8,128)(2,1)} parameter(0)
  %all-gather.1 = bf16[64,256]{1,0:T(8,128)(2,1)} all-gather(%p.0), channel_id=1, \
dimensions={0}, frontend_attributes={chain_id="1"}
  ROOT %started = (bf16[16,256]{1,0:T(8,128)(2,1)}, bf16[64,256]{1,0:T(8,128)(2,1)}, u32[]{:S(2)}) \
custom-call(%all-gather.1), custom_call_target="AsyncCollectiveStart"
}

%beside (q.0: bf16[16,256], q.1: bf16[64,256], q.2: bf16[512,128], q.3: bf16[128,128]) -> \
(bf16[512,128], bf16[16,256], bf16[64,256], bf16[64,256]) {
  %q.0 = bf16[16,256]{1,0:T(8,128)(2,1)} parameter(0)
  %q.1 = bf16[64,256]{1,0:T(8,128)(2,1)} parameter(1)
  %q.2 = bf16[512,128]{1,0:T(8,128)(2,1)} parameter(2)
  %q.3 = bf16[128,128]{1,0:T(8,128)(2,1)} parameter(3)
  %product = bf16[512,128]{1,0:T(8,128)(2,1)} convolution(%q.2, %q.3), dim_labels=bf_io->bf
  %all-gather.2 = bf16[64,256]{1,0:T(8,128)(2,1)} all-gather(%q.0), channel_id=1, \
dimensions={0}, frontend_attributes={chain_id="1"}
  ROOT %both = (bf16[512,128]{1,0:T(8,128)(2,1)}, bf16[16,256]{1,0:T(8,128)(2,1)}, \
bf16[64,256]{1,0:T(8,128)(2,1)}, bf16[64,256]{1,0:T(8,128)(2,1)}) tuple(%product, %q.0, %q.1, \
%all-gather.2)
}

%end (r.0: bf16[16,256], r.1: bf16[64,256]) -> bf16[64,256] {
  %r.0 = bf16[16,256]{1,0:T(8,128)(2,1)} parameter(0)
  %r.1 = bf16[64,256]{1,0:T(8,128)(2,1)} parameter(1)
  %all-gather.3 = bf16[64,256]{1,0:T(8,128)(2,1)} all-gather(%r.0), channel_id=1, \
dimensions={0}, frontend_attributes={chain_id="1"}
  ROOT %ended = bf16[64,256]{1,0:T(8,128)(2,1)} custom-call(%r.0, %r.1, %all-gather.3), \
custom_call_target="AsyncCollectiveDone"
}

ENTRY %main (w: bf16[16,256], x: bf16[512,128], v: bf16[128,128]) -> bf16[64,256] {
  %w = bf16[16,256]{1,0:T(8,128)(2,1)} parameter(0)
  %x = bf16[512,128]{1,0:T(8,128)(2,1)} parameter(1)
  %v = bf16[128,128]{1,0:T(8,128)(2,1)} parameter(2)
  %a = (bf16[16,256]{1,0:T(8,128)(2,1)}, bf16[64,256]{1,0:T(8,128)(2,1)}, u32[]{:S(2)}) \
fusion(%w), kind=kCustom, calls=%start
  %a.0 = bf16[16,256]{1,0:T(8,128)(2,1)} get-tuple-element(%a), index=0
  %a.1 = bf16[64,256]{1,0:T(8,128)(2,1)} get-tuple-element(%a), index=1
  %b = (bf16[512,128]{1,0:T(8,128)(2,1)}, bf16[16,256]{1,0:T(8,128)(2,1)}, \
bf16[64,256]{1,0:T(8,128)(2,1)}, bf16[64,256]{1,0:T(8,128)(2,1)}) fusion(%a.0, %a.1, %x, %v), \
kind=kOutput, calls=%beside
  %b.1 = bf16[16,256]{1,0:T(8,128)(2,1)} get-tuple-element(%b), index=1
  %b.2 = bf16[64,256]{1,0:T(8,128)(2,1)} get-tuple-element(%b), index=2
  ROOT %c = bf16[64,256]{1,0:T(8,128)(2,1)} fusion(%b.1, %b.2), kind=kCustom, calls=%end
}
"""


def test_a_collective_beside_others_is_counted_where_it_starts():
  start, product, end = operations(_GATHER)
  assert (start.bytes, start.sends) == (2 * (16 + 64) * 256, True)
  assert (product.bytes, product.sends) == (2 * (512 + 128 + 512) * 128, False)
  assert (end.bytes, end.sends) == (0, False)


def test_a_collective_on_its_own_is_one():
  text = (
    _GATHER.partition("%start")[0]
    + """
ENTRY %main (w: f32[16,128]) -> f32[64,128] {
  %w = f32[16,128]{1,0:T(8,128)} parameter(0)
  ROOT %g = f32[64,128]{1,0:T(8,128)} all-gather(%w), channel_id=1, dimensions={0}
}
"""
  )
  (gather,) = operations(text)
  assert (gather.bytes, gather.sends) == (4 * (16 + 64) * 128, True)


@pytest.mark.parametrize(
  ("shape", "size"),
  [
    ("bf16[8,160]{1,0:T(8,128)(2,1)}", 8 * 256 * 2),
    ("f32[2,6144]{1,0:T(2,128)}", 2 * 6144 * 4),
    ("f32[8,2048]{1,0:T(8,128)S(1)}", 0),
    ("(f32[4]{0}, bf16[16,128]{1,0:T(8,128)(2,1)})", 4 * 4 + 16 * 128 * 2),
    ("s32[]", 4),
  ],
)
def test_tiles_are_filled_up_and_vmem_is_not_memory(shape, size):
  assert memory_bytes(shape) == size
