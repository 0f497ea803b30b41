"""Is this machine, or this job's nodes, ready to train? Checks what a run needs, says what would
run and what is missing.

    ebwm doctor [--config FILE] [--set section.key=value ...] [--run-dir DIR]
    srun python -m ebwm_scale.doctor ...        in an allocation: every task takes part, and the
                                                collective goes over the real network

One line per check: `ok`, `note` (works, but you may want to know) or `MISSING` (a run of this
configuration would fail or starve). What train.py would refuse is found by its own check
(ebwm_scale/training/preflight.py). Exit code 0 if nothing is missing, 2 if all that is missing is
what train.py refuses a configuration or its data for, 1 otherwise.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ebwm_scale.config.load import load_config
from ebwm_scale.config.permissions import add_permissions, refuse_unpermitted
from ebwm_scale.config.schema import Config
from ebwm_scale.core.arguments import ArgumentParser, add_config, add_overrides, command
from ebwm_scale.core.errors import EXIT_BAD_INPUT, EXIT_FAILED, EXIT_FINISHED
from ebwm_scale.core.processes import number, place_in_step
from ebwm_scale.training.collective import collective

ROOT = Path(__file__).resolve().parents[1]
NEEDED = (
    "torch",
    "deepspeed",
    "numpy",
    "safetensors",
    "sentencepiece",
    "webdataset",
    "PyYAML",
    "matplotlib",
    "jinja2",
    "pydantic",
    "rich",
)
OPTIONAL = {
    "triton": "the Triton kernels of a GPU",
    "flash-attn": "the fastest observed stream of a GPU",
    "wandb": "logging.wandb",
    "tensorboard": "logging.tensorboard",
    "submitit": "ebwm_scale.launch",
    "av": "video shards",
    "pyarrow": "text in .parquet and .arrow",
    "zstandard": "text in .zst",
    "tokenizers": "tokenizer.json",
    "tiktoken": "ranks of tiktoken",
}
COLLECTIVE_S = 120  # for processes that import torch and meet
DISK_MIB = 64
SLOW_MIB_PER_S = 50


@dataclass
class Report:
    """Lines of (verdict, subject, text)."""

    lines: list[tuple[str, str, str]] = field(default_factory=list)
    num_refusals: int = 0  # of the MISSING lines those that are what train.py refuses

    def ok(self, subject: str, text: str) -> None:
        self.lines.append(("ok", subject, text))

    def note(self, subject: str, text: str) -> None:
        self.lines.append(("note", subject, text))

    def missing(self, subject: str, text: str) -> None:
        self.lines.append(("MISSING", subject, text))

    def refused(self, subject: str, text: str) -> None:
        self.missing(subject, text)
        self.num_refusals += 1

    @property
    def exit_code(self) -> int:
        num_missing = sum(verdict == "MISSING" for verdict, _, _ in self.lines)
        if num_missing == 0:
            return EXIT_FINISHED
        return EXIT_BAD_INPUT if num_missing == self.num_refusals else EXIT_FAILED

    def text(self) -> str:
        lines = [f"{verdict:<8}{subject:<12}{text}" for verdict, subject, text in self.lines]
        count = sum(verdict == "MISSING" for verdict, _, _ in self.lines)
        return "\n".join([*lines, f"{count} missing" if count else "nothing is missing"])


@command
def main(arguments: Sequence[str] | None = None) -> int:
    parser = ArgumentParser(description=__doc__)
    add_config(parser, "also check its data, memory on disk and what would run")
    add_overrides(parser)
    parser.add_argument(
        "--run-dir",
        type=Path,
        default=Path("runs"),
        metavar="DIR",
        help="where runs are to be written; default: runs",
    )
    parser.add_argument(
        "--collective", action="store_true", help=argparse.SUPPRESS
    )  # a process of check_collective
    add_permissions(parser)
    options = parser.parse_args(arguments)
    if options.collective:
        print(collective())
        return EXIT_FINISHED
    config = load_config(options.config, options.overrides)
    refuse_unpermitted(config, allow_pipe=options.allow_pipe)
    of_step = place_in_step()  # among other tasks of this srun
    rank = 0 if of_step is None else of_step.rank
    report = Report()
    check_packages(report)
    if not check_devices(report):
        return finish(report, rank)
    if of_step is not None:
        check_collective_of_job(report, rank)
    else:
        check_collective(report)
    if rank == 0:
        check_slurm(report)
        check_disk(report, config if options.config else None, options.run_dir)
        check_tracking(report, config)
        if options.config:
            check_training(report, config, options.run_dir)
    return finish(report, rank)


def finish(report: Report, rank: int) -> int:
    if rank == 0:
        print(report.text())
    elif any(verdict == "MISSING" for verdict, _, _ in report.lines):
        print(f"rank {rank} on {os.uname().nodename}:\n{report.text()}")
    return report.exit_code


def check_packages(report: Report) -> None:
    constraints = ROOT / "constraints.txt"
    tested: dict[str, str] = {}
    if constraints.exists():
        pins = [line for line in constraints.read_text().split() if "==" in line]
        tested = dict(pin.split("==", 1) for pin in pins)
    python = sys.version.split()[0]
    if sys.version_info >= (3, 11):  # noqa: UP036  run from a checkout, where no pip has looked
        report.ok("python", f"{python}, {sys.executable}")
    else:
        report.missing("python", f"{python}: needs 3.11 or newer")
    found, absent, other = [], [], []
    for name in NEEDED:
        version = _version(name)
        if version is None:
            absent.append(name)
            continue
        found.append(f"{name} {version}")
        if name in tested and version.split("+")[0] != tested[name]:
            other.append(f"{name} {version}, tested with {tested[name]}")
    report.ok("packages", ", ".join(found))
    if absent:
        report.missing("packages", f"{', '.join(absent)}: pip install -c constraints.txt -e .")
    if other:
        report.note("packages", "; ".join(other))
    lacking = [
        f"{name} ({purpose})" for name, purpose in OPTIONAL.items() if _version(name) is None
    ]
    if lacking:
        report.note(
            "packages",
            f"not installed, and only needed for what stands beside it: {', '.join(lacking)}",
        )


def check_devices(report: Report) -> bool:
    """False if torch cannot be imported: nothing else can be checked then."""
    try:
        import torch
    except Exception as error:  # noqa: BLE001  a broken installation raises anything
        report.missing("torch", f"cannot be imported: {error}")
        return False
    visible, wanted = torch.cuda.device_count(), os.environ.get("CUDA_VISIBLE_DEVICES")
    if not torch.cuda.is_available():
        hidden = (
            shutil.which("nvidia-smi") is not None
            and subprocess.run(["nvidia-smi", "-L"], capture_output=True).returncode == 0
        )
        if hidden:
            report.missing(
                "GPU",
                f"nvidia-smi finds one, torch {torch.__version__} does not: it is a build without "
                "CUDA, needs another driver, or "
                f"CUDA_VISIBLE_DEVICES={wanted} hides it",
            )
        else:
            report.note(
                "GPU",
                f"none; runs on {os.cpu_count()} CPU cores with gloo"
                + (
                    f" (CUDA_VISIBLE_DEVICES={wanted} names none that torch can use)"
                    if wanted
                    else ""
                ),
            )
        return True
    for index in range(visible):
        properties = torch.cuda.get_device_properties(index)
        free, total = torch.cuda.mem_get_info(index)
        line = (
            f"{index}: {properties.name}, {free / 2**30:.0f} of {total / 2**30:.0f} GiB free, "
            f"compute capability {properties.major}.{properties.minor}, "
            f"bf16 {'yes' if torch.cuda.is_bf16_supported() else 'no'}"
        )
        if free > 0.9 * total:
            report.ok("GPU", line)
        else:
            report.note("GPU", f"{line}; another process uses it")
    return True


def check_collective(report: Report) -> None:
    """One process per GPU (two without), each sums over all: what a run's first step does."""
    import torch

    count = torch.cuda.device_count()
    if not torch.cuda.is_available():
        count = max(2, count)
    from ebwm_scale.cluster.tasks import LocalTasks, last_words

    with tempfile.TemporaryDirectory() as folder:
        tasks = LocalTasks(
            count, [sys.executable, "-m", "ebwm_scale.doctor", "--collective"], Path(folder)
        )
        code = tasks.wait(timeout=COLLECTIVE_S)
        said = last_words(Path(folder))
        answer = Path(folder, "rank_0000.log").read_text(errors="replace").strip().splitlines()
    if code == 0:
        report.ok("collective", answer[-1])
    else:
        report.missing(
            "collective",
            f"{count} processes on this machine could not sum a tensor within {COLLECTIVE_S} s: "
            f"{said}",
        )


def check_collective_of_job(report: Report, rank: int) -> None:
    """The same with the tasks of this srun."""
    from ebwm_scale.cluster.slurm import PORTS, hostnames

    os.environ.setdefault("MASTER_ADDR", hostnames(os.environ["SLURM_JOB_NODELIST"])[0])
    os.environ.setdefault(
        "MASTER_PORT",
        str(
            PORTS[(int(os.environ["SLURM_JOB_ID"]) + int(os.environ["SLURM_STEP_ID"])) % len(PORTS)]
        ),
    )
    try:
        done = subprocess.run(
            [sys.executable, "-m", "ebwm_scale.doctor", "--collective"],
            capture_output=True,
            text=True,
            timeout=COLLECTIVE_S,
        )
    except subprocess.TimeoutExpired:
        report.missing(
            "collective",
            f"no answer within {COLLECTIVE_S} s: a firewall between the nodes, or the wrong "
            "interface; see NCCL_SOCKET_IFNAME "
            "(CPUs: GLOO_SOCKET_IFNAME) in slurm/site.sh, and repeat with NCCL_DEBUG=INFO",
        )
        return
    if done.returncode:
        report.missing(
            "collective",
            f"{(done.stderr.strip().splitlines() or ['no word'])[-1]}; see slurm/site.sh for the "
            "network's variables",
        )
    else:
        report.ok("collective", done.stdout.strip().splitlines()[-1])


def check_slurm(report: Report) -> None:
    if shutil.which("sbatch") is None:
        report.note(
            "Slurm",
            "no sbatch here: python, torchrun, deepspeed and ebwm_scale.launch --cluster local "
            "work without",
        )
        return
    try:
        done = subprocess.run(
            ["sinfo", "--noheader", "--format=%R %a %l %D nodes %G"],
            capture_output=True,
            text=True,
            timeout=30,
        )
    except subprocess.TimeoutExpired:
        report.missing("Slurm", "sinfo does not answer within 30 s")
        return
    if done.returncode:
        report.note(
            "Slurm",
            "sbatch is installed, but there is no cluster to be reached: "
            f"{(done.stderr.strip().splitlines() or ['no word'])[-1]}",
        )
    else:
        report.ok("Slurm", "; ".join(sorted(set(done.stdout.strip().splitlines()))))


def check_disk(report: Report, config: Config | None, run_dir: Path) -> None:
    """Room and speed where checkpoints go."""
    folder = run_dir.absolute()
    while not folder.is_dir():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    needed = 0
    if config is not None and (config.model.vocabulary_size or config.state.dimension):
        kept = config.checkpoint.keep_last + 2  # the best one, and the one being written
        needed = kept * 12 * _parameters(config)  # weights and two moments in float32
        text = (
            f"{free / 2**30:.0f} GiB free in {folder}; {kept} checkpoints of this model take "
            f"{needed / 2**30:.1f} GiB"
        )
    else:
        text = f"{free / 2**30:.0f} GiB free in {folder}"
    if free > max(2 * needed, 2**30):
        report.ok("disk", text)
    else:
        report.missing("disk", f"{text}: too little; see checkpoint.keep_last and --run-dir")
    try:
        with tempfile.NamedTemporaryFile(dir=folder) as file:
            block, start = os.urandom(2**20), time.perf_counter()
            for _ in range(DISK_MIB):
                file.write(block)
            file.flush()
            os.fsync(file.fileno())
            speed = DISK_MIB / (time.perf_counter() - start)
    except OSError as error:
        report.missing(
            "disk", f"{folder} cannot be written: {error.strerror}; name another --run-dir"
        )
        return
    text = f"writes {speed:.0f} MiB/s with fsync"
    if speed >= SLOW_MIB_PER_S:
        report.ok("disk", text)
    else:
        report.note(
            "disk",
            f"{text}: slow; training goes on while a checkpoint is written, but the "
            "last save before a time limit must fit into --signal's lead",
        )


def check_tracking(report: Report, config: Config) -> None:
    if config.logging.wandb != "online":
        return
    netrc = Path(os.environ.get("NETRC", Path.home() / ".netrc"))
    known = bool(os.environ.get("WANDB_API_KEY")) or (
        netrc.exists() and "wandb" in netrc.read_text(errors="replace")
    )
    if _version("wandb") is None:
        return  # train.py's own check says so
    if not known:
        report.missing(
            "tracking",
            "logging.wandb is online, and there is no key: export WANDB_API_KEY, or run `wandb "
            "login` once",
        )
    else:
        report.ok("tracking", "W&B has a key")


def check_training(report: Report, config: Config, run_dir: Path) -> None:
    """What train.py itself checks before it starts: its problems, and what would run."""
    import torch

    from ebwm_scale.training.preflight import check_run

    processes = number(os.environ, "SLURM_NTASKS", torch.cuda.device_count() or 1)
    check = check_run(
        config,
        world_size=processes,
        run_dir=run_dir,
        resume=(run_dir / "metrics.jsonl").exists(),
        report=lambda text: report.note("data", text),
    )
    for name, split in check.splits.items():
        report.ok("data", f"{name}: {split.describe()}, {config.data.verify} verified")
    if check.attention:
        streams = [f"the {stream} stream: {path}" for stream, path in check.attention.items()]
        report.ok("kernels", f"attention of {', '.join(streams)}")
    if check.micro_batch:
        report.ok(
            "batch",
            f"{config.train.global_batch_size} samples over {processes} processes: "
            f"{check.micro_batch} per forward pass, {check.accumulation} accumulated; "
            f"ZeRO stage {config.deepspeed.zero_stage}, {config.train.precision}",
        )
    for subject, text in check.problems:
        report.refused(subject, text)
    for subject, text in check.warnings:
        report.note(subject, text)


def _parameters(config: Config) -> int:
    """How many the model has, without making them."""
    import torch

    from ebwm_scale.world_model import WorldModel

    with torch.device("meta"):
        return sum(p.numel() for p in WorldModel(config).parameters())


def _version(name: str) -> str | None:
    try:
        return re.sub(r"\s", "", importlib.metadata.version(name))
    except importlib.metadata.PackageNotFoundError:
        return None


if __name__ == "__main__":
    sys.exit(main())
