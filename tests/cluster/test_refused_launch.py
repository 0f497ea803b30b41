"""A launch that is refused leaves nothing behind, and what was asked for reaches train.py."""

import json

import pytest

from ebwm_scale.cluster import submission
from ebwm_scale.cluster.request import RESOURCES
from ebwm_scale.launch import main


def files(folder):
    return sorted(path for path in folder.rglob("*"))


@pytest.mark.parametrize(
    "arguments",
    [
        ["--sweep", "train.seed=1,x"],
        ["--sweep", "train.seed=1,2", "--run-dir", "taken"],
        ["--run-dir", "file/run"],
        ["--run-dir", "x" * 300],
        ["--set", "train.max_stepz=1"],
    ],
)
def test_a_refused_launch_leaves_no_folder_behind(arguments, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("")
    taken = tmp_path / "taken" / "seed=2"
    taken.mkdir(parents=True)
    (taken / "launch.json").write_text("{}")
    before = files(tmp_path)
    assert main(["--config", "quickstart", "--cluster", "local", *arguments]) == 2
    assert files(tmp_path) == before
    assert capsys.readouterr().err.count("\n") == 1


def test_a_launch_without_what_submits_leaves_no_folder_behind(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.setattr(submission, "apply_site", lambda folder: None)
    assert main(["--config", "quickstart", "--run-dir", "run"]) == 2
    assert "there is no srun" in capsys.readouterr().err and files(tmp_path) == []


@pytest.mark.parametrize("accept", [True, False, "yes"])
def test_an_accepted_learning_rate_reaches_train_py(accept, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    resources = {"cluster": "local", "slurm": [], **dict.fromkeys(RESOURCES, 1)}
    request = {
        "cluster": "local",
        "directory": str(tmp_path),
        "resources": resources,
        "accept_new_rate": accept,
    }
    (tmp_path / "launch.json").write_text(json.dumps(request))
    command = submission._command(str(tmp_path), allow_pipe=False)
    assert ("--accept-new-rate" in command) == (accept is True) and command[-1] == "--resume"
