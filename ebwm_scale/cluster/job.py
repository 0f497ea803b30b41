"""The process in a job's batch step: one attempt at a run, and what its end means.

    python -m ebwm_scale.cluster.job --config FILE [--set section.key=value ...] [--run-dir DIR]

    begin (attempts.jsonl) -> srun: one task per GPU, each ebwm_scale/train.py --resume
                           -> end (attempts.jsonl)
        finished    the job ends with 0
        again       scontrol requeue: the same job, the same run folder, later and elsewhere
        give up     the job ends with the run's exit code, and the reason stands in attempts.jsonl

slurm/job.sh starts it. Outside Slurm (--cluster local of ebwm_scale.launch) the tasks are plain
processes and `again` is a loop. Exit codes are those of train.py.
"""

from __future__ import annotations

import argparse
import os
import signal
import socket
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from ebwm_scale.cluster.attempts import Attempts, Verdict, meaning, open_attempt, read_attempts
from ebwm_scale.cluster.slurm import (
    Allocation,
    allocation,
    idle_gpus,
    inherited,
    job_state,
    queue,
    requeue,
)
from ebwm_scale.cluster.tasks import LocalTasks, SlurmTasks, last_words, printed, srun_options
from ebwm_scale.config.load import load_config
from ebwm_scale.config.permissions import add_permissions, refuse_unpermitted
from ebwm_scale.core.arguments import ArgumentParser, add_config, add_overrides, command
from ebwm_scale.core.code_version import code_version
from ebwm_scale.core.errors import EXIT_FAILED, EXIT_RUN_AGAIN, UserError
from ebwm_scale.core.plain_text import one_line

ROOT = Path(__file__).resolve().parents[2]


@command
def main(arguments: Sequence[str] | None = None) -> int:
    parser = ArgumentParser(description=__doc__)
    add_config(parser, required=True)
    add_overrides(parser)
    parser.add_argument(
        "--run-dir",
        type=Path,
        default=None,
        metavar="DIR",
        help="default: runs/<name of the configuration file>-<job id>",
    )
    parser.add_argument(
        "--accept-new-rate",
        action="store_true",
        help="as in train.py: go on although the learning rate is now higher than it was to be",
    )
    parser.add_argument(
        "--plan", action="store_true", help="check the configuration and print what would run"
    )
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="train.py --dry-run in one task: parameters, memory and time on this node",
    )
    add_permissions(parser)
    options = parser.parse_args(arguments)
    one_line("--config", options.config)
    # a mistake in it ends the job here, not 64 tasks later
    config = load_config(options.config, options.overrides)
    refuse_unpermitted(config, allow_pipe=options.allow_pipe)
    given = allocation()
    if options.plan:
        return plan(options, given)
    run_dir = _run_dir(options, given.job if given else "local")
    one_line("the run folder", run_dir)
    train = _train_command_of(options, run_dir)
    if options.dry_run:
        # measured in one process, for as many as would run
        size = given.num_tasks if given else 1
        place = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": str(size)}
        os.execve(train[0], [*train[:-1], "--dry-run"], {**os.environ, **place})
    return attempt(train, run_dir, given).finish()


def _run_dir(options: argparse.Namespace, job: str) -> Path:
    return options.run_dir or Path("runs") / f"{Path(options.config).stem}-{job}"


def _train_command_of(options: argparse.Namespace, run_dir: Path) -> list[str]:
    return train_command(
        options.config,
        options.overrides,
        run_dir,
        accept_new_rate=options.accept_new_rate,
        allow_pipe=options.allow_pipe,
    )


def train_command(
    config: str,
    overrides: Sequence[str],
    run_dir: Path,
    *,
    accept_new_rate: bool = False,
    allow_pipe: bool = False,
) -> list[str]:
    return [
        sys.executable,
        "-u",
        str(ROOT / "ebwm_scale" / "train.py"),
        "--config",
        str(config),
        *(["--set", *overrides] if overrides else []),
        "--run-dir",
        str(run_dir),
        *(["--accept-new-rate"] if accept_new_rate else []),
        *(["--allow-pipe"] if allow_pipe else []),
        "--resume",
    ]


class Ended:
    """How an attempt ended, and how the job is to end for it."""

    def __init__(
        self, verdict: Verdict, code: int, given: Allocation | None, *, signalled: bool = False
    ):
        self.verdict = verdict
        self.code = code
        self.given = given
        self.signalled = signalled

    def finish(self) -> int:
        """Requeue if that is the verdict; the exit code of the job."""
        if self.verdict.what == "done":
            return self.code
        say(self.verdict.reason)
        if self.verdict.what == "give up" or self.given is None:
            return self.code or EXIT_FAILED
        refusal = requeue(self.given.job, self.given.restart)
        say("requeued" if refusal is None else f"not requeued: {refusal}")
        return EXIT_RUN_AGAIN


def attempt(
    command: Sequence[str], run_dir: Path, given: Allocation | None, *, num_tasks: int = 1
) -> Ended:
    """Run the tasks once. num_tasks: outside Slurm."""
    job = given.job if given else f"local-{os.getpid()}"
    refuse_if_in_use(run_dir, job)
    attempts, logs = Attempts(run_dir, job), run_dir / "logs"
    try:
        logs.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"{logs} cannot be made ({error.strerror or error}): free some space or mend its "
            "permissions, or name another folder with --run-dir"
        ) from None
    verdict = attempts.begin(
        restart=given.restart if given else 0,
        host=socket.gethostname(),
        nodes=given.num_nodes if given else 1,
        tasks=given.num_tasks if given else num_tasks,
        code=code_version(),
    )
    if verdict.what == "give up":
        return Ended(verdict, EXIT_FAILED, given)
    attempt = f"attempt {attempts.number} at {run_dir}"
    if given:
        say(
            f"{attempt}, job {job}, restart {given.restart}: {given.num_nodes} nodes "
            f"({given.node_list}) with {given.tasks_per_node} tasks each ({given.why_tasks})"
        )
        warn_of(given)
    else:
        say(f"{attempt}: {num_tasks} tasks on this machine")
    tasks = SlurmTasks(given, command, logs) if given else LocalTasks(num_tasks, command, logs)
    say(f"running {printed(tasks.command)}\noutput of rank 0: {logs}/rank_0000.log")
    signals = []

    def pass_on(number: int, frame) -> None:
        signals.append(number)
        attempts.signalled(signal.Signals(number).name)
        tasks.send(number)

    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, pass_on)
    code = tasks.wait()
    left = None
    if given and (state := job_state(job)) is not None:
        left = state.seconds_left
    detail = last_words(logs) if code not in (0, EXIT_RUN_AGAIN) else ""
    verdict = attempts.end(code, seconds_left=left, detail=detail)
    if signals and given is None and verdict.what == "again":
        verdict = Verdict(
            "give up",
            f"{meaning(code)}; this machine's user sent {signal.Signals(signals[0]).name}",
        )
    return Ended(verdict, code, given, signalled=bool(signals))


def attempts_until_the_end(command: Sequence[str], run_dir: Path, *, num_tasks: int) -> Ended:
    """Outside Slurm: again, and again, until the run is finished or gives up."""
    while True:
        ended = attempt(command, run_dir, None, num_tasks=num_tasks)
        if ended.verdict.what != "again":
            return ended
        say(ended.verdict.reason)
        time.sleep(1)


def refuse_if_in_use(run_dir: Path, job: str) -> None:
    """Two jobs in one run folder would write over each other."""
    before = open_attempt(read_attempts(run_dir))
    if before is None or before["job"] == job:
        return
    other, host = before["job"], before.get("host")
    if other.startswith("local-"):
        running = (
            host == socket.gethostname() and Path(f"/proc/{other.removeprefix('local-')}").exists()
        )
    else:
        running = queue().get(other) in ("RUNNING", "COMPLETING", "SUSPENDED", "STOPPED")
    if running:
        raise UserError(
            f"{run_dir} is in use by job {other} on {host}: wait for it, end it, or name another "
            "folder with --run-dir"
        )


def plan(options: argparse.Namespace, given: Allocation | None) -> int:
    run_dir = _run_dir(options, "$SLURM_JOB_ID")
    train = _train_command_of(options, run_dir)
    example = given or Allocation("0", 0, (1,), 1, "", "")
    shape = [] if given else ["# (on the nodes the job gets; here: for one node with one task)"]
    print("\n".join([*shape, printed([*srun_options(example, run_dir / "logs"), *train])]))
    return 0


def warn_of(given: Allocation) -> None:
    """What a user would want to know of this allocation before it has run for a day."""
    foreign = inherited()
    if foreign:
        say(
            "warning: not used, since they describe the job from which this one was submitted: "
            f"{', '.join(sorted(foreign))}"
        )
    warning = idle_gpus(given.tasks_per_node, given.gpus_per_node)
    if warning:
        say(warning)


def say(text: str) -> None:
    print(f"[{time.strftime('%Y-%m-%d %H:%M:%S')}] {text}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
