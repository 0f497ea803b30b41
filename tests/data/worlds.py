"""Small worlds for tests: a square that its actions move over a frame, written as the format says.

The square stands at whole pixels, so a picture tells exactly where it is, and an action exactly
where it goes.
"""

import json

import numpy as np
import torch

from ebwm_scale.data.encoders import build_encoder
from ebwm_scale.data.format.content import encode_image, field_names
from ebwm_scale.data.format.manifest import FORMAT_VERSION
from ebwm_scale.data.format.writer import ShardWriter, write_manifest

MOVES = np.array([[0, 0], [1, 0], [-1, 0], [0, 1], [0, -1]])  # of the square, rows and columns
SIDE = 4  # of the square
BRIGHT = 250


def walk(num_steps, *, size=16, seed=0):
    """(frames uint8 (T + 1, size, size, 3), moves int (T,), places int (T + 1, 2))."""
    draws = np.random.Generator(np.random.PCG64(seed))
    moves = draws.integers(len(MOVES), size=num_steps)
    places = np.empty((num_steps + 1, 2), np.int64)
    places[0] = draws.integers(size - SIDE + 1, size=2)
    for step, move in enumerate(moves):
        places[step + 1] = np.clip(places[step] + MOVES[move], 0, size - SIDE)
    frames = np.zeros((num_steps + 1, size, size, 3), np.uint8)
    for frame, (row, column) in zip(frames, places):
        frame[:, :, 2] = 40
        frame[row : row + SIDE, column : column + SIDE] = BRIGHT
    return frames, moves, places


def place_of(frame):
    """(row, column) of the square in a frame (size, size, 3)."""
    rows, columns = np.nonzero(frame[:, :, 0] > BRIGHT // 2)
    return int(rows.min()), int(columns.min())


def write_world(folder, *, num_clips=12, context_length=4, size=16, patch=8, stored="embedding",
                discrete=False, proprio=True, outcomes=True, patches=True,
                changes=None):  # fmt: skip
    """The manifest's path of a dataset of walks with the encoder raw; a walk is a clip.

    changes: of the manifest's values, by key.
    """
    folder.mkdir(parents=True, exist_ok=True)
    encoder = build_encoder("raw", {"patch": patch}, height=size, width=size, patches=patches)
    num_patches = 1 if encoder.grid is None else encoder.grid[0] * encoder.grid[1]
    walks = [walk(context_length, size=size, seed=seed) for seed in range(num_clips)]
    split_of = {"train": walks[: num_clips * 3 // 4], "validation": walks[num_clips * 3 // 4 :]}
    embeddings = encoder.encode(torch.from_numpy(np.concatenate([w[0] for w in walks])))
    rows = embeddings.flatten(0, -2).numpy()
    splits, stored_actions = {}, []
    for name, members in split_of.items():
        writer = ShardWriter(folder, name, samples_per_shard=5)
        for number, (frames, moves, places) in enumerate(members):
            fields = {}
            *names, about = field_names(stored, context_length + 1)
            if stored == "embedding":
                states = encoder.encode(torch.from_numpy(frames)).flatten(0, -2)
                fields[names[0]] = states.numpy().astype(np.float16)
            else:
                fields = {n: encode_image(f, stored, 95) for n, f in zip(names, frames)}
            action = MOVES[moves].astype("<f4")
            stored_actions.append(action)
            fields["action.npy"] = moves[:, None].astype("<u4") if discrete else action
            if proprio:
                fields["proprio.npy"] = places[:-1].astype("<f4")
            if outcomes:
                fields["reward.npy"] = places[1:].sum(1).astype("<f4")
                fields["terminated.npy"] = np.zeros(context_length, np.uint8)
            said = {"episode": f"walk-{number}", "start_step": 0, "start_s": 0.0}
            fields[about] = json.dumps({"video": said["episode"], **said}).encode()
            writer.add(fields, num_targets=context_length * num_patches)
        splits[name] = {
            "shards": writer.close(),
            "num_videos": len(members),
            "num_samples": writer.num_samples,
            "num_targets": writer.num_samples * context_length * num_patches,
        }
    actions = np.concatenate(stored_actions)
    condition = {"name": "action", "kind": "continuous", "width": 2,
                 "mean": actions.mean(0).tolist(), "std": actions.std(0).tolist()}  # fmt: skip
    if discrete:
        condition = {"name": "action", "kind": "discrete", "width": 1, "num_values": len(MOVES)}
    conditions = [condition]
    if proprio:
        conditions.append({"name": "proprio", "kind": "continuous", "width": 2,
                           "mean": [6.0, 6.0], "std": [3.0, 3.0]})  # fmt: skip
    values = {
        "format_version": FORMAT_VERSION,
        "modality": "video",
        "block_length": (context_length + 1) * num_patches,
        "source": {"generator": "walk"},
        "dimension": encoder.dimension,
        "encoder": {"name": "raw", "settings": encoder.settings},
        "frames": {"stored": stored, "height": size, "width": size, "interval_s": 0.1},
        "statistics": {
            "mean": rows.mean(0).tolist(),
            "std": np.maximum(rows.std(0), 1e-3).tolist(),
        },
        "conditions": conditions,
        "splits": splits,
    }
    if outcomes:
        values["outcomes"] = ["reward", "terminated"]
    if encoder.grid is not None:
        values |= {"group_size": num_patches, "grid": list(encoder.grid)}
    values |= changes or {}
    write_manifest(folder, values)
    return folder / "manifest.json"
