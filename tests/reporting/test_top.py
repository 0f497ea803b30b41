"""`ebwm top` and `ebwm report --watch`: a run as it goes on, read and never written to."""

import io
import json
import os
import threading
import time
from types import SimpleNamespace

import pytest
import yaml
from run_folders import training_row, validation_row

from ebwm_scale import report, top
from ebwm_scale.core.disk import replace_text
from ebwm_scale.core.faults import Faults
from ebwm_scale.core.ownership import Ownership
from ebwm_scale.reporting.following import GrowingRows, LiveRun
from ebwm_scale.reporting.live_view import duration, facts, line, sparkline


def append(path, *rows):
    with path.open("a") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)


@pytest.fixture
def run(tmp_path):
    """A run of 10 steps at step 4, with a checkpoint of step 3 and one skipped step."""
    folder = tmp_path / "run"
    (folder / "checkpoints" / "step_000003").mkdir(parents=True)
    (folder / "checkpoints" / "step_000001").mkdir()
    (folder / "checkpoints" / "best").write_text("step_000001\n")
    (folder / "config.yaml").write_text(yaml.safe_dump({"train": {"max_steps": 10}}))
    rows = [training_row(step, [5.0 - step / 2, 4.0 - step / 2], eta_s=600.0) for step in (1, 2)]
    rows.append(validation_row(2, [3.5], sets={"code": {"loss": 2.25, "perplexity": 9.5}}))
    rows += [training_row(step, [5.0 - step / 2, 4.0 - step / 2], eta_s=187.0) for step in (3, 4)]
    append(folder / "metrics.jsonl", *rows)
    append(
        folder / "events.jsonl",
        {"event": "start"},
        {"event": "skipped", "step": 2},
        {"event": "warning", "message": "the disk\nis full"},
        {"event": "save", "step": 3},
    )
    return folder


@pytest.fixture
def owned(run):
    """The same, while this process trains there."""
    ownership = Ownership(run, Faults(None, 0))
    ownership.take()
    yield run
    ownership.release(unsaved=False)


def content(folder):
    return {
        path: (path.stat().st_mtime_ns, path.read_bytes() if path.is_file() else b"")
        for path in sorted(folder.rglob("*"))
        if path.name != "owner"
    }


def test_a_look_says_where_a_run_stands_and_writes_nothing(owned, capsys):
    before = content(owned)
    assert top.main([str(owned), "--once"]) == 0
    printed = capsys.readouterr().out
    for words in (
        f"running: {os.uname().nodename} {os.getpid()}",
        "4 of 10 (40.0%), 3:07 left",
        "loss            2.5000  █▆▃▁",
        "rate            4.000e-03",
        "5,000 tokens/s, 0.4 s a step, 1.50 GiB at most",
        "losses 3.0000 -> 2.0000 (33.3% lower), energies -0 -> -0.1, alpha 30",
        "validation      3.5000 at step 2",
        "sets/code       loss 2.25, perplexity 9.5",
        "last checkpoint step 3, 0:0",
        "best: step 1",
        "skipped steps   1",
        r"1, the last: the disk\nis full",
    ):
        assert words in printed, (words, printed)
    assert content(owned) == before


@pytest.mark.parametrize(
    "event, words",
    [
        ({"event": "finish"}, "finished"),
        ({"event": "signal", "reason": "SIGTERM"}, "stopped (SIGTERM); --resume goes on"),
        ({"event": "not_finite"}, "gradients were not finite"),
        ({"event": "save"}, "no process trains here"),
    ],
)
def test_the_end_of_a_run_is_named(run, event, words):
    append(run / "events.jsonl", event)
    live = LiveRun(run)
    live.look()
    assert words in live.state() and live.is_over


def test_a_killed_process_is_told_from_one_that_lives(owned):
    live = LiveRun(owned)
    assert not live.is_over
    owner = owned / "owner"
    record = json.loads(owner.read_text())
    # replaced, as an owner does: its heartbeat ends a process that finds half a file
    replace_text(owner, json.dumps(record | {"started": "1"}))
    assert live.state().startswith("gone without a word") and live.is_over
    replace_text(owner, json.dumps(record | {"machine": "another"}))
    assert live.state().startswith("running")
    long_ago = time.time() - 100
    os.utime(owner, (long_ago, long_ago))
    assert live.state().startswith("not heard of for 100 s")
    replace_text(owner, json.dumps(record))


def test_what_is_written_meanwhile_is_read_once_and_a_cut_file_again(tmp_path):
    path = tmp_path / "metrics.jsonl"
    rows = GrowingRows(path)
    assert list(rows.new()) == []
    append(path, {"step": 1}, {"step": 2})
    with path.open("a") as file:
        file.write('{"step": 3')
    assert list(rows.new()) == [{"step": 1}, {"step": 2}]
    with path.open("a") as file:
        file.write("}\n\xff\n")
    assert list(rows.new()) == [{"step": 3}]
    path.write_text('{"step": 1}\n')
    assert list(rows.new()) == [{"step": 1}]


def test_elsewhere_than_on_a_terminal_it_prints_a_line_for_each_new_step(owned, capsys):
    run = LiveRun(owned)
    run.look()

    def go_on():
        time.sleep(0.2)
        append(owned / "metrics.jsonl", training_row(5, [2.0]))
        time.sleep(0.4)
        append(owned / "events.jsonl", {"event": "finish"})
        (owned / "owner").unlink()

    thread = threading.Thread(target=go_on)
    thread.start()
    top.print_until_over(run, 0.05)
    thread.join()
    printed = capsys.readouterr().out.splitlines()
    assert len(printed) == 3 and printed[-1] == "finished"
    assert printed[0].startswith("step 4 of 10") and printed[1].startswith("step 5 of 10")


def test_on_a_terminal_texts_of_a_run_are_no_markup(owned):
    from rich.console import Console

    append(owned / "events.jsonl", {"event": "warning", "message": "[bold]\x1b[31m[/nothing]"})
    run = LiveRun(owned)
    run.look()
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(top._screen(run))
    shown = console.export_text()
    assert r"[bold]\x1b[31m[/nothing]" in shown and "4 of 10" in shown


def test_a_folder_without_rows_is_shown_and_one_that_is_none_refused(tmp_path, capsys):
    run = LiveRun(tmp_path)
    run.look()
    assert ("step", "none is logged yet") in facts(run)
    assert line(run).startswith("no step is logged yet")
    assert top.main([str(tmp_path / "nowhere")]) == 2
    assert top.main([str(tmp_path), "--every", "0"]) == 2
    printed = capsys.readouterr().err.splitlines()
    assert len(printed) == 2 and "no such run folder" in printed[0] and "above 0" in printed[1]


def test_figures_for_people():
    assert sparkline([1.0, float("nan"), 3.0, 2.0]) == "▁█▅" and sparkline([1.0]) == ""
    assert sparkline([2.0, 2.0]) == "▁▁"
    assert [duration(s) for s in (7, 3661, 400_000)] == ["0:07", "1:01:01", "4 days"]


def test_a_watched_report_follows_the_run_to_its_end(owned, monkeypatch, capsys):
    """Written anew when there are new rows, and at the end without loading itself again."""
    written = []

    def write(folder, *, baseline_dir=None, reload_s=None):
        written.append((LiveRun(folder).folder, reload_s))
        return folder / "report.html"

    looks = []

    def sleep(seconds):
        looks.append(seconds)
        if len(looks) == 2:
            append(owned / "metrics.jsonl", training_row(5, [2.0]))
        if len(looks) == 4:
            (owned / "owner").unlink()

    monkeypatch.setattr(report, "write_report", write)
    # the page's own clock alone: the owner's heartbeat sleeps in a thread of this process
    monkeypatch.setattr(report, "time", SimpleNamespace(sleep=sleep))
    assert report.main([str(owned), "--watch", "--every", "7"]) == 0
    assert [reload_s for _, reload_s in written] == [7, 7, None] and looks == [7, 7, 7, 7]
    assert "step 5" in capsys.readouterr().out


def test_a_watched_page_loads_itself_again_and_names_every_evaluation(run, without_plots):
    page = report.write_report(run, reload_s=7).read_text()
    assert '<meta http-equiv="refresh" content="7">' in page
    assert "sets/code" in page and "loss 2.25, perplexity 9.5" in page
    assert "http-equiv" not in report.write_report(run).read_text()
