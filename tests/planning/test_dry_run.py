"""What a dry run says, and the peaks of devices that it stands on."""

import pytest
import torch
from real_steps import FRAMES, configuration

from ebwm_scale.core.errors import ConfigError
from ebwm_scale.planning.dry_run import describe
from ebwm_scale.planning.hardware import peak_flops_per_s
from ebwm_scale.world_model import WorldModel


@pytest.mark.parametrize(
    "name, bf16, fp32",
    [
        ("NVIDIA A100-SXM4-80GB", 312e12, 19.5e12),
        ("NVIDIA H100 80GB HBM3", 989.4e12, 66.9e12),
        ("NVIDIA H100 PCIe", 756e12, 51e12),
        ("NVIDIA H200", 989.4e12, 66.9e12),
        ("NVIDIA B200", 2250e12, 75e12),
        ("Tesla V100-SXM2-32GB", None, 15.7e12),
        ("Tesla V100-PCIE-16GB", None, 14e12),
        ("NVIDIA GeForce RTX 4090", 165.2e12, 82.6e12),
        ("Some Other Device", None, None),
    ],
)
def test_peak_is_the_vendors_dense_figure(name, bf16, fp32, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: name)
    assert (peak_flops_per_s("bf16"), peak_flops_per_s("fp32")) == (
        bf16,
        pytest.approx(fp32) if fp32 else None,
    )


def test_peak_is_unknown_without_a_device_and_refuses_other_precisions(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert peak_flops_per_s("bf16") is None
    with pytest.raises(ValueError, match="fp16"):
        peak_flops_per_s("fp16")


DATA = {
    "manifest": "data/manifest.json",
    "fingerprint": "f" * 64,
    "train_samples": 400,
    "train_tokens": 3600,
    "validation_samples": 10,
    "validation_tokens": 90,
    "vocabulary_size": 11,
    "context_length": 9,
    "train_frames": 3600,
    "validation_frames": 90,
    "dimension": 12,
}


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"model": {"conditioning": "adaln"}, "refinement": {"recompute": "step"}},
        {"model": {"kind": "baseline"}},
        {"state": FRAMES},
    ],
)
def test_dry_run_text_is_short_and_has_a_unit_in_every_line(options):
    config = configuration(
        **options, train={"global_batch_size": 24, "micro_batch_size": 3, "max_steps": 50}
    )
    text = describe(
        config, WorldModel(config), world_size=2, data_summary=DATA, seconds_per_step=0.5
    )
    lines = text.splitlines()
    assert len(lines) <= 60 and max(map(len, lines)) <= 140
    units = (
        "numbers",
        "samples",
        "tokens",
        "frames",
        "steps",
        "sha256",
        "epochs",
        "TFLOP",
        "GiB",
        " s",
        "h ",
        ".json",
    )
    for line in lines:
        assert not line.startswith(" ") or any(unit in line for unit in units), line


def test_dry_run_arithmetic():
    config = configuration(train={"global_batch_size": 24, "micro_batch_size": 3, "max_steps": 50})
    lines = {
        tuple(line.split()[:3]): line
        for line in describe(
            config, WorldModel(config), world_size=2, data_summary=DATA, seconds_per_step=0.5
        ).splitlines()
    }
    assert "= 2 processes x 3 samples x 4 accumulation steps" in lines["global", "batch", "24"]
    assert ("training", "step", "216") in lines  # 24 samples of 9 tokens
    assert "10,800 tokens" in lines["run", "50", "steps"]
    assert ("run", "3.00", "epochs") in lines  # 50 x 24 / 400
    assert ("throughput", "432", "tokens/s") in lines
    assert ("time", "left", "0.01") in lines  # 25 s
    without = describe(
        config, WorldModel(config), world_size=2, data_summary=None, seconds_per_step=None
    )
    assert "fingerprint" not in without and "throughput" not in without


def test_a_dry_run_counts_what_the_steps_of_a_ramp_hold():
    """20 steps of 6, 30 of 24 samples, which are 35 whole steps; 0.5 s for one of these."""
    train = {"global_batch_size": 24, "micro_batch_size": 3, "max_steps": 50}
    train["batch_ramp"] = [[20, 6]]
    config = configuration(train=train)
    plain = configuration(train={**train, "batch_ramp": [], "max_steps": 35})
    texts = [
        describe(c, WorldModel(c), world_size=2, data_summary=DATA, seconds_per_step=500.0)
        for c in (config, plain)
    ]
    lines = {line.split("  ")[1]: line for line in texts[0].splitlines() if line.startswith("  ")}
    assert "ramp" in lines and "6 (20 steps), 24" in lines["ramp"]
    hours = 35 * 500 / 3600
    assert f"{hours:.2f} h" in lines["time left"] and "for 50 steps" in lines["time left"]
    flops = [line for text in texts for line in text.splitlines() if "all training steps" in line]
    assert flops[0] == flops[1] and "TFLOP" in flops[0]


def test_dry_run_refuses_a_batch_that_does_not_divide():
    config = configuration(train={"global_batch_size": 24})
    with pytest.raises(ConfigError, match="5 processes"):
        describe(config, WorldModel(config), world_size=5, data_summary=None, seconds_per_step=None)
