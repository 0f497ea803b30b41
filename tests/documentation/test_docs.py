"""The documentation says what is there: the reference is built from today's docstrings, links lead
somewhere, and commands and their options exist.
"""

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])
WRITTEN = [page for page in PAGES if page.name != "reference.md"]


def test_the_reference_is_what_the_docstrings_say():
    done = subprocess.run(
        [sys.executable, str(ROOT / "tools" / "build_reference.py"), "--check"],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    text = page.read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", text):
        if "://" not in target:
            assert (page.parent / target).exists(), target


@pytest.mark.parametrize("page", WRITTEN, ids=lambda page: page.name)
def test_files_that_are_named_exist(page):
    text = page.read_text(encoding="utf-8")
    for name in set(
        re.findall(
            r"`((?:ebwm_scale|kernels|configs|slurm|tools|tests|docs|results)/[\w./-]*\w\.\w+)`",
            text,
        )
    ):
        assert (ROOT / name).exists(), name


def commands():
    """(page, command) of every indented line that runs something of ours, continuation lines
    joined, comments and prose behind two spaces cut.
    """
    for page in WRITTEN:
        text = page.read_text(encoding="utf-8").replace("\\\n", " ")
        for line in re.findall(
            r"^ {4,}((?:python|deepspeed|torchrun|sbatch|srun|slurm/)[^\n]*)", text, re.M
        ):
            yield page.name, re.split(r"\s{3,}|\s#", line.strip())[0]


def targets(command):
    """(module or script, options) of a command."""
    words = shlex.split(command.replace("[", " ").replace("]", " ").replace("...", " "))
    for i, word in enumerate(words):
        if word == "-m" and words[i + 1].startswith("ebwm_scale"):
            return words[i + 1], words[i + 2 :]
        if word.endswith((".py", ".sh")):
            return word, words[i + 1 :]
    return None, []


COMMANDS = sorted({(page, command) for page, command in commands() if targets(command)[0]})
HELP = {}


def help_of(target):
    if target not in HELP:
        start = ["-m", target] if target.startswith("ebwm_scale.") else [str(ROOT / target)]
        done = subprocess.run(
            [sys.executable, *start, "--help"],
            capture_output=True,
            text=True,
            timeout=120,
            cwd=ROOT,
        )
        assert done.returncode == 0, done.stderr
        HELP[target] = done.stdout
        choice = re.search(r"\{([a-z,-]+)\} \.\.\.", done.stdout)
        for part in choice[1].split(",") if choice else []:
            HELP[target] += subprocess.run(
                [sys.executable, *start, part, "--help"],
                capture_output=True,
                text=True,
                timeout=120,
                cwd=ROOT,
            ).stdout
    return HELP[target]


def test_there_are_commands():
    assert len(COMMANDS) > 40 and {"README.md", "cluster.md", "conversion.md", "thinking.md"} <= {
        page for page, _ in COMMANDS
    }


@pytest.mark.parametrize("target", sorted({targets(command)[0] for _, command in COMMANDS}))
def test_every_command_of_the_documentation_is_there_with_its_options(target):
    for page, command in COMMANDS:
        found, rest = targets(command)
        if found != target:
            continue
        assert target.startswith("ebwm_scale.") or (ROOT / target).exists(), f"{page}: {command}"
        if target.endswith(".sh"):
            continue
        if "--" in rest:
            rest = rest[: rest.index("--")]
        options = {
            word.partition("=")[0]
            for word in rest
            if re.fullmatch(r"--[a-z][a-z0-9-]*(=.*)?", word)
        }
        missing = [
            option
            for option in options
            if not re.search(re.escape(option) + r"(?![\w-])", help_of(target))
        ]
        assert not missing, f"{page}: {command}: {target} --help does not know {missing}"


def test_the_page_on_thinking_quotes_its_result_files():
    text, folder = (ROOT / "docs" / "thinking.md").read_text(encoding="utf-8"), ROOT / "results"

    def quoted(value, digits=3):
        return f"{value['mean']:.{digits}f} [{value['low']:.{digits}f}, {value['high']:.{digits}f}]"

    for name in ("quickstart", "long", "long_noise"):
        result = json.loads((folder / "evaluation" / name / "evaluation.json").read_text())
        for value in (
            result["gain_of_later_steps"],
            result["energy"]["rank_correlation_with_error"],
            result["allocation"]["rank_correlation_of_steps_with_error"],
        ):
            assert quoted(value) in text, (name, value)
        assert (
            ", ".join(
                f"**{point['mean']:.3f}**"
                if point["num_steps"] == result["trained_steps"]
                else f"{point['mean']:.3f}"
                for point in result["steps"]
            )
            in text
        ), name
    for row in json.loads((folder / "uncertainty.json").read_text())["rows"]:
        for value in row["rank_correlation_with_truth"].values():
            assert quoted(value, 2) in text, (row["world"], row["form"], value)
