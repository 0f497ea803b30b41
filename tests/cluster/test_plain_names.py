"""No text of the user's, or of a folder that came from elsewhere, becomes a line of a job script or
of a shell's."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from cluster_jobs import AWKWARD, ROOT

from ebwm_scale import launch
from ebwm_scale.cluster.submission import Resources, executor_for
from ebwm_scale.core.errors import ConfigError
from ebwm_scale.core.plain_text import one_line, printable

CONTROL = ["\n", "\r", "\t", "\0", "\x1b", "\x7f", "\x85", "\u2028", "\u2029", "\udcff"]


@pytest.mark.parametrize("character", CONTROL, ids=ascii)
def test_every_kind_of_control_character_is_refused_in_one_line_and_cut(character):
    with pytest.raises(ConfigError) as refusal:
        one_line("the run folder", f"runs/x{character}{'y' * 500}")
    message = str(refusal.value)
    assert "the run folder is 'runs/x" in message and len(message) < 250
    assert not any(bad in message for bad in CONTROL)


@pytest.mark.parametrize(
    "name", ["runs/größer 2 €", "a 'b' \"c\" $(d) `e` ; f # g", "実行", "100%", "नमस्ते"]
)
def test_names_that_are_one_line_of_text_are_taken(name):
    assert one_line("the run folder", name) == name


def test_on_a_terminal_control_characters_are_spelled_out():
    assert printable("a\x1b[2J\nb é") == "a\\x1b[2J\\nb é"


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A folder to start in, a configuration, and a Slurm that would note being called."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bin").mkdir()
    for name in ("sbatch", "srun", "squeue"):
        program = tmp_path / "bin" / name
        program.write_text(f'#!/bin/bash\n[ {name} = squeue ] || echo "$@" >> {tmp_path}/called\n')
        program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}/bin:{os.environ['PATH']}")
    monkeypatch.delenv("EBWM_SITE", raising=False)
    for name in [name for name in os.environ if name.startswith(("SLURM_", "SBATCH_"))]:
        monkeypatch.delenv(name)
    return tmp_path


def launched(capsys, *arguments: str) -> tuple[int, str]:
    config = str(ROOT / "configs" / "quickstart.yaml")
    code = launch.main(["--config", config, "--nodes", "1", *arguments])
    return code, capsys.readouterr().err


@pytest.mark.parametrize("character", ["\n", "\r", "\x1b", "\u2028"], ids=ascii)
@pytest.mark.parametrize(
    "arguments",
    [
        ("--run-dir", "runs/x{}touch PWNED #"),
        ("--run-dir", "runs/x", "--slurm", "comment=a{}touch PWNED"),
        ("--run-dir", "runs/x", "--slurm", "partition=a{}#SBATCH --uid=0"),
        ("--run-dir", "runs/x", "--slurm", "job-name=a{}touch PWNED"),
        ("--run-dir", "runs/x", "--slurm", "a{}touch PWNED=1"),
        ("--run-dir", "runs/x{}y", "--cluster", "local"),
    ],
    ids=["folder", "value", "partition", "job name", "option", "local folder"],
)
def test_launch_refuses_control_characters_before_it_writes_or_submits(
    here, capsys, arguments, character
):
    code, said = launched(capsys, *(text.format(character) for text in arguments))
    assert code == 2 and len(said.strip().splitlines()) == 1 and "plain text" in said, said
    assert not (here / "runs").exists() and not (here / "called").exists()


@pytest.mark.parametrize("axis", ["a/b", "../up", "a\nb"])
def test_an_axis_of_a_sweep_file_names_folders_of_the_sweep_only(here, capsys, axis):
    content = {axis: {"one": ["train.seed=1"], "two": ["train.seed=2"]}}
    (here / "sweep.yaml").write_text(json.dumps(content))
    code, said = launched(capsys, "--sweep-file", str(here / "sweep.yaml"), "--run-dir", "runs/x")
    assert code == 2 and len(said.strip().splitlines()) == 1, said
    assert not (here / "runs").exists() and not (here / "called").exists()


def test_a_folder_to_start_in_and_a_site_file_are_refused_too(here, monkeypatch):
    resources = Resources("slurm", 1, 0, 1, 60, 1)
    monkeypatch.setenv("EBWM_SITE", "/somewhere\ntouch PWNED")
    with pytest.raises(ConfigError, match="EBWM_SITE is '/somewhere"):
        executor_for(here / "run", resources, logs=here / "logs")
    monkeypatch.delenv("EBWM_SITE")
    awkward = here / "x\ny"
    awkward.mkdir()
    monkeypatch.chdir(awkward)
    with pytest.raises(ConfigError, match="the current directory is"):
        executor_for(here / "run", resources, logs=here / "logs")


def test_what_comes_through_is_no_line_of_its_own_in_the_job_script(here):
    """The one text of the user's in a script is quoted: no line but those that we write."""
    awkward = AWKWARD.replace("\n", " ").replace("/", "")
    resources = Resources("slurm", 1, 0, 1, 60, 1, (f"comment={awkward}",))
    executor = executor_for(here / awkward, resources, logs=here / awkward / "submitit")
    script = executor._make_submission_file_text(executor._submitit_command_str, "test")
    plain = Resources("slurm", 1, 0, 1, 60, 1, ("comment=plain",))
    expected = executor_for(here / "plain", plain, logs=here / "plain" / "submitit")
    lines = expected._make_submission_file_text(expected._submitit_command_str, "test")
    assert len(script.splitlines()) == len(lines.splitlines())
    done = subprocess.run(["bash", "-n"], input=script, text=True, capture_output=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("script", ["pretrain_nlp.sh", "pretrain_video.sh"])
@pytest.mark.parametrize(
    "arguments, refused",
    [
        (["configs/quickstart.yaml", "--run-dir", "runs/x\ntouch PWNED"], True),
        (["configs/quick\nstart.yaml"], True),
        (["--run-dir=runs/x\x1b[2J"], True),
        (["--set", "train.seed=1", "--run-dir", "x\ny"], True),
        (["--", "--job-name=x\n#SBATCH --uid=0"], True),
        (["--", "--partition", "x\ty"], True),
        (["--set", f"logging.run_name={AWKWARD}", "--run-dir", "runs/a b"], False),
        ([f"--set=logging.run_name={AWKWARD}", "--", "--job-name=a b"], False),
    ],
)
def test_the_scripts_refuse_them_in_all_arguments_but_the_values_of_set(
    here, script, arguments, refused
):
    done = subprocess.run(
        ["bash", str(ROOT / "slurm" / script), *arguments],
        cwd=here,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        text=True,
        capture_output=True,
        timeout=60,
    )
    if refused:
        assert done.returncode == 2 and len(done.stderr.strip().splitlines()) == 1, done.stderr
        assert "control character" in done.stderr and not (here / "called").exists()
    else:
        assert done.returncode == 0 and (here / "called").exists(), done.stderr


@pytest.mark.parametrize("module", ["ebwm_scale.train", "ebwm_scale.cluster.job"])
def test_those_that_a_job_starts_refuse_such_a_run_folder_too(dataset, tmp_path, module):
    config = str(ROOT / "configs" / "quickstart.yaml")
    data = ["--set", f"data.manifest={dataset}", "data.context_length=16"]
    done = subprocess.run(
        [sys.executable, "-m", module, "--config", config, *data, "--run-dir", "x\ny"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        text=True,
        capture_output=True,
        timeout=120,
    )
    assert done.returncode == 2 and "the run folder is 'x\\ny'" in done.stderr, done.stderr[-2000:]
    assert len(done.stderr.strip().splitlines()) == 1
    assert not [path for path in Path(tmp_path).iterdir() if "y" in path.name]
