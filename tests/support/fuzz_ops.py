"""Random calls of the ops and the losses, held to the float64 reference; see `fuzzing`.

N tokens, V vocabulary, D hidden, S sequences in B groups of K.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import plad_fast
from plad_fast.losses.registry import available, get_loss
from tests.support.fuzz_hostile import HOSTILE, NAMES, Spoilt
from tests.support.fuzz_truth import LOGITS, Truth, budget, compare_gradients, truths_of
from tests.support.fuzzing import Case, Draw, call_text
from tests.support.loss_options import REQUIRED

DTYPES = [torch.float64, torch.float64, torch.float32, torch.bfloat16, torch.float16]


def draw_head(draw: Draw, *, group_size: int = 1, hostile: bool = False) -> dict[str, Any]:
    """Arguments of `linear_sequence_logprobs`, valid; large enough to be spoiled if `hostile`."""
    generator = torch.Generator().manual_seed(draw.torch_seed())
    low = 1 if hostile else 0
    groups = draw.randint(2 * low, 4)
    lengths = [draw.randint(low, 6) for _ in range(groups * group_size)]
    N, D, V = sum(lengths), draw.randint(2 * low, 9), draw.randint(1 + low, 41)  # noqa: N806
    dtype = draw.choice(DTYPES)
    top = 10.0 if dtype in (torch.float64, torch.float32) else 1.0
    scale = draw.choice([0.1, 1.0, top])

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    def laid_out(*shape: int) -> Tensor:
        kind = draw.choice(["plain", "plain", "columns", "rows", "expanded", "transposed"])
        if kind == "columns":
            return normal(shape[0], 2 * shape[1])[:, ::2]
        if kind == "rows":
            return normal(3 * shape[0], shape[1])[1::3]
        if kind == "expanded":
            return normal(1, shape[1]).expand(shape)
        return normal(shape[1], shape[0]).T if kind == "transposed" else normal(*shape)

    hidden, weight = (scale * laid_out(N, D)).detach(), laid_out(V, D)
    if draw.maybe(0.3):  # the product above has made it contiguous
        hidden = laid_out(N, D)
    targets = torch.randint(V, (N,), generator=generator)
    options: dict[str, Any] = {}
    if draw.maybe(0.3):
        options["ignore_index"] = draw.choice([-100, -1, 0, V - 1, 2**40, -(2**63)])
    ignored = torch.rand(N, generator=generator) < draw.choice([0.0, 0.3, 1.0])
    targets[ignored] = options.get("ignore_index", -100)
    bounds = torch.tensor([0, *lengths]).cumsum(0)
    if -(2**31) <= options.get("ignore_index", -100) < 2**31 and draw.maybe(0.2):
        targets = targets.int()
    if draw.maybe(0.2):
        bounds = bounds.int()
    if draw.maybe(0.2):
        targets, bounds = targets.repeat_interleave(2)[::2], bounds.repeat_interleave(3)[::3]
    bias = normal(V) * 3 if draw.maybe(0.4) else None
    for leaf, share in ((hidden, 0.8), (weight, 0.8), (bias, 0.8)):
        if leaf is not None:
            leaf.requires_grad_(draw.maybe(share))
    for name, values in {
        "softcap": [0.7, 30.0, 5, None],
        "logit_scale": [0.0625, -1.5, 0.0, 2],
        "temperature": [0.7, 3, 1e-2],
        "length_normalization": [0.6, 1, 1.0, 3.0],
        "scratch_bytes": [1, 64, 5000, 2**20, 2**50],
        "impl": ["torch", "auto"],
    }.items():
        if draw.maybe(0.3):
            options[name] = draw.choice(values)
    if dtype in (torch.bfloat16, torch.float16) and options.get("temperature") == 1e-2:
        del options["temperature"]
    return {
        "hidden": hidden, "weight": weight, "targets": targets, "cu_seqlens": bounds,
        "bias": bias, **options,
    }  # fmt: skip


def draw_mode(draw: Draw) -> tuple[str, Callable[[], Any]]:
    return draw.choice(
        [
            *[("", contextlib.nullcontext)] * 5,
            ("no_grad", torch.no_grad),
            ("inference_mode", torch.inference_mode),
            ("autocast", lambda: torch.autocast("cpu", dtype=torch.bfloat16)),
        ]
    )


def made(
    draw: Draw, function: str, arguments: dict[str, Any], check: Callable[[Any], None],
    mode: tuple[str, Callable[[], Any]], spoilt: tuple[str, ...] = (), **extra: Any,
) -> Case:  # fmt: skip
    fn = getattr(plad_fast, function)

    def call() -> Any:
        with mode[1]():
            return fn(**arguments)

    text = f"{mode[0]} {call_text(function, **arguments)}".strip()
    return Case(text, call, check, spoilt, **extra)


def spoil(draw: Draw, function: str, arguments: dict[str, Any]) -> tuple[str, ...]:
    """Replace one argument, or two, by something that must be refused; returns their names."""
    names: list[str] = []
    for argument in draw.sample(sorted(HOSTILE[function]), draw.choice([1, 1, 1, 2])):
        value = draw.choice(HOSTILE[function][argument])
        arguments[argument] = value.of(arguments) if isinstance(value, Spoilt) else value
        names += [argument, *NAMES.get(argument, ())]
    return tuple(names)


def linear(draw: Draw) -> Case:
    arguments = draw_head(draw)
    if draw.maybe(0.3):
        arguments["skip_inactive"] = draw.maybe(0.5)
    if draw.maybe(0.3):
        arguments["return_lse"] = arguments["return_entropy"] = True
    mode = draw_mode(draw)

    def check(ours: Any) -> None:
        same, truth = truths_of(arguments, mode[0])
        budget(ours.sums, same.sums, truth.sums, "sums")
        tokens = ours.token_logprobs
        budget(tokens, same.tokens, truth.tokens, "token_logprobs")
        assert torch.equal(ours.counts, truth.counts), "counts"
        outputs = [(ours.sums, same.sums, truth.sums), (tokens, same.tokens, truth.tokens)]
        if arguments.get("return_lse"):
            keep = truth.targets != truth.ignore_index
            lse = [t.logits.logsumexp(1).where(keep, 0) for t in (same, truth)]
            budget(ours.lse, lse[0], lse[1], "lse")
            entropy = [
                torch.special.entr(t.logits.softmax(1)).sum(1).where(keep, 0) for t in (same, truth)
            ]
            budget(ours.entropy, entropy[0], entropy[1], "entropy")
            outputs.append((ours.lse, *lse))
        if mode[0] in ("", "autocast"):
            compare_gradients(arguments, (same, truth), outputs, draw)

    return made(draw, "linear_sequence_logprobs", arguments, check, mode)


def stored(draw: Draw) -> Case:
    a = draw_head(draw)
    generator = torch.Generator().manual_seed(draw.torch_seed())
    batch, length, vocab = draw.randint(0, 4), draw.randint(0, 5), len(a["weight"])
    shape = (batch, length, vocab) if draw.maybe(0.5) else (len(a["targets"]), vocab)
    logits = torch.randn(shape, generator=generator).to(a["weight"].dtype)
    if draw.maybe(0.3):
        logits = torch.cat([logits] * 2, dim=-1)[..., ::2]
    arguments = {"logits": logits.requires_grad_(draw.maybe(0.8)), "targets": a["targets"]}
    padded = len(shape) == 3
    if padded:
        arguments["targets"] = torch.randint(vocab, shape[:2], generator=generator)
        arguments["targets"][torch.rand(shape[:2], generator=generator) < 0.3] = -100
        a.pop("ignore_index", None)
    else:
        arguments["cu_seqlens"] = a["cu_seqlens"]
    keep = (*LOGITS, "length_normalization", "ignore_index", "scratch_bytes", "impl")
    arguments |= {name: a[name] for name in keep if name in a}
    mode = draw_mode(draw)

    def check(ours: Any) -> None:
        full = {**arguments}
        if padded:
            full["cu_seqlens"] = torch.arange(batch + 1) * length
        same, truth = truths_of(full, mode[0])
        tokens = ours.token_logprobs
        budget(ours.sums, same.sums, truth.sums, "sums")
        budget(tokens, same.tokens, truth.tokens, "token_logprobs")
        assert torch.equal(ours.counts, truth.counts), "counts"
        if mode[0] in ("", "autocast"):
            outputs = [(ours.sums, same.sums, truth.sums), (tokens, same.tokens, truth.tokens)]
            compare_gradients(arguments, (same, truth), outputs, draw)

    return made(draw, "sequence_logprobs", arguments, check, mode)


def draw_loss(draw: Draw, arguments: dict[str, Any], like: int) -> None:
    """A registered loss and what it takes, for `like` sequences."""
    spec = get_loss(draw.choice(available()))
    generator = torch.Generator().manual_seed(draw.torch_seed())
    arguments["loss"] = spec.name
    arguments |= REQUIRED.get(spec.name, {})
    if spec.needs_scores or draw.maybe(0.1):
        arguments["scores"] = torch.randn(like, generator=generator).double()
    if spec.needs_reference_for(arguments) or draw.maybe(0.1):
        arguments["reference_logps"] = -5 * torch.rand(like, generator=generator)
    if draw.maybe(0.4):
        arguments["sft_weight"] = draw.choice([0.0, 0.1, 2])
    if draw.maybe(0.3):
        arguments["num_groups"] = draw.choice([0, 3, 8.0, torch.tensor(5), torch.tensor(0)])
    if draw.maybe(0.3):
        arguments["num_tokens"] = draw.choice([0, 17, 8.5, torch.tensor(5.0)])
    smoothing = [0.1, 0.2] if spec.name == "exo_pair" else [0.0, 0.2]
    for option, values in {"beta": [0.05, 1, 3.0], "label_smoothing": smoothing}.items():
        if option in spec.options and draw.maybe(0.4):
            arguments[option] = draw.choice(values)


def fused(draw: Draw) -> Case:
    size = draw.choice([2, 2, 3, 4])
    arguments = {**draw_head(draw, group_size=size), "group_size": size}
    draw_loss(draw, arguments, len(arguments["cu_seqlens"]) - 1)
    mode = draw_mode(draw)

    def check(ours: Any) -> None:
        same, truth = truths_of(arguments, mode[0])
        values = [t.objective(arguments) for t in (same, truth)]
        budget(ours.sums, same.sums, truth.sums, "sums")
        assert torch.equal(ours.counts, truth.counts), "counts"
        size = float(truth.tokens.detach().abs().sum())
        budget(ours.group_losses, values[0][1], values[1][1], "group_losses", size)
        budget(ours.loss, values[0][0], values[1][0], "loss", size)
        if mode[0] in ("", "autocast") and len(truth.sums):
            outputs = [(ours.loss, values[0][0], values[1][0])]
            compare_gradients(arguments, (same, truth), outputs, draw)

    return made(draw, "fused_linear_preference_loss", arguments, check, mode)


def stored_loss(draw: Draw) -> Case:
    """`preference_loss` on sums that lie flat or in groups."""
    size, groups = draw.choice([2, 3, 4]), draw.randint(0, 4)
    generator = torch.Generator().manual_seed(draw.torch_seed())
    dtype = draw.choice([torch.float64, torch.float32])
    count = size * groups
    sums = (-20 * torch.rand(count, generator=generator)).to(dtype)
    counts = torch.randint(0, 9, (count,), generator=generator)
    arguments: dict[str, Any] = {"sums": sums, "counts": counts, "group_size": size}
    draw_loss(draw, arguments, count)
    if draw.maybe(0.5):
        for name in ("sums", "counts", "scores", "reference_logps"):
            if name in arguments:
                arguments[name] = arguments[name].reshape(groups, size)
    if draw.maybe(0.4):
        arguments["length_normalization"] = draw.choice([0.6, 1])
    arguments["sums"].requires_grad_()

    def check(ours: Any) -> None:
        leaf = sums.detach().double().requires_grad_()
        truth = Truth.__new__(Truth)
        own = get_loss(arguments["loss"]).length_normalization
        truth.alpha = arguments.get("length_normalization", own)
        truth.counts, truth.tokens = counts.reshape(-1), leaf
        truth.sums_of = lambda values, alpha: values  # type: ignore[method-assign]
        value, _ = truth.objective(arguments)
        torch.testing.assert_close(ours.double(), value, rtol=1e-5, atol=1e-5)
        [found] = torch.autograd.grad(
            ours, arguments["sums"], materialize_grads=True, allow_unused=True
        )
        [want] = torch.autograd.grad(value, leaf, materialize_grads=True, allow_unused=True)
        torch.testing.assert_close(found.reshape(-1).double(), want, rtol=1e-5, atol=1e-6)

    return made(draw, "preference_loss", arguments, check, ("", contextlib.nullcontext))


def hostile(draw: Draw) -> Case:
    """A valid call of which one or two arguments were replaced."""
    function = draw.choice(sorted(HOSTILE))
    size = 2 if "preference" in function else 1
    arguments = draw_head(draw, group_size=size, hostile=True)
    sequences = len(arguments["cu_seqlens"]) - 1
    if function == "sequence_logprobs":
        hidden, weight = arguments.pop("hidden"), arguments.pop("weight")
        arguments = {"logits": (hidden @ weight.T).detach(), **arguments}
        del arguments["bias"]
    elif function == "preference_loss":
        counts = arguments["cu_seqlens"].diff()
        arguments = {"sums": -counts.float(), "counts": counts}
    if size == 2:
        draw_loss(draw, arguments, sequences)
    names = spoil(draw, function, arguments)
    return made(draw, function, arguments, lambda _: None, ("", contextlib.nullcontext), names)


def poisoned(draw: Draw) -> Case:
    """Hidden states of one sequence that are not finite, or huge: the others never notice."""
    function = draw.choice(["linear_sequence_logprobs", "fused_linear_preference_loss"])
    fuse = function.startswith("fused")
    arguments = draw_head(draw, group_size=2 if fuse else 1, hostile=True)
    arguments["targets"] = torch.zeros_like(arguments["targets"])
    arguments["ignore_index"] = -100
    if fuse:
        arguments |= {"sft_weight": 0.0, "length_normalization": 0.0}
    value = draw.choice([math.nan, math.inf, -math.inf, 1e30])
    clean = dict(arguments)
    bounds = clean["cu_seqlens"].tolist()
    which = draw.randrange(len(bounds) - 1)
    row = draw.randrange(bounds[which], bounds[which + 1])
    hidden = clean["hidden"].detach().clone()
    hidden[row, draw.randrange(hidden.shape[1])] = value
    arguments["hidden"] = hidden.requires_grad_()
    ignored = draw.maybe(0.4)
    if ignored:
        clean["targets"][row] = arguments["targets"][row] = -100

    def check(ours: Any) -> None:
        want = getattr(plad_fast, function)(**clean)
        others = torch.arange(len(ours.sums)) != which
        if ignored:
            others |= True
        torch.testing.assert_close(ours.sums[others], want.sums[others])
        own = ours.sums[which].detach()
        assert ignored or not math.isnan(value) or own.isnan(), "NaN went unnoticed"
        if fuse:
            kept = others.reshape(-1, 2).all(1)
            torch.testing.assert_close(ours.group_losses[kept], want.group_losses[kept])
            expected = ours.group_losses.mean()
            torch.testing.assert_close(ours.loss.detach(), expected, equal_nan=True)
        result = ours.loss if fuse else ours.sums.sum()
        [grad] = torch.autograd.grad(result, arguments["hidden"])
        rows = torch.zeros(len(hidden), dtype=torch.bool)
        if not ignored:
            first = which // 2 * 2 if fuse else which
            rows[bounds[first] : bounds[first + (2 if fuse else 1)]] = True
        assert grad[~rows].isfinite().all(), "the gradient of another sequence is not finite"
        if ignored:
            assert (grad[row] == 0).all(), "an ignored row has a gradient"

    return made(draw, function, arguments, check, ("", contextlib.nullcontext))


MAKERS: list[tuple[Callable[[Draw], Case], int]] = [
    (linear, 18), (stored, 8), (fused, 18), (stored_loss, 6), (hostile, 30), (poisoned, 5),
]  # fmt: skip
