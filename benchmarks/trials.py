"""Training runs that can be stopped and go on where they were: what the scripts beside this file share."""

import json
import math
import os
import platform
import shlex
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch import nn

import omniconv
from omniconv.timing import machine

WARM_UP = 0.05  # share of a run's steps over which the rate rises

Tick = Callable[[int, float], None]


def save(state: Any, file: Path) -> None:
    """Writes a file whole or not at all: tensors where it ends in .pt, else JSON."""
    part = file.with_suffix(".part")
    torch.save(state, part) if file.suffix == ".pt" else part.write_text(json.dumps(state, indent=1) + "\n", encoding="utf-8")
    os.replace(part, file)


def rate_at(step: int, steps: int, highest: float) -> float:
    """Up in a straight line, down along a cosine."""
    warm = max(1, round(WARM_UP * steps))
    if step < warm:
        return highest * (step + 1) / warm
    return highest * 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm)))


def size_of(model: nn.Module) -> int:
    """Parameters."""
    return sum(p.numel() for p in model.parameters())


def train(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    learn: Callable[[int], float],
    settings: Any,
    rate: float,
    file: Path,
    tick: Tick,
    every: int,
) -> dict[str, float]:
    """Trains from the checkpoint in ``file``, if there is one; the result is the same as without the interruption.

    Args:
        model: What learns.
        optimizer: Over its parameters.
        learn: Makes the step of this number and returns its loss.
        settings: A dataclass with ``steps``; a checkpoint of other settings is refused.
        rate: The highest learning rate.
        file: The checkpoint.
        tick: Told the steps made and the mean loss of late.
        every: Steps from one checkpoint to the next.

    Returns:
        Seconds of the process's CPU time ("cpu") and of the clock ("wall"), and the mean loss of late ("loss").
    """
    step, spent = 0, {"cpu": 0.0, "wall": 0.0, "loss": math.nan}
    if file.exists():
        kept = torch.load(file, weights_only=True)
        if kept["settings"] != asdict(settings):
            raise typer.BadParameter(f"{file} must be of the same settings, or --out another folder, got {kept['settings']}")
        model.load_state_dict(kept["model"])
        optimizer.load_state_dict(kept["optimizer"])
        torch.set_rng_state(kept["random"])
        step, spent = kept["step"], kept["spent"]

    def keep() -> None:
        state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "random": torch.get_rng_state()}
        save(state | {"step": step, "spent": spent, "settings": asdict(settings)}, file)

    model.train()
    while step < settings.steps:
        cpu, wall = time.process_time(), time.perf_counter()
        for group in optimizer.param_groups:
            group["lr"] = rate_at(step, settings.steps, rate)
        loss, was = learn(step), spent["loss"]
        step += 1
        spent["loss"] = loss if math.isnan(was) else 0.98 * was + 0.02 * loss
        spent["cpu"] += time.process_time() - cpu
        spent["wall"] += time.perf_counter() - wall
        tick(step, spent["loss"])
        if step % every == 0 or step == settings.steps:
            keep()
    model.eval()
    return spent


def every_run(
    kinds: Sequence[str],
    seeds: int,
    steps: int,
    out: Path,
    bar: Progress,
    run: Callable[[str, int, Tick], tuple[nn.Module, dict[str, float]]],
    judge: Callable[[str, int, nn.Module, dict[str, float]], dict[str, Any]],
    said: Callable[[dict[str, Any]], str],
) -> tuple[list[dict[str, Any]], dict[str, nn.Module]]:
    """Every kind with every seed, judged; the judgements and each kind's model of seed 0.

    Args:
        kinds: What is compared.
        seeds: Runs of each.
        steps: Of a run.
        out: The folder; a judgement that lies there is not made anew.
        bar: Shows how far it is.
        run: Trains a kind from a seed.
        judge: What is reported of a trained model.
        said: The judgement in a few words.
    """
    out.mkdir(parents=True, exist_ok=True)
    judged, models = [], {}
    total = bar.add_task("all", total=len(kinds) * seeds * steps)
    for index, (seed, kind) in enumerate((s, k) for s in range(seeds) for k in kinds):
        name = f"{kind} {seed}"
        task = bar.add_task(name, total=steps)

        def tick(step: int, loss: float, name: str = name, task: Any = task, before: int = index * steps) -> None:
            bar.update(task, completed=step, description=f"{name}  loss {loss:.3f}")
            bar.update(total, completed=before + step)

        model, spent = run(kind, seed, tick)
        tick(steps, spent["loss"])
        file = out / f"{kind}-{seed}.json"
        if not file.exists():
            save(judge(kind, seed, model, spent), file)
        judged.append(json.loads(file.read_text(encoding="utf-8")))
        bar.update(task, description=f"{name}  {said(judged[-1])}")
        models.setdefault(kind, model)
    return judged, models


def watched(work: Callable[[Progress], Any], out: Path) -> Any:
    """The work under a progress bar; Ctrl-C ends it with a word on how to go on."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    try:
        with Progress(*columns, console=Console(stderr=True)) as bar:
            return work(bar)
    except KeyboardInterrupt:
        Console(stderr=True).print(f"stopped; the same command goes on from the checkpoints in {out}")
        raise typer.Exit(130) from None


def origin(script: str) -> dict[str, Any]:
    """Where a result comes from: the command, what was installed, and the machine as it is now."""
    return {
        "schema_version": 1,
        "command": shlex.join(["python", f"benchmarks/{script}", *sys.argv[1:]]),
        "versions": {"omniconv": omniconv.__version__, "torch": torch.__version__, "python": platform.python_version()},
        "machine": asdict(machine()),
    }


def spread(values: Sequence[float], digits: int = 2) -> str:
    """The mean, and the standard deviation where there are several.

    >>> spread([1.0, 2.0, 3.0])
    '2.00 ± 1.00'
    """
    return f"{mean(values):.{digits}f}" + (f" ± {stdev(values):.{digits}f}" if len(values) > 1 else "")
