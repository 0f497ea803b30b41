"""The quick starts of reasoning and of a world lead from nothing to a page that compares two runs;
the first one again to the same when it is repeated. Here with a few mazes or episodes and two
training steps.
"""

import json
import os
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tools"))

import quickstart  # noqa: E402

from ebwm_scale.config.load import load_config  # noqa: E402

pytestmark = pytest.mark.multiprocess


@pytest.fixture
def small(tmp_path, monkeypatch):
    """A checkout whose configurations are those of the quick start, for two training steps."""
    root = tmp_path / "checkout"
    (root / "configs").mkdir(parents=True)
    (root / "ebwm_scale").symlink_to(ROOT / "ebwm_scale")
    for name in (
        "quickstart_reasoning",
        "quickstart_reasoning_baseline",
        "quickstart_world",
        "quickstart_world_baseline",
    ):
        text = (ROOT / "configs" / f"{name}.yaml").read_text(encoding="utf-8")
        short = re.sub(r"max_steps: \d+", "max_steps: 2", text)
        short = re.sub(r"warmup_steps: \d+", "warmup_steps: 1", short)
        assert short.count("_steps: 2\n") > text.count("_steps: 2\n")
        (root / "configs" / f"{name}.yaml").write_text(short, encoding="utf-8")
    monkeypatch.setattr(quickstart, "ROOT", root)
    monkeypatch.setattr(quickstart, "NUM_MAZES", 64)
    monkeypatch.setattr(quickstart, "HELD_OUT_MAZES", 12)
    monkeypatch.setattr(quickstart, "MOST_STEPS", (1, 2))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(monkeypatch, *arguments, modality="reasoning"):
    monkeypatch.setattr(sys, "argv", ["quickstart.py", modality, *arguments])
    return quickstart.main()


@pytest.mark.soak
def test_the_reasoning_quick_start_ends_with_a_page_and_goes_on_where_it_was(
    small, monkeypatch, capfd
):
    assert run(monkeypatch) == 0
    folder = small / "runs" / "quickstart_reasoning"
    said = capfd.readouterr().out
    assert said.splitlines()[-1].endswith("Open the report: runs/quickstart_reasoning/solving.html")
    results = [json.loads((f / "solving.json").read_text()) for f in (folder, folder / "larger")]
    assert [result["grid"] for result in results] == [[6, 6], [10, 10]]
    assert [result["num_samples"] for result in results] == [12, 6]
    for result in results:
        assert result["trained_steps"] == 3
        assert [point["num_steps"] for point in result["steps"]] == [1, 2, 3]
        assert result["against"]["kind"] == "baseline" and result["examples"]["mark"] == "+"
    page = (folder / "solving.html").read_text(encoding="utf-8")
    assert "Does thinking pay?" in page and "Transformer++" in page and 'class="state"' in page
    (folder / "solving.html").unlink()
    assert run(monkeypatch) == 0  # trained already
    assert (folder / "solving.html").exists()
    assert json.loads((folder / "solving.json").read_text())["steps"] == results[0]["steps"]


@pytest.mark.soak
def test_the_quick_start_of_a_world_ends_with_a_page_of_what_is_imagined_and_planned(
    small, monkeypatch, capfd
):
    pytest.importorskip("gymnasium", reason="the package gymnasium is not installed")
    pytest.importorskip("PIL.Image", reason="the package pillow is not installed")
    for name, value in {
        "NUM_EPISODES": 24,
        "EPISODE_STEPS": 14,
        "HORIZONS": (1, 2),
        "HELD_OUT_WINDOWS": 6,
        "FILMS": 1,
        "PLANNED_EPISODES": 2,
        "PLANNED_STEPS": 2,
        "FUTURES": 4,
    }.items():
        assert hasattr(quickstart, name)
        monkeypatch.setattr(quickstart, name, value)
    assert run(monkeypatch, modality="world") == 0
    folder = small / "runs" / "quickstart_world"
    said = capfd.readouterr().out
    assert said.splitlines()[-1].endswith("Open the report: runs/quickstart_world/imagination.html")
    imagined = json.loads((folder / "imagination.json").read_text())
    assert imagined["horizons"] == [1, 2] and imagined["kind"] == "energy"
    assert {"shuffled_actions", "against", "persistence"} <= imagined["errors"][0].keys()
    planned = json.loads((folder / "plan_actions.json").read_text())
    assert list(planned["actors"]) == ["model", "against", "random", "persistence"]
    assert planned["actors"]["model"]["success"] is not None
    page = (folder / "imagination.html").read_text(encoding="utf-8")
    for words in ("Does it imagine its world?", "TwoRooms-v0", "better than random actions"):
        assert words in page
    assert page.count("data:image/png;base64,") == 1


@pytest.mark.parametrize("modality", ["reasoning", "world"])
def test_what_is_made_is_not_read(monkeypatch, tmp_path, capsys, modality):
    assert run(monkeypatch, "--input", str(tmp_path), modality=modality) == 2
    assert "are made, not read; leave it out" in capsys.readouterr().err


def test_the_two_models_of_the_quick_start_of_a_world_are_of_one_size_and_data_order():
    energy, baseline = load_config("quickstart_world"), load_config("quickstart_world_baseline")
    for key in ("num_layers", "width", "num_heads", "feed_forward_width"):
        assert getattr(energy.model, key) == getattr(baseline.model, key)
    assert energy.train == baseline.train and energy.schedule == baseline.schedule
    assert energy.optimizer == baseline.optimizer and energy.data == baseline.data
    # A fair beginning: both start from the last frame.
    assert energy.state.initial == "most_recent" and baseline.model.predicts == "change"


def test_the_two_models_of_the_reasoning_quick_start_are_of_one_size_and_data_order():
    energy = load_config("quickstart_reasoning")
    baseline = load_config("quickstart_reasoning_baseline")
    for key in ("num_layers", "width", "num_heads", "feed_forward_width"):
        assert getattr(energy.model, key) == getattr(baseline.model, key)
    assert energy.train == baseline.train and energy.schedule == baseline.schedule
    assert energy.optimizer == baseline.optimizer and energy.data == baseline.data
    batches = quickstart.NUM_MAZES // energy.train.global_batch_size
    assert energy.train.max_steps == batches  # each maze is seen once
    assert energy.refinement.num_steps in quickstart.MOST_STEPS


ENDLESS = "import os, time; print(os.getpid(), flush=True); time.sleep(600)"
DEAF = f"import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); {ENDLESS}"


def test_a_training_beside_another_that_fails_is_named_and_one_that_runs_ends_with_it(
    monkeypatch, tmp_path, capsys
):
    programs = {
        "sound": [sys.executable, "-c", "print('trained')"],
        "failed": [sys.executable, "-c", "print('a reason'); raise SystemExit(3)"],
        "failed_late": [sys.executable, "-c", "import time; time.sleep(2); raise SystemExit(3)"],
        "endless": [sys.executable, "-c", ENDLESS],
        "deaf": [sys.executable, "-c", DEAF],
    }
    monkeypatch.setattr(quickstart, "PATIENCE", 3.0)
    monkeypatch.setattr(quickstart, "training", lambda run, manifest: programs[run.name])

    def code_of(baseline: str, energy: str) -> int:
        runs = (tmp_path / "runs" / baseline, tmp_path / "runs" / energy)
        return quickstart.train_at_once(*runs, tmp_path / "manifest.json", lambda stage: None)

    assert code_of("sound", "sound") == 0
    assert (tmp_path / "runs" / "sound.log").read_text() == "trained\n"
    assert code_of("failed", "sound") == 3
    assert "a reason" in capsys.readouterr().err
    for name in ("endless", "deaf"):
        assert code_of(name, "failed_late") == 3
        process = int((tmp_path / "runs" / f"{name}.log").read_text())
        with pytest.raises(ProcessLookupError):
            os.kill(process, 0)
