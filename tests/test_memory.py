"""Peak memory of the op: gradients plus the scratch budget, measured in a fresh process."""

from __future__ import annotations

import subprocess
import sys

import pytest

MIB = 2**20
# N x V would be 192 MiB in float32; the gradient of the weight is 4 MiB.
SHAPE = {"N": 1536, "D": 32, "V": 32768}

PROGRAM = """
import ctypes, sys, torch
from plad_fast import fused_linear_preference_loss, linear_sequence_logprobs, preference_loss
from plad_fast.reference import *
torch.set_num_threads(1)
which, dtype, scratch = sys.argv[1], getattr(torch, sys.argv[2]), int(sys.argv[3])
N, D, V = {N}, {D}, {V}

def peak():
    status = open("/proc/self/status").read()
    return int(status.split("VmHWM:")[1].split()[0]) * 1024

def run(hidden, weight, targets, bounds):
    if which == "naive":
        tokens = reference_token_logprobs(reference_logits(hidden, weight).float(), targets)
        sums = reference_sequence_sums(tokens, targets, bounds)
        loss = preference_loss(sums, bounds.diff(), beta=1e3)
    elif which == "op":
        out = linear_sequence_logprobs(hidden, weight, targets, bounds, scratch_bytes=scratch)
        loss = preference_loss(out.sums, out.counts, beta=1e3)
    else:
        loss = fused_linear_preference_loss(
            hidden, weight, targets, bounds, beta=1e3, scratch_bytes=scratch
        ).loss
    loss.backward()

def inputs(n):
    torch.manual_seed(0)
    hidden = torch.randn(n, D).to(dtype).requires_grad_()
    weight = torch.randn(V if n > 8 else 64, D).to(dtype).requires_grad_()
    return hidden, weight, torch.randint(64, (n,)), torch.arange(0, n + 1, max(n // 8, 1))

run(*inputs(8))  # loads what is loaded lazily
arguments = inputs(N)
open("/proc/self/clear_refs", "w").write("5")
before = peak()
run(*arguments)
print(peak() - before)
""".format(**SHAPE)


def peak_of(which: str, dtype: str, scratch_mib: int) -> float:
    """Growth of the resident set in MiB over the inputs."""
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, which, dtype, str(scratch_mib * MIB)],
        capture_output=True,
        text=True,
        check=False,
    )
    if "clear_refs" in done.stderr:
        pytest.skip("the kernel does not let a process reset its peak")
    assert done.returncode == 0, done.stderr
    return int(done.stdout) / MIB


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("which", ["op", "one-pass"])
def test_peak_is_gradients_plus_scratch(which, dtype):
    """The rest is rounding of the allocator and, in 16 bits, the float32 accumulator."""
    itemsize = 4 if dtype == "float32" else 2
    gradients = (SHAPE["N"] + SHAPE["V"]) * SHAPE["D"] * itemsize / MIB
    accumulator = 0 if dtype == "float32" else SHAPE["V"] * SHAPE["D"] * 4 / MIB
    allowance = 10
    for scratch in (8, 32):
        assert peak_of(which, dtype, scratch) <= gradients + accumulator + scratch + allowance


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_the_measure_sees_the_naive_computation():
    """The same program finds at least the logits and their gradient where they exist."""
    assert peak_of("naive", "float32", 8) >= 2 * SHAPE["N"] * SHAPE["V"] * 4 / MIB
