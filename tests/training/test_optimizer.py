"""Optimizers and their parameter groups: the released one to the bit, Muon as torch's, and what is
refused.
"""

import signal

import pytest
import torch
from torch.optim._muon import _zeropower_via_newtonschulz
from training_runs import same

from ebwm_scale.checkpoint.convert import export_run, import_run
from ebwm_scale.checkpoint.reader import CheckpointReader
from ebwm_scale.config.load import config_from_dict
from ebwm_scale.core.errors import ConfigError
from ebwm_scale.training.muon import Matrix, MuonAndAdamW
from ebwm_scale.training.optimizer import new_optimizer, parameter_groups
from ebwm_scale.training.place import Place
from ebwm_scale.training.schedule import RateChange
from ebwm_scale.world_model import WorldModel

SIZES = {"num_layers": 2, "width": 16, "num_heads": 2, "vocabulary_size": 11}
NS = (3.4445, -4.775, 2.0315)  # of torch.optim.Muon
MUON = {"optimizer.name": "muon", "train.max_steps": 5, "evaluation.every_steps": 0}

MUON_ALIKE = {
    **MUON,
    "optimizer.gradient_clipping": 0.0,
    # two groups of matrices, each in a flat tensor of its own under ZeRO; the one matrix of the
    # second is cut in its middle, and between others in the model's order
    "optimizer.rules": [{"parameters": r"network\.layers\.1\.attention\.wo\.weight", "rate": 0.5}],
    "refinement.recompute": "block",
    "logging.norms_every_steps": 5,
}


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


def test_rules_give_parameters_a_rate_and_a_decay_of_their_own():
    """The first rule that fits counts, Muon's matrices stay Muon's, and nothing else is moved."""
    rules = [
        {"parameters": r"network\.layers\.0\..*w1\.weight", "rate": 0.5},
        {"parameters": r"network\.layers\.0\..*", "weight_decay": 0.0},
        {"parameters": "token_embedding.*", "rate": 3.0, "weight_decay": 0.2},
    ]
    config = configured(name="muon", muon_learning_rate=0.05, weight_decay=0.1, rules=rules)
    model = new_model(config)
    groups = parameter_groups(model, config)
    found = {}
    for group in groups:
        for name in names(model, group):
            rate = round(group["rate_scale"], 6)
            found[name] = (rate, group["weight_decay"], "momentum" in group)
    assert found["network.layers.0.feed_forward.w1.weight"] == (2.5, 0.1, True)
    assert found["network.layers.0.feed_forward.w2.weight"] == (5.0, 0.0, True)
    assert found["network.layers.1.feed_forward.w2.weight"] == (5.0, 0.1, True)
    assert found["network.layers.0.ffn_norm.weight"] == (1.0, 0.0, False)
    assert found["token_embedding.weight"] == (3.0, 0.2, False)
    assert found["state_map"] == (1.0, 0.1, False)
    assert len(found) == len(list(model.named_parameters()))
    new_optimizer(model, config).step()


@pytest.mark.parametrize(
    "rule, message",
    [
        ({"parameters": "("}, "optimizer.rules\\[0\\].parameters is .*: give a regular expression"),
        ({"rate": 2.0}, "it is absent"),
        ({"parameters": "nothing"}, "counts for no parameter of this model"),
    ],
)
def test_rules_that_fit_nothing_are_refused_in_one_line(rule, message):
    with pytest.raises(ConfigError, match=message) as caught:
        config = configured(rules=[rule])
        new_optimizer(new_model(config), config)
    assert "\n" not in str(caught.value)


def test_muon_of_flat_parts_is_that_of_whole_matrices_bit_for_bit():
    """As ZeRO gives them: matrices end to end in one tensor, one of them beginning elsewhere."""
    generator = torch.Generator().manual_seed(1)
    shapes = [torch.Size(shape) for shape in ((6, 4), (4, 4), (3, 8))]
    wholes = [torch.randn(shape, generator=generator) for shape in shapes]
    options = {"lr": 0.03, "weight_decay": 0.1, "adjust_lr_fn": "match_rms_adamw"}
    flat = torch.cat([torch.zeros(5), *[w.flatten() for w in wholes], torch.zeros(3)])
    flat.requires_grad_()
    leaves = [w.clone().requires_grad_() for w in wholes]
    plain = torch.optim.Muon(leaves, **options)
    scalar = torch.ones(1, requires_grad=True)
    muon = torch.optim.Muon([wholes[0].clone().requires_grad_()], **options)
    ours = MuonAndAdamW(muon, torch.optim.AdamW([scalar]))
    muon.param_groups[0]["params"] = [flat]  # as DeepSpeed does
    offsets = [5, 29, 45]
    places = [Place(flat, o, 0, s.numel()) for o, s in zip(offsets, shapes)]
    matrices = [Matrix(s, place, 0) for s, place in zip(shapes, places)]
    ours.share(matrices, rank=0, world_size=1, device=torch.device("cpu"))
    for _ in range(3):
        flat.grad = torch.zeros_like(flat)
        for leaf, place in zip(leaves, places):
            leaf.grad = torch.randn(leaf.shape, generator=generator)
            place.part_of(flat.grad).copy_(leaf.grad.flatten())
        plain.step()
        ours.step()
    for leaf, place in zip(leaves, places):
        assert torch.equal(place.part_of(flat.detach()), leaf.detach().flatten())
        own = place.part_of(ours.state[flat]["momentum_buffer"])
        assert torch.equal(own, plain.state[leaf]["momentum_buffer"].flatten())
    assert not torch.equal(leaves[0].detach(), wholes[0])


def test_a_matrix_that_is_not_orthogonalized_whole_is_seen():
    """Breaks it on purpose: two halves, each orthogonalized by itself, are another update."""
    generator = torch.Generator().manual_seed(1)
    whole = torch.randn(8, 8, generator=generator)
    halves = [_zeropower_via_newtonschulz(h, NS, 5, 1e-7) for h in whole.chunk(2)]
    together = _zeropower_via_newtonschulz(whole, NS, 5, 1e-7)
    assert (torch.cat(halves) - together).abs().max() > 0.1


@pytest.mark.multiprocess
@pytest.mark.parametrize(
    "stage, offload, precision",
    [
        (1, "none", "fp32"),
        *[
            pytest.param(*case, marks=pytest.mark.soak)
            for case in (
                (2, "none", "fp32"),
                (3, "none", "fp32"),
                (1, "optimizer", "fp32"),
                (3, "optimizer", "fp32"),
                (3, "parameters", "fp32"),
                (1, "none", "bf16"),
                (2, "none", "bf16"),
                (3, "none", "bf16"),
            )
        ],
    ],
)
def test_muon_trains_the_same_at_every_stage(runs, two_processes, stage, offload, precision):
    """Two processes add two gradients in one way only, so that no rounding differs but clipping's,
    which is off. Newton-Schulz rounds to bf16 and would magnify it.
    """
    name = f"muon_{stage}_{offload}_{precision}"
    overrides = {
        **MUON_ALIKE,
        "train.precision": precision,
        "deepspeed.zero_stage": stage,
        "deepspeed.offload": offload,
        "refinement.recompute": "block",
    }
    runs.run(name, overrides=overrides, processes=2)
    expected = two_processes(precision)
    for key, losses in runs.losses(name).items():
        assert losses == pytest.approx(expected[key], rel=1e-5 if precision == "fp32" else 2e-2)
    if precision == "fp32":  # and every stage says the same norms by layer, see test_norms.py
        ours, theirs = norms_of(runs, name), norms_of(runs, f"muon_0_{precision}")
        for part, norms in theirs.items():
            assert ours[part] == pytest.approx(norms, rel=1e-4, abs=1e-6), part


def norms_of(runs, name: str) -> dict[str, dict[str, float]]:
    (row,) = [row for row in runs.rows(name) if "norms" in row]
    return row["norms"]


@pytest.fixture(scope="module")
def two_processes(runs):
    """Losses of two processes without ZeRO, by precision; each is run once."""
    found = {}

    def losses(precision: str) -> dict:
        if precision not in found:
            name = f"muon_0_{precision}"
            overrides = {**MUON_ALIKE, "train.precision": precision}
            runs.run(name, overrides=overrides, processes=2)
            found[precision] = runs.losses(name)
        return found[precision]

    return losses


@pytest.mark.multiprocess
@pytest.mark.soak
def test_muon_goes_on_at_other_stages_and_numbers_of_processes(runs):
    """1 -> 2 -> 4, stages 0, 3, 1; the same stage and number is bit for bit."""
    everywhere = {**MUON, "refinement.recompute": "block", "train.max_steps": 6}
    runs.run("whole_muon", overrides={**everywhere, "deepspeed.zero_stage": 3})
    parts = [(1, 0), (2, 3), (4, 1)]
    for index, (processes, stage) in enumerate(parts):
        last = index + 1 == len(parts)
        overrides = {**everywhere, "deepspeed.zero_stage": stage}
        if not last:
            overrides["train.max_minutes"] = 1e-6
        flags = ("--resume",) if index else ()
        runs.run(
            "elastic_muon",
            processes=processes,
            overrides=overrides,
            flags=flags,
            expect=0 if last else 75,
        )
    for key, losses in runs.losses("whole_muon").items():
        assert runs.losses("elastic_muon")[key] == pytest.approx(losses, rel=2e-2)
    killed = {"EBWM_FAULTS": "kill@step=4"}
    cut = {**everywhere, "deepspeed.zero_stage": 3}
    runs.run("cut_muon", overrides=cut, variables=killed, expect=-signal.SIGKILL)
    runs.run("cut_muon", overrides=cut, flags=("--resume",))
    assert same(runs.state("cut_muon"), runs.state("whole_muon")) == []


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
