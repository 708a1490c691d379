"""A log of the problems that a process has planned: a JSON object a line. DG_RECORD_SHAPES names the file."""

from __future__ import annotations

import errno
import json
import logging
import os
import threading
from pathlib import Path
from typing import Any, NamedTuple

from .config import Config, block_size, percent
from .errors import InvalidInputError
from .problem import Kind, Problem, check_shape
from .runtime import device
from .runtime.device import Device

MOST_KNOWN = 65536  # lines that a process remembers to have written

_logger = logging.getLogger("deep_gemm")
_lock = threading.Lock()
_written: set[tuple[Path, str]] = set()
_complained: set[Path] = set()


class Record(NamedTuple):
    """A problem, where it was multiplied, and how."""

    problem: Problem
    device: Device
    config: Config


def append(file: Path, problem: Problem, gpu: Device, config: Config) -> None:
    """Adds a line, once for each problem of a process. Several processes may write to one file.

    Whether launches overlap and whether K may be split is left out: kernels for either are compiled. A file that cannot
    be written is complained of once, through logging.
    """
    about: dict[str, Any] = {"kind": problem.kind.name.lower(), "m": problem.m, "n": problem.n, "k": problem.k}
    about |= {"groups": problem.groups, "expected_m": problem.expected_m, "alignment": problem.alignment}
    about |= {"column_scales": problem.column_scales, "gpu": gpu.name, "sms": gpu.num_sms}
    about |= {"num_sms": config.num_sms, "tc_util": config.tc_util, "block": [config.block_m, config.block_n]}
    line = json.dumps(about)
    with _lock:
        if (file, line) in _written:
            return
        if len(_written) >= MOST_KNOWN:
            _written.clear()
        _written.add((file, line))
    try:
        flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC | os.O_NONBLOCK  # for no FIFO stops a call
        descriptor = os.open(file, flags, 0o600)
        try:
            text = f"{line}\n".encode()
            if os.write(descriptor, text) < len(text):  # at once, so that lines of processes do not mix
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(file))
        finally:
            os.close(descriptor)
    except OSError as error:
        if file not in _complained:
            _complained.add(file)
            _logger.warning(f"deep_gemm: shapes cannot be recorded ({error}): set DG_RECORD_SHAPES to a file of yours")


def read(file: Path) -> list[Record]:
    """Every record of a file, each once. Lines that are no JSON, as killed processes leave them, are passed over.

    Raises: InvalidInputError for a file that cannot be read, or a line that is no record, by its number.
    """
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidInputError(f"{file} cannot be read as a log of shapes: {error}") from error
    found: dict[Record, None] = {}
    torn = 0
    for number, line in enumerate(text.splitlines(), 1):
        try:
            about = json.loads(line) if line.strip() else None
        except (ValueError, RecursionError):
            torn += 1
            continue
        if line.strip():
            found[_record(file, number, line, about)] = None
    if torn:
        _logger.warning(f"deep_gemm: {torn} lines of {file} are no JSON, and passed over")
    return list(found)


def _record(file: Path, number: int, line: str, about: Any) -> Record:
    try:
        block_m, block_n = about["block"]
        problem = Problem(
            *(_whole(about[name]) for name in ("m", "n", "k")),
            kind=Kind[about["kind"].upper()],
            groups=_whole(about["groups"]),
            expected_m=None if about["expected_m"] is None else _whole(about["expected_m"], 0),
            alignment=_whole(about["alignment"]),
            column_scales=about["column_scales"] is True,
        )
        check_shape(max(problem.m, problem.expected_m or 0), problem.n, problem.k, problem.groups)
        if problem.column_scales != (problem.kind in (Kind.K_GROUPED, Kind.K_ENDS)) and problem.kind != Kind.DENSE:
            raise ValueError(f"column_scales of {problem.kind.name.lower()}")
        gpu = device.named(str(about["gpu"]), _whole(about["sms"]))
        block_m, block_n = block_size((block_m, block_n))
        num_sms = None if about["num_sms"] is None else min(_whole(about["num_sms"]), gpu.num_sms)
        config = Config(num_sms=num_sms, tc_util=percent(about["tc_util"]), block_m=block_m, block_n=block_n)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InvalidInputError(
            f"line {number} of {file} is {line.strip()[:100]!r}, expected a problem as DG_RECORD_SHAPES writes it "
            f"({error!r}): remove the line"
        ) from error
    return Record(problem, gpu, config)


def _whole(x: object, least: int = 1) -> int:
    if type(x) is not int or x < least:
        raise ValueError(f"{x!r} is no whole number of {least} or more")
    return x
