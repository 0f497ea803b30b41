"""Run folders that are damaged, hostile or huge: the page says so, runs nothing of them, and stays
small.
"""

import json
import math
import re
import subprocess
import sys

import pytest
import yaml
from run_folders import (
    LEARNED,
    Reader,
    answer_of,
    check,
    continuation,
    page_of,
    run_folder,
    set_config,
    training_row,
    validation_row,
)

from ebwm_scale.config.schema import Config
from ebwm_scale.core.rows import MAX_LINE, Rows


def test_missing_optional_files_are_named(tmp_path, without_plots):
    page = page_of(run_folder(tmp_path, complete=False))
    for name in (
        "config.yaml is missing",
        "events.jsonl is missing",
        "samples.json is missing",
        "summary.json is missing",
    ):
        assert name in page, name
    assert answer_of(page) == "Yes" and check(page, "planned end")[0] == "unknown"


def test_damaged_optional_files_are_named_and_do_no_harm(tmp_path, without_plots):
    run_folder(tmp_path)
    (tmp_path / "config.yaml").write_text("model: [unclosed")
    (tmp_path / "samples.json").write_text('{"continuations": [{"prompt": nul')
    (tmp_path / "summary.json").write_text("[1, 2]")
    (tmp_path / "events.jsonl").write_bytes(b'{"event": "start"}\n\xff\xfe torn')
    page = page_of(tmp_path)
    for text in (
        "config.yaml cannot be read",
        "samples.json cannot be read",
        "summary.json holds a list",
        "events.jsonl: 1 unreadable line",
    ):
        assert text in page, text
    odd = [{"positions": [{"candidates": [{}]}]}, None, {"positions": {"a": 1}}]
    (tmp_path / "samples.json").write_text(json.dumps({"continuations": odd}))
    Reader(page_of(tmp_path))


HOSTILE = "</span></style><script>alert(1)</script><img src=x onerror=alert(1)>\"'&\x00\ud800"


IMAGE = "data:image/png;base64,AAAA"


SAMPLES = {
    "step": 20,
    "continuations": [continuation()],
    "clips": [
        {
            "video": "a.mp4",
            "start_s": 1.0,
            "context": [IMAGE, IMAGE],
            "candidates": [{"step": 1, "loss": 0.5, "energy": -1.0, "image": IMAGE}],
            "truth": IMAGE,
            "truth_energy": -2.0,
            "persistence_loss": 0.3,
            "first": 2,
            "continuation": [IMAGE],
            "continuation_truth": [IMAGE],
            "continuation_loss": [0.1],
            "continuation_persistence_loss": [0.2],
        }
    ],
}


def each_leaf(value, instead):
    """Copies of a nested value, each with one of its leaves (or keys) replaced."""
    if isinstance(value, dict):
        for key, item in value.items():
            for copy in each_leaf(item, instead):
                yield {**value, key: copy}
            yield {instead: item} if isinstance(instead, str) else {**value, key: instead}
    elif isinstance(value, list):
        for number, item in enumerate(value):
            for copy in each_leaf(item, instead):
                yield [*value[:number], copy, *value[number + 1 :]]
        yield instead
    else:
        yield instead


def refuse_live_content(page):
    """No element that runs or fetches something: pictures only from inside the page."""
    reader = Reader(page)
    assert {tag for tag, _ in reader.tags}.isdisjoint({"script", "iframe", "object", "link"})
    for tag, attributes in reader.tags:
        assert not any(key.startswith("on") for key in attributes), (tag, attributes)
        assert attributes.get("src", "data:image/").startswith("data:image/"), (tag, attributes)
        assert "HOSTILE" not in str(attributes.get("style", "")), (tag, attributes)


HOSTILE_URI = 'data:image/png;base64,AA"><script>alert(1)</script>'


@pytest.mark.parametrize("instead", [HOSTILE, HOSTILE_URI], ids=["markup", "picture"])
def test_hostile_text_anywhere_is_shown_and_not_run(tmp_path, instead, without_plots):
    folder = run_folder(tmp_path / "run", samples=SAMPLES)
    page = page_of(folder)
    refuse_live_content(page)
    assert "from 1.00 s" in page and page.count('class="frame') == 6
    clean = instead.replace("\x00", "").replace("\ud800", "")
    config = yaml.safe_load((folder / "config.yaml").read_text())
    originals = {
        "samples.json": (SAMPLES, json.dumps, instead),
        "summary.json": (json.loads((folder / "summary.json").read_text()), json.dumps, instead),
        "config.yaml": ({"logging": {"run_name": "a"}, **config}, yaml.safe_dump, clean),
        "events.jsonl": ({"time": "t", "event": "start", "more": {"a": 1}}, json.dumps, instead),
    }
    for name, (value, dump, text) in originals.items():
        before = (folder / name).read_text()
        for changed in each_leaf(value, text):
            (folder / name).write_text(dump(changed))
            refuse_live_content(page_of(folder))
        (folder / name).write_text(before)
    for row in each_leaf(validation_row(20, [5.0, 4.5]), instead):
        run_folder(tmp_path / "row", [LEARNED[0], row, LEARNED[3]], samples=SAMPLES)
        refuse_live_content(page_of(tmp_path / "row"))


def test_hostile_names_in_drawings_are_text(tmp_path):
    name = "<script>alert(1)</script>" + "x" * 5_000
    run, other = run_folder(tmp_path / "run"), run_folder(tmp_path / "other")
    for folder in (run, other):
        set_config(folder, "logging", run_name=name)
    page = page_of(run, other)
    refuse_live_content(page)
    assert len(page) < 400_000


@pytest.mark.parametrize(
    "junk",
    [
        None,
        *(pytest.param(junk, marks=pytest.mark.soak) for junk in (True, 10**40, [[]])),
        math.nan,
        {"a": {"b": [None]}},
    ],
    ids=lambda junk: repr(junk)[:9],
)
def test_junk_in_any_place_does_not_break_the_page(tmp_path, junk, without_plots):
    folder = run_folder(tmp_path / "run", samples=SAMPLES)
    config = yaml.safe_load((folder / "config.yaml").read_text())
    summary = json.loads((folder / "summary.json").read_text())
    for name, value, dump in (
        ("samples.json", SAMPLES, json.dumps),
        ("summary.json", summary, json.dumps),
        ("config.yaml", config, yaml.safe_dump),
    ):
        before = (folder / name).read_text()
        for changed in each_leaf(value, junk):
            (folder / name).write_text(dump(changed))
            Reader(page_of(folder))
        (folder / name).write_text(before)
    for row in each_leaf(validation_row(20, [5.0, 4.5]), junk):
        Reader(page_of(run_folder(tmp_path / "row", [LEARNED[0], row, LEARNED[3]])))


ALIAS_BOMB = "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]\n" for i in range(1, 10)
)


# The peak of this program alone: getrusage's also counts what its parent had when it was started.
MEASURE = """
import sys
from pathlib import Path
from ebwm_scale.report import write_report
def peak():
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) / 2**10
write_report(Path(sys.argv[1]))
before = peak()
print(len(write_report(Path(sys.argv[2])).read_text()), peak() - before)
"""


def measured(usual, folder):
    """(characters of the page, MiB above the report of a usual run), in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, str(usual), str(folder)],
        capture_output=True,
        text=True,
        timeout=400,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    characters, mib = done.stdout.split()
    return int(characters), float(mib)


def test_lists_texts_and_aliases_of_any_size_fill_neither_memory_nor_page(tmp_path):
    many, text = 100_000, "word " * 200_000
    folder = run_folder(tmp_path / "run")
    samples = {
        "step": 10**30,
        "continuations": [continuation(continuation=text[:60], positions=[{}] * 50)] * 2_000,
        "clips": [{"video": text, "context": [IMAGE] * many, "candidates": [{"step": 1}] * many}],
        "nested": json.loads("[" * 400 + "]" * 400),
    }
    (folder / "samples.json").write_text(json.dumps(samples))
    (folder / "config.yaml").write_text(
        ALIAS_BOMB + "model: {kind: energy, size: *a9}\nlogging: {run_name: *a9}\nself: &s [*s]\n"
    )
    parameters = {f"part{i}": i for i in range(many)}
    (folder / "summary.json").write_text(
        json.dumps(
            {"parameters": parameters, "data": dict.fromkeys(map(str, range(many)), "x" * 9)}
        )
    )
    row = validation_row(20, [5.0] * many) | {"other": [1] * many}
    training = training_row(20, [5.0] * many)
    rows = [json.dumps(value) for value in (training, row)]
    (folder / "metrics.jsonl").write_text("\n".join(rows) + "\n" + "[" * 10**6 + "\n")
    with (folder / "events.jsonl").open("w") as file:
        file.writelines(
            json.dumps({"event": f"e{i}", "more": [1] * 90}) + "\n" for i in range(5_000)
        )
        file.write(json.dumps({"event": "big", "more": [["x" * 99] * 99] * 99}) + "\n")
    characters, mib = measured(run_folder(tmp_path / "usual"), folder)
    assert characters < 3_000_000 and mib < 150


@pytest.mark.parametrize(
    "num_rows, allowed_mib", [(60_000, 25), pytest.param(10**6, 150, marks=pytest.mark.soak)]
)
def test_memory_of_a_report_hardly_grows_with_the_rows(tmp_path, num_rows, allowed_mib):
    """Nine bytes a line and 300 bins a curve; kept as rows, 10^6 of them took 2.2 GiB."""
    folder = run_folder(tmp_path / "long", [])
    rest = json.dumps(training_row(1, [5.0, 4.5])).split(",", 1)[1]
    with (folder / "metrics.jsonl").open("w") as file:
        file.writelines(f'{{"step": {step},{rest}\n' for step in range(1, num_rows + 1))
        file.write(json.dumps(validation_row(num_rows, [5.0, 4.5])) + "\n")
    characters, mib = measured(run_folder(tmp_path / "usual"), folder)
    print(f"{num_rows:,} rows: {mib:.0f} MiB above the report of 4")
    assert characters < 1_500_000 and mib < allowed_mib


DAMAGED = {
    "not UTF-8": b"\xff\xfe\n",
    "zeros": b"\0" * 4096 + b"\n",
    "torn, and written on behind": b'{"step": 15, "los',
    "deep": b"[" * 100_000 + b"\n",
    "no object": b"[1, 2]\n3\nnull\n",
    "a long number": b'{"step": ' + b"9" * 5000 + b"}\n",
    "no step": b'{"loss": 1}\n{"step": "20"}\n',
}


@pytest.mark.parametrize("damage", DAMAGED)
def test_damaged_lines_are_left_out_of_every_reading_and_said_once(
    tmp_path, damage, capsys, without_plots, open_run_folder
):
    """The report, a resume, and whoever else reads a .jsonl file of a run go on with the other
    rows.
    """
    folder = run_folder(tmp_path)
    for name in ("metrics.jsonl", "events.jsonl"):
        lines = (folder / name).read_bytes().splitlines(keepends=True)
        (folder / name).write_bytes(b"".join([*lines[:1], DAMAGED[damage], *lines[1:]]))
    page = page_of(folder)
    assert answer_of(page) == "Yes"
    if damage != "zeros":
        assert len(re.findall(r"<li>metrics\.jsonl: \d unreadable line", page)) == 1
    written = open_run_folder(tmp_path, Config())
    assert written.truncate_metrics(20) == 20 and written.truncate_metrics(20) == 20
    said = capsys.readouterr().err.splitlines()
    assert len(said) == (damage not in ("zeros", "no step")), said
    assert all("metrics.jsonl" in line and "unreadable" in line for line in said)
    again = (folder / "metrics.jsonl").read_bytes().splitlines()
    whole = [row for row in LEARNED if damage != "torn, and written on behind" or row != LEARNED[1]]
    assert [json.loads(line) for line in again] == whole


def test_a_line_without_an_end_takes_no_memory(tmp_path):
    path = tmp_path / "metrics.jsonl"
    with path.open("wb") as file:
        file.write(b'{"step": 1}\n')
        file.seek(3 * MAX_LINE)
        file.write(b'\n{"step": 2}\n')
    rows = Rows(path)
    assert [row["step"] for row in rows] == [1, 2] and rows.unreadable == 1
