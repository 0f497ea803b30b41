"""What the hosted workflows, the container and the hooks name is there, in the versions of
constraints.txt. What GitHub would check of the files' form, actionlint does.
"""

import itertools
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
BASH = ["bash", "--noprofile", "--norc", "-e", "-c"]  # as GitHub runs a step
NOT_PROGRAMS = ("cd", "set", "if", "then", "fi", "test", "export", "echo")


def pins_of(path: Path) -> dict[str, str]:
    return dict(re.findall(r"^([\w.-]+)==(\S+)$", path.read_text(encoding="utf-8"), re.M))


PINS = pins_of(ROOT / "constraints.txt")


def rows_of(job: dict) -> list[dict]:
    """The rows of a job's matrix; one empty row for a job without."""
    matrix = job.get("strategy", {}).get("matrix", {})
    listed = {key: values for key, values in matrix.items() if key not in ("include", "exclude")}
    product = [dict(zip(listed, row)) for row in itertools.product(*listed.values())]
    return [row for row in product if row] + matrix.get("include", []) or [{}]


def filled(text: str, row: dict) -> str:
    """A step's text with the matrix's values in place; anything else in ${{ }} is an error."""
    for key, value in row.items():
        text = text.replace("${{ matrix." + key + " }}", str(value))
    assert "${{" not in text, text
    return text


def applies(step: dict, row: dict) -> bool:
    condition = step.get("if")
    if condition is None:
        return True
    found = re.fullmatch(r"matrix\.(\w+) (!=|==) '([^']*)'", condition)
    assert found, f"a condition that this test does not read: {condition}"
    key, sign, value = found.groups()
    return (str(row[key]) == value) == (sign == "==")


def jobs() -> list[tuple[str, str, dict, list[dict]]]:
    """(workflow and job, Python, the matrix's row, steps that run) of every job with a Python."""
    found = []
    for path in WORKFLOWS:
        for name, job in yaml.safe_load(path.read_text(encoding="utf-8"))["jobs"].items():
            for row in rows_of(job):
                steps = [step for step in job["steps"] if applies(step, row)]
                versions = [
                    filled(step["with"]["python-version"], row)
                    for step in steps
                    if "setup-python" in step.get("uses", "")
                ]
                assert len(versions) == (name != "container")
                found += [(f"{path.stem}/{name}", python, row, steps) for python in versions]
    return found


JOBS = jobs()


def test_there_are_workflows_for_lint_tests_and_soak():
    assert {name for name, *_ in JOBS} == {"lint/lint", "test/test", "soak/soak"}
    assert {python for name, python, *_ in JOBS if name == "test/test"} == {"3.11", "3.12"}


@pytest.mark.parametrize(
    ("python", "row", "steps"),
    [job[1:] for job in JOBS],
    ids=[f"{name}-{python}" for name, python, *_ in JOBS],
)
def test_every_step_of_the_workflows_runs_what_there_is(tmp_path, python, row, steps):
    for name in ("Makefile", "constraints.txt", "setup.py"):
        shutil.copy(ROOT / name, tmp_path)
    for_later_steps = tmp_path / "github_env"
    for_later_steps.touch()
    environment = {**os.environ, "GITHUB_ENV": str(for_later_steps)}
    environment.pop("CONSTRAINTS", None)  # that of a workflow which runs this test
    run = dict(cwd=tmp_path, capture_output=True, text=True)
    scripts = [filled(step["run"], row) for step in steps if "run" in step]
    assert scripts
    for script in scripts:
        environment |= dict(line.split("=", 1) for line in for_later_steps.read_text().splitlines())
        if "apt-get" in script:  # a browser for a runner of GitHub's: no test installs one
            subprocess.run([*BASH[:-1], "-n", *BASH[-1:], script], check=True)
            continue
        if "make " not in script:  # what prepares the folder is quick: it is run
            done = subprocess.run([*BASH, script], env=environment, **run)
            assert done.returncode == 0, f"{script}: {done.stderr}"
        for line in script.replace("\\\n", " ").splitlines():
            program, *words = line.split()
            assert program in NOT_PROGRAMS or shutil.which(program), line
            if program == "make":
                done = subprocess.run(["make", "--dry-run", *words], env=environment, **run)
                assert done.returncode == 0, f"{line}: {done.stderr}"
                installed = re.findall(r'install .*?-c "([^"]+)"', done.stdout)
                assert installed and len(set(installed)) == 1, done.stdout

    pins = pins_of(tmp_path / installed[0])
    assert pins["torch"] == row.get("torch", PINS["torch"])
    other_torch = pins["torch"] != PINS["torch"]  # its Triton is the one that pip takes
    assert pins.keys() == PINS.keys() - ({"triton"} if other_torch else set())
    least = re.search(r'python_requires=">=([\d.]+)"', (ROOT / "setup.py").read_text())[1]
    assert [*map(int, python.split("."))] >= [*map(int, least.split("."))]


def test_the_workflow_of_the_container_builds_and_runs_what_the_dockerfile_says():
    soak = yaml.safe_load((ROOT / ".github" / "workflows" / "soak.yml").read_text("utf-8"))
    steps = soak["jobs"]["container"]["steps"]
    script = "\n".join(step["run"] for step in steps if "run" in step)
    subprocess.run(["bash", "-n", "-c", script], check=True)
    dockerfile = (ROOT / "Dockerfile").read_text(encoding="utf-8")
    arguments = re.findall(r"--build-arg (\w+)=", script)
    assert arguments and all(f"\nARG {name}=" in dockerfile for name in arguments)
    assert re.search(r"--tag (\S+) .*\n(.*\n)*docker run .* \1$", script, re.M)
    # The report lies where the mounted folder and the image's own command put it.
    (mounted,) = re.findall(r'--volume "\$PWD/out:(\S+)"', script)
    assert f'"--runs", "{mounted}/runs"' in dockerfile
    assert "test -s out/runs/quickstart/report.html" in script


def test_the_files_that_workflows_cache_by_are_there():
    for name, _, _, steps in JOBS:
        for step in steps:
            cached = step.get("with", {}).get("cache-dependency-path")
            assert cached is None or (ROOT / cached).is_file(), (name, cached)


def test_continuous_integration_calls_targets_that_there_are():
    script = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    targets = re.findall(r"^make (\w+)$", script, re.M)
    assert targets == ["lint", "test"]
    for target in targets:
        subprocess.run(["make", "--dry-run", target], cwd=ROOT, check=True, capture_output=True)


@pytest.mark.parametrize("hook", ["ruff", "codespell"])
def test_hooks_before_a_commit_are_of_the_versions_of_make_lint(hook):
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8"))
    (rev,) = [repo["rev"] for repo in hooks["repos"] if hook in repo["repo"]]
    assert rev == f"v{PINS[hook]}"


def test_a_package_has_one_version_and_is_asked_for_once():
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    names = [line.partition("==")[0].lower().replace("_", "-") for line in lines if "==" in line]
    assert len(names) > 40 and len(names) == len(set(names))
    setup = (ROOT / "setup.py").read_text(encoding="utf-8")
    for extra, listed in re.findall(r'"(\w+)": \[(.*?[\w"])\s*,?\s*\](?=,\n)', setup, re.S):
        asked = re.findall(r'"([\w.-]+)(?:\[[\w,-]+\])?>=', listed)
        assert len(asked) == len(set(asked)), (extra, asked)


def test_the_lock_holds_the_versions_of_the_constraints():
    lock = pins_of(ROOT / "requirements" / "test.lock")
    locked = {name.lower().replace("_", "-"): version for name, version in lock.items()}
    assert {"torch", "deepspeed", "pytest", "transformers"} <= locked.keys()
    for name, version in PINS.items():
        assert locked.get(name.lower().replace("_", "-"), version) == version, name
