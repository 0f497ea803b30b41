"""Schedule-free AdamW is the published algorithm, at every ZeRO stage and after any stop."""

import signal

import pytest
import torch
from training_runs import same

from ebwm_scale.checkpoint.reader import CheckpointReader
from ebwm_scale.config.load import config_from_dict
from ebwm_scale.core.errors import ConfigError
from ebwm_scale.training.schedule_free import ScheduleFreeAdamW

FREE = {
    "optimizer.name": "schedule_free",
    "schedule.kind": "constant",
    "train.max_steps": 5,
    "evaluation.every_steps": 2,
    "evaluation.weights": "ema",
}


def factor(update: int) -> float:
    return min(1.0, (update + 1) / 3)


def test_updates_are_those_of_the_algorithm_in_float64():
    generator = torch.Generator().manual_seed(0)
    draw = lambda: torch.randn(7, generator=generator, dtype=torch.float64)
    p = draw().requires_grad_()
    y, z, x = (p.detach().clone() for _ in range(3))
    v, total = torch.zeros_like(y), 0.0
    optimizer = ScheduleFreeAdamW(
        [{"params": [p], "weight_decay": 0.1}],
        lr=0.05,
        betas=(0.9, 0.99),
        eps=1e-8,
        rate_factor=factor,
    )
    for k in range(6):
        gradient = draw()
        rate = 0.05 * factor(k)
        optimizer.param_groups[0]["lr"] = rate
        p.grad = gradient.clone()
        optimizer.step()
        v = 0.99 * v + 0.01 * gradient**2
        z = z - rate * (gradient / ((v / (1 - 0.99 ** (k + 1))).sqrt() + 1e-8) + 0.1 * y)
        total += factor(k) ** 2
        c = factor(k) ** 2 / total
        x = (1 - c) * x + c * z
        y = 0.1 * z + 0.9 * x
        torch.testing.assert_close(p.detach(), y, rtol=1e-13, atol=1e-14)
        torch.testing.assert_close(optimizer.state[p]["ema"], x, rtol=1e-13, atol=1e-14)
    assert optimizer.share_of_newest(2) == pytest.approx(1 / (1 / 9 + 4 / 9 + 1))


def test_the_average_finds_a_minimum_that_the_weights_of_a_constant_rate_circle():
    generator = torch.Generator().manual_seed(0)
    p = torch.full((4,), 3.0).requires_grad_()
    options = {"lr": 0.3, "betas": (0.9, 0.99), "eps": 1e-8, "rate_factor": factor}
    optimizer = ScheduleFreeAdamW([{"params": [p]}], **options)
    for _ in range(400):
        p.grad = p.detach() + torch.randn(4, generator=generator)
        optimizer.step()
    state = optimizer.state[p]
    assert state["ema"].norm() < 0.5 * state["z"].norm()


@pytest.mark.parametrize(
    "sections, message",
    [
        ({"schedule": {"kind": "cosine"}}, "use schedule.kind constant"),
        ({"schedule": {"kind": "constant"}, "train": {"ema": 0.9}}, "an average of its own"),
    ],
)
def test_what_does_not_go_with_it_is_refused(sections, message):
    with pytest.raises(ConfigError, match=message):
        config_from_dict({**sections, "optimizer": {"name": "schedule_free"}})


@pytest.mark.soak
def test_a_run_killed_and_resumed_is_bit_for_bit_the_whole_one(runs):
    runs.run("free", overrides=FREE)
    killed = {"EBWM_FAULTS": "kill@step=4"}
    runs.run("cut", overrides=FREE, variables=killed, expect=-signal.SIGKILL)
    runs.run("cut", overrides=FREE, flags=("--resume",))
    assert same(runs.state("cut"), runs.state("free")) == []
    reader = CheckpointReader(runs.folder / "free" / "checkpoints" / "step_000005")
    y, z, x = (reader.read("state_map", kind) for kind in ("weight", "z", "ema"))
    torch.testing.assert_close(y, 0.1 * z + 0.9 * x)


@pytest.mark.multiprocess
@pytest.mark.soak
@pytest.mark.parametrize("stage, precision", [(0, "fp32"), (1, "fp32"), (2, "bf16"), (3, "fp32")])
def test_every_stage_trains_and_validates_the_same(runs, stage, precision):
    overrides = {**FREE, "train.precision": precision, "refinement.recompute": "block"}
    if f"free_{precision}" not in {path.stem for path in runs.folder.glob("*.yaml")}:
        runs.run(f"free_{precision}", overrides=overrides)
    name = f"free_{stage}_{precision}"
    runs.run(name, overrides={**overrides, "deepspeed.zero_stage": stage}, processes=2)
    tolerance = 1e-4 if precision == "fp32" else 2e-2
    for key, losses in runs.losses(f"free_{precision}").items():
        assert runs.losses(name)[key] == pytest.approx(losses, rel=tolerance)
