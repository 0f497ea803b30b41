"""Width transfer of the learning rate: `model.parametrization: width_scaled`.

What a tensor starts with and how fast it learns depends on its role. m = width / base_width, and a
model of the base width is the same under both parametrizations, to the bit:

    role      tensors                                        begins with      rate
    vector    norms, biases, numbers                         as ever          1
    input     embeddings, projections of frames and          deviation of     1
              conditions, and the map W of the state         the base's
    hidden    matrices of the blocks, modulations, feedback  ~ 1 / sqrt(D)    1 / m
    output    w of the linear energy head, the baseline's    ~ 1 / D          1 / m
              output
    pull      A, M, C, M2 of the energy's content terms      ~ 1 / D^1.5      1 / m^2

So E stays O(1), dE/de has entries O(1 / D), and W dE/de, a sum over D of them with entries O(1),
stays O(1) too: a step alpha W dE/de moves logits alike at every width, and alpha has no factor. W
is input-like in e = softmax(x) W, and its transpose is an output fed by dE/de. docs/width.md
derives it, also for the gradient through dE/de.

Scores of attention go over d in place of sqrt(d) (d head dimension, base's d_b): a factor
sqrt(d_b / d) on queries. It is in the start and the rate of `wq`, or of `q_norm` where there is
one. So the forward pass is that of any other model, and nothing is needed to evaluate or convert
it.

Sources: Tensor Programs V, arXiv 2203.03466 (tables 3 and 8); A Spectral Condition for Feature
Learning, arXiv 2310.17813 (the rate of Muon).
"""

from __future__ import annotations

import math
import re
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from ebwm_scale.config.resolved import known_after_loading, model_sizes
from ebwm_scale.config.schema import ModelConfig

Role = Literal["vector", "input", "hidden", "output", "pull"]

ROLES: tuple[tuple[str, Role], ...] = (  # by name; the first that fits counts
    (r"(workspace_)?step_size|exit_logits", "vector"),
    (r".*norm\.weight|.*\.bias", "vector"),
    (r"token_embedding\.weight|network\.landscape_embedding\.weight", "input"),
    (r"frame_projection\.weight|condition_embeddings\.maps\.\d+\.weight", "input"),
    (r"state_map|network\.workspace_map\.weight", "input"),
    (r"network\.layers\.\d+\.(attention|feed_forward)\.w\w\.weight", "hidden"),
    (r"network\.(modulations\.\d+|final_modulation)\.weight", "hidden"),
    (r"network\.(workspace_)?feedback\.weight|output\.hidden\.weight", "hidden"),
    (r"network\.head\.weight|output\.(up\.)?weight", "output"),
    (r"network\.content\.(quadratic|bilinear|context|workspace)\.weight", "pull"),
)
RATE_POWERS: dict[Role, float] = {"vector": 0, "input": 0, "hidden": -1, "output": -1, "pull": -2}
MUON_RATE_POWER = -0.5
"""Of matrices under Muon: its update has the spectral norm rate sqrt(max(rows, columns)), which
holds a matrix's effect at every width."""

# Where one side of a tensor grows with the width and Xavier's deviation sees both.
XAVIER = re.compile(
    r"state_map|frame_projection\.weight|condition_embeddings\.maps\.\d+\.weight"
    r"|output\.(up\.)?weight|network\.head\.weight"
)
QUERIES = re.compile(r"network\.layers\.\d+\.attention\.wq\.weight")
QUERY_NORM = re.compile(r"network\.layers\.\d+\.attention\.q_norm\.weight")


class WidthFactors(NamedTuple):
    """initial: on what a tensor starts with. rate: on its learning rate. Both 1 at the base."""

    initial: float
    rate: float


UNCHANGED = WidthFactors(1.0, 1.0)


def width_factors(
    model: ModelConfig, name: str, shape: torch.Size, *, muon: bool = False
) -> WidthFactors:
    """Of a parameter, by its name and shape; 1 and 1 under the standard parametrization.

    muon: whether Muon updates it. Raises KeyError for a name without a role.
    """
    if model.parametrization == "standard":
        return UNCHANGED
    base_width = known_after_loading(model.base_width, "model.base_width")
    width = model_sizes(model).width
    m = width / base_width
    role = role_of(name)
    initial = _initial_factor(name, shape, role, width, base_width)
    rate = m ** (MUON_RATE_POWER if muon else RATE_POWERS[role])
    if (QUERY_NORM if model.qk_norm else QUERIES).fullmatch(name):
        queries = query_factor(model)
        initial, rate = initial * queries, rate * queries
    return WidthFactors(initial, rate)


def role_of(name: str) -> Role:
    """KeyError for a name that no role knows: a new parameter needs one."""
    for pattern, role in ROLES:
        if re.fullmatch(pattern, name):
            return role
    raise KeyError(f"{name} has no role in ebwm_scale/model/width_scaling.py: give it one")


def query_factor(model: ModelConfig) -> float:
    """sqrt(d_b / d), which makes 1 / sqrt(d) of the scores sqrt(d_b) / d."""
    base_width = known_after_loading(model.base_width, "model.base_width")
    base_heads = known_after_loading(model.base_num_heads, "model.base_num_heads")
    return math.sqrt(base_width / base_heads / model_sizes(model).head_dimension)


def _initial_factor(name: str, shape: torch.Size, role: Role, width: int, base_width: int) -> float:
    m = width / base_width
    if role == "pull":  # released: A ~ 1 / D, the others 1 / sqrt(D)
        return m**-0.5 if name.endswith("quadratic.weight") else 1 / m
    factor = 1.0
    if XAVIER.fullmatch(name):
        other = sum(shape) - width
        factor = math.sqrt((other + width) / (other + base_width))
    return factor / m if role == "output" else factor


@torch.no_grad()
def scale_initial(module: nn.Module, model: ModelConfig) -> None:
    """Bring a fresh model's parameters to where its parametrization starts."""
    if model.parametrization == "standard":
        return
    discrete = _embedding_weights(module)
    for name, parameter in module.named_parameters():
        factor = width_factors(model, name, parameter.shape).initial
        if factor != 1 and id(parameter) not in discrete:
            parameter.mul_(factor)


def _embedding_weights(module: nn.Module) -> set[int]:
    """Tables of ids: N(0, 1) at every width."""
    tables: list[Tensor] = [m.weight for m in module.modules() if isinstance(m, nn.Embedding)]
    return {id(table) for table in tables}
