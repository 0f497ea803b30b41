"""Any damage to any file of a checkpoint is one CheckpointError, and the checkpoint before it is
used.
"""

import json
import random
import re
import shutil

import pytest
import torch
from safetensors.torch import save_file

from ebwm_scale.checkpoint.files import manifest_text
from ebwm_scale.checkpoint.reader import CheckpointReader, find_latest, load_replay, verify
from ebwm_scale.core.errors import CheckpointError
from ebwm_scale.core.files import file_sha256

SHAPES = {"a.weight": [4, 3], "b": [5]}
RANKS = 2


def write_checkpoint(root, step, *, replay=True, own_hash=True):
    """A checkpoint of two processes with the least content that a run would write."""
    folder = root / f"step_{step:06d}"
    folder.mkdir(parents=True)
    held = [{"a.weight": [0, 12]}, {"b": [0, 5]}]
    for rank, ranges in enumerate(held):
        tensors = {}
        for name, (_, count) in ranges.items():
            for kind in ("weight", "exp_avg", "exp_avg_sq"):
                tensors[f"{kind}/{name}"] = torch.full((count,), float(step))
        save_file(
            tensors,
            folder / f"state-{rank:05d}-of-{RANKS:05d}.safetensors",
            metadata={"ranges": json.dumps(ranges), "shapes": json.dumps(SHAPES)},
        )
        if replay:
            values = {"version": 1, "num_pairs": 2, "queues": {rank: []}}
            torch.save(values, folder / f"replay_rank_{rank}.pt")
    trainer = {"version": 2, "world_size": RANKS, "updates": 3.0, "step": step}
    (folder / "trainer.json").write_text(json.dumps(trainer, indent=1))
    (folder / "config.yaml").write_text("train: {}\n")
    list_files(folder, own_hash=own_hash)
    return folder


def list_files(folder, *, own_hash=True):
    """The manifest of what is in the folder; own_hash=False: as releases before wrote it."""
    entries = {}
    for path in sorted(folder.iterdir()):
        if path.name != "manifest.json":
            entries[path.name] = {"size": path.stat().st_size, "sha256": file_sha256(path)}
    text = manifest_text(entries)
    if not own_hash:
        text = json.dumps({"version": 2, "files": entries}, indent=1)
    (folder / "manifest.json").write_text(text)


def refused(folder):
    with pytest.raises(CheckpointError) as error:
        verify(folder)
    message = str(error.value)
    assert "\n" not in message and len(message.replace(str(folder), "")) < 250
    return message


@pytest.mark.parametrize("own_hash", [True, False])
@pytest.mark.parametrize("replay", [True, False])
def test_a_whole_checkpoint_verifies_also_one_of_the_release_before(tmp_path, own_hash, replay):
    folder = write_checkpoint(tmp_path, 7, replay=replay, own_hash=own_hash)
    saved = verify(folder)
    assert saved.step == 7 and set(CheckpointReader(folder).weights()) == set(SHAPES)
    assert (load_replay(saved) is not None) == replay


@pytest.mark.parametrize("own_hash", [True, False])
def test_every_flipped_bit_of_a_manifest_falls_back_to_the_checkpoint_before(tmp_path, own_hash):
    write_checkpoint(tmp_path, 1, own_hash=own_hash)
    path = write_checkpoint(tmp_path, 2, replay=False, own_hash=own_hash) / "manifest.json"
    whole = path.read_bytes()
    for bit in range(8 * len(whole)):
        content = bytearray(whole)
        content[bit // 8] ^= 1 << bit % 8
        path.write_bytes(content)
        warnings = []
        assert find_latest(tmp_path, warnings.append).step == 1, bit
        assert len(warnings) == 1 and "\n" not in warnings[0], bit


def test_every_flipped_bit_of_a_trainer_file_and_any_of_the_others_falls_back(tmp_path):
    write_checkpoint(tmp_path, 1)
    folder, draw = write_checkpoint(tmp_path, 2), random.Random(0)
    for path in sorted(folder.iterdir()):
        whole, bits = path.read_bytes(), 8 * path.stat().st_size
        for bit in range(bits) if path.name == "trainer.json" else draw.sample(range(bits), 60):
            content = bytearray(whole)
            content[bit // 8] ^= 1 << bit % 8
            path.write_bytes(content)
            assert find_latest(tmp_path, lambda _: None).step == 1, (path.name, bit)
        for length in (0, len(whole) // 2, len(whole) - 1):
            path.write_bytes(whole[:length])
            assert find_latest(tmp_path, lambda _: None).step == 1, (path.name, length)
        path.write_bytes(whole)
    assert find_latest(tmp_path, lambda _: None).step == 2


def edit(folder, change):
    """Change what the manifest lists, with its own hash made right again."""
    values = json.loads((folder / "manifest.json").read_text())
    change(values["files"])
    (folder / "manifest.json").write_text(manifest_text(values["files"]))


def rewrite(folder, name, text):
    (folder / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    list_files(folder)


def state_with(folder, **metadata):
    """The first state file with other metadata, listed with its new hash."""
    path = folder / "state-00000-of-00002.safetensors"
    facts = {"ranges": json.dumps({"a.weight": [0, 12]}), "shapes": json.dumps(SHAPES)}
    save_file({"weight/a.weight": torch.zeros(12)}, path, metadata=facts | metadata)
    list_files(folder)


STATE = "state-00001-of-00002.safetensors"
DAMAGE = {
    "a state file is not listed": (
        lambda f: edit(f, lambda v: v.pop(STATE)),
        "lists 1 files state-",
    ),
    "no file is listed": (lambda f: edit(f, lambda v: v.clear()), "lists 0 files"),
    "config.yaml is not listed": (
        lambda f: edit(f, lambda v: v.pop("config.yaml")),
        "'config.yaml' is not listed",
    ),
    "one of two replay files is not listed": (
        lambda f: edit(f, lambda v: v.pop("replay_rank_1.pt")),
        "'replay_rank_1.pt' is not listed",
    ),
    "a file of no checkpoint is listed": (
        lambda f: edit(f, lambda v: v.update({"../x": {"size": 1, "sha256": "0" * 64}})),
        "'../x' is no file of a checkpoint",
    ),
    "a state file beside the listed ones": (
        lambda f: shutil.copy(f / STATE, f / "state-00002-of-00003.safetensors"),
        "state-00002-of-00003.safetensors is not listed",
    ),
    "a replay file beside the listed ones": (
        lambda f: shutil.copy(f / "replay_rank_1.pt", f / "replay_rank_2.pt"),
        "replay_rank_2.pt is not listed",
    ),
    "a listed file is a folder": (
        lambda f: ((f / STATE).unlink(), (f / STATE).mkdir()),
        f"{STATE} is missing",
    ),
    "a file is gone": (lambda f: (f / "trainer.json").unlink(), "trainer.json is missing"),
    "a file became longer": (lambda f: (f / STATE).open("ab").write(b"x"), "too long"),
    "the manifest is a folder": (
        lambda f: ((f / "manifest.json").unlink(), (f / "manifest.json").mkdir()),
        "manifest.json cannot be read",
    ),
    "the manifest is nested without end": (
        lambda f: (f / "manifest.json").write_text("[" * 10**5),
        "nested too deeply",
    ),
    "a file is listed twice": (
        lambda f: (f / "manifest.json").write_text('{"version": 2, "files": {"a": 1, "a": 2}}'),
        "a key stands twice",
    ),
    "a size is true": (
        lambda f: edit(f, lambda v: v[STATE].update(size=True)),
        "the size of .* is True",
    ),
    "a size is a fraction": (
        lambda f: edit(f, lambda v: v[STATE].update(size=1.0)),
        "the size of .* is 1.0",
    ),
    "a hash is a number": (
        lambda f: edit(f, lambda v: v[STATE].update(sha256=3)),
        "the sha256 of .* is 3",
    ),
    "an entry is a list": (
        lambda f: edit(f, lambda v: v.update({STATE: [1]})),
        r"is \[1\]",
    ),
    "trainer.json holds no object": (lambda f: rewrite(f, "trainer.json", "[]"), r"holds \[\]"),
    "trainer.json holds no JSON": (lambda f: rewrite(f, "trainer.json", b"\xff"), "is damaged"),
    "trainer.json without a step": (
        lambda f: rewrite(f, "trainer.json", '{"world_size": 1, "updates": 1}'),
        "step is None",
    ),
    "a state file that is none": (lambda f: rewrite(f, STATE, b"nonsense"), "no safetensors file"),
    "ranges are no JSON": (lambda f: state_with(f, ranges="{"), "do not describe a checkpoint"),
    "ranges are a list": (lambda f: state_with(f, ranges="[1]"), "do not describe a checkpoint"),
    "a range beyond the parameter": (
        lambda f: state_with(f, ranges='{"a.weight": [3, 12]}'),
        "do not describe a checkpoint",
    ),
    "a range of another length": (
        lambda f: state_with(f, ranges='{"a.weight": [0, 11]}'),
        "do not describe a checkpoint",
    ),
    "shapes of another model": (
        lambda f: state_with(f, shapes='{"a.weight": [12]}'),
        "its parameters are not those of",
    ),
    "a shape below zero": (
        lambda f: state_with(f, shapes='{"a.weight": [-4, -3]}'),
        "do not describe a checkpoint",
    ),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_whatever_is_wrong_is_one_line_and_the_checkpoint_before_is_used(tmp_path, name):
    write_checkpoint(tmp_path, 1)
    folder = write_checkpoint(tmp_path, 2)
    damage, expected = DAMAGE[name]
    damage(folder)
    message = refused(folder)
    assert re.search(expected, message), message
    assert find_latest(tmp_path, lambda _: None).step == 1


def test_a_replay_file_with_other_content_is_one_line(tmp_path):
    folder = write_checkpoint(tmp_path, 2)
    for content in (b"", b"nonsense", b"\x80\x02}."):
        rewrite(folder, "replay_rank_0.pt", content)
        with pytest.raises(CheckpointError, match="no replay buffer") as error:
            load_replay(verify(folder))
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("target", ["archive/step_000002", "step_000002"])
def test_a_checkpoint_that_is_a_link_to_nothing_or_itself_is_passed_over(tmp_path, target):
    """Moved to an archive and linked to, and the archive is not there."""
    write_checkpoint(tmp_path, 1)
    (tmp_path / "step_000002").symlink_to(target)
    said = []
    assert find_latest(tmp_path, said.append).step == 1
    assert len(said) == 1 and "step_000002" in said[0]
