"""What a chip can do at most: peak FLOP/s, memory and links, each with the source of its numbers.

Bytes per second are decimal. Numbers are of one `jax.Device`: a whole chip, but half of one on TPU
v3, whose two cores are two devices. sharding/machine.py joins chips to slices and nodes.
"""

import dataclasses
import re


@dataclasses.dataclass(frozen=True, kw_only=True)
class Chip:
  """The limits of one `jax.Device`.

  `key` is what a command line calls it. peak_flops is dense bfloat16, without structured sparsity.
  hbm_bytes is what a program may fill: on TPU what libtpu 0.0.42 names as available when it refuses
  a program that needs more, on GPU the datasheet's. interconnect_bytes_per_second counts all links
  of the device (ICI on TPU, NVLink on GPU), both directions together.

  links           of the device in the torus, two for each dimension; 1 where a switch joins all
  wraps_at        a dimension of the torus closes to a ring where its size is a multiple of this
  host_devices    devices of a host; on GPU those that NVLink joins
  dcn_bytes_per_second  between slices (TPU) or nodes (GPU), one way, a device's share of its host's
                  network; None where no source states it
  """

  key: str
  name: str
  peak_flops: float
  hbm_bytes: float
  hbm_bytes_per_second: float
  interconnect_bytes_per_second: float
  links: int
  wraps_at: int = 1
  host_devices: int
  dcn_bytes_per_second: float | None
  source: str

  @property
  def link_bytes_per_second(self) -> float:
    """What one link carries in one direction."""
    return self.interconnect_bytes_per_second / 2 / self.links

  @property
  def platform(self) -> str:
    """As JAX calls it: "tpu" or "gpu"."""
    return "tpu" if self.name.startswith("TPU") else "gpu"


_GiB = 1024.0**3

# The kind that jax.Device.device_kind gives, as a regular expression that must match all of it.
_CHIPS: tuple[tuple[str, Chip], ...] = (
  (
    r"TPU v3",
    Chip(
      key="v3",
      name="TPU v3 core",
      peak_flops=123e12 / 2,
      hbm_bytes=15.48 * _GiB,
      hbm_bytes_per_second=900e9 / 2,
      interconnect_bytes_per_second=2 * 4 * 70e9 / 2,
      links=4,
      wraps_at=32,
      host_devices=8,
      dcn_bytes_per_second=None,
      source="cloud.google.com/tpu/docs/v3; links: arXiv:2304.01433, table 4 (4 x 70 GB/s)",
    ),
  ),
  (
    r"TPU v4",
    Chip(
      key="v4",
      name="TPU v4",
      peak_flops=275e12,
      hbm_bytes=30.75 * _GiB,
      hbm_bytes_per_second=1200e9,
      interconnect_bytes_per_second=2 * 6 * 50e9,
      links=6,
      wraps_at=4,
      host_devices=4,
      dcn_bytes_per_second=None,
      source="cloud.google.com/tpu/docs/v4; links: arXiv:2304.01433, table 4 (6 x 50 GB/s)",
    ),
  ),
  (
    r"TPU v5( lite|e)",
    Chip(
      key="v5e",
      name="TPU v5e",
      peak_flops=197e12,
      hbm_bytes=15.75 * _GiB,
      hbm_bytes_per_second=819e9,
      interconnect_bytes_per_second=400e9,
      links=4,
      wraps_at=16,
      host_devices=8,
      dcn_bytes_per_second=25e9 / 8,
      source="cloud.google.com/tpu/docs/v5e (8 chips share 2 x 100 Gb/s)",
    ),
  ),
  (
    r"TPU v5p?",
    Chip(
      key="v5p",
      name="TPU v5p",
      peak_flops=459e12,
      hbm_bytes=95.74 * _GiB,
      hbm_bytes_per_second=2765e9,
      interconnect_bytes_per_second=1200e9,
      links=6,
      wraps_at=4,
      host_devices=4,
      dcn_bytes_per_second=50e9 / 8,
      source="cloud.google.com/tpu/docs/v5p (50 Gb/s of DCN per chip)",
    ),
  ),
  (
    r"TPU v6( lite|e)",
    Chip(
      key="v6e",
      name="TPU v6e",
      peak_flops=918e12,
      hbm_bytes=31.25 * _GiB,
      hbm_bytes_per_second=1638e9,
      interconnect_bytes_per_second=800e9,
      links=4,
      wraps_at=16,
      host_devices=8,
      dcn_bytes_per_second=100e9 / 8,
      source="cloud.google.com/tpu/docs/v6e (8 chips share 4 x 200 Gb/s)",
    ),
  ),
  (
    r"NVIDIA A100-SXM.*-40GB",
    Chip(
      key="a100-40gb",
      name="A100 SXM 40GB",
      peak_flops=312e12,
      hbm_bytes=40e9,
      hbm_bytes_per_second=1555e9,
      interconnect_bytes_per_second=600e9,
      links=1,
      host_devices=8,
      dcn_bytes_per_second=200e9 / 8,
      source="NVIDIA A100 Tensor Core GPU datasheet; network: DGX A100, 200 Gb/s per GPU",
    ),
  ),
  (
    r"NVIDIA A100-SXM.*-80GB",
    Chip(
      key="a100-80gb",
      name="A100 SXM 80GB",
      peak_flops=312e12,
      hbm_bytes=80e9,
      hbm_bytes_per_second=2039e9,
      interconnect_bytes_per_second=600e9,
      links=1,
      host_devices=8,
      dcn_bytes_per_second=200e9 / 8,
      source="NVIDIA A100 Tensor Core GPU datasheet; network: DGX A100, 200 Gb/s per GPU",
    ),
  ),
  (
    r"NVIDIA H100 80GB HBM3",
    Chip(
      key="h100",
      name="H100 SXM",
      peak_flops=989.5e12,
      hbm_bytes=80e9,
      hbm_bytes_per_second=3350e9,
      interconnect_bytes_per_second=900e9,
      links=1,
      host_devices=8,
      dcn_bytes_per_second=400e9 / 8,
      source="NVIDIA H100 Tensor Core GPU datasheet (1979 TFLOP/s are with sparsity); network: DGX "
      "H100, 400 Gb/s per GPU",
    ),
  ),
  (
    r"NVIDIA H100 PCIe",
    Chip(
      key="h100-pcie",
      name="H100 PCIe",
      peak_flops=756.5e12,
      hbm_bytes=80e9,
      hbm_bytes_per_second=2000e9,
      interconnect_bytes_per_second=600e9,
      links=1,
      host_devices=2,
      dcn_bytes_per_second=None,
      source="NVIDIA H100 Tensor Core GPU datasheet (1513 TFLOP/s are with sparsity)",
    ),
  ),
  (
    r"NVIDIA H200",
    Chip(
      key="h200",
      name="H200 SXM",
      peak_flops=989.5e12,
      hbm_bytes=141e9,
      hbm_bytes_per_second=4800e9,
      interconnect_bytes_per_second=900e9,
      links=1,
      host_devices=8,
      dcn_bytes_per_second=400e9 / 8,
      source="NVIDIA H200 Tensor Core GPU datasheet (1979 TFLOP/s are with sparsity); network: DGX "
      "H200, 400 Gb/s per GPU",
    ),
  ),
  (
    r"NVIDIA B200",
    Chip(
      key="b200",
      name="B200",
      peak_flops=2250e12,
      hbm_bytes=180e9,
      hbm_bytes_per_second=8000e9,
      interconnect_bytes_per_second=1800e9,
      links=1,
      host_devices=8,
      dcn_bytes_per_second=400e9 / 8,
      source="NVIDIA DGX B200 datasheet, an eighth of the system (4500 TFLOP/s are with sparsity); "
      "network: 400 Gb/s per GPU",
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


def chip_named(key: str) -> Chip:
  """The chip that the command line calls `key`; ValueError with all of them."""
  for _, chip in _CHIPS:
    if chip.key == key.lower():
      return chip
  raise ValueError(f"chip {key!r} is none of {', '.join(chip.key for _, chip in _CHIPS)}")
