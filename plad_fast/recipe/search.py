"""The settings that `plad-fast tune` varies, and its suggestions, which Optuna makes."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import TYPE_CHECKING, Any, TypeAlias

from plad_fast.checks import shown
from plad_fast.errors import UsageError, located
from plad_fast.recipe.dependencies import STAGES
from plad_fast.recipe.fields import AT_LEAST_1, POSITIVE, checked, flag, free_setting, read_value
from plad_fast.recipe.settings import DistillConfig

if TYPE_CHECKING:
    from optuna.distributions import CategoricalDistribution, FloatDistribution

    Values: TypeAlias = CategoricalDistribution | FloatDistribution

_FIELDS = {field.name: field for field in dataclasses.fields(DistillConfig)}
# Of the pairs and of the training on them alone: all before is made once, and the scorer opened.
_BEFORE = {name for stage in ("fine-tuning", "samples") for name in STAGES[stage]} | {"scorer"}
_SEARCHED = ({*STAGES["pairs"], *STAGES["preference training"]} & _FIELDS.keys()) - _BEFORE
_DEFAULT = object()
"""What stands for the values of a setting of which the name alone is given."""
_DRAWS = 100  # suggestions of a trial, until one was not tried
_LOG_FROM = 10
"""The ratio of its ends from which on a range is searched in logarithmic steps."""


@dataclass(frozen=True)
class TuneConfig:
    """What `plad-fast tune` can be told besides the settings of `distill`.

    Raises:
        UsageError: a value out of range.
    """

    trials: int = free_setting(20, "number of trials, each one training", AT_LEAST_1)
    minutes: float | None = free_setting(
        None, "minutes that trials may take together; none begins after them", POSITIVE
    )
    search: str | Mapping[str, Any] | Sequence[str] | None = free_setting(
        None,
        "setting of pairs or preference training to search, and its values: a range such as "
        "beta=0.1..2, a list such as loss=dpo,simpo, or the name alone for its default values; of "
        "one loss: dpo.beta=0.05..1; repeat: these are searched and no others; in a --config file "
        "`search: {beta: 0.1..2}`. Default: learning_rate, epochs, beta, sft_weight, "
        "length_normalization, max_length_ratio, and with a scorer drop_contradicted, each unless "
        "it is set",
    )

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            if field.name != "search":
                object.__setattr__(self, field.name, checked(field, getattr(self, field.name)))


@dataclass(frozen=True)
class SearchSpace:
    """The values of the settings that are searched."""

    config: DistillConfig
    by_loss: Mapping[str, Mapping[str, Values]]
    """Loss -> setting -> its values."""

    @classmethod
    def of(cls, config: DistillConfig, search: Any, fixed: Collection[str] = ()) -> SearchSpace:
        """The space of a search.

        Args:
            config: the settings of all trials.
            search: setting, or LOSS.SETTING, -> its values, as in `TuneConfig.search`; these are
                searched and no others. Where it is empty, what has default values.
            fixed: settings of which the default values are not searched unless `search` names them.

        Raises:
            UsageError: no such setting or value, or one that the loss does not have.
        """
        given = {key.replace("-", "_"): value for key, value in _mapping(search).items()}
        are_named = bool(given)
        losses = _read("loss", given.pop("loss", config.loss), "search: loss")
        by_loss: dict[str, dict[str, Values]] = {}
        without = {key for key, value in given.items() if value is _DEFAULT}
        for loss in (names := _ends(losses)):
            defaults = _defaults(config, loss)
            space = {n: v for n, v in defaults.items() if not are_named and n not in fixed}
            for key, value in given.items():
                of_loss, dot, name = key.rpartition(".")
                if dot and of_loss not in names:
                    raise UsageError(
                        f"search: {key}: {shown(of_loss)} is none of the losses searched, "
                        f"{', '.join(names)}; name it in loss"
                    )
                if name == "loss":
                    raise UsageError(f"search: {key} is no setting of a loss; name a setting")
                if dot and of_loss != loss:
                    continue
                if value is not _DEFAULT:
                    space[name] = _read(name, value, f"search: {key}")
                elif name in defaults:
                    space[name] = defaults[name]
                    without.discard(key)
            by_loss[loss] = space
        if without:
            key = min(without)
            _require_searched(key.rpartition(".")[2], f"search: {key}")
            raise UsageError(f"search: {key} has no default values here; write {key}=VALUES")
        found = cls(config, by_loss)
        found._check()
        return found

    def settings(self) -> dict[str, Any]:
        """As JSON values."""
        from optuna.distributions import distribution_to_json

        return {
            loss: {name: distribution_to_json(values) for name, values in space.items()}
            for loss, space in self.by_loss.items()
        }

    def suggest(self, trials: Sequence[Mapping[str, Any]], seed: int) -> dict[str, Any] | None:
        """Settings of the next trial, which none before it had, and the same for the same trials
        before it; None where all combinations have been tried.

        The first has the settings as they are, as far as they lie in the space. The others are
        drawn at random until there are ten, then by Optuna's TPE sampler.

        Args:
            trials: "settings" and "score" of each, in order; None for one that failed.
            seed: of the search.
        """
        import optuna
        from optuna.distributions import CategoricalDistribution
        from optuna.trial import TrialState, create_trial

        optuna.logging.set_verbosity(optuna.logging.WARNING)
        # Of the trial's number too: one that was killed is suggested again.
        sampler = optuna.samplers.TPESampler(seed=(seed + 2**16 * len(trials)) % 2**32)
        study = optuna.create_study(direction="maximize", sampler=sampler)
        of_loss = CategoricalDistribution(tuple(self.by_loss))
        for before in trials:
            settings = before["settings"]
            space = self.by_loss[settings["loss"]]
            names = {name: self._parameter(settings["loss"], name) for name in space}
            score = before["score"]
            study.add_trial(
                create_trial(
                    state=TrialState.FAIL if score is None else TrialState.COMPLETE,
                    value=score,
                    params={"loss": settings["loss"]} | {names[n]: settings[n] for n in space},
                    distributions={"loss": of_loss} | {names[n]: space[n] for n in space},
                )
            )
        if not trials:
            first = self._first()
            loss = first.pop("loss")
            named = {self._parameter(loss, name): value for name, value in first.items()}
            study.enqueue_trial({"loss": loss, **named})
        every = {
            self._parameter(loss, name): values
            for loss, space in self.by_loss.items()
            for name, values in space.items()
        }
        tried = [trial["settings"] for trial in trials]
        for _ in range(_DRAWS):
            found = study.ask({"loss": of_loss, **every}).params
            loss = found["loss"]
            own = {name: found[self._parameter(loss, name)] for name in self.by_loss[loss]}
            if (settings := {"loss": loss, **own}) not in tried:
                return settings
        return next((one for one in self._combinations() if one not in tried), None)

    def _combinations(self) -> Iterator[dict[str, Any]]:
        """Of the losses none of whose settings has a range."""
        from optuna.distributions import FloatDistribution

        for loss, space in self.by_loss.items():
            if not any(isinstance(values, FloatDistribution) for values in space.values()):
                for chosen in product(*map(_ends, space.values())):
                    yield {"loss": loss, **dict(zip(space, chosen, strict=True))}

    def _parameter(self, loss: str, name: str) -> str:
        """What Optuna knows a setting by: of one loss, unless it has the same values for all."""
        spaces = self.by_loss.values()
        shared = all(space.get(name) == self.by_loss[loss][name] for space in spaces)
        return name if shared else f"{loss}.{name}"

    def _first(self) -> dict[str, Any]:
        """The settings as they are, and the first value of those that lie outside the space."""
        from optuna.distributions import FloatDistribution

        loss = self.config.loss if self.config.loss in self.by_loss else next(iter(self.by_loss))
        first: dict[str, Any] = {"loss": loss}
        for name, values in self.by_loss[loss].items():
            value, ends = _own(self.config, loss, name), _ends(values)
            inside = value in ends
            if isinstance(values, FloatDistribution):
                inside = value is not None and values.low <= value <= values.high
            first[name] = value if inside else ends[0]
        return first

    def _check(self) -> None:
        """Every value beside the first ones of the other settings."""
        for loss, space in self.by_loss.items():
            start = {name: _ends(values)[0] for name, values in space.items()}
            every = [(name, value) for name in space for value in _ends(space[name])]
            for name, value in [("loss", loss), *every]:
                what = "" if name == "loss" else f" with {name} {shown(value)}"
                with located(f"search: loss {loss}{what}"):
                    replace(self.config, **{**start, "loss": loss, name: value})


def _mapping(search: Any) -> dict[str, Any]:
    """NAME=VALUES of the flag, or a mapping of the file, as a mapping; `_DEFAULT` for the values of
    a name alone."""
    if search is None or isinstance(search, Mapping):
        found = dict(search or {})
        if not all(isinstance(name, str) for name in found):
            raise UsageError(f"search has a name that is no text: {shown(list(found))}")
        return {name: _DEFAULT if values is None else values for name, values in found.items()}
    found = {}
    for text in [search] if isinstance(search, str) else search:
        name, equals, values = text.partition("=") if isinstance(text, str) else ("", "", "")
        if not name or bool(equals) != bool(values) or name in found:
            raise UsageError(
                f"--search {shown(text)} must be NAME=VALUES, or NAME for its default values, each "
                "name once, such as beta=0.1..2"
            )
        found[name] = values if equals else _DEFAULT
    return found


def _read(name: str, value: Any, where: str) -> Values:
    """The values of a setting from a flag or a file; UsageError that begins with `where`."""
    from optuna.distributions import CategoricalDistribution

    _require_searched(name, where)
    if value is _DEFAULT:
        raise UsageError(f"{where} has no default values; write {name}=VALUES")
    field = _FIELDS[name]
    if isinstance(value, str) and ".." in value:
        ends = [read_value("float", end, where) for end in value.split("..", 1)]
        if "float" not in str(field.type) or "tuple" in str(field.type):
            raise UsageError(f"{where}: {flag(name)} has no range; list its values")
        if ends[0] >= ends[1]:
            raise UsageError(f"{where}: {value} must be a range, the lower end first")
        return _range(*(checked(field, end) for end in ends))
    if isinstance(value, str) and name != "loss_args":
        value = value.split(",")
    listed = list(value) if isinstance(value, (list, tuple)) else [value]
    if not listed:
        raise UsageError(f"{where} has no value")
    read = []
    for entry in listed:
        is_none = entry is None or (isinstance(entry, str) and entry.lower() in ("none", "null"))
        value_of = read_value(str(field.type), None if is_none else entry, where)
        read.append(checked(field, value_of))
    if len(set(map(repr, read))) < len(read):
        raise UsageError(f"{where} has a value twice: {shown(value)}")
    return CategoricalDistribution(read)


def _require_searched(name: str, where: str) -> None:
    if name not in _SEARCHED:
        what = "is the same in all trials" if name in _FIELDS else "is no setting"
        raise UsageError(
            f"{where}: {flag(name)} {what}; what can be searched is {', '.join(sorted(_SEARCHED))}"
        )


def _defaults(config: DistillConfig, loss: str) -> dict[str, Values]:
    from optuna.distributions import CategoricalDistribution as Choice

    from plad_fast.losses.registry import get_loss

    spec = get_loss(loss)
    space: dict[str, Values] = {
        "learning_rate": _range(3e-6, 1e-4),
        "epochs": Choice((1.0, 2.0, 4.0)),
    }
    beta = spec.options.get("beta")
    if isinstance(beta, float):
        space["beta"] = _range(beta / 10, beta * 10)
    if not spec.is_likelihood:
        space["sft_weight"] = Choice((0.0, 0.1, 0.3, 1.0))
        if spec.length_normalized:
            space["length_normalization"] = Choice((0.0, 1.0))
    space["max_length_ratio"] = Choice((None, 1.5, 3.0))
    if config.scorer is not None:
        space["drop_contradicted"] = Choice((False, True))
    return space


def _own(config: DistillConfig, loss: str, name: str) -> Any:
    """The value of a setting; where none is given, what the loss has."""
    from plad_fast.losses.registry import get_loss

    spec, value = get_loss(loss), getattr(config, name)
    if value is None and name in ("beta", "sft_weight", "length_normalization"):
        return spec.options.get("beta") if name == "beta" else getattr(spec, name)
    return value


def _range(low: float, high: float) -> FloatDistribution:
    from optuna.distributions import FloatDistribution

    return FloatDistribution(low, high, log=low > 0 and high / low >= _LOG_FROM)


def _ends(values: Values) -> tuple[Any, ...]:
    """Those of a choice, or the ends of a range."""
    from optuna.distributions import FloatDistribution

    if isinstance(values, FloatDistribution):
        return values.low, values.high
    return values.choices
