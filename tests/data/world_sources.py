"""Episodes as other tools leave them, made for tests: LeRobot folders, HDF5 and npz files, a Minari
dataset, an environment.

All show walks of worlds.py: the place of the square in a picture tells which frame it is, and the
next place what the action between them was.
"""

import json

import numpy as np
from recordings import write as write_video
from worlds import BRIGHT, MOVES, SIDE, walk

from ebwm_scale.data.format.content import encode_image

CAMERA = "observation.images.top"
FPS = 20  # of recordings.py
BIG = 64  # a video codec wants more pixels than 16 x 16


def big(frames, times=BIG // 16):
    """Frames with every pixel as a square of pixels, which a video codec keeps well enough."""
    return frames.repeat(times, axis=1).repeat(times, axis=2)


def walks(lengths, seed=100):
    return [walk(length, seed=seed + number) for number, length in enumerate(lengths)]


def rows_of(number, frames, moves, places, *, action=None):
    """The rows of an episode's table: one for each frame; the last action leads nowhere."""
    count = len(frames)
    actions = np.concatenate([MOVES[moves], [[9, 9]]]) if action is None else action
    return {
        "action": [list(map(float, row)) for row in actions],
        "observation.state": [list(map(float, place)) for place in places],
        "next.reward": [float(sum(place)) for place in places],
        "next.done": [False] * (count - 1) + [True],
        "timestamp": [step / FPS for step in range(count)],
        "frame_index": list(range(count)),
        "episode_index": [number] * count,
    }


def write_table(path, columns):
    import pyarrow
    import pyarrow.parquet

    path.parent.mkdir(parents=True, exist_ok=True)
    pyarrow.parquet.write_table(pyarrow.table(columns), path)


def write_info(folder, version, **changes):
    v3 = version.startswith("v3")
    info = {
        "codebase_version": version,
        "fps": FPS,
        "chunks_size": 1000,
        "data_path": "data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet"
        if v3
        else "data/chunk-{episode_chunk:03d}/episode_{episode_index:06d}.parquet",
        "video_path": "videos/{video_key}/chunk-{chunk_index:03d}/file-{file_index:03d}.mp4"
        if v3
        else "videos/chunk-{episode_chunk:03d}/{video_key}/episode_{episode_index:06d}.mp4",
        "features": {
            CAMERA: {"dtype": "video", "shape": [BIG, BIG, 3]},
            "action": {"dtype": "float32", "shape": [2]},
            "observation.state": {"dtype": "float32", "shape": [2]},
            "next.reward": {"dtype": "float32", "shape": [1]},
            "next.done": {"dtype": "bool", "shape": [1]},
            "timestamp": {"dtype": "float32", "shape": [1]},
        },
    } | changes
    (folder / "meta").mkdir(parents=True, exist_ok=True)
    (folder / "meta" / "info.json").write_text(json.dumps(info))
    return info


def write_lerobot_v2(folder, episodes, *, actions=None, video_frames=None):
    """A folder of version 2.1. actions: per episode, in place of the walk's own. video_frames: per
    episode, how many its video has.
    """
    write_info(folder, "v2.1")
    lines = []
    for number, (frames, moves, places) in enumerate(episodes):
        action = None if actions is None else actions[number]
        table = folder / f"data/chunk-000/episode_{number:06d}.parquet"
        write_table(table, rows_of(number, frames, moves, places, action=action))
        video = folder / f"videos/chunk-000/{CAMERA}/episode_{number:06d}.mp4"
        video.parent.mkdir(parents=True, exist_ok=True)
        count = len(frames) if video_frames is None else video_frames[number]
        write_video(video, list(big(frames))[:count])
        lines.append({"episode_index": number, "tasks": ["walk"], "length": len(frames)})
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (folder / "meta" / "episodes.jsonl").write_text(text)
    return folder


def write_lerobot_v3(folder, episodes, *, per_file=2, lengths=None):
    """A folder of version 3.0, with several episodes in a file. lengths: what its list says."""
    write_info(folder, "v3.0")
    entries = []
    for file in range(-(-len(episodes) // per_file)):
        numbers = range(file * per_file, min((file + 1) * per_file, len(episodes)))
        pictures, columns = [], {}
        for number in numbers:
            frames, moves, places = episodes[number]
            entries.append(
                {
                    "episode_index": number,
                    "length": len(frames) if lengths is None else lengths[number],
                    "data/chunk_index": 0,
                    "data/file_index": file,
                    f"videos/{CAMERA}/chunk_index": 0,
                    f"videos/{CAMERA}/file_index": file,
                    f"videos/{CAMERA}/from_timestamp": len(pictures) / FPS,
                    f"videos/{CAMERA}/to_timestamp": (len(pictures) + len(frames)) / FPS,
                }
            )
            pictures += list(big(frames))
            for key, rows in rows_of(number, frames, moves, places).items():
                columns.setdefault(key, []).extend(rows)
        write_table(folder / f"data/chunk-000/file-{file:03d}.parquet", columns)
        video = folder / f"videos/{CAMERA}/chunk-000/file-{file:03d}.mp4"
        video.parent.mkdir(parents=True, exist_ok=True)
        write_video(video, pictures)
    table = {key: [entry[key] for entry in entries] for key in entries[0]}
    write_table(folder / "meta/episodes/chunk-000/file-000.parquet", table)
    return folder


def write_lerobot_images(folder, episodes):
    """A folder of version 2.1 whose pictures stand in its tables."""
    info = write_info(folder, "v2.1")
    write_info(folder, "v2.1", features=info["features"] | {CAMERA: {"dtype": "image"}})
    lines = []
    for number, (frames, moves, places) in enumerate(episodes):
        rows = rows_of(number, frames, moves, places)
        rows[CAMERA] = [{"bytes": encode_image(f, "png", 90), "path": None} for f in frames]
        write_table(folder / f"data/chunk-000/episode_{number:06d}.parquet", rows)
        lines.append(json.dumps({"episode_index": number, "length": len(frames)}))
    (folder / "meta" / "episodes.jsonl").write_text("\n".join(lines))
    return folder


def damage_picture(path, *, step):
    """Cuts a picture of a table off."""
    import pyarrow.parquet

    columns = pyarrow.parquet.read_table(path).to_pydict()
    columns[CAMERA][step]["bytes"] = columns[CAMERA][step]["bytes"][:-30]
    write_table(path, columns)


def write_npz(folder, episodes, **changes):
    """An .npz file for each episode. changes: of its arrays, by key: values or function of them."""
    folder.mkdir(parents=True, exist_ok=True)
    for number, (frames, moves, places) in enumerate(episodes):
        arrays = {
            "frames": frames,
            "action": MOVES[moves].astype(np.float32),
            "reward": places[1:].sum(1).astype(np.float32),
            "state": places.astype(np.float32),
        }
        for key, change in changes.items():
            value = change(number, arrays) if callable(change) else change
            if value is None:
                del arrays[key]
            else:
                arrays[key] = value
        np.savez(folder / f"walk-{number}.npz", **arrays)
    return folder


def write_minari(name, episodes):
    """A dataset of Minari, below MINARI_DATASETS_PATH; each episode ends in a terminal state."""
    import gymnasium
    import minari
    from minari.data_collector import EpisodeBuffer

    buffers = []
    for number, (frames, moves, places) in enumerate(episodes):
        ends = [False] * (len(moves) - 1) + [True]
        buffers.append(
            EpisodeBuffer(
                id=number,
                observations={"pixels": frames, "state": places.astype(np.float32)},
                actions=moves,
                rewards=places[1:].sum(1).astype(float).tolist(),
                terminations=ends,
                truncations=[False] * len(moves),
            )
        )
    picture = gymnasium.spaces.Box(0, 255, episodes[0][0].shape[1:], np.uint8)
    state = gymnasium.spaces.Box(0, 16, (2,), np.float32)
    minari.create_dataset_from_buffers(
        name,
        buffer=buffers,
        observation_space=gymnasium.spaces.Dict({"pixels": picture, "state": state}),
        action_space=gymnasium.spaces.Discrete(len(MOVES)),
    )


REGISTERED = "worlds_env:ebwm/Walk-v0"

ENV_MODULE = f'''
"""An environment for tests: a square that its actions move."""
import gymnasium
import numpy as np

MOVES = np.array({MOVES.tolist()})

class Walk(gymnasium.Env):
    metadata = {{"render_modes": ["rgb_array"], "render_fps": 5}}
    def __init__(self, render_mode=None, fails_at=None, continuous=False, ends_at=None):
        self.render_mode = render_mode
        self.fails_at, self.ends_at, self.continuous = fails_at, ends_at, continuous
        self.observation_space = gymnasium.spaces.Box(0, 16, (2,), np.float32)
        self.action_space = gymnasium.spaces.Discrete(len(MOVES))
        if continuous:
            self.action_space = gymnasium.spaces.Box(-1, 1, (2,), np.float32)
    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.place = self.np_random.integers(16 - {SIDE} + 1, size=2)
        self.count = 0
        return self.place.astype(np.float32), {{"count": 0}}
    def step(self, action):
        if self.count == self.fails_at:
            raise RuntimeError("the wheel\\nfell off")
        move = np.rint(action).astype(int) if self.continuous else MOVES[action]
        self.place = np.clip(self.place + move, 0, 16 - {SIDE})
        self.count += 1
        done = self.count == self.ends_at
        info = {{"count": self.count}}
        return self.place.astype(np.float32), float(self.place.sum()), done, False, info
    def render(self):
        frame = np.zeros((16, 16, 3), np.uint8)
        frame[:, :, 2] = 40
        row, column = self.place
        frame[row:row + {SIDE}, column:column + {SIDE}] = {BRIGHT}
        return frame

gymnasium.register("ebwm/Walk-v0", entry_point="worlds_env:Walk", max_episode_steps=1000)
'''
