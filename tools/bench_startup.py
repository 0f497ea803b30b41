"""Start-up of a run on a dataset of very many shards: seconds and megabytes of rank 0, and of every
other rank.

    python tools/bench_startup.py --shards 1000000 --ranks 1024 --output results/startup.json
        [--before CHECKOUT]

Makes a dataset folder of that many shards (hard links to one file: only their names and sizes are
asked for), opens it as rank 0 does, and hands what rank 0 sends to one process after the other,
forked as if they were others of the ranks, evenly spaced: each unpacks it, finds the shards of its
first global batch, and reads what the manifest says of them. What the network adds is not in it:
the bytes sent are. Also measures the memory of an open index of 100,000 samples.

--before: the folder of another checkout of this project, whose opening of the same dataset, with
  the list of shards in manifest.json, is measured too (every rank did the same there).
"""

from __future__ import annotations

import json
import os
import pickle
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from ebwm_scale.core.arguments import ArgumentParser
from ebwm_scale.core.provenance import provenance

SAMPLES, SIZE, INDEX_SIZE = 4096, 6_553_600, 1000
INDEX_SAMPLES = 100_000
INLINE = "inline.json"
OPEN = """
import json, re, sys, time
from pathlib import Path
from ebwm_scale.data.format.shards import open_split
peak_kib = lambda: int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])
before = peak_kib()
start = time.monotonic()
split = open_split(Path(sys.argv[1]), "train", verify="sizes")
seconds = time.monotonic() - start
more = peak_kib() - before
peak_mib = round(more / 1024, 1)
print(json.dumps({"seconds": round(seconds, 2), "peak_mib": peak_mib, "samples": len(split)}))
"""
INDEX = """
import gc, json, sys, time, tracemalloc
from pathlib import Path
from ebwm_scale.data.format.shards import open_split
split = open_split(Path(sys.argv[1]), "train", verify="sizes")
tracemalloc.start()
before = tracemalloc.get_traced_memory()[0]
start = time.monotonic()
split.read(5)
seconds = time.monotonic() - start
gc.collect()
kept = tracemalloc.get_traced_memory()[0] - before
print(json.dumps({"mib": round(kept / 2**20, 2), "samples": len(split)}))
"""


def main() -> int:
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("--shards", type=int, default=1_000_000, metavar="N")
    parser.add_argument("--ranks", type=int, default=1024, metavar="N")
    parser.add_argument(
        "--measured", type=int, default=64, metavar="N", help="of the other ranks (default 64)"
    )
    parser.add_argument(
        "--dataset",
        type=Path,
        default=None,
        metavar="DIR",
        help="keep the dataset, or use it again",
    )
    parser.add_argument("--before", type=Path, default=None, metavar="CHECKOUT")
    parser.add_argument("--output", type=Path, default=None, metavar="FILE")
    arguments = parser.parse_args()
    result = provenance("numpy")
    with tempfile.TemporaryDirectory(prefix="ebwm_startup_") as scratch:
        folder = arguments.dataset or Path(scratch) / "dataset"
        inline = folder / INLINE
        if not inline.exists():
            say(f"making {arguments.shards} shards")
            make_dataset(folder, arguments.shards)
        index_manifest = make_index_dataset(Path(scratch) / "index")
        result["shards"], result["ranks"] = arguments.shards, arguments.ranks
        result["manifest"] = {
            "in_one_file_mib": mib(inline.stat().st_size),
            "head_mib": mib((folder / "manifest.json").stat().st_size),
            "parts": len(list(folder.glob("*.shards.json"))),
        }
        say("opening as rank 0")
        result["rank_0"] = in_new_process(OPEN, folder / "manifest.json")
        result["rank_0_list_in_one_file"] = in_new_process(OPEN, inline)
        step = max(1, arguments.ranks // arguments.measured)
        ranks = range(1, arguments.ranks, step)
        say(f"starting {len(ranks)} of {arguments.ranks - 1} other ranks")
        result |= other_ranks(folder / "manifest.json", ranks, arguments.ranks)
        result["index_of_100000_samples"] = in_new_process(INDEX, index_manifest)
        if arguments.before:
            say("opening with the other checkout")
            result["before"] = {
                "every_rank": in_new_process(OPEN, inline, arguments.before),
                "index_of_100000_samples": in_new_process(INDEX, index_manifest, arguments.before),
            }
    print(json.dumps(result, indent=1))
    if arguments.output:
        arguments.output.write_text(json.dumps(result, indent=1) + "\n")
    return 0


def make_dataset(folder: Path, num_shards: int) -> None:
    """Writes manifest.json with its parts, and INLINE, the same with the list in it."""
    from ebwm_scale.data.format.writer import write_manifest

    folder.mkdir(parents=True)
    shards = []
    for number in range(num_shards):
        name = f"train-{number:07d}"
        if number % 50_000 == 0:  # a file has at most 65,000 names on common file systems
            tar, index = folder / f".{name}.tar", folder / f".{name}.index"
            for path, size in ((tar, SIZE), (index, INDEX_SIZE)):
                path.touch()
                os.truncate(path, size)
        os.link(tar, folder / f"{name}.tar")
        os.link(index, folder / f"{name}.index.json")
        shards.append(shard_entry(name, f"{number:064x}"))
    values = described(shards, num_shards * SAMPLES)
    write_manifest(folder, values)
    with (folder / INLINE).open("w") as file:
        json.dump(values, file)


def shard_entry(name: str, sha256: str) -> dict:
    return {
        "path": f"{name}.tar",
        "num_samples": SAMPLES,
        "num_targets": SAMPLES * 256,
        "size": SIZE,
        "sha256": sha256,
        "index_path": f"{name}.index.json",
        "index_sha256": sha256[::-1],
    }


def described(shards: list[dict], num_samples: int) -> dict:
    """A manifest of text with one split."""
    split = {
        "shards": shards,
        "num_samples": num_samples,
        "num_targets": num_samples * 256,
        "num_documents": 1,
        "num_dropped_tokens": 0,
        "num_text_bytes": 0,
        "unigram_entropy": 0.0,
    }
    return {
        "format_version": 2,
        "modality": "text",
        "block_length": 257,
        "vocabulary_size": 32000,
        "eos_id": 0,
        "tokenizer": {"path": "tokenizer.model", "sha256": "0" * 64},
        "source": {"inputs": ["synthetic"]},
        "splits": {"train": split},
    }


def make_index_dataset(folder: Path) -> Path:
    """A dataset of one shard with INDEX_SAMPLES samples; the manifest's path."""
    import numpy as np

    from ebwm_scale.data.format.writer import ShardWriter, write_manifest

    folder.mkdir()
    writer = ShardWriter(folder, "train", samples_per_shard=INDEX_SAMPLES)
    for number in range(INDEX_SAMPLES):
        writer.add({"tokens.npy": np.full(257, number % 32000, "<u2")}, num_targets=256)
    write_manifest(folder, described(writer.close(), INDEX_SAMPLES))
    return folder / "manifest.json"


def in_new_process(program: str, manifest: Path, checkout: Path | None = None) -> dict:
    """What a program printed; with the package of another checkout, where one is given."""
    root = Path(__file__).resolve().parents[1] if checkout is None else checkout.resolve()
    environment = {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", program, str(manifest)],
        capture_output=True,
        text=True,
        env=environment,
        cwd=root,  # which python -c looks in first
        check=False,
    )
    if done.returncode:
        raise RuntimeError(done.stderr[-2000:])
    return json.loads(done.stdout)


def other_ranks(manifest: Path, ranks: range, num_ranks: int) -> dict:
    """Seconds and MiB of some of the ranks, each in a process of its own, one after the other."""
    from ebwm_scale.data.loading.opening import open_splits

    splits = open_splits([(manifest, 1.0)], ["train"], verify="sizes")
    sent = pickle.dumps(splits)
    del splits
    rows = []
    for rank in ranks:
        receiver, sender = os.pipe()
        child = os.fork()
        if child == 0:
            code = 1
            try:
                os.write(sender, json.dumps(start_rank(sent, rank, num_ranks)).encode())
                code = 0
            finally:
                os._exit(code)
        os.close(sender)
        with os.fdopen(receiver, "rb") as pipe:
            rows.append(json.loads(pipe.read()))
        os.waitpid(child, 0)
    seconds = [row["seconds"] for row in rows]
    memory = [row["mib"] for row in rows]
    return {
        "sent_to_each_rank_mib": mib(len(sent)),
        "other_ranks": {
            "measured": len(rows),
            "seconds_median": round(statistics.median(seconds), 3),
            "seconds_highest": round(max(seconds), 3),
            "mib_median": round(statistics.median(memory), 1),
            "mib_highest": round(max(memory), 1),
            "files_read_highest": max(row["parts"] for row in rows),
        },
    }


def start_rank(sent: bytes, rank: int, num_ranks: int) -> dict:
    """What a rank does with what it was sent, up to knowing the shards of its first samples."""
    before, start = private_bytes(), time.monotonic()
    split = pickle.loads(sent)["train"]
    split.keep(window_shards=4)
    order = split.order(seed=33, window_shards=4)
    numbers = {split.locate(int(i))[0] for i in order.samples(16 * rank, 16)}
    for number in numbers:
        assert split.info.shards[number].num_samples == SAMPLES
    seconds, parts = time.monotonic() - start, len(split.info.shards._cached)
    return {"seconds": seconds, "mib": mib(private_bytes() - before), "parts": parts}


def private_bytes() -> int:
    """Memory of this process that it shares with no other: what was forked and not written to is
    not counted.
    """
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return sum(1024 * int(line.split()[1]) for line in lines if line.startswith("Private_"))


def mib(size: int) -> float:
    return round(size / 2**20, 2)


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
