"""A whole training step on the meta device, which has shapes and no numbers: what would make a GPU
wait, or mixes devices, raises there.

Reading a number back (item, tolist, a condition on a tensor, a mask that selects) is an error on
meta tensors, and so is an operation between one of them and a tensor left on the CPU. Loss and
gradients come out with the shapes and dtypes of a real step.
"""

import pytest
import torch

from ebwm_kernels.attention import ops as attention_ops
from ebwm_scale.config.load import load_config
from ebwm_scale.model.states import Targets, VocabularyState
from ebwm_scale.refinement.noise import NoiseSource
from ebwm_scale.world_model import WorldModel

VOCABULARY, SAMPLES, POSITIONS, DIMENSION = 50, 3, 8, 12
TEXT = {
    "S1": [],
    "S2": [
        "refinement.graph=truncate",
        "refinement.loss=last",
        "refinement.step_size_random_factor=2",
        "refinement.noise=0.1",
        "refinement.change_clamp=1",
        "refinement.state_clamp=5",
    ],
    "Algorithm 1": ["refinement.graph=full", "refinement.loss=last"],
    "logits": ["refinement.update=logits"],
    "mirror": ["refinement.update=mirror"],
    "anchored and tied": [
        "model.predicted_input=anchored",
        "state.tie_embedding=true",
        "state.initial=zeros",
    ],
    "time_embed": ["model.conditioning=time_embed", "refinement.landscapes=per_step"],
    "predicted_only": ["model.conditioning=predicted_only", "refinement.landscapes=per_step"],
    "candidates": ["refinement.candidates=7", "refinement.num_steps=3", "refinement.noise=0.1"],
    "candidates, full": [
        "refinement.candidates=7",
        "refinement.graph=full",
        "refinement.update=mirror",
        "refinement.state_clamp=5",
        "state.initial=zeros",
    ],
    "shared keys": ["model.num_kv_heads=1"],
    "a step computed again": ["refinement.recompute=step"],
    "block by block": ["refinement.recompute=block"],
    "masked document starts": ["data.mask_document_starts=true"],
    "masked documents": ["data.mask_documents=true", "data.eos_id=0"],
    "masked documents, block by block": [
        "data.mask_documents=true",
        "data.eos_id=0",
        "refinement.recompute=block",
    ],
    "Transformer++": ["model.kind=baseline"],
    "Transformer++, masked documents": [
        "model.kind=baseline",
        "data.mask_documents=true",
        "data.eos_id=0",
    ],
}
VIDEO = {
    "video": ["state.kind=embedding", f"state.dimension={DIMENSION}"],
    "video from the last frame": [
        "state.kind=embedding",
        f"state.dimension={DIMENSION}",
        "state.initial=most_recent",
    ],
    "video by Transformer++": [
        "state.kind=embedding",
        f"state.dimension={DIMENSION}",
        "model.kind=baseline",
    ],
}


@pytest.fixture(autouse=True)
def as_on_a_gpu(monkeypatch):
    """Numbers that are never looked at, and the operations' Triton side, of which meta tensors see
    the shapes alone.
    """

    def normal(
        self,
        sample_ids,
        num_positions,
        size,
        *,
        purpose,
        device="cpu",
        dtype=torch.float32,
        first_position=0,
    ):
        return torch.empty(len(sample_ids), num_positions, size, device=device, dtype=dtype)

    monkeypatch.setattr(NoiseSource, "normal", normal)
    monkeypatch.setattr(attention_ops, "why_not_triton", lambda device, dtype, head_dimension: None)


def step(options, dtype):
    config = load_config(
        None,
        [
            "model.num_layers=2",
            "model.width=32",
            "model.num_heads=2",
            "model.feed_forward_width=32",
            f"model.vocabulary_size={VOCABULARY}",
            f"data.context_length={POSITIONS}",
            "refinement.num_steps=2",
            "refinement.tile_rows=5",
            *options,
            *([] if "model.kind=baseline" in options else ["model.attention_backend=triton"]),
        ],
    )
    model = WorldModel(config).to("meta", dtype)
    if config.state.kind == "vocabulary":
        stream = torch.zeros(SAMPLES, POSITIONS + 1, dtype=torch.int64, device="meta")
    else:
        stream = torch.zeros(SAMPLES, POSITIONS + 1, DIMENSION, dtype=dtype, device="meta")

    def run():
        return model(
            stream[:, :-1],
            stream[:, 1:],
            sample_ids=torch.arange(SAMPLES),
            source=NoiseSource(0, 0),
        )

    output = run()
    output.loss.backward()
    model.eval()
    with torch.no_grad():
        evaluated = run()
    assert evaluated.loss.shape == () and evaluated.loss.device.type == "meta"
    return model, output


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("name", [*TEXT, *VIDEO])
def test_a_step_of_training_and_of_evaluation_neither_waits_for_its_device_nor_leaves_it(
    name, dtype
):
    model, output = step((TEXT | VIDEO)[name], dtype)
    assert (
        output.loss.shape == ()
        and output.loss.device.type == "meta"
        and output.loss.dtype == torch.float32
    )
    for parameter_name, parameter in model.named_parameters():
        assert parameter.grad is not None, parameter_name
        assert (parameter.grad.shape, parameter.grad.dtype, parameter.grad.device.type) == (
            parameter.shape,
            dtype,
            "meta",
        ), parameter_name


@pytest.mark.parametrize(
    "count",
    [
        lambda values: float((values != -100).sum()),
        lambda values: torch.ones(1) * (values != -100).sum(),
    ],
    ids=["waits", "leaves the device"],
)
def test_a_step_that_waits_or_leaves_its_device_is_noticed(count, monkeypatch):
    monkeypatch.setattr(
        VocabularyState, "targets", lambda self, values: Targets(values, count(values))
    )
    with pytest.raises(RuntimeError, match="meta"):
        step([], torch.float32)
