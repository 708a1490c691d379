"""Another package of the name deep_gemm, timed in a process of its own: both ends of the line between the processes.

A line of JSON each way. A request is {"family", "shape", "seed", "sets", "launches", "pdl"} (make operands, capture a
graph; pdl: of launches that overlap), the same with "batch" and "batches" in place of "launches" (time calls on the
CPU), "replay" (one turn), {"burst_us"} (a while at load) or "free" (release all memory); an answer is {}, {"us": ...}
or {"error": ...}. The first answer, to no request, is {"file", "version"}: which deep_gemm it is.
"""

from __future__ import annotations

import gc
import json
import os
import select
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parent.parent
TIMEOUT_S = 180  # its first call of a shape compiles


class Peer:
    """Our end. folder: where `pip install --target` put the package.

    Raises: RuntimeError, here and from ask, with what the process said. If it died, the next ask starts it again.
    """

    def __init__(self, folder: Path, timeout_s: float = TIMEOUT_S) -> None:
        self.folder, self.timeout_s = folder.resolve(), timeout_s
        self._start()

    def _start(self) -> None:
        # `-m` looks into the current folder first, and in the repository's it would find our deep_gemm.
        path = os.pathsep.join(filter(None, (str(self.folder), str(ROOT), os.environ.get("PYTHONPATH"))))
        self.process = subprocess.Popen(
            [sys.executable, "-m", "bench.peer"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=self.folder,
            env=os.environ | {"PYTHONPATH": path},
        )
        about = self._answer()
        file, self.version = Path(about["file"]), about["version"]
        if not file.is_relative_to(self.folder):
            self.close()
            raise RuntimeError(f"the peer found {file}, expected a deep_gemm in {self.folder}")

    def ask(self, request: object) -> dict[str, Any]:
        if self.process.poll() is not None:
            self._start()
        assert self.process.stdin
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self.process.stdout
        ready, _, _ = select.select([self.process.stdout], [], [], self.timeout_s)
        line = self.process.stdout.readline() if ready else ""
        if not line:
            self.close()
            raise RuntimeError("the peer died" if ready else f"the peer did not answer in {self.timeout_s} s")
        answer = json.loads(line)
        if "error" in answer:
            raise RuntimeError(answer["error"])
        return answer

    def close(self) -> None:
        self.process.kill()
        self.process.communicate()


def answers(requests: Iterator[str]) -> Iterator[dict[str, Any]]:
    """The other end: an answer to every line."""
    from bench import graph, grouped

    yield {"file": grouped.deep_gemm.__file__, "version": getattr(grouped.deep_gemm, "__version__", None)}
    captured: torch.cuda.CUDAGraph | None = None
    sets: list[grouped.Operands] = []
    for line in requests:
        try:
            request = json.loads(line)
            if request == "replay":
                assert captured
                yield {"us": graph.turn_us(captured)}
                continue
            if "burst_us" in request:
                assert captured
                yield {"us": graph.sustained_us(captured, request["burst_us"])}
                continue
            captured = None
            sets.clear()
            gc.collect()
            torch.cuda.empty_cache()
            if request != "free":
                torch.manual_seed(request["seed"])
                shape = grouped.Shape.of(request["family"], request["shape"])
                sets += [grouped.Operands.random(shape) for _ in range(request["sets"])]
                grouped.deep_gemm.set_pdl(request["pdl"])
                if "batches" in request:
                    function, _ = grouped.call(sets[0])
                    case = function, [grouped.call(x)[1] for x in sets]
                    yield {"us": graph.host_us({"": case}, request["batch"], request["batches"])[""]}
                    continue
                captured = graph.capture(grouped.run, sets, request["launches"])
            yield {}
        except Exception as error:
            yield {"error": f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"}


if __name__ == "__main__":
    line_out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever the package or its compiler prints goes to stderr
    for answer in answers(iter(sys.stdin)):
        print(json.dumps(answer), file=line_out, flush=True)
