"""A log of the problems that a process has planned: a JSON object a line. DG_RECORD_SHAPES names the file."""

from __future__ import annotations

import json
import logging
import os
import threading
from pathlib import Path
from typing import Any, NamedTuple

from .config import Config
from .errors import InvalidInputError
from .problem import Kind, Problem
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
        descriptor = os.open(file, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            os.write(descriptor, f"{line}\n".encode())  # at once, so that lines of processes do not mix
        finally:
            os.close(descriptor)
    except OSError as error:
        if file not in _complained:
            _complained.add(file)
            _logger.warning(f"deep_gemm: shapes cannot be recorded ({error}): set DG_RECORD_SHAPES to a file of yours")


def read(file: Path) -> list[Record]:
    """Every record of a file, each once. What a killed process left of its last line is passed over.

    Raises: InvalidInputError for a file that cannot be read, or a line that is no record, by its number.
    """
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidInputError(f"{file} cannot be read as a log of shapes: {error}") from error
    found: dict[Record, None] = {}
    for number, line in enumerate(text.splitlines(keepends=True), 1):
        if line.endswith("\n") and line.strip():
            found[_parse(file, number, line)] = None
    return list(found)


def _parse(file: Path, number: int, line: str) -> Record:
    try:
        about = json.loads(line)
        block_m, block_n = about["block"]
        problem = Problem(
            *(_whole(about[name]) for name in ("m", "n", "k")),
            kind=Kind[about["kind"].upper()],
            groups=_whole(about["groups"]),
            expected_m=None if about["expected_m"] is None else _whole(about["expected_m"], 0),
            alignment=_whole(about["alignment"]),
            column_scales=about["column_scales"] is True,
        )
        gpu = device.named(str(about["gpu"]), _whole(about["sms"]))
        config = Config(
            num_sms=None if about["num_sms"] is None else _whole(about["num_sms"]),
            tc_util=_whole(about["tc_util"]),
            block_m=_whole(block_m),
            block_n=_whole(block_n),
        )
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
