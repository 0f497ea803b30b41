"""A trace from inside a run: the steps that were asked for, and a timeline of memory."""

import gzip
import json

import pytest
import torch

from ebwm_scale.core.world import World
from ebwm_scale.training.profiling import StepProfile, memory_timeline

KIB = 1024


def steps(profile, first, last):
    """Each step allocates one tensor of a size that is its own; returns them."""
    kept = []
    for step in range(first, last + 1):
        profile.before(step)
        kept.append(torch.ones(step * KIB // 4))
        profile.after(step)
    return kept


@pytest.fixture
def told():
    return []


@pytest.fixture
def start(tmp_path, told):
    return lambda wanted: StepProfile(
        wanted, tmp_path, World(0, 1, 0, torch.device("cpu")), told.append, told.append
    )


def test_the_steps_that_were_asked_for_are_traced_with_their_memory(start, tmp_path, told):
    kept = steps(start((3, 2)), 1, 6)
    name = "steps_000003-000004_rank_0"
    with gzip.open(tmp_path / "profile" / f"{name}.trace.json.gz") as file:
        trace = json.load(file)
    ones = [event for event in trace["traceEvents"] if event.get("name") == "aten::ones"]
    assert [event["args"]["Input Dims"][0] for event in ones] == [[], []]
    timeline = json.loads((tmp_path / "profile" / f"{name}.memory.json").read_text())
    assert timeline["unit"] == "bytes" and timeline["peak"] == (3 + 4) * KIB
    assert [point[1] for point in timeline["points"]] == [3 * KIB, 7 * KIB]
    assert told == [f"traced steps 3 to 4: {tmp_path / 'profile' / name}.*"]
    del kept


def test_a_run_that_stops_within_the_steps_writes_what_it_has(start, tmp_path, told):
    profile = start((3, 10))
    steps(profile, 1, 5)
    assert not (tmp_path / "profile").exists()
    profile.close()
    profile.close()
    assert len(told) == 1
    assert sorted(file.name for file in (tmp_path / "profile").iterdir()) == [
        "steps_000003-000005_rank_0.memory.json",
        "steps_000003-000005_rank_0.trace.json.gz",
    ]


@pytest.mark.parametrize("wanted, first", [(None, 1), ((3, 2), 4), ((30, 2), 1)])
def test_without_the_first_of_the_steps_nothing_is_traced(start, tmp_path, told, wanted, first):
    profile = start(wanted)
    steps(profile, first, 6)
    profile.close()
    assert told == [] and list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_written_costs_the_trace_alone(start, tmp_path, told):
    (tmp_path / "profile").write_text("a file")
    steps(start((1, 1)), 1, 3)
    assert len(told) == 1 and told[0].startswith("the trace could not be written")


def test_what_is_freed_leaves_the_timeline():
    def event(ts, size, device=0):
        arguments = {"Bytes": size, "Device Type": device}
        return {"name": "[memory]", "ts": ts, "args": arguments}

    trace = {"traceEvents": [event(3000, -8), {"name": "aten::mm"}, event(1000, 8), event(1, 9, 1)]}
    assert memory_timeline(trace) == {"unit": "bytes", "points": [[0, 8], [2, 0]], "peak": 8}
    assert memory_timeline({"traceEvents": []})["peak"] == 0
