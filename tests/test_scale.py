"""Decode steps against batch and context; single passes of other engines; the script that measures on a GPU."""

import importlib.util
import json
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import typer
from typer.testing import CliRunner

from baton import machine
from baton.bench import scale
from baton.bench.scale import bench_scale, filled, plot
from baton.bench.shapes import SHAPES
from baton.cli import app
from baton.errors import BatonError, MemoryShort
from baton.machine import Quiet
from baton.models.adapter import slot_bytes, target_for

ROOT = Path(__file__).resolve().parents[1]
LLAMA = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
LLAMA |= {"vocab_size": 300, "max_position_embeddings": 256}
T5 = {"d_model": 64, "d_kv": 16, "d_ff": 96, "num_layers": 1, "num_heads": 4, "decoder_start_token_id": 0}
GPU = pytest.param("cuda", marks=pytest.mark.gpu)


@pytest.fixture(autouse=True)
def _shapes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(SHAPES, "tiny", ("llama", LLAMA))
    monkeypatch.setitem(SHAPES, "tiny-t5", ("t5", T5))
    monkeypatch.setattr(scale, "bandwidth_gb_s", lambda device: 1.0)  # reads a quarter of a gigabyte, again and again


# --- batches and contexts --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("device", ["cpu", GPU])
@pytest.mark.parametrize("shape", ["tiny", "tiny-t5"])
def test_every_batch_is_timed_at_every_context(shape: str, device: str) -> None:
    """Each once, in order; tokens per second are rows over seconds; memory is that of keys and values."""
    done: list[tuple[str, int, int]] = []
    report = bench_scale(
        shape, batches=(3, 1), contexts=(70, 5), repeats=3, device=device, progress=lambda *args: done.append(args)
    )
    assert [(p.context, p.batch) for p in report.points] == [(5, 1), (5, 3), (70, 1), (70, 3)]
    assert done[-1] == ("decode steps", 4, 4) and not report.absent
    layers, values = (2, 64) if shape == "tiny" else (1, 64)  # keys and values each, in two bytes
    each = report.settings["slot_bytes"]
    assert each == 2 * layers * values * 2
    for point in report.points:
        assert 0 < point.low <= point.seconds <= point.high
        assert point.tokens_per_second == pytest.approx(point.batch / point.seconds)
        assert point.cache_bytes == point.batch * point.context * each
        read = report.settings["weight_bytes"] + point.cache_bytes
        assert point.gb_s == pytest.approx(read / point.seconds / 1e9, abs=0.06)
    assert json.loads(json.dumps(report.to_dict()))["settings"]["device"].startswith(device)


@pytest.mark.parametrize("family", ["llama", "t5"])
def test_a_step_after_noise_attends_to_all_of_it(family: str) -> None:
    """Each row holds the same context, which is not the zeros that memory starts with, and no step allocates."""
    model = tiny.FAMILIES[family]()
    target = target_for(model)
    memory = filled(target, 3, 70)
    assert memory.lengths == [70, 70, 70]
    keys = memory.own.keys[0]
    assert keys is not None and keys.shape[2] > 70
    assert keys[:, :, :70].abs().amin(-1).max() > 0 and torch.equal(keys[0], keys[2])
    before = [tensor.data_ptr() for tensor in memory.own.keys if tensor is not None]
    logits = target.forward(torch.zeros((3, 1), dtype=torch.long), memory)
    assert before == [tensor.data_ptr() for tensor in memory.own.keys if tensor is not None]
    assert memory.lengths == [71, 71, 71]
    torch.testing.assert_close(logits[0], logits[2])
    memory.truncate([70] * 3)
    with torch.inference_mode():
        keys[:, :, 69] += 3  # the last slot in use counts
    changed = target.forward(torch.zeros((3, 1), dtype=torch.long), memory)
    assert (changed - logits).abs().max() > 1e-4


def test_what_does_not_fit_is_left_out_with_its_size(monkeypatch: pytest.MonkeyPatch) -> None:
    """Before it is allocated; what fits is measured."""
    model = tiny.llama()
    with pytest.raises(MemoryShort, match=r"GB are needed and 0\.0 GB are free"):
        monkeypatch.setattr(scale, "free_bytes", lambda _: 1000)
        scale._check_memory(target_for(model), 1, 64)
    room = 1.2 * (64 + 64) * 2 * slot_bytes(model) * 128 // (2 * 8 * 4)  # two rows of 64, with what is allocated ahead
    monkeypatch.setattr(scale, "free_bytes", lambda _: room)
    allocated: list[tuple[int, int]] = []
    real = scale.filled
    monkeypatch.setattr(scale, "filled", lambda *args: (allocated.append(args[1:]), real(*args))[1])
    report = bench_scale("tiny", batches=(1, 200), contexts=(64,), repeats=3)
    assert allocated == [(1, 64)] == [(p.batch, p.context) for p in report.points]
    assert len(report.absent) == 1 and report.absent[0].startswith("batch 200, context 64 is left out: 0.0 GB are need")


def test_positions_that_a_shape_lacks_are_refused() -> None:
    with pytest.raises(BatonError, match=r"256 \+ 1 positions are more than tiny has \(256\): give --context 255"):
        bench_scale("tiny", contexts=(256,))


def test_the_picture_shows_both_sides_of_the_same_points(tmp_path: Path) -> None:
    """Tokens/s per context and milliseconds per batch, as one PNG; a context with one point is drawn too."""
    points = [
        {"batch": b, "context": c, "seconds": s, "low": 0.9 * s, "high": 1.1 * s}
        for b, c, s in [(1, 64, 0.01), (8, 64, 0.02), (1, 512, 0.02), (8, 512, 0.05), (1, 2048, 0.04)]
    ]
    settings = {"shape": "tiny", "dtype": "bfloat16", "runtime": "native", "device": "cpu"}
    report: dict[str, Any] = {"points": points, "settings": settings}
    plot(report, tmp_path / "a.png")
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    plot(report, tmp_path / "a.svg")
    assert "<svg" in (tmp_path / "a.svg").read_text(encoding="utf-8")


def test_the_command_prints_draws_and_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(SHAPES, "t5-small", ("t5", T5))
    words = "bench scale --shape t5-small --batch 1 --batch 2 --context 8 --repeats 3 --device cpu"
    options = ["--plot", str(tmp_path / "new" / "a.png")]
    done = CliRunner().invoke(app, [*words.split(), *options], env={"COLUMNS": "200"})
    assert done.exit_code == 0, done.output
    assert "tokens/s" in done.stdout and "0.3 kB" in done.stdout and (tmp_path / "new" / "a.png").stat().st_size > 1000
    refused = CliRunner().invoke(app, [*words.split(), "--plot", "a.gif"])
    assert refused.exit_code == 2 and ".png" in refused.output


# --- a busy machine --------------------------------------------------------------------------------------------------


def test_one_judge_of_busy_machines(monkeypatch: pytest.MonkeyPatch) -> None:
    """Quiet is what the fastest probe was; a bound says how many times as long counts; waiting ends when it is over."""
    probes = [0.001] * 10
    monkeypatch.setattr(machine, "probe_s", lambda: probes.pop(0))
    monkeypatch.setattr(machine.time, "sleep", lambda _: None)
    judge = Quiet([0.002, 0.0], bound=3.0)
    probes += [0.0029, 0.0031, 0.0005, 0.0016, 0.9, 0.8, 0.0005]
    assert [judge.busy() for _ in range(4)] == [False, True, False, True]  # 0.5 ms is the new usual
    assert judge.wait() == 0.0005 and not probes
    known = [0.001]
    probes += [0.01] * 10
    assert Quiet(known).usual == 0.001


# --- other engines, one pass at a time -------------------------------------------------------------------------------

PASSES = """
import json, sys, tiny_shapes, torch
from baton.bench.forward import bench_forward, random_model
from baton.bench.peers.table import make_passes
shape, peer, other = sys.argv[1:]
report = bench_forward(shape, rows=(1, 3), contexts=(9,), peers=[peer, other], dtype=torch.float32, repeats=3).to_dict()
model = random_model(shape, torch.float32, "cpu", "eager")
engine, ids = make_passes(peer, model, 64), torch.randint(3, 300, (1, 20))
engine.begin(ids[0, :16].tolist())
if peer == "openvino":
    for _ in range(2):  # back to where it was
        engine.look(ids[0, 16:].tolist())
    found = torch.tensor(engine._pass(ids[0, 16:].tolist(), 16))
    wanted = model(ids).logits[:, 16:]
    report["wrong"] = float((found - wanted).abs().max() / wanted.abs().max())
else:
    report["steps"] = [engine.look([5]) for _ in range(16)]
print(json.dumps(report))
"""


def apart(program: str, *arguments: str) -> str:
    """What a program prints: some engines do not share a process with PyTorch's training."""
    shapes = (
        f"from baton.bench.shapes import SHAPES\nSHAPES['tiny'] = ('llama', {LLAMA})\nSHAPES['tiny-t5'] = ('t5', {T5})"
    )
    prefix = f"import sys, types\nexec({shapes!r})\nsys.modules['tiny_shapes'] = types.ModuleType('tiny_shapes')\n"
    words = [sys.executable, "-c", prefix + program, *arguments]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()[-1]


@pytest.mark.parametrize(
    ("shape", "peer", "other", "rows", "said"),
    [
        ("tiny", "openvino", "ctranslate2", {1, 3}, "openvino is not timed at reading the context"),
        ("tiny-t5", "ctranslate2", "openvino", {1}, "ctranslate2 is timed at one row only"),
    ],
)
def test_other_engines_are_timed_at_what_they_can(shape: str, peer: str, other: str, rows: set[int], said: str) -> None:
    """OpenVINO's pass gives our logits, the same again, from weights and keys in float16; CTranslate2's sixteen steps
    each have a time of their own. What neither can be timed at is said, and who is left out.
    """
    if importlib.util.find_spec("openvino_genai" if peer == "openvino" else peer) is None:
        pytest.skip(f"{peer} is not installed: it needs the extra `peers`")
    report = json.loads(apart(PASSES, shape, peer, other))
    found = {(c["what"], c["rows"]) for c in report["costs"] if c["engine"].startswith(peer)}
    assert found == {("pass", count) for count in rows}
    ours = {(c["what"], c["rows"]) for c in report["costs"] if c["engine"] == "baton"}
    assert ours == {("prompt", 0), ("pass", 1), ("pass", 3)}
    assert [line.split(" is ")[0] for line in report["absent"]] == [other, peer] and report["absent"][1].startswith(
        said
    )
    if peer == "openvino":
        assert report["wrong"] < 5e-3
    else:
        assert len(set(report["steps"])) > 8 and min(report["steps"]) > 0


# --- threads that wait -----------------------------------------------------------------------------------------------


@pytest.mark.skipif(sys.platform != "linux", reason="other systems' PyTorch brings other OpenMP libraries")
def test_idle_threads_sleep_where_that_is_asked_for() -> None:
    """OpenMP itself says how its threads wait: the option came before PyTorch."""
    program = "import baton.cli; from baton.cli.options import Machine; Machine(idle='sleep'); import torch"
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("OMP_", "GOMP_"))}
    environment["OMP_DISPLAY_ENV"] = "VERBOSE"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, env=environment)
    if "GOMP_SPINCOUNT" not in done.stderr:
        pytest.skip("PyTorch's OpenMP library is another one")
    assert "OMP_WAIT_POLICY = 'PASSIVE'" in done.stderr and "GOMP_SPINCOUNT = '0'" in done.stderr
    assert "too late" not in done.stderr


# --- the script for a GPU --------------------------------------------------------------------------------------------

SCRIPT = ROOT / "benchmarks" / "gpu.sh"
needs_bash = pytest.mark.skipif(sys.platform == "win32" or shutil.which("bash") is None, reason="a script for bash")


def script(*options: str, **environment: str) -> "subprocess.CompletedProcess[str]":
    words = ["bash", str(SCRIPT), *options]
    environment = {**os.environ, "PYTHON": sys.executable, **environment}
    return subprocess.run(words, capture_output=True, text=True, check=False, env=environment)


@needs_bash
@pytest.mark.parametrize("options", [(), ("--quick", "--device", "cpu")])
def test_the_gpu_scripts_commands_parse(options: tuple[str, ...], tmp_path: Path) -> None:
    """All four measurements, with options that exist and values that are allowed."""
    lines = script(*options, "--dry-run", OUT=str(tmp_path)).stdout.splitlines()
    benches = [words for words in map(shlex.split, lines) if "baton.cli" in words]
    assert [words[words.index("bench") + 1] for words in benches] == ["forward", "decode", "scale", "handoff"]
    assert len(lines) - len(benches) == ("cpu" not in options)  # the tests that need a GPU
    group = typer.main.get_command(app)
    for words in benches:
        _, name, *rest = words[words.index("bench") :]
        commands: Any = group.get_command(typer.Context(group), "bench")
        context = commands.get_command(typer.Context(commands), name).make_context(name, rest)
        assert context.params["device"] == ("cpu" if "cpu" in options else "cuda")
        assert Path(context.params["as_json"]) == tmp_path / f"gpu-{name}.json"


@needs_bash
def test_the_gpu_script_says_what_is_missing() -> None:
    assert script("--fast").returncode == 1
    if not torch.cuda.is_available():
        done = script()
        assert done.returncode == 2 and "no GPU" in done.stderr and "== " not in done.stdout


@needs_bash
@pytest.mark.slow
def test_the_gpu_script_runs_without_a_gpu_where_that_is_asked_for(tmp_path: Path) -> None:
    done = script("--device", "cpu", "--quick", OUT=str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert {path.name for path in tmp_path.iterdir()} == {
        f"gpu-{name}.json" for name in ("forward", "decode", "scale", "handoff")
    }
