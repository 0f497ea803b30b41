"""A refinement step one block at a time: exact to second order, with one block's graph at hand.

A block maps p_(l+1) = f_l(p_l). The energy is the head of p_L, and with J_l = df_l/dp_l the inner
gradient g = c_0 + d follows, with d = dE/de where the head reads the candidates e itself:

    forward:    p_0 = e (+ anchor);  p_(l+1) = f_l(p_l)
    inner:      c_L = dE/dp_L;       c_l = J_l' c_(l+1)
                                        kept: p_l and c_l, two tensors of the stream's size a block
A workspace w beside e has the same c_0 and a d of its own; gamma_0 below is then the sum of both.
Given the loss's gradient gamma_0 on g, its gradients are those of s = <gamma_0, c_0 + d>, taken
along both chains:

    up:         <gamma_l, J_l' c_(l+1)>  gives  gamma_(l+1) on c_(l+1),  a_l on p_l,
                and the block's parameters, keys and values
    head:       <gamma_L, c_L> + <gamma_0, d> (+ the loss's gradient on E)
                gives  delta_L on p_L, and what e, the head and its readout get directly
    down:       delta_l = J_l' delta_(l+1) + a_l,
                and the block's parameters, keys and values once more

Each line runs f_l again, in plain autograd: a block's forward is computed 4 times instead of once
(planning: recomputation), and what autograd keeps of a block lives for one line. Parameters are
asked for through `gathered`, so that ZeRO stage 3 gathers a block when its turn comes and drops it
after. Their gradients are added to them (to their leaves, see deferred_backward.py) right here.

The observed stream goes the same way, to first order.
Source: derived for this project; the test is plain double backward in float64.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from ebwm_scale.model.blocks import Block
from ebwm_scale.model.context import Context, ObservedStream
from ebwm_scale.model.energy_transformer import EnergyTransformer, entering
from ebwm_scale.model.norm import Modulation
from ebwm_scale.model.rotary import Rotary
from ebwm_scale.refinement.deferred_backward import leaf_of, summed_in_fp32


def gathered(
    parameters: Iterable[nn.Parameter | Tensor],
) -> contextlib.AbstractContextManager[None]:
    """Within it the parameters (or their leaves) are whole, also where DeepSpeed splits them."""
    parameters = list(parameters)
    if any(hasattr(_parameter_of(p), "ds_id") for p in parameters):
        return _gathered(parameters)
    return contextlib.nullcontext()


@contextlib.contextmanager
def _gathered(parameters: list[Tensor]) -> Iterator[None]:
    from deepspeed.runtime.zero import GatheredParameters

    with GatheredParameters([_parameter_of(p) for p in parameters]):
        leaves = []
        for leaf in parameters:
            info = leaf_of(leaf)
            if info is None or info.parameter is None:
                continue
            leaves.append(leaf)
            leaf.data = info.parameter.data
            if info.graph_entry is None:
                # Autograd has to note the whole shape of what the gradient flows into.
                with torch.enable_grad():
                    info.graph_entry = info.parameter.expand_as(info.parameter)
                info.graph_entry.data = leaf.data.new_empty(0)
        try:
            yield
        finally:
            for leaf in leaves:
                leaf.data = leaf.data.new_empty(0)


def _parameter_of(tensor: Tensor) -> Tensor:
    """The parameter that a leaf stands for; a parameter itself."""
    info = leaf_of(tensor)
    if info is None or info.parameter is None:
        return tensor
    return info.parameter


def energy_and_gradients(
    network: EnergyTransformer,
    entered: Sequence[Tensor],
    context: Context,
    landscape: int,
    *,
    needs_graph: bool,
) -> tuple[Tensor, ...]:
    """E (B, s) and d(sum E)/du (B, s, D) of each u that entered: candidates, and a workspace.

    All are differentiable once more under needs_graph.
    """
    modulations, final = network.modulations_of(landscape, predicted=True)
    rotary = network.predicted_rotary(entered[0], context)
    layers = []
    for layer, pair, modulation in zip(network.predicted_blocks, context.keys_values, modulations):
        inputs = (*pair, *(modulation or ()))
        layers.append(_Layer(layer, inputs, rotary, context.offset, context.first_visible))
    step = _BlockwiseStep(network, layers, final, context.readout)
    workspace = entered[1] if len(entered) > 1 else None
    start = entering(entered[0], workspace, context)
    if not needs_graph:
        with torch.no_grad():
            energy, gradients, _, _ = step.forward([u.detach() for u in entered], start.detach())
        return energy, *gradients
    return _EnergyGradient.apply(step, len(entered), *entered, start, *step.inputs())


def advance(
    network: EnergyTransformer,
    stream: ObservedStream,
    landscape: int,
    stop: int,
    *,
    whole: bool = False,
) -> ObservedStream:
    """`network.advance` one block at a time; with a graph where gradients are enabled."""
    if stop == stream.block:
        return stream
    modulations, _ = network.modulations_of(landscape, predicted=False)
    rotary = network.observed_rotary(stream.rows)
    layers = []
    inputs = []
    for index in range(stream.block, stop):
        modulation = tuple(modulations[index] or ())
        layers.append(_Layer(network.layers[index], modulation, rotary, 0, stream.first_visible))
        inputs += layers[-1].inputs
    # The predicted stream enters in front of layers[first], where it has not done so before.
    first = max(0, network.first_predicted - stream.block)
    goes_behind = whole or network.goes_behind(stop - 1)
    entry, rows, *flat = _Encode.apply(layers, first, goes_behind, stream.rows, *inputs)
    if network.first_predicted >= stop:
        entry = None
    elif network.first_predicted <= stream.block:
        entry = stream.rows if stream.entry is None else stream.entry
    keys_values = (*stream.keys_values, *zip(flat[::2], flat[1::2]))
    return replace(stream, rows=rows, block=stop, keys_values=keys_values, entry=entry)


class _Layer:
    """A block with everything but the stream.

    inputs: keys, values and modulation of a predicted stream, or the modulation of an observed
    one, as tensors that may carry gradients.
    """

    def __init__(
        self,
        block: Block,
        inputs: tuple[Tensor, ...],
        rotary: Rotary,
        offset: int,
        first_visible: Tensor | None,
    ):
        self.block = block
        self.inputs = inputs
        self.rotary = rotary
        self.offset = offset
        self.first_visible = first_visible

    def forward_predicted(self, p: Tensor, inputs: tuple[Tensor, ...]) -> Tensor:
        keys, values, *modulation = inputs
        return self.block.forward_predicted(
            p,
            (keys, values),
            self.rotary,
            self.offset,
            Modulation(*modulation) if modulation else None,
            self.first_visible,
        )

    def forward_observed(
        self, o: Tensor, inputs: tuple[Tensor, ...], *, goes_on: bool
    ) -> tuple[Tensor, ...]:
        """(K, V) and, where the stream goes on, the stream behind it."""
        modulation = Modulation(*inputs) if inputs else None
        if not goes_on:
            return self.block.keys_values(o, self.rotary, modulation)
        return self.block.observed_with_keys(o, self.rotary, modulation, self.first_visible)


class _BlockwiseStep:
    """The forward and the backward of one refinement step, a block at a time."""

    def __init__(
        self,
        network: EnergyTransformer,
        layers: list[_Layer],
        final: tuple[Tensor, Tensor] | None,
        readout: Tensor | None,
    ):
        self.network = network
        self.layers = layers
        self.modulated = final is not None
        # What the head reads beside the stream and the candidates: shift and scale, readout.
        self.head_inputs = [*(final or ())]
        if readout is not None:
            self.head_inputs.append(readout)

    def inputs(self) -> list[Tensor]:
        inputs = []
        for layer in self.layers:
            inputs += layer.inputs
        return inputs + self.head_inputs

    def forward(
        self, entered: Sequence[Tensor], start: Tensor
    ) -> tuple[Tensor, list[Tensor], list[Tensor], list[Tensor]]:
        """(E, g of each that entered, p_0 .. p_L, c_0 .. c_L) without graph; start: p_0."""
        streams = [start]
        for layer in self.layers:
            with gathered(layer.block.parameters()):
                streams.append(layer.forward_predicted(streams[-1], layer.inputs))
        with torch.enable_grad():
            top = _leaf(streams[-1])
            own = [_leaf(u) for u in entered]
            energy = self._energy(top, own, [u.detach() for u in self.head_inputs])
            c_top, *direct = torch.autograd.grad(
                energy.sum(), (top, *own), allow_unused=True, materialize_grads=True
            )
            gradients = [c_top]
        for layer, stream in zip(reversed(self.layers), reversed(streams[:-1])):
            inputs = tuple(u.detach() for u in layer.inputs)
            with torch.enable_grad(), gathered(layer.block.parameters()):
                p = _leaf(stream)
                out = layer.forward_predicted(p, inputs)
                gradients.append(torch.autograd.grad(out, p, gradients[-1])[0])
        gradients.reverse()
        return energy.detach(), [gradients[0] + d for d in direct], streams, gradients

    def backward(
        self,
        entered: Sequence[Tensor],
        streams: list[Tensor],
        gradients: list[Tensor],
        energy_cotangent: Tensor | None,
        gradient_cotangents: Sequence[Tensor | None],
    ) -> list[Tensor | None]:
        """Gradients of what entered and of p_0, each on its own, and of inputs().

        Those of parameters are added to them.
        """
        inputs = [[_shared_leaf(u) for u in layer.inputs] for layer in self.layers]
        of_head = [_shared_leaf(u) for u in self.head_inputs]

        gamma = _sum_of_given(gradient_cotangents, gradients[0])
        second_order = []  # a_l
        for layer, own, stream, gradient in zip(self.layers, inputs, streams, gradients[1:]):
            with gathered(layer.block.parameters()):
                p = _leaf(stream)
                c = _leaf(gradient)
                out = layer.forward_predicted(p, tuple(own))
                (c_before,) = torch.autograd.grad(out, p, c, create_graph=True)
                c_before.backward(gamma)
            gamma = c.grad
            second_order.append(p.grad)

        top = _leaf(streams[-1])
        own_entered = [_leaf(u) for u in entered]
        energy = self._energy(top, own_entered, of_head)
        c_top, *direct = torch.autograd.grad(
            energy.sum(), (top, *own_entered), create_graph=True, allow_unused=True
        )
        outputs = (c_top, *direct, energy)
        _backward_where_given(outputs, (gamma, *gradient_cotangents, energy_cotangent))

        delta = top.grad
        for index in reversed(range(len(self.layers))):
            layer = self.layers[index]
            with gathered(layer.block.parameters()):
                p = _leaf(streams[index])
                layer.forward_predicted(p, tuple(inputs[index])).backward(delta)
            delta = p.grad + second_order[index]
        result = [u.grad for u in own_entered] + [delta]
        for own in inputs:
            result += [u.grad for u in own]
        return result + [u.grad for u in of_head]

    def _energy(self, top: Tensor, entered: Sequence[Tensor], of_head: Sequence[Tensor]) -> Tensor:
        """The head's energies; of_head: as in head_inputs."""
        rest = list(of_head)
        final = None
        if self.modulated:
            final = (rest.pop(0), rest.pop(0))
        readout = rest.pop() if rest else None
        return self.network.energy_head(top, final, entered[0], readout, *entered[1:])


class _EnergyGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, step, num_entered, *tensors):
        ctx.set_materialize_grads(False)
        entered = tensors[:num_entered]
        energy, of_entered, streams, gradients = step.forward(entered, tensors[num_entered])
        ctx.step = step
        ctx.num_entered = num_entered
        ctx.num_streams = len(streams)
        ctx.save_for_backward(*entered, *streams, *gradients)
        return energy, *of_entered

    @staticmethod
    def backward(ctx, energy_cotangent, *gradient_cotangents):
        if torch.is_grad_enabled():
            raise RuntimeError(
                "refinement.recompute block: the step's third derivative is not defined; "
                "call backward without create_graph=True"
            )
        entered = ctx.saved_tensors[: ctx.num_entered]
        kept = list(ctx.saved_tensors[ctx.num_entered :])
        streams = kept[: ctx.num_streams]
        gradients = kept[ctx.num_streams :]
        with torch.enable_grad():
            return (
                None,
                None,
                *ctx.step.backward(
                    entered, streams, gradients, energy_cotangent, gradient_cotangents
                ),
            )


class _Encode(torch.autograd.Function):
    """The observed stream (B, S, D) through its layers.

    Returns the stream in front of layer `first`, the stream behind the last layer, and keys and
    values of the layers from `first` on. The former is empty for first 0, where it is the input,
    and for a first that is not among the layers, the latter without goes_behind.
    """

    @staticmethod
    def forward(ctx, layers, first, goes_behind, observed, *inputs):
        ctx.set_materialize_grads(False)
        streams = [observed]
        keys_values = []
        last = len(layers) - 1
        for index, layer in enumerate(layers):
            with gathered(layer.block.parameters()):
                keys, values, *behind = layer.forward_observed(
                    streams[-1], layer.inputs, goes_on=goes_behind or index < last
                )
            if index >= first:
                keys_values += [keys, values]
            streams += behind
        ctx.layers = layers
        ctx.first = first
        ctx.goes_behind = goes_behind
        ctx.save_for_backward(*streams[: len(layers)])
        entry = streams[first] if 0 < first < len(layers) else observed.new_empty(0)
        output = streams[-1] if goes_behind else observed.new_empty(0)
        return entry, output, *keys_values

    @staticmethod
    def backward(ctx, of_entry, of_output, *of_keys_values):
        if torch.is_grad_enabled():
            raise RuntimeError(
                "refinement.recompute block: the observed stream has no second derivative; "
                "call backward without create_graph=True"
            )
        delta = of_output if ctx.goes_behind else None
        input_gradients = []
        last = len(ctx.layers) - 1
        with torch.enable_grad():
            for index in reversed(range(len(ctx.layers))):
                layer = ctx.layers[index]
                o = _leaf(ctx.saved_tensors[index])
                own = [_shared_leaf(u) for u in layer.inputs]
                of_pair = (None, None)
                if index >= ctx.first:
                    place = 2 * (index - ctx.first)
                    of_pair = of_keys_values[place : place + 2]
                with gathered(layer.block.parameters()):
                    outputs = layer.forward_observed(
                        o, tuple(own), goes_on=ctx.goes_behind or index < last
                    )
                    _backward_where_given(outputs, (*of_pair, delta))
                delta = o.grad
                if index == ctx.first and index > 0 and of_entry is not None:
                    delta = of_entry if delta is None else delta + of_entry
                input_gradients = [u.grad for u in own] + input_gradients
        return None, None, None, delta, *input_gradients


def _sum_of_given(cotangents: Sequence[Tensor | None], like: Tensor) -> Tensor:
    """The sum of those that are there, or zeros like another tensor."""
    given = [cotangent for cotangent in cotangents if cotangent is not None]
    if not given:
        return torch.zeros_like(like)
    total = given[0]
    for cotangent in given[1:]:
        total = total + cotangent
    return total


def _backward_where_given(
    outputs: tuple[Tensor | None, ...], cotangents: tuple[Tensor | None, ...]
) -> None:
    """Back-propagate through the outputs that have a graph and a cotangent."""
    given = []
    for output, cotangent in zip(outputs, cotangents):
        if output is not None and output.requires_grad and cotangent is not None:
            given.append((output, cotangent))
    if given:
        torch.autograd.backward([u for u, _ in given], [g for _, g in given])


def _leaf(tensor: Tensor) -> Tensor:
    return tensor.detach().requires_grad_()


def _shared_leaf(tensor: Tensor) -> Tensor:
    """Of a tensor that several lines read, and that may need no gradient."""
    return summed_in_fp32(tensor.detach().requires_grad_(tensor.requires_grad))
