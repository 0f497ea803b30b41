"""The documentation says what is there: links lead somewhere, commands and their options exist,
and the pages build. Figures: test_figures_of_*.py.
"""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from preloaded import PreloadedRun

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), ROOT / "kernels" / "README.md"])


def page_id(page):
    return str(page.relative_to(ROOT))


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_links_lead_somewhere(page):
    text = page.read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", text):
        if "://" not in target:
            assert (page.parent / target).exists(), target


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_files_that_are_named_exist(page):
    text = page.read_text(encoding="utf-8")
    for name in set(
        re.findall(
            r"`((?:ebwm_scale|kernels|configs|slurm|tools|tests|docs|results)/[\w./-]*\w\.\w+)`",
            text,
        )
    ):
        assert (ROOT / name).exists(), name


PACKAGES = sorted(path.parent.name for path in ROOT.glob("ebwm_scale/*/__init__.py"))


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_modules_that_are_named_by_their_package_exist(page):
    text = page.read_text(encoding="utf-8")
    names = re.findall(rf"(?<![\w/.-])((?:{'|'.join(PACKAGES)})/[\w/]+\.(?:py|j2))", text)
    for name in set(names):
        assert (ROOT / "ebwm_scale" / name).exists(), name


def test_every_package_is_in_the_reference():
    shown = set()
    for page in (ROOT / "docs" / "reference").glob("*.md"):
        shown |= set(re.findall(r"^::: ([\w.]+)$", page.read_text(encoding="utf-8"), re.M))
    packages = {f"ebwm_scale.{name}" for name in PACKAGES}
    assert packages and packages <= shown, packages - shown
    assert "ebwm_kernels" in shown
    for name in shown:
        path = (
            ROOT / ("kernels" if name.startswith("ebwm_kernels") else "") / name.replace(".", "/")
        )
        assert path.is_dir() or path.with_suffix(".py").is_file(), name


def test_the_pages_build(tmp_path):
    pytest.importorskip(
        "mkdocstrings", reason="the extra docs is not installed: `make docs` builds"
    )
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")],
        capture_output=True,
        text=True,
        timeout=240,
        cwd=ROOT,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    page = (tmp_path / "site" / "reference" / "refinement.html").read_text(encoding="utf-8")
    assert 'id="ebwm_scale.refinement.loop.refine"' in page
    for built in (tmp_path / "site").rglob("*.html"):
        loaded = re.findall(
            r"<(?:script|img|link)\b[^>]*?(?:src|href)=\"(https?:[^\"]+)", built.read_text("utf-8")
        )
        assert not loaded, (built.name, loaded)


def commands():
    """(page, command) of every indented line that runs something of ours, continuation lines
    joined, comments and prose behind two spaces cut.
    """
    for page in PAGES:
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
        HELP[target] = output_of([*start, "--help"])
        choice = re.search(r"\{([a-z,-]+)\} \.\.\.", HELP[target])
        for part in choice[1].split(",") if choice else []:
            HELP[target] += output_of([*start, part, "--help"])
    return HELP[target]


def output_of(command):
    """What a script or module says that ends well."""
    run = PreloadedRun(command, ROOT, {})
    output, _ = run.communicate(timeout=120)
    assert run.returncode == 0, output
    return output


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
