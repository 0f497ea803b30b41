"""From parquet to a dataset: seconds and megabytes, beside Hugging Face datasets.

    python tools/bench_text.py --megabytes 24 --output results/bench_text.json

Throughput: both read one parquet file of this environment's Python sources, tokenise it with one
tokenizer.json, cut it into blocks and write them, on all cores, in turns. Ours also sorts all
documents into a shuffled order and makes checksums; datasets does neither. Memory: ours with one, 4
and 16 times an input, tokenised by bytes, which is the fastest way to much.
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from ebwm_scale.core.arguments import ArgumentParser
from ebwm_scale.core.provenance import provenance

CONTEXT_LENGTH = 512
LONG_CONTEXT = 8192
VOCABULARY_SIZE = 8192
OURS = """
import sys
from ebwm_scale.data.prepare.text import make_text_dataset
source, output, tokenizer, length = sys.argv[1:]
make_text_dataset([source], output, tokenizer=tokenizer, context_length=int(length), report=str)
"""
THEIRS = """
import os, sys
import datasets
from transformers import PreTrainedTokenizerFast
source, output, tokenizer, length = sys.argv[1:]
length, cores = int(length), len(os.sched_getaffinity(0))
fast = PreTrainedTokenizerFast(tokenizer_file=tokenizer, model_max_length=10**9)
end = fast.convert_tokens_to_ids("<|endoftext|>")

def encode(batch):
    found = fast(batch["text"], add_special_tokens=False, return_attention_mask=False)
    return {"input_ids": [[*ids, end] for ids in found["input_ids"]]}

def pack(batch):
    stream = [token for ids in batch["input_ids"] for token in ids]
    starts = range(0, len(stream) - length, length)
    return {"input_ids": [stream[at : at + length + 1] for at in starts]}

cache = output + ".cache"
rows = datasets.load_dataset("parquet", data_files=source, split="train", cache_dir=cache)
tokens = rows.map(encode, batched=True, num_proc=cores, remove_columns=rows.column_names)
blocks = tokens.map(pack, batched=True, num_proc=cores)
blocks.save_to_disk(output, num_proc=cores)
"""
MEASURE = """
import json, resource, subprocess, sys, time
start = time.monotonic()
done = subprocess.run([sys.executable, "-c", *sys.argv[1:]], capture_output=True, text=True)
seconds = time.monotonic() - start
used = resource.getrusage(resource.RUSAGE_CHILDREN)
if done.returncode:
    sys.exit(done.stderr)
print(json.dumps({
    "seconds": round(seconds, 1),
    "cpu_seconds": round(used.ru_utime + used.ru_stime, 1),
    "peak_mib_of_largest_process": round(used.ru_maxrss / 1024, 1),
}))
"""


def main() -> int:
    parser = ArgumentParser(description=__doc__)
    parser.add_argument(
        "--megabytes", type=int, default=24, metavar="N", help="of text, for throughput"
    )
    parser.add_argument(
        "--memory-megabytes", type=int, default=32, metavar="N", help="of text, for memory, once"
    )
    parser.add_argument(
        "--rounds", type=int, default=2, metavar="N", help="of each, in turns; 0: memory alone"
    )
    parser.add_argument("--output", required=True, type=Path, metavar="FILE", help="the result")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        result = {
            **provenance("numpy", "pyarrow", "tokenizers", "datasets", "transformers"),
            "cores": len(os.sched_getaffinity(0)),
            "load_average_before": round(os.getloadavg()[0], 1),
        }
        if options.rounds:
            tokenizer = _tokenizer(scratch / "tokenizer.json")
            runs = _throughput(scratch, tokenizer, options.megabytes, options.rounds)
            result["throughput"] = runs
        result["memory"] = _memory(scratch, options.memory_megabytes)
    options.output.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(result, indent=1))
    return 0


def _throughput(scratch: Path, tokenizer: Path, megabytes: int, rounds: int) -> dict:
    """Of each way the run with the least CPU time, which other work disturbs least."""
    source = _parquet(scratch / "in.parquet", megabytes)
    runs: dict[str, list[dict]] = {"ours": [], "datasets": []}
    for number in range(rounds):
        for name, program in (("ours", OURS), ("datasets", THEIRS)):
            output = scratch / f"{name}-{number}"
            arguments = [source, output, tokenizer, CONTEXT_LENGTH]
            runs[name].append(_measured(program, arguments))
    best = {name: min(found, key=lambda run: run["cpu_seconds"]) for name, found in runs.items()}
    for found in best.values():
        found["mb_per_second"] = round(megabytes / found["seconds"], 2)
        found["mb_per_cpu_second"] = round(megabytes / found["cpu_seconds"], 2)
    ratio = best["datasets"]["cpu_seconds"] / best["ours"]["cpu_seconds"]
    wall = min(r["seconds"] for r in runs["datasets"]) / min(r["seconds"] for r in runs["ours"])
    return {
        "megabytes": megabytes,
        "context_length": CONTEXT_LENGTH,
        "vocabulary_size": VOCABULARY_SIZE,
        "best": best,
        "all": runs,
        "datasets_cpu_over_ours": round(ratio, 2),
        "datasets_seconds_over_ours": round(wall, 2),
    }


def _memory(scratch: Path, megabytes: int) -> list[dict]:
    found = []
    for factor in (1, 4, 16):
        source = _parquet(scratch / f"{factor}.parquet", factor * megabytes)
        output = scratch / f"memory-{factor}"
        measured = _measured(OURS, [source, output, "bytes", LONG_CONTEXT])
        found.append({"megabytes": factor * megabytes, **measured})
        subprocess.run(["rm", "-r", output, source], check=True)
    return found


def _measured(program: str, arguments: list) -> dict:
    command = [sys.executable, "-c", MEASURE, program, *map(str, arguments)]
    environment = {**os.environ, "HF_DATASETS_OFFLINE": "1", "HF_HUB_OFFLINE": "1"}
    time.sleep(1)
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        sys.exit(done.stderr)
    return json.loads(done.stdout)


def _texts() -> Iterator[str]:
    """Python sources, in a shuffled order; again from the start when all were given."""
    root = Path(sysconfig.get_paths()["stdlib"])
    paths = sorted(root.rglob("*.py"))
    random.Random(0).shuffle(paths)
    turn = 0
    while True:
        for path in paths:
            text = path.read_text(encoding="utf-8", errors="ignore")
            if text.strip():
                yield f"# turn {turn}\n{text}" if turn else text
        turn += 1


def _parquet(path: Path, megabytes: int) -> Path:
    """A table of texts of about that many million bytes."""
    import pyarrow
    import pyarrow.parquet

    schema = pyarrow.schema([("text", pyarrow.string())])
    size = 0
    with pyarrow.parquet.ParquetWriter(path, schema) as writer:
        waiting: list[str] = []
        for text in _texts():
            waiting.append(text)
            size += len(text.encode("utf-8"))
            is_full = size >= megabytes * 10**6
            if len(waiting) == 256 or is_full:
                writer.write_table(pyarrow.table({"text": waiting}, schema=schema))
                waiting = []
            if is_full:
                return path
    raise AssertionError("the texts never end")


def _tokenizer(path: Path) -> Path:
    """BPE of bytes, trained on a part of the texts."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY_SIZE,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    texts = _texts()
    tokenizer.train_from_iterator((next(texts) for _ in range(150)), trainer)
    tokenizer.save(str(path))
    return path


if __name__ == "__main__":
    sys.exit(main())
