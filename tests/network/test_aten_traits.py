"""The traits of all functions of PyTorch that map a tensor to a tensor are what the functions do to numbers."""

import operator
import re
import signal
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from synq.network.aten_groups import LINEAR
from synq.network.op_recorder import record_traits
from synq.network.op_traits import OpKind, OpTraits, traits_of

SHAPE = (2, 4, 6, 6)
DRAW = torch.Generator().manual_seed(3)
CONSTANT = torch.randn(SHAPE, generator=DRAW, dtype=torch.float64)
INDEX, MASK = torch.randint(0, 4, SHAPE, generator=DRAW), torch.rand(SHAPE, generator=DRAW) > 0.5
ARGUMENTS: list[tuple[Any, ...]] = [
    *((), (2,), (-1,), ((2, 3),), ((1, 1, 1, 1),), (0.5,), (-0.3, 0.4), (1, 2), ((1,), (2,)), (CONSTANT,)),
    *((CONSTANT.abs() + 1,), (1, torch.tensor([3, 1, 2, 0])), (1, INDEX), (MASK,), (MASK, 0.0), (MASK, 0.7)),
    *(((2, 2),), (3, 2, 1), (2, 1, 2), ((0, 1, 3, 2),), ((1, 2, 1, 1),), ((2, -1),), (SHAPE,), (3, 1), (0.3, 0.9, 2)),
    *((INDEX,), ((1, 2), (2, 3)), (1, (2, 2)), ((1, 1, 1, 1), "reflect"), ((1, 1, 1, 1), "circular")),
    *(((1, 1, 1, 1), "constant", 1.5), (CONSTANT, CONSTANT), (torch.float32,)),
]
"""Arguments behind the tensor that are tried for each function."""
SKIPPED = re.compile(
    "seed|rng|deterministic|flush|backward|hook|requires_grad|share_memory|pin_memory|cuda|cudnn|miopen|quantized|"
    "sparse|mkldnn|grad_enabled|inference|warn|dlpack|lobpcg|lowrank|linspace|logspace|combinations|cartesian|einsum|"
    "broadcast_shapes|default|save|load|compile|threads|print|swap_tensors|record_stream|typename|empty|^new$"
)
"""Parts of names of functions that are no operations on values, or take minutes, or return memory without values."""
UNQUANTIZABLE = ("linalg", "cholesky", "pinverse", "hist", "cross_entropy")
"""Parts of names of functions that are rejected though a special case of them is simple."""


@dataclass(frozen=True)
class Case:
    name: str
    call: Callable[[Tensor], Any]
    traits: OpTraits

    def of(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            found = self.call(x.clone())
        return found if isinstance(found, Tensor) else found[0]


def image(seed: int) -> Tensor:
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def functions() -> Iterator[tuple[str, Callable[..., Any]]]:
    seen = set()
    for where in (torch, F, torch.special, torch.linalg, operator, Tensor):
        for name in dir(where):
            function = getattr(where, name)
            is_method = where is Tensor and hasattr(torch, name)  # the function of the same name comes down to the same
            skipped = name.startswith("_") or name.endswith("_") or bool(SKIPPED.search(name))
            if skipped or is_method or isinstance(function, type) or not callable(function) or function in seen:
                continue
            seen.add(function)
            yield f"{where.__name__}.{name}", function


def late(*_: object) -> None:
    raise TimeoutError


def cases() -> Iterator[Case]:
    """Yield every function with every arguments for which it returns a floating-point tensor or a tuple of some."""
    for name, function in functions():
        for number, args in enumerate(ARGUMENTS):
            signal.alarm(2)
            try:
                found = function(image(1), *args)
                values = [function(image(seed), *args) for seed in (1, 1)]
            except Exception:  # most arguments do not fit
                continue
            finally:
                signal.alarm(0)
            first = found[0] if isinstance(found, tuple | list) and found else found
            if type(first) is not Tensor or not first.dtype.is_floating_point or first.numel() == 0:
                continue
            graph = fx.Graph()
            node = graph.call_function(function, (graph.placeholder("x"), *args))
            graph.output(node)
            record_traits(fx.GraphModule(nn.Module(), graph), image(1))
            same = [value if isinstance(value, Tensor) else value[0] for value in values]
            if equal(*same):
                yield Case(f"{name}#{number}", lambda x, f=function, a=args: f(x, *a), traits_of(node))
            else:
                assert traits_of(node).kind in (OpKind.UNKNOWN, OpKind.CONSTANT), f"{name} draws random numbers"


def equal(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and torch.allclose(a.double(), b.double(), rtol=1e-6, atol=1e-8, equal_nan=True)


def complaint(case: Case) -> str:
    """Compare the traits of a function with its values; return what is wrong, or ""."""
    traits, x, y = case.traits, image(1), image(2)
    of_x, of_y = case.of(x), case.of(y)
    values = {*x.flatten().tolist(), 0.0}
    keeps = {*of_x.double().flatten().tolist()} <= values
    same = of_x.numel() == x.numel() and torch.equal(of_x.flatten().double(), x.flatten())
    is_tuple = not isinstance(case.call(x.clone()), Tensor)
    if traits.kind is OpKind.UNKNOWN:
        simple = (keeps or is_elementwise(case, x)) and not any(part in case.name for part in UNQUANTIZABLE)
        its_values = "its tensors would stay float" in traits.reason
        return "simple, but rejected" if simple and its_values and not equal(of_x, of_y) else ""
    if equal(of_x, of_y):
        return ""
    if traits.kind is OpKind.CONSTANT:
        return "depends on the values"
    if traits.keeps_values and not keeps:
        return "does not keep values"
    if traits.kind is OpKind.PASSIVE and not same:
        return "changes values or their order"
    if traits.elementwise and not is_elementwise(case, x):
        return "is not element-wise"
    if traits.positively_homogeneous and not (traits.kind is OpKind.PASSIVE or is_homogeneous(case, x)):
        return "does not commute with scales of channels"
    linear = {*traits.operators} <= LINEAR | {"view", "_unsafe_view", "slice_inverse"}
    if traits.kind is OpKind.STRUCTURAL and keeps and not (traits.keeps_values or linear or is_tuple):
        return "keeps values"
    mixed = of_x if is_tuple or not bool(of_x.isfinite().all()) else case.of(0.3 * x + 0.7 * y)
    affine = is_tuple or not bool(of_x.isfinite().all()) or equal(mixed, 0.3 * of_x + 0.7 * of_y)
    return "is not affine" if traits.kind is OpKind.STRUCTURAL and not (traits.keeps_values or affine) else ""


def is_elementwise(case: Case, x: Tensor) -> bool:
    before = case.of(x)
    if before.shape != x.shape:
        return False
    for place, change in (((1, 2, 3, 4), 0.37), ((0, 0, 0, 0), -0.91)):
        moved = x.clone()
        moved[place] += change
        differs = (case.of(moved) != before) & ~before.isnan()
        differs[place] = False
        if bool(differs.any()):
            return False
    return True


def is_homogeneous(case: Case, x: Tensor) -> bool:
    scales = torch.tensor([0.5, 2.0, 3.0, 1.3], dtype=torch.float64)
    before, after = case.of(x), case.of(scales.view(1, 4, 1, 1) * x)
    return before.shape[:2] == SHAPE[:2] and equal(after, scales.view(1, 4, *[1] * (before.dim() - 2)) * before)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_bugs_8_all_functions_of_pytorch_do_what_their_traits_say() -> None:
    signal.signal(signal.SIGALRM, late)
    names, wrong = set(), []
    for case in cases():
        names.add(case.name.partition("#")[0])
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = complaint(case)
        if found:
            wrong.append(f"{case.name} ({', '.join(case.traits.operators)}): {found}")
    assert not wrong, "\n".join(wrong)
    assert len(names) > 350, "functions that were tried"
