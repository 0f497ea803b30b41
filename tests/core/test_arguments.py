"""Command lines: a number is a finite number, and a mistake is one line with exit code 2."""

import importlib
import re
import subprocess
import sys
from pathlib import Path

import pytest

from ebwm_scale.core.arguments import ArgumentParser

ROOT = Path(__file__).resolve().parents[2]
FILES = sorted([*(ROOT / "ebwm_scale").rglob("*.py"), *(ROOT / "tools").glob("*.py")])


def test_every_command_line_is_read_by_the_one_parser():
    own = ROOT / "ebwm_scale" / "core/arguments.py"
    other = [
        str(path.relative_to(ROOT))
        for path in FILES
        if path != own and re.search(r"argparse\.ArgumentParser\(", path.read_text())
    ]
    assert other == []


@pytest.mark.parametrize("text", ["nan", "NaN", "inf", "-inf", "Infinity", "1e999", "x", ""])
def test_a_number_that_is_none_is_refused(text, capsys):
    parser = ArgumentParser(prog="program")
    parser.add_argument("--rate", type=float)
    parser.add_subparsers().add_parser("inner").add_argument("--rate", type=float)
    for command in ([f"--rate={text}"], ["inner", f"--rate={text}"]):
        with pytest.raises(SystemExit) as left:
            parser.parse_args(command)
        printed = capsys.readouterr().err
        assert left.value.code == 2 and printed.count("\n") == 1 and "no finite number" in printed


@pytest.mark.parametrize("text", ["1" * 5000, "9" * 23, "1.5", "nan", "x" * 5000, "a\nb"])
def test_a_whole_number_that_is_none_is_refused(text, capsys):
    parser = ArgumentParser(prog="program")
    parser.add_argument("--count", type=int)
    with pytest.raises(SystemExit) as left:
        parser.parse_args([f"--count={text}"])
    printed = capsys.readouterr().err
    assert left.value.code == 2 and printed.count("\n") == 1 and len(printed) < 200


def test_a_path_that_is_empty_is_refused(capsys):
    parser = ArgumentParser(prog="program")
    parser.add_argument("--run-dir", type=Path, default=Path("runs"))
    assert parser.parse_args([]).run_dir == Path("runs")
    assert parser.parse_args(["--run-dir", "."]).run_dir == Path(".")
    with pytest.raises(SystemExit) as left:
        parser.parse_args(["--run-dir", ""])
    assert left.value.code == 2 and "empty: name" in capsys.readouterr().err


COMMANDS = [
    ("ebwm_scale.think", ["--prompt", "a", "run", "--step-size"]),
    ("ebwm_scale.think", ["--prompt", "a", "run", "--temperature"]),
    ("ebwm_scale.plan", ["--config", "quickstart", "--tokens"]),
]


@pytest.mark.parametrize("module, arguments", COMMANDS)
@pytest.mark.parametrize("value", ["nan", "inf"])
def test_commands_refuse_numbers_that_are_not_finite(module, arguments, value, capsys):
    with pytest.raises(SystemExit) as left:
        importlib.import_module(module).main([*arguments, value])
    printed = capsys.readouterr().err
    assert left.value.code == 2 and printed.count("\n") == 1 and value in printed


def test_tools_refuse_them_too(tmp_path):
    command = ["tools/make_text_shards.py", "text", "--validation-fraction", "nan"]
    done = subprocess.run(
        [sys.executable, *command], capture_output=True, text=True, cwd=ROOT, timeout=120
    )
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "nan" in done.stderr
