"""A merged backbone with the head of one task: both as they are stored, nothing made up."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from mowmerge.checkpoint.reader import StoredReader
from mowmerge.checkpoint.source import config, find
from mowmerge.errors import CheckpointError, SourceError, did_you_mean
from mowmerge.plan import Adapted
from mowmerge.recipe import parse
from mowmerge.recipe.model import Match
from mowmerge.tasks import adapters
from mowmerge.tasks.adapters import Where, home
from mowmerge.tensors import DTYPES, torch


def load(
    where: Where,
    task: str | None,
    expert: str | None = None,
    *,
    keeping: Where | None = None,
    dtype: str | None = None,
    device_map: str | None = None,
) -> Any:
    """The model in a folder in eval mode: the class its config names, or that of the task's head;
    with the adapters that are on it.

    `expert` says whose head the task's is where that is known; `keeping` is the folder with the
    heads where it is another one, or a checkpoint or adapter that has the head in it. `dtype` is
    that of the files unless one is given; `device_map` spreads the model as accelerate does.

    Raises:
        CheckpointError: no head for the task, a head that does not fit, a key too many or too few.
        SourceError: transformers is not installed.
    """
    if not find_spec("transformers"):
        raise SourceError(
            "loading a model needs transformers, which is not installed",
            hint='pip install "mowmerge[models]"',
        )
    import transformers

    from mowmerge.dynamic.loading import spare

    folder, settings = home(where), config(home(where))
    if not settings:
        raise CheckpointError("there is no config.json", where=str(folder))
    if settings.get("model_type") == "mowmerge":
        return dynamic(folder, dtype or "auto", device_map)
    kept = home(keeping) if keeping is not None else None
    whole = kept is not None and not (kept / "heads").is_dir()
    head = kept if whole else _head_file(kept or folder, task, expert) if task else None
    find(str(folder))  # a shard that is absent or cut short is named before transformers meets it
    file = (head if whole else head.with_suffix(".json")) if head else folder
    try:
        described = transformers.AutoConfig.from_pretrained(file)
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"the config does not load: {str(error).strip().splitlines()[0]}",
            where=str(file),
            hint="merge again, or mend the file",
        ) from error
    name = (described.architectures or ["AutoModel"])[0]
    kind = getattr(transformers, name, None)
    if kind is None:
        raise CheckpointError(f"transformers knows no class '{name}'", where=str(head or folder))
    dtype = dtype or settings.get("dtype") or settings.get("torch_dtype")
    with quiet():
        try:
            model, info = kind.from_pretrained(
                folder, config=described, dtype=dtype, output_loading_info=True,
                local_files_only=True, device_map=device_map,
            )  # fmt: skip
        except (RuntimeError, OSError, ValueError) as error:
            raise CheckpointError(str(error).strip(), where=str(folder)) from error
    missing = set(map(str, info["missing_keys"]))
    missing -= _fit(model, head, missing if whole else None) if head else set()
    missing -= adapters.apply(model, where) if isinstance(where, Adapted) else set()
    missing -= adapters.apply(model, keeping, missing) if isinstance(keeping, Adapted) else set()
    left = set(map(str, info["unexpected_keys"]))
    wrong = {"missing": sorted(missing), "unexpected": sorted(left - spare(described, left))}
    if any(wrong.values()):
        keys = "; ".join(f"{what}: {', '.join(names)}" for what, names in wrong.items() if names)
        raise CheckpointError(f"does not load as {name}: {keys}", where=str(folder))
    return model.eval()


def grafted(trunk: Any, whole: Any, head: Sequence[str]) -> Any:
    """`whole` with every tensor of `trunk`'s but those whose names match `head`, which it keeps.

    Raises:
        CheckpointError: the two differ in more than in these.
    """
    named = Match(tensors=tuple(head))
    theirs, ours = (
        {name: value for name, value in model.state_dict().items() if not named.names(name)}
        for model in (trunk, whole)
    )
    for name in [*ours, *theirs]:
        one, two = (list(each[name].shape) if name in each else "absent" for each in (theirs, ours))
        if one != two:
            raise CheckpointError(
                f"its '{name}' is {one}, and in the expert that has the head {two}"
            )
    for name, value in ours.items():
        value.copy_(theirs[name])
    return whole


def joined(models: Iterable[Any]) -> tuple[Any, Any] | None:
    """The first of the models with the heads of all in the place of its own, and the context that
    is told `heads` [B]: from which model's head each sample's logits come, padded with -inf.

    The models are taken one at a time. None where they differ in more than in their one head.
    """
    from mowmerge.dynamic.context import Context
    from mowmerge.dynamic.heads import Heads

    first, name, heads = None, "", []
    for model in models:
        own = _head_modules(model)
        if first is None:
            first, name = model, own[0] if len(own) == 1 else ""
        if own != [name] or type(model) is not type(first):
            return None
        ours, theirs = _trunk(first, name), _trunk(model, name)
        if ours.keys() != theirs.keys() or not all(torch.equal(ours[k], theirs[k]) for k in ours):
            return None
        heads.append(getattr(model, name))
    context = Context({}, {})
    setattr(first, name, Heads(torch.nn.ModuleList(heads), context))
    return first, context


def _trunk(model: Any, head: str) -> dict[str, Any]:
    return {k: v for k, v in model.state_dict().items() if not k.startswith(f"{head}.")}


def _head_modules(model: Any) -> list[str]:
    """The children of a model outside its backbone that have parameters."""
    inside = model.base_model_prefix
    return [
        n for n, m in model.named_children() if n != inside and any(True for _ in m.parameters())
    ]


def dynamic(folder: Path, dtype: Any = "auto", device_map: str | None = None) -> Any:
    """The dynamic model in a folder, with all its heads: `task_ids` chooses, or its router.

    Raises:
        CheckpointError: a file that is damaged or of a newer format, a key too many or too few.
    """
    import transformers

    from mowmerge.dynamic import modeling
    from mowmerge.dynamic.format import FormatError

    find(str(folder))
    modeling.register()
    try:
        described = modeling.MowmergeConfig.from_pretrained(folder)
        manifest = described.manifest
        named = manifest.head_class or described.base_config["architectures"][0]
        made = modeling.dynamic_class(getattr(transformers, named))
        with quiet():
            return modeling.load(
                made, folder, described, local_files_only=True, dtype=dtype, device_map=device_map
            )[0]
    except (FormatError, ValueError, RuntimeError, OSError) as error:
        raise CheckpointError(str(error).strip(), where=str(folder)) from error


def _head_file(folder: Path, task: str, expert: str | None) -> Path:
    """heads/<model>.safetensors of a task, or of a model."""
    names = sorted(file.stem for file in (folder / "heads").glob("*.safetensors"))
    recipe = parse.kept(folder)
    tasks = parse.load(recipe).tasks if recipe.exists() and not expert else {}
    model = expert or (tasks[task].expert if task in tasks else task)
    if model not in names:
        known = sorted({*names, *(t for t, of in tasks.items() if of.expert in names)})
        raise CheckpointError(
            f"there is no head for '{task}'",
            where=str(folder),
            hint=did_you_mean(task, known)
            if known
            else "merge with `heads: {match: ...}` to keep the heads of the experts",
        )
    return folder / "heads" / f"{model}.safetensors"


def _fit(model: Any, file: Path, only: set[str] | None = None) -> set[str]:
    """Copies the head's tensors, or `only` these, into the model; returns their names."""
    reader = StoredReader(find(str(file)))
    places = dict(model.named_parameters()) | dict(model.named_buffers())
    specs = {n: s for n, s in reader.specs.items() if only is None or n in only}
    for name, spec in specs.items():
        place = places.get(name)
        if place is None or tuple(place.shape) != spec.shape:
            theirs = "lacks it" if place is None else f"has {list(place.shape)}"
            raise CheckpointError(
                f"the head's '{name}' is {list(spec.shape)}, and {type(model).__name__} {theirs}",
                where=str(file),
                hint="the head belongs to a backbone of another width or class",
            )
        value = torch.empty(spec.shape, dtype=DTYPES[spec.dtype].torch)
        handle = reader.open(name)
        handle.read(0, spec.numel, value.view(-1).view(torch.uint8).numpy().data)
        handle.close()
        place.data.copy_(value)
    return set(specs)


@contextmanager
def quiet() -> Iterator[None]:
    """No bars and no load report: what is missing is checked here."""
    from transformers.utils import logging

    level, shown = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if shown:
            logging.enable_progress_bar()
