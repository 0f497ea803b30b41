"""Training on worlds: frames of patches under actions keep every promise of training on clips."""

import json
import signal
import sys
from pathlib import Path

import pytest
from training_runs import Runs, same

sys.path.append(str(Path(__file__).resolve().parents[1] / "data"))

from worlds import write_world

WORLD = {
    "state.kind": "embedding",
    "state.initial": "most_recent",
    "refinement.step_size": 5,
    "refinement.graph": "full",
}


@pytest.fixture(scope="module")
def worlds(tmp_path_factory):
    """{kind: manifest}: 4 + 1 frames of 2 x 2 patches, or of one vector, with what was done."""
    folder = tmp_path_factory.mktemp("worlds")
    return {
        "patches": write_world(folder / "patches", num_clips=40),
        "buttons": write_world(
            folder / "buttons", num_clips=40, patches=False, discrete=True, proprio=False
        ),
    }


@pytest.fixture(scope="module")
def runs(tmp_path_factory, worlds):
    return Runs(tmp_path_factory.mktemp("runs"), worlds["patches"])


def test_a_world_trains_and_resumes_bitwise_after_a_kill(runs):
    """With the replay buffer, whose entries hold their actions."""
    overrides = WORLD | {"refinement.replay": True, "refinement.graph": "detach"}
    output = runs.run("one", overrides=overrides)
    assert "SmoothL1 (persistence" in output and "patches/s" in output
    left = runs.interrupt("killed", signal.SIGKILL, after="step 5/8", overrides=overrides)
    assert left == -signal.SIGKILL
    runs.run("killed", overrides=overrides, flags=("--resume",))
    assert runs.rows("killed") == runs.rows("one")
    assert same(runs.state("killed"), runs.state("one")) == []


@pytest.mark.soak
def test_two_processes_with_accumulation_give_the_losses_of_one(runs):
    runs.run("whole", overrides=WORLD)
    runs.run("cut", overrides=WORLD | {"train.micro_batch_size": 1}, processes=2)
    whole, cut = runs.losses("whole"), runs.losses("cut")
    assert whole.keys() == cut.keys()
    for key, losses in whole.items():
        assert cut[key] == pytest.approx(losses, rel=1e-5)


def test_rows_samples_and_report_hold_frames_of_patches(runs):
    if not (runs.folder / "one").exists():
        test_a_world_trains_and_resumes_bitwise_after_a_kill(runs)
    folder = runs.folder / "one"
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    last = [row for row in rows if row.get("split") == "validation"][-1]
    assert last["initial_loss"] == pytest.approx(last["persistence_loss"], rel=1e-5)
    assert last["num_patches"] == 10 * 4 * 4
    clip = json.loads((folder / "samples.json").read_text())["clips"][0]
    assert len(clip["context"]) == 4 and len(clip["continuation"]) == 3
    assert clip["candidates"][0]["loss"] == pytest.approx(clip["persistence_loss"], rel=1e-5)
    assert "patches per second" in (folder / "report.html").read_text()


@pytest.mark.parametrize("kind", ["energy", "baseline"])
def test_one_vector_per_frame_and_buttons_train(runs, worlds, kind):
    overrides = WORLD | {"data.manifest": str(worlds["buttons"]), "model.kind": kind}
    if kind == "baseline":
        overrides["model.predicts"] = "change"
    runs.run(f"buttons_{kind}", overrides=overrides)
    rows = runs.rows(f"buttons_{kind}")
    first = next(row for row in rows if row["step"] == 1)
    if kind == "baseline":  # it starts as a copy of the last frame
        last = [row for row in rows if row.get("split") == "validation"][-1]
        assert first["loss"] == pytest.approx(last["persistence_loss"], rel=0.5)
    assert rows[-1]["loss"] < first["loss"]


def test_conditions_that_are_not_those_of_the_data_are_refused(runs):
    given = [{"name": "action", "width": 3}]
    output = runs.run("refused", expect=2, overrides=WORLD | {"data.conditions": given})
    assert "data.conditions are action (continuous, width 3), the dataset" in output
    assert "has action (continuous, width 2), proprio (continuous, width 2)" in output
    output = runs.run("time", expect=2, overrides=WORLD | {"model.conditioning": "time_embed"})
    assert "model.conditioning is time_embed with data.group_size 4" in output
