"""What a chip can do at most: peak FLOP/s, memory and links, each with the source of its numbers.

Bytes per second are decimal. Numbers are of one `jax.Device`: a whole chip, but half of one on TPU
v3, whose two cores are two devices.
"""

import dataclasses
import re


@dataclasses.dataclass(frozen=True, kw_only=True)
class Chip:
  """The limits of one `jax.Device`.

  peak_flops is dense bfloat16, without structured sparsity. interconnect_bytes_per_second counts
  all links of the device (ICI on TPU, NVLink on GPU), both directions together.
  """

  name: str
  peak_flops: float
  hbm_bytes: float
  hbm_bytes_per_second: float
  interconnect_bytes_per_second: float
  source: str


_GiB = 1024.0**3

# The kind that jax.Device.device_kind gives, as a regular expression that must match all of it.
_CHIPS: tuple[tuple[str, Chip], ...] = (
  (
    r"TPU v3",
    Chip(
      name="TPU v3 core",
      peak_flops=123e12 / 2,
      hbm_bytes=32 * _GiB / 2,
      hbm_bytes_per_second=900e9 / 2,
      interconnect_bytes_per_second=2 * 4 * 70e9 / 2,
      source="cloud.google.com/tpu/docs/v3; links: arXiv:2304.01433, table 4 (4 x 70 GB/s)",
    ),
  ),
  (
    r"TPU v4",
    Chip(
      name="TPU v4",
      peak_flops=275e12,
      hbm_bytes=32 * _GiB,
      hbm_bytes_per_second=1200e9,
      interconnect_bytes_per_second=2 * 6 * 50e9,
      source="cloud.google.com/tpu/docs/v4; links: arXiv:2304.01433, table 4 (6 x 50 GB/s)",
    ),
  ),
  (
    r"TPU v5( lite|e)",
    Chip(
      name="TPU v5e",
      peak_flops=197e12,
      hbm_bytes=16e9,
      hbm_bytes_per_second=819e9,
      interconnect_bytes_per_second=400e9,
      source="cloud.google.com/tpu/docs/v5e",
    ),
  ),
  (
    r"TPU v5p?",
    Chip(
      name="TPU v5p",
      peak_flops=459e12,
      hbm_bytes=95e9,
      hbm_bytes_per_second=2765e9,
      interconnect_bytes_per_second=1200e9,
      source="cloud.google.com/tpu/docs/v5p",
    ),
  ),
  (
    r"TPU v6( lite|e)",
    Chip(
      name="TPU v6e",
      peak_flops=918e12,
      hbm_bytes=32e9,
      hbm_bytes_per_second=1638e9,
      interconnect_bytes_per_second=800e9,
      source="cloud.google.com/tpu/docs/v6e",
    ),
  ),
  (
    r"NVIDIA A100-SXM.*-40GB",
    Chip(
      name="A100 SXM 40GB",
      peak_flops=312e12,
      hbm_bytes=40e9,
      hbm_bytes_per_second=1555e9,
      interconnect_bytes_per_second=600e9,
      source="NVIDIA A100 Tensor Core GPU datasheet",
    ),
  ),
  (
    r"NVIDIA A100-SXM.*-80GB",
    Chip(
      name="A100 SXM 80GB",
      peak_flops=312e12,
      hbm_bytes=80e9,
      hbm_bytes_per_second=2039e9,
      interconnect_bytes_per_second=600e9,
      source="NVIDIA A100 Tensor Core GPU datasheet",
    ),
  ),
  (
    r"NVIDIA H100 80GB HBM3",
    Chip(
      name="H100 SXM",
      peak_flops=989.5e12,
      hbm_bytes=80e9,
      hbm_bytes_per_second=3350e9,
      interconnect_bytes_per_second=900e9,
      source="NVIDIA H100 Tensor Core GPU datasheet (1979 TFLOP/s are with sparsity)",
    ),
  ),
  (
    r"NVIDIA H100 PCIe",
    Chip(
      name="H100 PCIe",
      peak_flops=756.5e12,
      hbm_bytes=80e9,
      hbm_bytes_per_second=2000e9,
      interconnect_bytes_per_second=600e9,
      source="NVIDIA H100 Tensor Core GPU datasheet (1513 TFLOP/s are with sparsity)",
    ),
  ),
  (
    r"NVIDIA H200",
    Chip(
      name="H200 SXM",
      peak_flops=989.5e12,
      hbm_bytes=141e9,
      hbm_bytes_per_second=4800e9,
      interconnect_bytes_per_second=900e9,
      source="NVIDIA H200 Tensor Core GPU datasheet (1979 TFLOP/s are with sparsity)",
    ),
  ),
  (
    r"NVIDIA B200",
    Chip(
      name="B200",
      peak_flops=2250e12,
      hbm_bytes=180e9,
      hbm_bytes_per_second=8000e9,
      interconnect_bytes_per_second=1800e9,
      source="NVIDIA DGX B200 datasheet, an eighth of the system; 4500 TFLOP/s are with sparsity",
    ),
  ),
)


def chip_of(device_kind: str) -> Chip | None:
  """The chip that JAX calls `device_kind` (jax.devices()[0].device_kind).

  None for one that is not in the table, as a CPU: then no share of its peak can be stated.
  """
  for kind, chip in _CHIPS:
    if re.fullmatch(kind, device_kind):
      return chip
  return None
