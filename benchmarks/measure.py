"""One implementation on one case, in a process of its own (`python -m benchmarks.measure --worker
...`)."""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.check import (
    Oracle,
    compute_oracle,
    cross_entropy_error,
    errors_of,
    mismatch,
)
from benchmarks.common import (
    Record,
    peak_memory,
    print_record,
    synchronize,
    time_runs,
)
from benchmarks.data import PairBatch, make_pairs
from benchmarks.peers import IMPLS, Impl

# Operand positions of the products that torch runs, compiled code included.
PRODUCTS = {"aten::mm": 0, "aten::addmm": 1, "aten::addmm_": 1, "aten::bmm": 0, "aten::baddbmm": 1}


@dataclass(frozen=True)
class Case:
    """One row set of the benchmark."""

    tokens: int
    hidden: int
    vocab: int
    dtype: str
    active: float
    response: int = 64
    ragged: bool = False
    device: str = "cpu"

    def batch(self) -> PairBatch:
        return make_pairs(
            self.tokens,
            self.hidden,
            self.vocab,
            response=self.response,
            active=self.active,
            dtype=self.torch_dtype,
            device=torch.device(self.device),
            ragged=self.ragged,
        )

    @property
    def torch_dtype(self) -> torch.dtype:
        dtype: torch.dtype = getattr(torch, self.dtype)
        return dtype

    @property
    def gradient_bytes(self) -> int:
        """Size of d_hidden and d_weight, which every implementation has to hold in the end."""
        return (self.tokens + self.vocab) * self.hidden * self.torch_dtype.itemsize

    def __str__(self) -> str:
        lengths = f"about {self.response}" if self.ragged else f"{self.response}"
        return (
            f"N={self.tokens} D={self.hidden} V={self.vocab} {self.dtype}, "
            f"{self.tokens // (2 * self.response)} pairs of {lengths} + {lengths} tokens, "
            f"{self.active:.0%} active"
        )


def save_oracle(case: Case, path: Path) -> Record:
    """Writes the oracle of a case, after a look at whether the data are what they should be."""
    oracle = compute_oracle(case.batch())
    expected = round(case.active * case.tokens / (2 * case.response))
    if oracle.active != expected or oracle.margin < 10:
        reason = (
            f"{oracle.active} pairs are active, meant were {expected}; "
            f"the nearest is {oracle.margin:.1f} nats from the hinge"
        )
        return {"status": "failed", "reason": reason}
    oracle.save(path)
    return {"status": "ok", "loss": oracle.loss}


def measure(impl: Impl, case: Case, oracle: Oracle, *, repeats: int, seconds: float) -> Record:
    """Products of a first call, memory and errors of a second, then times.

    The first call also pays one-off costs, 3 to 20 MiB of resident memory where it was looked at,
    so memory is taken from the second. Before both an implementation that compiles has one call
    for that, timed as `compile_s`.

    Returns:
        `status` ("ok" or "mismatch", then with `reason`), `seconds` of each timed run,
        `compile_s`, `products` in units of 2 N D V flop ("" where torch's profiler cannot see
        them: those inside of Triton kernels), and for all but bare products
        `extra_bytes` (see `peak_memory`), `loss` and the errors.
    """
    device, dtype = torch.device(case.device), case.torch_dtype
    step = impl.prepare(case.batch())
    record: Record = {"status": "ok", "compile_s": 0.0}
    if impl.compiled:
        start = time.perf_counter()
        step.run()
        synchronize(device)
        record["compile_s"] = time.perf_counter() - start
        step.clear()

    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as profiler:
        step.run()
    record["products"] = ""
    if not (impl.multiplies_in_kernels and device.type == "cuda"):
        unit = 2 * case.tokens * case.hidden * case.vocab
        record["products"] = _product_flops(profiler) / unit
    del profiler
    step.clear()

    with peak_memory(device) as peak:
        loss = step.run()
        synchronize(device)
    if not impl.products_only:
        assert loss is not None
        if impl.cross_entropy:
            errors = cross_entropy_error(loss, oracle)
        else:
            errors = errors_of(loss, *step.gradients(), oracle)
        record.update(errors, loss=loss.item(), extra_bytes=peak.extra_bytes)
        problem = mismatch(errors, dtype)
        if problem is not None:
            record.update(status="mismatch", reason=problem)

    def run() -> None:
        step.clear()
        step.run()

    record["seconds"] = time_runs(run, device, repeats=repeats, seconds=seconds)
    return record


def _product_flops(profiler: profile) -> float:
    total = 0.0
    for event in profiler.events() or ():
        first = PRODUCTS.get(event.name)
        if first is not None:
            *batch_and_rows, inner = event.input_shapes[first]
            flop = 2.0 * inner * event.input_shapes[first + 1][-1]
            for size in batch_and_rows:
                flop *= size
            total += flop
    return total


def work(spec: Mapping[str, object]) -> Record:
    """Runs a spec made by `oracle_spec` or `impl_spec`."""
    case = Case(**spec["case"])  # type: ignore[arg-type]
    path = Path(str(spec["oracle"]))
    if spec["impl"] is None:
        return save_oracle(case, path)
    impl = IMPLS[str(spec["impl"])]
    try:
        return measure(
            impl,
            case,
            Oracle.load(path),
            repeats=int(spec["repeats"]),  # type: ignore[call-overload]
            seconds=float(spec["seconds"]),  # type: ignore[arg-type]
        )
    except ImportError as error:
        return {"status": "missing", "reason": str(error)}


def spec_of(
    case: Case, impl: str | None, oracle: Path, *, repeats: int = 0, seconds: float = 0.0
) -> Record:
    """What a worker is told; no implementation stands for the oracle itself."""
    return {
        "case": asdict(case),
        "impl": impl,
        "oracle": str(oracle),
        "repeats": repeats,
        "seconds": seconds,
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--worker", required=True, type=json.loads)
    print_record(work(parser.parse_args().worker))
