"""The command line, as a user runs it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from deep_gemm import cli, per_block_cast_to_fp8, settings
from deep_gemm.problem import Problem

ROOT = Path(__file__).parent.parent


def run(*args: object, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "deep_gemm", *map(str, args)]
    env = os.environ | {"PYTHONPATH": str(ROOT)} | environment
    return subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=ROOT, env=env)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights in every form that fits, and one of each kind that does not."""
    torch.manual_seed(0)
    values, scales = per_block_cast_to_fp8(torch.randn(136, 272))
    tensors = {
        "bf16.weight": torch.randn(256, 384, dtype=torch.bfloat16),
        "f16.weight": torch.randn(64, 128, dtype=torch.float16),
        "f32.weight": torch.randn(8, 16),
        "fp8.weight": values,
        "fp8.weight_scale_inv": scales,
        "lone.weight": values.clone(),
        "odd_n.weight": torch.randn(12, 128),
        "odd_k.weight": torch.randn(16, 100),
        "integers.weight": torch.ones(16, 16, dtype=torch.int32),
        "embed_tokens.weight": torch.randn(1024, 128, dtype=torch.bfloat16),
        "norm.weight": torch.randn(128),
    }
    path = tmp_path_factory.mktemp("checkpoint") / "model.safetensors"
    save_file(tensors, path)
    return path


def test_demo_of_deepseek_v3():
    result = run("demo", "--m", 1, "--device", "cpu")
    assert result.returncode == 0, result.stderr
    assert not result.stderr  # and so no progress bar, for this is no terminal
    *rows, result_of_experts = result.stdout.splitlines()[2:]
    for name, n, k in (("gate + up", 512, 512), ("down", 512, 256)):
        for layout in ("contiguous", "masked"):
            (row,) = [row for row in rows if row.startswith(f"experts {name}, {layout} ")]
            assert f" 96 {n:6d} {k:6d}   cpu " in row and row.endswith(" within the bound")
    assert result_of_experts.endswith(" 48 tokens, each to 2 of 4 experts: the same bits in both layouts")
    for (name, n, k), row in zip(cli.LAYERS, rows[:-4], strict=True):
        assert row.startswith(name) and f" 1 {n:6d} {k:6d}   cpu " in row and row.endswith(" within the bound")


def test_demo_of_a_checkpoint(checkpoint: Path):
    result = run("demo", "--m", 24, "--device", "cpu", "--weights", checkpoint)
    assert result.returncode == 0, result.stderr
    multiplied = {line.split()[0]: line for line in result.stdout.splitlines() if line.endswith("within the bound")}
    assert list(multiplied) == ["bf16.weight", "f16.weight", "f32.weight", "fp8.weight"]
    # 16 of the 24 rows in full, and 128 columns from the top to the bottom (8 of the last block of 136)
    assert " 24    256    384 " in multiplied["bf16.weight"]
    assert f" {16 * 256 + 24 * 128} within" in multiplied["bf16.weight"]
    assert " 24    136    272 " in multiplied["fp8.weight"]
    for line in (
        "lone.weight [136, 272] F8_E4M3: left out, its _scale_inv has shape None, expected (2, 3)",
        "odd_n.weight [12, 128] F32: left out, N is 12, expected a multiple of 8",
        "odd_k.weight [16, 100] F32: left out, K is 100, expected a positive multiple of 16",
        "integers.weight [16, 16] I32: left out, neither F8_E4M3 nor BF16, F16, F32",
        "embed_tokens.weight [1024, 128] BF16: left out, an embedding is a table, and is not multiplied",
    ):
        assert line in result.stdout


@pytest.mark.parametrize(
    ("m", "us", "device_type", "said"),
    [(4096, 700, "cuda", "1374 TFLOPS"), (1, 32.2, "cuda", "3649 GB/s"), (64, 512e3, "cpu", "0.0294 TFLOPS")],
)
def test_demo_speed(m: int, us: float, device_type: str, said: str):
    assert cli._speed(Problem(m, 7168, 16384), us, device_type) == said


def test_demo_limit(checkpoint: Path, capsys: pytest.CaptureFixture[str]):
    assert cli.main(["demo", "--m", "1", "--device", "cpu", "--weights", str(checkpoint), "--limit", "1"]) == 0
    out = capsys.readouterr().out
    assert out.count("within the bound") == 1
    assert "3 more weights fit: raise --limit 1 to multiply them" in out


def test_demo_uses_the_scales_of_the_checkpoint(tmp_path: Path):
    """The weights that the demo multiplies are value * scale, block by block."""
    weight = torch.randn(256, 256) * torch.tensor([1.0, 100.0]).repeat_interleave(128)[:, None]
    values, scales = per_block_cast_to_fp8(weight)
    save_file({"w": values, "w_scale_inv": scales.bfloat16()}, tmp_path / "x.safetensors")
    (layer,) = cli._checkpoint(tmp_path / "x.safetensors", 1)
    got_values, got_scales = layer.load(torch.device("cpu"))
    assert torch.equal(got_values.view(torch.uint8), values.view(torch.uint8))
    assert torch.equal(got_scales, scales.bfloat16().float())


def test_a_large_weight_is_quantised_in_slabs(tmp_path: Path):
    weight = torch.randn(4096 + 136, 64)
    save_file({"w": weight}, tmp_path / "x.safetensors")
    (layer,) = cli._checkpoint(tmp_path / "x.safetensors", 1)
    for got, want in zip(layer.load(torch.device("cpu")), per_block_cast_to_fp8(weight), strict=True):
        assert torch.equal(got.float(), want.float())


@pytest.mark.parametrize(
    "spoil",
    [
        lambda d: d[0].zero_(),
        lambda d: d[:, 3:4].mul_(1.02),
        lambda d: d[-1, -1].fill_(float("nan")),
    ],
)
def test_demo_fails_when_a_product_is_wrong(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], spoil):
    def wrong(a, b, d):
        cli.reference.run(*a, *b, d)
        spoil(d)

    monkeypatch.setattr(cli, "LAYERS", (("layer", 128, 128), ("second", 8, 16)))
    monkeypatch.setattr(cli, "fp8_gemm_nt", wrong)
    assert cli.main(["demo", "--m", "16", "--device", "cpu"]) == 1
    captured = capsys.readouterr()
    assert "OUTSIDE the bound" in captured.out
    assert captured.err == "deep-gemm: 2 of 7 checks do not hold: see OUTSIDE and DIFFER above\n"


@pytest.mark.parametrize("call", ["m_grouped_fp8_gemm_nt_contiguous", "m_grouped_fp8_gemm_nt_masked"])
def test_demo_fails_when_experts_are_wrong(monkeypatch: pytest.MonkeyPatch, call: str):
    right = getattr(cli, call)

    def wrong(a, b, d, *layout):
        right(a, b, d, *layout)
        d.mul_(1.02)

    monkeypatch.setattr(cli, call, wrong)
    size = cli.Experts(groups=3, hidden=256, intermediate=128, tokens=5, top=2)
    rows = list(cli._multiply_experts(size, torch.device("cpu")))
    for name, row, holds in rows[:-1]:
        assert holds == (call.rpartition("_")[2] not in name) == ("OUTSIDE" not in row)
    assert "elements of the layouts DIFFER" in rows[-1][1] and not rows[-1][2]


def test_experts_without_a_token():
    """Of ten experts two are chosen; no slot is taken twice, and none belongs to another group."""
    size = cli.Experts(groups=10, hidden=128, intermediate=64, tokens=1, top=2)
    assert all(holds for _, _, holds in cli._multiply_experts(size, torch.device("cpu")))
    group = torch.tensor([2, 2, 2, 5, 9, 9])
    contiguous, masked = cli._arrangements(group, cli.Experts(10, 128, 64, 4, 2))
    assert contiguous.shape == (3 * 128,) and contiguous.slots.tolist() == [0, 1, 2, 128, 256, 257]
    assert masked.shape == (10, 4) and masked.slots.tolist() == [8, 9, 10, 20, 36, 37]


def test_doctor():
    result = run("doctor", DG_JIT_CACHE_DIR="/proc/nowhere")
    assert result.returncode == 0, result.stderr
    for part in ("Python ", f"PyTorch        {torch.__version__}", "compiler       NVRTC", "GEMMs run on"):
        assert part in result.stdout
    assert "cache          /proc/nowhere, kernels: 0" in result.stdout
    for name, *_ in settings.describe():
        assert f"  {name} " in result.stdout


def test_doctor_names_wrong_settings(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    monkeypatch.setenv("DG_JIT_DEBUG", "2")
    cli.main(["doctor"])
    assert "missing  DG_JIT_DEBUG   DG_JIT_DEBUG is '2', expected 0 or 1" in capsys.readouterr().out


def test_doctor_says_that_the_cache_cannot_be_written(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr("os.access", lambda *_: False)
    cli.main(["doctor"])
    assert "so every process compiles anew: set DG_JIT_CACHE_DIR to a folder of yours" in capsys.readouterr().out


def test_doctor_without_the_cuda_packages(tmp_path: Path):
    (tmp_path / "cuda").mkdir()
    (tmp_path / "cuda" / "__init__.py").write_text("raise ImportError('hidden from this test')")
    result = run("doctor", PYTHONPATH=f"{tmp_path}:{ROOT}", CUDA_VISIBLE_DEVICES="")
    assert result.returncode == 0, result.stderr
    assert "pip install cuda-bindings" in result.stdout and "nvidia-cuda-nvrtc" in result.stdout
    assert result.stdout.splitlines()[-1] == "GEMMs run on the CPU of this machine."


def test_doctor_without_pyelftools(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    monkeypatch.setitem(sys.modules, "elftools", None)
    with pytest.warns(RuntimeWarning, match="pip install pyelftools"):
        cli.main(["doctor"])
    assert "-> pip install pyelftools" in capsys.readouterr().out


def test_doctor_counts_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    entry = tmp_path / "fp8_gemm.0"
    entry.mkdir()
    (entry / "manifest.json").write_text("{}")
    (entry / "kernel.cubin").write_bytes(bytes(1_999_998))
    monkeypatch.setenv("DG_JIT_CACHE_DIR", str(tmp_path))
    cli.main(["doctor"])
    assert f"cache          {tmp_path}, kernels: 1, 2.0 MB" in capsys.readouterr().out


def test_explain():
    result = run("explain", 4096, 2112, 7168)
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("d[4096, 2112] = a[4096, 7168] @ b[2112, 7168].T on NVIDIA H200, 132 SMs\n")
    for word in ("plan ", "runner-up", "124 GFLOP", " us: start ", "behind"):
        assert word in result.stdout


def test_explain_says_what_was_measured(capsys: pytest.CaptureFixture[str]):
    """Where a plan is chosen although the cost model holds another for faster."""
    assert cli.main(["explain", "128", "2112", "7168"]) == 0
    assert "slower where it was measured; " in capsys.readouterr().out
    assert cli.main(["explain", "128", "2112", "7168", "--sms", "100"]) == 0
    assert "% behind; " in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "product", "gflop"),
    [
        ("contiguous", "d[4096, 7168] = a[4096, 2048] @ b[32, 7168, 2048].T", 120.3),
        ("masked --expected-m 192", "d[32, 4096, 7168] = a[32, 4096, 2048] @ b[32, 7168, 2048].T", 180.4),
        ("masked", "d[32, 4096, 7168] = a[32, 4096, 2048] @ b[32, 7168, 2048].T", 3848),
    ],
)
def test_explain_groups(options: str, product: str, gflop: float, capsys: pytest.CaptureFixture[str]):
    assert cli.main(f"explain 4096 7168 2048 --groups 32 --layout {options}".split()) == 0
    out = capsys.readouterr().out
    assert out.startswith(f"{product} on NVIDIA H200, 132 SMs\n") and f" {gflop:g} GFLOP" in out and "runner-up" in out


def test_explain_with_fewer_sms(capsys: pytest.CaptureFixture[str]):
    assert cli.main(["explain", "64", "2112", "7168", "--sms", "78"]) == 0
    assert "on NVIDIA H200, 78 SMs" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("command", "complaint"),
    [
        ("explain 64 2112 7169", "deep-gemm: K is 7169, expected a positive multiple of 16"),
        ("explain 64 2113 7168", "deep-gemm: N is 2113, expected a multiple of 8"),
        ("explain 64 2112 7168 --sms 133", "deep-gemm: --sms is 133, expected at most 132"),
        (
            "explain 64 2112 7168 --groups 2",
            "deep-gemm: --groups is 2, expected 1 without --layout contiguous or masked",
        ),
        ("explain 64 2112 7168 --expected-m 2", "deep-gemm: --expected-m is 2, expected none without --layout masked"),
        ("explain 0 2112 7168", "deep-gemm explain: argument M: '0' is not a positive whole number"),
        ("explain 64 2112", "deep-gemm explain: the following arguments are required: K"),
        ("demo --device tpu", "deep-gemm: --device is tpu, expected cpu, or cuda"),
        ("demo --device mps", "deep-gemm: --device is mps, expected cpu, or cuda"),
        ("demo --device cuda:99", "deep-gemm: --device is cuda:99, expected cpu, or cuda with the number of a GPU"),
        ("demo --m -1", "deep-gemm demo: argument --m: '-1' is not a positive whole number"),
        ("demo --m 999999999999 --device cpu", "deep-gemm: "),
        ("demo --weights /nowhere", "deep-gemm: --weights is /nowhere, expected a safetensors file: there is no such"),
        (f"demo --weights {__file__}", f"deep-gemm: --weights is {__file__}, expected a safetensors file: "),
        ("bogus", "deep-gemm: argument command: invalid choice: 'bogus'"),
        ("", "deep-gemm: the following arguments are required: command"),
    ],
)
def test_errors_are_one_clear_line(command: str, complaint: str, capsys: pytest.CaptureFixture[str]):
    try:
        code = cli.main(command.split())
    except SystemExit as stop:
        code = stop.code
    error = capsys.readouterr().err
    assert code in (1, 2)
    assert error.startswith(complaint) and error.count("\n") == 1


def test_an_error_in_a_process_of_its_own():
    result = run("demo", "--weights", "/nowhere")
    assert (result.returncode, result.stdout, result.stderr.count("\n")) == (1, "", 1)


def test_a_checkpoint_without_weights(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    save_file({"norm.weight": torch.ones(128)}, tmp_path / "x.safetensors")
    assert cli.main(["demo", "--weights", str(tmp_path / "x.safetensors")]) == 1
    assert "N a multiple of 8 and K of 16: none is in it" in capsys.readouterr().err


def test_a_closed_pipe_is_no_error():
    command = f"{sys.executable} -m deep_gemm doctor | head -n 1"
    result = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=60, cwd=ROOT)
    assert result.stdout.startswith("ok       Python") and not result.stderr


def test_readme_lists_every_setting():
    table = "".join(
        f"| `{name}`{''.join(f' (`{old}`)' for old in old_names)} | {default or 'none'} | {meaning} |\n"
        for name, old_names, _, default, meaning in settings.describe()
        if name.startswith("DG_")
    )
    assert table in (ROOT / "README.md").read_text(), f"the README's table of the environment should be\n{table}"


def test_readme_example():
    """The README's Python runs as it stands, on fewer rows."""
    text = (ROOT / "README.md").read_text()
    script = text.partition("```python\n")[2].partition("```")[0].replace("512", "16")
    result = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=300, check=True, cwd=ROOT
    )
    assert float(result.stdout) == pytest.approx(0.0007, abs=0.0002)


def test_the_version_has_one_home():
    from importlib.metadata import PackageNotFoundError, version

    import deep_gemm

    try:
        assert version("deep-gemm") == deep_gemm.__version__
    except PackageNotFoundError:
        pytest.skip("runs from the source tree, without an installation")


def test_demo_of_weights_that_are_not_finite(tmp_path: Path):
    weights = torch.ones(16, 128)
    weights[:, 3] = float("nan")
    save_file({"ü\x1b.weight": weights, "scaled.weight": torch.ones(16, 128).to(torch.float8_e4m3fn),
               "scaled.weight_scale_inv": torch.ones(1, 1, dtype=torch.int32)}, tmp_path / "w.safetensors")  # fmt: skip
    result = run("demo", "--m", 3, "--weights", tmp_path / "w.safetensors", LC_ALL="C", PYTHONUTF8="0")
    assert result.returncode == 0, result.stderr
    assert "'\\xfc\\x1b.weight'" in result.stdout and "not checked: not finite in BF16" in result.stdout
    assert (
        "scaled.weight [16, 128] F8_E4M3: left out, its _scale_inv is I32, expected BF16 or F16 or F32" in result.stdout
    )


def test_doctor_reports_a_cache_that_others_can_write_to(tmp_path: Path):
    tmp_path.chmod(0o777)
    assert "missing  cache          " in (said := run("doctor", DG_JIT_CACHE_DIR=str(tmp_path)).stdout)
    assert f"-> chmod go-w {tmp_path}, or set DG_JIT_CACHE_DIR to a folder of yours" in said
    assert (
        "ok       cache          "
        in run("doctor", DG_JIT_CACHE_DIR=str(tmp_path), DG_JIT_ALLOW_SHARED_CACHE="1").stdout
    )


def test_doctor_reports_a_cache_that_cannot_be_read(tmp_path: Path):
    entry = tmp_path / "kernel.0"
    entry.mkdir()
    (entry / "manifest.json").write_text("{}")
    (entry / "dead").symlink_to("/nonexistent")
    result = run("doctor", DG_JIT_CACHE_DIR=str(tmp_path))
    assert f"missing  cache          {tmp_path}: No such file" in result.stdout
    assert "settings, by the environment" in result.stdout
