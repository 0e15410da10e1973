"""What the tensors beside the anchor's are called: on disk, and in a model's memory.

In memory, and on disk up to format 4, the parts of a P that is no weight stand in its module's own
names, as P_dyn_<part>, and heads have numbers.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

HEADS = "mow_heads"  # module and name prefix of the heads, one a task
_PLAIN = re.compile(r"[\w-]*[^\W\d][\w-]*")  # what cannot be taken for a number, nor for a path


def part(tensor: str, name: str) -> str:
    """A part of a tensor's code: P.dyn_u beside P.weight, P.bias.dyn_u beside P.bias."""
    return f"{tensor.removesuffix('.weight')}.dyn_{name}"


def part_in_memory(tensor: str, name: str) -> str:
    """P.dyn_u beside P.weight, P.bias_dyn_u beside P.bias."""
    path, _, leaf = tensor.rpartition(".")
    ending = f"dyn_{name}" if leaf == "weight" else f"{leaf}_dyn_{name}"
    return f"{path}.{ending}" if path else ending


def head(experts: Sequence[str], number: int) -> str:
    """What stands before the names in an expert's head: its name, or its number where a name could
    be taken for a number or a path."""
    plain = all(_PLAIN.fullmatch(expert) for expert in experts)
    return f"{HEADS}.{experts[number]}." if plain else head_in_memory(number)


def head_in_memory(number: int) -> str:
    """The same by number."""
    return f"{HEADS}.{number}."


def patterns(tensors: Sequence[str], experts: Sequence[str]) -> list[tuple[str, str]]:
    """What becomes of names on disk in memory, as pairs of patterns that also read the other way;
    `tensors` have codes, `experts` heads."""
    leaves = dict.fromkeys(tensor.rpartition(".")[2] for tensor in tensors)
    whole = r"(?<![^.])"  # from a dot on, or from the start
    found = [
        (rf"{whole}{leaf}\.dyn_", rf"{whole}{leaf}_dyn_") for leaf in leaves if leaf != "weight"
    ]
    for number in range(len(experts)):
        pair = head(experts, number), head_in_memory(number)
        if pair[0] != pair[1]:
            disk, memory = (prefix.replace(".", r"\.") for prefix in pair)
            found.append((f"^{disk}", f"^{memory}"))
    return found
