"""Trackers hold the rows of metrics.jsonl, whatever they held before."""

import json
import sys
import types

import pytest
import tracked_rows

from ebwm_scale.config.load import config_from_dict
from ebwm_scale.core.errors import ConfigError
from ebwm_scale.training.tracking import check_trackers, wandb_files


def rows(first, last, *, shift=0.0):
    """Training rows, a list and a number that is not finite among them, and an evaluation."""
    for step in range(first, last + 1):
        yield {"step": step, "loss": step + shift, "energy_per_step": [1.0, 2.0], "mfu": None}
        if step % 2 == 0:
            named = {"code": {"loss": step / 8 + shift}}
            yield {"step": step, "split": "validation", "loss": 1.0, "sets": named}


def start(open_run_folder, path, logging, *, resumed_at, last, shift=0.0):
    """One start of a run, from the resume to its end."""
    folder = open_run_folder(path, config_from_dict({"logging": logging}))
    folder.truncate_metrics(resumed_at)
    for row in rows(resumed_at + 1, last, shift=shift):
        folder.metrics(row)
    folder.close()


def test_rows_too_many_are_cut_out_of_what_trackers_hold(tmp_path, open_run_folder):
    """Seven steps, then a fall-back to step 3 and other numbers from there on, as a new rate makes
    them: what was shown of steps 4 to 7 is gone.
    """
    wandb = pytest.importorskip("wandb", reason="the extra `tracking` is not installed")
    pytest.importorskip("tensorboard", reason="the extra `tracking` is not installed")
    run, logging = tmp_path / "run", {"wandb": "offline", "tensorboard": True}
    start(open_run_folder, run, logging, resumed_at=0, last=7)
    wandb.teardown()  # as a process does at its end: what W&B's own process holds is then written
    expected = tracked_rows.of_metrics(run)
    assert tracked_rows.of_wandb(run) == expected
    start(open_run_folder, run, logging, resumed_at=3, last=5, shift=100.0)
    wandb.teardown()
    changed = tracked_rows.of_metrics(run)
    assert changed[:4] == expected[:4] and changed[4] == (4, changed[4][1] | {"train/loss": 104.0})
    assert tracked_rows.of_wandb(run) == changed
    assert tracked_rows.of_tensorboard(run) == tracked_rows.as_float32(changed)


def test_a_tracker_that_is_switched_on_by_a_resume_shows_all_rows(tmp_path, open_run_folder):
    pytest.importorskip("tensorboard", reason="the extra `tracking` is not installed")
    start(open_run_folder, tmp_path, {}, resumed_at=0, last=4)
    start(open_run_folder, tmp_path, {"tensorboard": True}, resumed_at=4, last=6)
    expected = tracked_rows.of_metrics(tmp_path)
    assert len(expected) == 9
    assert tracked_rows.of_tensorboard(tmp_path) == tracked_rows.as_float32(expected)


class Server:
    """What the project asks of a W&B run that is online: it keeps rows and a summary."""

    def __init__(self, monkeypatch, rows_lost=0):
        self.rows, self.summary = [], {}
        self.rows_lost = rows_lost
        wandb = types.SimpleNamespace(init=lambda **_: self)
        monkeypatch.setitem(sys.modules, "wandb", wandb)

    def define_metric(self, *_, **__):
        pass

    def log(self, values):
        self.rows.append(values)
        self.summary |= values

    def finish(self):
        """The last rows of a killed process were never sent."""
        if self.rows_lost:
            del self.rows[-self.rows_lost :]
            self.summary = {name: value for row in self.rows for name, value in row.items()}
            self.rows_lost = 0


@pytest.mark.parametrize("rows_lost, resumed_at", [(0, 3), (0, 7), (6, 5), (2, 6), (10, 3)])
def test_online_no_row_is_sent_twice_and_none_is_missing(
    tmp_path, open_run_folder, monkeypatch, capsys, rows_lost, resumed_at
):
    server = Server(monkeypatch, rows_lost)
    start(open_run_folder, tmp_path, {"wandb": "online"}, resumed_at=0, last=7)
    assert len(server.rows) == 10 - rows_lost
    start(open_run_folder, tmp_path, {"wandb": "online"}, resumed_at=resumed_at, last=9)
    sent = [
        (row["step"], {name: value for name, value in row.items() if "/" in name})
        for row in server.rows
    ]
    assert sent == tracked_rows.of_metrics(tmp_path)
    assert ("the server holds 6 rows beyond step 3" in capsys.readouterr().out) == (
        (rows_lost, resumed_at) == (0, 3)
    )


def test_a_tracker_that_fails_is_one_warning_and_is_filled_in_by_the_next_start(
    tmp_path, open_run_folder, monkeypatch, capsys
):
    server = Server(monkeypatch)
    folder = open_run_folder(tmp_path, config_from_dict({"logging": {"wandb": "online"}}))
    first, *others = rows(1, 4)
    folder.metrics(first)

    def full(values):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(server, "log", full)
    for row in others:
        folder.metrics(row)
    folder.close()
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("warning: W&B failed (OSError: ") and "No space left" in line
    monkeypatch.undo()
    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=lambda **_: server))
    start(open_run_folder, tmp_path, {"wandb": "online"}, resumed_at=4, last=4)
    assert [row["row"] for row in server.rows] == list(range(6))


@pytest.mark.parametrize("package", ["wandb", "tensorboard"])
def test_without_its_package_a_tracker_is_refused_in_one_line(monkeypatch, package):
    import importlib.util

    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == package else found(name)
    )
    setting = {"wandb": "offline", "tensorboard": True}[package]
    with pytest.raises(ConfigError) as error:
        check_trackers(config_from_dict({"logging": {package: setting}}))
    text = str(error.value)
    assert f"logging.{package} is" in text and f"pip install {package}" in text
    assert "\n" not in text


def test_records_of_a_wandb_file_may_cross_blocks_and_end_torn(tmp_path):
    """The format of LevelDB's log: pieces of 32 KiB, short ends of blocks left out."""
    contents = [b"a" * 100, b"b" * 70_000, b"c" * (2**15 - 7 - 3), b"d"]
    data = bytearray(b":W&B\0\0\0")
    starts = []
    for content in contents:
        kind, is_first = None, True
        while kind not in (1, 4):
            left = 2**15 - len(data) % 2**15
            if left < 7:
                data += bytes(left)
                left = 2**15
            if is_first:
                starts.append(len(data))
            piece, content = content[: left - 7], content[left - 7 :]
            kind = {(1, 0): 1, (1, 1): 2, (0, 1): 3, (0, 0): 4}[is_first, bool(content)]
            data += wandb_files.PIECE.pack(0, len(piece), kind) + piece
            is_first = False
    expected = list(zip(starts, [b"a" * 100, b"b" * 70_000, b"c" * (2**15 - 10), b"d"]))
    assert list(wandb_files.records(bytes(data))) == expected
    assert list(wandb_files.records(bytes(data[:-1]))) == expected[:-1]
    assert list(wandb_files.records(bytes(data[: starts[1] + 40_000]))) == expected[:1]


def test_rows_are_what_json_says(tmp_path, open_run_folder):
    """Numbers that are not finite are null in metrics.jsonl, and nowhere else either."""
    pytest.importorskip("tensorboard", reason="the extra `tracking` is not installed")
    folder = open_run_folder(tmp_path, config_from_dict({"logging": {"tensorboard": True}}))
    folder.metrics({"step": 1, "loss": float("nan"), "grad_norm": 2.0})
    folder.close()
    assert json.loads((tmp_path / "metrics.jsonl").read_text())["loss"] is None
    assert tracked_rows.of_tensorboard(tmp_path) == [(1, {"train/grad_norm": 2.0})]
