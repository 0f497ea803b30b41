"""Best-fit packing: documents whole where they fit, every token a target once, little waste."""

import json
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from corpora import CONTEXT_LENGTH, WORDS

from ebwm_kernels.vocabulary.softmax_cross_entropy import IGNORE
from ebwm_scale.config.load import config_from_dict
from ebwm_scale.core.errors import ConfigError, DataError
from ebwm_scale.data.format.manifest import load_manifest
from ebwm_scale.data.format.scored import plain_tokens
from ebwm_scale.data.format.shards import open_split
from ebwm_scale.data.format.verify import verify_dataset
from ebwm_scale.data.loading.batches import check_context
from ebwm_scale.data.loading.mixture import open_sources
from ebwm_scale.data.loading.observation import Observation
from ebwm_scale.data.prepare import runs as runs_module
from ebwm_scale.data.prepare.best_fit import best_fit
from ebwm_scale.data.prepare.text import make_text_dataset
from ebwm_scale.data.tokenizer import open_tokenizer
from ebwm_scale.refinement.noise import NoiseSource
from ebwm_scale.training.preflight import fill_from_data
from ebwm_scale.world_model import WorldModel


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """400 documents, from two tokens to several blocks of 64."""
    draw = np.random.default_rng(0)
    path = tmp_path_factory.mktemp("texts") / "a.jsonl"
    lines = []
    for number in range(400):
        size = int(draw.integers(1, 8)) if number % 5 else int(draw.integers(10, 40))
        lines.append(json.dumps({"text": f"{number} {' '.join(draw.choice(WORDS, size=size))}"}))
    path.write_text("\n".join(lines))
    return path


def make(source, output, **options):
    settings = dict(tokenizer="bytes", context_length=64, samples_per_shard=50)
    return make_text_dataset(
        [source], output, report=lambda line: None, **{**settings, "packing": "best_fit", **options}
    )


@pytest.fixture(scope="module")
def packed(source, tmp_path_factory):
    return make(source, tmp_path_factory.mktemp("packed") / "text")


@pytest.fixture(scope="module")
def consecutive(source, packed):
    return make(source, packed.parent.parent / "consecutive", packing="consecutive")


def texts_in(manifest):
    """(Counter of the documents that are whole in a block, other blocks) of the training split."""
    split = open_split(manifest, "train", verify="hashes")
    tokenizer = open_tokenizer(split.manifest.content.tokenizer_path)
    eos = split.manifest.content.eos_id
    found = Counter()
    open_ends = []
    blocks = [plain_tokens(split.read(i)).tolist() for i in range(len(split))]
    whole = []
    for block in blocks:
        pieces, piece = [], []
        for token in block[1:]:
            piece.append(token)
            if token == eos:
                pieces.append(piece)
                piece = []
        if block[0] == eos and not piece:
            whole += pieces
        else:
            open_ends.append(block)
    for piece in whole:
        if len(piece) > 1:  # a lone end of sequence is padding
            found[tokenizer.decode(piece[:-1])] += 1
    return found, open_ends


def test_documents_that_fit_are_whole_and_in_one_block(source, packed):
    texts = [json.loads(line)["text"] for line in source.read_text().splitlines()]
    found, cut = texts_in(packed)
    fitting = {text for text in texts if len(text.encode()) + 1 <= 64}
    entry = load_manifest(packed).values["splits"]["train"]
    whole = [text for text in found if text in fitting]
    assert 200 < len(whole) == entry["num_documents"] - entry["num_cut_documents"]
    assert set(found.values()) == {1} and entry["num_cut_documents"] > 20 and cut


def test_every_token_is_a_target_once_and_padding_never(packed, consecutive):
    """The targets of best fit are those of consecutive packing, as a multiset, and its tail."""
    split, other = (open_split(path, "train", verify="sizes") for path in (packed, consecutive))
    targets = np.concatenate([split.read(i)[1:] for i in range(len(split))])
    counts = Counter(targets[targets >= 0].tolist())
    stream = [other.read(0)[:1], *(other.read(i)[1:] for i in range(len(other)))]
    theirs = Counter(np.concatenate(stream).tolist())
    missing = counts - theirs
    assert not theirs - counts
    assert missing.total() == load_manifest(consecutive).splits["train"].facts["num_dropped_tokens"]
    assert split.num_targets == counts.total()
    entry = load_manifest(packed).values["splits"]["train"]
    assert entry["num_padding_tokens"] == len(split) * 64 - counts.total()
    assert verify_dataset(packed)[0] == []
    p = np.array(list(counts.values())) / counts.total()
    assert entry["unigram_entropy"] == pytest.approx(-(p * np.log(p)).sum(), abs=1e-12)


def test_validation_is_packed_as_ever(packed, consecutive):
    for name in ("validation-000000.tar", "validation-000000.index.json"):
        assert (packed.parent / name).read_bytes() == (consecutive.parent / name).read_bytes()


def test_the_same_command_gives_the_same_bytes_and_buckets_do_not_mix(source, packed, tmp_path):
    again = make(source, tmp_path / "text")
    assert load_manifest(again).fingerprint == load_manifest(packed).fingerprint
    assert make(source, tmp_path / "text") == again  # kept
    with pytest.raises(DataError, match="differs in packing"):
        make(source, tmp_path / "text", packing="consecutive")


def test_many_buckets_lose_nothing(source, packed, tmp_path, monkeypatch):
    monkeypatch.setattr(runs_module, "_BUCKET_BYTES", 2**13)
    path = make(source, tmp_path / "text")
    assert texts_in(path)[0] == texts_in(packed)[0]
    targets = [load_manifest(p).splits["train"].num_targets for p in (path, packed)]
    assert targets[0] == targets[1]


def test_best_fit_is_within_its_bound_of_what_is_possible():
    draw = np.random.default_rng(1)
    sizes = draw.integers(2, 100, 5000)
    bins = best_fit(sizes, 100)
    assert sorted(i for members in bins for i in members) == list(range(5000))
    assert max(sizes[members].sum() for members in bins) <= 100
    lower = -(-int(sizes.sum()) // 100)
    assert len(bins) <= 11 / 9 * lower + 1
    assert len(bins) * 100 - sizes.sum() < 0.02 * sizes.sum()
    # each document lies where no block that was open then had less room and took it
    assert best_fit(np.array([60, 30, 50, 40, 10]), 100) == [[0, 3], [2, 1, 4]]


def test_padding_is_no_target_of_a_model(packed):
    split = open_split(packed, "train", verify="sizes")
    eos = split.manifest.content.eos_id
    rows = torch.from_numpy(np.stack([split.read(i).astype(np.int64) for i in range(len(split))]))
    observed, targets = Observation(split.manifest, "cpu")(rows)
    padding = (targets == IGNORE).sum()
    assert padding == load_manifest(packed).values["splits"]["train"]["num_padding_tokens"]
    assert observed.min() >= 0 and observed.max() < split.manifest.content.vocabulary_size
    assert (observed[targets == IGNORE] == eos).all()
    assert (split.num_targets / targets.numel()) == split.manifest.scored_share


def config(manifest, **data):
    return fill_from_data(
        config_from_dict(
            {
                "model": {"size": "4xs", "num_layers": 1, "width": 16, "num_heads": 1},
                "data": {"manifest": str(manifest), **data},
            }
        ),
        load_manifest(manifest),
    )


def test_losses_do_not_see_what_padding_holds(packed):
    """With documents masked, another token in the place of padding changes no loss."""
    split = open_split(packed, "train", verify="sizes")
    rows = [split.read(i).astype(np.int64) for i in range(len(split))]
    padded = [row for row in rows if (row < 0).sum() > 1][:4]
    model = WorldModel(config(packed, mask_documents=True)).eval()
    observe = Observation(split.manifest, "cpu")
    losses = []
    given = {"sample_ids": torch.arange(len(padded)), "source": NoiseSource(0, 0)}
    for last in (None, -1 - 7):
        changed = torch.from_numpy(np.stack(padded))
        if last is not None:
            changed[:, -1] = last  # only a target, and padding
        observed, targets = observe(changed)
        losses.append(model(observed, targets, **given).loss.item())
    assert losses[0] == losses[1]
    observed, targets = observe(torch.from_numpy(np.stack(padded)))
    targets[targets == IGNORE] = split.manifest.content.eos_id
    counted = model(observed, targets, **given).loss.item()
    assert counted != losses[0]


def test_blocks_are_not_cut_and_not_mixed_with_others(packed, consecutive):
    with pytest.raises(DataError, match="packed by best fit, and are not cut"):
        check_context(load_manifest(packed), CONTEXT_LENGTH)
    with pytest.raises(ConfigError, match="differ in packing"):
        open_sources([(packed, 1.0), (consecutive, 1.0)], "train", verify="sizes")


def test_what_a_dataset_says_of_masks_is_the_default_and_no_more(source, consecutive, tmp_path):
    old = consecutive
    new = make(source, tmp_path / "new", packing="consecutive", mask_documents=True)
    assert "mask_documents" not in load_manifest(old).values
    assert [config(path).data.mask_documents for path in (old, new)] == [False, True]
    assert config(new, mask_documents=False).data.mask_documents is False
    assert config(old, mask_documents=True).data.mask_documents is True
    assert config(new).data.eos_id == load_manifest(new).content.eos_id
    embedded = config_from_dict({"model": {"size": "4xs", "conditioning": "time_embed"}})
    assert fill_from_data(embedded, load_manifest(new)).data.mask_documents is False


def test_an_older_dataset_is_kept_by_the_command_that_made_it(source, consecutive, tmp_path):
    old = Path(shutil.copytree(consecutive.parent, tmp_path / "text")) / "manifest.json"
    before = old.read_bytes()
    assert make(source, tmp_path / "text", packing="consecutive", mask_documents=True) == old
    assert old.read_bytes() == before
    new = make(source, tmp_path / "new", packing="consecutive", mask_documents=False)
    with pytest.raises(DataError, match="differs in mask_documents"):
        make(source, new.parent, packing="consecutive", mask_documents=True)
