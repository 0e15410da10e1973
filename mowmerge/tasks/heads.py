"""A merged backbone with the head of one task: both as they are stored, nothing made up."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from mowmerge.checkpoint.reader import StoredReader
from mowmerge.checkpoint.source import config, find
from mowmerge.errors import CheckpointError, SourceError, did_you_mean
from mowmerge.recipe import parse
from mowmerge.tensors import DTYPES, torch


def load(
    folder: Path, task: str | None, expert: str | None = None, *, keeping: Path | None = None
) -> Any:
    """The model in `folder` in eval mode: the class its config names, or that of the task's head.

    `expert` says whose head the task's is where that is known; `keeping` is the folder with the
    heads where it is another one.

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

    settings = config(folder)
    if not settings:
        raise CheckpointError("there is no config.json", where=str(folder))
    head = _head_file(keeping or folder, task, expert) if task else None
    find(str(folder))  # a shard that is absent or cut short is named before transformers meets it
    file = head.with_suffix(".json") if head else folder
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
    dtype = settings.get("dtype") or settings.get("torch_dtype")
    with _quiet():
        try:
            model, info = kind.from_pretrained(
                folder, config=described, dtype=dtype, output_loading_info=True,
                local_files_only=True,
            )  # fmt: skip
        except (RuntimeError, OSError, ValueError) as error:
            raise CheckpointError(str(error).strip(), where=str(folder)) from error
    given = _fit(model, head) if head else set()
    missing = set(map(str, info["missing_keys"])) - given
    wrong = {"missing": sorted(missing), "unexpected": sorted(map(str, info["unexpected_keys"]))}
    if any(wrong.values()):
        keys = "; ".join(f"{what}: {', '.join(names)}" for what, names in wrong.items() if names)
        raise CheckpointError(f"does not load as {name}: {keys}", where=str(folder))
    return model.eval()


def locator(model: Any) -> Callable[[str], str]:
    """What maps a tensor's name on disk to its name in a transformers model.

    The two differ for some families (ViT's `attention.attention.key` is `attention.k_proj`), and by
    a class prefix. A tensor that becomes part of a fused one is a CheckpointError.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightRenaming, rename_source_key

    transforms = get_model_conversion_mapping(model)
    renamings = [t for t in transforms if isinstance(t, WeightRenaming)]
    converters = [t for t in transforms if not isinstance(t, WeightRenaming)]
    held = model.state_dict()

    def located(name: str) -> str:
        found, fused = rename_source_key(name, renamings, converters, model.base_model_prefix, held)
        if fused is not None:
            raise CheckpointError(
                f"'{name}' is only a part of a tensor of {type(model).__name__}",
                hint="fused experts cannot be fitted yet",
            )
        return str(found)

    return located


def _head_file(folder: Path, task: str, expert: str | None) -> Path:
    """heads/<model>.safetensors of a task, or of a model."""
    names = sorted(file.stem for file in (folder / "heads").glob("*.safetensors"))
    recipe = folder / "recipe.yaml"
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


def _fit(model: Any, file: Path) -> set[str]:
    """Copies the head's tensors into the model; returns their names."""
    reader = StoredReader(find(str(file)))
    places = dict(model.named_parameters()) | dict(model.named_buffers())
    for name, spec in reader.specs.items():
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
    return set(reader.specs)


@contextmanager
def _quiet() -> Iterator[None]:
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
