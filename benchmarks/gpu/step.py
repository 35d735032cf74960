"""Optimizer steps of a Llama of 1.2 billion random parameters by one trainer, on the pairs that the
others get: `PLaDTrainer`, TRL's `DPOTrainer` or plain torch, as in `benchmarks.step`.

float32 weights under bfloat16 autocast, four pairs a step, all of them active.
"""

from __future__ import annotations

import math
import statistics
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from benchmarks import step_models
from benchmarks.gpu.worker import Section, read
from benchmarks.step_data import PAIRS_PER_STEP, Pair, StepCase
from benchmarks.step_impls import IMPLS, Job
from benchmarks.step_record import TOLERANCE, Recorder

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# The shape of Llama-3.2-1B.
LLAMA = {
    "vocab_size": 128_256, "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16,
    "num_attention_heads": 32, "num_key_value_heads": 8, "max_position_embeddings": 4096,
    "tie_word_embeddings": True, "bos_token_id": None, "eos_token_id": 1, "pad_token_id": 0,
}  # fmt: skip
# Tokens of a prompt and of a response.
LENGTHS, TINY_LENGTHS = (512, 256), (8, 4)
BETA = 100.0


def random_llama(device: torch.device) -> PreTrainedModel:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    with torch.device(device):
        return LlamaForCausalLM(LlamaConfig(**LLAMA)).train()


def made_pairs(vocab: int, prompt: int, response: int) -> list[Pair]:
    draw = torch.Generator().manual_seed(0)

    def ids(length: int) -> list[int]:
        return torch.randint(5, vocab, (length,), generator=draw).tolist()

    return [Pair(ids(prompt), ids(response), ids(response)) for _ in range(PAIRS_PER_STEP)]


def main() -> int:
    section = Section("step", impl={"required": True, "choices": list(IMPLS)})
    impl = IMPLS[section.args.impl]
    tokenizer = step_models.tiny_tokenizer()
    with section.row(impl=impl.name) as row, tempfile.TemporaryDirectory() as folder:
        if section.tiny:
            model = step_models.tiny_llama(tokenizer).to(section.device).train()
        else:
            model = random_llama(section.device)
        pairs = made_pairs(model.config.vocab_size, *(TINY_LENGTHS if section.tiny else LENGTHS))
        dtype = "float32" if section.device.type == "cpu" else "bfloat16"
        case = StepCase("fixed", dtype, device=section.device.type)
        steps = 1 if section.tiny else 5
        job = Job(case, pairs, BETA, steps, Path(folder), max_tokens=10**6)
        recorder = Recorder(section.device, None, warm_up=job.warm_up)
        impl.run(model, tokenizer, job, recorder)
        recorder.finish()
        row["ms"] = statistics.median(recorder.seconds) * 1e3
        row["least_ms"] = min(recorder.seconds) * 1e3
        row["pairs_per_s"] = PAIRS_PER_STEP / statistics.median(recorder.seconds)
        row["peak_mib"] = recorder.process_bytes / 2**20
        # Of the first step: equal for everybody, up to bfloat16.
        found = {"loss": recorder.first_loss, "gradient_norm": recorder.first_gradient_norm}
        row.update(found)
        for other in read(section.args.out):
            if other["section"] == "step" and other["status"] == "ok":
                wrong = [
                    n
                    for n in found
                    if not math.isclose(found[n], other[n], rel_tol=TOLERANCE[dtype])
                ]
                if wrong:
                    row["status"] = f"wrong: {', '.join(wrong)}, beside {other['impl']}"
    return section.finish() if impl.ours else 0


if __name__ == "__main__":
    sys.exit(main())
