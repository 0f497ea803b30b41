"""The page on reasoning tasks, as written: from the shards to what a run solves."""

import json
import re
import runpy
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import training_runs

from ebwm_scale import evaluate
from ebwm_scale.data.format.scored import plain_tokens
from ebwm_scale.data.format.shards import open_split
from ebwm_scale.data.tokenizer import open_tokenizer

pytestmark = pytest.mark.multiprocess
ROOT = training_runs.ROOT
SMALL = [
    "model.num_layers=1",
    "model.width=24",
    "train.max_steps=2",
    "train.global_batch_size=8",
    "schedule.warmup_steps=1",
    "evaluation.max_samples=8",
    "refinement.replay=true",  # moves samples around, with what is scored of them
]


def commands() -> list[list[str]]:
    """The words of each command of the page, smaller where it takes long."""
    text = (ROOT / "docs" / "reasoning.md").read_text(encoding="utf-8")
    found = []
    for line in re.findall(r"^ {4}python (.*)", text, re.M):
        words = shlex.split(line.replace("--train 3000", "--train 100"))
        if "evaluate" in line:
            words += ["--max-samples", "20"]
        found.append(words)
    return found


def tool(words: list[str], monkeypatch) -> None:
    """A program of tools/ in this process; it must end with 0."""
    monkeypatch.setattr(sys, "argv", words)
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(ROOT / words[0]), run_name="__main__")
    assert not end.value.code


def test_the_commands_of_the_page_lead_from_shards_to_what_is_solved(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for words in commands():
        if words[0].startswith("tools/"):
            tool(words, monkeypatch)
        elif words[0] == "-m":
            assert evaluate.main(words[2:]) == 0
        else:
            words = [
                str(ROOT / word) if word.endswith((".py", ".yaml")) else word for word in words
            ]
            has_workspace = words[2].endswith("reachability.yaml")  # replay refuses one
            settings = SMALL[:-1] if has_workspace else SMALL
            subprocess.run([sys.executable, *words, *settings], check=True, timeout=240)
    run = Path("runs/products")
    row = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])
    entropy = json.loads(Path("data/products/manifest.json").read_text())
    entropy = entropy["splits"]["validation"]["unigram_entropy"]
    assert row["split"] == "validation" and row["unigram_entropy"] == pytest.approx(entropy)
    results = [json.loads((f / "solving.json").read_text()) for f in (run, run / "larger")]
    assert [point["num_steps"] for point in results[0]["steps"]] == [1, 2, 3, 4, 8]
    assert results[1]["num_targets"] > results[0]["num_targets"] > 20 * 2
    assert (run / "larger" / "solving.html").exists()
    assert "0 problems" in capsys.readouterr().out


@pytest.mark.soak
def test_the_task_of_ones_own_that_the_page_shows_is_made_trained_and_evaluated(
    tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    text = (ROOT / "docs" / "reasoning.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"^```python\n(.*?)^```", text, re.M | re.S)
    shorter = code.replace("num_train=3000", "num_train=60").replace("=500", "=20")
    assert shorter != code
    Path("sorting.py").write_text(shorter, encoding="utf-8")
    runpy.run_path("sorting.py")
    manifest = Path("data/sorting/manifest.json")
    split = open_split(manifest, "validation", verify="sizes")
    tokenizer = open_tokenizer(split.manifest.content.tokenizer_path)
    for index in range(len(split)):
        text = "".join(map(tokenizer.piece, plain_tokens(split.read(index)).tolist()))
        digits, answer = re.fullmatch(r"</s>(\d+)>(\d+)(?:</s>)+", text).groups()
        assert answer == "".join(sorted(digits)) and len(digits) in (4, 6)
    command = [str(ROOT / "ebwm_scale" / "train.py"), "--run-dir", "runs/sorting"]
    command += ["--config", str(ROOT / "configs" / "reasoning" / "hops.yaml")]
    command += ["--set", f"data.manifest={manifest}", *SMALL[:-1]]
    subprocess.run([sys.executable, *command], check=True, timeout=240)
    larger = "data/sorting-larger-8/manifest.json"
    assert evaluate.main(["runs/sorting", "--data", larger, "--max-samples", "8"]) == 0
    page = Path("runs/sorting/solving.html").read_text(encoding="utf-8")
    assert "sorting, validation: 8 instances" in page and "right answer" in page
