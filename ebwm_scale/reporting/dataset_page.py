"""The page of a dataset of text: documents, lengths, scripts, copies, tokens per byte, samples."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from matplotlib.axes import Axes

from ebwm_scale.data.format.manifest import Manifest, SplitInfo
from ebwm_scale.data.format.survey import Survey
from ebwm_scale.reporting.numbers import show
from ebwm_scale.reporting.page import card
from ebwm_scale.reporting.page import render as render_page
from ebwm_scale.reporting.plain import page_text
from ebwm_scale.reporting.style import LIGHT

_SHOWN_SCRIPTS = 12
_BINS = 40
_TITLE_LENGTH = 200


def render(manifest: Manifest, surveys: Mapping[str, Survey]) -> str:
    """The page as HTML. surveys: of each split."""
    name = page_text(str(manifest.folder.name), _TITLE_LENGTH)
    return render_page(
        "dataset.html.j2",
        title=f"Dataset {name}",
        name=name,
        facts=[(key, page_text(value, 1_000)) for key, value in _facts(manifest)],
        shared=_shared(surveys),
        splits=[
            _split(split, manifest.splits[split], manifest.context_length, found)
            for split, found in surveys.items()
        ],
    )


def _facts(manifest: Manifest) -> list[tuple[str, str]]:
    values, source = manifest.values, manifest.source
    tokenizer = values["tokenizer"]
    says_mask = {True: "yes", False: "no", None: "not said"}[values.get("mask_documents")]
    facts = [
        ("inputs", ", ".join(map(str, source.get("inputs", [])))),
        ("documents", f"{source.get('num_documents', 0):,}"),
        ("tokenizer", f"{tokenizer['path']}, {manifest.content.size:,} tokens"),
        ("block", f"{manifest.context_length} + 1 tokens"),
        ("packing", str(values.get("packing", "consecutive"))),
        ("asks for masked documents", says_mask),
        ("fingerprint", manifest.fingerprint),
    ]
    if "repaired" in values:
        left_out = values["repaired"].get("left_out", {})
        facts.append(("left out by a repair", ", ".join(f"{k}: {v}" for k, v in left_out.items())))
    return facts


def _split(name: str, info: SplitInfo, context_length: int, found: Survey) -> dict[str, Any]:
    lengths = np.array(found.num_tokens or [0])
    facts = info.facts
    num_places = info.num_samples * context_length
    num_tokens = info.num_targets + facts["num_dropped_tokens"]
    rows = [
        ("documents", f"{int(facts['num_documents']):,}"),
        ("looked at", f"{found.num_documents:,}" + (", all whole ones" * found.is_whole)),
        ("blocks", f"{info.num_samples:,} in {len(info.shards):,} shards"),
        ("tokens", f"{info.num_targets:,}, {int(facts['num_dropped_tokens']):,} dropped"),
        ("padding", f"{num_places - info.num_targets:,} places"),
        ("bytes per token", show(facts["num_text_bytes"] / max(num_tokens, 1))),
        ("tokens per byte", show(num_tokens / max(facts["num_text_bytes"], 1))),
        ("unigram entropy", f"{show(facts['unigram_entropy'])} nats"),
        ("copies among those looked at", f"{found.num_copies:,}"),
        ("tokens of a document", _quantiles(lengths)),
        (
            "longer than a block",
            f"{(lengths + 1 > context_length).mean():.1%} of documents",
        ),
    ]
    return {
        "name": name,
        "facts": rows,
        "lengths": card(f"Lengths, {name}", lambda axes: _histogram(axes, lengths, context_length)),
        "scripts": _scripts(found),
        "samples": [page_text(sample) for sample in found.samples],
    }


def _quantiles(lengths: np.ndarray) -> str:
    low, middle, high = np.quantile(lengths, [0.1, 0.5, 0.9])
    return f"median {show(middle)}, 10 % below {show(low)}, 10 % above {show(high)}"


def _histogram(axes: Axes, lengths: np.ndarray, context_length: int) -> str:
    bins = np.geomspace(1, max(int(lengths.max()), 2) + 1, _BINS)
    axes.hist(lengths, bins=bins.tolist(), color=LIGHT["curve3"])
    axes.axvline(context_length, color=LIGHT["muted"], linestyle="--")
    axes.set_xscale("log")
    axes.set_xlabel("tokens of a document")
    axes.set_ylabel("documents")
    return f"The dashed line is a block's {context_length} tokens."


def _scripts(found: Survey) -> list[tuple[str, str, str]]:
    """(script, share of the letters, documents of which it is the main one)."""
    total = max(found.scripts.total(), 1)
    names = [name for name, _ in found.main_scripts.most_common()]
    names += [name for name, _ in found.scripts.most_common() if name not in names]
    return [
        (page_text(name, 60), f"{found.scripts[name] / total:.2%}", f"{found.main_scripts[name]:,}")
        for name in names[:_SHOWN_SCRIPTS]
    ]


def _shared(surveys: Mapping[str, Survey]) -> str:
    """Whether a text stands in two splits."""
    known: set[bytes] = set()
    shared = 0
    for found in surveys.values():
        shared += len(found.digests & known)
        known |= found.digests
    if shared:
        return (
            f"{shared:,} documents stand in more than one split: validation losses are partly "
            "training losses."
        )
    return "Of the documents looked at, none stands in more than one split."
