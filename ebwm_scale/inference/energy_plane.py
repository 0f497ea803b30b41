"""The energy on a plane through the path of a refinement, in the space of embeddings.

    e_0, e_1, .. e_N     where the steps have led; the plane goes through e_N
    across               from e_0 to e_N
    up                   where the rest of the path departs most from that line; of a path that is
                         straight, towards the second most probable token

    E(e_N + x across + y up)      x, y: distances in that space

The path is exactly in the plane where it has two steps; of a longer one its projection is drawn,
and `off_plane` says how far from it the path goes. Idea: projections of training paths on their
principal directions, Li et al., arXiv 1712.09913.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

POINTS = 15  # along each direction
MARGIN = 0.35  # of the path's extent, on every side
_STRAIGHT = 1e-3  # of the path's length: a smaller departure has no direction


@dataclass(frozen=True)
class Plane:
    """Where a plane lies: origin (D,), across and up (D,) of length 1; xs, ys: the POINTS of its
    grid. path: (x, y) of each moment. off_plane: the largest distance of a moment from the plane,
    as a share of the path's extent. up_is_path: see above.
    """

    origin: Tensor
    across: Tensor
    up: Tensor
    xs: list[float]
    ys: list[float]
    path: list[tuple[float, float]]
    off_plane: float
    up_is_path: bool

    def grid(self) -> Tensor:
        """The embeddings (POINTS * POINTS, D), row by row from the lowest y on."""
        xs = torch.tensor(self.xs, dtype=self.origin.dtype, device=self.origin.device)
        ys = torch.tensor(self.ys, dtype=self.origin.dtype, device=self.origin.device)
        points = (
            self.origin
            + xs[None, :, None] * self.across[None, None]
            + ys[:, None, None] * self.up[None, None]
        )
        return points.flatten(0, 1)


@dataclass(frozen=True)
class EnergyPlane:
    """energies: POINTS rows of POINTS, of the plane's grid; along_path: of each moment's own
    embedding, in the same landscape, the last one.
    """

    plane: Plane
    energies: list[list[float]]
    along_path: list[float]


def plane_through(path: Tensor, towards: Tensor) -> Plane | None:
    """Of a path (N + 1, D) of embeddings; towards (D,): another embedding, for a straight one.

    None where nothing moves, or where no second direction can be found.
    """
    origin = path[-1]
    way = origin - path[0]
    extent = float((path - origin).norm(dim=-1).max())
    if not float(way.norm()) > 1e-3 * extent:
        return None
    across = way / way.norm()
    rest = _without(path - origin, across)
    up_is_path = float(rest.norm(dim=-1).max()) > _STRAIGHT * extent
    if up_is_path:
        up = torch.linalg.svd(rest.double(), full_matrices=False).Vh[0].to(path)
        up = _without(up[None], across)[0]
    else:
        up = _without((towards - origin)[None], across)[0]
    if not float(up.norm()) > _STRAIGHT * extent:
        return None
    up = up / up.norm()
    if float((rest @ up).sum()) < 0:  # a sign of its own, the same for the same path
        up = -up
    relative = path - origin
    places = torch.stack([relative @ across, relative @ up], 1)
    back = places[:, :1] * across + places[:, 1:] * up
    off = float((relative - back).norm(dim=-1).max()) / extent
    low, high = places.amin(0), places.amax(0)
    side = float((high - low).max()) * (1 + 2 * MARGIN)
    middle = (low + high) / 2
    steps = torch.linspace(-0.5, 0.5, POINTS, dtype=torch.float64) * side
    return Plane(
        origin,
        across,
        up,
        (float(middle[0]) + steps).tolist(),
        (float(middle[1]) + steps).tolist(),
        [(float(x), float(y)) for x, y in places],
        off,
        up_is_path,
    )


def _without(vectors: Tensor, direction: Tensor) -> Tensor:
    """Vectors (n, D) without their part along a direction (D,) of length 1."""
    return vectors - (vectors @ direction)[:, None] * direction
