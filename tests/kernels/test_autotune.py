"""Opt-in measuring of launch configurations, with a stopwatch made of a dictionary."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import warnings
from pathlib import Path
from unittest import mock

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("triton")

from plad_fast.kernels import autotune, launch
from plad_fast.kernels.autotune import cache_folder, key_of, tuned, wanted
from plad_fast.kernels.launch import RowsConfig
from triton.runtime.errors import OutOfResources, PTXASError

from tests.support.linear_cases import Case
from tests.support.problems import make_problem

SMALL, LARGE, HUGE = (RowsConfig(block, num_warps=4) for block in (16, 64, 256))
TIMES = {SMALL: 3.0, LARGE: 1.0, HUGE: 2.0}
KERNEL, KEY = "_logits_rows_kernel", "a GPU, float32, N<=8"


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """An empty cache, and a process that has measured nothing; any warning is an error."""
    monkeypatch.setenv("PLAD_FAST_CACHE", str(tmp_path / "cache"))
    forget()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        # What the interpreter of Triton 3.4 does to numpy, in its own name and the kernels'.
        warnings.filterwarnings(
            "ignore", "Conversion of an array with ndim", module="plad_fast.kernels|triton.runtime"
        )
        yield cache_folder()
    forget()


def forget() -> None:
    """As a new process would begin."""
    autotune._chosen.clear()


class Stopwatch:
    def __init__(self, times=TIMES):
        self.times, self.asked = times, []

    def __call__(self, config):
        self.asked.append(config)
        time = self.times[config]
        if isinstance(time, Exception):
            raise time
        return time


def choose(bench, kernel=KERNEL, key=KEY, candidates=tuple(TIMES)):
    return tuned(kernel, key, candidates, bench)


def only_file(cache: Path) -> Path:
    (path,) = cache.iterdir()
    return path


def test_the_fastest_is_measured_once(cache):
    bench = Stopwatch()
    assert [choose(bench) for _ in range(3)] == [LARGE] * 3
    assert bench.asked == [SMALL, LARGE, HUGE]
    forget()
    assert choose(bench) == LARGE
    assert len(bench.asked) == 3
    record = json.loads(only_file(cache).read_text())
    assert record["config"] == {"BLOCK_V": 64, "num_warps": 4, "num_stages": 2}
    assert (record["kernel"], record["key"], record["time"]) == (KERNEL, KEY, 1.0)


def test_kernels_and_keys_are_measured_apart():
    bench = Stopwatch()
    choose(bench)
    choose(bench, kernel="_another_kernel")
    choose(bench, key="another GPU")
    assert len(bench.asked) == 9


def test_of_equals_the_first_wins():
    assert choose(Stopwatch(dict.fromkeys(TIMES, 1.0))) == SMALL


def test_a_single_candidate_is_not_measured(cache):
    bench = Stopwatch()
    assert choose(bench, candidates=[HUGE]) == HUGE
    assert not bench.asked
    assert not cache.exists()


REFUSALS = [
    OutOfResources(300_000, 232_448, "shared memory"),
    PTXASError("`ptxas` failed with error code 255"),
    RuntimeError("PassManager::run failed"),
    IndexError("map::at"),
    torch.OutOfMemoryError("CUDA out of memory"),
]


@pytest.mark.parametrize("refusal", REFUSALS, ids=lambda e: type(e).__name__)
def test_what_cannot_be_built_or_launched_is_out(refusal):
    assert choose(Stopwatch({**TIMES, LARGE: refusal})) == HUGE
    with pytest.raises(type(refusal), match=re.escape(str(refusal))):
        choose(Stopwatch(dict.fromkeys(TIMES, refusal)), key="another")


def test_a_candidate_that_breaks_the_device_ends_the_race(monkeypatch, cache):
    """Whatever ran afterwards would fail, or be measured wrongly."""
    broken = RuntimeError("CUDA error: an illegal memory access was encountered")
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "synchronize", mock.Mock(side_effect=broken))
    bench = Stopwatch({**TIMES, LARGE: broken})
    with pytest.raises(RuntimeError, match="illegal memory access"):
        choose(bench)
    assert bench.asked == [SMALL, LARGE]
    assert not cache.exists()


@pytest.mark.parametrize("time", [float("nan"), float("inf")])
def test_times_that_are_none(time):
    assert choose(Stopwatch({**TIMES, LARGE: time})) == HUGE
    with pytest.raises(ValueError, match="none of 3 candidates"):
        choose(Stopwatch(dict.fromkeys(TIMES, time)), key="another")


CORRUPT = {
    "empty": b"",
    "cut off": b'{"kernel": "_logits_rows_ker',
    "not text": b"\xff\xfe\x00\x80",
    "a list": b"[1, 2]",
    "a number": b"3",
    "no config": json.dumps({"kernel": KERNEL, "key": KEY}).encode(),
}


@pytest.mark.parametrize("content", CORRUPT.values(), ids=CORRUPT)
def test_a_corrupt_file_is_measured_anew_and_mended(cache, content):
    choose(Stopwatch())
    only_file(cache).write_bytes(content)
    forget()
    bench = Stopwatch()
    with pytest.warns(UserWarning, match=r"cannot use .*\.json, measuring anew"):
        assert choose(bench) == LARGE
    assert len(bench.asked) == 3
    forget()
    assert choose(bench) == LARGE
    assert len(bench.asked) == 3


@pytest.mark.parametrize(
    "config", [{"BLOCK_V": 8, "num_warps": 4, "num_stages": 2}, {"BLOCK_V": 64}, None, "fast"]
)
def test_a_choice_that_is_offered_no_more(cache, config):
    """Of an earlier version of the library: measured anew, without a word."""
    choose(Stopwatch())
    path = only_file(cache)
    path.write_text(json.dumps({**json.loads(path.read_text()), "config": config}))
    forget()
    assert choose(Stopwatch()) == LARGE
    assert json.loads(path.read_text())["config"]["BLOCK_V"] == 64


def test_candidates_may_change_within_a_process():
    bench = Stopwatch()
    choose(bench)
    assert choose(bench, candidates=[SMALL, HUGE]) == HUGE


@pytest.mark.parametrize("obstacle", ["folder is a file", "no permission", "disk full"])
def test_a_folder_that_cannot_be_written(cache, obstacle):
    """The choice holds for this process, and nothing is left behind."""
    bench = Stopwatch()
    if obstacle == "folder is a file":
        cache.parent.mkdir()
        cache.touch()
        patch = mock.patch.object(autotune, "_read", return_value=None)
    else:
        error = (
            PermissionError(13, "denied") if obstacle == "no permission" else OSError(28, "full")
        )
        patch = mock.patch.object(autotune.os, "replace", side_effect=error)
    with patch, pytest.warns(UserWarning, match="is not kept"):
        assert choose(bench) == LARGE
    assert choose(bench) == LARGE
    assert len(bench.asked) == 3
    assert not cache.is_dir() or not list(cache.iterdir())


def test_a_file_where_the_folder_should_be(cache):
    """It can neither be read nor written: two warnings, one choice."""
    cache.parent.mkdir()
    cache.touch()
    with pytest.warns(UserWarning, match="cannot use"), pytest.warns(UserWarning, match="not kept"):
        assert choose(Stopwatch()) == LARGE


PROCESS = """
import sys
from plad_fast.kernels.autotune import tuned
from plad_fast.kernels.launch import RowsConfig
small, large = RowsConfig(16, num_warps=4), RowsConfig(64, num_warps=4)
# Each of the two would choose otherwise, and both go on writing the same files and their own.
faster = sys.argv[1]
times = {small: faster == "large", large: faster == "small"}
for i in range(50):
    config = tuned("kernel", f"shared {i}", [small, large], times.__getitem__)
    assert config in (small, large)
    tuned("kernel", f"{faster} {i}", [small, large], times.__getitem__)
"""


def test_two_processes_writing(cache):
    """No file is torn and none is lost, and the last writer's choice is everybody's next one."""
    running = [
        subprocess.Popen([sys.executable, "-W", "error::UserWarning", "-c", PROCESS, faster])
        for faster in ("small", "large")
    ]
    assert [process.wait(timeout=120) for process in running] == [0, 0]
    records = [json.loads(path.read_text()) for path in cache.iterdir()]
    assert len(records) == 150
    for record in records:
        whose = record["key"].split(" ")[0]
        expected = {"small": [16], "large": [64], "shared": [16, 64]}[whose]
        assert record["config"]["BLOCK_V"] in expected


def test_where_the_cache_is(monkeypatch, tmp_path):
    assert cache_folder() == tmp_path / "cache" / "autotune"
    monkeypatch.setenv("HOME", str(tmp_path))
    for unset in ("", None):
        monkeypatch.delenv("PLAD_FAST_CACHE")
        if unset is not None:
            monkeypatch.setenv("PLAD_FAST_CACHE", unset)
        assert cache_folder() == tmp_path / ".cache" / "plad_fast" / "autotune"


@given(size=st.integers(0, 2**40))
def test_sizes_share_a_power_of_two(size):
    key = key_of(torch.zeros(1), N=size)
    bucket = int(key.rpartition("<=")[2])
    assert size <= bucket
    assert bucket < 2 * size or bucket == size
    assert key == key_of(torch.zeros(1), N=bucket)


def test_keys_tell_apart_what_matters():
    bf16 = torch.zeros(1, dtype=torch.bfloat16)
    keys = [
        key_of(torch.zeros(1), N=8, V=16),
        key_of(torch.zeros(1), N=16, V=8),
        key_of(torch.zeros(1), N=9, V=16),
        key_of(bf16, N=8, V=16),
    ]
    with mock.patch.object(autotune.triton, "__version__", "0.0.1"):
        keys.append(key_of(bf16, N=8, V=16))
    assert len(set(keys)) == len(keys)
    assert key_of(bf16, V=16, N=8) == key_of(bf16, N=5, V=16)


@pytest.mark.parametrize(
    ("setting", "is_cuda", "expected"),
    [("1", True, True), ("0", True, False), (None, True, False), ("1", False, False)],
)
def test_only_on_request_and_on_a_gpu(monkeypatch, setting, is_cuda, expected):
    monkeypatch.delenv("PLAD_FAST_AUTOTUNE", raising=False)
    if setting is not None:
        monkeypatch.setenv("PLAD_FAST_AUTOTUNE", setting)
    monkeypatch.setattr("torch.cuda.is_current_stream_capturing", lambda: False)
    assert wanted(mock.Mock(is_cuda=is_cuda)) is expected
    # A graph that is being captured must not hold what only measures.
    monkeypatch.setattr("torch.cuda.is_current_stream_capturing", lambda: True)
    assert not wanted(mock.Mock(is_cuda=is_cuda))


@pytest.mark.parametrize("named", [False, True], ids=["precision", "TF32 by its newer name"])
def test_launchers_ask_for_their_configuration(monkeypatch, tmp_path, named):
    """With the variable set, and as if the tensors were on a GPU: a candidate runs, once chosen."""
    from plad_fast.kernels import linear_backward, linear_forward

    if named:  # torch then refuses to tell the precision by its older one
        if not hasattr(torch.backends.cuda.matmul, "fp32_precision"):
            pytest.skip("this torch has no newer name")
        refuses = mock.Mock(side_effect=RuntimeError)
        monkeypatch.setattr(torch, "get_float32_matmul_precision", refuses)
    monkeypatch.setenv("PLAD_FAST_CACHE", str(tmp_path))
    monkeypatch.setattr(autotune, "wanted", lambda tensor: True)
    timed = []
    monkeypatch.setattr(
        autotune.triton.testing, "do_bench", lambda run: timed.append(run()) or float(len(timed))
    )
    options = {"softcap": None, "logit_scale": 1.0, "temperature": 1.0, "ignore_index": -100}
    hidden, weight = torch.randn(3, 16), torch.randn(40, 16)
    targets = torch.tensor([0, 39, 7])
    for _ in range(2):
        got = linear_forward.launch_linear_forward(
            hidden, weight, None, targets, **options, entropy_order=0
        )
        d_logits = linear_backward.logits_gradient(
            hidden, weight, None, targets, *got[1:4], torch.ones(3), None, **options,
            out=torch.empty(3, 40),
        )  # fmt: skip
    assert len(timed) == len(list(tmp_path.rglob("*.json"))) * len(timed) // 2 > 2
    want = torch.log_softmax(hidden @ weight.T, 1)
    torch.testing.assert_close(got.token_logprobs, want.gather(1, targets[:, None]).squeeze(1))
    onehot = torch.nn.functional.one_hot(targets, 40)
    torch.testing.assert_close(d_logits, onehot - want.exp(), rtol=1e-5, atol=1e-6)


def test_without_the_variable_launchers_take_the_heuristics_choice(monkeypatch):
    monkeypatch.delenv("PLAD_FAST_AUTOTUNE", raising=False)
    monkeypatch.setattr(autotune, "linear_config", mock.Mock(side_effect=AssertionError))
    chosen = mock.Mock(side_effect=launch.linear_config)
    monkeypatch.setattr(launch, "linear_config", chosen)
    case = Case(make_problem([3], vocab=40, dtype=torch.float32), config=None)
    case.backward(case.forward(), torch.ones(3))
    assert chosen.call_count == 2


def test_each_order_of_the_entropy_has_a_key_of_its_own(monkeypatch, tmp_path):
    """The moment is another number of a token to keep, in registers."""
    monkeypatch.setattr(autotune, "wanted", lambda tensor: True)
    keys = []
    monkeypatch.setattr(
        autotune, "tuned", lambda name, key, candidates, bench: keys.append(key) or candidates[0]
    )
    hidden, weight = torch.randn(3, 16), torch.randn(40, 16)
    for order in (0, 1, 2):
        options = {"softcap": None, "entropy_order": order}
        autotune.linear_config(tuned, hidden, weight, None, **options)
    assert len(set(keys)) == 3
