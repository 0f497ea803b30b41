"""What the energy is made of behind the last block: `model.energy_head`, a sum of terms.

    n  what leaves the predicted stream, normed (and modulated, under adaLN)
    e  the embedded candidate that entered it, without its anchor
    h  the observed stream's last output at the same position, through a norm of its own

    linear      w n                  the released head
    quadratic   - n A n / 2          A a full matrix; only its symmetric part counts
    bilinear    - s e M n, and - r w M2 n with a workspace w (workspace.py)
    direct      - s e n: bilinear with M = 1, whose weights the blocks take over
    context     - s e C h

The linear term's adjoint is one constant vector, so little content reaches the gradient. The
others' hold the network's own output: dE/de = -s (M n + n + C h) + what comes through n.

s = 1 / (refinement.step_size * state.map_scale), both as configured, makes a step of a fresh model
what a fresh Transformer++ does. The state moves by -alpha W dE/de, W with its factor, so by
W0 (M n + n + C h), W0 the unscaled map: direct is a Transformer++ whose output is tied to what
embeds its predictions. And M, C with entries of variance 1 / D keep the length
of n and h. r = 1 / refinement.workspace_step_size likewise, with a matrix of its own: e and w want
different things of n. A starts at entries of deviation sqrt(2) / D: A n is then as long as w.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ebwm_scale.model.norm import RMSNorm


class ContentTerms(nn.Module):
    """The terms beside the linear one; a term that is not asked for has no parameters.

    has_direct: whether n itself pulls, beside M n. scale, workspace_scale: s and r above,
    constants; r is None without a workspace.
    """

    quadratic: nn.Linear | None  # A
    bilinear: nn.Linear | None  # M
    context: nn.Linear | None  # C
    context_norm: RMSNorm | None
    workspace: nn.Linear | None  # M2

    def __init__(
        self,
        width: int,
        terms: Sequence[str],
        epsilon: float,
        scale: float,
        workspace_scale: float | None = None,
        backend: str = "auto",
    ):
        super().__init__()
        self.scale = scale
        self.workspace_scale = 0.0 if workspace_scale is None else workspace_scale
        self.has_direct = "direct" in terms
        self.workspace = None
        if workspace_scale is not None and "bilinear" in terms:
            self.workspace = nn.Linear(width, width, bias=False)
        self.quadratic = None
        self.bilinear = None
        self.context = None
        self.context_norm = None
        if "quadratic" in terms:
            self.quadratic = nn.Linear(width, width, bias=False)
        if "bilinear" in terms:
            self.bilinear = nn.Linear(width, width, bias=False)
        if "context" in terms:
            self.context = nn.Linear(width, width, bias=False)
            self.context_norm = RMSNorm(width, epsilon, backend)

    def initialize(self, *, zero: bool) -> None:
        """See above; zero: all terms start at 0, as adaln_zero's energy does."""
        for linear in (self.quadratic, self.bilinear, self.context, self.workspace):
            if linear is None:
                continue
            width = linear.in_features
            deviation = math.sqrt(2) / width if linear is self.quadratic else width**-0.5
            if zero:
                nn.init.zeros_(linear.weight)
            else:
                nn.init.normal_(linear.weight, std=deviation)

    def readout(self, observed: Tensor) -> Tensor:
        """C h (B, S, D) of the observed stream's last output (B, S, D): once per context."""
        assert self.context is not None and self.context_norm is not None
        return self.context(self.context_norm(observed))

    def energy(
        self,
        normed: Tensor,
        embedded: Tensor,
        readout: Tensor | None,
        workspace: Tensor | None = None,
    ) -> Tensor | None:
        """The terms' sum (B, S), or None where there is none; differentiable.

        normed n, embedded e, readout C h, workspace w: (B, S, D). No w counts as 0.
        """
        energy = None
        if self.quadratic is not None:
            energy = -0.5 * (normed * self.quadratic(normed)).sum(-1)
        pull = self.pull(normed, readout)
        if pull is not None:
            of_content = -self.scale * (embedded * pull).sum(-1)
            energy = of_content if energy is None else energy + of_content
        if self.workspace is not None and workspace is not None:
            assert energy is not None, "it comes with the bilinear term"
            energy = energy - self.workspace_scale * (workspace * self.workspace(normed)).sum(-1)
        return energy

    def pull(self, normed: Tensor, readout: Tensor | None) -> Tensor | None:
        """M n + n + C h (B, S, D), along which the candidate's energy falls; None without any."""
        pulls = []
        if self.bilinear is not None:
            pulls.append(self.bilinear(normed))
        if self.has_direct:
            pulls.append(normed)
        if readout is not None:
            pulls.append(readout)
        return functools.reduce(torch.add, pulls) if pulls else None

    def gradients(
        self, normed: Tensor, embedded: Tensor, readout: Tensor | None
    ) -> tuple[Tensor | None, Tensor | None]:
        """(dE/dn, dE/de) of `energy` in closed form, (B, S, D) each; None where it is 0."""
        of_normed = None
        if self.quadratic is not None:
            weight = self.quadratic.weight
            of_normed = -0.5 * (normed @ (weight + weight.T))
        if self.bilinear is not None or self.has_direct:
            change = self._back(embedded).mul_(-self.scale)
            of_normed = change if of_normed is None else of_normed + change
        pull = self.pull(normed, readout)
        return of_normed, None if pull is None else -self.scale * pull

    def _back(self, embedded: Tensor) -> Tensor:
        """M' e + e (B, S, D), of the terms that there are; a tensor of its own."""
        if self.bilinear is None:
            return embedded.clone()
        back = embedded @ self.bilinear.weight
        return back.add_(embedded) if self.has_direct else back
