"""What is stored becomes what a model sees; masked targets give the same sums however a batch is
cut.
"""

from types import SimpleNamespace

import pytest
import torch

from ebwm_kernels.vocabulary.softmax_cross_entropy import IGNORE
from ebwm_scale.config.load import config_from_dict
from ebwm_scale.data.loading.observation import Observation
from ebwm_scale.refinement.noise import NoiseSource
from ebwm_scale.world_model import WorldModel

EOS = 7


def observation(masked):
    content = SimpleNamespace(eos_id=EOS)
    return Observation(
        SimpleNamespace(content=content, modality="text"), "cpu", mask_document_starts=masked
    )


def test_targets_are_the_next_tokens_and_document_starts_are_masked_only_if_asked():
    tokens = torch.tensor([[1, EOS, 3, 4], [5, 6, EOS, EOS]])
    observed, targets = observation(False)(tokens)
    assert observed.tolist() == [[1, EOS, 3], [5, 6, EOS]] and targets.tolist() == [
        [EOS, 3, 4],
        [6, EOS, EOS],
    ]
    assert observation(True)(tokens)[1].tolist() == [[EOS, IGNORE, 4], [6, EOS, IGNORE]]


@pytest.mark.parametrize(
    "kind, graph", [("energy", "detach"), ("energy", "full"), ("baseline", "detach")]
)
def test_masked_losses_and_gradients_do_not_depend_on_how_a_batch_is_cut(kind, graph):
    torch.manual_seed(0)
    config = config_from_dict(
        {
            "model": {
                "kind": kind,
                "num_layers": 2,
                "width": 16,
                "num_heads": 2,
                "vocabulary_size": 20,
                "predicted_input": "anchored",
            },
            "refinement": {"graph": graph, "step_size": 5},
            "data": {"context_length": 6, "mask_document_starts": True},
        }
    )
    model = WorldModel(config).double()
    tokens = torch.randint(0, 20, (4, 7))
    tokens[0, 2:5] = EOS  # the first sample has more masked targets than the others
    observed, targets = observation(True)(tokens)

    def gradients(parts):
        model.zero_grad()
        total = 0.0
        for part in parts:
            loss = model(
                observed[part],
                targets[part],
                sample_ids=torch.arange(4)[part],
                source=NoiseSource(0, 0),
            ).loss / len(parts)
            loss.backward()
            total += loss.item()
        return total, {
            name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None
        }

    whole, cut = gradients([slice(0, 4)]), gradients([slice(i, i + 1) for i in range(4)])
    assert whole[0] == pytest.approx(cut[0], rel=1e-12)
    assert all(
        torch.allclose(whole[1][name], cut[1][name], rtol=1e-9, atol=1e-12) for name in whole[1]
    )
    plain = WorldModel(
        config.replace(data=config.data.replace(mask_document_starts=False))
    ).double()
    plain.load_state_dict(model.state_dict())
    unscaled = plain(
        observed, targets, sample_ids=torch.arange(4), source=NoiseSource(0, 0)
    ).loss.item()
    assert whole[0] == pytest.approx(
        unscaled * (targets != IGNORE).double().mean().item(), rel=1e-12
    )
