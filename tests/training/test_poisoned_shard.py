"""A training shard with documents of pure noise: its loss really spikes, and the run goes back to
before it, leaves the samples out, and shows it. Nothing is made up by EBWM_FAULTS.
"""

import base64
import hashlib
import json
import random
import re

import pytest
from training_runs import Runs

from ebwm_scale.data.format.shards import ShardedSplit, open_split
from ebwm_scale.data.loading.skipped import positions_of
from ebwm_scale.data.prepare.splitting import draws_of
from ebwm_scale.data.prepare.text import make_text_dataset
from ebwm_scale.data.prepare.tokenizer import train_tokenizer
from ebwm_scale.data.tokenizer import open_tokenizer

BATCH, STEPS = 8, 34
SEED = 16  # the shard with the noise comes when the model has learned something
NOISY_PLACE = (0.44, 0.50)  # of the order in which documents are packed
WATCHED = {
    "model.num_layers": 1,
    "refinement.num_steps": 1,
    "optimizer.learning_rate": 0.02,
    "data.window_shards": 1,
    "train.global_batch_size": BATCH,
    "train.seed": SEED,
    "train.max_steps": STEPS,
    "train.spike_deviations": 8.0,
    "train.spike_window": 8,
    "train.max_rollbacks": 8,
    "checkpoint.every_steps": 4,
    "evaluation.every_steps": 0,
}


def clean_documents(count: int) -> list[str]:
    """Of words that each are followed by one of two others."""
    generator = random.Random(0)
    letters = lambda: "".join(generator.choices("abcdefghij", k=generator.randint(2, 6)))
    words = [letters() for _ in range(30)]
    following = {word: generator.choices(words, k=2) for word in words}
    documents = []
    for _ in range(count):
        word = generator.choice(words)
        text = []
        for _ in range(45):
            text.append(word)
            word = generator.choice(following[word])
        documents.append(" ".join(text))
    return documents


def noise_documents(count: int) -> list[str]:
    """Random bytes as letters and digits; training documents that are packed near each other."""
    documents: list[str] = []
    generator = random.Random(1)
    while len(documents) < count:
        text = base64.b64encode(generator.randbytes(48)).decode()
        draws = draws_of(hashlib.sha256(text.encode()).hexdigest(), 0)
        draw, place = (value / 2**64 for value in draws)
        if draw > 0.1 and NOISY_PLACE[0] < place < NOISY_PLACE[1]:
            documents.append(text)
    return documents


def noisy_samples(split: ShardedSplit, tokenizer) -> set[int]:
    """Those with digits or capitals, which no clean document has."""
    texts = {sample: tokenizer.decode(split.read(sample).tolist()) for sample in range(len(split))}
    return {sample for sample, text in texts.items() if re.search("[0-9A-Z]", text)}


@pytest.fixture(scope="module")
def poisoned(tmp_path_factory):
    """(runs, the training split, its noisy samples)."""
    folder = tmp_path_factory.mktemp("poisoned")
    corpus = folder / "corpus"
    corpus.mkdir()
    for number, text in enumerate([*clean_documents(96), *noise_documents(3)]):
        (corpus / f"{number}.txt").write_text(text)
    train_tokenizer([corpus], folder / "tokenizer.model", 340)
    manifest = make_text_dataset(
        [corpus],
        folder / "shards",
        tokenizer=folder / "tokenizer.model",
        context_length=16,
        samples_per_shard=32,
    )
    tokenizer = open_tokenizer(folder / "tokenizer.model")
    validation = open_split(manifest, "validation", verify="sizes")
    assert not noisy_samples(validation, tokenizer)
    split = open_split(manifest, "train", verify="sizes")
    noisy = noisy_samples(split, tokenizer)
    assert len(noisy) > 10 and len({split.locate(sample)[0] for sample in noisy}) == 1
    (folder / "runs").mkdir()
    return Runs(folder / "runs", manifest), split, noisy


def events(runs, name: str, event: str) -> list[dict]:
    lines = (runs.folder / name / "events.jsonl").read_text().splitlines()
    return [row for row in map(json.loads, lines) if row["event"] == event]


def losses(runs, name: str) -> list[float]:
    rows = [row for row in runs.rows(name) if "split" not in row]
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
    return [row["loss"] for row in rows]


def test_a_poisoned_shard_spikes_the_loss_and_is_left_out(poisoned):
    """Every batch with noise in it is a spike, and none without. In the end none was trained on."""
    runs, split, noisy = poisoned
    runs.run("watched", overrides=WATCHED)
    spikes = events(runs, "watched", "spike")
    order = split.order(seed=SEED, window_shards=WATCHED["data.window_shards"])
    batches = order.samples(0, len(split) // BATCH * BATCH).reshape(-1, BATCH).tolist()
    with_noise = [sorted(batch) for batch in batches if noisy & set(batch)]
    assert [spike["samples"] for spike in spikes] == with_noise and len(spikes) > 2
    for spike in spikes:
        assert spike["loss"] > spike["mean"] + 3  # a real one
        assert spike["back_to"] == spike["step"] - 1 == spike["undone"][0][0] - 1
        assert spike["undone"][-1] == [spike["step"], spike["loss"]]

    newest = runs.folder / "watched" / "checkpoints" / f"step_{STEPS:06d}" / "trainer.json"
    saved = json.loads(newest.read_text())["spikes"]
    skipped = tuple(tuple(part) for part in saved["skipped"])
    positions = positions_of(0, STEPS * BATCH, skipped)
    trained_on = order.samples(0, int(positions[-1]) + 1)[positions]
    assert len(trained_on) == STEPS * BATCH and not noisy & set(trained_on.tolist())


def test_the_curve_of_a_poisoned_run_goes_on_from_before_and_the_report_shows_the_spikes(poisoned):
    runs, _, _ = poisoned
    spikes = events(runs, "watched", "spike")
    step = spikes[0]["step"]
    curve = losses(runs, "watched")
    assert max(curve[step - 9 :]) < min(spike["loss"] for spike in spikes) - 3
    assert sum(curve[-5:]) / 5 < spikes[0]["mean"]  # it went on learning
    page = (runs.folder / "watched" / "report.html").read_text()
    assert f"The loss spiked {len(spikes)} times; the run went back {len(spikes)} times." in page
    assert "a spike, and the steps undone" in page


@pytest.mark.soak
def test_without_the_watch_the_same_shard_is_trained_on_and_does_harm(poisoned):
    runs, _, _ = poisoned
    runs.run("unwatched", overrides={**WATCHED, "train.spike_deviations": None})
    step = events(runs, "watched", "spike")[0]["step"]
    watched, unwatched = losses(runs, "watched"), losses(runs, "unwatched")
    assert unwatched[: step - 1] == watched[: step - 1]
    assert max(unwatched[step - 1 : step + 3]) > max(watched[step - 1 :]) + 3
    assert not events(runs, "unwatched", "spike")
