"""Configurations come with the package, and are found by name from any folder, in a checkout and
installed.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from ebwm_scale.__main__ import main
from ebwm_scale.config.load import load_config
from ebwm_scale.config.shipped import find_config, shipped_names
from ebwm_scale.core.errors import ConfigError

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize(
    "name, expected",
    [
        ("nlp/anchored.yaml", "nlp/anchored.yaml"),
        ("nlp/anchored", "nlp/anchored.yaml"),
        ("configs/nlp/anchored.yaml", "nlp/anchored.yaml"),
        ("quickstart", "quickstart.yaml"),
        ("quickstart.yaml", "quickstart.yaml"),
        ("algorithm1", "nlp/algorithm1.yaml"),
        ("configs/studies/recipes.yaml", "studies/recipes.yaml"),
    ],
)
def test_a_shipped_configuration_is_found_by_name_from_anywhere(
    name, expected, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "quickstart").mkdir()  # a folder of that name is no configuration
    assert find_config(name) == ROOT / "configs" / expected


def test_a_file_that_is_there_comes_first(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "quickstart.yaml").write_text("train: {seed: 5}")
    assert load_config("quickstart.yaml").train.seed == 5
    assert load_config("quickstart").train.seed == 33


@pytest.mark.parametrize(
    "name, part",
    [
        ("anchored", "several shipped ones have that name: nlp/anchored.yaml, video/anchored.yaml"),
        ("nlp/anchord.yaml", "is it nlp/anchored.yaml"),
        ("x" * 3000, "python -m ebwm_scale configs"),
        ("/nowhere/nlp/anchored.yaml", "cannot be read: No such file"),
        ("../configs/quickstart.yaml", "neither a file here"),
        ("", "neither a file here"),
    ],
)
def test_another_name_is_refused_with_those_that_are_near(name, part, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError) as error:
        load_config(name)
    assert part in str(error.value) and "\n" not in str(error.value)


def test_the_list_names_every_configuration_and_what_it_is(capsys):
    assert main(["configs"]) == 0
    printed = capsys.readouterr().out
    files = [
        path.relative_to(ROOT / "configs").as_posix()
        for path in (ROOT / "configs").rglob("*.yaml")
        if path.parent.name != "studies"
    ]
    assert sorted(files) == shipped_names() and len(files) >= 12
    for name in files:
        line = next(line for line in printed.splitlines() if line.startswith(f"{name} "))
        assert len(line.removeprefix(name).strip()) > 20, line


def test_an_installed_package_brings_them_along(tmp_path):
    """A wheel is built from a copy, unpacked, and used from an empty folder."""
    source = tmp_path / "source"
    for part in ("ebwm_scale", "kernels", "configs"):
        shutil.copytree(ROOT / part, source / part, ignore=shutil.ignore_patterns("__pycache__"))
    for part in ("setup.py", "pyproject.toml"):
        shutil.copy(ROOT / part, source)
    build = "import sys; sys.argv[1:] = ['-q', 'build']; exec(open('setup.py').read())"
    subprocess.run([sys.executable, "-c", build], cwd=source, check=True, timeout=120)
    installed, elsewhere = next((source / "build").glob("lib*")), tmp_path / "elsewhere"
    elsewhere.mkdir()
    environment = {**os.environ, "PYTHONPATH": str(installed)}
    script = (
        "import ebwm_scale, ebwm_scale.config.load as c; print(ebwm_scale.__file__); "
        "print(c.load_config('nlp/anchored.yaml').model.predicted_input)"
    )
    answers = [
        subprocess.run(
            [sys.executable, *command],
            cwd=elsewhere,
            env=environment,
            capture_output=True,
            text=True,
            timeout=120,
        )
        for command in (["-m", "ebwm_scale", "configs"], ["-c", script])
    ]
    assert all(answer.returncode == 0 for answer in answers), answers
    assert "nlp/anchored.yaml" in answers[0].stdout
    assert str(installed / "ebwm_scale" / "configs") in answers[0].stdout
    assert answers[1].stdout.split() == [str(installed / "ebwm_scale" / "__init__.py"), "anchored"]
