"""Random specs of sweeps: right ones with a few odd keys and values, written as TOML or JSON."""

import json
import random
from collections.abc import Mapping
from typing import Any

SETTINGS = (
    *("finetune.lr", "finetune.cam_weight", "finetune.ce_weight", "finetune.lowpass_cutoff", "finetune.epochs"),
    *("finetune.batch_size", "quant.act_range", "quant.rounding", "finetune.augment", "synthesis.num_images"),
    *("quant.weight_bits", "finetune.nothing", "bits", "seed", ""),
)
ODD: tuple[Any, ...] = (
    *(None, True, False, 0, 1, -1, 2**31, 2**63, 10**400, -(10**400), 0.0, -0.0, 1e-320, 1e308, -1e308),
    *(float("inf"), float("-inf"), float("nan"), "", " ", "none", "None", "a", "x" * 2000, "é\u0000", "\ud800"),
    *("$HOME", "$NOT_SET_ANYWHERE", "${}", "~", "../..", "s3://bucket/a", "s3://", "://", "a\nb", "[", "W4A4", "W9A9"),
    *([], [[]], [1, "a"], [None], {}, {"a": {}}, [{}], [[1, 2]], {"type": "choice"}, ["W4A4", "W4A4"]),
)
TOP = (
    *("name", "output_dir", "num_trials", "more_trials", "objective", "second_objective", "seeds", "final_top_k"),
    *("sampler", "sampler_seed", "warm_start", "warm_start_top_k", "scheduler", "grace_epochs", "reduction_factor"),
    *("max_concurrent", "max_failures", "retry", "workers_per_trial", "cpus_per_worker", "gpus_per_worker"),
    *("study_storage", "report", "models", "bits", "base", "space", "points", "max_failed_trials", "unknown"),
)
SAMPLERS = ("tpe", "random", "gp", "nsga2", "grid", "points", "best")
DIMENSION_KEYS = ("type", "low", "high", "log", "step", "values", "optional", "low ")
TEACHER_KEYS = ("spec", "weights", "num_classes", "input_size", "mean", "std", "name", "dataset", "base", "cam_layer")
BASE_PARTS = ("teacher", "synthesis", "quant", "finetune", "evaluation", "runtime", "reconstruction", "name", "other")
MAX_NEST = 3000
LATER = ("constraints", "stop_when", "min_gain", "patience")
BOUNDED = ("size_bytes", "bitops", "drop", "latency_ms", "top1", "")


def _odd(rng: random.Random) -> Any:
    return rng.choice(ODD)


def _number(rng: random.Random) -> Any:
    return _odd(rng) if rng.random() < 0.12 else rng.choice((0, 1, 2, 3, 0.1, 0.5, 1e-3, 8, 64, -2))


def _dimension(rng: random.Random) -> Any:
    if rng.random() < 0.1:
        return _odd(rng)
    kind = rng.choice(("float", "int", "choice", "set"))
    table: dict[str, Any] = {"type": kind}
    if kind == "choice":
        table["values"] = [_number(rng) for _ in range(rng.randrange(4))]
    else:
        table |= {"low": _number(rng), "high": _number(rng)}
    for key in rng.sample(DIMENSION_KEYS, rng.choice((0, 0, 1, 2))):
        table[key] = _odd(rng) if rng.random() < 0.5 else rng.choice((True, 0.1, 1))
    return table


def _table(rng: random.Random, keys: tuple[str, ...], make: Any) -> dict[str, Any]:
    return {rng.choice(keys): make(rng) for _ in range(rng.randrange(4))}


def _part(rng: random.Random) -> Any:
    return _odd(rng) if rng.random() < 0.3 else _table(rng, ("lr", "epochs", "num_images", "spec", "dataset"), _number)


def _model(rng: random.Random) -> Any:
    if rng.random() < 0.5:
        return rng.choice(("bundled:digits_resnet8", "torchvision:resnet18", "net.py:make", "a", ""))
    return {"spec": "bundled:digits_resnet8", **_table(rng, TEACHER_KEYS, _odd)}


def _spec(rng: random.Random) -> dict[str, Any]:
    spec: dict[str, Any] = {"bits": ["W4A4"], "num_trials": 2}
    for key in rng.sample(TOP, rng.choice((0, 0, 0, 1, 1, 2, 4))):
        spec[key] = _odd(rng)
    if rng.random() < 0.4:
        spec["sampler"] = rng.choice(SAMPLERS)
    if rng.random() < 0.4:
        spec["space"] = _table(rng, SETTINGS, _dimension)
    if rng.random() < 0.3:
        spec["points"] = [_table(rng, SETTINGS, _number) for _ in range(rng.randrange(3))]
    if rng.random() < 0.3:
        spec["models"] = [_model(rng) for _ in range(rng.randrange(3))]
    if rng.random() < 0.15:
        spec["base"] = _table(rng, BASE_PARTS, _part)
    return spec


def _add_later_keys(spec: dict[str, Any]) -> None:
    """Add keys that came after the seeds of past faults, by draws that leave the files of those seeds as they were."""
    rng = random.Random(f"later 31 {spec!r}")
    if rng.random() > 0.4:
        return
    space = spec.get("space")
    for table in space.values() if isinstance(space, dict) else ():
        if isinstance(table, dict) and rng.random() < 0.5:
            table["when"] = _odd(rng) if rng.random() < 0.1 else _table(rng, tuple(space), _condition)
    if rng.random() < 0.5:
        spec["constraints"] = _table(rng, BOUNDED, _bound)
    for key in rng.sample(LATER, rng.choice((0, 0, 1, 2))):
        spec[key] = _odd(rng)
    if rng.random() < 0.2:
        spec["sampler"] = rng.choice(("cmaes", "auto"))


def _condition(rng: random.Random) -> Any:
    return rng.choice((_number(rng), [_number(rng)], "> 0", "!= none", "<= nan", ">x", "<", f">= {_number(rng)!r:.9}"))


def _bound(rng: random.Random) -> Any:
    return _table(rng, ("max", "min", "mid"), _number) if rng.random() < 0.5 else _number(rng)


def spec_file(rng: random.Random) -> tuple[str, bytes]:
    """Return the name and the bytes of a spec file."""
    spec = _spec(rng)
    _add_later_keys(spec)
    if rng.random() < 0.02:
        deep = MAX_NEST * rng.choice((1, 40))
        text = f"bits = {'[' * deep}{']' * deep}" if rng.random() < 0.5 else f"bits = {'{a=' * deep}1{'}' * deep}"
        return "spec.toml", text.encode()
    if rng.random() < 0.02:
        return "spec.json", b'{"bits": ' + b"[" * MAX_NEST * 40
    if rng.random() < 0.5:
        return "spec.json", json.dumps(spec).encode("utf-8", "surrogatepass")
    lines = [f"{_key(key)} = {_toml(value)}" for key, value in spec.items()]
    return "spec.toml", "\n".join(lines).encode("utf-8", "surrogatepass")


def _key(key: str) -> str:
    return json.dumps(key) if not key.isalnum() else key


def _toml(value: Any) -> str:
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{_key(key)} = {_toml(part)}" for key, part in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(_toml, value)) + "]"
    if value is None:
        return "1979-05-27T07:32:00Z"  # TOML has no null, but dates, which JSON lacks
    if isinstance(value, float):
        return repr(value)  # inf and nan are words of TOML
    return str(value).lower() if isinstance(value, bool) else json.dumps(value)
