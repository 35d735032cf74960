"""Jit helpers that several kernels share. Everything in them is float32."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def grouped_tile(token_tiles, parts, GROUP: tl.constexpr):
    """Of this program: its tile of tokens, and its part of the vocabulary.

    GROUP tiles of tokens take all parts, tiles first, before the next tiles do: what runs at the
    same time reads few hidden states and few weights, which the L2 cache holds.
    """
    program = tl.program_id(0)
    first = program // (GROUP * parts) * GROUP
    size = tl.minimum(token_tiles - first, GROUP)
    within = program - first * parts
    return first + within % size, within // size


@triton.jit
def tanh(x):
    """tanh to about an ulp, in plain arithmetic: it runs compiled and interpreted alike."""
    # Beyond 16 it is 1, and exp would overflow. A plain minimum makes a number of NaN.
    magnitude = tl.minimum(tl.abs(x), 16.0, propagate_nan=tl.PropagateNan.ALL)
    large = 1.0 - 2.0 / (tl.exp(2.0 * magnitude) + 1.0)
    # Where that cancels: the minimax polynomial of the Cephes library (tanhf).
    square = magnitude * magnitude
    series = -5.70498872745e-3 * square + 2.06390887954e-2
    series = series * square - 5.37397155531e-2
    series = series * square + 1.33314422036e-1
    series = series * square - 3.33332819422e-1
    small = magnitude + magnitude * square * series
    result = tl.where(magnitude < 0.625, small, large)
    return tl.where(x < 0, -result, result)


@triton.jit
def log1p(x):  # x >= 0
    """log(1 + x) that keeps the digits of a small x (Higham, Accuracy and Stability, 1.14.1)."""
    rounded = 1.0 + x
    lost = tl.where(rounded == 1.0, 1.0, rounded - 1.0)
    return tl.where(rounded == 1.0, x, tl.log(rounded) * (x / lost))


@triton.jit
def capped_logits(raw, cap_scale, z_scale, HAS_SOFTCAP: tl.constexpr):
    """Logits z of raw products h W^T + b, and tanh of the cap (0 without one).

    With a cap z = z_scale * tanh(cap_scale * raw), else z = z_scale * raw; see `logit_scales`.
    """
    if HAS_SOFTCAP:
        capped = tanh(raw * cap_scale)
        return capped * z_scale, capped
    else:
        return raw * z_scale, tl.zeros_like(raw)


@triton.jit
def without_target(z, offs_v, targets, vocab, EVEN_V: tl.constexpr):
    """A tile of logits (n, v) with -inf at targets and past the vocabulary, and z at targets (n,).

    The sum, in which a single term is not 0, keeps a NaN that a maximum would drop.
    """
    is_target = offs_v[None, :] == targets[:, None]
    at_target = tl.sum(tl.where(is_target, z, 0.0), axis=1)
    if EVEN_V:
        others = tl.where(is_target, float("-inf"), z)
    else:
        others = tl.where(is_target | (offs_v[None, :] >= vocab), float("-inf"), z)
    return others, at_target


@triton.jit
def online_update(z, row_max, rest, moment, ENTROPY_ORDER: tl.constexpr):
    """Fold a tile (n, v) into each row's max, sum of exp(z - max), and its moment.

    The moment for the entropy of order 1 is the sum of exp(z - max) * (z - max), that of order 2
    the sum of exp(z - max) ** 2; a row of only -inf so far has max -inf.
    """
    new_max = tl.maximum(row_max, tl.max(z, axis=1))
    base = finite_base(new_max)
    decay = tl.exp(row_max - base)
    weights = tl.exp(z - base[:, None])
    if ENTROPY_ORDER == 1:
        shift = tl.where(row_max == float("-inf"), 0.0, row_max - base)
        centred = tl.where(weights > 0, z - base[:, None], 0.0)
        moment = decay * (moment + shift * rest) + tl.sum(weights * centred, axis=1)
    elif ENTROPY_ORDER == 2:
        moment = decay * decay * moment + tl.sum(weights * weights, axis=1)
    rest = decay * rest + tl.sum(weights, axis=1)
    return new_max, rest, moment


@triton.jit
def finite_base(row_max):
    """What to subtract before exp: 0 in place of -inf, whose difference with itself is NaN."""
    return tl.where(row_max == float("-inf"), 0.0, row_max)


@triton.jit
def token_statistics(z_target, row_max, rest):
    """Log-probability, lse, its tail, and 1 - p of a target; and the maximum and the log of the sum
    that the lse consists of. From the statistics of all other entries.

    row_max and rest: max z and sum of exp(z - row_max) over them.
    tail: what rounding takes from the lse, which each probability of a row would lose.
    """
    maximum = tl.maximum(row_max, z_target)
    base = finite_base(maximum)
    rest = rest * tl.exp(row_max - base)
    at_target = tl.exp(z_target - base)
    total = rest + at_target
    log_total = tl.where(z_target == maximum, log1p(rest), tl.log(tl.maximum(total, 1e-37)))
    # Of NaN a maximum may be a number; the sum is not. A row of only -inf has no distribution.
    undefined = (total != total) | (maximum == float("-inf"))
    log_total = tl.where(undefined, float("nan"), log_total)
    logprob = tl.where(undefined, float("nan"), z_target - base - log_total)
    lse = base + log_total
    # The error of a sum is a float itself (Knuth's TwoSum).
    of_total = lse - base
    tail = (base - (lse - of_total)) + (log_total - of_total)
    miss = rest / tl.maximum(total, 1e-37) + 0.0 * log_total
    return logprob, lse, tail, miss, base, log_total


@triton.jit
def entropy_of(moment, row_max, rest, z_target, base, log_total, ENTROPY_ORDER: tl.constexpr):
    """Entropy of a row: its statistics without the target, the target, and the common base.

    Of order 1 it is Shannon's, of order 2 Renyi's: -log of the sum of squared probabilities.
    """
    decay = tl.exp(row_max - base)
    at_target = tl.exp(z_target - base)
    if ENTROPY_ORDER == 2:
        return 2.0 * log_total - tl.log(decay * decay * moment + at_target * at_target)
    else:
        shift = tl.where(row_max == float("-inf"), 0.0, row_max - base)
        moment = decay * (moment + shift * rest)
        moment += at_target * tl.where(at_target > 0, z_target - base, 0.0)
        return log_total - moment * tl.exp(-log_total)


@triton.jit
def gradient_factors(grad, grad_lse, tail, miss, HAS_GRAD_LSE: tl.constexpr):
    """Whether rows have no gradient; the gradient of a row at its target, and that of every other
    entry, divided by its probability. 0 in rows without one, also in those of NaN.

    grad and grad_lse: of the log-probability of the target, and of the lse.
    The tail, which rounding took from the lse, is a factor that all probabilities of a row have.
    """
    silent = grad == 0.0
    at_target, of_others = grad * miss, -grad
    if HAS_GRAD_LSE:
        silent = silent & (grad_lse == 0.0)
        at_target += grad_lse * (1.0 - miss)
        of_others += grad_lse
    of_others *= tl.exp(-tail)
    return silent, tl.where(silent, 0.0, at_target), tl.where(silent, 0.0, of_others)


@triton.jit
def logit_gradient(z, lse, is_target, at_target, of_others):
    """d z of a tile from the factors of `gradient_factors`, which broadcast over it, as lse does.
    A row whose factors are 0 gets 0 whatever its logits are.
    """
    # Above 0 in rows that are masked out below, and in others by rounding, where another product
    # made the logits of the lse (cuBLAS in the forward, Triton here); a NaN stays one.
    log_probability = z - lse
    probability = tl.exp(tl.where(log_probability > 0.0, 0.0, log_probability))
    d_z = tl.where(is_target, at_target, of_others * probability)
    return tl.where((at_target == 0.0) & (of_others == 0.0), 0.0, d_z)
