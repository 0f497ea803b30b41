"""Frames of many patches, conditions and outcomes: read as written, cut together, refused where
they cannot be right.
"""

import io
import json

import numpy as np
import pytest
import torch
from worlds import MOVES, place_of, write_world

pytest.importorskip("PIL.Image", reason="the package pillow is not installed")

from ebwm_scale.core.errors import ConfigError, DataError
from ebwm_scale.data.format.manifest import load_manifest
from ebwm_scale.data.format.shards import open_split
from ebwm_scale.data.format.verify import verify_dataset
from ebwm_scale.data.loading.batches import BatchLoader, validation_batches
from ebwm_scale.data.loading.mixture import MixedSplit
from ebwm_scale.data.loading.observation import Observation
from ebwm_scale.data.loading.streaming import StreamLoader

P = 4  # patches of a frame


def a_batch(manifest, *, context_length=None, batch_size=3):
    split = open_split(manifest, "train", verify="hashes")
    length = context_length or split.manifest.context_length
    batches = validation_batches(
        split,
        context_length=length,
        batch_size=batch_size,
        max_samples=batch_size,
        rank=0,
        world_size=1,
    )
    return split, next(batches)


@pytest.mark.parametrize("stored", ["embedding", "webp", "jpeg"])
def test_a_frame_is_a_group_of_patches_and_comes_back_as_pixels(tmp_path, stored):
    split, batch = a_batch(write_world(tmp_path / "world", stored=stored))
    content = split.manifest.content
    assert (content.group_size, content.grid, content.unit) == (P, (2, 2), "patches")
    observe = Observation(split.manifest, "cpu")
    observed, targets = observe(batch.sequences)
    assert observed.shape == targets.shape == (3, 4 * P, 192) and observed.dtype == torch.float32
    assert torch.equal(observed[:, P:], targets[:, :-P])
    frames = observe.space.frames(torch.cat([observed[:, :P], targets], 1))
    assert frames.shape == (3, 5, 16, 16, 3) and frames.dtype == torch.uint8
    # The moves lead from each picture to the next: the conditions belong to these frames.
    for shown, moves in zip(frames.numpy(), batch.conditions["action"].numpy()):
        places = np.array([place_of(frame) for frame in shown])
        assert np.array_equal(places[1:], np.clip(places[:-1] + moves, 0, 12))


def test_conditions_are_standardised_and_restored(tmp_path):
    split, batch = a_batch(write_world(tmp_path / "world"))
    observe = Observation(split.manifest, "cpu")
    conditions = observe.conditions(batch.conditions)
    assert list(conditions) == ["action", "proprio"]
    assert all(v.shape == (3, 4, 2) and v.dtype == torch.float32 for v in conditions.values())
    expected = (batch.conditions["proprio"] - 6.0) / 3.0
    assert torch.allclose(conditions["proprio"], expected)
    restored = observe.restored(conditions)
    for name, values in batch.conditions.items():
        assert torch.allclose(restored[name], values, atol=1e-5)


def test_discrete_conditions_are_ids(tmp_path):
    split, batch = a_batch(write_world(tmp_path / "world", discrete=True, proprio=False))
    action = Observation(split.manifest, "cpu").conditions(batch.conditions)["action"]
    assert action.shape == (3, 4, 1) and action.dtype == torch.int64
    condition = split.manifest.content.conditions[0]
    assert condition.is_discrete and condition.num_values == len(MOVES)
    assert int(action.max()) < len(MOVES)


def test_a_shorter_context_cuts_frames_and_conditions_together(tmp_path):
    manifest = write_world(tmp_path / "world")
    _, whole = a_batch(manifest)
    _, short = a_batch(manifest, context_length=2 * P)
    assert torch.equal(short.sequences, whole.sequences[:, : 3 * P])
    assert torch.equal(short.conditions["action"], whole.conditions["action"][:, :2])
    webp = write_world(tmp_path / "webp", stored="webp")
    _, pictures = a_batch(webp, context_length=2 * P)
    assert pictures.sequences.shape == (3, 3, 16, 16, 3)
    with pytest.raises(DataError, match="are groups of 4 patches"):
        a_batch(manifest, context_length=P + 1)


def test_every_loader_carries_conditions_with_their_frames(tmp_path):
    manifest = write_world(tmp_path / "world")
    split = open_split(manifest, "train", verify="sizes")
    options = dict(context_length=4 * P, global_batch_size=4, micro_batch_size=2, rank=0,
                   world_size=1, seed=3)  # fmt: skip
    mixed = MixedSplit([split, split], [0.5, 0.5])
    shards = sorted(map(str, (tmp_path / "world").glob("train-*.tar")))
    loaders = [
        BatchLoader(split, **options, window_shards=2, num_workers=0),
        BatchLoader(mixed, **options, window_shards=2, num_workers=0),
        StreamLoader(shards, split.manifest, **options, buffer=2),
    ]
    expected = {
        split.read_sample(i).states.tobytes(): split.read_sample(i).conditions["action"]
        for i in range(len(split))
    }
    for loader in loaders:
        for _ in range(4):
            batch = next(loader)
            for row, states in enumerate(batch.sequences.numpy().astype(np.float16)):
                found = batch.conditions["action"][row].numpy()
                assert np.array_equal(expected[states.tobytes()], found)
        loader.close()


def test_outcomes_are_kept_beside(tmp_path):
    split, batch = a_batch(write_world(tmp_path / "world"))
    assert split.manifest.content.outcomes == ("reward", "terminated")
    outcomes = split.outcomes(0)
    proprio = split.read_sample(0).conditions["proprio"]
    assert outcomes["reward"].shape == (4,) and outcomes["terminated"].tolist() == [0] * 4
    assert outcomes["reward"][:-1].tolist() == proprio[1:].sum(1).tolist()
    assert set(batch.conditions) == {"action", "proprio"}  # a model is not shown what will come


def test_without_conditions_a_dataset_is_an_ordinary_one(tmp_path):
    manifest = write_world(
        tmp_path / "plain", patches=False, proprio=False, outcomes=False, changes={"conditions": []}
    )
    content = load_manifest(manifest).content
    assert (content.group_size, content.grid, content.conditions) == (1, None, ())
    split, batch = a_batch(manifest)
    observe = Observation(split.manifest, "cpu")
    assert batch.conditions == {} and observe.conditions(batch.conditions) == {}
    observed, targets = observe(batch.sequences)
    assert torch.equal(observed[:, 1:], targets[:, :-1]) and observed.shape == (3, 4, 768)


def test_a_sound_world_has_no_problems(tmp_path):
    assert verify_dataset(write_world(tmp_path / "world")) == ([], 12)


@pytest.mark.parametrize(
    ("name", "values", "expected"),
    [
        ("action.npy", np.zeros((4, 3), "<f4"), r"holds float32 \(4, 3\): expected action: cont"),
        ("action.npy", np.zeros((3, 2), "<f4"), r"expected action: continuous \(4, 2\)"),
        ("action.npy", np.full((4, 2), np.nan, "<f4"), "action.npy holds numbers that are not fin"),
        ("proprio.npy", np.zeros((4, 2), "<u4"), "expected proprio: continuous"),
        ("reward.npy", np.full(4, np.inf, "<f4"), "reward.npy holds numbers that are not finite"),
        ("terminated.npy", np.full(4, 2, np.uint8), "terminated.npy holds 2: expected 0 or 1"),
        ("terminated.npy", np.zeros(5, np.uint8), r"expected of terminated \(4,\)"),
    ],
)
def test_a_member_that_cannot_be_right_is_found_and_its_sample_replaced(
    tmp_path, monkeypatch, name, values, expected
):
    from ebwm_scale.data.format.writer import ShardWriter

    add, count = ShardWriter.add, iter(range(100))

    def damaging(self, fields, *, num_targets):
        if next(count) == 1:
            fields = {**fields, name: values}
        add(self, fields, num_targets=num_targets)

    monkeypatch.setattr(ShardWriter, "add", damaging)
    manifest = write_world(tmp_path / "world")
    problems, _ = verify_dataset(manifest)
    assert len(problems) == 1
    split = open_split(manifest, "train", verify="hashes")
    with pytest.raises(DataError, match=expected):
        split.read(1)
    found = []
    batches = validation_batches(split, context_length=16, batch_size=9, max_samples=9, rank=0,
                                 world_size=1, found=found)  # fmt: skip
    batch = next(batches)
    assert found[0].sample_id == 1 and found[0].replaced_by == 2
    stands_in = split.read_sample(2)
    assert np.array_equal(batch.conditions["action"][1].numpy(), stands_in.conditions["action"])


def test_an_id_beyond_its_values_is_found(tmp_path):
    manifest = write_world(
        tmp_path / "world",
        discrete=True,
        proprio=False,
        changes={
            "conditions": [{"name": "action", "kind": "discrete", "width": 1, "num_values": 2}]
        },
    )
    assert any("must be below its 2 values" in line for line in verify_dataset(manifest)[0])


ACTION = {"name": "action", "kind": "continuous", "width": 2, "mean": [0, 0], "std": [1, 1]}


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"conditions": [ACTION, ACTION]}, "action, action: each must be there once"),
        ({"conditions": [ACTION | {"name": "Action"}]}, r"conditions\[0\].name: expected small"),
        ({"conditions": [ACTION | {"name": "reward"}]}, r"conditions\[0\].name: is taken"),
        ({"conditions": [ACTION | {"kind": "both"}]}, "expected one of continuous, discrete"),
        ({"conditions": [ACTION | {"width": 0}]}, "width: expected a whole number from 1"),
        ({"conditions": [ACTION | {"width": True}]}, "width: expected a whole number from 1"),
        ({"conditions": [ACTION | {"std": [1, 0]}]}, "std: expected numbers above 0"),
        ({"conditions": [ACTION | {"mean": [1]}]}, "mean: expected 2 finite numbers"),
        ({"conditions": [ACTION | {"mean": [1e300, 0]}]}, "mean: expected 2 finite numbers"),
        ({"conditions": [ACTION | {"kind": "discrete"}]}, "num_values: expected a whole number"),
        ({"conditions": ["action"]}, r"conditions\[0\] is no object"),
        ({"conditions": {}}, "conditions is .*: expected a list"),
        ({"outcomes": ["terminated", "reward"]}, "outcomes is .*: expected some of reward, term"),
        ({"grid": [2, 3]}, "with group_size 4 cells"),
        ({"group_size": 2, "grid": [1, 2], "block_length": 21}, "a multiple of group_size 2"),
    ],
)
def test_a_manifest_that_cannot_be_right_is_one_line(tmp_path, changes, expected):
    manifest = write_world(tmp_path / "world", changes=changes)
    with pytest.raises(DataError, match=expected) as error:
        load_manifest(manifest)
    assert "\n" not in str(error.value) and str(manifest) in str(error.value)


def test_patches_need_their_grid(tmp_path):
    manifest = write_world(tmp_path / "world")
    values = json.loads(manifest.read_text())
    del values["grid"]
    manifest.write_text(json.dumps(values))
    with pytest.raises(DataError, match=r"grid is .*: expected \[rows, columns\] of the patches"):
        load_manifest(manifest)


def test_worlds_of_other_conditions_cannot_be_mixed(tmp_path):
    first = open_split(write_world(tmp_path / "a"), "train", verify="sizes")
    second = open_split(write_world(tmp_path / "b", proprio=False), "train", verify="sizes")
    with pytest.raises(ConfigError, match="differ in conditions"):
        MixedSplit([first, second], [1, 1])


def test_an_encoder_of_another_grid_is_refused(tmp_path):
    manifest = write_world(tmp_path / "world", changes={"group_size": 2, "grid": [1, 2],
                                                       "block_length": 10})  # fmt: skip
    observe = Observation(load_manifest(manifest), "cpu")
    with pytest.raises(DataError, match="gives 2 x 2 embeddings of 192 numbers, the dataset was"):
        observe.space.frames(torch.zeros(1, 2, 192))


def test_what_is_stored_is_plain_numpy(tmp_path):
    split = open_split(write_world(tmp_path / "world"), "train", verify="sizes")
    fields = split.read_fields(0)
    assert sorted(fields) == ["action.npy", "clip.json", "frames.npy", "proprio.npy", "reward.npy",
                              "terminated.npy"]  # fmt: skip
    assert np.load(io.BytesIO(fields["action.npy"])).shape == (4, 2)
    assert split.about(0)["episode"] == "walk-0"
