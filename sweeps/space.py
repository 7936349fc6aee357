"""The search space of a sweep: searched settings and their ranges. Imports neither Ray nor Optuna."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from synq.config.parsing import between, dotted_keys, one_of, require
from synq.config.run import RunConfig, parse_bits

IDENTITY = (
    *("quant.weight_bits", "quant.act_bits", "quant.first_bits", "quant.last_bits"),
    *("quant.last_bits_for_input", "quant.layer_weight_bits", "quant.layer_act_bits", "quant.act_points"),
    *("quant.target", "quant.portable", "quant.float_attention"),
)
"""Settings that determine the ranking of a run; they cannot be searched."""

DEFAULT_SPACE: dict[str, dict[str, Any]] = {
    "finetune.lowpass_cutoff": {"type": "float", "low": 0.4, "high": 1.6, "log": True, "optional": True},
    "finetune.cam_weight": {"type": "choice", "values": [0.0, 2.0, 20.0, 200.0]},
    "finetune.ce_weight": {"type": "choice", "values": [0.0, 0.01, 0.1, 0.5]},
    "finetune.difficulty_threshold": {"type": "float", "low": 0.3, "high": 0.9, "step": 0.1},
    "finetune.lr": {"type": "float", "low": 5e-4, "high": 2e-2, "log": True},
}
"""Search space of a spec without [space]. The cutoff is a fraction of the Nyquist frequency, for any image size."""

MAX_LISTED = 10_000
"""Largest number of values of a range that a grid may have."""
BITS = "bits"
"""Name of the dimension of bit-widths (W4A4, ...) in a search with two objectives."""
METHOD = "synthesis.method"
"""The one setting of the synthesis that may be searched: the held-out images are the same for all methods."""


class Suggester(Protocol):
    """The part of an Optuna trial that `sample` needs."""

    def suggest_float(
        self, name: str, low: float, high: float, *, step: float | None = None, log: bool = False
    ) -> float: ...
    def suggest_int(self, name: str, low: int, high: int, *, step: int = 1, log: bool = False) -> int: ...
    def suggest_categorical(self, name: str, choices: Sequence[Any]) -> Any: ...


@dataclass(frozen=True, kw_only=True, slots=True)
class Dimension:
    """One searched setting: a range or a list of values."""

    name: str
    """Dotted name, for example finetune.lr."""
    type: Literal["float", "int", "choice"]
    """Kind of values."""
    low: float | None = None
    """Smallest value."""
    high: float | None = None
    """Largest value."""
    log: bool = False
    """Whether the range is searched by its logarithm."""
    step: float | None = None
    """Spacing of the values; None is a continuous range."""
    values: tuple[Any, ...] = ()
    """The choices; "none" is None."""
    optional: bool = False
    """Whether None (the idea disabled) is tried in addition to the range."""

    def __post_init__(self) -> None:
        where = f"space.{self.name}"
        one_of(f"{where}.type", self.type, ("float", "int", "choice"))
        if self.type == "choice":
            require(f"{where}.values", "hold at least one value", list(self.values), len(self.values) > 0)
            bounded = (
                self.low is not None or self.high is not None or self.step is not None or self.log or self.optional
            )
            rule = "be float or int where low, high, step, log or optional is given"
            require(f"{where}.type", rule, self.type, not bounded)
            return
        require(f"{where}.values", "be left out unless type is choice", list(self.values), not self.values)
        if self.low is None or self.high is None:
            raise ValueError(f"`{where}` must give low and high, but got low={self.low}, high={self.high}")
        between(f"{where}.low", self.low, -1e300)
        between(f"{where}.high", self.high, self.low)
        require(f"{where}.low", "be > 0 for a logarithmic range", self.low, not self.log or self.low > 0)
        require(f"{where}.step", "be left out for a logarithmic range", self.step, not self.log or self.step is None)
        if self.step is not None:
            between(f"{where}.step", self.step, 0, open_low=True)
        if self.type == "int":
            for key in ("low", "high", "step"):
                value = getattr(self, key)
                require(f"{where}.{key}", "be a whole number for type int", value, value is None or value % 1 == 0)

    def suggest(self, trial: Suggester) -> Any:
        """Return a value chosen by the search; None only if `optional`."""
        if self.type == "choice":
            picked = trial.suggest_categorical(self.name, list(self.values))
            return None if picked == "none" else picked
        if self.optional and not trial.suggest_categorical(f"{self.name}.on", [True, False]):
            return None
        assert self.low is not None and self.high is not None
        if self.type == "int":
            return trial.suggest_int(self.name, int(self.low), int(self.high), step=int(self.step or 1), log=self.log)
        value = trial.suggest_float(self.name, self.low, self.high, step=self.step, log=self.log)
        return float(f"{value:.6g}")  # short to read, and exactly the value of the run

    def point(self, value: Any) -> dict[str, Any] | None:
        """Return the search's parameters for `value`; None if it is not in the dimension."""
        if self.type == "choice":
            value = "none" if value is None else value
            return {self.name: value} if value in self.values else None
        if value is None:
            return {f"{self.name}.on": False} if self.optional else None
        assert self.low is not None and self.high is not None
        if isinstance(value, bool) or not isinstance(value, int | float) or not self.low <= value <= self.high:
            return None
        if self.step is not None and abs((value - self.low) / self.step - round((value - self.low) / self.step)) > 1e-6:
            return None
        return {self.name: value, **({f"{self.name}.on": True} if self.optional else {})}

    def edges(self) -> tuple[Any, ...]:
        """Return the values at which the range checks of the configuration must pass: the bounds, or all choices."""
        if self.type == "choice":
            return tuple(None if value == "none" else value for value in self.values)
        bounds = (self.low, self.high) if self.type == "float" else (int(self.low or 0), int(self.high or 0))
        return (*bounds, None) if self.optional else bounds

    def listed(self) -> tuple[Any, ...]:
        """Return every value, in order, for a grid.

        Raises:
            ValueError: The dimension is a range without steps.
        """
        if self.type == "choice":
            return self.edges()
        if self.step is None and self.type == "float":
            raise ValueError(f"`space.{self.name}` must give `step`, or be a choice of `values`, for sampler grid")
        assert self.low is not None and self.high is not None
        require(f"space.{self.name}.log", "be false for sampler grid", self.log, not self.log)
        step = self.step or 1
        between(f"space.{self.name}.step", step, (self.high - self.low) / MAX_LISTED)
        count = int((self.high - self.low) / step + 1e-9) + 1
        numbers = [float(f"{self.low + step * number:.6g}") for number in range(count)]
        values = numbers if self.type == "float" else [int(number) for number in numbers]
        return (*values, None) if self.optional else tuple(values)


def sample(dimensions: Sequence[Dimension], trial: Suggester) -> dict[str, Any]:
    """Return one point of the search space as dotted overrides. Not a closure, because searchers are pickled."""
    return {"overrides": {dimension.name: dimension.suggest(trial) for dimension in dimensions}}


def value_of(config: RunConfig, name: str) -> Any:
    """Return the value of a run for a dimension; a tuple is returned as a list, as in a file."""
    if name == BITS:
        return config.quant.label
    part, _, key = name.partition(".")
    value = getattr(getattr(config, part), key)
    return list(value) if isinstance(value, tuple) else value


def value_at(config: Mapping[str, Any], name: str) -> Any:
    """Return the value of a run, given as plain values, for a dimension; see `value_of`."""
    if name == BITS:
        return f"W{config['quant']['weight_bits']}A{config['quant']['act_bits']}"
    part, _, key = name.partition(".")
    return config[part][key]


def base_values(dimensions: Sequence[Dimension], config: RunConfig) -> dict[str, Any]:
    """Return the point of a run in the space of `dimensions`."""
    return {dimension.name: value_of(config, dimension.name) for dimension in dimensions}


def with_bits(overrides: Mapping[str, Any]) -> dict[str, Any]:
    """Return overrides with a bit-width label replaced by `quant.weight_bits` and `quant.act_bits`."""
    if BITS not in overrides:
        return dict(overrides)
    weight_bits, act_bits = parse_bits(overrides[BITS])
    rest = {name: value for name, value in overrides.items() if name != BITS}
    return {**rest, "quant.weight_bits": weight_bits, "quant.act_bits": act_bits}


def setting_names() -> list[str]:
    """Return the dotted keys of the settings that may be searched."""
    names = [key for key in dotted_keys(RunConfig) if key.startswith(("finetune.", "quant.")) or key == METHOD]
    return [key for key in names if key not in (*IDENTITY, "finetune.own_term")]  # a term, whose weight is searched
