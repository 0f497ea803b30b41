"""Time and memory of one training step (forward, backward, AdamW), on random tokens.

    python tools/bench_step.py --model energy --size xxs --sequence 256 --vocabulary 32000 --batch 4
        --num-refinement-steps 2 --conditioning default --steps 3 [--compare baseline]

Prints one JSON line: median wall and CPU seconds per step, tokens/s, peak memory over the process's
start (resident memory on a CPU, allocator peak on a GPU) and what of it are weights and optimizer,
FLOPs per step by part, MFU on a GPU. With --compare baseline, Transformer++ steps are interleaved
in the same process and `cpu_ratio`, `wall_ratio` are the medians of the ratios of neighbouring
steps (memory is then that of both; measure it alone).
--profile adds where the time of one further step goes, by operation. --sweep
  vocabulary=8192,32000,50277 (or sequence, batch, num-refinement-steps) does all of this once per
  value, each in a process of its own, and --plot FILE.png draws time and memory against it.
"""

from __future__ import annotations

import json
import resource
import statistics
import subprocess
import sys
import time

from ebwm_scale.core.arguments import ArgumentParser, command

# What --set asks of an energy model and a baseline refuses.
WITHOUT_FURTHER_STEPS = (
    "refinement.candidates=null",
    "refinement.reencode=none",
    "refinement.reencode_every=1",
    "state.workspace=null",
    "state.workspace_initial=zeros",
)
SWEEPABLE = ("vocabulary", "sequence", "batch", "num-refinement-steps")


@command
def main() -> int:
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("--model", choices=["energy", "baseline"], default="energy")
    parser.add_argument("--size", default="xxs")
    parser.add_argument("--sequence", type=int, default=256, help="observed positions per sample")
    parser.add_argument("--vocabulary", type=int, default=32000)
    parser.add_argument("--batch", type=int, default=4, help="samples per step")
    parser.add_argument("--num-refinement-steps", type=int, default=2)
    parser.add_argument("--conditioning", default="default")
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="fp32")
    parser.add_argument("--steps", type=int, default=3, help="timed steps, after one that is not")
    parser.add_argument(
        "--threads", type=int, default=None, help="PyTorch threads; default: PyTorch's own choice"
    )
    parser.add_argument("--compare", choices=["baseline"], default=None)
    parser.add_argument(
        "--profile", action="store_true", help="shares of one more step's time by operation"
    )
    parser.add_argument(
        "--trace", metavar="FILE.json.gz", help="with --profile: that step's trace, for a browser"
    )
    parser.add_argument(
        "--sweep", metavar="OPTION=VALUE,VALUE,..", help=f"one of {', '.join(SWEEPABLE)}"
    )
    parser.add_argument(
        "--plot", metavar="FILE.png", help="with --sweep: time and memory against the option"
    )
    parser.add_argument(
        "--set",
        action="extend",
        nargs="+",
        default=[],
        metavar="SECTION.KEY=VALUE",
        help="further configuration",
    )
    arguments = parser.parse_args()
    if arguments.sweep:
        return sweep(arguments, parser)

    start_memory = resident_bytes()
    import torch

    from ebwm_scale.config.load import load_config
    from ebwm_scale.core.numerics import flush_denormals
    from ebwm_scale.planning.flops import model_flops, step_flops
    from ebwm_scale.planning.hardware import peak_flops_per_s

    flush_denormals()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)

    def configuration(kind: str, *more: str):
        return load_config(
            None,
            [
                f"model.kind={kind}",
                f"model.size={arguments.size}",
                f"model.vocabulary_size={arguments.vocabulary}",
                f"model.conditioning={arguments.conditioning if kind == 'energy' else 'default'}",
                f"refinement.num_steps={arguments.num_refinement_steps}",
                f"data.context_length={arguments.sequence}",
                f"train.global_batch_size={arguments.batch}",
                f"train.precision={arguments.precision}",
                *arguments.set,
                *(WITHOUT_FURTHER_STEPS if kind == "baseline" else ()),
                *more,
            ],
        )

    config = configuration(arguments.model)
    runs = [(config, Stepper(config, arguments))]
    if arguments.compare:
        baseline = configuration(arguments.compare, "model.loops=1")
        runs.append((baseline, Stepper(baseline, arguments)))
    for _, stepper in runs:
        stepper.step()
    times: list[list[tuple[float, float]]] = [[] for _ in runs]
    for _ in range(arguments.steps):
        for index, (_, stepper) in enumerate(runs):
            times[index].append(timed(stepper))
    wall, cpu = (statistics.median(t[i] for t in times[0]) for i in (0, 1))
    flops = step_flops(config, samples=arguments.batch)
    peak = peak_flops_per_s(arguments.precision)
    memory = (
        torch.cuda.max_memory_allocated()
        if torch.cuda.is_available()
        else peak_resident_bytes() - start_memory
    )
    result = {
        "model": arguments.model,
        "size": arguments.size,
        "sequence": arguments.sequence,
        "vocabulary": arguments.vocabulary,
        "batch": arguments.batch,
        "num_refinement_steps": arguments.num_refinement_steps
        if arguments.model == "energy"
        else None,
        "conditioning": config.model.conditioning,
        "precision": arguments.precision,
        "steps": arguments.steps,
        "wall_s": wall,
        "cpu_s": cpu,
        "tokens_per_s": arguments.batch * arguments.sequence / wall,
        "peak_memory_gib": memory / 2**30,
        "flops": flops,
        "flops_total": sum(flops.values()),
        "tflops_per_s": sum(flops.values()) / wall / 1e12,
        "weights_and_optimizer_gib": runs[0][1].kept_bytes() / 2**30,
        "mfu": model_flops(flops) / wall / peak if peak else None,
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }
    if arguments.compare:
        result["compared_with"] = arguments.compare
        for key, i in (("wall_ratio", 0), ("cpu_ratio", 1)):
            result[key] = statistics.median(ours[i] / theirs[i] for ours, theirs in zip(*times))
        result["compared_cpu_s"] = statistics.median(t[1] for t in times[1])
        result["compared_wall_s"] = statistics.median(t[0] for t in times[1])
        result["compared_flops"] = step_flops(runs[1][0], samples=arguments.batch)
    if arguments.profile:
        result["profile"] = profile(runs[0][1], arguments.trace)
    print(json.dumps(result))
    return 0


def sweep(arguments, parser) -> int:
    """This program once per value, so that memory is that of one run."""
    name, _, values = arguments.sweep.partition("=")
    if name not in SWEEPABLE or not values.replace(",", "").isdigit():
        parser.error(
            f"--sweep is {arguments.sweep!r}; expected one of {', '.join(SWEEPABLE)}, = and whole "
            "numbers with commas between"
        )
    rest, skip = [], False
    for word in sys.argv[1:]:  # everything but --sweep and --plot
        if not skip and not word.startswith(("--sweep", "--plot")):
            rest.append(word)
        skip = word in ("--sweep", "--plot")
    rows = []
    for value in values.split(","):
        process = subprocess.run(
            [sys.executable, __file__, *rest, f"--{name}", value], stdout=subprocess.PIPE, text=True
        )
        if process.returncode:
            return process.returncode
        print(process.stdout, end="", flush=True)
        rows.append((int(value), json.loads(process.stdout.splitlines()[-1])))
    if arguments.plot:
        plot(name, rows, arguments.plot)
    return 0


def plot(name: str, rows: list[tuple[int, dict]], path: str) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (time_axes, memory_axes) = pyplot.subplots(1, 2, figsize=(9, 3.5))
    at = [value for value, _ in rows]
    for axes, key, label in (
        (time_axes, "cpu_s", "CPU seconds per step"),
        (memory_axes, "peak_memory_gib", "GiB over the process's start"),
    ):
        axes.plot(at, [row[key] for _, row in rows], marker="o")
        axes.set(xlabel=name, ylabel=label, ylim=(0, None))
        axes.grid(alpha=0.3)
    figure.suptitle(
        " ".join(
            f"{key} {rows[0][1][key]}"
            for key in (
                "model",
                "size",
                "sequence",
                "vocabulary",
                "batch",
                "num_refinement_steps",
                "conditioning",
            )
            if key != name.replace("-", "_")
        ),
        fontsize=9,
    )
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def profile(stepper: Stepper, trace: str | None = None, most: int = 15) -> dict[str, float]:
    """Operation -> share of the time of one step spent in itself, device time where there is a
    device; the largest ones and "rest".
    """
    import torch

    with torch.profiler.profile() as recorded:
        stepper.step()
    if trace is not None:
        recorded.export_chrome_trace(trace)
    on_device = torch.cuda.is_available()
    times = {
        row.key: row.self_device_time_total if on_device else row.self_cpu_time_total
        for row in recorded.key_averages()
    }
    total, ordered = sum(times.values()), sorted(times.items(), key=lambda item: -item[1])
    shares = {name: round(time / total, 4) for name, time in ordered[:most]}
    return shares | {"rest": round(1 - sum(shares.values()), 4)}


class Stepper:
    """One model with its optimizer and a fixed random batch."""

    def __init__(self, config, arguments):
        import torch

        from ebwm_scale.training.optimizer import parameter_groups
        from ebwm_scale.world_model import WorldModel

        device = "cuda" if torch.cuda.is_available() else "cpu"
        torch.manual_seed(0)
        self.model = WorldModel(config).to(
            device, torch.bfloat16 if arguments.precision == "bf16" else torch.float32
        )
        self.optimizer = torch.optim.AdamW(
            parameter_groups(self.model, config), lr=1e-4, betas=(0.9, 0.999), fused=True
        )
        tokens = torch.randint(
            arguments.vocabulary, (arguments.batch, arguments.sequence + 1), device=device
        )
        self.observed, self.targets, self.ids, self.count = (
            tokens[:, :-1],
            tokens[:, 1:],
            torch.arange(arguments.batch),
            0,
        )

    def kept_bytes(self) -> int:
        """Of weights and the optimizer's moments; gradients come and go."""
        moments = [
            u
            for state in self.optimizer.state.values()
            for u in state.values()
            if hasattr(u, "numel")
        ]
        return sum(u.numel() * u.element_size() for u in [*self.model.parameters(), *moments])

    def step(self) -> None:
        from ebwm_scale.refinement.noise import NoiseSource

        output = self.model(
            self.observed, self.targets, sample_ids=self.ids, source=NoiseSource(33, self.count)
        )
        output.loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.count += 1


def timed(stepper: Stepper) -> tuple[float, float]:
    import torch

    synchronize = torch.cuda.synchronize if torch.cuda.is_available() else (lambda: None)
    synchronize()
    wall, cpu = time.perf_counter(), time.process_time()
    stepper.step()
    synchronize()
    return time.perf_counter() - wall, time.process_time() - cpu


def resident_bytes() -> int:
    """Resident memory now (Linux); elsewhere the peak so far."""
    try:
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * resource.getpagesize()
    except OSError:
        return peak_resident_bytes()


def peak_resident_bytes() -> int:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


if __name__ == "__main__":
    sys.exit(main())
