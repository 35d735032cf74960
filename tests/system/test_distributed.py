"""Losses and trainings in several processes equal those in one.

The processes run many cases each (see `process_sets`), and a test looks at what one left:
starting them takes longer than the cases.
"""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch

from plad_fast.data.packing import PreferenceCollator
from plad_fast.errors import UsageError
from plad_fast.models.head import causal_lm_logprobs, head_arguments
from tests.support.process_sets import results, start
from tests.support.tiny_models import make_model
from tests.support.trainings import PAIRS, assert_same_weights
from tests.support.wrapped_losses import FOUR, GROUPS, LOSSES, ZERO_LOSSES
from tests.support.wrapped_trainings import HAS_TRANSFORMERS_5, REFUSED, TRAININGS, ZERO_TRAININGS

COMPARED = [name for name in TRAININGS if name not in ("fsdp-refused", "fsdp-bf16")]
"""Trainings that end where the one in a single process does."""

needs_fsdp2 = pytest.mark.skipif(
    not HAS_TRANSFORMERS_5, reason="FSDP2 by the settings of transformers 5"
)


@pytest.fixture(scope="module")
def folder(tiny_model, tiny_tokenizer, tmp_path_factory):
    path = tmp_path_factory.mktemp("processes")
    tied = copy.deepcopy(tiny_model)
    tied.config.tie_word_embeddings = True
    tied.tie_weights()
    for name, model in (("model", tiny_model), ("tied", tied)):
        model.save_pretrained(path / name)
    tiny_tokenizer.save_pretrained(path / "model")
    (path / "rows.json").write_text(json.dumps(PAIRS))
    return path


@pytest.fixture(scope="module")
def ran(folder):
    losses, trainings = "tests.support.wrapped_losses", "tests.support.wrapped_trainings"
    sets = [f"{losses}:LOSSES:2", f"{losses}:FOUR:4"]
    sets += [f"{trainings}:{name}" for name in ("SINGLE:1", "TRAININGS:2")]
    sets += [f"{trainings}:{name}" for name in ("RESUMED_ALONE:1", "RESUMED:4", "REFUSED:2")]
    return start(folder, "ran", *sets)


def assert_same_training(ours, theirs):
    """Weights, every logged loss, and the metrics: means over pairs and tokens of all processes."""
    assert ours["step"] == theirs["step"]
    assert_same_weights(ours["weights"], theirs["weights"], rtol=1e-4, atol=1e-5)
    assert ours["losses"] == pytest.approx(theirs["losses"], rel=1e-4)
    for where in ("logged", "evaluated"):
        for name, value in theirs[where].items():
            if not name.endswith(("_second", "runtime", "saved_tokens", "skipped_backwards")):
                assert ours[where][name] == pytest.approx(value, rel=1e-4, abs=1e-5), name
    if theirs["best"] is not None:
        assert Path(ours["best"]).name == Path(theirs["best"]).name == "checkpoint-2"  # of three


@pytest.mark.parametrize(
    ("name", "world", "case"),
    [*(("LOSSES", 2, case) for case in LOSSES), *(("FOUR", 4, case) for case in FOUR)],
)
def test_loss_and_gradients_equal_those_of_one_process(name, world, case, ran):
    """Processes differ in groups, lengths, and whether any has a gradient; compared in each."""
    results(ran, name, world, case)


@pytest.mark.parametrize("case", COMPARED)
def test_training_in_two_processes_equals_one(case, ran):
    ours = results(ran, "TRAININGS", 2, case)[0]
    assert ("FSDP" in ours["kind"]) == case.startswith("fsdp-")
    assert_same_training(ours, results(ran, "SINGLE", 1, case.removeprefix("fsdp-"))[0])
    if case == "reference":
        assert ours["logged"]["skipped_backwards"] > 0


@needs_fsdp2
def test_bf16_under_fsdp_rounds_neither_loss_nor_counts(ran):
    """accelerate has FSDP2 round all that leaves the model: 300 tokens would be 301 or so."""
    ours = results(ran, "TRAININGS", 2, "fsdp-bf16")[0]
    exact = results(ran, "SINGLE", 1, "window")[0]
    assert ours["dtypes"] == ["torch.float32"]
    # The first step has the weights of the exact one.
    assert ours["losses"][0] == pytest.approx(exact["losses"][0], rel=1e-3)
    assert all(weight.dtype == torch.float32 for weight in ours["weights"].values())


@needs_fsdp2
def test_reference_of_a_sharded_model_is_refused(ran):
    results(ran, "TRAININGS", 2, "fsdp-refused")


@pytest.mark.parametrize("case", REFUSED)
def test_what_one_process_finds_is_refused_by_all(case, ran):
    """The others would wait for it."""
    results(ran, "REFUSED", 2, case)


@pytest.mark.skipif(
    not HAS_TRANSFORMERS_5, reason="transformers 4 takes the batch size of the checkpoint"
)
@pytest.mark.parametrize("world", [1, 4])
def test_checkpoint_of_two_processes_resumes_in_others(world, ran):
    """With the optimizer and the schedule: it ends where a straight run of one process does."""
    ours = results(ran, "RESUMED_ALONE" if world == 1 else "RESUMED", world, "saved")[0]
    assert_same_training(ours, results(ran, "SINGLE", 1, "saved")[0])


@needs_fsdp2
def test_checkpoint_of_two_fsdp_processes_resumes_in_four(ran):
    ours = results(ran, "RESUMED", 4, "fsdp-saved")[0]
    assert_same_training(ours, results(ran, "SINGLE", 1, "saved")[0])


@pytest.fixture(scope="module")
def ran_in_four(ran):
    sets = ["tests.support.wrapped_losses:LOSSES:4", "tests.support.wrapped_trainings:TRAININGS:4"]
    return start(ran[0], "four", *sets)


@pytest.mark.slow
@pytest.mark.parametrize("case", [case for case in LOSSES if case not in FOUR])
def test_loss_and_gradients_in_four_processes_equal_those_of_one(case, ran_in_four):
    results(ran_in_four, "LOSSES", 4, case)


@pytest.mark.slow
@pytest.mark.parametrize("case", COMPARED)
def test_training_in_four_processes_equals_one(case, ran, ran_in_four):
    ours = results(ran_in_four, "TRAININGS", 4, case)[0]
    assert_same_training(ours, results(ran, "SINGLE", 1, case.removeprefix("fsdp-"))[0])
    if case == "reference":
        assert ours["logged"]["skipped_backwards"] > 0


@pytest.fixture(scope="module")
def ran_deepspeed(folder):
    pytest.importorskip("deepspeed")
    sets = ["losses:ZERO_LOSSES:2", "trainings:SINGLE:1", "trainings:ZERO_TRAININGS:2"]
    return start(folder, "deepspeed", *(f"tests.support.wrapped_{name}" for name in sets))


@pytest.mark.slow
@pytest.mark.parametrize("case", ZERO_LOSSES)
def test_deepspeed_gradients_equal_those_of_one_process(case, ran_deepspeed):
    results(ran_deepspeed, "ZERO_LOSSES", 2, case)


@pytest.mark.slow
@pytest.mark.parametrize("case", ZERO_TRAININGS)
def test_training_under_deepspeed_equals_one_process(case, ran_deepspeed):
    ours = results(ran_deepspeed, "ZERO_TRAININGS", 2, case)[0]
    assert "DEEPSPEED" in ours["kind"]
    assert_same_training(ours, results(ran_deepspeed, "SINGLE", 1, case.removeprefix("zero-"))[0])


class GatheredInForward:
    """ZeRO-3's contract in one process: a weight has data in its module's forward and backward."""

    def __init__(self, module):
        self._weight, self._whole = module.weight, module.weight.data
        self._empty = torch.empty(0)
        self.log = []
        self.release()
        module.register_forward_pre_hook(lambda *_: self.gather())
        module.register_forward_hook(self._after)

    def gather(self):
        self.log.append("gathered")
        self._weight.data = self._whole

    def release(self):
        self._weight.data = self._empty

    def _after(self, module, inputs, output):
        self.release()
        for tensor in output:
            if isinstance(tensor, torch.Tensor) and tensor.requires_grad:
                tensor.register_hook(lambda _: self.gather())
        inputs[0].register_hook(lambda _: self.release())


def test_head_that_is_gathered_for_its_own_forward_only():
    """The op runs in it; work on the head's weight outside of it is refused."""
    model = make_model("llama")
    batch = PreferenceCollator(0, 2)(GROUPS)
    upstream = torch.linspace(-1, 1, 2 * len(GROUPS))
    expected = causal_lm_logprobs(model, batch).sums
    (expected @ upstream).backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()

    shard = GatheredInForward(model.lm_head)
    with pytest.raises(UsageError, match="sharded"):
        head_arguments(model, batch)
    found = causal_lm_logprobs(model, batch).sums
    assert not model.lm_head.weight.numel()
    (found @ upstream).backward()
    assert len(shard.log) >= 2  # in the forward, and again in the backward
    torch.testing.assert_close(found, expected)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, gradients[name], msg=lambda m, n=name: n + m)
