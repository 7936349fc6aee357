"""What ranks, fronts and merged sweeps come to, against their definitions."""

import random
from collections.abc import Iterator, Sequence
from dataclasses import is_dataclass, replace
from itertools import chain
from typing import Any, get_args, get_type_hints

import pytest

from support.records import record
from synq.config.parsing import dotted_keys
from synq.config.run import RunConfig, config_digest, config_to_dict, with_overrides
from synq.sweeps.leaderboard.ranking import Ranking, disagreement, read_run, read_setting
from synq.sweeps.leaderboard.records import leaderboard_rows, trial_rows
from synq.sweeps.leaderboard.tables import Tables


def test_the_first_row_of_each_ranking_is_marked() -> None:
    runs = [
        record(0.1 * lr, overrides={"quant.weight_bits": bits, "finetune.lr": float(lr)})
        for bits in (3, 4)
        for lr in (3, 1, 2)
    ]
    rows = leaderboard_rows(runs)
    assert [(row["weight_bits"], row["lr"], row["best"]) for row in rows] == [
        (bits, lr, int(lr == 1)) for bits in (4, 3) for lr in (1, 2, 3)
    ]


def test_higher_bit_widths_come_first_of_activations_too() -> None:
    widths = [(4, 4), (4, 8), (8, 4), (8, 8)]
    runs = [record(0.1, overrides={"quant.weight_bits": w, "quant.act_bits": a}) for w, a in widths]
    edges = [
        record(0.1, overrides={"quant.weight_bits": 3, "quant.first_bits": e, "quant.last_bits": 9 - e}) for e in (4, 5)
    ]
    rows = leaderboard_rows([*edges, *runs])
    assert [(row["weight_bits"], row["act_bits"]) for row in rows[:4]] == widths[::-1]
    assert [row["first_bits"] for row in rows[4:]] == [5, 4]


def test_the_parts_of_the_key_of_a_ranking() -> None:
    key = read_run(record(0.1)).ranking
    assert key.group() + key.measure() == tuple(key)
    assert Ranking._fields[len(key.group())] == "teacher_digest"


def test_a_ranking_names_what_its_objective_was_measured_on() -> None:
    labels = {
        "evaluation.dataset": "npz:folder/lab.npz",
        "evaluation.num_images": 50,
        "evaluation.selection_fraction": 0.25,
    }
    one = read_run(record(0.1, overrides=labels, heldout_digest="h", eval_digest="e")).ranking
    assert one.measure() == ("aa", "e", "h", "", "", "", "kl")
    chosen = {**labels, "evaluation.objective": "selection"}
    other = read_run(record(50.0, overrides=chosen, heldout_digest="h", eval_digest="e")).ranking
    assert other.measure() == ("aa", "e", "", "lab.npz", "50", "0.25", "")


@pytest.mark.parametrize(
    ("part", "value", "name"),
    [("seed", "1", "seed"), ("data_seed", 1.0, "data_seed"), ("finetune", {"lr": "x"}, "finetune.lr")],
)
def test_a_damaged_configuration_is_named_with_its_key_and_file(part: str, value: object, name: str) -> None:
    with pytest.raises(ValueError, match=name) as caught:
        read_setting({**config_to_dict(RunConfig()), part: value}, "the_file.json")
    assert "the_file.json" in str(caught.value)


@pytest.mark.parametrize(
    ("one", "other", "text"),
    [(0.0, 5e-5, ""), (1000.0, 1000.05, ""), (0.0, 2e-4, "objective_value 0 and 0.0002"), (1000.0, 1000.5, "1000.5")],
)
def test_runs_of_one_setting_agree_but_for_rounding(one: float, other: float, text: str) -> None:
    found = disagreement(read_run(record(one)), read_run(record(other)))
    assert (text in found) if text else not found


def test_a_cell_is_that_of_a_column_or_of_any_setting() -> None:
    (standing,) = Tables([record(0.1, overrides={"finetune.lr": 0.004})]).standings()
    assert (standing.cell("rank"), standing.cell("model")) == (1, "net")
    assert float(standing.cell("params.finetune.lr")) == 0.004


def front_by_definition(rows: Sequence[dict[str, Any]], cost: str, sign: int = 1) -> list[int | None]:
    """Slow twin of the Pareto columns: compare each row with each other one."""
    points = [(sign * row["objective_value"], row[cost]) for row in rows]
    marks: list[int | None] = []
    for value, price in points:
        others = [(v, p) for v, p in points if p is not None]
        if price is None:
            marks.append(None)
        else:
            marks.append(int(not any(v <= value and p <= price and (v, p) != (value, price) for v, p in others)))
    return marks


@pytest.mark.parametrize("objective", ["synthetic", "selection"])
@pytest.mark.parametrize("seed", range(5))
def test_the_pareto_fronts_are_those_of_the_definition(objective: str, seed: int) -> None:
    draw = random.Random(seed)
    settings: dict[str, Any] = {"evaluation.objective": objective, "evaluation.dataset": "digits"}
    runs = []
    for number in range(40):  # few different values, so that ties of either kind occur
        bits = draw.choice([2, 3, 4, 8])
        changes = {**settings, "quant.weight_bits": bits, "finetune.lr": 1e-3 * (number + 1)}
        sizes = {"size_bytes": draw.choice([10, 20, 30, None]), "bitops": draw.choice([1e6, 2e6, 3e6])}
        for repeat in range(draw.choice([1, 2])):
            runs.append(record(float(draw.randint(1, 9)), seed=repeat, overrides=changes, **sizes))
    rows = leaderboard_rows(runs)
    sign = -1 if objective == "selection" else 1
    for cost, mark in (("size_bytes", "pareto_size"), ("bitops", "pareto_bitops")):
        marks = [row[mark] for row in rows]
        assert marks == front_by_definition(rows, cost, sign) and 0 < sum(map(bool, marks)) < len(rows)


def test_equal_points_are_both_on_the_front_and_an_unknown_size_is_an_empty_cell() -> None:
    lrs = [1e-3, 2e-3, 3e-3]
    runs = [record(0.1, overrides={"finetune.lr": lr}, size_bytes=10, bitops=None) for lr in lrs[:2]]
    runs.append(record(0.05, overrides={"finetune.lr": lrs[2]}, bitops=5))
    rows = {row["lr"]: (row["pareto_size"], row["pareto_bitops"]) for row in leaderboard_rows(runs)}
    assert rows == {1e-3: (1, None), 2e-3: (1, None), 3e-3: (None, 1)}


@pytest.mark.parametrize(
    ("other", "shared"),
    [
        ({"overrides": {"quant.weight_bits": 3}}, True),
        ({"overrides": {"quant.act_bits": 8}}, True),
        ({"overrides": {"quant.first_bits": 8}}, False),
        ({"overrides": {"quant.act_points": "inputs"}}, False),
        ({"overrides": {"evaluation.objective": "selection", "evaluation.dataset": "digits"}}, False),
        ({"model": "other"}, False),
        ({"heldout_digest": "other"}, False),
        ({"teacher": {"digest": "bb", "input_size": [3, 32, 32]}}, False),
        ({"eval_digest": "other"}, False),
    ],
)
def test_a_front_spans_bit_widths_and_nothing_else(other: dict[str, Any], shared: bool) -> None:
    """The second row is worse in both, so it is on a front exactly if the front is another one."""
    worse = -1.0 if other.get("overrides", {}).get("evaluation.objective") == "selection" else 1.0
    rows = leaderboard_rows([record(0.1, size_bytes=1, bitops=1), record(worse, size_bytes=2, bitops=2, **other)])
    marks = {row["size_bytes"]: (row["pareto_size"], row["pareto_bitops"]) for row in rows}
    assert marks == {1: (1, 1), 2: (0, 0) if shared else (1, 1)}


@pytest.mark.parametrize("status", ["completed", "failed"])
def test_students_of_each_engine_have_a_ranking_apart(status: str) -> None:
    """Also those that are portable; an explicit 8 at the first layer is the default of an engine."""
    settings: list[dict[str, Any]] = [
        {},
        {"quant.first_bits": 8, "quant.last_bits": 8},
        {"quant.target": "onnxruntime"},
        {"quant.target": "onnxruntime", "quant.portable": True},
        {"quant.target": "openvino"},
        {"quant.target": "openvino", "quant.first_bits": 8},
    ]
    runs = [record(0.1 + i, overrides=one, seed=i, status=status) for i, one in enumerate(settings)]
    rows = leaderboard_rows(runs) if status == "completed" else trial_rows(runs)
    points = [row["act_points"] for row in rows]
    expected = ["onnxruntime", "onnxruntime portable", "openvino", "relu", "relu"]
    assert sorted(points) == (expected if status == "completed" else sorted([*expected, "openvino"]))
    if status == "completed":
        assert {row["rank"] for row in rows} == {1}
        assert {(row["first_bits"], row["last_bits"]) for row in rows} == {(None, None), (8, 8)}


def test_edge_widths_of_protocol_b_share_a_front_though_not_a_ranking() -> None:
    edges = [{"quant.first_bits": 8}, {"quant.first_bits": 6}]
    rows = leaderboard_rows([record(0.1 + i, overrides=edge, size_bytes=1 + i) for i, edge in enumerate(edges)])
    assert [(row["rank"], row["pareto_size"]) for row in rows] == [(1, 1), (1, 0)]


def test_a_failed_run_that_was_completed_elsewhere_is_no_failure() -> None:
    failed = {"status": "failed", "reason": "out of memory", "host": "small"}
    runs = [record(0.1, seed=0), record(0.2, seed=1), record(None, seed=1, **failed), record(None, seed=2, **failed)]
    (row,) = leaderboard_rows(runs)
    assert (row["num_seeds"], row["num_failed"]) == (2, 1)
    done = record(0.3, seed=2, heldout_digest="made there", host="large")
    assert {row["num_failed"] for row in leaderboard_rows([*runs, done])} == {0}


def test_a_failure_counts_for_its_own_teacher_or_if_that_is_unknown_for_all() -> None:
    teachers = [{"digest": digest, "input_size": [3, 32, 32]} for digest in ("aa", "bb")]
    runs = [record(0.1, seed=0, teacher=teacher) for teacher in teachers]
    lost = record(None, seed=1, teacher=teachers[1], status="failed", reason="x")
    counted = {row["teacher_digest"]: row["num_failed"] for row in leaderboard_rows([*runs, lost])}
    assert counted == {"aa": 0, "bb": 1}
    early = replace(lost, teacher={"spec": "x"})
    assert {row["num_failed"] for row in leaderboard_rows([*runs, early])} == {1}


def test_a_copied_record_is_one_run_and_a_repeated_run_is_listed_twice() -> None:
    one, again = record(0.1, host="a"), record(0.1, host="b")
    rows = trial_rows([one, again, replace(one), again])
    assert [row["host"] for row in rows] == ["a", "b"]


def test_the_fidelity_measure_is_part_of_what_may_be_compared() -> None:
    mixed = {"evaluation.fidelity_measure": "logit_mse", "finetune.lr": 2e-3}
    labeled = {"evaluation.objective": "selection", "evaluation.dataset": "digits"}
    rows = leaderboard_rows([record(0.3), record(0.1, overrides=mixed), record(50.0, overrides=labeled)])
    assert [(row["fidelity_measure"], row["rank"]) for row in rows] == [("", 1), ("kl", 1), ("logit_mse", 1)]


def test_a_record_from_before_the_fidelity_measure_was_measured_by_the_kl() -> None:
    new, old = record(0.1, seed=0), record(0.3, seed=1)
    del old.config["evaluation"]["fidelity_measure"]
    (row,) = leaderboard_rows([new, old])
    assert (row["fidelity_measure"], row["num_seeds"]) == ("kl", 2)


def _others(cls: type, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Values that the keys of a configuration may take, whatever their kind."""
    plain = [True, False, 1, 2, 3, 5, 8, 2048, 0.25, 0.75, None, "other", "source:other", "digits", [3, 8, 8], {"a": 8}]
    for name, hint in get_type_hints(cls).items():
        if is_dataclass(hint):
            yield from _others(hint, f"{prefix}{name}.")
        else:
            parts = get_args(hint)  # of `Literal[...] | None` the first part has the values
            for value in (*plain, *parts, *chain.from_iterable(map(get_args, parts))):
                yield f"{prefix}{name}", value


def test_runs_share_a_row_exactly_if_the_digest_of_their_setting_is_the_same() -> None:
    """`read_setting` names a setting in a quicker way than `config_digest`; the two must agree on every key."""
    base = RunConfig()
    digest, key = config_digest(base, with_seeds=False), read_setting(config_to_dict(base))[1]
    seen: dict[bool, set[str]] = {True: set(), False: set()}
    for name, value in _others(RunConfig):
        try:
            config = with_overrides(base, {name: value})
        except (ValueError, TypeError):
            continue
        if config == base:
            continue
        same = config_digest(config, with_seeds=False) == digest
        assert (read_setting(config_to_dict(config))[1] == key) is same, (name, value)
        seen[same].add(name)
    for_targets = {"quant.power_of_two_scales", "quant.float_attention"}
    own = {"synthesis.source", "finetune.own_weight"}
    both = {"teacher.mean", "teacher.std", "quant.portable"} | own | for_targets  # these go with others
    assert seen[True] | seen[False] == set(dotted_keys(RunConfig)) - both
    assert {"seed", "data_seed", "name", "finetune.log_every", "runtime.device"} <= seen[True]
    assert {"finetune.lr", "quant.act_bits", "runtime.precision", "synthesis.lr"} <= seen[False]
    portable = {"quant.target": "openvino", "quant.portable": True}
    keys = {
        read_setting(config_to_dict(with_overrides(base, {**portable, "quant.portable": on})))[1]
        for on in (True, False)
    }
    assert len(keys | {key}) == 3
    for given in (
        {"synthesis.method": "own_images", "synthesis.source": ("one", "two")},
        {"finetune.own_term": "loss.py:f", "finetune.own_weight": (0.5, 2.0)},
    ):
        (setting, values), fixed = given.popitem(), given
        made = {read_setting(config_to_dict(with_overrides(base, fixed | {setting: value})))[1] for value in values}
        assert len(made | {key}) == 3, setting
    normalized = with_overrides(base, {"teacher.mean": [0.5], "teacher.std": [0.5]})
    assert read_setting(config_to_dict(normalized))[1] != key
