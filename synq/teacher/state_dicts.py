"""Search of a network's state dict among the tensors of a file: tables nested in each other, prefixes of names."""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

NESTS = ("state_dict_ema", "model_ema", "state_dict", "model_state_dict", "model", "net")
"""Keys under which training scripts store the state dict, by preference: authors report results of averaged weights."""
_COMMON = (*NESTS, "module")
_AVERAGES = frozenset(("ema", "swa", "averaged", "average", "avg", "shadow"))
"""Parts of the names in a key or prefix of averaged weights."""
_WRAPPERS = ("_orig_mod.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module.")
"""Names that torch.compile, FSDP and activation checkpointing put into the path of a layer, at any depth."""
_MODULE = re.compile(r"(?<![^.])module\.")
"""The name that DataParallel and DistributedDataParallel put before those of the module that they wrap."""
_MAX_DEPTH = 8


@dataclass(frozen=True, kw_only=True)
class Part:
    """One tensor of a file.

    Attributes:
        table: Keys of the table that holds it, joined by dots; "" for the outermost.
        key: Its key in that table.
        tensor: The tensor.
    """

    table: str
    key: str
    tensor: Tensor

    @property
    def name(self) -> str:
        """The keys of its table and its own, joined by dots."""
        return f"{self.table}.{self.key}" if self.table else self.key


@dataclass(frozen=True, kw_only=True)
class Fit:
    """The tensors of a network in a file.

    Attributes:
        prefix: What precedes the network's names in the file: keys of tables and prefixes of names, joined by dots.
        tensors: The tensors by the names of the network.
        extra: Names with the prefix that the network does not have.
        others: Names in the same table that do not have the prefix.
        rivals: Other prefixes with which the whole network is found, too.
    """

    prefix: str
    tensors: dict[str, Tensor]
    extra: list[str] = field(default_factory=list)
    others: list[str] = field(default_factory=list)
    rivals: list[str] = field(default_factory=list)


def is_counter(name: str) -> bool:
    """Return whether a tensor counts the batches of a BatchNorm, which inference does not read."""
    return name.rpartition(".")[2] == "num_batches_tracked"


def parts_of(content: object) -> list[Part]:
    """Return all tensors of a file, in their order; tables nested deeper than 8 levels are not searched."""
    return list(_walk(content, "", 0))


def _walk(content: object, table: str, depth: int) -> Iterator[Part]:
    if depth > _MAX_DEPTH:
        return
    if isinstance(content, Mapping):
        items: Iterable[tuple[object, object]] = content.items()
    elif isinstance(content, list | tuple):
        items = enumerate(content)
    else:
        return
    for key, value in items:
        if isinstance(value, Tensor) and isinstance(content, Mapping):
            yield Part(table=table, key=str(key), tensor=value)
        elif not isinstance(value, Tensor):
            yield from _walk(value, f"{table}.{key}" if table else str(key), depth + 1)


def best_fit(parts: Sequence[Part], expected: Mapping[str, Tensor]) -> Fit:
    """Return the tensors of a network, as many as there are.

    Args:
        parts: The tensors of a file, at least one.
        expected: The network's state dict.

    Returns:
        The fit with all tensors of the network, if there is one; otherwise the one that has most of them.

    Raises:
        ValueError: If there are several with different values, and neither averaged weights nor a common name decide.
    """
    fits: list[Fit] = []
    for rename in _renamings(expected):
        found = _fits(parts, expected, rename)
        whole = [fit for fit in found if _has_all(fit, expected)]
        if whole:
            return _chosen(_same_shapes(whole, expected) or whole)
        fits += found
    return max(fits, key=lambda fit: _score(fit, expected))  # of equal ones the first, without a prefix


def _renamings(expected: Mapping[str, Tensor]) -> list[Callable[[str], str]]:
    """Return the ways to remove the names of wrappers, the mildest first; none that the network itself uses."""
    wrappers = [part for part in _WRAPPERS if not any(part in name for name in expected)]

    def without_wrappers(name: str) -> str:
        for part in wrappers:
            name = name.replace(part, "")
        return name

    def without_modules(name: str) -> str:
        return _MODULE.sub("", without_wrappers(name))

    has_modules = any(_MODULE.search(name) for name in expected)
    return [without_wrappers] if has_modules else [without_wrappers, without_modules]


def _fits(parts: Sequence[Part], expected: Mapping[str, Tensor], rename: Callable[[str], str]) -> list[Fit]:
    """Return a fit for every prefix with which a name of the network is found; for "" in any case."""
    names = [rename(part.name) for part in parts]
    if len(set(names)) < len(names):  # two tensors differ in the name of a wrapper only
        names = [part.name for part in parts]
    prefixes: dict[str, dict[str, int]] = {"": {}}
    for number, name in enumerate(names):
        at = 0
        while True:
            if name[at:] in expected:
                prefixes.setdefault(name[:at], {})[name[at:]] = number
            dot = name.find(".", at)
            if dot < 0:
                break
            at = dot + 1
    return [_fit(prefix, found, parts, names) for prefix, found in prefixes.items()]


def _fit(prefix: str, found: Mapping[str, int], parts: Sequence[Part], names: Sequence[str]) -> Fit:
    tables = {parts[number].table for number in found.values()} or {part.table for part in parts}
    taken = set(found.values())
    remaining = [
        n for n, part in enumerate(parts) if n not in taken and part.table in tables and part.key != "n_averaged"
    ]
    return Fit(
        prefix=prefix,
        tensors={name: parts[number].tensor for name, number in found.items()},
        extra=[names[n].removeprefix(prefix) for n in remaining if names[n].startswith(prefix)],
        others=[parts[n].key for n in remaining if not names[n].startswith(prefix) and not is_counter(names[n])],
    )


def _has_all(fit: Fit, expected: Mapping[str, Tensor]) -> bool:
    return all(name in fit.tensors or is_counter(name) for name in expected)


def _same_shapes(fits: Sequence[Fit], expected: Mapping[str, Tensor]) -> list[Fit]:
    return [fit for fit in fits if all(fit.tensors[n].shape == expected[n].shape for n in fit.tensors)]


def _score(fit: Fit, expected: Mapping[str, Tensor]) -> int:
    """Return how many of the network's tensors a fit has, those of the same shape counted twice."""
    same = sum(tensor.shape == expected[name].shape for name, tensor in fit.tensors.items())
    return len(fit.tensors) + same


def _chosen(fits: Sequence[Fit]) -> Fit:
    """Return the preferred one of several fits of the whole network.

    Raises:
        ValueError: If two are equally preferred and differ in their values.
    """
    ranked = sorted(fits, key=_preference)
    best = ranked[0]
    equals = [fit for fit in ranked[1:] if _preference(fit) == _preference(best) and not _equal(fit, best)]
    if equals:
        shown = ", ".join(repr(fit.prefix) for fit in (best, *equals[:2]))
        raise ValueError(f"it is there as {shown} with different values; save the right one alone")
    rivals = [repr(fit.prefix) for fit in ranked[1:] if not _equal(fit, best)]
    return Fit(prefix=best.prefix, tensors=best.tensors, extra=best.extra, others=best.others, rivals=rivals)


def _preference(fit: Fit) -> tuple[object, ...]:
    """Return the sort key: averaged weights first, then common keys and prefixes in their order."""
    components = [part for part in fit.prefix.split(".") if part]
    names = {name for part in components for name in re.split(r"[^a-z]+|(?<=[a-z])(?=\d)", part.lower())}
    ranks = tuple(_COMMON.index(part) if part in _COMMON else len(_COMMON) for part in components)
    return (not names & _AVERAGES, ranks)


def _equal(one: Fit, other: Fit) -> bool:
    if one.tensors.keys() != other.tensors.keys():
        return False
    pairs = ((tensor, other.tensors[name]) for name, tensor in one.tensors.items())
    return all(a is b or _same_values(a, b) for a, b in pairs)


def _same_values(one: Tensor, other: Tensor) -> bool:
    plain = all(t.layout is torch.strided and not (t.is_quantized or t.is_meta) for t in (one, other))
    return plain and one.dtype == other.dtype and torch.equal(one, other)
