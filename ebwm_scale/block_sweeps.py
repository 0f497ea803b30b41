"""A refinement step one block at a time: exact to second order, with one block's graph and one block's parameters at hand.

A block maps p_(l+1) = f_l(p_l). The energy is the head of p_L, and with J_l = df_l/dp_l the inner gradient g = c_0 follows from

    forward:    p_0 = embedded;  p_(l+1) = f_l(p_l)
    inner:      c_L = dE/dp_L;   c_l = J_l' c_(l+1)
                                                    kept: p_l and c_l, two tensors of the stream's size per block
Given the loss's gradient gamma_0 on g, its gradients are those of s = <gamma_0, c_0>, taken along both chains:

    up:         <gamma_l, J_l' c_(l+1)>  gives  gamma_(l+1) on c_(l+1),  a_l on p_l,  and the block's parameters, keys and values
    head:       <gamma_L, c_L> (+ the loss's gradient on E)  gives  delta_L on p_L
    down:       delta_l = J_l' delta_(l+1) + a_l,  and the block's parameters, keys and values once more

Each line runs f_l again, in plain autograd; a block's forward is computed 4 times in place of once (accounting.py: recomputation), and what
autograd keeps of a block lives for one line. Parameters are asked for through `available`, so that ZeRO stage 3 gathers a block when its
turn comes and drops it after. Their gradients are added to them (to their stand-ins, see term_gradients.py) right here.

The observed stream goes the same way, to first order. Source: derived for this project; the test is plain double backward in float64.
"""

from __future__ import annotations

import contextlib
from typing import ContextManager, Iterable, Iterator

import torch
from torch import Tensor, nn


def available(parameters: Iterable[nn.Parameter | Tensor]) -> ContextManager[None]:
    """Within it the parameters (or their stand-ins) are whole, also where DeepSpeed has partitioned them."""
    parameters = list(parameters)
    if any(hasattr(getattr(p, "stands_for", p), "ds_id") for p in parameters):
        return _gathered(parameters)
    return contextlib.nullcontext()


@contextlib.contextmanager
def _gathered(parameters: list[Tensor]) -> Iterator[None]:
    from deepspeed.runtime.zero import GatheredParameters

    with GatheredParameters([getattr(p, "stands_for", p) for p in parameters]):
        stand_ins = [p for p in parameters if hasattr(p, "stands_for")]
        for p in stand_ins:
            p.data = p.stands_for.data
            if not hasattr(
                p, "source"
            ):  # where the parameter's gradient enters its graph: autograd notes the whole shape now
                with torch.enable_grad():
                    p.source = p.stands_for.expand_as(p.stands_for)
                p.source.data = p.data.new_empty(0)
        try:
            yield
        finally:
            for p in stand_ins:
                p.data = p.data.new_empty(0)


def energy_and_gradient(
    network, embedded: Tensor, context, landscape: int, *, create_graph: bool
) -> tuple[Tensor, Tensor]:
    """E (B, s) and g = d(sum E)/d embedded (B, s, D), both differentiable once more under create_graph."""
    modulations, final = network.modulations_of(landscape, predicted=True)
    layers = [
        _Layer(
            layer,
            (*pair, *(modulation or ())),
            network.predicted_rotary(embedded, context),
            context.offset,
        )
        for layer, pair, modulation in zip(network.layers, context.keys_values, modulations)
    ]
    sweep = _Sweep(network, layers, final or ())
    if not create_graph:
        with torch.no_grad():
            return sweep.forward(embedded.detach())[:2]
    return _EnergyGradient.apply(sweep, embedded, *sweep.inputs())


def encode(network, observed: Tensor, landscape: int) -> list[tuple[Tensor, Tensor]]:
    """(K, V) of every layer of observed embeddings (B, S, D); with a graph where gradients are enabled."""
    modulations, _ = network.modulations_of(landscape, predicted=False)
    layers = [
        _Layer(layer, tuple(modulation or ()), network.rotary(observed.shape[1], observed), 0)
        for layer, modulation in zip(network.layers, modulations)
    ]
    flat = _Encode.apply(layers, observed, *(u for layer in layers for u in layer.inputs))
    return list(zip(flat[::2], flat[1::2]))


class _Layer:
    """A block with everything but the stream: keys, values and modulation as tensors that may carry gradients."""

    def __init__(self, block: nn.Module, inputs: tuple[Tensor, ...], rotary, offset: int):
        self.block, self.inputs, self.rotary, self.offset = block, inputs, rotary, offset

    def predict(self, p: Tensor, inputs: tuple[Tensor, ...]) -> Tensor:
        from .model.transformer import Modulation

        return self.block.predict(
            p, inputs[:2], self.rotary, self.offset, Modulation(*inputs[2:]) if inputs[2:] else None
        )

    def observe(self, o: Tensor, inputs: tuple[Tensor, ...], *, last: bool) -> tuple[Tensor, ...]:
        """(K, V) and, but for the last block, the stream behind it."""
        from .model.transformer import Modulation

        modulation = Modulation(*inputs) if inputs else None
        keys, values = self.block.keys_values(o, self.rotary, modulation)
        return (
            (keys, values)
            if last
            else (keys, values, self.block.observe(o, keys, values, self.rotary, modulation))
        )


class _Sweep:
    def __init__(self, network, layers: list[_Layer], final: tuple[Tensor, ...]):
        self.network, self.layers, self.final = network, layers, tuple(final)

    def inputs(self) -> list[Tensor]:
        return [u for layer in self.layers for u in layer.inputs] + list(self.final)

    def forward(self, p: Tensor) -> tuple[Tensor, Tensor, list[Tensor], list[Tensor]]:
        """(E, g, p_0 .. p_L, c_0 .. c_L) without graph."""
        streams = [p]
        for layer in self.layers:
            with available(layer.block.parameters()):
                streams.append(layer.predict(streams[-1], layer.inputs))
        with torch.enable_grad():
            top = _leaf(streams[-1])
            energy = self.network.score(top, self.final)
            slopes = [torch.autograd.grad(energy.sum(), top)[0]]
        for layer, p in zip(reversed(self.layers), reversed(streams[:-1])):
            with torch.enable_grad(), available(layer.block.parameters()):
                p = _leaf(p)
                slopes.append(
                    torch.autograd.grad(
                        layer.predict(p, tuple(u.detach() for u in layer.inputs)), p, slopes[-1]
                    )[0]
                )
        return energy.detach(), slopes[-1], streams, slopes[::-1]

    def backward(
        self,
        streams: list[Tensor],
        slopes: list[Tensor],
        on_energy: Tensor | None,
        on_gradient: Tensor,
    ) -> list[Tensor | None]:
        """Gradients of embedded and of inputs(); those of parameters are added to them."""
        gamma, bends = on_gradient, []
        inputs = [[_leaf(u, u.requires_grad) for u in layer.inputs] for layer in self.layers]
        final = [_leaf(u, u.requires_grad) for u in self.final]
        for layer, own, p, slope in zip(self.layers, inputs, streams, slopes[1:]):
            with available(layer.block.parameters()):
                p, slope = _leaf(p), _leaf(slope)
                (pulled,) = torch.autograd.grad(
                    layer.predict(p, tuple(own)), p, slope, create_graph=True
                )
                pulled.backward(gamma)
            gamma, bend = slope.grad, p.grad
            bends.append(bend)
        top = _leaf(streams[-1])
        energy = self.network.score(top, final)
        (slope,) = torch.autograd.grad(energy.sum(), top, create_graph=True)
        outputs, cotangents = (
            ([slope], [gamma]) if on_energy is None else ([slope, energy], [gamma, on_energy])
        )
        torch.autograd.backward(outputs, cotangents)
        delta = top.grad
        for layer, own, p, bend in zip(
            reversed(self.layers), reversed(inputs), reversed(streams[:-1]), reversed(bends)
        ):
            with available(layer.block.parameters()):
                p = _leaf(p)
                layer.predict(p, tuple(own)).backward(delta)
            delta = p.grad + bend
        return [delta, *(u.grad for own in inputs for u in own), *(u.grad for u in final)]


class _EnergyGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, sweep, embedded, *inputs):
        ctx.set_materialize_grads(False)
        energy, gradient, streams, slopes = sweep.forward(embedded)
        ctx.sweep, ctx.num_layers = sweep, len(streams)
        ctx.save_for_backward(*streams, *slopes)
        return energy, gradient

    @staticmethod
    def backward(ctx, on_energy, on_gradient):
        if torch.is_grad_enabled():
            raise RuntimeError(
                "refinement.checkpoint block: the step's third derivative is not defined; call backward without create_graph=True"
            )
        saved = ctx.saved_tensors
        streams, slopes = saved[: ctx.num_layers], saved[ctx.num_layers :]
        with torch.enable_grad():
            on_gradient = torch.zeros_like(slopes[0]) if on_gradient is None else on_gradient
            return None, *ctx.sweep.backward(streams, slopes, on_energy, on_gradient)


class _Encode(torch.autograd.Function):
    @staticmethod
    def forward(ctx, layers, observed, *inputs):
        ctx.set_materialize_grads(False)
        streams, keys_values = [observed], []
        for index, layer in enumerate(layers):
            with available(layer.block.parameters()):
                keys, values, *behind = layer.observe(
                    streams[-1], layer.inputs, last=index + 1 == len(layers)
                )
            keys_values += [keys, values]
            streams += behind
        ctx.layers = layers
        ctx.save_for_backward(*streams)
        return tuple(keys_values)

    @staticmethod
    def backward(ctx, *gradients):
        if torch.is_grad_enabled():
            raise RuntimeError(
                "refinement.checkpoint block: the observed stream has no second derivative; call backward without create_graph=True"
            )
        delta, all_inputs = None, []
        with torch.enable_grad():
            for index in reversed(range(len(ctx.layers))):
                layer, o = ctx.layers[index], _leaf(ctx.saved_tensors[index])
                own = [_leaf(u, u.requires_grad) for u in layer.inputs]
                with available(layer.block.parameters()):
                    outputs = layer.observe(o, tuple(own), last=index + 1 == len(ctx.layers))
                    wanted = [
                        (u, g)
                        for u, g in zip(outputs, (*gradients[2 * index : 2 * index + 2], delta))
                        if g is not None
                    ]
                    if wanted:
                        torch.autograd.backward(*map(list, zip(*wanted)))
                delta = o.grad
                all_inputs = [u.grad for u in own] + all_inputs
        return None, delta, *all_inputs


def _leaf(tensor: Tensor, requires_grad: bool = True) -> Tensor:
    return tensor.detach().requires_grad_(requires_grad)
