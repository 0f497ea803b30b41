"""The reasoning quick start leads from nothing to a page that compares two runs, and again to the
same when it is repeated; here with a few mazes and two training steps.
"""

import json
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
    for name in ("quickstart_reasoning", "quickstart_reasoning_baseline"):
        text = (ROOT / "configs" / f"{name}.yaml").read_text(encoding="utf-8")
        short = text.replace("max_steps: 1500", "max_steps: 2")
        short = short.replace("warmup_steps: 100", "warmup_steps: 1")
        assert short != text
        (root / "configs" / f"{name}.yaml").write_text(short, encoding="utf-8")
    monkeypatch.setattr(quickstart, "ROOT", root)
    monkeypatch.setattr(quickstart, "NUM_MAZES", 64)
    monkeypatch.setattr(quickstart, "HELD_OUT_MAZES", 12)
    monkeypatch.setattr(quickstart, "MOST_STEPS", (1, 2))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["quickstart.py", "reasoning", *arguments])
    return quickstart.main()


def test_the_reasoning_quick_start_ends_with_a_page_and_goes_on_where_it_was(
    small, monkeypatch, capfd
):
    assert run(monkeypatch) == 0
    folder = small / "runs" / "quickstart_reasoning"
    said = capfd.readouterr().out
    assert said.splitlines()[-1].endswith("Open the report: runs/quickstart_reasoning/solving.html")
    results = [json.loads((f / "solving.json").read_text()) for f in (folder, folder / "larger")]
    assert [result["grid"] for result in results] == [[6, 6], [8, 8]]
    assert [result["num_samples"] for result in results] == [12, 6]
    for result in results:
        assert result["trained_steps"] == 6
        assert [point["num_steps"] for point in result["steps"]] == list(range(1, 7))
        assert result["against"]["kind"] == "baseline" and result["examples"]["mark"] == "+"
    page = (folder / "solving.html").read_text(encoding="utf-8")
    assert "Does thinking pay?" in page and "Transformer++" in page and 'class="state"' in page
    (folder / "solving.html").unlink()
    assert run(monkeypatch) == 0  # trained already
    assert (folder / "solving.html").exists()
    assert json.loads((folder / "solving.json").read_text())["steps"] == results[0]["steps"]


def test_mazes_are_made_and_not_read(monkeypatch, tmp_path, capsys):
    assert run(monkeypatch, "--input", str(tmp_path)) == 2
    assert "are made, not read; leave it out" in capsys.readouterr().err


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
