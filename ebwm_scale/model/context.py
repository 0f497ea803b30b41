"""The observed stream on its way through the blocks, and what the predicted one reads of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from torch import Tensor

from ebwm_scale.model.sequence import SequencePart


@dataclass(frozen=True)
class Context:
    """The observed stream as the predicted one sees it.

    keys_values: (K, V) per block of the predicted stream, each (B, H_kv, C, d). offset: keys in
    front of the first row's own observed position. anchor (B, S, D): added to the candidates;
    None where they stand alone. readout (B, S, D): of the head's context term, where there is one.
    first_visible (B, S) int32: the first key that each row sees, the start of its document; None:
    all see key 0. group_size, context_group: rows and keys per group.
    part: this process's of a sequence cut over several. Rows and anchors are then its own; keys,
    values and first_visible are those of all positions.
    """

    keys_values: list[tuple[Tensor, Tensor]]
    offset: int
    anchor: Tensor | None = None
    readout: Tensor | None = None
    first_visible: Tensor | None = None
    group_size: int = 1
    context_group: int = 1
    part: SequencePart | None = None

    def map(self, function: Callable[[Tensor], Tensor]) -> Context:
        """The same with every tensor that carries gradients replaced by the function's result."""
        return replace(
            self,
            keys_values=[(function(keys), function(values)) for keys, values in self.keys_values],
            anchor=None if self.anchor is None else function(self.anchor),
            readout=None if self.readout is None else function(self.readout),
        )

    def select(self, rows: Tensor | slice) -> Context:
        """The context of some samples."""
        part = self.map(lambda tensor: tensor[rows])
        if self.first_visible is None:
            return part
        return replace(part, first_visible=self.first_visible[rows])

    def visible_to(self, positions: slice) -> Context:
        """What the candidates of some positions see.

        That is everything up to the last of them, the first one's own observed position included.
        Of a sequence cut over processes, keys stay whole: the others' rows see more of them.
        """
        if self.part is not None:
            return self._visible_to_parts(self.part, positions)
        first, last = [
            self.offset + place // self.group_size * self.context_group
            for place in (positions.start, positions.stop)
        ]
        pairs = [(keys[:, :, :last], values[:, :, :last]) for keys, values in self.keys_values]
        first_visible = None
        if self.first_visible is not None:
            first_visible = self.first_visible[:, positions]
        return replace(
            self,
            keys_values=pairs,
            offset=first,
            anchor=None if self.anchor is None else self.anchor[:, positions],
            readout=None if self.readout is None else self.readout[:, positions],
            first_visible=first_visible,
        )

    def _visible_to_parts(self, part: SequencePart, positions: slice) -> Context:
        """`visible_to` for the same positions of each part; offset: of this process's rows."""
        first_visible = None
        if self.first_visible is not None:
            first_visible = part.rows_of_all(self.first_visible, positions)
        return replace(
            self,
            offset=self.offset + part.first + positions.start,
            anchor=None if self.anchor is None else self.anchor[:, positions],
            readout=None if self.readout is None else self.readout[:, positions],
            first_visible=first_visible,
        )


@dataclass(frozen=True)
class ObservedStream:
    """The observed stream on its way through the blocks.

    rows (B, offset + S, D): in front of block `block`. offset: the landscape's token in front.
    keys_values: of the predicted stream's blocks passed so far. entry (B, offset + S, D): the
    stream where the predicted one enters, once that is passed. first_visible: see Context.
    """

    rows: Tensor
    offset: int
    block: int = 0
    keys_values: tuple[tuple[Tensor, Tensor], ...] = ()
    entry: Tensor | None = None
    first_visible: Tensor | None = None

    def map(self, function: Callable[[Tensor], Tensor]) -> ObservedStream:
        """The same with every tensor that carries gradients replaced by the function's result."""
        return replace(
            self,
            rows=function(self.rows),
            keys_values=tuple((function(k), function(v)) for k, v in self.keys_values),
            entry=None if self.entry is None else function(self.entry),
        )
