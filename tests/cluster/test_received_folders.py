"""A run folder that came from elsewhere: its launch.json runs nothing, and says where a run starts
only if the user is there."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from cluster_jobs import ROOT, training_runs

from ebwm_scale import launch
from ebwm_scale.cluster.request import read_request
from ebwm_scale.cluster.submission import fresh_folder, site_file
from ebwm_scale.core.errors import ConfigError

RESOURCES = {
    "cluster": "slurm",
    "nodes": 1,
    "gpus_per_node": 0,
    "tasks_per_node": 1,
    "minutes": 60,
    "parallel": 1,
    "slurm": [],
}


@pytest.fixture
def here(tmp_path, monkeypatch):
    """The user's directory, with an sbatch that keeps each script it is given."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bin").mkdir()
    programs = {
        "sbatch": f'cat "$1" >> {tmp_path}/submitted; echo Submitted batch job 77',
        "srun": "true",
        "squeue": "true",
        "scontrol": "true",
    }
    for name, body in programs.items():
        (tmp_path / "bin" / name).write_text(f"#!/bin/bash\n{body}\n")
        (tmp_path / "bin" / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}/bin:{os.environ['PATH']}")
    monkeypatch.delenv("EBWM_SITE", raising=False)
    for name in [name for name in os.environ if name.startswith(("SLURM_", "SBATCH_"))]:
        monkeypatch.delenv(name)
    return tmp_path


def received(here: Path, **changes) -> Path:
    """A run that was prepared and not submitted: --resubmit takes it up. None: without that key."""
    folder = here / "received"
    folder.mkdir()
    config = json.loads(json.dumps(training_runs.TINY))
    config["data"] = {"manifest": "data/manifest.json"}
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    request = {"cluster": "slurm", "directory": str(here), "overrides": [], "jobs": []}
    resources = {**RESOURCES, **changes.pop("resources", {})}
    content = {**request, "resources": resources, **changes}
    content = {key: value for key, value in content.items() if value is not None}
    (folder / "launch.json").write_text(json.dumps(content))
    return folder


def resubmit(capsys, folder: Path, *arguments: str) -> tuple[int, str]:
    code = launch.main(["--resubmit", str(folder), *arguments])
    said = capsys.readouterr()
    assert len(said.err.strip().splitlines()) <= 1, said.err
    return code, said.err


@pytest.mark.multiprocess
def test_what_says_where_and_when_is_taken_from_it(here, capsys):
    options = ["partition=gpu", "time=30", "nodelist=n[1-2]", "mem=16G", "oversubscribe"]
    folder = received(here, resources={"slurm": options, "nodes": 3})
    assert resubmit(capsys, folder) == (0, "")
    script = (here / "submitted").read_text()
    for line in ("--partition=gpu", "--nodes=3", "--mem=16G", "--oversubscribe", "--time=30"):
        assert f"#SBATCH {line}\n" in script, script
    assert "--exclusive" not in script and json.loads((folder / "launch.json").read_text())["jobs"]


@pytest.mark.parametrize(
    "option",
    [
        "wrap=touch PWNED",
        "export=ALL,BASH_ENV=/received/x.sh",
        "export-file=/received/x",
        "output=/root/.bashrc",
        "error=/root/.bashrc",
        "chdir=/received",
        "input=/etc/passwd",
        "bb=x",
        "bbf=x",
        "container=/received",
        "get-user-env=10L",
        "uid=0",
        "mail-user=a@b.example",
        "propagate",
        "unheard-of",
    ],
)
@pytest.mark.multiprocess
def test_what_can_run_or_write_something_counts_only_when_said_again(here, capsys, option):
    folder = received(here, resources={"slurm": [option, "partition=gpu"]})
    before = (folder / "launch.json").read_bytes()
    code, said = resubmit(capsys, folder)
    assert code == 2 and option[:70] in said and "say it again with --resubmit" in said
    assert not (here / "submitted").exists() and (folder / "launch.json").read_bytes() == before
    code, said = resubmit(capsys, folder, "--slurm", option)
    assert code == 0, said
    name = option.partition("=")[0]
    assert f"#SBATCH --{name}" in (here / "submitted").read_text()


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"resources": {"slurm": ["comment=a\ntouch PWNED"]}}, "holds the control character"),
        ({"resources": {"slurm": ["partition=a\r#SBATCH --uid=0"]}}, "holds the control character"),
        ({"resources": {"slurm": ["-x=1"]}}, "without its dashes"),
        ({"resources": {"slurm": ["a b=1"]}}, "without its dashes"),
        ({"resources": {"slurm": "partition=gpu"}}, "must be a list"),
        ({"resources": {"nodes": "1\n#SBATCH --uid=0"}}, "must be a whole number from 1"),
        ({"resources": {"nodes": True}}, "must be a whole number from 1"),
        ({"resources": {"minutes": 0}}, "must be a whole number from 1"),
        ({"resources": {"parallel": 10**9}}, "must be a whole number from 1"),
        ({"resources": {"setup": ["touch PWNED"]}}, "must be an object of"),
        ({"resources": {"cluster": "local"}}, "must be slurm"),
        ({"cluster": "ssh"}, "must be slurm or local"),
        ({"directory": None}, "directory is None: must be an absolute path"),
        ({"directory": "x/y"}, "must be an absolute path"),
        ({"directory": "/x\ny"}, "holds the control character"),
        ({"jobs": ["../../1"]}, "must be a job's id"),
        ({"jobs": [7]}, "must be a list of texts"),
        ({"overrides": "x"}, "must be a list of texts"),
        ({"rows_before": -1}, "must be a whole number"),
    ],
)
@pytest.mark.multiprocess
def test_what_launch_does_not_write_is_refused_in_one_line(here, capsys, changes, message):
    folder = received(here, **changes)
    for arguments in (["--resubmit", str(folder)], ["--status", str(folder)]):
        assert launch.main(arguments) == 2
        said = capsys.readouterr().err
        assert message in said and len(said.strip().splitlines()) == 1, said
    assert not (here / "submitted").exists()


@pytest.mark.parametrize("content", ["", "[1", "[1]", "null", "[" * 100_000, "\udcff"])
def test_what_is_no_json_is_refused_in_one_line(here, content):
    folder = received(here)
    (folder / "launch.json").write_bytes(content.encode("utf-8", "surrogateescape"))
    with pytest.raises(ConfigError) as refusal:
        read_request(folder)
    assert "launch the run anew" in str(refusal.value) and "\n" not in str(refusal.value)


@pytest.mark.multiprocess
def test_it_starts_elsewhere_only_where_the_user_is(here, capsys, monkeypatch):
    elsewhere = here / "elsewhere"
    elsewhere.mkdir()
    folder = received(here, directory=str(elsewhere))
    code, said = resubmit(capsys, folder)
    assert code == 2 and str(elsewhere) in said and "--here" in said
    assert resubmit(capsys, folder, "--here") == (0, "")
    assert json.loads((folder / "launch.json").read_text())["directory"] == str(here)


@pytest.mark.multiprocess
def test_a_sweep_has_its_runs_beside_its_list(here, capsys):
    (here / "sweep").mkdir()
    for name in ("../received", "/tmp", "..", "", "a/b", "a\nb", 7):
        (here / "sweep" / "sweep.json").write_text(json.dumps({"runs": [name]}))
        assert launch.main(["--resubmit", str(here / "sweep")]) == 2
        said = capsys.readouterr().err
        assert "sweep.json" in said and len(said.strip().splitlines()) == 1, said


@pytest.mark.multiprocess
def test_a_site_file_comes_from_the_user_and_not_from_the_folder(here, capsys, monkeypatch):
    folder = received(here)
    (folder / "site.sh").write_text(f"touch {here}/PWNED\n")
    for named, message in (
        (str(folder / "site.sh"), "a file of the folder that is submitted"),
        ("received/site.sh", "must be an absolute path"),
        ("site.sh", "must be an absolute path"),
        (str(here / "absent.sh"), "there is no such file"),
    ):
        monkeypatch.setenv("EBWM_SITE", named)
        code, said = resubmit(capsys, folder)
        assert code == 2 and message in said, said
    monkeypatch.setenv("EBWM_SITE", "")
    assert site_file(folder) == ROOT / "slurm" / "site.sh"
    assert not (here / "PWNED").exists() and not (here / "submitted").exists()


def test_the_scripts_take_no_site_file_by_a_relative_path(here):
    """`.

    site.sh` without a slash would look in PATH and in whatever directory the shell stands in.
    """
    (here / "site.sh").write_text(f"touch {here}/PWNED\n")
    done = subprocess.run(
        ["bash", str(ROOT / "slurm" / "pretrain_nlp.sh")],
        cwd=here,
        env={**os.environ, "EBWM_SITE": "site.sh"},
        text=True,
        capture_output=True,
    )
    assert done.returncode == 2 and "must be an absolute path" in done.stderr
    assert not (here / "PWNED").exists() and not (here / "submitted").exists()


def test_a_submission_uses_no_pickle_that_lay_there_before(tmp_path):
    """submitit names a job's pickle after its id, which can be guessed; the job loads what is
    there."""
    assert fresh_folder(tmp_path / "new" / "run").name == "submitit"
    planted = tmp_path / "received" / "submitit"
    planted.mkdir(parents=True)
    (planted / "77_submitted.pkl").write_bytes(b"cos\nsystem\n(S'touch PWNED'\ntR.")
    assert [fresh_folder(planted.parent).name for _ in range(2)] == ["submitit-2", "submitit-3"]
    (planted.parent / "submitit-4").symlink_to(planted)
    assert fresh_folder(planted.parent).name == "submitit-5"


def test_a_local_resubmission_works_from_the_users_directory(dataset, tmp_path):
    """Without Slurm, the whole way: prepared, taken up, trained."""
    pytest.importorskip("submitit", reason="the extra `cluster` is not installed")
    resources = {"cluster": "local"}
    folder = received(tmp_path, cluster="local", resources=resources)
    content = yaml.safe_load((folder / "config.yaml").read_text())
    content["data"]["manifest"] = str(dataset)
    content["train"]["max_steps"] = 1
    (folder / "config.yaml").write_text(yaml.safe_dump(content))
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}

    def run(*arguments: str) -> str:
        done = subprocess.run(
            [sys.executable, "-m", "ebwm_scale.launch", *arguments],
            cwd=tmp_path,
            env=environment,
            text=True,
            capture_output=True,
            timeout=60,
        )
        return done.stdout + done.stderr

    assert "submitted" in run("--resubmit", str(folder))
    deadline = 90
    while "1 finished" not in run("--status", str(folder)):
        deadline -= 1
        assert deadline > 0, run("--status", str(folder))
