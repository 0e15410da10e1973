"""What a checkpoint holds for those who load it without mowmerge: these files, and who is who."""

from __future__ import annotations

import shutil
from pathlib import Path

FILES = (
    "names.py", "beside.py", "format.py", "codecs.py", "routers.py", "context.py", "mixable.py",
    "linear.py", "embedding.py", "layers.py", "heads.py", "encoder.py", "configuration.py",
    "loading.py", "prefix.py", "remote.py", "towers.py", "mixin.py", "modeling.py",
)  # fmt: skip
AUTO = (
    "Model", "ForCausalLM", "ForSequenceClassification", "ForImageClassification",
    "ForSeq2SeqLM", "ForTokenClassification", "ForQuestionAnswering", "ForMaskedLM",
)  # fmt: skip


def auto_name(kind: str) -> str:
    """The Auto class for a kind of AUTO."""
    return f"AutoModel{kind.removeprefix('Model')}"


def auto_map() -> dict[str, str]:
    """What config.json says to those who load without mowmerge, with trust_remote_code."""
    fronts = {auto_name(kind): f"modeling.Mowmerge{kind}" for kind in AUTO}
    return {"AutoConfig": "modeling.MowmergeConfig", **fronts}


def front_class(architecture: str) -> str:
    """The class that a dynamic checkpoint names for a base class: its kind of model, or Model."""
    kinds = {"LMHeadModel": "ForCausalLM", "ForConditionalGeneration": "ForSeq2SeqLM"}
    kinds |= {kind: kind for kind in AUTO}
    return "Mowmerge" + next((k for end, k in kinds.items() if architecture.endswith(end)), "Model")


def bundle(folder: Path) -> None:
    """Copies the files of remote code into a checkpoint."""
    for name in FILES:
        shutil.copyfile(Path(__file__).with_name(name), folder / name)
