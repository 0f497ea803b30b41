"""Numbers in a model's parameters, by part."""

from __future__ import annotations

from torch import nn

# first parts of a parameter's name -> the part it counts for, in the order of the report
PARAMETER_PARTS = {
    "token_embedding": "token_embedding",
    "frame_projection": "frame_projection",
    "condition_embeddings": "condition_embeddings",
    "state_map": "state_map",
    "network.layers": "blocks",
    "network.landscape_embedding": "conditioning",
    "network.modulations": "conditioning",
    "network.final_modulation": "conditioning",
    "network.norm": "norm_and_head",
    "network.head": "norm_and_head",
    "network.content": "norm_and_head",
    "network.feedback": "feedback",
    "network.workspace_feedback": "feedback",
    "network.workspace_map": "workspace",
    "output": "output",
    "step_size": "step_size",
    "workspace_step_size": "step_size",
    "exit_logits": "exits",
}


def count_parameters(model: nn.Module) -> dict[str, int]:
    """Numbers in the model's parameters by part, learned or not, "total" last; a shared parameter
    counts once.

    model: a WorldModel (not an engine around one). Raises KeyError for a parameter that belongs to
    no known part.
    """
    counts: dict[str, int] = {}
    for name, parameter in model.named_parameters():
        path = name.split(".")
        part = PARAMETER_PARTS[".".join(path[:2]) if path[0] == "network" else path[0]]
        counts[part] = counts.get(part, 0) + parameter.numel()
    ordered = {
        part: counts[part] for part in dict.fromkeys(PARAMETER_PARTS.values()) if part in counts
    }
    return ordered | {"total": sum(counts.values())}
