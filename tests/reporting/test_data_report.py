"""The page of a dataset: what is counted is what was put in."""

import json
import re
from html import unescape

import numpy as np
import pytest

from ebwm_scale.core.errors import DataError, UserError
from ebwm_scale.data.format.manifest import load_manifest
from ebwm_scale.data.format.survey import scripts_of, survey
from ebwm_scale.data.prepare.text import make_text_dataset
from ebwm_scale.data_report import main, write_data_report

CYRILLIC = "это простой текст о погоде"
JAPANESE = "これは天気についての文章です"


def texts():
    draw = np.random.default_rng(0)
    latin = [
        f"plain words number {i} " + "and so on " * int(draw.integers(1, 9)) for i in range(60)
    ]
    others = [f"{i} {CYRILLIC}" for i in range(12)] + [f"{i} {JAPANESE}" for i in range(6)]
    return [*latin, *others, "<script>alert(1)</script> & more", "12345 67890"]


@pytest.fixture(scope="module", params=["consecutive", "best_fit"])
def made(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("made")
    values = [*texts(), *texts()[:7]]  # seven copies
    (folder / "a.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in values))
    return make_text_dataset(
        [folder / "a.jsonl"],
        folder / "text",
        tokenizer="bytes",
        context_length=128,
        validation_fraction=0.2,
        packing=request.param,
        report=lambda line: None,
    )


def looked_at(manifest):
    loaded = load_manifest(manifest)
    return {name: survey(loaded, name, max_documents=1000) for name in loaded.splits}


def test_what_is_counted_is_what_was_put_in(made):
    found = looked_at(made)
    values = texts()
    num_documents = sum(one.num_documents for one in found.values())
    # at the end of a split less than a block is dropped: a few documents
    in_all = len(values) + 7
    dropped = [split.facts["num_dropped_tokens"] for split in load_manifest(made).splits.values()]
    assert in_all - sum(dropped) // 10 - 2 <= num_documents <= in_all
    assert 4 <= sum(one.num_copies for one in found.values()) <= 7
    for name, one in found.items():
        assert one.is_whole and sum(one.main_scripts.values()) == one.num_documents
        assert sum(one.num_tokens) == one.num_bytes  # tokenised by bytes
        assert one.num_documents <= load_manifest(made).splits[name].facts["num_documents"]
    main = sum((one.main_scripts for one in found.values()), type(found["train"].scripts)())
    assert 9 <= main["cyrillic"] <= 12 and 3 <= main["hiragana"] <= 6 and main["no letters"] <= 1
    assert 60 <= main["latin"] <= 60 + 1 + 7
    assert not found["train"].digests & found["validation"].digests


def test_a_limit_is_kept_and_said(made):
    found = survey(load_manifest(made), "train", max_documents=10)
    assert found.num_documents == 10 and not found.is_whole


def test_letters_are_counted_by_script():
    assert scripts_of("Ab ж 7 日本 か!") == {"latin": 2, "cyrillic": 1, "cjk": 2, "hiragana": 1}
    assert scripts_of("1 + 1 = 2") == {}


def test_the_page_shows_the_figures_and_escapes_the_texts(made, tmp_path, capsys):
    assert main([str(made), "--output", str(tmp_path / "page.html")]) == 0
    page = (tmp_path / "page.html").read_text()
    loaded = load_manifest(made)
    text = unescape(re.sub(r"<[^>]+>", " ", page))
    for split in loaded.splits.values():
        assert f"{split.num_targets:,}" in text and f"{split.num_samples:,} in" in text
    assert "none stands in more than one split" in text and loaded.fingerprint in text
    assert "<script>" not in page and "http://" not in page.replace("http://www.w3.org", "")
    assert "page.html" in capsys.readouterr().out


def test_a_text_in_both_splits_is_said(made, tmp_path):
    from ebwm_scale.reporting.dataset_page import render

    found = looked_at(made)
    found["validation"].digests.add(next(iter(found["train"].digests)))
    page = render(load_manifest(made), found)
    assert "1 documents stand in more than one split" in page


def test_what_is_no_dataset_of_text_is_one_line(made, tmp_path):
    with pytest.raises(UserError, match="--documents is 0"):
        write_data_report(made, tmp_path / "page.html", documents=0)
    with pytest.raises(DataError, match="cannot read the manifest"):
        write_data_report(tmp_path / "none", tmp_path / "page.html", documents=5)
    assert not (tmp_path / "page.html").exists()
