"""Training on raw text that nobody prepared: a kill costs nothing, processes change no loss."""

import json
import random
import signal

import pytest
from training_runs import same


@pytest.fixture(scope="module")
def raw(tmp_path_factory):
    """Three files with 90 documents of the words of the run's dataset."""
    folder, draw = tmp_path_factory.mktemp("raw"), random.Random(1)
    for number in range(3):
        records = []
        for _ in range(30):
            words = ["".join(draw.choices("abcdefghij", k=draw.randint(2, 6))) for _ in range(30)]
            records.append(json.dumps({"body": " ".join(words)}))
        (folder / f"{number}.jsonl").write_text("\n".join(records))
    return folder


@pytest.fixture(scope="module")
def raw_text(raw):
    return {
        "data.stream": [str(raw)],
        "data.stream_format": "text",
        "data.stream_field": "body",
        "data.stream_lanes": 4,
        "data.stream_buffer": 12,
    }


@pytest.mark.multiprocess
def test_a_killed_run_repeats_no_document_and_loses_none(runs, raw_text):
    output = runs.run("whole", overrides=raw_text)
    assert "raw text, 3 files or parts of files" in output
    killed = runs.interrupt("killed", signal.SIGKILL, after="step 5/8", overrides=raw_text)
    assert killed == -signal.SIGKILL
    with_workers = raw_text | {"data.num_workers": 2}
    runs.run("killed", overrides=with_workers, flags=("--resume",))
    assert runs.rows("killed") == runs.rows("whole")
    assert same(runs.state("killed"), runs.state("whole")) == []


@pytest.mark.multiprocess
@pytest.mark.soak
def test_two_processes_give_the_losses_of_one_and_go_on_where_it_was(runs, raw_text):
    if not (runs.folder / "whole").exists():
        runs.run("whole", overrides=raw_text)
    runs.interrupt("moved", signal.SIGKILL, after="step 5/8", overrides=raw_text)
    runs.run("moved", overrides=raw_text, flags=("--resume",), processes=2)
    one, moved = runs.losses("whole"), runs.losses("moved")
    assert one.keys() == moved.keys()
    for key, losses in one.items():
        assert moved[key] == pytest.approx(losses, rel=1e-5)


@pytest.mark.multiprocess
def test_what_does_not_fit_is_one_line_and_starts_nothing(runs, raw_text, raw, tmp_path):
    output = runs.run("lanes", overrides=raw_text | {"data.stream_lanes": 3}, expect=2)
    assert "data.stream_lanes is 3: must divide train.global_batch_size 4" in output
    output = runs.run("gone", overrides=raw_text | {"data.stream": [f"{raw}/no.txt"]}, expect=2)
    assert "no such file or folder" in output
    assert not (runs.folder / "lanes").exists() and not (runs.folder / "gone").exists()
