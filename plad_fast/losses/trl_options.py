"""TRL's options of a preference loss in this library's terms, or a refusal by name.

Nothing here imports TRL: the tables are of TRL 1.15 and 1.16, whose losses are the same. Every
translation takes what the trainer's configuration says of its loss and returns the name of a loss
of `plad_fast.losses`, its options, and the weight of the likelihood of the chosen responses
(`sft_weight`). An option that TRL would read and this library cannot honour is refused, and so is
one that TRL accepts and then ignores.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from plad_fast.checks import check_number, check_weight
from plad_fast.errors import UsageError
from plad_fast.losses.objective import Objective
from plad_fast.losses.terms import F_DIVERGENCES

Translated = tuple[str, dict[str, Any], float]

_TRLS_NAMES = {
    "tau": "discopop_tau",
    "gamma": "simpo_gamma",
    "f_alpha": "f_alpha_divergence_coef",
    "f_divergence": "f_divergence_type",
}
"""Options that are called otherwise in TRL."""

DPO_LOSSES = {
    "sigmoid": "dpo",
    "hinge": "dpo_hinge",
    "ipo": "ipo",
    "sigmoid_norm": "dpo_norm",
    "robust": "dpo_robust",
    "exo_pair": "exo_pair",
    "nca_pair": "nca_pair",
    "bco_pair": "bco_pair",
    "sppo_hard": "sppo_hard",
    "apo_zero": "apo_zero",
    "apo_down": "apo_down",
    "discopop": "discopop",
}
"""`loss_type` of TRL's DPOTrainer, and the loss here; `sft` is `sft_weight`."""

_SORTS = (
    "it sorts the pairs of a batch, so that the loss of a pair depends on the others; the losses "
    "here see one group at a time"
)
REFUSED_DPO_LOSSES = {"aot": _SORTS, "aot_unpaired": _SORTS}

REFUSED_DPO_OPTIONS = {
    "use_weighting": "WPO weighs a pair by its tokens' probabilities, and a loss here sees the sum "
    "of their logarithms; use_plad_fast honours it inside TRL's trainer",
    "ld_alpha": "LD-DPO weighs the tokens of a response differently, and a loss here sees the sum "
    "over them; use_plad_fast honours it inside TRL's trainer",
    "reference_free": "TRL has dropped it; CPOTrainer trains without a reference",
    "rpo_alpha": "TRL has dropped it; use loss_type=['sigmoid', 'sft'] with loss_weights",
}
"""Options that change the loss in a way that no function of sequence sums and counts can."""

_ON_DIFFERENCES = ("sigmoid", "sigmoid_norm", "hinge", "ipo", "exo_pair", "robust", "discopop")
"""What an f-divergence other than reverse_kl is valid with, beside sft."""

CPO_LOSSES = {"sigmoid": "cpo", "hinge": "slic", "ipo": "cpo_ipo", "simpo": "simpo"}
"""`loss_type` of TRL's CPOTrainer; `alphapo` is `simpo` without the likelihood."""

KTO_LOSSES = ("kto", "apo_zero_unpaired")


def translate_dpo(options: Mapping[str, Any]) -> Translated:
    """Options of `trl.DPOConfig`; several loss types become the loss `mixture`.

    With `sft` alone `beta` goes into TRL's `rewards/*`, though not into the loss: any is accepted.

    Args:
        options: those of `loss_type`, `loss_weights`, `beta`, `label_smoothing`, `discopop_tau`,
            `f_divergence_type`, `f_alpha_divergence_coef`, `ld_alpha` and `use_weighting` that are
            known; TRL's defaults stand for the others.

    Raises:
        UsageError: a loss type or option that does not work here, or that TRL would ignore; a
            value outside of an option's range.
    """
    given = _read(
        options,
        {
            **{"loss_type": ["sigmoid"], "loss_weights": None, "beta": 0.1},
            **{"label_smoothing": 0.0, "discopop_tau": 0.05},
            **{"f_divergence_type": "reverse_kl", "f_alpha_divergence_coef": 0.5},
            **{"ld_alpha": None, "use_weighting": False, "reference_free": False},
            "rpo_alpha": None,
        },
        "DPOTrainer",
    )
    types = [given["loss_type"]] if isinstance(given["loss_type"], str) else given["loss_type"]
    if not isinstance(types, (list, tuple)) or not all(isinstance(name, str) for name in types):
        raise UsageError(f"loss_type must be a name or a list of names, got {types!r}")
    weights = _weights(types, given["loss_weights"])
    for name, reason in REFUSED_DPO_OPTIONS.items():
        # ld_alpha=1 weighs every token alike, and 0 is not False.
        harmless = given[name] is None or given[name] is False
        if not harmless and (name, given[name]) != ("ld_alpha", 1.0):
            raise UsageError(f"{name}={given[name]!r} does not work here: {reason}")
    for name in types:
        if name in REFUSED_DPO_LOSSES:
            raise UsageError(f"loss_type {name!r} does not work here: {REFUSED_DPO_LOSSES[name]}")
        _known(name, (*DPO_LOSSES, "sft"))
    smoothed = {"robust", "exo_pair"} & set(types)
    _require_used(given, "label_smoothing", 0.0, "loss_type 'robust' or 'exo_pair'", bool(smoothed))
    _require_used(given, "discopop_tau", 0.05, "loss_type 'discopop'", "discopop" in types)
    divergence = _divergence(given, types)
    parts = {}
    for name in types:
        if name == "sft":
            continue
        part = {"beta": given["beta"], **(divergence if name in _ON_DIFFERENCES else {})}
        if name in smoothed:
            part["label_smoothing"] = given["label_smoothing"]
        if name == "discopop":
            part["tau"] = given["discopop_tau"]
        parts[name] = part
    sft_weight = weights.get("sft", 0.0)
    if not parts:
        if sft_weight != 1:
            raise UsageError(
                f"loss_type 'sft' alone with loss_weights=[{sft_weight}] is the same training at "
                "another learning rate; set the weight to 1"
            )
        return "sft", {}, 0.0
    if len(parts) == 1:
        ((name, part),) = parts.items()
        if weights[name] == 1:
            return _checked(DPO_LOSSES[name], part, sft_weight)
    mixed = {DPO_LOSSES[name]: {"weight": weights[name], **part} for name, part in parts.items()}
    return _checked("mixture", {"parts": mixed}, sft_weight)


def translate_cpo(options: Mapping[str, Any]) -> Translated:
    """Options of `trl.experimental.cpo.CPOConfig`.

    Args:
        options: those of `loss_type`, `beta`, `label_smoothing`, `cpo_alpha`, `simpo_gamma` and
            `alpha` that are known; TRL's defaults stand for the others.

    Raises:
        UsageError: an unknown loss type, an option that TRL would ignore, or a value outside of
            its range.
    """
    given = _read(
        options,
        {
            **{"loss_type": "sigmoid", "beta": 0.1, "label_smoothing": 0.0, "cpo_alpha": 1.0},
            **{"simpo_gamma": 0.5, "alpha": 0.0},
        },
        "CPOTrainer",
    )
    kind, sft_weight = given["loss_type"], given["cpo_alpha"]
    if kind == "alphapo":
        # 0 is what TRL's own configuration sets.
        zero = isinstance(sft_weight, (int, float)) and sft_weight == 0
        _require_used(given, "cpo_alpha", 1.0, "a loss_type other than 'alphapo'", zero)
        kind, sft_weight = "simpo", 0.0
    if kind == "kto_pair":
        raise UsageError("loss_type 'kto_pair' is gone from TRL; use its KTOTrainer")
    _known(kind, (*CPO_LOSSES, "alphapo"))
    smooths = kind in ("sigmoid", "simpo")
    _require_used(given, "label_smoothing", 0.0, "loss_type 'sigmoid' or 'simpo'", smooths)
    _require_used(given, "simpo_gamma", 0.5, "loss_type 'simpo'", kind == "simpo")
    check_weight("cpo_alpha", sft_weight)
    ours = {"beta": given["beta"], "alpha": given["alpha"]}
    if smooths:
        ours["label_smoothing"] = given["label_smoothing"]
    if kind == "simpo":
        ours["gamma"] = given["simpo_gamma"]
    return _checked(CPO_LOSSES[kind], ours, float(sft_weight))


def translate_orpo(options: Mapping[str, Any]) -> Translated:
    """Options of `trl.experimental.orpo.ORPOConfig`: `beta`.

    TRL takes the likelihood over prompt and chosen response together, which `sft_weight` does not:
    its mean is over the tokens of the response. The caller has to add the prompt's.

    Raises:
        UsageError: another option, or a value outside of its range.
    """
    given = _read(options, {"beta": 0.1}, "ORPOTrainer")
    return _checked("orpo", {"beta": given["beta"]}, 1.0)


def translate_kto(options: Mapping[str, Any]) -> Translated:
    """Options of `trl.KTOConfig`; groups are of one response, whose label is in `scores`.

    For `loss_type="kto"` the caller adds the option `kl`, its estimate of the divergence, which
    TRL takes from sequences of their own. `apo_zero_unpaired` is the same loss with `kl=0`.

    Raises:
        UsageError: an unknown loss type, or a value outside of its range.
    """
    given = _read(
        options,
        {"loss_type": "kto", "beta": 0.1, "desirable_weight": 1.0, "undesirable_weight": 1.0},
        "KTOTrainer",
    )
    kind = given.pop("loss_type")
    _known(kind, KTO_LOSSES)
    _checked("kto", given | {"kl": 0.0}, 0.0)
    return "kto", given | ({"kl": 0.0} if kind == "apo_zero_unpaired" else {}), 0.0


def _checked(loss: str, options: dict[str, Any], sft_weight: float) -> Translated:
    """What the loss itself says of the values, before a trainer has run a step."""
    try:
        Objective.bind(
            loss,
            group_size=2,
            sft_weight=sft_weight,
            has_scores=True,
            has_reference=True,
            options=options,
        )
    except UsageError as error:
        word = str(error).partition(" ")[0]
        name = f"{_TRLS_NAMES[word]}: " if word in _TRLS_NAMES else ""
        raise UsageError(f"{name}{error}") from None
    return loss, options, sft_weight


def _read(options: Mapping[str, Any], defaults: dict[str, Any], trainer: str) -> dict[str, Any]:
    if unknown := sorted(options.keys() - defaults.keys()):
        raise UsageError(
            f"{', '.join(unknown)}: not known as an option of the loss of TRL's {trainer}; "
            f"known: {', '.join(defaults)}"
        )
    return {**defaults, **options}


def _known(loss_type: Any, known: Sequence[str]) -> None:
    if loss_type not in known:
        raise UsageError(f"unknown loss_type {loss_type!r}; known: {', '.join(known)}")


def _weights(types: Sequence[str], weights: Sequence[float] | None) -> dict[str, float]:
    """Weight of each loss type, by name."""
    weights = [1.0] * len(types) if weights is None else weights
    if not isinstance(weights, (list, tuple)):
        raise UsageError(f"loss_weights must be None or a list of numbers, got {weights!r}")
    if not types or len(weights) != len(types):
        raise UsageError(f"{len(weights)} loss_weights for {len(types)} loss types; give one each")
    if len(set(types)) < len(types):
        raise UsageError(f"loss_type names a loss twice: {', '.join(types)}; add up their weights")
    for weight in weights:
        check_weight("loss_weights", weight)
    return dict(zip(types, weights, strict=True))


def _divergence(given: Mapping[str, Any], types: Sequence[str]) -> dict[str, Any]:
    """The options of ours that say which f-divergence; none for DPO's own."""
    name, alpha = given["f_divergence_type"], given["f_alpha_divergence_coef"]
    check_number("f_alpha_divergence_coef", alpha)
    if name not in F_DIVERGENCES:
        raise UsageError(f"unknown f_divergence_type {name!r}; known: {', '.join(F_DIVERGENCES)}")
    of_alpha = name == "alpha_divergence"
    _require_used(
        given, "f_alpha_divergence_coef", 0.5, "f_divergence_type 'alpha_divergence'", of_alpha
    )
    if name == "reverse_kl":
        return {}
    if wrong := [kind for kind in types if kind not in (*_ON_DIFFERENCES, "sft")]:
        raise UsageError(
            f"f_divergence_type {name!r} is valid with the loss types "
            f"{', '.join((*_ON_DIFFERENCES, 'sft'))}, not with {', '.join(wrong)}"
        )
    alone = list(types) == ["sft"]
    _require_used(given, "f_divergence_type", "reverse_kl", "a loss type beside 'sft'", not alone)
    return {"f_divergence": name} | ({"f_alpha": alpha} if of_alpha else {})


def _require_used(given: Mapping[str, Any], name: str, default: Any, user: str, used: bool) -> None:
    """Refuse an option that TRL would accept and ignore."""
    if not used and given[name] != default:
        raise UsageError(
            f"{name}={given[name]!r} has no effect in TRL without {user}; leave it at {default!r}"
        )
