"""Groups, masks and difficulties in the shard format: read as they were written, refused where they
are wrong, set aside where they are damaged; datasets without them stay what they were.
"""

import json
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from corpora import CONTEXT_LENGTH

from ebwm_kernels.vocabulary.softmax_cross_entropy import IGNORE
from ebwm_scale.config import resolved
from ebwm_scale.config.load import config_from_dict
from ebwm_scale.core.errors import ConfigError, DataError
from ebwm_scale.data.format.content import difficulty_of
from ebwm_scale.data.format.manifest import load_manifest
from ebwm_scale.data.format.scored import mark_unscored, plain_tokens
from ebwm_scale.data.format.shards import SampleError, open_split
from ebwm_scale.data.format.verify import verify_dataset
from ebwm_scale.data.format.writer import ShardWriter
from ebwm_scale.data.loading.batches import BatchLoader, check_context, validation_batches
from ebwm_scale.data.loading.mixture import open_sources
from ebwm_scale.data.loading.observation import Observation
from ebwm_scale.data.loading.streaming import StreamLoader
from ebwm_scale.data.prepare.reasoning.dataset import make_reasoning_dataset
from ebwm_scale.refinement.noise import NoiseSource
from ebwm_scale.training.preflight import RunCheck, check_data, fill_from_data
from ebwm_scale.world_model import WorldModel

COUNTS = dict(num_train=40, num_validation=16, samples_per_shard=20, report=lambda line: None)
P = 16  # cells of the small Sudoku


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tasks")
    make_reasoning_dataset("sudoku", folder / "grid", sizes=[4], **COUNTS)
    make_reasoning_dataset("multiplication", folder / "text", sizes=[1, 2], **COUNTS)
    return folder


@pytest.fixture
def tasks(made, tmp_path):
    """A folder with a copy of both datasets: grid and text."""
    return shutil.copytree(made, tmp_path / "tasks")


def edit(manifest, **values):
    content = json.loads(manifest.read_text())
    content.update(values)
    manifest.write_text(json.dumps(content))


def batch_of(manifest, count=4, split="validation"):
    opened = open_sources([(manifest, 1.0)], split, verify="sizes")
    (batch,) = validation_batches(
        opened,
        context_length=opened.manifest.context_length,
        batch_size=count,
        max_samples=count,
        rank=0,
        world_size=1,
    )
    return opened, batch


def test_a_dataset_of_text_has_none_of_the_new_keys_and_reads_as_before(dataset):
    values = json.loads(dataset.read_text())
    assert not {"group_size", "grid", "members"} & values.keys()
    split, batch = batch_of(dataset)
    content = split.manifest.content
    assert (content.group_size, content.grid, content.members) == (1, None, ())
    assert split.manifest.scored_share is None
    assert split.manifest.context_length == CONTEXT_LENGTH
    assert split.read(0).dtype == np.uint16
    observed, targets = Observation(split.manifest, "cpu")(batch.sequences)
    assert torch.equal(observed, batch.sequences[:, :-1])
    assert torch.equal(targets, batch.sequences[:, 1:])
    config = fill_from_data(config_from_dict({}), split.manifest)
    assert (config.data.group_size, config.data.grid, config.data.scored_share) == (None,) * 3
    assert resolved.group_size(config) == 1 and not resolved.has_masked_targets(config)


def test_an_explicit_group_of_one_is_ordinary_text(dataset):
    before = open_split(dataset, "validation", verify="sizes").read(0)
    edit(dataset, group_size=1)
    assert np.array_equal(open_split(dataset, "validation", verify="sizes").read(0), before)


def test_a_grid_is_observed_whole_and_its_open_cells_are_the_targets(made):
    split, batch = batch_of(made / "grid" / "manifest.json")
    observed, targets = Observation(split.manifest, "cpu")(batch.sequences)
    assert observed.shape == targets.shape == (4, P)
    assert split.manifest.content.grid == (4, 4) and split.manifest.content.group_size == P
    open_cell = 2  # the first symbol after unknown and end
    assert torch.equal(targets == IGNORE, observed != open_cell)
    assert bool(((targets > open_cell) | (targets == IGNORE)).all())
    given = observed != open_cell
    stored = torch.from_numpy(plain_tokens(batch.sequences.numpy()))
    assert torch.equal(stored[:, P:][given], observed[given])  # the solution keeps what is given


def test_of_a_text_the_answer_and_its_end_are_the_targets(made):
    split, batch = batch_of(made / "text" / "manifest.json")
    observed, targets = Observation(split.manifest, "cpu")(batch.sequences)
    end, equals = split.manifest.content.eos_id, 13
    for row, answer in zip(observed.tolist(), targets.tolist()):
        first = row.index(equals)
        rest = answer[first:]
        length = rest.index(end) + 1
        assert answer[:first] == [IGNORE] * first and IGNORE not in rest[:length]
        assert rest[length:] == [IGNORE] * (len(rest) - length)
        assert row[first + 1 : first + length] == rest[: length - 1]


def test_marks_come_off_again_and_the_first_group_is_never_marked():
    tokens = np.array([3, 0, 5, 0, 7], dtype="<u2")
    marked = mark_unscored(tokens, np.array([1, 0, 0, 1], dtype=np.uint8))
    assert marked.tolist() == [3, 0, -6, -1, 7]
    assert plain_tokens(marked).tolist() == tokens.tolist()
    with pytest.raises(ValueError, match="more than any vocabulary"):
        mark_unscored(np.array([1, 2**63], dtype="<u8"), np.array([1], dtype=np.uint8))


def test_the_scored_share_is_that_of_the_masks_and_the_number_of_targets_too(made):
    manifest = load_manifest(made / "grid" / "manifest.json")
    split = open_split(manifest, "train", verify="sizes")
    scored = sum(int((split.read(i)[P:] >= 0).sum()) for i in range(len(split)))
    assert split.num_targets == scored
    assert manifest.scored_share == scored / (len(split) * P)


def test_difficulties_are_read_in_a_mixture_too(made):
    manifest = made / "grid" / "manifest.json"
    split = open_split(manifest, "validation", verify="sizes")
    mixture = open_sources([(manifest, 1.0), (manifest, 1.0)], "validation", verify="sizes")
    alone = [difficulty_of(split.read_fields(i)) for i in range(16)]
    both = [difficulty_of(mixture.read_fields(i)) for i in range(32)]
    assert both == alone + alone and min(alone) >= 1


WRONG = {
    "a group of none": (dict(group_size=0), "group_size is 0: expected 1 or more"),
    "a group in words": (dict(group_size="16"), "group_size is .16.: expected a whole number"),
    "a group that does not divide": (
        dict(group_size=5, grid=[1, 5]),
        "block_length is 32: expected a multiple of group_size 5",
    ),
    "one group alone": (
        dict(group_size=32, grid=[4, 8]),
        "block_length is 32: .* at least two groups",
    ),
    "another grid": (dict(grid=[4, 5]), "grid is .*: expected .rows, columns. with group_size 16"),
    "a grid of three sides": (dict(grid=[2, 2, 4]), "grid is .*: expected .rows, columns"),
    "a grid of negative sides": (dict(grid=[-4, -4]), "grid is .*: expected .rows, columns"),
    "a grid in words": (dict(grid="4x4"), "grid is .*: expected a list"),
    "an unknown member": (dict(members=["colour"]), "members is .*: expected some of difficulty"),
    "a member twice": (dict(members=["scored", "scored"]), "members is .*: expected some of"),
    "members in another order": (dict(members=["scored", "difficulty"]), "in this order"),
    "members in words": (dict(members="scored"), "members is .*: expected a list"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_value_in_the_manifest_is_one_line(tasks, name):
    changes, expected = WRONG[name]
    manifest = tasks / "grid" / "manifest.json"
    edit(manifest, **changes)
    with pytest.raises(DataError, match=expected) as error:
        load_manifest(manifest)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("targets", [0, 40 * P + 1])
def test_a_number_of_scored_targets_that_cannot_be_is_refused(tasks, targets):
    manifest = tasks / "grid" / "manifest.json"
    values = json.loads(manifest.read_text())
    values["splits"]["train"]["num_targets"] = targets
    manifest.write_text(json.dumps(values))
    with pytest.raises(DataError, match=f"num_targets is {targets}: expected 1 to {40 * P}"):
        load_manifest(manifest)


def test_a_context_that_cuts_an_instance_or_a_group_is_refused(tasks):
    path = tasks / "grid" / "manifest.json"
    manifest = load_manifest(path)
    check_context(manifest, P)
    for length in (P - 1, 2 * P):
        with pytest.raises(DataError, match=f"have {P} observed tokens each, and are not cut"):
            check_context(manifest, length)
    edit(path, members=[], group_size=8, grid=[2, 4])  # four groups, of which three are observed
    manifest = load_manifest(path)
    for length in (8, 16, 24):
        check_context(manifest, length)
    for length, part in ((9, "are groups of 8 tokens"), (32, "were packed for 24; use 1 to 24")):
        with pytest.raises(DataError, match=part):
            check_context(manifest, length)


def rewritten(tasks, change, *, num_targets=None):
    """The training split of the grids again, with other members: sound tars and checksums."""
    manifest = tasks / "grid" / "manifest.json"
    old = open_split(manifest, "train", verify="sizes")
    samples = [old.read_fields(i) for i in range(20)]
    counts = [int((old.read(i)[P:] >= 0).sum()) for i in range(20)]
    for path in (tasks / "grid").glob("train-*"):
        path.unlink()
    writer = ShardWriter(tasks / "grid", "train", samples_per_shard=20)
    for number, (fields, count) in enumerate(zip(samples, counts)):
        arrays = {
            "tokens.npy": np.frombuffer(fields["tokens.npy"][-64:], "<u2"),
            "difficulty.npy": np.frombuffer(fields["difficulty.npy"][-4:], "<u4"),
            "scored.npy": np.frombuffer(fields["scored.npy"][-P:], "|u1"),
        }
        if number == 3:
            arrays = change(arrays)
        writer.add(arrays, num_targets=num_targets or count)
    values = json.loads(manifest.read_text())
    shards = writer.close()
    values["splits"]["train"] |= {
        "shards": shards,
        "num_samples": 20,
        "num_targets": shards[0]["num_targets"],
    }
    manifest.write_text(json.dumps(values))
    return manifest


BAD_MEMBERS = {
    "a mask of other numbers": (
        lambda a: a | {"scored.npy": a["scored.npy"] * 2},
        "scored.npy holds 2: expected 0 or 1",
    ),
    "a mask of nothing": (
        lambda a: a | {"scored.npy": a["scored.npy"] * 0},
        "expected at least one target that counts",
    ),
    "a shorter mask": (
        lambda a: a | {"scored.npy": a["scored.npy"][1:]},
        r"expected uint8 \(16,\)",
    ),
    "a mask of wider numbers": (
        lambda a: a | {"scored.npy": a["scored.npy"].astype("<u4")},
        "holds uint32 .*: expected uint8",
    ),
    "two difficulties": (
        lambda a: a | {"difficulty.npy": np.array([1, 2], "<u4")},
        r"expected a uint32 \(1,\)",
    ),
    "a broken difficulty": (
        lambda a: a | {"difficulty.npy": np.array([1.5], "<f4")},
        "holds float32 .*: expected a uint32",
    ),
}


@pytest.mark.parametrize("name", BAD_MEMBERS)
def test_a_member_with_other_content_is_a_problem_and_is_set_aside(tasks, name):
    change, expected = BAD_MEMBERS[name]
    manifest = rewritten(tasks, change)
    problems, _ = verify_dataset(manifest)
    assert len(problems) == 1 and "train-000000003" in problems[0]
    split = open_split(manifest, "train", verify="sizes")
    with pytest.raises(SampleError, match=expected):
        split.read(3)
    loader = BatchLoader(
        split,
        context_length=P,
        global_batch_size=20,
        micro_batch_size=20,
        rank=0,
        world_size=1,
        seed=0,
        window_shards=1,
        num_workers=0,
    )
    next(loader)
    assert [(bad.sample_id, bad.replaced_by) for bad in loader.found] == [(3, 4)]


def test_a_missing_member_is_found_before_training(tasks):
    manifest = rewritten(tasks, lambda a: a)
    edit(manifest, members=["difficulty", "scored"])
    assert verify_dataset(manifest)[0] == []
    writer = ShardWriter(tasks / "grid", "train", samples_per_shard=20)
    for _ in range(20):
        writer.add({"tokens.npy": np.zeros(2 * P, "<u2")}, num_targets=1)
    values = json.loads(manifest.read_text())
    values["splits"]["train"]["shards"] = writer.close()
    values["splits"]["train"]["num_targets"] = 20
    manifest.write_text(json.dumps(values))
    problems, _ = verify_dataset(manifest)
    assert any("have no difficulty.npy, scored.npy" in problem for problem in problems), problems


def test_a_number_of_targets_that_is_not_that_of_the_masks_is_a_problem(tasks):
    manifest = rewritten(tasks, lambda a: a, num_targets=2)
    problems, _ = verify_dataset(manifest)
    assert len(problems) == 1 and "targets, the manifest says 40" in problems[0]


@pytest.mark.parametrize("member", ["scored.npy", "difficulty.npy"])
def test_every_flipped_byte_of_the_new_members_is_noticed(tasks, member):
    manifest = tasks / "grid" / "manifest.json"
    split = open_split(manifest, "train", verify="sizes")
    path = tasks / "grid" / "train-000000.tar"
    index = json.loads((tasks / "grid" / "train-000000.index.json").read_text())
    column = index["fields"][member]
    first, size = column["offsets"][7], column["sizes"][7]
    sound = path.read_bytes()
    for place in range(first, first + size, 5):
        damaged = bytearray(sound)
        damaged[place] ^= 0x04
        path.write_bytes(damaged)
        with pytest.raises(SampleError, match=f"{member}.*checksum"):
            split.read(7)
        split.close()
    assert any(member in problem for problem in verify_dataset(manifest)[0])


def test_streamed_samples_are_those_of_the_index_and_a_damaged_mask_is_set_aside(tasks):
    manifest = load_manifest(tasks / "grid" / "manifest.json")
    path = tasks / "grid" / "train-000000.tar"
    index = json.loads((tasks / "grid" / "train-000000.index.json").read_text())
    sound = path.read_bytes()

    def streamed(count):
        loader = StreamLoader(
            [str(path)],
            manifest,
            context_length=P,
            global_batch_size=1,
            micro_batch_size=1,
            rank=0,
            world_size=1,
            seed=0,
            buffer=1,
        )
        rows = [tuple(next(loader).sequences[0].tolist()) for _ in range(count)]
        return sorted(rows), [bad.key for bad in loader.found]

    split = open_split(manifest, "train", verify="sizes")
    expected = sorted(tuple(split.read(i).tolist()) for i in range(20))
    assert streamed(20)[0] == expected
    damaged = bytearray(sound)
    last = index["fields"]["scored.npy"]["offsets"][7] + index["fields"]["scored.npy"]["sizes"][7]
    damaged[last - 1] ^= 1
    path.write_bytes(damaged)
    rows, bad = streamed(19)
    assert bad[0] == "train-000000007" and set(rows) < set(expected)


def test_sources_of_other_groups_are_not_mixed(tasks, made):
    other = tasks / "grid" / "manifest.json"
    edit(other, grid=[2, 8])
    with pytest.raises(ConfigError, match="differ in grid"):
        open_sources([(made / "grid" / "manifest.json", 1), (other, 1)], "train", verify="sizes")


def test_the_configuration_takes_the_groups_and_what_does_not_fit_them_is_named(made):
    path = made / "grid" / "manifest.json"
    config = config_from_dict({"data": {"manifest": str(path)}})
    filled = fill_from_data(config, load_manifest(path))
    assert resolved.group_size(filled) == P and resolved.grid(filled) == (4, 4)
    assert resolved.context_length(filled) == P and resolved.has_masked_targets(filled)
    again = config_from_dict(filled.to_dict())
    assert again == filled
    for model, problem in (
        ({}, None),
        (
            {"conditioning": "time_embed"},
            "model.conditioning is time_embed with data.group_size 16",
        ),
        ({"kind": "baseline", "conditioning": "time_embed"}, None),
    ):
        check = RunCheck(config_from_dict({**config.to_dict(), "model": model}), 1)
        check_data(check, lambda line: None, None)
        assert len(check.problems) == (problem is not None)
        assert problem is None or problem in check.problems[0][1]
    for wrong, part in (({"group_size": 9}, "group_size is 9"), ({"grid": [2, 8]}, "grid is")):
        other = config_from_dict({"data": wrong})
        with pytest.raises(ConfigError, match=f"data.{part}.* the dataset .* has"):
            fill_from_data(other, load_manifest(path))


@pytest.mark.parametrize("kind", ["energy", "baseline"])
def test_losses_of_scored_targets_are_means_over_them_however_a_batch_is_cut(made, kind):
    split, batch = batch_of(made / "text" / "manifest.json", 8)
    torch.manual_seed(0)
    config = config_from_dict(
        {
            "model": {
                "kind": kind,
                "num_layers": 1,
                "width": 16,
                "num_heads": 2,
                "predicted_input": "anchored",
            },
            "refinement": {"step_size": 5},
        }
    )
    config = fill_from_data(config, split.manifest)
    model = WorldModel(config).double()
    observed, targets = Observation(split.manifest, "cpu")(batch.sequences)

    def gradients(parts):
        model.zero_grad()
        total = 0.0
        for part in parts:
            output = model(
                observed[part],
                targets[part],
                sample_ids=torch.arange(8)[part],
                source=NoiseSource(0, 0),
            )
            (output.loss / len(parts)).backward()
            total += output.loss.item() / len(parts)
        return total, [p.grad.clone() for p in model.parameters() if p.grad is not None]

    whole, cut = gradients([slice(0, 8)]), gradients([slice(i, i + 2) for i in range(0, 8, 2)])
    assert whole[0] == pytest.approx(cut[0], rel=1e-12)
    for one, other in zip(whole[1], cut[1], strict=True):
        assert torch.allclose(one, other, rtol=1e-9, atol=1e-12)
    unmasked = config.replace(data=config.data.replace(scored_share=None))
    plain = WorldModel(unmasked).double()
    plain.load_state_dict(model.state_dict())
    mean = plain(
        observed, targets, sample_ids=torch.arange(8), source=NoiseSource(0, 0)
    ).loss.item()
    share = (targets != IGNORE).double().mean().item()
    assert split.manifest.scored_share is not None
    assert whole[0] == pytest.approx(mean * share / split.manifest.scored_share, rel=1e-12)


def test_a_stand_in_for_a_manifest_needs_no_groups():
    content = SimpleNamespace(eos_id=7)
    observe = Observation(SimpleNamespace(content=content, modality="text"), "cpu")
    assert observe(torch.tensor([[1, 2, 3]]))[1].tolist() == [[2, 3]]


def test_reading_marks_nothing_where_there_is_no_mask(tasks):
    manifest = tasks / "grid" / "manifest.json"
    marked = open_split(manifest, "validation", verify="sizes").read(0)
    edit(manifest, members=["difficulty"])
    plain = open_split(manifest, "validation", verify="sizes").read(0)
    assert plain.dtype == np.uint16 and np.array_equal(plain, plain_tokens(marked))
    assert load_manifest(manifest).scored_share is None
