"""Descriptions of GPUs for XLA, to compile for one that is not here (sharding/machine.py).

Each is the text of a GpuTargetConfigProto, in bytes, from the numbers that NVIDIA publishes for
each compute capability (CUDA C++ Programming Guide, "Technical Specifications per Compute
Capability") and for each product (its datasheet and architecture whitepaper). They agree with what
openxla/xla reads from the devices themselves (xla/backends/gpu/target_config/specs).
"""

# What all of compute capability 8.0 to 9.0 have in common. Matrix products are left to the
# library that a run would use, of the version that the pinned jax brings.
_COMMON = """
gpu_device_info {{
  threads_per_block_limit: 1024
  threads_per_warp: 32
  threads_per_core_limit: 2048
  shared_memory_per_block: 49152
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  thread_dim_limit_x: 1024
  thread_dim_limit_y: 1024
  thread_dim_limit_z: 64
  {architecture}
  {product}
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 8 patch: 0 }}
device_description_str: "{name}"
"""
_AMPERE = """
  cuda_compute_capability { major: 8 }
  core_count: 108
  fpus_per_core: 64
  shared_memory_per_core: 167936
  shared_memory_per_block_optin: 166912
  l2_cache_size: 41943040
  clock_rate_ghz: 1.41
"""
_HOPPER = """
  cuda_compute_capability { major: 9 feature_extension: ACCELERATED_FEATURES }
  core_count: 132
  fpus_per_core: 128
  shared_memory_per_core: 233472
  shared_memory_per_block_optin: 232448
  l2_cache_size: 52428800
  clock_rate_ghz: 1.98
"""


def _target(architecture: str, name: str, *, bandwidth: float, memory: float) -> str:
  product = f"memory_bandwidth: {int(bandwidth)}\n  device_memory_size: {int(memory)}"
  return _COMMON.format(architecture=architecture.strip(), product=product, name=name)


# By the key of sharding/topology.py.
TARGETS = {
  "a100-40gb": _target(_AMPERE, "NVIDIA A100-SXM4-40GB", bandwidth=1555.2e9, memory=42_331_013_120),
  "a100-80gb": _target(
    _AMPERE, "NVIDIA A100-SXM4-80GB", bandwidth=2039.04e9, memory=85_100_068_864
  ),
  "h100": _target(_HOPPER, "NVIDIA H100 80GB HBM3", bandwidth=3352.32e9, memory=84_942_979_072),
  "h200": _target(_HOPPER, "NVIDIA H200", bandwidth=4800e9, memory=151_397_597_184),
}
