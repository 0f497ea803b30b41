"""Worlds as datasets: every frame beside the action that leads on from it, whatever the source."""

import importlib.util
import json
import multiprocessing
import os
import re
import runpy
import shlex
import signal
import sys
import textwrap
import time
from pathlib import Path

import numpy as np
import pytest
import world_sources as sources
from worlds import MOVES, SIDE, place_of

pytest.importorskip("PIL.Image", reason="the package pillow is not installed")

from ebwm_scale.core.errors import DataError
from ebwm_scale.data.format.episodes import episodes_of, find_episode, read_episode
from ebwm_scale.data.format.manifest import load_manifest
from ebwm_scale.data.format.shards import open_split
from ebwm_scale.data.format.verify import verify_dataset
from ebwm_scale.data.loading.observation import Observation
from ebwm_scale.data.prepare.worlds import environments
from ebwm_scale.data.prepare.worlds.columns import ColumnConfig
from ebwm_scale.data.prepare.worlds.config import WorldDatasetConfig
from ebwm_scale.data.prepare.worlds.dataset import make_world_dataset
from ebwm_scale.data.prepare.worlds.opening import open_source
from ebwm_scale.data.prepare.worlds.source import FRAMES, Wanted

pytestmark = pytest.mark.multiprocess
needs_gymnasium = pytest.mark.skipif(
    importlib.util.find_spec("gymnasium") is None, reason="gymnasium is not installed"
)
needs_h5py = pytest.mark.skipif(
    importlib.util.find_spec("h5py") is None, reason="h5py is not installed"
)
TOOL = Path(__file__).parents[2] / "tools" / "make_world_shards.py"
SMALL = {"context_length": 3, "height": 16, "width": 16, "encoder": "raw",
         "encoder_settings": {"patch": 8}, "validation_fraction": 0.3}  # fmt: skip


def make(folder, source, *, conditions=("action",), keys=None, said=None, **settings):
    """The manifest of a dataset; said: is given the lines of the report."""
    columns = ColumnConfig(
        tuple(conditions),
        tuple(settings.pop("shifted", ())),
        tuple(settings.pop("continuous", ())),
    )
    wanted = Wanted(tuple(conditions), keys or {})
    report = (lambda line: None) if said is None else said.append
    opened = open_source(source, wanted, report=report) if isinstance(source, str) else source
    config = WorldDatasetConfig(**(SMALL | settings), columns=columns)
    path = make_world_dataset(opened, wanted, folder, config, workers=1, report=report)
    return load_manifest(path)


def clips(manifest):
    """(frames as shown (F, 16, 16, 3), conditions, outcomes, about) of all clips."""
    observe = Observation(manifest, "cpu")
    for split in ("train", "validation"):
        reader = open_split(manifest, split, verify="hashes")
        for number in range(len(reader)):
            sample = reader.read_sample(number)
            states = observe.space.states(
                __import__("torch").from_numpy(sample.states[None].copy())
            )
            frames = observe.space.frames(states)[0].numpy()
            yield frames, sample.conditions, reader.outcomes(number), reader.about(number)


def check_walk(manifest, *, skip=1, discrete=False):
    """Every clip's actions lead from each of its frames to the next; how many clips there are."""
    count = 0
    for frames, conditions, outcomes, _ in clips(manifest):
        places = np.array([place_of(frame) for frame in frames])
        actions = conditions["action"]
        moves = MOVES[actions] if discrete else actions.reshape(len(actions), skip, 2)
        place = places[:-1].astype(float)
        for step in range(skip):
            place = np.clip(place + moves[:, step], 0, 16 - SIDE)
        assert np.array_equal(place, places[1:])
        if "proprio" in conditions:
            assert np.array_equal(conditions["proprio"], places[:-1])
        if "reward" in outcomes and skip == 1:
            assert np.array_equal(outcomes["reward"], places[1:].sum(1))
        count += 1
    return count


def test_npz_episodes_become_clips_that_cross_no_end(tmp_path):
    lengths = [3, 7, 8, 12, 5]
    folder = sources.write_npz(tmp_path / "walks", sources.walks(lengths))
    said = []
    manifest = make(tmp_path / "world", f"npz:{folder}", conditions=["action", "proprio"],
                    stride=2, said=said)  # fmt: skip
    assert check_walk(manifest) == sum((length - 3) // 2 + 1 for length in lengths)
    assert manifest.content.outcomes == ("reward",)
    assert verify_dataset(manifest.path)[0] == []
    assert "episodes left out: none" in said
    seen = {}
    for _, _, _, about in clips(manifest):
        seen.setdefault(about["episode"], []).append(about["start_step"])
    assert seen == {f"walk-{i}": list(range(0, n - 2, 2)) for i, n in enumerate(lengths)}


def test_episodes_are_in_one_split_and_the_held_out_ones_are_kept_whole(tmp_path):
    episodes = sources.walks([6, 8, 10, 12, 14, 16])
    folder = sources.write_npz(tmp_path / "walks", episodes)
    manifest = make(tmp_path / "world", f"npz:{folder}")
    names = {
        split: {reader.about(i)["episode"] for i in range(len(reader))}
        for split in ("train", "validation")
        for reader in [open_split(manifest, split, verify="sizes")]
    }
    assert names["train"] and names["validation"] and not names["train"] & names["validation"]
    infos = episodes_of(manifest)
    assert {info.name for info in infos} == names["validation"]
    for info in infos:
        frames, moves, _ = episodes[int(info.name.removeprefix("walk-"))]
        episode = read_episode(manifest, info)
        assert np.array_equal(episode.frames, frames) and episode.num_steps == info.num_steps
        assert np.array_equal(episode.conditions["action"], MOVES[moves])
    assert find_episode(manifest, "0") == infos[0] == find_episode(manifest, infos[0].name)
    with pytest.raises(DataError, match="has no held-out episode nobody; it has 0 to"):
        find_episode(manifest, "nobody")


def test_the_same_arguments_give_the_same_bytes_and_are_kept(tmp_path):
    folder = sources.write_npz(tmp_path / "walks", sources.walks([9] * 4))
    for name in ("a", "b"):
        make(tmp_path / name, f"npz:{folder}")
    files = sorted(
        p.relative_to(tmp_path / "a") for p in (tmp_path / "a").rglob("*") if p.is_file()
    )
    assert Path("episodes/000000.npz") in files
    for file in files:
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes(), file
    said = []
    make(tmp_path / "a", f"npz:{folder}", said=said)
    assert said[0].startswith("already there")
    (tmp_path / "a" / "episodes" / "000000.npz").unlink()
    make(tmp_path / "a", f"npz:{folder}")
    assert (tmp_path / "a" / "episodes" / "000000.npz").exists()
    with pytest.raises(DataError, match="differs in settings"):
        make(tmp_path / "a", f"npz:{folder}", stride=1)
    sources.write_npz(folder, sources.walks([9] * 4, seed=5))
    with pytest.raises(DataError, match="differs in episodes"):
        make(tmp_path / "a", f"npz:{folder}")


@pytest.mark.parametrize("stored", ["embedding", "webp"])
def test_skipped_frames_leave_their_actions_side_by_side(tmp_path, stored):
    folder = sources.write_npz(tmp_path / "walks", sources.walks([13, 13, 14]))
    manifest = make(tmp_path / "world", f"npz:{folder}", frame_skip=3, stride=1, stored=stored,
                    conditions=["action", "proprio"])  # fmt: skip
    assert manifest.content.conditions[0].width == 6
    assert check_walk(manifest, skip=3) == 2 * 5 + 6
    reader = open_split(manifest, "validation", verify="sizes")
    (info, *_) = episodes_of(manifest)
    episode = read_episode(manifest, info)
    first = reader.read_sample(0)
    assert np.array_equal(first.conditions["action"], episode.conditions["action"][:3])
    assert np.array_equal(reader.outcomes(0)["reward"], episode.outcomes["reward"][:3])
    assert episode.conditions["proprio"].shape == (episode.num_steps, 2)


def test_statistics_are_those_of_the_training_episodes(tmp_path):
    episodes = sources.walks([20] * 6)
    folder = sources.write_npz(tmp_path / "walks", episodes)
    manifest = make(tmp_path / "world", f"npz:{folder}", frame_skip=2)
    reader = open_split(manifest, "train", verify="sizes")
    trained = {reader.about(i)["episode"] for i in range(len(reader))}
    actions = np.concatenate([MOVES[moves] for i, (_, moves, _) in enumerate(episodes)
                              if f"walk-{i}" in trained])  # fmt: skip
    condition = manifest.content.conditions[0]
    assert np.allclose(condition.mean, np.tile(actions.mean(0), 2), atol=1e-6)
    assert np.allclose(condition.std, np.tile(actions.std(0), 2), atol=1e-6)


def test_integers_are_ids_unless_they_are_said_to_be_amounts(tmp_path):
    episodes = sources.walks([9] * 4)
    moves = [moves for _, moves, _ in episodes]
    folder = sources.write_npz(tmp_path / "walks", episodes, action=lambda i, _: moves[i])
    manifest = make(tmp_path / "world", f"npz:{folder}")
    condition = manifest.content.conditions[0]
    assert condition.is_discrete and condition.width == 1
    assert condition.num_values == max(map(max, moves)) + 1
    assert check_walk(manifest, discrete=True) == 12
    amounts = make(tmp_path / "amounts", f"npz:{folder}", continuous=["action"])
    assert not amounts.content.conditions[0].is_discrete


def padded(values, filler, *, front):
    """Actions with a filler beside the reset frame, or beside the last."""
    filling = np.full_like(values[:1], filler)
    return np.concatenate([filling, values] if front else [values, filling])


@pytest.mark.parametrize(
    ("filler", "front", "options"),
    [
        (np.nan, True, {}),  # beside the reset: a_t stands at t + 1
        (np.nan, False, {}),  # beside the last frame
        (7.0, False, {}),  # LeRobot: the last action leads nowhere
        (0.0, True, {"shifted": ["action"]}),  # zeros say nothing of themselves
    ],
)
def test_a_row_for_each_frame_is_aligned_with_the_step_it_belongs_to(
    tmp_path, filler, front, options
):
    def action(_, arrays):
        return padded(arrays["action"], filler, front=front)

    folder = sources.write_npz(tmp_path / "walks", sources.walks([9] * 4), action=action)
    said = []
    manifest = make(tmp_path / "world", f"npz:{folder}", said=said, **options)
    assert check_walk(manifest) == 12
    assert any(line.startswith("action: in 4 of 4 episodes the row") for line in said) == front


def test_ends_are_shifted_with_the_rewards_they_came_with(tmp_path):
    def reward(_, arrays):
        return padded(arrays["reward"], np.nan, front=True)

    folder = sources.write_npz(
        tmp_path / "walks",
        sources.walks([6] * 4),
        reward=reward,
        terminated=np.array([0, 0, 0, 0, 0, 0, 1]),
    )
    manifest = make(tmp_path / "world", f"npz:{folder}")
    assert check_walk(manifest) == 8
    for _, _, outcomes, about in clips(manifest):
        assert outcomes["terminated"].tolist() == ([0, 0, 1] if about["start_step"] else [0] * 3)


def nan_at(step):
    def action(number, arrays):
        values = arrays["action"].copy()
        if number == 1:
            values[step, 1] = np.nan
        return values

    return action


def of_width(width):
    def action(number, arrays):
        return arrays["action"] if number != 2 else np.zeros((9, width), np.float32)

    return action


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"action": nan_at(4)}, r"walk-1, step 4: action is nan in column 1"),
        (
            {"action": of_width(3)},
            r"walk-2: action has 3 numbers a step, walk-0 has 2: .* leave the others",
        ),
        ({"action": lambda i, a: a["action"][:-2]}, "action has 7 rows for 10 frames"),
        ({"action": None}, "has no action by a usual name; --map action= takes one of: frames"),
        ({"action": lambda i, a: a["action"].astype(str)}, "action is <U.*: expected numbers"),
        ({"action": -np.ones(9, int)}, "action is the integer -1: values of a discrete"),
        ({"reward": np.zeros((9, 2))}, "reward has 2 numbers a step: expected 1"),
        ({"reward": np.full(9, np.inf)}, "step 0: reward is inf"),
        ({"frames": np.zeros((10, 16, 16, 5), np.uint8)}, "expected 1, 3 or 4 colours"),
        ({"frames": np.full((10, 16, 16, 3), 300.0)}, "fractions of a picture are from 0 to 1"),
        ({"terminated": np.full(9, 3)}, "terminated holds 3: expected 0 or 1"),
    ],
)
def test_what_is_wrong_is_one_line_and_nothing_is_written(tmp_path, changes, expected):
    folder = sources.write_npz(tmp_path / "walks", sources.walks([9] * 4), **changes)
    with pytest.raises(DataError, match=expected) as error:
        make(tmp_path / "out" / "world", f"npz:{folder}")
    assert "\n" not in str(error.value)
    left = [p.name for p in (tmp_path / "out").glob("*")] if (tmp_path / "out").exists() else []
    assert not set(left) - {".world.parts"}  # what is read is kept for the next run, and hidden


def test_bad_episodes_are_left_out_where_that_is_asked_for(tmp_path):
    folder = sources.write_npz(tmp_path / "walks", sources.walks([9] * 5), action=nan_at(4))
    said = []
    manifest = make(tmp_path / "world", f"npz:{folder}", drop_bad=True, said=said)
    assert manifest.source["dropped"] == {"with something wrong": 1}
    assert check_walk(manifest) == 12
    assert any(line.startswith("warning: walk-1: left out: ") for line in said)
    assert said[-1] == "episodes left out: 1 with something wrong"


def test_short_and_equal_episodes_are_left_out_and_counted(tmp_path):
    episodes = sources.walks([9, 2, 9, 9])
    folder = sources.write_npz(tmp_path / "walks", [*episodes, episodes[0]])
    manifest = make(tmp_path / "world", f"npz:{folder}")
    assert manifest.source["dropped"] == {"shorter than a clip": 1, "the same as another": 1}
    short = sources.write_npz(tmp_path / "short", sources.walks([9, 2, 2]))
    with pytest.raises(DataError, match="1 of 3 episodes can be used .*2 shorter than a clip.*9 s"):
        make(tmp_path / "no", f"npz:{short}")
    assert not (tmp_path / "no").exists()


@pytest.mark.parametrize("version", [2, 3])
def test_lerobot_folders_of_both_versions(tmp_path, version):
    episodes = sources.walks([7, 9, 8, 7, 10])
    write = sources.write_lerobot_v2 if version == 2 else sources.write_lerobot_v3
    folder = write(tmp_path / "robot", episodes)
    manifest = make(tmp_path / "world", str(folder), conditions=["action", "proprio"], stride=1)
    assert manifest.source["kind"] == "lerobot" and manifest.content.interval_s == 1 / sources.FPS
    assert check_walk_of_video(manifest) == sum(length - 2 for length in (7, 9, 8, 7, 10))
    assert manifest.content.outcomes == ("reward", "terminated")


def test_lerobot_pictures_may_stand_in_the_table(tmp_path):
    folder = sources.write_lerobot_images(tmp_path / "robot", sources.walks([7, 9, 8]))
    manifest = make(tmp_path / "world", str(folder), conditions=["action", "proprio"], stride=1)
    assert check_walk_of_video(manifest) == 5 + 7 + 6
    table = folder / "data/chunk-000/episode_000001.parquet"
    sources.damage_picture(table, step=3)
    with pytest.raises(DataError, match="episode 1, step 3: observation.images.top: no readable"):
        make(tmp_path / "other", str(folder))


def check_walk_of_video(manifest):
    """As check_walk, for pictures that a codec has changed: places are exact, rewards are told by
    the place at the step itself (next.reward stands in the row of its action).
    """
    count = 0
    for frames, conditions, outcomes, about in clips(manifest):
        places = np.array([place_of(frame) for frame in frames])
        expected = np.clip(places[:-1] + conditions["action"], 0, 16 - SIDE)
        assert np.array_equal(expected, places[1:]), about
        assert np.array_equal(conditions["proprio"], places[:-1])
        assert np.array_equal(outcomes["reward"], places[:-1].sum(1))
        assert not outcomes["terminated"].any()
        count += 1
    return count


def test_a_video_and_its_table_must_be_of_one_length(tmp_path):
    episodes = sources.walks([7, 9, 8])
    short = sources.write_lerobot_v2(tmp_path / "short", episodes, video_frames=[8, 7, 9])
    with pytest.raises(DataError, match="episode 1 has 7 frames in its video.*10 rows in its t"):
        make(tmp_path / "world", str(short))
    long = sources.write_lerobot_v2(tmp_path / "long", episodes)
    lines = (long / "meta/episodes.jsonl").read_text().splitlines()
    lines[1] = json.dumps({"episode_index": 1, "length": 6})
    (long / "meta/episodes.jsonl").write_text("\n".join(lines))
    with pytest.raises(DataError, match="episode 1 has 10 frames in its video.*6 rows in its ta"):
        make(tmp_path / "world", str(long))
    listed = sources.write_lerobot_v3(tmp_path / "v3", episodes, lengths=[8, 10, 20])
    with pytest.raises(DataError, match="episode 2 has 9 frames in its video.*20 rows in its t"):
        make(tmp_path / "world", str(listed))
    assert not (tmp_path / "world").exists()


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"codebase_version": "v1.6"}, "codebase_version is .*v1.6.*: versions 2.0, 2.1 and 3.0"),
        ({"fps": 0}, "fps is 0: expected a number above 0"),
        ({"data_path": "../{episode_index}.parquet"}, "refused, it leads out of the dataset"),
        ({"data_path": "data/{nobody}.parquet"}, "data_path is .*places for nobody; known are"),
        ({"data_path": "data/{episode_index}.parquet"}, "is missing; copy the dataset again"),
    ],
)
def test_a_lerobot_info_that_cannot_be_right(tmp_path, changes, expected):
    folder = sources.write_lerobot_v2(tmp_path / "robot", sources.walks([7, 9, 8]))
    sources.write_info(folder, "v2.1", **changes)
    with pytest.raises(DataError, match=expected):
        make(tmp_path / "world", str(folder))


def test_an_unknown_camera_or_key_says_what_there_is(tmp_path):
    folder = sources.write_lerobot_v2(tmp_path / "robot", sources.walks([7, 9, 8]))
    with pytest.raises(DataError, match="has no front; --camera takes one of: observation.images"):
        make(tmp_path / "world", str(folder), keys={"frames": "front"})
    with pytest.raises(DataError, match="has no gripper by a usual name; --map gripper= takes one"):
        make(tmp_path / "world", str(folder), conditions=["gripper"])
    info = json.loads((folder / "meta/info.json").read_text())
    features = info["features"] | {"observation.images.wrist": {"dtype": "video"}}
    sources.write_info(folder, "v2.1", features=features)
    with pytest.raises(DataError, match="has several cameras, .*top, .*wrist: name one"):
        make(tmp_path / "world", str(folder))


@needs_h5py
@pytest.mark.parametrize("layout", ["flat", "groups"])
def test_hdf5_in_both_layouts(tmp_path, layout):
    import h5py

    episodes = sources.walks([9, 8, 11])
    with h5py.File(tmp_path / "walks.h5", "w") as file:
        lengths = [len(frames) for frames, _, _ in episodes]
        padding = [padded(MOVES[moves].astype(float), np.nan, front=False)
                   for _, moves, _ in episodes]  # fmt: skip
        if layout == "flat":
            file["pixels"] = np.concatenate([frames for frames, _, _ in episodes])
            file["action"] = np.concatenate(padding)
            file["ep_len"] = np.array(lengths)
            file["ep_offset"] = np.cumsum([0, *lengths[:-1]])
        else:
            for number, ((frames, _, _), actions) in enumerate(zip(episodes, padding)):
                file[f"data/demo_{number}/obs/eye_image"] = frames
                file[f"data/demo_{number}/actions"] = actions
            file["mask/train"] = np.arange(3)  # beside the episodes, and none
    keys = {"frames": "obs/eye_image"} if layout == "groups" else {}
    manifest = make(tmp_path / "world", str(tmp_path / "walks.h5"), keys=keys, stride=1)
    assert check_walk(manifest) == 7 + 6 + 9
    assert manifest.source["kind"] == "hdf5" and manifest.content.outcomes == ()


@pytest.mark.skipif(importlib.util.find_spec("minari") is None, reason="minari is not installed")
def test_minari_datasets_of_its_own_writer(tmp_path, monkeypatch):
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "minari"))
    sources.write_minari("walk/test-v0", sources.walks([9] * 4))
    manifest = make(tmp_path / "world", f"minari:{tmp_path}/minari/walk/test-v0",
                    conditions=["action", "proprio"])  # fmt: skip
    condition = manifest.content.conditions[0]
    assert condition.is_discrete and condition.num_values == len(MOVES)
    assert check_walk(manifest, discrete=True) == 12
    assert any(outcomes["terminated"].any() for _, _, outcomes, _ in clips(manifest))


@pytest.fixture
def tool(tmp_path, monkeypatch, capsys):
    """tool(*arguments) runs tools/make_world_shards.py in tmp_path: (exit code, output, errors)."""
    (tmp_path / "worlds_env.py").write_text(sources.ENV_MODULE)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "worlds_env", raising=False)
    monkeypatch.chdir(tmp_path)

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", [TOOL.name, *arguments])
        code = runpy.run_path(str(TOOL))["main"]()
        said = capsys.readouterr()
        return code, said.out, said.err

    return run


RECORD = ["record", "--env", sources.REGISTERED, "--episodes", "4", "--steps", "9", "--size", "16",
          "--context-length", "3", "--encoder", "raw", "--workers", "1"]  # fmt: skip


@needs_gymnasium
def test_a_recording_is_the_environment_as_it_was_played(tmp_path, tool):
    code, said, errors = tool(*RECORD, "--output", "world", "--conditions", "action", "proprio",
                              "--policy", "sticky", "--stickiness", "0.7")  # fmt: skip
    assert code == 0, errors
    manifest = load_manifest(tmp_path / "world")
    assert check_walk(manifest, discrete=True) == 12
    condition = manifest.content.conditions[0]
    assert condition.num_values == len(MOVES) and manifest.content.interval_s == 0.2
    lines = said.splitlines()
    kinds = "action (5 values), proprio (2 numbers)"
    assert lines[-3] == f"conditions: {kinds}; kept: reward, terminated"
    assert lines[-4] == f"frames: {manifest.source['keys'][FRAMES]}"
    assert lines[-2] == "episodes left out: none"
    repeated = [
        (e.conditions["action"][1:] == e.conditions["action"][:-1]).mean()
        for e in (read_episode(manifest, info) for info in episodes_of(manifest))
    ]
    assert np.mean(repeated) > 0.4  # a random policy repeats one action in five


@needs_gymnasium
def test_the_recording_that_the_page_shows(tmp_path, tool):
    pytest.importorskip("pygame", reason="pygame, which draws CartPole, is not installed")
    page = (TOOL.parents[1] / "docs" / "worlds.md").read_text(encoding="utf-8")
    shown = r"^    python tools/make_world_shards.py (record.* data/pole)$"
    (command,) = re.findall(shown, page, re.M)
    small = ["--episodes", "3", "--context-length", "4", "--workers", "1"]
    code, _, errors = tool(*shlex.split(command), *small)
    assert code == 0, errors
    manifest = load_manifest(tmp_path / "data" / "pole")
    (info, *_) = episodes_of(manifest)
    episode = read_episode(manifest, info)
    # A push changes the velocity at once.
    pushes = np.sign(np.diff(episode.conditions["proprio"][:, 1]))
    assert np.array_equal(pushes, 2 * episode.conditions["action"][:-1, 0].astype(int) - 1)
    assert (episode.frames[0] != episode.frames[-1]).any()


@needs_gymnasium
def test_a_scripted_policy_acts_on_what_it_sees(tmp_path, tool):
    (tmp_path / "policies.py").write_text(
        textwrap.dedent(
            """
            import numpy as np
            def home(observation, step, generator, env):
                return np.clip(-observation, -1, 1)
            def lost(observation, step, generator, env):
                return [2.0, 0.0]
            def broken(observation, step, generator, env):
                return observation["nothing"]
            """
        )
    )
    command = [*RECORD, "--env-option", "continuous=true", "--policy"]
    code, _, errors = tool(*command, "scripted:policies.py:home", "--output", "world")
    assert code == 0, errors
    manifest = load_manifest(tmp_path / "world")
    assert check_walk(manifest) == 12
    episode = read_episode(manifest, episodes_of(manifest)[0])
    assert place_of(episode.frames[-1]) < place_of(episode.frames[0])
    for name, expected in [
        (
            "lost",
            "step 0: the policy scripted:policies.py:lost gives [2.0, 0.0], which is no action",
        ),
        ("broken", "step 0: the policy scripted:policies.py:broken fails: IndexError"),
        ("nobody", "policies.py: has no function nobody; it has home, lost, broken"),
    ]:
        code, _, errors = tool(*command, f"scripted:policies.py:{name}", "--output", "other")
        assert code == 2 and expected in errors and errors.count("\n") == 1
    assert not (tmp_path / "other").exists()


@needs_gymnasium
@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--env", "Nobody-v0"], "the environment Nobody-v0 cannot be made: "),
        (["--env", "nobody_has_this:X-v0"], "needs the package nobody_has_this; install it with"),
        (["--env", "swm/PushT-v1"], "needs the package stable-worldmodel; install it with: python"),
        (["--env-option", "fails_at=2"], "step 2: the environment fails: RuntimeError: the wheel"),
        (["--policy", "clever"], "policy clever: must be random, sticky or scripted:FILE.py:FUNC"),
        (["--camera", "observation/eye"], "has no observation/eye; --camera takes one of: action"),
        (["--conditions", "action", "mood"], "has no mood by a usual name; --map mood= takes one"),
        (["--map", "mood=info/count"], "--map mood: names a column that is not taken"),
        (["--shifted", "mood"], "--shifted mood: is no column that is taken"),
        (["--stickiness", "1.5"], "stickiness is 1.5: must be from 0 to below 1"),
        (["--context-length", "20"], "0 of 4 episodes can be used (4 shorter than a clip"),
        (["--steps", "0"], "steps is 0: must be above 0"),
        (["--conditions", "Action"], "condition Action: expected small letters"),
    ],
)
def test_a_recording_that_cannot_be_is_one_line(tmp_path, tool, arguments, expected):
    code, _, errors = tool(*RECORD, *arguments, "--output", "world")
    assert code == 2 and expected in errors, errors
    assert errors.splitlines()[-1] == errors.strip() or "warning: " in errors
    assert not (tmp_path / "world").exists()


@pytest.mark.parametrize(
    ("name", "module"),
    [
        ("ALE/Pong-v5", "ale_py"),
        ("MiniGrid-DoorKey-5x5-v0", "minigrid"),
        ("PointMaze_UMaze-v3", "gymnasium_robotics"),
        ("FetchReach-v4", "gymnasium_robotics"),
        ("dm_control/cartpole-swingup-v0", "shimmy"),
    ],
)
def test_the_package_that_registers_an_environment_is_found_by_its_name(monkeypatch, name, module):
    asked = []

    def needed(module, package, what):
        asked.append(module)
        if module != "gymnasium":
            raise DataError(f"{what} needs the package {package}")

    monkeypatch.setattr(environments, "needed", needed)
    with pytest.raises(DataError, match=f"the environment {name} needs the package"):
        environments.make_environment(name, {})
    assert asked == ["gymnasium", module]


class Stopping:
    """A source of walks that stands still at the third, and says which process does."""

    def __init__(self, source, folder):
        self.source, self.folder = source, folder
        self.kind, self.name, self.fps = source.kind, source.name, source.fps
        self.digest, self.groups, self.keys = source.digest, source.groups, source.keys

    def read(self, group, moved):
        if group == self.groups[2]:
            (self.folder / "stands-still").write_text(str(os.getpid()))
            time.sleep(600)
        yield from self.source.read(group, moved)


def test_a_killed_preparation_goes_on_with_what_is_missing(tmp_path):
    folder = sources.write_npz(tmp_path / "walks", sources.walks([9] * 4))
    whole = make(tmp_path / "whole", f"npz:{folder}").folder
    stopping = Stopping(open_source(f"npz:{folder}", Wanted()), tmp_path)
    running = multiprocessing.get_context("fork").Process(
        target=make, args=(tmp_path / "world", stopping)
    )
    running.start()
    mark = tmp_path / "stands-still"
    deadline = time.monotonic() + 120
    while not (mark.exists() and mark.read_text()) and time.monotonic() < deadline:
        time.sleep(0.02)
    for process in (running.pid, int(mark.read_text())):
        os.kill(process, signal.SIGKILL)
    running.join(20)
    assert not (tmp_path / "world").exists()
    said = []
    again = make(tmp_path / "world", f"npz:{folder}", said=said).folder
    assert "2 of 4 episodes were read by an earlier run" in said
    for file in whole.rglob("*"):
        if file.is_file():
            assert file.read_bytes() == (again / file.relative_to(whole)).read_bytes()
    assert not list(tmp_path.glob(".*"))


def test_a_dataset_like_another_shares_its_encoder_and_statistics(tmp_path):
    first = make(tmp_path / "a", f"npz:{sources.write_npz(tmp_path / 'x', sources.walks([9] * 4))}")
    folder = sources.write_npz(tmp_path / "y", sources.walks([9] * 4, seed=50))
    wanted = Wanted()
    config = WorldDatasetConfig(context_length=3)
    path = make_world_dataset(
        open_source(f"npz:{folder}", wanted), wanted, tmp_path / "b", config, like=first.path,
        workers=1, report=lambda line: None,
    )  # fmt: skip
    assert load_manifest(path).content.identity == first.content.identity
    wanted = Wanted(("action", "proprio"))
    both = ColumnConfig(("action", "proprio"))
    with pytest.raises(DataError, match="has the conditions action .continuous, 2., these episode"):
        make_world_dataset(
            open_source(f"npz:{folder}", wanted), wanted, tmp_path / "c",
            WorldDatasetConfig(context_length=3, columns=both), like=first.path, workers=1,
            report=lambda line: None,
        )  # fmt: skip


@pytest.mark.parametrize(
    ("damage", "expected"),
    [
        (lambda path: path.unlink(), "cannot read the episode"),
        (lambda path: path.write_bytes(path.read_bytes()[:-9]), "sha256 of the episode is"),
    ],
)
def test_a_damaged_episode_is_found(tmp_path, damage, expected):
    folder = sources.write_npz(tmp_path / "walks", sources.walks([9] * 4))
    manifest = make(tmp_path / "world", f"npz:{folder}")
    damage(tmp_path / "world" / episodes_of(manifest)[0].path)
    (problem,) = verify_dataset(manifest.path)[0]
    assert expected in problem
    with pytest.raises(DataError, match=expected):
        read_episode(manifest, episodes_of(manifest)[0])


def test_a_path_without_episodes_says_what_is_looked_for(tmp_path):
    with pytest.raises(DataError, match="no such file or folder; give minari:PATH"):
        open_source("nowhere", Wanted())
    (tmp_path / "a.txt").touch()
    with pytest.raises(DataError, match="no episodes found: no meta/info.json"):
        open_source(str(tmp_path), Wanted())
    with pytest.raises(DataError, match="holds no .npz file"):
        open_source(f"npz:{tmp_path}", Wanted())


@pytest.mark.parametrize(
    "shape, is_picture",
    [
        ((7, 7, 3), False),  # MiniGrid: object, colour and state of a cell
        ((21, 79), False),  # NetHack: letters on a screen
        ((10, 10, 4), False),  # MinAtar
        ((24, 32, 3), True),
        ((3, 64, 64), True),
        ((84, 84), True),
    ],
)
def test_small_arrays_of_bytes_are_codes_and_no_pictures(shape, is_picture):
    """Frames are drawn then; whoever wants the codes names them."""
    observation = {"image": np.zeros(shape, np.uint8), "direction": 2}
    keys = environments.chosen_keys(Wanted(), observation, {}, "a world")
    assert keys[FRAMES] == ("observation/image" if is_picture else "render")
    named = Wanted(keys={FRAMES: "observation/image"})
    keys = environments.chosen_keys(named, observation, {}, "a world")
    assert keys[FRAMES] == "observation/image"
