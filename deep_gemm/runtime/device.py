"""What the planner and the launcher have to know of a device."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch

from ..errors import UnsupportedDeviceError

HOPPER = (9, 0)
MAX_SMEM_BYTES = 232448  # what one block can have on sm_90


@dataclass(frozen=True)
class Device:
    """One GPU. `num_sms` is what it has, not what `set_num_sms` leaves to the kernels."""

    name: str
    capability: tuple[int, int]
    num_sms: int
    smem_bytes: int  # of shared memory, for one block
    memory_gbps: float  # bytes of weights that a kernel can stream, in GB/s

    def require_hopper(self) -> None:
        """Raises UnsupportedDeviceError unless the kernels run here."""
        if self.capability != HOPPER:
            major, minor = self.capability
            age = "older" if self.capability < HOPPER else "newer"
            raise UnsupportedDeviceError(
                f"{self.name} has compute capability {major}.{minor}, {age} than Hopper (9.0): these kernels are built "
                "for sm_90a, which runs on Hopper alone; move the operands to an H100, H200 or H800, or to the CPU"
            )


H200 = Device("NVIDIA H200", HOPPER, num_sms=132, smem_bytes=MAX_SMEM_BYTES, memory_gbps=4400)


def memory_gbps(name: str) -> float:
    """Of a GPU of that name, as measured on an H200; taken to be an H100's for all others."""
    return H200.memory_gbps if "H200" in name else 3000


def named(name: str, num_sms: int) -> Device:
    """The model of a Hopper GPU of that name."""
    return Device(name, HOPPER, num_sms, MAX_SMEM_BYTES, memory_gbps(name))


# By the names that commands know them by.
MODELS = {
    "h200": H200,
    "h100": named("NVIDIA H100", 132),
    "h100-pcie": named("NVIDIA H100 PCIe", 114),
    "h800": named("NVIDIA H800", 132),
    "h20": named("NVIDIA H20", 78),
}


def current(index: int | None = None) -> Device:
    """The CUDA device of that index (the current one if None).

    Raises: UnsupportedDeviceError if PyTorch sees no CUDA device.
    """
    if not torch.cuda.is_available():
        raise UnsupportedDeviceError(
            "PyTorch sees no CUDA device: use CPU tensors, or see what `python -m deep_gemm doctor` says"
        )
    return _describe(torch.cuda.current_device() if index is None else index)


@cache
def _describe(index: int) -> Device:
    p = torch.cuda.get_device_properties(index)
    smem_bytes = p.shared_memory_per_block_optin
    return Device(p.name, (p.major, p.minor), p.multi_processor_count, smem_bytes, memory_gbps(p.name))


def best() -> Device:
    """The current CUDA device, or the model of an H200 where there is none."""
    return current() if torch.cuda.is_available() else H200
