"""Runs whose samples are cut over processes (parallel.sequence): what one process trains, and bit
for bit after a kill.
"""

import pytest
from training_runs import same

COMMON = {"model.num_heads": 4, "train.micro_batch_size": 2}
SHARED = {**COMMON, "parallel.sequence": 2}


def difference(runs, name: str, other: str) -> float:
    """The largest of any logged loss, validation included, relative."""
    found, expected = runs.losses(name), runs.losses(other)
    assert found.keys() == expected.keys()
    worst = 0.0
    for key, losses in expected.items():
        for loss, of_other in zip(found[key], losses, strict=True):
            worst = max(worst, abs(loss - of_other) / abs(of_other))
    return worst


def validated(runs, name: str) -> list[int]:
    """Tokens that each validation counted."""
    return [row["num_tokens"] for row in runs.rows(name) if row.get("split") == "validation"]


def test_two_processes_that_share_each_sample_train_what_one_does(runs):
    """Two micro-batches a step, documents masked, an anchored stream; validation too."""
    short = {"train.max_steps": 4}
    runs.run("whole", overrides={**COMMON, **short})
    output = runs.run("shared", overrides={**SHARED, **short}, processes=2)
    assert "2 processes share each sample of 16 positions: 8 each" in output
    assert difference(runs, "shared", "whole") < 1e-5
    assert validated(runs, "shared") == validated(runs, "whole") != []


@pytest.mark.soak
def test_processes_that_make_no_whole_group_are_refused_before_anything_is_written(runs):
    output = runs.run("alone", overrides=SHARED, expect=2)
    assert "parallel.sequence is 2 with 1 process: so many share each sample" in output
    assert "Traceback" not in output and not (runs.folder / "alone").exists()


@pytest.mark.soak
@pytest.mark.parametrize("stage, recompute", [(0, "none"), (2, "none"), (3, "block")])
def test_a_killed_run_goes_on_bit_for_bit(runs, stage, recompute):
    overrides = {
        **SHARED,
        "deepspeed.zero_stage": stage,
        "refinement.recompute": recompute,
        "refinement.noise": 0.5,
    }
    name = f"killed-{stage}"
    runs.run(f"straight-{stage}", overrides=overrides, processes=2)
    killed = {"EBWM_FAULTS": "kill@step=5"}
    runs.run(name, overrides=overrides, processes=2, variables=killed, expect=-9)
    output = runs.run(name, overrides=overrides, processes=2, flags=("--resume",))
    assert "resumed at step 3 of 8" in output
    assert same(runs.state(name), runs.state(f"straight-{stage}")) == []
    assert runs.rows(name) == runs.rows(f"straight-{stage}")


@pytest.mark.soak
def test_a_run_goes_on_with_another_number_of_processes_per_sample(runs):
    """One process, then two that share each sample, then two and two."""
    common = {"schedule.kind": "constant"}
    runs.run("by_one", overrides={**COMMON, **common})
    runs.run("changing", overrides={**COMMON, **common, "train.max_steps": 3})
    more = {**SHARED, **common, "train.max_steps": 6}
    output = runs.run("changing", overrides=more, processes=2, flags=("--resume",))
    assert "parallel.sequence was 1, is 2" in output
    runs.run("changing", overrides={**SHARED, **common}, processes=4, flags=("--resume",))
    found, expected = runs.losses("changing"), runs.losses("by_one")
    for step in range(1, 9):
        assert found[step, "train"] == pytest.approx(expected[step, "train"], rel=1e-4)
