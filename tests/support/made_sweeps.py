"""Sweeps for the tests of pages: the files of a search with many trials, generated within a second."""

import json
import math
import random
from dataclasses import asdict
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from synq.common.digests import write_sealed_json
from synq.config.run import RunConfig, config_digest, config_to_dict, with_overrides
from synq.runs.record import RunRecord, write_record
from synq.sweeps.space import DEFAULT_SPACE, Dimension
from synq.sweeps.state.plans import FORMAT, Plan, plan_values

BEGIN = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)


def dimensions() -> list[Dimension]:
    return [
        Dimension(name=name, **{**table, "values": tuple(table.get("values", ()))})
        for name, table in DEFAULT_SPACE.items()
    ]


def draw_params(draw: random.Random) -> dict[str, Any]:
    """Return a random point of the default search space."""
    point: dict[str, Any] = {}
    for dimension in dimensions():
        if dimension.type == "choice":
            point[dimension.name] = draw.choice(dimension.values)
        elif dimension.optional and draw.random() < 0.3:
            point[dimension.name] = None
        else:
            assert dimension.low is not None and dimension.high is not None
            value = math.exp(draw.uniform(math.log(dimension.low), math.log(dimension.high)))
            point[dimension.name] = (
                float(f"{value:.4g}") if dimension.step is None else round(draw.uniform(0.3, 0.9), 1)
            )
    return point


def made_sweep(
    folder: Path, *, trials: int = 30, bits: tuple[str, ...] = ("W4A4", "W3A3"), name: str = "made", model: str = "net"
) -> Path:
    """Write the files of a sweep whose objective depends on its settings; 10 % of the trials failed, 20 % were pruned.

    Args:
        folder: Folder of the sweep.
        trials: Number of trials of each group.
        bits: Bits of the groups.
        name, model: Names of the sweep and of the model in its files.
    """
    draw = random.Random(0)
    groups = [f"group-{label}" for label in bits]
    search = {
        "name": name,
        "objective": "synthetic",
        "second_objective": "none",
        "sampler": "tpe",
        "scheduler": "asha",
        "num_trials": trials,
    }
    space = [asdict(one) for one in dimensions()]
    write_sealed_json(
        folder / "sweep.json",
        {
            "format": FORMAT,
            "objective": "synthetic",
            "groups": {key: {} for key in groups},
            "space": space,
            "search": search,
        },
    )
    for number, (group, label) in enumerate(zip(groups, bits, strict=True)):
        num_bits = int(label[1])
        base = with_overrides(
            RunConfig(), {"quant.weight_bits": num_bits, "quant.act_bits": num_bits, "finetune.lowpass_unit": "nyquist"}
        )
        for index in range(trials):
            trial = f"{group}-t{index:03d}"
            point = draw_params(draw)
            config = with_overrides(base, point)
            value = 0.1 / num_bits + abs(math.log(point["finetune.lr"] / 0.005)) * 0.02 + draw.random() * 0.01
            status = "failed" if index % 10 == 9 else "pruned" if index % 5 == 3 else "completed"
            params = {key: item for key, item in point.items() if item is not None}
            history = [(epoch, value * (1 + 1 / epoch)) for epoch in (1, 2, 3)]
            plan = Plan(
                trial=trial, group=group, stage="search", index=index, params=params, config=config,
                config_digest=config_digest(config), history=history,
            )  # fmt: skip
            write_sealed_json(folder / "plans" / f"{trial}.json", plan_values(plan))
            write_record(
                folder / "records" / f"{trial}.json",
                _record(config, trial, model, status, value, number * trials + index, draw),
            )
    return folder


def _record(
    config: RunConfig, trial: str, model: str, status: Any, value: float, place: int, draw: random.Random
) -> RunRecord:
    done = status == "completed"
    top1 = round(91 - 40 * value + draw.random(), 1)
    begun = BEGIN + timedelta(seconds=30 * (place // 4))
    return RunRecord(
        status=status,
        reason="" if done else f"{status} for the sake of the test",
        name=trial,
        config=config_to_dict(config),
        config_digest=config_digest(config),
        teacher={"spec": "x", "digest": "ab" * 32, "name": model, "num_classes": 10, "input_size": [3, 32, 32]},
        model=model,
        weight_bits=config.quant.weight_bits,
        act_bits=config.quant.act_bits,
        protocol=config.protocol,
        act_points=config.quant.points,
        objective="synthetic",
        objective_value=value if done or status == "pruned" else None,
        fidelity={"kl": value, "agreement": 95.0} if done else {},
        rtn_fidelity={"kl": 2 * value, "agreement": 80.0} if done else {},
        teacher_top1=91.0 if done else None,
        rtn_top1=70.0 if done else None,
        top1=top1 if done else None,
        drop=91.0 - top1 if done else None,
        num_eval=1000 if done else None,
        lost=10 + round(10 * (91 - top1)) if done else None,
        gained=10 if done else None,
        size_bytes=1000.0 * config.quant.weight_bits if done else None,
        bitops=1e8 * config.quant.weight_bits**2 if done else None,
        loss_history=[
            {"epoch": epoch, "loss": 1 / epoch, "kd": 0.5 / epoch, "seconds": 1.0} for epoch in (1.0, 2.0, 3.0)
        ]
        if done
        else [],
        commit="abc",
        versions={"torch": "2"},
        device="cpu",
        host=f"machine{place % 2}",
        started=begun.isoformat(timespec="seconds") if status != "failed" else "",
        total_seconds=28.0,
    )


def damage(path: Path) -> None:
    """Truncate a file to half its length, as a full disk would."""
    text = path.read_text()
    path.write_text(text[: len(text) // 2])
    try:
        json.loads(path.read_text())
    except json.JSONDecodeError:
        return
    raise AssertionError("half a record must not read")
