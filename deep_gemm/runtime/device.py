"""What the planner and the launcher have to know of a device."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch

from ..errors import InvalidInputError, UnsupportedDeviceError

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
    bandwidth = H200.memory_gbps if "H200" in p.name else 3000
    return Device(p.name, (p.major, p.minor), p.multi_processor_count, p.shared_memory_per_block_optin, bandwidth)


def best() -> Device:
    """The current CUDA device, or the model of an H200 where there is none."""
    return current() if torch.cuda.is_available() else H200


_num_sms: int | None = None


def set_num_sms(num_sms: int | None) -> None:
    """Limits the kernels to that many SMs (None: all), so that others can run beside them.

    Raises: InvalidInputError if it is no whole number between 1 and the number of SMs of the current device.
    """
    global _num_sms
    whole = isinstance(num_sms, int) and not isinstance(num_sms, bool)
    if num_sms is not None and not (whole and 1 <= num_sms <= best().num_sms):
        raise InvalidInputError(
            f"num_sms is {num_sms}, expected 1 to {best().num_sms}, the SMs of {best().name}, or None for all"
        )
    _num_sms = num_sms


def num_sms_set() -> int | None:
    """What `set_num_sms` set; None for all."""
    return _num_sms


def get_num_sms() -> int:
    """How many SMs kernels may use: as set, else all of the current device (of an H200 where there is none)."""
    return best().num_sms if _num_sms is None else _num_sms
