"""Settings of a process, by functions: how many SMs, how much of the tensor cores, which tiles, when to launch."""

from __future__ import annotations

from dataclasses import dataclass, replace

from .errors import InvalidInputError
from .layout import is_whole
from .runtime import device


@dataclass(frozen=True)
class Config:
    """What the setters below hold. Every call takes the one that is current when it is made.

    Attributes:
        num_sms: SMs to use; None for all.
        tc_util: share of the tensor cores' peak to use at most, in percent.
        pdl: whether a kernel may start while the one before it on the stream still runs.
        block_m, block_n: what a tile's rows and columns are multiples of.
        batch_invariant: whether a row's bits are the same for every M.
    """

    num_sms: int | None = None
    tc_util: int = 100
    pdl: bool = False
    block_m: int = 1
    block_n: int = 1
    batch_invariant: bool = False


_config = Config()
_compile_mode = 0
_known = {_config: _config}
running: Config | None = _config  # the settings now; None in compile mode, where nothing runs


def current() -> Config:
    """The settings now: immutable, and the same object whenever they are the same."""
    return _config


def set_num_sms(num_sms: int | None) -> None:
    """Limits multiplications to num_sms SMs (None or 0: all), so that other kernels can run beside them.

    Raises: InvalidInputError if it is no whole number between 0 and the number of SMs of the current device.
    """
    best = device.best()
    if num_sms is not None and not (is_whole(num_sms) and 0 <= num_sms <= best.num_sms):
        raise InvalidInputError(
            f"num_sms is {num_sms!r}, expected 1 to {best.num_sms}, the SMs of {best.name}, or None for all"
        )
    _change(num_sms=None if num_sms in (None, 0, best.num_sms) else int(num_sms))  # so that restoring restores


def get_num_sms() -> int:
    """How many SMs kernels may use: as set, else all of the current device (of an H200 where there is none)."""
    return device.best().num_sms if _config.num_sms is None else _config.num_sms


def set_tc_util(tc_util: int) -> None:
    """Limits the kernels to tc_util percent of the tensor cores' peak, which saves power for others.

    Raises: InvalidInputError if it is no whole number between 1 and 100.
    """
    _change(tc_util=percent(tc_util))


def percent(tc_util: int) -> int:
    """A limit of the tensor cores, checked. Raises: InvalidInputError."""
    if not (is_whole(tc_util) and 1 <= tc_util <= 100):
        raise InvalidInputError(f"tc_util is {tc_util!r}, expected a whole number of percent, 1 to 100")
    return int(tc_util)


def get_tc_util() -> int:
    """The limit of `set_tc_util`, in percent; 100: none."""
    return _config.tc_util


def set_pdl(enable: bool) -> None:
    """enable: kernels may start while the one before them on the stream still runs (programmatic dependent launch).

    A dense multiplication then reads b and its scales before the kernel right before it on the stream has ended, and
    waits for that one before it reads a or writes d. So the contract: neither that kernel nor one that it overlaps with
    writes b or b's scales; behind several multiplications in a row, nor does the kernel before them. (Weights never are
    written.) Results do not change. In CUDA graphs it holds likewise.

    Raises: InvalidInputError for anything but True and False.
    """
    _change(pdl=_flag("set_pdl", enable))


def get_pdl() -> bool:
    """Whether `set_pdl` is on."""
    return _config.pdl


def set_block_size_multiple_of(multiple: int | tuple[int, int]) -> None:
    """Leaves the tiles whose rows and columns are multiples of `multiple` (one number for both, or two); 1: all.

    Raises: InvalidInputError where no tile is left.
    """
    block_m, block_n = block_size(multiple)
    _change(block_m=block_m, block_n=block_n)


def block_size(multiple: int | tuple[int, int]) -> tuple[int, int]:
    """What a tile's rows and columns are to be multiples of. Raises: InvalidInputError where no tile is."""
    from .heuristics import spare_tiles, tiles

    block_m, block_n = multiple if isinstance(multiple, (tuple, list)) and len(multiple) == 2 else (multiple, multiple)
    if not (
        is_whole(block_m)
        and is_whole(block_n)
        and block_m > 0
        and block_n > 0
        and any(t.block_m % block_m == 0 and t.block_n % block_n == 0 for t in (*tiles(), *spare_tiles()))
    ):
        raise InvalidInputError(
            f"the block size is to be a multiple of {multiple!r}, expected divisors of 64, 128 or 192 (rows) "
            "and of a multiple of 16 up to 256 (columns)"
        )
    return int(block_m), int(block_n)


def set_compile_mode(mode: int) -> None:
    """mode 0: calls multiply. 1: they compile the kernel that they would need, check their operands, launch nothing.

    Raises: InvalidInputError for another mode.
    """
    global _compile_mode, running
    if not is_whole(mode) or mode not in (0, 1):
        raise InvalidInputError(
            f"the compile mode is {mode!r}, expected 0 (multiply) or 1 (compile, and launch nothing)"
        )
    _compile_mode = int(mode)
    running = None if mode else _config


def get_compile_mode() -> int:
    """As `set_compile_mode` set it."""
    return _compile_mode


def set_batch_invariant(enable: bool) -> None:
    """enable: every row's bits are the same for all M, for K is never divided among the CTAs of a cluster.

    Without it a row has the same bits for all M with the same split (`deep-gemm explain`): for few rows, K may be added
    up in 2, 4 or 8 parts. What it costs: README.md, Interface.

    Raises: InvalidInputError for anything but True and False.
    """
    _change(batch_invariant=_flag("set_batch_invariant", enable))


def get_batch_invariant() -> bool:
    """As `set_batch_invariant` set it."""
    return _config.batch_invariant


def set_ignore_compile_dims(ignore: bool) -> None:
    """ignore is taken for compatibility: no dimension is ever compiled into a kernel."""


def _flag(name: str, x: object) -> bool:
    if not isinstance(x, int) or x not in (0, 1):
        raise InvalidInputError(f"{name} got {x!r}, expected True or False: pass one of them")
    return bool(x)


def _change(**values: int | bool | None) -> None:
    global _config, running
    new = replace(_config, **values)  # type: ignore[arg-type]
    _config = _known.setdefault(new, new)
    running = None if _compile_mode else _config
