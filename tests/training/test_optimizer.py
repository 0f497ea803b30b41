"""Optimizers and their parameter groups: the released one to the bit, Muon as torch's, and what is
refused.
"""

import signal

import pytest
import torch
from training_runs import same

from ebwm_scale.checkpoint.convert import export_run, import_run
from ebwm_scale.checkpoint.reader import CheckpointReader
from ebwm_scale.config.load import config_from_dict
from ebwm_scale.core.errors import ConfigError
from ebwm_scale.training.optimizer import new_optimizer, parameter_groups
from ebwm_scale.training.schedule import RateChange
from ebwm_scale.world_model import WorldModel

SIZES = {"num_layers": 2, "width": 16, "num_heads": 2, "vocabulary_size": 11}
MUON = {"optimizer.name": "muon", "train.max_steps": 5, "evaluation.every_steps": 0}


def configured(model: dict | None = None, **optimizer):
    return config_from_dict(
        {
            "model": {**SIZES, "predicted_input": "anchored", **(model or {})},
            "data": {"context_length": 4},
            "optimizer": {"learning_rate": 0.01, **optimizer},
        }
    )


def new_model(config) -> WorldModel:
    torch.manual_seed(0)
    return WorldModel(config)


def names(model, group) -> list[str]:
    held = {id(p) for p in group["params"]}
    return [name for name, p in model.named_parameters() if id(p) in held]


def updated(config, optimizer_of, steps: int = 3) -> dict:
    """Weights after updates with gradients that were drawn at random."""
    model = new_model(config)
    step = optimizer_of(model)
    generator = torch.Generator().manual_seed(1)
    for _ in range(steps):
        for p in model.parameters():
            p.grad = torch.randn(p.shape, generator=generator)
        step()
    return {name: p.detach() for name, p in model.named_parameters()}


def test_without_keys_the_groups_are_the_released_ones():
    config = configured()
    model = new_model(config)
    rest, alpha = parameter_groups(model, config)
    assert names(model, alpha) == ["step_size"] and alpha["weight_decay"] == 0
    assert names(model, rest) == [n for n, _ in model.named_parameters() if n != "step_size"]
    assert rest.keys() == {"params", "weight_decay", "rate_scale"} and rest["rate_scale"] == 1
    assert type(new_optimizer(model, config)) is torch.optim.AdamW


@pytest.mark.parametrize("kind", ["energy", "baseline"])
def test_muon_takes_the_matrices_of_the_blocks_and_nothing_else(kind):
    config = configured({"kind": kind}, name="muon", muon_learning_rate=0.05)
    model = new_model(config)
    groups = parameter_groups(model, config)
    (muon,) = [group for group in groups if "momentum" in group]
    matrices = names(model, muon)
    assert len(matrices) == 2 * 7  # q, k, v, o and the feed-forward's three
    assert all(name.startswith("network.layers.") for name in matrices)
    assert not any("norm" in name for name in matrices)
    assert muon["rate_scale"] == pytest.approx(5)
    every = [name for group in groups for name in names(model, group)]
    assert sorted(every) == sorted(name for name, _ in model.named_parameters())


def test_muon_and_adamw_update_their_parameters_as_torch_does():
    config = configured(name="muon", muon_learning_rate=0.03, momentum=0.9, weight_decay=0.1)

    def ours(model):
        optimizer = new_optimizer(model, config)
        for group in optimizer.param_groups:  # as Engine.set_learning_rates does
            group["lr"] = 0.01 * group["rate_scale"]
        return optimizer.step

    def torchs(model):
        named = dict(model.named_parameters())
        matrices = [p for n, p in named.items() if "layers" in n and p.ndim == 2]
        alpha = named.pop("step_size")
        held = {id(p) for p in matrices}
        rest = [p for p in named.values() if id(p) not in held]
        options = {"momentum": 0.9, "adjust_lr_fn": "match_rms_adamw"}
        parts = [
            torch.optim.Muon(matrices, lr=0.03, weight_decay=0.1, **options),
            torch.optim.AdamW(rest, lr=0.01, weight_decay=0.1, fused=True),
            torch.optim.AdamW([alpha], lr=0.01 * 1500, weight_decay=0.0, fused=True),
        ]
        return lambda: [part.step() for part in parts]

    theirs = updated(config, torchs)
    assert same(updated(config, ours), theirs) == []
    other = configured(weight_decay=0.1)
    adamw = updated(other, lambda model: new_optimizer(model, other).step)
    assert "network.layers.0.attention.wq.weight" in "".join(same(adamw, theirs))


def test_norms_and_embeddings_are_not_decayed_where_that_is_asked_for():
    for rules, expected in {
        ("norms",): ["attention_norm", "ffn_norm", "norm"],
        ("embeddings",): ["landscape_embedding", "token_embedding"],
    }.items():
        config = configured({"conditioning": "adaln"}, no_decay=list(rules))
        model = new_model(config)
        groups = parameter_groups(model, config)
        found = [
            name
            for group in groups
            if group["weight_decay"] == 0 and group["rate_scale"] == 1
            for name in names(model, group)
        ]
        weights = {name.split(".")[-2] for name in found if name.endswith(".weight")}
        assert sorted(weights) == expected
        assert groups[0]["weight_decay"] == config.optimizer.weight_decay


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_muon_with_partitioned_matrices_is_refused_in_one_line(stage):
    with pytest.raises(ConfigError, match="it needs whole matrices, which ZeRO cuts") as caught:
        config_from_dict(
            {
                "optimizer": {"name": "muon"},
                "deepspeed": {"zero_stage": stage},
                "refinement": {"recompute": "block"},
            }
        )
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("key, value", [("muon_learning_rate", 0.1), ("momentum", 0.9)])
def test_keys_that_adamw_does_not_read_are_refused(key, value):
    with pytest.raises(ConfigError, match=f"optimizer.{key} is {value} with optimizer.name adamw"):
        configured(**{key: value})


def test_a_raised_rate_of_muon_is_seen_before_a_resume():
    before = configured(name="muon", muon_learning_rate=0.02)
    after = configured(name="muon", muon_learning_rate=0.04)
    change = RateChange.of(before, after, 0)
    assert change.raised and "Muon's learning rate at step 0" in change.describe()
    assert "--set optimizer.muon_learning_rate=0.02" in change.refusal(before, after)
    assert not RateChange.of(before, before, 0).changed


@pytest.mark.soak
def test_a_muon_run_killed_converted_or_resumed_is_bit_for_bit_the_whole_one(runs, tmp_path):
    runs.run("muon", overrides=MUON)
    killed = {"EBWM_FAULTS": "kill@step=4"}
    runs.run("cut", overrides=MUON, variables=killed, expect=-signal.SIGKILL)
    first = runs.folder / "cut" / "checkpoints" / "step_000003"
    export_run(first, tmp_path / "moved", training=True, say=lambda _: None)
    import_run(
        tmp_path / "moved",
        runs.folder / "again",
        overrides=[f"data.manifest={runs.manifest}"],
        say=lambda _: None,
    )
    for name in ("cut", "again"):
        runs.run(name, overrides=MUON, flags=("--resume",))
        whole = CheckpointReader(runs.folder / "muon" / "checkpoints" / "step_000005")
        ours = CheckpointReader(runs.folder / name / "checkpoints" / "step_000005")
        for kind in ("weight", "momentum_buffer", "exp_avg_sq"):
            assert whole.holds(kind)
            assert same(ours.weights(kind), whole.weights(kind)) == []
    changed = {**MUON, "optimizer.name": "adamw", "train.max_steps": 9}
    output = runs.run("cut", overrides=changed, flags=("--resume",), expect=2)
    assert "optimizer.name was muon, is adamw" in output


@pytest.mark.multiprocess
@pytest.mark.soak
def test_two_processes_train_with_muon_as_one_does_in_bf16_too(runs):
    """Newton-Schulz rounds to bf16, so the last bits of a gradient may show in an update."""
    for precision in ("fp32", "bf16"):
        overrides = {**MUON, "train.precision": precision}
        for processes in (1, 2):
            name = f"{precision}_{processes}"
            runs.run(name, overrides=overrides, processes=processes)
        one, two = (runs.losses(f"{precision}_{processes}") for processes in (1, 2))
        assert one.keys() == two.keys()
        for key, losses in one.items():
            assert two[key] == pytest.approx(losses, rel=2e-2), key
        assert one[5, "train"][-1] < one[1, "train"][-1]
