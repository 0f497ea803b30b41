"""Whether a run learned, judged from its numbers: claims, evidence, and what is not known."""

from __future__ import annotations

import math
from dataclasses import dataclass

from ebwm_scale.reporting.curves import number
from ebwm_scale.reporting.numbers import show, show_change
from ebwm_scale.reporting.run_data import SKIPPED, Run

# text: a model that learned context is at least this far below the unigram entropy
LEARNED_NATS = 1.0
STEP_GAIN = 0.001  # more refinement steps help when they lower the loss by this fraction
# Differences between two runs, besides the kind of model, that a reader of the comparison must know
# of.
COMPARED = (
    ("model", "num_layers"),
    ("model", "width"),
    ("data", "manifest"),
    ("data", "context_length"),
    ("optimizer", "learning_rate"),
    ("train", "global_batch_size"),
    ("train", "precision"),
    ("train", "seed"),
)

# state.initial, in words
INITIAL_STATES = {"most_recent": "the last frame", "zeros": "zeros"}
# refinement.loss: why the losses along one run's steps do not say whether more of them help
SCORED = {
    "last": "only the last step is scored, so the first is not trained to predict",
    "every": "each step is scored, the first in a model that takes more",
}
SAME_REFERENCE = 1e-3  # reference losses of the same validation data differ by rounding at most


@dataclass(frozen=True)
class Check:
    """One line of the verdict."""

    mark: str  # yes | no | unknown
    claim: str
    figure: str  # the number that decides
    detail: str  # where it comes from


def judge(run: Run, baseline: Run | None) -> tuple[str, str, list[Check]]:
    """(answer to "did it learn?", one sentence with the numbers, the checks behind it)."""
    checks = [_against_reference(run)]
    if run.refines:
        checks += [_against_initial(run), _against_one_step(run, baseline)]
    if run.refines or baseline:
        checks.append(_against_baseline(run, baseline))
    checks += [_ran_to_the_end(run), _stayed_finite(run)]
    if not run.validation:
        return "Cannot say yet", "There is no validation loss so far.", checks
    loss, step = run.validation[-1]["loss"], run.validation[-1]["step"]
    if loss != loss:
        return "No", f"The validation loss at step {step:,} is not a finite number.", checks
    sentence = f"After {step:,} training steps the validation loss is {show(loss)} {run.loss_unit}"
    if run.is_text and loss < 30:
        sentence += f" (perplexity {show(math.exp(loss))})"
    gap = run.reference_loss - loss
    if gap != gap:
        return (
            "Cannot say",
            sentence + f"; the {run.reference_name} to hold it against was not logged.",
            checks,
        )
    sentence += f", {show(abs(gap))} {'below' if gap > 0 else 'above'} "
    sentence += "the unigram entropy." if run.is_text else "the loss of copying the last frame."
    if checks[0].mark == "yes":
        return "Yes", sentence, checks
    return ("Not enough yet" if gap > 0 else "No"), sentence, checks


def _unknown(claim: str, why: str) -> Check:
    return Check("unknown", claim, "–", why)


def _against_reference(run: Run) -> Check:
    if run.is_text:
        claim = "It uses the context, not only token frequencies"
        rule = f"asked for: at least {LEARNED_NATS:g} nat below"
    else:
        claim, rule = "It predicts better than copying the last frame", "asked for: below"
    if not run.validation:
        return _unknown(claim, "no validation row yet")
    loss, reference = run.validation[-1]["loss"], run.reference_loss
    if loss != loss:
        return Check(
            "no",
            claim,
            "not finite",
            f"the validation loss at step {run.validation[-1]['step']:,} is not a finite number",
        )
    if reference != reference:
        return _unknown(
            claim,
            f"validation rows carry no {'unigram_entropy' if run.is_text else 'persistence_loss'}",
        )
    ok = reference - loss >= LEARNED_NATS if run.is_text else loss < reference
    return Check(
        "yes" if ok else "no",
        claim,
        show_change(loss - reference) + " nats" * run.is_text,
        f"loss {show(loss)}, {run.reference_name} {show(reference)}; {rule}",
    )


def _against_initial(run: Run) -> Check:
    start = INITIAL_STATES.get(str(run.setting("state", "initial")), "noise")
    claim = f"Refinement turns {start} into a prediction"
    row = run.validation[-1] if run.validation else {}
    loss, initial = number(row.get("loss")), number(row.get("initial_loss"))
    if not math.isfinite(loss) or not math.isfinite(initial):
        return _unknown(claim, "no validation row with a finite loss and initial_loss yet")
    return Check(
        "yes" if loss < initial else "no",
        claim,
        show_change(loss - initial) + " nats" * run.is_text,
        f"initial state {show(initial)}, after the last refinement step {show(loss)}",
    )


def _against_one_step(run: Run, other: Run | None) -> Check:
    """Whether thinking longer helps.

    The losses along one run's steps cannot say: where only the last step is scored, nothing asks
    the first for a prediction, and where each is, the first knows that others follow.
    """
    claim = "Thinking longer helps: more refinement steps beat a run with one"
    if other is not None and _is_one_step_run(other) and not _is_one_step_run(run):
        return _at_the_same_step(
            run, other, claim, f"the run with one step ({other.name})", least=STEP_GAIN
        )
    losses = run.validation[-1]["loss_per_step"] if run.validation else []
    if len(losses) == 1:
        return _unknown(claim, "the model was evaluated with a single refinement step")
    if not losses or not math.isfinite(losses[0]) or not math.isfinite(losses[-1]):
        return _unknown(claim, "no validation row with finite losses per step yet")
    change = losses[-1] - losses[0]
    scored = SCORED.get(str(run.setting("refinement", "loss")), "what is scored is not known")
    return Check(
        "unknown",
        claim,
        show_change(change) + " nats" * run.is_text,
        f"from step 1 ({show(losses[0])}) to step {len(losses)} ({show(losses[-1])}) of this "
        "model; "
        f"{scored}. Whether more steps help shows beside a run of the same data with "
        "refinement.num_steps=1: give it as --baseline",
    )


def _is_one_step_run(run: Run) -> bool:
    return run.refines and run.setting("refinement", "num_steps") == 1


def _against_baseline(run: Run, baseline: Run | None) -> Check:
    other = baseline.label if baseline else "Transformer++"
    claim = f"It is at least as good as {other} at the same step"
    if baseline is None:
        return _unknown(claim, "no run to compare with was given (--baseline RUN)")
    return _at_the_same_step(run, baseline, claim, other, least=0.0)


def _at_the_same_step(run: Run, baseline: Run, claim: str, other: str, *, least: float) -> Check:
    """The two validation losses at the last common step; yes if this run's is lower by `least`,
    relatively.
    """
    mine, theirs = (
        {row["step"]: row["loss"] for row in rows if math.isfinite(row["loss"])}
        for rows in (run.validation, baseline.validation)
    )
    common = mine.keys() & theirs.keys()
    if not common:
        return _unknown(claim, "the two runs have no validation at the same step")
    problem = _not_the_same_data(run, baseline)
    if problem:
        return _unknown(claim, problem)
    step = max(common)
    gap = (mine[step] - theirs[step]) / abs(theirs[step]) if theirs[step] else math.nan
    if gap != gap:
        return _unknown(claim, f"the loss of {other} at step {step:,} is 0")
    detail = (
        f"validation loss at step {step:,}: {show(mine[step])} here, {show(theirs[step])} there"
    )
    if step < max(mine):
        detail += f" (the last common step; this run goes on to {max(mine):,})"
    ratio = run.training.median("step_time_s") / (
        baseline.training.median("step_time_s") or math.nan
    )
    if ratio == ratio:
        detail += f"; equal steps, not equal time: one step takes {ratio:.2g} × as long here"
    differing = [
        f"{section}.{key} {run.setting(section, key)} / {baseline.setting(section, key)}"
        for section, key in COMPARED
        if run.config
        and baseline.config
        and run.setting(section, key) != baseline.setting(section, key)
    ]
    if differing:
        detail += f"; settings that differ (here / there): {', '.join(differing)}"
    return Check("yes" if gap <= -least else "no", claim, f"{gap:+.1%}".replace("-", "−"), detail)


def _not_the_same_data(run: Run, other: Run) -> str:
    """Why the losses of two runs do not compare; empty if they do.

    Both were held against the same reference: the token frequencies or the last frames of the
    same validation data. A run that logged none cannot be compared.
    """
    here, there = run.reference_loss, other.reference_loss
    if run.is_text == other.is_text and abs(here - there) <= SAME_REFERENCE:
        return ""
    if here != here or there != there:
        return f"whether the validation data is the same is not known: no {run.reference_name}"
    return (
        f"different validation data: {run.reference_name} {show(here)} here, "
        f"{other.reference_name} {show(there)} there"
    )


def _ran_to_the_end(run: Run) -> Check:
    claim, planned = "It ran to the planned end", run.setting("train", "max_steps")
    if not isinstance(planned, int):
        return _unknown(claim, f"reached step {run.last_step:,}; train.max_steps is not known")
    return Check(
        "yes" if run.last_step >= planned else "no",
        claim,
        f"{run.last_step / max(planned, 1):.0%}",
        f"step {run.last_step:,} of {planned:,} (train.max_steps)",
    )


def _stayed_finite(run: Run) -> Check:
    claim = "Its losses stayed finite"
    broken = run.training.num_broken + run.validated.num_broken
    skipped = run.events.counts.get(SKIPPED, 0)
    detail = f"{run.training.num_rows + run.validated.num_rows:,} logged rows" + (
        f"; {skipped:,} skipped step{'s' * (skipped > 1)} in the events" if skipped else ""
    )
    return Check(
        "no" if broken else "yes",
        claim,
        f"{broken:,} not finite" if broken else "all finite",
        detail,
    )
