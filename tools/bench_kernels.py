#!/usr/bin/env python3
"""Time the attention kernels, level by level, against what else there is, and hold them against
float64.

    python tools/bench_kernels.py --output results/bench_kernels_h100.json
        on a GPU: S 256 to 16384, d 64 and 128, bfloat16
    python tools/bench_kernels.py --device cpu --sizes 256 512 --head-dimension 64 --dtype float32
        --hidden 256 --tokens 512
    python tools/bench_kernels.py --tune --sizes 4096
        on a GPU: best tiles, as rows for kernels/ebwm_kernels/attention/tuning.py

Levels: forward; inner_gradient (q, k*, v* or q, K, V); backward (first order, all inputs);
double_backward; both_backwards, what a loss behind an inner gradient asks for: the double backward
and the ordinary one, in one pass where the kernels have it. Implementations:
    energy     energy_attention (own key per query; what a refinement step uses)
    causal     causal_attention (cotangents on dK and dV as well)
    math       the energy attention through PyTorch's scaled_dot_product_attention, MATH backend,
               under create_graph
    flex       FlexAttention, compiled, causal: forward and first-order backward, the yardstick
               for Triton (GPU)
    flash      flash-attn, causal: forward and first-order backward, where it is installed (GPU)
One row each: median milliseconds, TFLOP/s by the matrix products the implementation makes
(attention_ops.PRODUCTS; 2 and 5 for flex and flash; none for math), peak memory, largest relative
error of any result against float64 where S * S is small enough for that. A row that runs out of
memory says so. The file names command, device, versions and commit.
"""

from __future__ import annotations

import importlib.util
import json
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path

import ebwm_scale  # noqa: F401 (before torch is loaded: how its threads wait)

# isort: split

import torch
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from ebwm_kernels.attention import tuning as attention_tuning
from ebwm_kernels.attention.energy import energy_attention_definition
from ebwm_kernels.attention.ops import PRODUCTS, resolve_backend
from ebwm_kernels.attention.tuning import KERNELS, Tile, has_joint_tiles, padded_for, tile_for
from ebwm_kernels.attention.visibility import visible_pairs
from ebwm_scale.core.arguments import ArgumentParser

LARGEST_EXACT = 2048  # S up to which the float64 result is computed
CANDIDATES = [
    Tile(rows, keys, warps, stages)
    for rows in (32, 64, 128)
    for keys in (32, 64, 128)
    for warps in (4, 8)
    for stages in (1, 2, 3)
    if rows * keys <= 128 * 64 and not (warps == 8 and rows * keys < 64 * 32)
]
JOINT_PRODUCTS = 16  # kernels/ebwm_kernels/attention/joint.py
LEVEL_OF = {
    "_forward": "forward",
    "_gradient_query": "inner_gradient",
    "_gradient_key": "backward",
    "_tangent": "double_backward",
    "_second_own": "double_backward",
    "_second_query": "double_backward",
    "_second_key": "double_backward",
}


class Timer:
    def __init__(self, device: torch.device, repeats: int):
        self.device, self.repeats = device, repeats

    def __call__(self, run) -> tuple[float, float | None]:
        """(median milliseconds, peak GiB above what was allocated before) of run()."""
        run()
        if self.device.type == "cpu":
            times = []
            for _ in range(self.repeats):
                start = time.perf_counter()
                run()
                times.append(1e3 * (time.perf_counter() - start))
            return statistics.median(times), None
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        torch.cuda.synchronize()
        peak = (torch.cuda.max_memory_allocated() - before) / 2**30
        events = [
            (torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True))
            for _ in range(self.repeats)
        ]
        for start, end in events:
            start.record()
            run()
            end.record()
        torch.cuda.synchronize()
        return statistics.median(start.elapsed_time(end) for start, end in events), peak


class Problem:
    """Inputs of one size: q, own keys and values, K, V, and cotangents of every level."""

    def __init__(
        self, S: int, d: int, dtype: torch.dtype, device: torch.device, *, tokens: int, hidden: int
    ):
        self.B, self.H, self.S, self.d = max(1, tokens // S), hidden // d, S, d
        generator = torch.Generator(device).manual_seed(0)

        def draw():
            return torch.randn(
                self.B, self.H, S, d, generator=generator, device=device, dtype=torch.float32
            ).to(dtype)

        (
            self.q,
            self.k,
            self.v,
            self.k_self,
            self.v_self,
            self.grad,
            self.a,
            self.b,
            self.c,
            self.b_self,
            self.c_self,
            self.g_out,
        ) = (draw() for _ in range(12))
        self.backend = resolve_backend("auto", device, dtype, d, "bench_kernels")
        self.rest = (d**-0.5, 0, True, 1, 1, self.backend)

    def flops(self, products: int) -> float:
        return 2.0 * products * self.B * self.H * visible_pairs(self.S, self.S) * self.d

    def ours(self, own: bool) -> dict:
        """level -> (callable, products)."""
        ops, made = torch.ops.ebwm, PRODUCTS[self.backend]
        own_kv = (self.k_self, self.v_self) if own else (None, None)
        tensors = (self.q, self.k, self.v, *own_kv, None)  # None: first_visible
        out, normalizer = ops.attention(*tensors, *self.rest)
        cotangents = (
            (self.a, None, None, self.b_self, self.c_self)
            if own
            else (self.a, self.b, self.c, None, None)
        )

        at = (*tensors, out, normalizer, *self.rest)
        joins = own and self.backend == "triton" and has_joint_tiles(self.d, self.q.dtype)

        def gradient(with_keys, grad=self.grad):
            return ops.attention_gradient(grad, *at, with_keys, False)

        def double_backward():
            return ops.attention_double_backward(*cotangents, self.grad, *at)

        def both_backwards():
            if joins:
                direction = (self.a, self.b_self, self.c_self, self.grad)
                g_grad, *statistics = ops.attention_double_backward_up(*direction, *at)
                return g_grad, *ops.attention_double_backward_down(
                    *direction, *statistics, self.g_out, *at, True
                )
            g_grad, *second = double_backward()
            return g_grad, *(x + y for x, y in zip(second, gradient(True, self.g_out)))

        apart = made["double_backward"][not own] + made["gradient"][True]
        return {
            "forward": (lambda: ops.attention(*tensors, *self.rest)[0], made["forward"]),
            "inner_gradient": (lambda: gradient(not own), made["gradient"][not own]),
            "backward": (lambda: gradient(True), made["gradient"][True]),
            "double_backward": (double_backward, made["double_backward"][not own]),
            "both_backwards": (both_backwards, JOINT_PRODUCTS if joins else apart),
        }

    def autograd(self, attention) -> dict:
        """The levels of energy attention by autograd through `attention`; graphs are built outside
        the timing, as they are in ours.
        """
        leaves = [
            u.detach().to(self.q.dtype).requires_grad_()
            for u in (self.q, self.k_self, self.v_self, self.k, self.v)
        ]
        grad = self.grad.detach().requires_grad_()
        out = attention(*leaves)
        inner = torch.autograd.grad(out, leaves[:3], grad, create_graph=True)
        cotangents = (self.a, self.b_self, self.c_self)
        return {
            "forward": (lambda: attention(*leaves), None),
            "inner_gradient": (
                lambda: torch.autograd.grad(out, leaves[:3], grad, create_graph=True),
                None,
            ),
            "backward": (
                lambda: torch.autograd.grad(out, leaves, grad.detach(), retain_graph=True),
                None,
            ),
            "double_backward": (
                lambda: torch.autograd.grad(inner, [grad, *leaves], cotangents, retain_graph=True),
                None,
            ),
            "both_backwards": (
                lambda: torch.autograd.grad(
                    [*inner, out],
                    [grad, *leaves],
                    [*cotangents, self.g_out],
                    retain_graph=True,
                ),
                None,
            ),
        }

    def math(self, q, k_self, v_self, k, v):
        """Own keys as S more keys, each seen by one query."""
        seen = torch.ones(self.S, self.S, dtype=torch.bool, device=q.device).tril()
        mask = torch.cat([seen, torch.eye(self.S, dtype=torch.bool, device=q.device)], 1)
        with sdpa_kernel(SDPBackend.MATH):
            return F.scaled_dot_product_attention(
                q, torch.cat([k, k_self], 2), torch.cat([v, v_self], 2), attn_mask=mask
            )

    def first_order(self, attention) -> dict:
        q, k, v = (u.detach().requires_grad_() for u in (self.q, self.k, self.v))
        out = attention(q, k, v)
        return {
            "forward": (lambda: attention(q, k, v), 2),
            "backward": (
                lambda: torch.autograd.grad(out, (q, k, v), self.grad, retain_graph=True),
                5,
            ),
        }

    def exact(self) -> dict[str, list]:
        """Results of energy attention's levels on one head, in float64."""
        head = Problem.__new__(Problem)
        head.__dict__ |= {
            name: value[:1, :1].double() if isinstance(value, torch.Tensor) else value
            for name, value in self.__dict__.items()
        }
        return {
            level: _tensors(run())
            for level, (run, _) in head.autograd(energy_attention_definition).items()
        }


def implementations(problem: Problem, device: torch.device, names: list[str]):
    """name -> a function that returns its levels; what is not there on this machine is left out and
    said.
    """

    def flex():
        from torch.nn.attention.flex_attention import create_block_mask, flex_attention

        mask = create_block_mask(
            lambda b, h, i, j: i >= j, None, None, problem.S, problem.S, device=device.type
        )
        compiled = torch.compile(flex_attention)
        return problem.first_order(lambda q, k, v: compiled(q, k, v, block_mask=mask))

    def flash():
        from flash_attn import flash_attn_func

        return problem.first_order(
            lambda q, k, v: flash_attn_func(
                *(u.transpose(1, 2) for u in (q, k, v)), causal=True
            ).transpose(1, 2)
        )

    table = {
        "energy": lambda: problem.ours(True),
        "causal": lambda: problem.ours(False),
        "math": lambda: problem.autograd(problem.math),
        "flex": flex,
        "flash": flash,
    }
    for name in names:
        if (name in ("flex", "flash") and device.type != "cuda") or (
            name == "flash" and importlib.util.find_spec("flash_attn") is None
        ):
            continue
        yield name, table[name]


# gQ, gk*, .. come in another order from autograd: G, q, k*, v*, K, V against G, q, K, V, k*, v*.
ORDER = {
    "double_backward": [0, 1, 4, 5, 2, 3],
    "both_backwards": [0, 1, 4, 5, 2, 3],
    "inner_gradient": [0, 3, 4],
    "backward": [0, 3, 4, 1, 2],
    "forward": [0],
}


def measure(problem: Problem, device: torch.device, names: list[str], timer: Timer) -> list[dict]:
    rows, exact = [], problem.exact() if problem.S <= LARGEST_EXACT else None
    for name, build in implementations(problem, device, names):
        try:
            levels = build()
        except torch.OutOfMemoryError:
            rows.append({"implementation": name, "level": "all", "out_of_memory": True})
            continue
        for level, (run, products) in levels.items():
            row = {"implementation": name, "level": level}
            try:
                row["milliseconds"], row["peak_gib"] = timer(run)
                row["tflops_per_s"] = (
                    None
                    if products is None
                    else problem.flops(products) / row["milliseconds"] / 1e9
                )
                if exact is not None and name in ("energy", "math"):
                    ours = _tensors(run())
                    ours = [ours[i] for i in ORDER[level]] if name == "energy" else ours
                    row["error"] = max(
                        _error(mine, right) for mine, right in zip(ours, exact[level])
                    )
            except torch.OutOfMemoryError:
                row["out_of_memory"] = True
            rows.append(row)
        del levels
        if device.type == "cuda":
            torch.cuda.empty_cache()
    return rows


def tune(problem: Problem, timer: Timer, dtype: torch.dtype) -> None:
    """Time every candidate tile of every kernel inside its level, the other kernels' tiles as in
    the table.
    """
    from triton.errors import TritonError

    from ebwm_kernels.attention import launches

    for own in (True, False):
        for kernel in KERNELS:
            if kernel == "_second_own" and not own:
                continue
            times = {}
            for tile in CANDIDATES:
                launches.tile_for = lambda name, *rest, t=tile, k=kernel, **more: (
                    t if name == k else tile_for(name, *rest, **more)
                )
                try:
                    times[tile] = timer(problem.ours(own)[LEVEL_OF[kernel]][0])[0]
                except (TritonError, RuntimeError) as error:  # a tile too large for the GPU
                    times[tile] = float("inf")
                    print(f"    {kernel} {tuple(tile)}: {type(error).__name__}", file=sys.stderr)
            launches.tile_for = tile_for
            best = min(times, key=times.get)
            now = tile_for(
                kernel,
                launches.architecture(problem.q.device),
                padded_for(problem.d),
                dtype,
                not own,
            )
            print(
                json.dumps(
                    {
                        "own": own,
                        "kernel": kernel,
                        "S": problem.S,
                        "d": problem.d,
                        "best": list(best),
                        "milliseconds_of_level": times[best],
                        "table": list(now),
                        "milliseconds_of_table": timer(problem.ours(own)[LEVEL_OF[kernel]][0])[0],
                    }
                ),
                flush=True,
            )


def _tensors(result) -> list[torch.Tensor]:
    return [result] if isinstance(result, torch.Tensor) else [u.detach() for u in result]


def _error(ours: torch.Tensor, exact: torch.Tensor) -> float:
    """Relative Euclidean error of the first head."""
    return float((ours[:1, :1].detach().double() - exact.detach()).norm() / exact.detach().norm())


def environment(device: torch.device) -> dict:
    def version(name):
        return (
            None
            if importlib.util.find_spec(name) is None
            else getattr(__import__(name), "__version__", "unknown")
        )

    commit = (
        subprocess.run(
            ["git", "rev-parse", "HEAD"], capture_output=True, text=True, cwd=Path(__file__).parent
        ).stdout.strip()
        or None
    )
    return {
        "command": " ".join(sys.argv),
        "device": torch.cuda.get_device_name()
        if device.type == "cuda"
        else platform.processor() or platform.machine(),
        "torch": torch.__version__,
        "triton": version("triton"),
        "flash_attn": version("flash_attn"),
        "cuda": torch.version.cuda,
        "python": platform.python_version(),
        "threads": torch.get_num_threads(),
        "commit": commit,
        "tuning": {
            a: {str(d): {k: list(t) for k, t in row.items()} for d, row in table.items()}
            for a, table in attention_tuning.HALF.items()
        },
    }


def main() -> int:
    parser = ArgumentParser(description=__doc__)
    parser.add_argument(
        "--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu"
    )
    parser.add_argument(
        "--sizes", nargs="+", type=int, default=[256, 512, 1024, 2048, 4096, 8192, 16384]
    )
    parser.add_argument("--head-dimension", nargs="+", type=int, default=[64, 128])
    parser.add_argument("--dtype", choices=["bfloat16", "float16", "float32"], default="bfloat16")
    parser.add_argument(
        "--tokens",
        type=int,
        default=16384,
        help="positions of all samples together: B = tokens / S",
    )
    parser.add_argument("--hidden", type=int, default=2048, help="H = hidden / d")
    parser.add_argument(
        "--implementations",
        nargs="+",
        default=["energy", "causal", "math", "flex", "flash"],
        choices=["energy", "causal", "math", "flex", "flash"],
    )
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--tune", action="store_true", help="time other tiles instead (GPU)")
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    device, timer = (
        torch.device(arguments.device),
        Timer(torch.device(arguments.device), arguments.repeats),
    )
    if arguments.tune and device.type != "cuda":
        parser.error("--tune needs a GPU: tiles are timed, not guessed")
    if sizes := [d for d in arguments.head_dimension if arguments.hidden % d]:
        parser.error(
            f"--hidden is {arguments.hidden}: must be a multiple of the head dimensions, "
            f"{sizes[0]} is not a divisor"
        )
    result = environment(device) | {
        "tokens": arguments.tokens,
        "hidden": arguments.hidden,
        "dtype": arguments.dtype,
        "rows": [],
    }
    for d in arguments.head_dimension:
        for S in arguments.sizes:
            problem = Problem(
                S,
                d,
                getattr(torch, arguments.dtype),
                device,
                tokens=arguments.tokens,
                hidden=arguments.hidden,
            )
            if arguments.tune:
                tune(problem, timer, getattr(torch, arguments.dtype))
                continue
            for row in measure(problem, device, arguments.implementations, timer):
                row = {
                    "S": S,
                    "d": d,
                    "B": problem.B,
                    "H": problem.H,
                    "backend": problem.backend,
                } | row
                result["rows"].append(row)
                print(json.dumps(row), flush=True)
            if arguments.output:
                arguments.output.write_text(json.dumps(result, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
