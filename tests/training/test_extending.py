"""A finished run is extended from its last step before the decay, as if it had been longer."""

import json

import pytest
from training_runs import same

WSD = {
    "schedule": {"kind": "wsd", "warmup_steps": 1, "cooldown_steps": 2},
    "train.max_steps": 5,
    "checkpoint.every_steps": 4,
    "checkpoint.keep_last": 1,
    "checkpoint.keep_best": False,
    "evaluation.every_steps": 2,
}
LONGER = {**WSD, "train.max_steps": 8}


def overrides(values: dict) -> dict:
    """As Runs takes them: section.key."""
    return {
        **{key: value for key, value in values.items() if key != "schedule"},
        **{f"schedule.{key}": value for key, value in values["schedule"].items()},
    }


@pytest.fixture(scope="module")
def finished(runs):
    runs.run("short", overrides=overrides(WSD))
    return runs.folder / "short"


def test_an_extended_run_is_bit_for_bit_the_longer_one_and_leaves_the_first_as_it_is(
    runs, finished
):
    names = sorted(path.name for path in (finished / "checkpoints").glob("step_*"))
    assert names == ["step_000003", "step_000005"]  # the last stable one is kept beside the last
    before = {p: p.read_bytes() for p in finished.rglob("*") if p.is_file()}
    runs.run("whole", overrides=overrides(LONGER))
    output = runs.run("longer", overrides=overrides(LONGER), flags=("--extend", str(finished)))
    assert f"resumed at step 3 of 8 from {finished}/checkpoints/step_000003" in output
    assert runs.rows("longer") == runs.rows("whole")
    assert same(runs.state("longer"), runs.state("whole")) == []
    assert before == {p: p.read_bytes() for p in finished.rglob("*") if p.is_file()}
    events = (runs.folder / "longer" / "events.jsonl").read_text().splitlines()
    assert [e["step"] for e in map(json.loads, events) if e["event"] == "extend"] == [3]


@pytest.mark.soak
def test_an_extended_run_is_resumed_as_any_other_with_the_same_command(runs, finished):
    flags = ("--extend", str(finished), "--resume")
    stopped = {**overrides(LONGER), "train.max_minutes": 1e-6}
    runs.run("parts", overrides=stopped, flags=flags, expect=75)
    output = runs.run("parts", overrides=overrides(LONGER), flags=flags)
    assert "resumed at step 4 of 8" in output
    assert runs.rows("parts")[-1]["step"] == 8 and runs.rows("parts")[0]["step"] == 1


def test_a_resume_into_the_decay_is_refused_and_names_the_step_before_it(runs, finished):
    before = {p: p.read_bytes() for p in finished.rglob("*") if p.is_file()}
    output = runs.run("short", overrides=overrides(LONGER), flags=("--resume",), expect=2)
    assert "learning rate at step 5: it was to be 1.000e-03, is now 1.000e-02" in output
    assert "go on from step 3, before the decay, with --extend" in output
    assert before == {p: p.read_bytes() for p in finished.rglob("*") if p.is_file()}


@pytest.mark.parametrize(
    "changes, part",
    [
        ({"optimizer.learning_rate": 0.02}, "the learning rate jumps at each of its checkpoints"),
        pytest.param(
            {"train.max_steps": 3},
            "none of its checkpoints is good and from before",
            marks=pytest.mark.soak,
        ),
        pytest.param({"train.seed": 7}, "belongs to another configuration", marks=pytest.mark.soak),
    ],
)
def test_what_cannot_be_extended_is_refused_before_anything_is_written(
    runs, finished, changes, part
):
    values = {**overrides(LONGER), **changes}
    flags = ("--extend", str(finished))
    assert part in runs.run("refused", overrides=values, flags=flags, expect=2)
    assert not (runs.folder / "refused").exists()


def test_a_run_does_not_extend_itself_and_a_folder_without_checkpoints_is_named(runs, finished):
    values = overrides(LONGER)
    flags = ("--extend", str(finished), "--resume")
    assert "is the run folder itself" in runs.run("short", overrides=values, flags=flags, expect=2)
    flags = ("--extend", str(runs.folder / "nothing"))
    output = runs.run("refused", overrides=values, flags=flags, expect=2)
    assert "there is no checkpoint in it" in output and not (runs.folder / "refused").exists()
