"""What a GPU is asked when one can be had for a few minutes: do the kernels compute what they
should, then how long everything takes.

    OUT=/tmp/out python tools/gpu/session.py [--minutes 9] [--parts environment smoke ..]
    OUT=/tmp/out python tools/gpu/session.py --parts tests --minutes 5

Needs PyTorch with CUDA, Triton, PyYAML and pydantic; nothing of it has to be installed from here.
Each part is a process with a time limit of its own. Its results are on disk line by line, so that
a later part that fails or is killed takes nothing along; parts.jsonl says how each one ended.
Where the smoke test finds a wrong number, the sanitizer looks at it and nothing is timed: a time
of wrong numbers is worth nothing. A cache of compiled kernels (tools/gpu/prewarm.py) is used where
TRITON_CACHE_DIR names one.

    environment     versions, device, driver, tools that are there          environment.json
    prewarm         all programs compiled, on all cores                     prewarm.log
    smoke           every level against float64                             smoke.jsonl
    fused           the fused pointwise operations against float64          smoke_fused.jsonl
    kernels         time of each kernel at the sizes of training            kernels.jsonl
    steps           training steps, and a trace of one                      steps.jsonl and a trace
    graphs          steps replayed as CUDA graphs beside eager ones         graphed_step.jsonl
    yardsticks      matrix product, copy, PyTorch's attention               yardsticks.jsonl
    sanitizer       memcheck and racecheck of a short smoke test            sanitizer.log
    tiles           candidates for the table of tiles                       tiles.jsonl
    tests           tests/kernels/test_attention_gpu.py                     tests.log
"""

from __future__ import annotations

import os
import platform
import shutil
import signal
import subprocess
import sys
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]

from json_lines import JsonLines

from ebwm_scale.core.arguments import ArgumentParser

HERE = "tools/gpu"
STEP = ("tools/bench_step.py", "--vocabulary", "50277", "--precision", "bf16", "--steps", "5")
# One stage more, and both shapes of a tile: what a review by counting expects to be faster.
TILES = ("64,64,4,3", "128,64,8,3", "64,128,8,3", "128,64,8,2", "64,64,4,4")


class Part(NamedTuple):
    """Commands, one after the other, and seconds for all of them. log: where what they print goes;
    None: what they print is shown, and their results are in files that they write.
    """

    name: str
    commands: tuple[tuple[str, ...], ...]
    seconds: int
    log: str | None = None
    essential: bool = False  # where it fails, the parts behind it do not run


def parts(out: Path) -> list[Part]:
    """In the order in which they are worth most."""
    python = sys.executable

    def tool(name: str, *arguments: str) -> tuple[str, ...]:
        return (python, f"{HERE}/{name}.py", *arguments)

    def step(*arguments: str) -> tuple[str, ...]:
        return (python, *STEP, *arguments)

    smoke = tool("smoke", "--quick")
    fused = (python, "tools/compile_fused.py", "--architecture", "sm_90", "--width", "768", "1024")
    sequences = ("--sequence", "1024", "--batch", "8")
    steps = (
        step("--size", "small", *sequences, "--compare", "baseline"),
        step("--size", "medium", *sequences, "--compare", "baseline"),
        step("--size", "small", "--sequence", "256", "--batch", "32"),
        step("--size", "small", *sequences, "--set", "refinement.tile_rows=8192"),
        step("--size", "medium", *sequences, "--profile", "--trace", str(out / "trace.json.gz")),
        step("--size", "small", *sequences, "--set", "refinement.compile=true"),
    )
    return [
        Part("environment", (), 20),
        Part("prewarm", (tool("prewarm"), fused), 90, "prewarm.log"),
        Part("smoke", (tool("smoke", "--output", f"{out}/smoke.jsonl"),), 90, essential=True),
        Part("fused", (tool("smoke_fused", "--output", f"{out}/smoke_fused.jsonl"),), 60),
        Part("kernels", (tool("kernel_times", "--output", f"{out}/kernels.jsonl"),), 60),
        Part("steps", steps, 180, "steps.jsonl"),
        Part("graphs", (tool("graphed_step", "--output", f"{out}/graphed_step.jsonl"),), 60),
        Part("yardsticks", (tool("yardsticks", "--output", f"{out}/yardsticks.jsonl"),), 45),
        Part("sanitizer", sanitized(smoke), 80, "sanitizer.log"),
        Part(
            "tiles",
            (tool("kernel_times", "--output", f"{out}/tiles.jsonl", "--tiles", *TILES),),
            120,
        ),
        Part(
            "tests",
            (
                (
                    python,
                    "-m",
                    "pytest",
                    "-q",
                    "-x",
                    "-n",
                    "8",
                    "tests/kernels/test_attention_gpu.py",
                ),
            ),
            240,
            "tests.log",
        ),
    ]


def sanitized(command: tuple[str, ...]) -> tuple[tuple[str, ...], ...]:
    return tuple(
        ("compute-sanitizer", "--tool", tool, "--error-exitcode", "1", *command)
        for tool in ("memcheck", "racecheck")
    )


def main() -> int:
    parser = ArgumentParser(description=__doc__)
    out = Path(os.environ.get("OUT", "results/gpu"))
    known = parts(out)
    names = [part.name for part in known]
    parser.add_argument("--minutes", type=float, default=9.0, help="for all parts together")
    parser.add_argument(
        "--parts",
        nargs="+",
        choices=names,
        default=names[:-1],
        help="default: all but the tests",
    )
    options = parser.parse_args()
    out.mkdir(parents=True, exist_ok=True)
    end = time.monotonic() + 60 * options.minutes
    status = 0
    with JsonLines(out / "parts.jsonl") as lines:
        for part in known:
            if part.name not in options.parts:
                continue
            left = end - time.monotonic()
            if left < 5:
                lines.write({"part": part.name, "ended": "not started: no time left"})
                continue
            row = run(part, out, min(left, part.seconds))
            lines.write(row)
            status |= int(row["ended"] != "done")
            if part.essential and row["ended"] != "done":
                lines.write(run(part_named(known, "sanitizer"), out, end - time.monotonic()))
                break
    return status


def part_named(known: list[Part], name: str) -> Part:
    (part,) = (part for part in known if part.name == name)
    return part


def run(part: Part, out: Path, seconds: float) -> dict:
    """How a part ended: done, failed (with the exit codes), or stopped at its time limit."""
    start = time.monotonic()
    if part.name == "environment":
        with JsonLines(out / "environment.json") as lines:
            lines.write(environment())
        return {"part": part.name, "ended": "done"}
    codes: list[int | str] = []
    for command in part.commands:
        left = seconds - (time.monotonic() - start)
        codes.append(run_command(command, out if part.log is None else out / part.log, left))
    ended = "done" if not any(codes) else "failed"
    if "stopped" in codes:
        ended = "stopped at its time limit"
    spent = round(time.monotonic() - start, 1)
    return {"part": part.name, "ended": ended, "exit_codes": codes, "seconds": spent}


def run_command(command: tuple[str, ...], log: Path, seconds: float) -> int | str:
    """Its exit code, or "stopped"; 127 where the program is not there."""
    print("$", *command, flush=True)
    if seconds <= 0:
        return "stopped"
    paths = [str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")]
    surroundings = os.environ | {
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
        "PYTHONUNBUFFERED": "1",
    }
    with log.open("ab") if log.suffix else open(os.devnull, "ab") as file:
        try:
            process = subprocess.Popen(
                command,
                cwd=ROOT,
                env=surroundings,
                stdout=file if log.suffix else None,
                stderr=None if log.suffix == ".jsonl" else subprocess.STDOUT,
                start_new_session=True,
            )
        except FileNotFoundError:
            print(f"{command[0]} is not there", flush=True)
            return 127
        try:
            return process.wait(timeout=seconds)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            return "stopped"


def environment() -> dict:
    """Versions and tools; the device by nvidia-smi, so that nothing is started on it."""
    versions: dict[str, str | None] = {"python": platform.python_version()}
    for package in ("torch", "triton", "pydantic", "PyYAML", "numpy", "flash-attn"):
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = None
    tools = ("nvidia-smi", "compute-sanitizer", "ncu", "gcc", "git")
    return {
        "command": " ".join(["python", f"{HERE}/session.py", *sys.argv[1:]]),
        "versions": versions,
        "tools": {name: shutil.which(name) is not None for name in tools},
        "device": answer("nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"),
        "commit": answer("git", "rev-parse", "HEAD"),
        "cores": os.cpu_count(),
        "cache": os.environ.get("TRITON_CACHE_DIR"),
    }


def answer(*command: str) -> str | None:
    """What a program prints, or None where it is not there or fails."""
    try:
        done = subprocess.run(
            command, cwd=ROOT, capture_output=True, text=True, timeout=15, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


if __name__ == "__main__":
    sys.exit(main())
