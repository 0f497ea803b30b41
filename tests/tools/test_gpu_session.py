"""The programs for a GPU, on a machine without one: a part that fails takes nothing along, and a
wrong number does not pass.
"""

import json
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tools" / "gpu"))
sys.path.insert(0, str(ROOT / "tests" / "refinement"))

import graphed_step  # noqa: E402
import session  # noqa: E402
import smoke  # noqa: E402
import smoke_fused  # noqa: E402
from attention_levels import CORRECT, Case, call_of, levels  # noqa: E402
from operation_recorder import Recorders  # noqa: E402

from ebwm_scale.refinement import graphed  # noqa: E402

pytestmark = pytest.mark.unit


def part(name, code, seconds=20, **options):
    return session.Part(name, ((sys.executable, "-c", code),), seconds, **options)


def ended(monkeypatch, tmp_path, known, *arguments):
    """What parts.jsonl says of each part."""
    monkeypatch.setenv("OUT", str(tmp_path / "out"))
    monkeypatch.setattr(session, "parts", lambda out: known)
    monkeypatch.setattr(sys, "argv", ["session.py", *arguments])
    status = session.main()
    lines = (tmp_path / "out" / "parts.jsonl").read_text().splitlines()
    return status, {row["part"]: row["ended"] for row in map(json.loads, lines)}


def test_a_part_that_fails_or_hangs_takes_nothing_along(monkeypatch, tmp_path):
    known = [
        session.Part("environment", (), 20),
        part("first", "print('{\"a\": 1}')", log="first.jsonl"),
        part("breaks", "raise SystemExit(3)"),
        part(
            "hangs", "import time; print('began', flush=True); time.sleep(60)", 2, log="hangs.log"
        ),
        session.Part("absent", (("no-such-program-here",),), 5),
        part("last", "print('here')", log="last.log"),
        part("tests", "print()"),
    ]
    status, found = ended(monkeypatch, tmp_path, known)
    assert status == 1
    assert found == {
        "environment": "done",
        "first": "done",
        "breaks": "failed",
        "hangs": "stopped at its time limit",
        "absent": "failed",
        "last": "done",
    }
    out = tmp_path / "out"
    assert json.loads((out / "first.jsonl").read_text()) == {"a": 1}
    assert (out / "hangs.log").read_text() == "began\n"
    assert (out / "last.log").read_text() == "here\n"
    about = json.loads((out / "environment.json").read_text())
    assert about["versions"]["torch"] is not None and "--" not in about["command"]


def test_after_a_wrong_number_the_sanitizer_looks_and_nothing_is_timed(monkeypatch, tmp_path):
    known = [
        part("smoke", "raise SystemExit(1)", essential=True),
        part("kernels", "print('timed')", log="kernels.log"),
        part("sanitizer", "print('looked')", log="sanitizer.log"),
        part("tests", "print()"),
    ]
    status, found = ended(monkeypatch, tmp_path, known)
    assert status == 1 and found == {"smoke": "failed", "sanitizer": "done"}
    assert not (tmp_path / "out" / "kernels.log").exists()


def test_no_part_begins_after_the_time_of_all(monkeypatch, tmp_path):
    known = [part("first", "print()"), part("tests", "print()")]
    status, found = ended(monkeypatch, tmp_path, known, "--minutes", "0.01")
    assert status == 0 and found == {"first": "not started: no time left"}


def test_every_part_names_a_program_that_is_there():
    for known in session.parts(Path("out")):
        for command in known.commands:
            files = [word for word in command if word.endswith(".py")]
            assert files or "pytest" in command
            for file in files:
                assert (ROOT / file).is_file(), file


SMALL = Case(1, 2, 1, 20, 25, 16, offset=5)


def test_a_backend_that_is_right_passes_the_smoke_test():
    row = smoke.check(SMALL, torch.float32, "cpu", smoke.REFERENCE)
    assert row["right"] and row["error"] < 2e-5, row


@pytest.mark.parametrize("level", ["forward", "gradient", "double_backward", "tangent"])
@pytest.mark.parametrize("damage", ["nan", "wrong", "unsteady"])
def test_a_wrong_unwritten_or_unsteady_number_does_not_pass(level, damage, monkeypatch):
    right = getattr(smoke.REFERENCE, level)
    times = iter(range(100))

    def damaged(*arguments, **options):
        results = right(*arguments, **options)
        first = results if torch.is_tensor(results) else results[0]
        if damage == "nan":
            first[0, 0, -1] = torch.nan
        elif damage == "wrong":
            first[0, 0] *= 1.01
        elif next(times) % 2:
            first += 1e-7 * first.abs().max()
        return results

    backend = type(smoke.REFERENCE)(**(vars(smoke.REFERENCE) | {level: damaged}))
    row = smoke.check(SMALL, torch.float32, "cpu", backend)
    assert not row["right"]
    assert row["not_the_same_twice"] if damage == "unsteady" else row["wrong"]


def test_a_kernel_that_cannot_be_launched_is_a_line():
    backend = type(smoke.REFERENCE)(**(vars(smoke.REFERENCE) | {"forward": None}))
    row = smoke.check(SMALL, torch.float32, "cpu", backend)
    assert not row["right"] and "TypeError" in row["failed"]


def test_the_cases_have_every_kind_of_call():
    assert {case.own for case in CORRECT} == {True, False}
    assert any(case.group > 1 and case.rows % case.group == 0 for case in CORRECT)
    assert any(case.documents for case in CORRECT) and any(not case.causal for case in CORRECT)
    for case in CORRECT:
        small = case._replace(rows=case.group * 2, keys=case.group * 2 + case.offset, d=8)
        named = levels(smoke.REFERENCE, call_of(small, torch.float64, "cpu"))
        assert {"O", "dQ", "gQ", "dO"} <= named.keys()
        assert all(torch.isfinite(tensor).all() for tensor in named.values())


@pytest.mark.parametrize("name", smoke_fused.OPERATIONS)
def test_a_fused_operation_that_is_right_passes_and_one_that_is_wrong_does_not(name, monkeypatch):
    """With plain PyTorch in Triton's place, and with what is half a per cent off."""
    right = smoke_fused.numbers

    def plain(name, backend, given):
        return right(name, "reference", given)

    monkeypatch.setattr(smoke_fused, "numbers", plain)
    row = smoke_fused.check(name, torch.float32, "cpu", 4, 192)
    assert row["right"], row

    def wrong(name, backend, given):
        found = plain(name, backend, given)
        return found if backend == "reference" else [*found[:-1], 1.005 * found[-1]]

    monkeypatch.setattr(smoke_fused, "numbers", wrong)
    row = smoke_fused.check(name, torch.float32, "cpu", 4, 192)
    assert not row["right"] and row["wrong"]


def test_a_graphed_step_is_compared_with_an_eager_one(monkeypatch):
    """Here a recording that is run again eagerly stands for a graph, and one that does nothing for
    a wrong one.
    """
    monkeypatch.setattr(graphed, "DEVICES", ("cpu",))
    small = ["model.num_layers=1", "model.width=16", "model.num_heads=2"]
    small += ["model.vocabulary_size=11", "data.context_length=4"]

    def row_of(capture):
        make = lambda say: graphed.GraphedRefinement(capture, say)
        return graphed_step.compared(small, 2, "cpu", torch.float32, make)

    def runs_once(function):
        function()
        return lambda: None

    row = row_of(runs_once)
    assert row["replays"] == 6 and not row["ok"] and row["difference"] > graphed_step.LIMIT
    row = row_of(Recorders())
    assert row["ok"] and row["difference"] == 0 and row["eager_ms"] > 0 and row["said"] == []
    monkeypatch.setattr(graphed, "DEVICES", ())
    assert not row_of(Recorders())["ok"]
