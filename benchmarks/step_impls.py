"""The training loops under comparison: plad_fast's trainer, TRL's, and plain torch.

All train every parameter with the same fused AdamW on the same pairs in the same order, in float32
or, on float32 weights, under bfloat16 autocast; no clipping, no evaluation, no checkpoint.

TRL's hinge is relu(1 - b * (s(chosen) - s(rejected) - r)), r the same difference of the reference
model. With b = 1 and log-probabilities of a reference model of which r = 1 - beta it is our loss at
margin beta. They are given as data, as `precompute_ref_log_probs` leaves them, so neither time
nor memory has a reference model in it. The pairs are token ids for everybody, so TRL's tokenisation
is left out.

What was tried to make TRL 1.16 fast on a CPU (SmolLM2-135M, prompt 256, responses 48, float32, CPU
seconds of one thread a step, peak of the process):

    4 pairs at once                             28.2 s   8.4 GiB   "trl batched"
    1 pair at a time, accumulated               26.6 s   4.3 GiB   "trl"
    4 at once, gradient checkpointing           31.7 s   5.4 GiB
    1 at a time, gradient checkpointing         30.7 s   3.6 GiB
    4 at once, torch_compile                    32.0 s   7.6 GiB   one step looked at
    1 at a time, torch_compile                  25.3 s   4.2 GiB   behind minutes of compilation

One pair at a time is both the faster and the leaner setting, and pads less where lengths differ.
`torch_compile` gains little, compiles anew for new lengths and is open to everybody, so it is
left out for everybody. `padding_free` is switched off inside TRL with a warning, `use_liger_kernel`
needs a GPU driver for Triton, and `activation_offloading` an accelerator. The chunked LM head is
always on.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from benchmarks.step_data import PAIRS_PER_STEP, Pair, StepCase, batches
from benchmarks.step_record import Recorder

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

# Tokens of a forward and backward of ours: two pairs of 256 + 2 * 48 tokens.
MAX_TOKENS = 704


@dataclass(frozen=True)
class Job:
    """A run: the steps in `warm_up` are followed by `steps` timed ones, from the first pair on."""

    case: StepCase
    pairs: list[Pair]
    beta: float
    steps: int
    folder: Path  # the trainers want one; nothing of worth is written
    whole_warm_up: bool = False  # a pass over all pairs of the timed steps, else one step
    max_tokens: int = MAX_TOKENS

    @property
    def distinct(self) -> list[Pair]:
        """The pairs of the timed steps, each once."""
        return self.pairs[: self.steps * PAIRS_PER_STEP]

    @property
    def warm_up(self) -> int:
        return len(self.distinct) // PAIRS_PER_STEP if self.whole_warm_up else 1

    @property
    def rows(self) -> list[Pair]:
        """The pairs to train on in turn; from the start again where they are fewer than needed."""
        if self.whole_warm_up:
            return self.distinct
        return list(chain(self.pairs[:PAIRS_PER_STEP], *batches(self.pairs, self.steps)))

    @property
    def distinct_tokens(self) -> int:
        """Of all timed steps."""
        timed = chain.from_iterable(batches(self.pairs, self.steps))
        return sum(pair.distinct_tokens for pair in timed)


Logs = dict[str, float]
Run = Callable[["PreTrainedModel", "PreTrainedTokenizerBase", Job, Recorder], Logs]


@dataclass(frozen=True)
class Impl:
    name: str
    run: Run  # trains, and returns what was logged over the steps behind the first
    package: str | None = None
    ours: bool = False
    remembers: bool = False  # a pair's last visit decides how it is treated

    def missing(self) -> str | None:
        """Why it cannot run here, or None."""
        if self.package is None or importlib.util.find_spec(self.package) is not None:
            return None
        return f"the package {self.package} is not installed; pip install -e '.[bench]'"


def adamw(model: nn.Module, job: Job) -> torch.optim.Optimizer:
    return torch.optim.AdamW(
        model.parameters(), lr=job.case.learning_rate, weight_decay=0.0, fused=True
    )


def pad(pairs: Sequence[Pair], pad_id: int, device: str) -> tuple[Tensor, Tensor, Tensor]:
    """input_ids, attention_mask, and a mask of the response tokens, (S, T) each; chosen first."""
    answers = [(pair.prompt, ids) for pair in pairs for ids in (pair.chosen, pair.rejected)]
    rows = [torch.tensor(prompt + response) for prompt, response in answers]
    marks = [torch.tensor([0] * len(p) + [1] * len(r), dtype=torch.bool) for p, r in answers]
    input_ids = pad_sequence(rows, batch_first=True, padding_value=pad_id)
    attention_mask = pad_sequence([torch.ones_like(row) for row in rows], batch_first=True)
    responses = pad_sequence(marks, batch_first=True)
    return input_ids.to(device), attention_mask.to(device), responses.to(device)


def naive_sums(model: PreTrainedModel, pairs: Sequence[Pair], pad_id: int, device: str) -> Tensor:
    """s of every response by the whole logits, (S,) float32; chosen first in each pair."""
    input_ids, attention_mask, responses = pad(pairs, pad_id, device)
    output = model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False)
    logprobs = output.logits[:, :-1].float().log_softmax(-1)
    picked = logprobs.gather(-1, input_ids[:, 1:, None]).squeeze(-1)
    return (picked * responses[:, 1:]).sum(1)


def hinge(sums: Tensor, beta: float) -> Tensor:
    """Mean over pairs of max(0, beta - s(chosen) + s(rejected))."""
    return (beta - sums[0::2] + sums[1::2]).clamp(min=0).mean()


def naive(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, job: Job, recorder: Recorder
) -> Logs:
    case = job.case
    if case.checkpointing:
        model.gradient_checkpointing_enable()
    optimizer = adamw(model, job)
    recorder.before_training()
    for step, pairs in enumerate(batches(job.rows, job.warm_up + job.steps)):
        with torch.autocast(case.device, torch.bfloat16, enabled=case.dtype == "bfloat16"):
            sums = naive_sums(model, pairs, tokenizer.pad_token_id, case.device)
        loss = hinge(sums, job.beta)
        loss.backward()
        if step == 0:
            recorder.first_loss = loss.item()
        recorder.before_update(model)
        optimizer.step()
        optimizer.zero_grad()
        del sums, loss  # not to be alive beside the next step's
        recorder.after_step()
    return {}


def plad_fast(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    job: Job,
    recorder: Recorder,
    *,
    layout: str,
    one_pair: bool = False,
) -> Logs:
    """In the padded layout a step is one forward and backward of all pairs; `one_pair` keeps the
    activations of one pair in memory, as the leaner setting of TRL does.
    """
    from plad_fast.training.config import PLaDConfig
    from plad_fast.training.trainer import PLaDTrainer

    max_tokens = None if layout == "padded" else job.max_tokens
    if one_pair:
        max_tokens = max(pair.distinct_tokens for pair in job.pairs)
    config = PLaDConfig(
        **_arguments(job),
        loss="plad_ranking",
        beta=job.beta,
        sft_weight=0.0,
        length_normalization=0.0,
        layout=layout,
        max_tokens_per_batch=max_tokens,
    )
    rows = [
        {
            "prompt_ids": pair.prompt,
            "response_ids": [pair.chosen, pair.rejected],
            "length": len(pair.prompt) + max(len(pair.chosen), len(pair.rejected)),
        }
        for pair in job.rows
    ]
    callback = _follow(recorder)
    trainer = PLaDTrainer(
        model,
        config,
        train_dataset=rows,
        processing_class=tokenizer,
        callbacks=[callback],
        optimizers=(adamw(model, job), None),
    )
    recorder.before_training()
    trainer.train()
    return callback.logs


def trl(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    job: Job,
    recorder: Recorder,
    *,
    micro_batch: int,
    **options: Any,
) -> Logs:
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    class Prepared(DPOTrainer):
        """Takes ids and reference log-probabilities as they are."""

        def _prepare_dataset(self, dataset: Any, *args: Any, **kwargs: Any) -> Any:
            return dataset

        def _precompute_ref_logps(self, dataset: Any, *args: Any, **kwargs: Any) -> Any:
            return dataset

    config = DPOConfig(
        **_arguments(job, micro_batch=micro_batch),
        loss_type=["hinge"],
        beta=1.0,
        precompute_ref_log_probs=True,
        max_length=None,
        **options,
    )
    rows = [
        {
            "prompt_ids": pair.prompt,
            "chosen_ids": pair.chosen,
            "rejected_ids": pair.rejected,
            "ref_chosen_logps": job.beta - 1.0,
            "ref_rejected_logps": 0.0,
        }
        for pair in job.rows
    ]
    callback = _follow(recorder)
    trainer = Prepared(
        model,
        args=config,
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
        callbacks=[callback],
        optimizers=(adamw(model, job), None),
    )
    recorder.before_training()
    trainer.train()
    return {}


def _arguments(job: Job, *, micro_batch: int = PAIRS_PER_STEP) -> dict[str, Any]:
    """What both trainers are told."""
    steps = job.warm_up + job.steps
    return {
        "output_dir": str(job.folder),
        "per_device_train_batch_size": micro_batch,
        "gradient_accumulation_steps": PAIRS_PER_STEP // micro_batch,
        "max_steps": steps,
        "learning_rate": job.case.learning_rate,
        "lr_scheduler_type": "constant",
        "max_grad_norm": 0.0,
        "bf16": job.case.dtype == "bfloat16",
        "gradient_checkpointing": job.case.checkpointing,
        "train_sampling_strategy": "sequential",
        "use_cpu": job.case.device == "cpu",
        # The first step's loss is read from the log; the next entry is behind the last step.
        "logging_first_step": True,
        "logging_steps": steps,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
    }


def _follow(recorder: Recorder) -> Any:
    """A callback that tells the recorder what it wants to know."""
    from transformers import TrainerCallback

    class Follow(TrainerCallback):
        def __init__(self) -> None:
            self.logs: Logs = {}

        def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            recorder.before_update(kwargs["model"])

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            recorder.after_step()

        def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            logs = kwargs["logs"]
            if "loss" in logs:
                if state.global_step == 1:
                    recorder.first_loss = logs["loss"]
                self.logs = dict(logs)

    return Follow()


IMPLS: dict[str, Impl] = {
    impl.name: impl
    for impl in (
        Impl("plad_fast", partial(plad_fast, layout="auto"), ours=True, remembers=True),
        Impl(
            "plad_fast one pair",
            partial(plad_fast, layout="auto", one_pair=True),
            ours=True,
            remembers=True,
        ),
        Impl("plad_fast padded", partial(plad_fast, layout="padded"), ours=True),
        Impl("trl", partial(trl, micro_batch=1), package="trl"),
        Impl("trl batched", partial(trl, micro_batch=PAIRS_PER_STEP), package="trl"),
        Impl("naive", naive),
    )
}
