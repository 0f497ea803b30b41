"""Interlaced pictures: one field of each, its lines interpolated.

    line 0   moment t                line 0   moment t
    line 1   moment t + half   -->   line 2   moment t       --> scaled to the full height
    line 2   moment t
    line 3   moment t + half

A picture then shows one moment, as a player that deinterlaces does, at half the height's detail. It
depends on no picture beside it, so damage stays where it is. The upper field is taken of each, so
that moments are evenly spaced whichever field comes first.
"""

from __future__ import annotations

import functools
from fractions import Fraction
from typing import Any


def upper_field(frame) -> Any:
    """The upper field of a decoded frame (av.VideoFrame), half as high; of the same format."""
    graph = _graph(frame.width, frame.height, frame.format.name)
    graph.push(frame)
    return graph.pull()


@functools.lru_cache(maxsize=8)
def _graph(width: int, height: int, pixel_format: str):
    import av
    import av.filter

    graph = av.filter.Graph()
    graph.threads = 1
    source = graph.add_buffer(
        width=width,
        height=height,
        format=av.VideoFormat(pixel_format),
        time_base=Fraction(1, 1000),
    )
    field = graph.add("field", "type=top")
    sink = graph.add("buffersink")
    source.link_to(field)
    field.link_to(sink)
    graph.configure()
    return graph
