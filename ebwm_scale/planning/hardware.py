"""What vendors publish of their devices: dense peaks, memory, bandwidth."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from ebwm_scale.planning.memory import GIB

# Dense peaks in TFLOP/s as NVIDIA publishes them (product datasheets and architecture papers): bf16
# on tensor cores with fp32 accumulation, fp32 on CUDA cores (TF32 is off). First match in the
# device's name counts; None: the device has no such units.
PEAK_TFLOPS: tuple[tuple[str, float | None, float], ...] = (
    ("B200", 2250, 75),  # HGX B200 datasheet (a GB200's is higher: 2500, 80)
    ("H200 NVL", 835.5, 60),
    ("H200", 989.4, 66.9),  # H200 datasheet; SXM as H100 SXM
    ("GH200", 989.4, 66.9),
    ("H100 PCIe", 756, 51),
    ("H100 NVL", 835.5, 60),
    ("H100", 989.4, 66.9),  # H100 datasheet and Hopper architecture paper
    ("A100", 312, 19.5),  # A100 datasheet
    ("L40S", 362.05, 91.6),  # L40S datasheet
    ("RTX 4090", 165.2, 82.6),  # Ada architecture paper
    ("V100-PCIE", None, 14),
    ("V100", None, 15.7),  # V100 datasheet; no bf16
)


def peak_flops_per_s(precision: str) -> float | None:
    """Dense peak in FLOP/s of the CUDA device in use for "fp32" or "bf16"; None on a CPU or for a
    device that is not in the table.
    """
    if precision not in ("fp32", "bf16"):
        raise ValueError(f"precision is {precision!r}: must be fp32 or bf16")
    if not torch.cuda.is_available():
        return None
    name = torch.cuda.get_device_name()
    for pattern, bf16, fp32 in PEAK_TFLOPS:
        if pattern in name:
            tera = bf16 if precision == "bf16" else fp32
            return None if tera is None else tera * 1e12
    return None


HEADROOM = 0.08  # of a GPU's memory: CUDA context, allocator's fragments, NCCL buffers


@dataclass(frozen=True)
class Machine:
    """A kind of node.

    Peaks in TFLOP/s, memory in GiB per GPU, bandwidths in GB/s per GPU and direction; vendors'
    figures.
    """

    name: str
    gpus: int
    memory: float
    bf16: float
    fp32: float
    within: float  # between GPUs of a node
    between: float  # between nodes
    source: str
    # Share of the peak that each part reaches, fitted to measured steps; None: a GPU, whose time
    # comes from what is counted (gpu_time.py).
    rates: Mapping[str, float] | None = None
    memory_bandwidth: float = 0.0  # of a GPU's own memory, GB/s: the vendor's

    @property
    def assumed(self) -> bool:
        return self.rates is None

    def peak(self, precision: str) -> float:
        """FLOP/s for "bf16" or "fp32"."""
        return 1e12 * (self.bf16 if precision == "bf16" else self.fp32)

    @property
    def device(self) -> str:
        return "cpu" if self.name.startswith("cpu") else "cuda"


MACHINES = {
    machine.name: machine
    for machine in (
        Machine(
            "h100",
            8,
            80e9 / GIB,
            989.4,
            66.9,
            450,
            50,
            "H100 SXM datasheet; NVLink 4; 400 Gbit/s InfiniBand per GPU, as in DGX H100",
            memory_bandwidth=3350,
        ),
        Machine(
            "h200",
            8,
            141e9 / GIB,
            989.4,
            66.9,
            450,
            50,
            "H200 datasheet; NVLink 4; 400 Gbit/s InfiniBand per GPU, as in DGX H200",
            memory_bandwidth=4800,
        ),
        Machine(
            "b200",
            8,
            180e9 / GIB,
            2250,
            75,
            900,
            50,
            "HGX B200 datasheet; NVLink 5; 400 Gbit/s InfiniBand per GPU",
            memory_bandwidth=8000,
        ),
        Machine(
            "a100",
            8,
            80e9 / GIB,
            312,
            19.5,
            300,
            25,
            "A100 80 GB SXM datasheet; NVLink 3; 200 Gbit/s InfiniBand per GPU, as in DGX A100",
            memory_bandwidth=2039,
        ),
        Machine(
            "a100-40gb",
            8,
            40e9 / GIB,
            312,
            19.5,
            300,
            25,
            "A100 40 GB SXM datasheet; NVLink 3; 200 Gbit/s InfiniBand per GPU",
            memory_bandwidth=1555,
        ),
        Machine(
            "l40s",
            8,
            48e9 / GIB,
            362.05,
            91.6,
            32,
            12.5,
            "L40S datasheet; PCIe 4 x16; 100 Gbit/s per GPU",
            memory_bandwidth=864,
        ),
        Machine(
            "rtx4090",
            1,
            24e9 / GIB,
            165.2,
            82.6,
            32,
            1.25,
            "Ada architecture paper; PCIe 4 x16; 10 Gbit/s Ethernet",
            memory_bandwidth=1008,
        ),
        Machine(
            "cpu-xeon",
            1,
            24,
            0,
            0.16,
            10,
            1.25,
            "2 cores of a Xeon at 2.5 GHz with AVX-512: 2 x 2.5e9 x 32 FLOPs in fp32; rates "
            "fitted to results/bench_step_*_xeon.json",
            {"blocks": 0.30, "attention": 0.60, "vocabulary": 0.68},
        ),
        Machine(
            "cpu-epyc",
            1,
            24,
            0,
            0.33,
            10,
            1.25,
            "2 cores of an EPYC at 2.6 GHz with AVX-512: 2 x 2.6e9 x 64 FLOPs in fp32; rates "
            "fitted to results/bench_step_xxs.json and bench_step_sweeps.json",
            {"blocks": 0.34, "attention": 0.85, "vocabulary": 0.48},
        ),
    )
}
