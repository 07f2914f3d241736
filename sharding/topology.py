"""The peaks of a chip, and the share of them that kernels reach, each with its source.

Bytes per second are decimal. Numbers are for one `jax.Device`: a whole chip, except on TPU v3,
whose two cores are two devices. sharding/machine.py connects chips to slices and nodes.
"""

import dataclasses
import re


@dataclasses.dataclass(frozen=True, kw_only=True)
class Reached:
  """Shares of a chip's peaks that kernels are known to reach; an H100's were measured by us.

  matmul               of peak_flops, a large bfloat16 product
  attention_forward    of peak_flops, flash attention: 2 products of queries with keys they see
  attention_backward   the same, counted as 5 products whatever a kernel computes
  hbm                  of hbm_bytes_per_second, a large copy or elementwise pass
  relayout             of hbm_bytes_per_second, a copy that puts gathered weights into whole tiles;
                       None where the compiler makes no such copy, or nobody has looked
  """

  matmul: float
  attention_forward: float
  attention_backward: float
  hbm: float
  relayout: float | None = None
  source: str


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
  clock           of a TensorCore in Hz. Inferred, from no data sheet: with the documented number of
                  matrix units it gives peak_flops
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
  reached: Reached
  clock: float | None = None

  @property
  def link_bytes_per_second(self) -> float:
    """What one link carries in one direction."""
    return self.interconnect_bytes_per_second / 2 / self.links

  @property
  def platform(self) -> str:
    """As JAX calls it: "tpu" or "gpu"."""
    return "tpu" if self.name.startswith("TPU") else "gpu"


_GiB = 1024.0**3

# No published benchmark states which share of the peak splash attention reaches. Used instead is
# what libtpu's compiler estimates for its blocks (512 x 512, head size 128):
# kernels/local_attention/cycles_tpu.jsonl. Nor is there one of copies: 0.9 as on an A100.
_TPU_SOURCE = (
  "matmul: docs.jax.dev/en/latest/pallas/tpu/matmul.html, XLA at 8192^3 on v5e (0.843 at 4096^3); "
  "attention: kernels/local_attention/cycles_tpu.jsonl{of}, no measurement; hbm: as a100"
)
_V5P = Reached(
  matmul=0.923,
  attention_forward=0.490,
  attention_backward=0.232,
  hbm=0.9,
  source=_TPU_SOURCE.format(of=""),
)
# The compiler cannot make that estimate for v3, v4 and v5e; for v6e nobody has looked yet.
_OTHER_TPU = dataclasses.replace(_V5P, source=_TPU_SOURCE.format(of=" of v5p"))
_V5E = dataclasses.replace(
  _OTHER_TPU,
  relayout=0.17,
  source=f"{_OTHER_TPU.source}; relayout: docs/benchmarks.md, the compiler's estimate",
)
# A copy on an A100 at 0.9: github.com/calculon-ai/calculon, systems/a100_80g.json, mem1.
_A100 = Reached(
  matmul=0.859,
  attention_forward=0.60,
  attention_backward=0.50,
  hbm=0.9,
  source="matmul: 267.9 TFLOP/s, github.com/mag-/gpu_benchmark; attention: FlashAttention-2, "
  "arXiv:2307.08691 (187 TFLOP/s forward, causal, head size 128, rows of 2048; 50 to 73 % in all: "
  "the lower end backward); hbm: github.com/calculon-ai/calculon, systems/a100_80g.json",
)
_H100 = Reached(
  matmul=0.745,
  attention_forward=0.318,
  attention_backward=0.260,
  hbm=0.837,
  source="on an H100 SXM, 2026-11-27: matmul and attention: docs/h100_attention.jsonl, 737 TFLOP/s "
  "of a product of [4096, 4096], our kernel at rows of 2048 (FlashAttention-3 reaches 0.55 to 0.66 "
  "forward and 0.57 backward, arXiv:2407.08608); hbm: docs/h100_rg_lru.jsonl, 2.80 TB/s of a copy "
  "of [1, 65536, 2560]",
)
_H100_PCIE = dataclasses.replace(
  _H100, matmul=0.660, source="matmul: 499.5 TFLOP/s, github.com/mag-/gpu_benchmark; else as h100"
)
_B200 = dataclasses.replace(
  _H100, matmul=0.776, source="matmul: 1745 TFLOP/s, github.com/stas00/ml-engineering; else as h100"
)

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
      reached=_OTHER_TPU,
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
      reached=_OTHER_TPU,
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
      reached=_V5E,
      clock=1.5e9,
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
      reached=_V5P,
      clock=1.75e9,
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
      reached=_OTHER_TPU,
      clock=1.75e9,
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
      reached=_A100,
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
      reached=_A100,
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
      reached=_H100,
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
      reached=_H100_PCIE,
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
      reached=_H100,
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
      reached=_B200,
    ),
  ),
)


def chip_of(device_kind: str) -> Chip | None:
  """The chip that JAX calls `device_kind` (jax.devices()[0].device_kind).

  None for one that is not in the table, such as a CPU: no share of its peak is known.
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
