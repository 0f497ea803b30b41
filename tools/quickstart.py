"""The quick start: real text, a tokenizer, shards, Transformer++ and an energy-based world model trained on them, and a report.

    python tools/quickstart.py [--runs runs] [--data data] [--text DIR]

Every stage is kept when it is done, and a killed run goes on where it was: repeat the command. --text: a folder of your own text instead of
the sample corpus (the documentation of Django 5.2.8, BSD-3).
"""
from __future__ import annotations

import argparse
import subprocess
import sys
import time
from pathlib import Path

from ebwm_scale.data.sample_corpus import fetch_sample_corpus
from ebwm_scale.data.text import make_text_dataset
from ebwm_scale.data.tokenizer import train_tokenizer
from ebwm_scale.errors import UserError

ROOT = Path(__file__).resolve().parent.parent
VOCABULARY_SIZE, CONTEXT_LENGTH = 2048, 64


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="run folders (default runs)")
    parser.add_argument("--data", type=Path, default=Path("data"), help="corpus, tokenizer and shards (default data)")
    parser.add_argument("--text", type=Path, default=None, help="a folder of text instead of the sample corpus")
    arguments = parser.parse_args()
    start = time.monotonic()

    def announce(stage: str) -> None:
        print(f"[{time.monotonic() - start:4.0f} s] {stage}", flush=True)

    try:
        name = "sample" if arguments.text is None else f"{arguments.text.resolve().name}"
        corpus = arguments.text
        if corpus is None:
            announce("text: the sample corpus (documentation of Django 5.2.8, BSD-3)")
            corpus = fetch_sample_corpus(arguments.data / "sample_corpus")
        tokenizer = arguments.data / f"{name}-{VOCABULARY_SIZE}.model"
        if not tokenizer.exists():
            announce(f"tokenizer: {VOCABULARY_SIZE} pieces")
            train_tokenizer([corpus], tokenizer, VOCABULARY_SIZE)
        announce(f"shards: blocks of {CONTEXT_LENGTH} tokens, validation documents set aside")
        manifest = make_text_dataset([corpus], arguments.data / f"{name}-{CONTEXT_LENGTH}", tokenizer=tokenizer, context_length=CONTEXT_LENGTH)
    except UserError as error:
        print(error, file=sys.stderr)
        return error.exit_code

    baseline, energy = arguments.runs / "quickstart_baseline", arguments.runs / "quickstart"
    for title, config, run in (("Transformer++, for comparison", "quickstart_baseline.yaml", baseline),
                               ("the energy-based world model", "quickstart.yaml", energy)):
        announce(f"training {title}: {run}")
        code = subprocess.run([*launcher(), str(ROOT / "ebwm_scale" / "train.py"), "--config", str(ROOT / "configs" / config), "--run-dir", str(run),
                               "--set", f"data.manifest={manifest}", "--resume"]).returncode
        if code:
            print(f"training ended with exit code {code}; repeat the command to go on", file=sys.stderr)
            return code

    from ebwm_scale.report import write_report
    report = write_report(energy, baseline_dir=baseline)
    announce(f"done. Open the report: {report}")
    return 0


def launcher() -> list[str]:
    """One process, or one per GPU where there are several."""
    import torch
    if torch.cuda.device_count() > 1:
        return [str(Path(sys.executable).with_name("deepspeed")), "--num_gpus", str(torch.cuda.device_count())]
    return [sys.executable]


if __name__ == "__main__":
    sys.exit(main())
