"""Raw text as training data: every document once, on any number of processes, from any place on."""

import gzip
import json
import os
import threading
from collections import Counter
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from corpora import CONTEXT_LENGTH, WORDS, read_documents

from ebwm_scale.config.schema import Config
from ebwm_scale.core.errors import CheckpointError, ConfigError, DataError
from ebwm_scale.data.format.manifest import load_manifest
from ebwm_scale.data.prepare.reading.left_out import LeftOut
from ebwm_scale.data.prepare.reading.readers import documents_of
from ebwm_scale.data.prepare.reading.selection import EVERYTHING
from ebwm_scale.data.prepare.splitting import draws_of, threshold_of
from ebwm_scale.data.text_stream import lane as lane_module
from ebwm_scale.data.text_stream.loader import TextStreamLoader, joined_states
from ebwm_scale.data.text_stream.strands import open_text_stream
from ebwm_scale.data.tokenizer import open_tokenizer

BATCH = 8


def texts(number, *, first=0):
    """Different lengths, from less than a block to many."""
    draw = np.random.default_rng(first)
    return [
        f"{first + i}: {' '.join(draw.choice(WORDS, size=int(draw.integers(2, 40))))}"
        for i in range(number)
    ]


@pytest.fixture
def raw(tmp_path):
    """A folder of raw text of several kinds, 130 documents."""
    folder = tmp_path / "raw"
    folder.mkdir()
    for number in range(4):
        records = [json.dumps({"text": text, "n": 1}) for text in texts(20, first=100 * number)]
        (folder / f"{number}.jsonl").write_text("\n".join(records) + "\n")
    packed = "".join(json.dumps({"text": text}) + "\n" for text in texts(25, first=400))
    (folder / "packed.jsonl.gz").write_bytes(gzip.compress(packed.encode()))
    table = pyarrow.table({"text": texts(20, first=500)})
    pyarrow.parquet.write_table(table, folder / "table.parquet", row_group_size=7)
    for number, text in enumerate(texts(5, first=600)):
        (folder / f"prose_{number}.txt").write_text(text)
    return folder


def config_of(manifest, *inputs, lanes=4, window=16, batch=BATCH, **keys):
    config = Config()
    return config.replace(
        data=config.data.replace(
            manifest=str(manifest),
            stream=tuple(map(str, inputs)),
            stream_format="text",
            stream_lanes=lanes,
            stream_buffer=window,
            **keys,
        ),
        train=config.train.replace(global_batch_size=batch, seed=3),
    )


def opened(manifest, *inputs, world_size=1, **keys):
    config = config_of(manifest, *inputs, **keys)
    return open_text_stream(config, load_manifest(manifest), world_size=world_size)


def loader_of(manifest, stream, *, rank=0, world_size=1, workers=0, micro=None, **place):
    return TextStreamLoader(
        stream,
        load_manifest(manifest),
        context_length=CONTEXT_LENGTH,
        global_batch_size=BATCH,
        micro_batch_size=micro or BATCH // world_size,
        rank=rank,
        world_size=world_size,
        num_workers=workers,
        **place,
    )


def steps(manifest, stream, count, *, world_size=1, **options):
    """(the global batches of so many steps, the state behind them) of all ranks."""
    parts, states = [], []
    for rank in range(world_size):
        loader = loader_of(manifest, stream, rank=rank, world_size=world_size, **options)
        num_micro = count * loader.micro_batches_per_step
        rows = np.concatenate([next(loader).sequences.numpy() for _ in range(num_micro)])
        parts.append(rows.reshape(count, -1, CONTEXT_LENGTH + 1))
        states.append(loader.state())
        loader.close()
    return np.concatenate(parts, axis=1), json.loads(json.dumps(joined_states(states)))


def documents_in(blocks, manifest):
    """The texts of the documents that rows of one lane hold from end to end."""
    content = load_manifest(manifest).content
    tokenizer = open_tokenizer(content.tokenizer_path, eos_id=content.eos_id)
    tokens = np.concatenate([blocks[0], *(block[1:] for block in blocks[1:])])
    pieces = np.split(tokens, np.flatnonzero(tokens == content.eos_id) + 1)
    return [tokenizer.decode(piece[:-1].tolist()) for piece in pieces[:-1]]


def of_lanes(batches, lanes=4):
    """Each lane's blocks, in their order."""
    per_lane = batches.shape[1] // lanes
    return [
        batches[:, lane * per_lane : (lane + 1) * per_lane].reshape(-1, CONTEXT_LENGTH + 1)
        for lane in range(lanes)
    ]


def kept(raw, manifest):
    """The texts that are no validation documents, by an independent reading."""
    settings = load_manifest(manifest).values["settings"]
    threshold = threshold_of(settings["validation_fraction"])
    return [
        document.text
        for document in read_documents(raw)
        if draws_of(document.digest, settings["seed"])[0] >= threshold
    ]


@pytest.mark.parametrize("window", [1, 16, 1000])
def test_a_pass_has_every_document_once_and_none_of_validation(dataset, raw, window):
    stream = opened(dataset, raw, window=window)
    batches, _ = steps(dataset, stream, 350)
    found = [documents_in(blocks, dataset) for blocks in of_lanes(batches)]
    expected = kept(raw, dataset)
    assert 20 < len(read_documents(raw)) - len(expected) < 40  # a fifth of 130
    for epoch in range(2):
        of_pass = []
        for lane in range(4):
            size = sum(num_kept(strand, stream) for strand in stream.strands_of(lane, epoch))
            of_pass += found[lane][:size]
            del found[lane][:size]
        assert Counter(of_pass) == Counter(expected)


def num_kept(strand, stream):
    documents = list(documents_of(strand.source, EVERYTHING, LeftOut()))
    mine = documents[strand.first :: strand.every]
    return sum(not stream.is_held_out(document) for document in mine)


@pytest.mark.parametrize("stop", [1, 7, 40])
def test_a_resume_goes_on_with_the_very_next_token(dataset, raw, stop):
    stream = opened(dataset, raw)
    whole, end = steps(dataset, stream, 60)
    before, place = steps(dataset, stream, stop)
    after, end_too = steps(dataset, opened(dataset, raw), 60 - stop, state=place, first_step=stop)
    np.testing.assert_array_equal(np.concatenate([before, after]), whole)
    assert end_too == end


@pytest.mark.parametrize("world_size, workers, micro", [(2, 0, 2), (4, 0, 1), (1, 0, 2)])
def test_processes_and_accumulation_change_no_batch(dataset, raw, world_size, workers, micro):
    one, place = steps(dataset, opened(dataset, raw), 10)
    stream = opened(dataset, raw, world_size=world_size)
    many, place_too = steps(dataset, stream, 10, world_size=world_size, micro=micro)
    np.testing.assert_array_equal(many, one)
    assert place_too == place
    # and from there on another number of processes
    on, _ = steps(dataset, opened(dataset, raw), 3, state=place_too, first_step=10)
    np.testing.assert_array_equal(on, steps(dataset, opened(dataset, raw), 13)[0][10:])


@pytest.mark.multiprocess
def test_workers_change_no_batch_and_no_place(dataset, raw):
    alone = steps(dataset, opened(dataset, raw), 12)
    helped = steps(dataset, opened(dataset, raw), 12, workers=3)
    np.testing.assert_array_equal(alone[0], helped[0])
    assert alone[1] == helped[1]


def test_a_step_given_up_between_micro_batches_is_given_out_again(dataset, raw):
    loader = loader_of(dataset, opened(dataset, raw), micro=2)
    for _ in range(4 + 2):
        next(loader)  # a step, and half of the next
    place = loader.state()
    again, _ = steps(dataset, opened(dataset, raw), 2, state=place, first_step=1)
    np.testing.assert_array_equal(again, steps(dataset, opened(dataset, raw), 3)[0][1:])


def test_the_comparison_notices_a_cursor_that_is_a_token_off(dataset, raw):
    stream = opened(dataset, raw)
    whole, _ = steps(dataset, stream, 8)
    _, place = steps(dataset, stream, 5)
    place["lanes"]["2"]["token"] += 1
    after, _ = steps(dataset, stream, 3, state=place, first_step=5)
    assert not np.array_equal(after, whole[5:])


def test_one_file_serves_many_lanes(dataset, tmp_path):
    path = tmp_path / "one.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts(60)))
    batches, _ = steps(dataset, opened(dataset, path, lanes=8), 60)
    found = {text for blocks in of_lanes(batches, 8) for text in documents_in(blocks, dataset)}
    assert found == set(kept(path, dataset))


def test_an_address_gives_what_the_files_give(dataset, raw):
    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *_):
            pass

    pytest.importorskip("aiohttp", reason="fsspec's http:// needs the package aiohttp")
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(raw)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        address = f"http://127.0.0.1:{server.server_address[1]}"
        names = ["0.jsonl", "packed.jsonl.gz", "table.parquet", "3.jsonl"]
        remote = opened(dataset, *(f"{address}/{name}" for name in names))
        near = opened(dataset, *(raw / name for name in names))
        np.testing.assert_array_equal(steps(dataset, remote, 6)[0], steps(dataset, near, 6)[0])
        assert remote.fingerprint == near.fingerprint
    finally:
        server.shutdown()
        server.server_close()


def damage(raw):
    """A file that ends in the middle of its data."""
    path = raw / "packed.jsonl.gz"
    os.truncate(path, path.stat().st_size // 2)


def test_a_cut_file_costs_its_rest_and_is_said(dataset, raw):
    damage(raw)
    loader = loader_of(dataset, opened(dataset, raw))
    for _ in range(60):
        next(loader)
    (bad,) = {(bad.sample_id, bad.shard, bad.reason) for bad in loader.found}
    assert bad[1].endswith("packed.jsonl.gz") and "truncated" in bad[2]
    assert "its documents from" in bad[2]


def test_a_file_that_is_whole_again_changes_nothing_of_a_resumed_pass(dataset, raw):
    """A network that was away for a moment: the place in the data must not depend on it."""
    content = (raw / "packed.jsonl.gz").read_bytes()
    damage(raw)
    stream = opened(dataset, raw, window=400)
    whole, _ = steps(dataset, stream, 12)
    _, place = steps(dataset, stream, 4)
    (known,) = [lane["ends"] for lane in place["lanes"].values() if lane["ends"]]
    (raw / "packed.jsonl.gz").write_bytes(content)
    after, _ = steps(dataset, stream, 8, state=place, first_step=4)
    np.testing.assert_array_equal(after, whole[4:])
    known.clear()  # without the note, what is whole again moves the rest
    after, _ = steps(dataset, stream, 8, state=place, first_step=4)
    assert not np.array_equal(after, whole[4:])


def test_what_is_skipped_is_said(dataset, raw):
    (raw / "0.jsonl").write_text('{"text": "fine"}\nnot JSON\n{"other": 1}\n')
    (raw / "paper.pdf").write_bytes(b"%PDF")
    stream = opened(dataset, raw)
    loader = loader_of(dataset, stream)
    for _ in range(40):
        next(loader)
    assert any("2 lines skipped, the first is line 2 (not JSON)" in line for line in loader.notes)
    assert ".pdf" in stream.describe() and "8 files or parts" not in stream.describe()


def test_other_files_are_not_gone_on_with(dataset, raw):
    _, place = steps(dataset, opened(dataset, raw), 2)
    with (raw / "0.jsonl").open("a") as file:
        file.write('{"text": "one more"}\n')
    with pytest.raises(CheckpointError, match="place is one in other files"):
        steps(dataset, opened(dataset, raw), 1, state=place)
    with pytest.raises(CheckpointError, match="is damaged"):
        steps(dataset, opened(dataset, raw), 1, state={**place, "lanes": {"0": {}}})


def test_so_few_documents_that_lanes_stay_empty_are_an_error(dataset, tmp_path, monkeypatch):
    monkeypatch.setattr(lane_module, "MAX_EMPTY_STRANDS", 5)
    (tmp_path / "a.txt").write_text("alone")
    with pytest.raises(DataError, match="met no document in 5 files.*lower data.stream_lanes"):
        steps(dataset, opened(dataset, tmp_path / "a.txt", lanes=8), 50)


@pytest.mark.parametrize(
    "keys, world_size, message",
    [
        ({"lanes": 3}, 1, "data.stream_lanes is 3: must divide.*use one of 1, 2, 4, 8"),
        ({"lanes": 4}, 8, "must divide.*multiple of the 8 processes: use one of 8"),
        ({"stream_filters": ("score",)}, 1, "filter"),
    ],
)
def test_settings_that_do_not_fit_are_refused(dataset, raw, keys, world_size, message):
    with pytest.raises((ConfigError, DataError), match=message):
        opened(dataset, raw, world_size=world_size, **keys)


def test_commands_are_refused(dataset):
    with pytest.raises(ConfigError, match="commands give prepared shards only"):
        opened(dataset, "pipe:cat a.jsonl")


def test_no_text_is_one_line(dataset, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="no text found"):
        opened(dataset, tmp_path / "empty")


def test_all_lanes_together_take_what_there_is_and_about_as_much_each(dataset, raw):
    stream = opened(dataset, raw)
    for epoch in range(3):
        lanes = [stream.strands_of(lane, epoch) for lane in range(4)]
        numbers = sorted(strand.number for strands in lanes for strand in strands)
        assert numbers == list(range(len(stream.strands)))
        sizes = [sum(strand.size for strand in strands) for strands in lanes]
        assert max(sizes) - min(sizes) <= max(strand.size for strand in stream.strands)
    assert [s.number for s in stream.strands_of(0, 0)] != [
        s.number for s in stream.strands_of(0, 1)
    ]
