"""`train-router` as functions: what would train, and the training itself."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from hashlib import sha256
from pathlib import Path
from typing import Any

from mowmerge.checkpoint.source import config
from mowmerge.dynamic import beside
from mowmerge.dynamic.format import Manifest
from mowmerge.recipe.model import Recipe
from mowmerge.tasks.inputs import processor
from mowmerge.tensors import torch
from mowmerge.training import checkpoint, processes, teachers
from mowmerge.training.classifier import POOLED, Classifier, features, place
from mowmerge.training.data import Samples, samples
from mowmerge.training.desk import Desk
from mowmerge.training.loop import Progress, Tell, run
from mowmerge.training.mixture import Mixture, check_heads
from mowmerge.training.processes import Processes
from mowmerge.training.settings import Options, Settings, settings

Begin = Callable[[int], Tell]


def plan(folder: Path, recipe: Recipe, options: Options) -> dict[str, Any]:
    """What would train, on what, for how long: plain data. Reads no weights but the router file's
    header; the tasks' data are loaded, and splits that share samples refused."""
    held, asked, given = _prepared(folder, recipe, options)
    return {
        **_described(held, asked, given, recipe),
        "steps": asked.steps,
        "select_every": asked.every,
    }


def train(
    folder: Path,
    recipe: Recipe,
    options: Options,
    begin: Begin = lambda steps: lambda step, _: None,
) -> tuple[dict[str, Any], bool]:
    """Trains the routers of a dynamic checkpoint, or its scales; returns the report's section on
    them, and whether this process is the one that speaks for all.

    Nothing in the folder changes until training has ended well. `begin` is given the number of
    steps and returns what is called after each with its number and loss.

    Raises:
        CheckpointError: no dynamic checkpoint, no router in it, a router file from other experts, a
            loss that is not finite, a collapse.
        RecipeError: see `data.samples`.
        ResourceError: another training of the folder is running; fewer processes than WORLD_SIZE,
            or one that does not come, or is gone.
    """
    here = processes.begin(options.device, "train-router", options.timeout)
    held, asked, given = _prepared(folder, recipe, options)
    model = checkpoint.model(folder, held, bf16=asked.bf16).to(here.device)
    for name in asked.routers:
        model.mow_router[name].load_state_dict(
            checkpoint.module(held, name, asked.seed).state_dict()
        )
    for factor in checkpoint.factors(model).values() if asked.scales else ():
        factor.data.fill_(1.0)
        factor.requires_grad_(True)
    tools = {kind: _processor(folder, kind) for kind in {s.type for s in given}}
    with Desk(folder, resume=options.resume, writes=here.rank == 0) as desk:
        tell = begin(asked.steps)
        mark = _fingerprint(folder, held, asked, given)
        pooled = all(held.routers[name].kind in POOLED for name in asked.routers)
        if asked.objective == "task" and pooled:
            done, metrics = _classify(model, held, tools, given, asked, here, desk, mark, tell)
        else:
            told = teachers.of(recipe, held, given, here) if asked.scales else None
            job = Mixture(model, tools, given, asked, here, told)
            done = run(job, asked, desk, mark, tell)
            metrics = dict(job.judge().figures)
            metrics |= {"predictions": job.histograms} if job.histograms else {}
        about = {
            "trained": True, "learned": "scales" if asked.scales else "routers",
            **_described(held, asked, given, recipe), "steps": done.step,
            "kept_step": done.kept, "processes": here.count, "metrics": metrics,
            "notes": _notes(done, asked, given),
        }  # fmt: skip
        if here.rank == 0:
            tensors = checkpoint.router_tensors(model)
            learned = not asked.scales or not held.routers or checkpoint.trained(folder)
            about = desk.publish(
                tensors, about, done.rows,
                {"format": "pt", "trained": str(learned).lower(),
                 **beside.told(folder, held.experts)},
            )  # fmt: skip
    here.wait()
    return about, here.rank == 0


def _prepared(
    folder: Path, recipe: Recipe, options: Options
) -> tuple[Manifest, Settings, list[Samples]]:
    """Everything that can be checked before a weight is read."""
    held = checkpoint.manifest(folder)
    asked = settings(held, options)
    named = (config(folder).get("base_config") or {}).get("architectures") or [""]
    check_heads(held, named[0], asked, recipe)
    return held, asked, samples(recipe, held, asked.objective)


def _classify(
    model: Any, held: Manifest, tools: Mapping[str, Any], given: Sequence[Samples], asked: Settings,
    here: Processes, desk: Desk, mark: str, tell: Tell,
) -> tuple[Progress, dict[str, Any]]:  # fmt: skip
    """Classifiers on pooled features, on the CPU; their state goes back into the model."""
    widths = {place(held.routers[name]): held.routers[name].inputs for name in asked.routers}
    uses = ["router", *(["select"] if all(s.select for s in given) else [])]
    found = {use: features(model, tools, given, widths, use, asked, here) for use in uses}
    routers = torch.nn.ModuleDict(
        {name: checkpoint.module(held, name, asked.seed) for name in asked.routers}
    )
    job = Classifier(routers, asked, given, found)
    done = run(job, asked, desk, mark, tell)
    metrics = job.finish()
    for name, made in routers.items():
        model.mow_router[name].load_state_dict(made.state_dict())
    return done, metrics


def _processor(folder: Path, kind: str) -> Any:
    """The checkpoint's own processor; texts of a batch need a padding token."""
    found = processor(folder, kind)
    if kind != "image-classification" and found.pad_token is None:
        found.pad_token = found.eos_token
    return found


def _described(
    held: Manifest, asked: Settings, given: Sequence[Samples], recipe: Recipe
) -> dict[str, Any]:
    """What trains, how, and on which samples."""
    made = {name: checkpoint.module(held, name, meta=True) for name in asked.routers}
    return {
        "objective": asked.objective,
        "routers": {
            name: {
                "kind": held.routers[name].kind,
                "layer": held.routers[name].layer,
                "outputs": held.routers[name].outputs,
                "parameters": sum(p.numel() for p in router.parameters() if p.requires_grad),
            }
            for name, router in made.items()
        },
        "scales": sum(code.slots for code in held.codes if code.fitted) if asked.scales else 0,
        **{
            k: v
            for k, v in asdict(asked).items()
            if k in ("batch", "accumulate", "lr", "schedule", "seed", "bf16")
        },
        "tasks": {
            s.task: {
                "expert": held.experts[s.expert],
                "router": {"split": s.router.split, "samples": len(s.router)},
                "select": s.select and {"split": s.select.split, "samples": len(s.select)},
            }
            for s in given
        },
    }


def _notes(done: Progress, asked: Settings, given: Sequence[Samples]) -> list[str]:
    """What the user should know beside the figures."""
    notes = []
    blind = [s.task for s in given if s.select is None]
    if blind:
        notes.append(
            f"no select split for {', '.join(blind)}: the best step was chosen on samples that"
            " were trained on, and no temperature was calibrated"
        )
    if done.collapsed:
        notes.append(f"stopped at step {done.step}: {done.collapsed}; step {done.kept} was kept")
    elif done.over and done.step < asked.steps:
        notes.append(f"stopped at step {done.step}: nothing better since step {done.kept}")
    if asked.steps and not done.kept:
        notes.append("no step was better than the start, which was kept")
    return notes


def _fingerprint(folder: Path, held: Manifest, asked: Settings, given: Sequence[Samples]) -> str:
    """What a training must share with the one that it goes on from."""
    from mowmerge.tasks.data import digest

    ends = [
        [s.task, s.expert, len(items), digest(items.input(0)), digest(items.input(len(items) - 1))]
        for s in given
        for items in (s.router, s.select)
        if items is not None
    ]
    text = json.dumps([asdict(asked), held.to_json(), ends])
    return sha256(text.encode()).hexdigest()
