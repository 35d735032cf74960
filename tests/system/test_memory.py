"""Peak memory of the ops: gradients plus the scratch budget, measured in processes of their own."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

MIB = 2**20
# In float32 the logits are 64 MiB, the weight and its gradient 32 MiB each.
SHAPE = {"N": 512, "D": 256, "V": 32768}
SCRATCH = 16
ALLOWANCE = 16
"""MiB: pages of libraries that a first large call touches, rounding of the allocator."""
FIRST_ALLOWANCE = 28
"""MiB: the same, where a process has called nothing of plad_fast before."""

PROGRAM = """
import os, sys, torch
from plad_fast import *
from plad_fast.ops.reference import *
torch.set_num_threads(1)  # a process that forks must have no other threads
scratch = int(sys.argv[1])
N, D, V = {N}, {D}, {V}

def peak():
    status = open("/proc/self/status").read()
    return int(status.split("VmHWM:")[1].split()[0]) * 1024

def half_active(logps):
    # The groups of the second half of the batch sum to nearly nothing: their targets are certain.
    return torch.relu(-50.0 - logps[:, 0] + 0 * logps[:, 1])

def run(hidden, weight, targets, bounds):
    options = dict(scratch_bytes=scratch)
    if "softcap" in which:
        options["softcap"] = 30.0
    if "ignored" in which:
        targets = targets.where(torch.arange(len(targets)) % 2 == 0, -100)
    if "naive" in which:
        tokens = reference_token_logprobs(reference_logits(hidden, weight).float(), targets)
        sums = reference_sequence_sums(tokens, targets, bounds)
        loss = preference_loss(sums, bounds.diff(), beta=1e3)
    elif "stored" in which:
        logits = (hidden @ weight.T).detach().requires_grad_()
        open("/proc/self/clear_refs", "w").write("5")
        global before
        before = peak()
        sequence_logprobs(logits, targets, bounds, **options).sums.sum().backward()
        return
    elif "op" in which:
        out = linear_sequence_logprobs(hidden, weight, targets, bounds, **options)
        loss = preference_loss(out.sums, out.counts, beta=1e3)
    else:
        if "half" in which:
            options["loss"] = half_active
        else:
            options["beta"] = 1e3
        loss = fused_linear_preference_loss(hidden, weight, targets, bounds, **options).loss
    loss.backward()

def inputs(n):
    torch.manual_seed(0)
    vocab = V if n > 8 else 64
    weight = 0.1 * torch.randn(vocab, D)
    targets = torch.randint(64, (n,))
    hidden = torch.randn(n, D)
    hidden[n // 2 :] = 30 * weight[targets[n // 2 :]]
    bounds = torch.arange(0, n + 1, max(n // 16, 1))
    return hidden.to(dtype).requires_grad_(), weight.to(dtype).requires_grad_(), targets, bounds

def growth():
    global before
    if "first" not in which:
        run(*inputs(8))  # loads what is loaded lazily
    arguments = inputs(N)
    open("/proc/self/clear_refs", "w").write("5")
    before = peak()
    run(*arguments)
    return peak() - before

for line in sys.stdin:
    dtype, which = line.strip().split(" ", 1)
    dtype = getattr(torch, dtype)
    if "first" in which:
        print(growth(), flush=True)
    elif not os.fork():
        print(growth(), flush=True)
        os._exit(0)
    elif os.wait()[1]:
        print("failed", flush=True)
""".format(**SHAPE)


@contextmanager
def fresh_program() -> Iterator[subprocess.Popen[str]]:
    """It has done its imports, and called nothing."""
    command = [sys.executable, "-c", PROGRAM, str(SCRATCH * MIB)]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True) as process:
        yield process


@pytest.fixture(scope="module")
def program() -> Iterator[subprocess.Popen[str]]:
    """Forked for every case but the first call in a process."""
    try:
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")
    except OSError:
        pytest.skip("the kernel does not let a process reset its peak")
    with fresh_program() as process:
        yield process


def peak_of(program: subprocess.Popen[str], which: str, dtype: str) -> float:
    """Growth of the resident set in MiB over the inputs."""
    program.stdin.write(f"{dtype} {which}\n")
    program.stdin.flush()
    return int(program.stdout.readline()) / MIB


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize(
    ("which", "dtype"),
    [
        ("op", "float32"),
        pytest.param("op", "bfloat16", marks=pytest.mark.slow),
        pytest.param("op softcap ignored", "float32", marks=pytest.mark.slow),
        ("one-pass", "float32"),
        pytest.param("one-pass", "bfloat16", marks=pytest.mark.slow),
        ("one-pass", "float16"),
        pytest.param("one-pass half", "float32", marks=pytest.mark.slow),
        ("one-pass half softcap", "bfloat16"),
        ("stored softcap", "float32"),
        pytest.param("first op", "float32", marks=pytest.mark.slow),
        ("first op", "bfloat16"),
    ],
)
def test_peak_is_gradients_plus_scratch(program, which, dtype):
    """Nothing of the size of the logits, and no second gradient of the weight."""
    itemsize = 4 if dtype == "float32" else 2
    gradients = (SHAPE["N"] + SHAPE["V"]) * SHAPE["D"] * itemsize / MIB
    allowance = FIRST_ALLOWANCE if "first" in which else ALLOWANCE
    allowed = gradients + SCRATCH + allowance
    if "stored" in which:
        allowed = SHAPE["N"] * SHAPE["V"] * itemsize / MIB + SCRATCH + allowance
    if "ignored" in which:
        allowed += SHAPE["N"] * SHAPE["D"] * 4 / MIB  # hidden states that count, and their gradient
    if itemsize == 2:
        allowed += SHAPE["V"] * SHAPE["D"] * 4 / MIB  # the float32 accumulator
    if "first" in which:
        with fresh_program() as program:
            assert peak_of(program, which, dtype) <= allowed
        return
    assert peak_of(program, which, dtype) <= allowed


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_the_measure_sees_the_naive_computation(program):
    """The same program finds at least the logits and their gradient where they exist."""
    assert peak_of(program, "naive", "float32") >= 2 * SHAPE["N"] * SHAPE["V"] * 4 / MIB
