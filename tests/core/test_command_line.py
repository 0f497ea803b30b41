"""The command `ebwm`: it lists, dispatches and starts at once; a user's error is one line; rank 0
speaks; long work shows how far it is.
"""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from ebwm_scale import __main__ as dispatcher
from ebwm_scale.core import console
from ebwm_scale.core.arguments import ArgumentParser, command, program_name
from ebwm_scale.core.errors import ConfigError, UserError
from ebwm_scale.core.progress import counted, no_progress, tracked

ROOT = Path(__file__).resolve().parents[2]
HEAVY = ("torch", "deepspeed", "numpy", "pydantic", "yaml", "rich")


def python(*arguments: str, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, *arguments],
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=120,
        env={**os.environ, **environment},
    )


@pytest.mark.parametrize("arguments", [[], ["--help"], ["-h"]])
def test_ebwm_alone_lists_every_command_with_a_line(arguments, capsys):
    assert dispatcher.main(arguments) == 0
    lines = capsys.readouterr().out.splitlines()
    for name, (_, text) in dispatcher.COMMANDS.items():
        line = next(line for line in lines if line.split()[:1] == [name])
        assert line.endswith(text) and len(line) <= 80, line


def test_every_command_has_a_main():
    for name, (module, _) in dispatcher.COMMANDS.items():
        file = ROOT / f"{module.replace('.', '/')}.py"
        source = file.read_text()
        assert "@command\ndef main(arguments: Sequence[str] | None = None) -> int:" in source, name


@pytest.mark.parametrize(
    "typed, near", [("thnik", "think"), ("evalute", "evaluate"), ("Doctor", "doctor")]
)
def test_a_typo_names_the_nearest_command(typed, near, capsys):
    assert dispatcher.main([typed, "--option"]) == 2
    printed = capsys.readouterr()
    assert printed.out == "" and printed.err.count("\n") == 1
    assert f"{typed} is no command; is it {near}?" in printed.err


@pytest.mark.parametrize("typed", ["x" * 5000, "a\nb", "", "--verbose"])
def test_what_is_like_no_command_is_one_short_line(typed, capsys):
    assert dispatcher.main([typed]) == 2
    printed = capsys.readouterr().err
    assert printed.count("\n") == 1 and len(printed) < 300 and "known: train, " in printed


def test_help_and_errors_answer_at_once_and_import_nothing_heavy():
    script = (
        "import sys; from ebwm_scale.__main__ import main; main(['--help']); main(['thnik']); "
        f"print([name for name in {HEAVY} if name in sys.modules])"
    )
    done = python("-c", script)
    assert done.stdout.splitlines()[-1] == "[]"
    seconds = []
    for _ in range(5):
        start = time.perf_counter()
        assert python("-m", "ebwm_scale", "--help").returncode == 0
        seconds.append(time.perf_counter() - start)
    bare = []
    for _ in range(5):
        start = time.perf_counter()
        python("-c", "pass")
        bare.append(time.perf_counter() - start)
    assert min(seconds) - min(bare) < 0.3


def test_a_command_that_needs_no_torch_loads_none():
    script = (
        "import sys; from ebwm_scale.__main__ import main; main(['config', 'list']); "
        "main(['launch', '--status', 'nowhere']); print('torch' in sys.modules)"
    )
    assert python("-c", script).stdout.splitlines()[-1] == "False"


@pytest.mark.parametrize(
    "arguments, shown",
    [
        (["-m", "ebwm_scale", "report", "--help"], "usage: python -m ebwm_scale report "),
        (["-m", "ebwm_scale.report", "--help"], "usage: python -m ebwm_scale.report "),
        (["ebwm_scale/train.py", "--help"], "usage: train.py "),
        (["tools/verify_shards.py", "--help"], "usage: verify_shards.py "),
    ],
)
def test_help_shows_what_was_typed(arguments, shown):
    done = python(*arguments)
    assert done.returncode == 0 and done.stdout.startswith(shown)
    if "report" in shown:
        assert f"    {shown.removeprefix('usage: ').strip()} RUN [--baseline RUN]" in done.stdout
        assert "ebwm report" not in done.stdout


def test_through_the_dispatcher_a_command_is_ebwm_command(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["/somewhere/bin/ebwm"])
    with pytest.raises(SystemExit) as left:
        dispatcher.main(["report", "--help"])
    printed = capsys.readouterr().out
    assert left.value.code == 0 and "usage: ebwm report " in printed
    assert "    ebwm report RUN [--baseline RUN]" in printed
    with pytest.raises(SystemExit) as left:
        dispatcher.main(["report", "--nonsense"])
    assert left.value.code == 2 and capsys.readouterr().err.startswith("ebwm report: ")
    assert not program_name().startswith("ebwm report")  # only while it ran


def test_exit_codes_pass_through(monkeypatch, capsys):
    assert dispatcher.main(["report", "/nowhere/at/all"]) == 2
    assert "no such run folder" in capsys.readouterr().err
    from ebwm_scale import report

    monkeypatch.setattr(report, "main", lambda arguments: len(arguments) + 70)
    assert dispatcher.main(["report", "a", "b", "c", "d", "e"]) == 75


def test_a_package_that_is_not_installed_is_named(monkeypatch, capsys):
    def missing(name):
        raise ModuleNotFoundError("No module named 'lm_eval'", name="lm_eval")

    monkeypatch.setattr(dispatcher.importlib, "import_module", missing)
    assert dispatcher.main(["harness", "run"]) == 2
    printed = capsys.readouterr().err
    assert printed.count("\n") == 1 and "pip install 'ebwm_scale[harness]'" in printed
    with pytest.raises(ModuleNotFoundError):  # a defect of ours keeps its traceback
        dispatcher.main(["train"])


def test_the_console_script_is_the_dispatcher():
    assert '"ebwm = ebwm_scale.__main__:main"' in (ROOT / "setup.py").read_text()


def test_version_names_the_release(capsys):
    from ebwm_scale import __version__

    for typed in ("version", "--version"):
        assert dispatcher.main([typed]) == 0
        assert capsys.readouterr().out.startswith(f"ebwm_scale {__version__}")


def test_the_schema_of_configurations_is_json_with_every_key(capsys):
    from ebwm_scale.config.schema import Config

    assert dispatcher.main(["config", "schema"]) == 0
    schema = json.loads(capsys.readouterr().out)
    assert list(schema["properties"]) == list(Config.model_fields)
    keys = {key for part in schema["$defs"].values() for key in part.get("properties", {})}
    for section in Config.model_fields.values():
        assert set(section.annotation.model_fields) <= keys


def test_a_configuration_is_shown_in_full_and_reads_back_the_same(tmp_path, capsys):
    from ebwm_scale.config.load import load_config

    overrides = ["train.max_steps=7", "train.seed=3"]
    assert dispatcher.main(["config", "show", "quickstart", "--set", *overrides]) == 0
    file = tmp_path / "shown.yaml"
    file.write_text(capsys.readouterr().out)
    assert load_config(file) == load_config("quickstart", overrides)
    assert dispatcher.main(["config", "show", "quickstart", "--set", "train.seeds=3"]) == 2
    printed = capsys.readouterr()
    assert printed.out == "" and "train.seeds" in printed.err


def test_a_user_error_is_its_text_on_stderr_and_its_exit_code(capsys):
    class Own(UserError):
        exit_code = 9

    @command
    def main(error: Exception | None) -> int:
        """Of a test."""
        if error is not None:
            raise error
        return 4

    assert (main(None), main.__doc__) == (4, "Of a test.")
    assert main(ConfigError("first line\nsecond line")) == 2
    assert capsys.readouterr() == ("", "first line\nsecond line\n")
    assert main(Own("own")) == 9
    with pytest.raises(ValueError):
        main(ValueError("a defect of ours"))


def test_no_command_or_tool_handles_user_errors_by_itself():
    files = [*(ROOT / "ebwm_scale").rglob("*.py"), *(ROOT / "tools").rglob("*.py")]
    own = [path.name for path in files if "return error.exit_code" in path.read_text()]
    assert own == ["arguments.py"]


@pytest.mark.parametrize(
    "rank, every_rank, is_said",
    [({}, False, True), ({"RANK": "0"}, False, True), ({"RANK": "1"}, False, False)]
    + [({"RANK": "1"}, True, True)],
)
def test_rank_0_speaks(rank, every_rank, is_said, monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    for name, value in rank.items():
        monkeypatch.setenv(name, value)
    console.say("a line with 100 % of it", every_rank=every_rank)
    console.say("an error", error=True, every_rank=every_rank)
    expected = ("a line with 100 % of it\n", "an error\n") if is_said else ("", "")
    assert capsys.readouterr() == expected


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full here")
def test_a_full_disk_under_the_console_ends_nothing():
    script = (
        "import sys; from ebwm_scale.core.console import leave_quietly, say; say('line'); "
        "say('more', error=True); leave_quietly(); sys.exit(75)"
    )
    with open("/dev/full", "w") as full:
        done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, stdout=full, stderr=full)
    assert done.returncode == 75


def test_tracked_and_counted_tell_how_far_they_are():
    heard = []
    progress = lambda *what: heard.append(what)
    assert list(tracked("ab", "letters", progress)) == ["a", "b"]
    assert list(tracked(iter("c"), "more", progress)) == ["c"]
    double = counted(lambda x: 2 * x, "numbers", 2, progress)
    assert [double(3), double(4)] == [6, 8]
    assert heard == [
        ("letters", 1, 2),
        ("letters", 2, 2),
        ("more", 1, None),
        ("numbers", 1, 2),
        ("numbers", 2, 2),
    ]
    assert list(tracked([1], "nobody listens", no_progress)) == [1]


def test_progress_off_a_terminal_is_a_line_every_half_minute():
    now, lines = [0.0], []
    progress = console.ProgressLines(lines.append, clock=lambda: now[0])
    for done in range(1, 101):
        now[0] += 1.0
        progress("shards", done, 100)
    assert lines == [
        "shards: 31 of 100 (31%), 30 s",
        "shards: 61 of 100 (61%), 60 s",
        "shards: 91 of 100 (91%), 90 s",
        "shards: 100 of 100 (100%), 99 s",
    ]
    lines.clear()
    for done in range(1, 11):  # work of seconds leaves no line
        now[0] += 1.0
        progress("videos", done, 10)
    assert lines == []


def test_progress_on_a_terminal_is_a_bar_on_stderr_and_stdout_stays_clean():
    pty = pytest.importorskip("pty", reason="there are no pseudo-terminals here")
    script = (
        "from ebwm_scale.core.console import progress_on_console, say\n"
        "with progress_on_console() as progress:\n"
        "    for done in (1, 2, 3):\n"
        "        progress('shards', done, 3)\n"
        "        say(f'result {done}')\n"
    )
    ours, theirs = pty.openpty()
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "100"}
    done = subprocess.run(
        [sys.executable, "-c", script],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=theirs,
        timeout=60,
    )
    os.close(theirs)
    drawn = os.read(ours, 65536).decode()
    os.close(ours)
    assert done.stdout == b"result 1\nresult 2\nresult 3\n"
    assert "shards" in drawn and "3/3" in drawn and "result" not in drawn


def test_other_ranks_show_no_progress(monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    with console.progress_on_console() as progress:
        assert progress is no_progress


def test_the_library_prints_nothing_itself():
    """Lines of the library go through say or a callback; commands and the job script may print."""
    packages = ("checkpoint", "config", "core", "data", "evaluation", "inference", "training")
    found = []
    for package in packages:
        for path in (ROOT / "ebwm_scale" / package).rglob("*.py"):
            lines = path.read_text().splitlines()
            found += [f"{path.name}: {line}" for line in lines if line.strip().startswith("print(")]
    assert found == []


def pins(path: Path) -> dict[str, str]:
    lines = path.read_text().splitlines()
    pairs = [line.split("==") for line in lines if "==" in line and not line.startswith("#")]
    return {name.lower().replace("_", "-"): version for name, version in pairs}


def test_the_lock_agrees_with_the_constraints_and_holds_what_the_tests_need():
    lock, constraints = pins(ROOT / "requirements" / "test.lock"), pins(ROOT / "constraints.txt")
    assert len(lock) > 100
    assert {name: lock[name] for name in constraints if name in lock} == {
        name: version for name, version in constraints.items() if name in lock
    }
    setup = (ROOT / "setup.py").read_text()
    required = setup[setup.index("install_requires") : setup.index("extras_require")]
    for requirement in ("pytest", *[line.split('"')[1] for line in required.splitlines()[1:-2]]):
        assert requirement.split(">")[0].lower() in lock, requirement


def test_the_lock_names_versions_alone():
    for line in (ROOT / "requirements" / "test.lock").read_text().splitlines():
        if not line.startswith("#"):
            assert line.count("==") == 1 and not set(line) & set("+@/ "), line
    assert "ebwm" not in "".join(pins(ROOT / "requirements" / "test.lock"))


def test_descriptions_keep_what_is_not_the_own_command():
    parser = ArgumentParser(prog="python -m ebwm_scale.think", description="ebwm think, ebwm plan")
    assert parser.description == "python -m ebwm_scale.think, ebwm plan"


def test_the_dockerfile_copies_what_there_is_and_runs_the_quick_start():
    lines = (ROOT / "Dockerfile").read_text().replace("\\\n", " ").splitlines()
    copied = [name for line in lines if line.startswith("COPY") for name in line.split()[1:-1]]
    for name in copied:
        assert (ROOT / name).exists(), name
    assert {"setup.py", "constraints.txt", "ebwm_scale", "kernels", "configs"} <= set(copied)
    assert lines[-1].startswith("CMD") and "tools/quickstart.py" in lines[-1]
    assert any(line.startswith("ARG BASE=") for line in lines) and "FROM ${BASE}" in lines
