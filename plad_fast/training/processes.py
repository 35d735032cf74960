"""Processes of one training: those that work together, and errors that all of them raise.

A process that raised alone would leave the others waiting.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from accelerate.utils import DistributedType, broadcast_object_list, gather_object
from torch import Tensor, nn

from plad_fast.errors import NotFiniteError, UsageError
from plad_fast.models.wrappers import call_inside, own_class

if TYPE_CHECKING:
    from accelerate import Accelerator

    from plad_fast.training.config import PLaDConfig

Result = TypeVar("Result")


def require_processes(args: PLaDConfig, accelerator: Accelerator, *, deepspeed: bool) -> None:
    """Raise a UsageError for processes that could not run their micro-batches together."""
    if args.n_gpu > 1:
        raise UsageError(
            "several GPUs in one process (DataParallel) are not supported; start one process "
            "per GPU with torchrun or accelerate launch, or set CUDA_VISIBLE_DEVICES"
        )
    if deepspeed and args.max_tokens_per_batch is not None:
        raise UsageError(
            "max_tokens_per_batch makes several backwards a step, and DeepSpeed counts them; "
            "leave it out and set per_device_train_batch_size"
        )
    if accelerator.num_processes > 1 and not accelerator.even_batches:
        raise UsageError(
            "accelerator_config asks for even_batches=False, but the processes have to run "
            "the same number of micro-batches; leave it out"
        )


def whole_in_every_process(accelerator: Accelerator) -> bool:
    """Whether every process has the whole model: one process, or DDP."""
    sharded = (DistributedType.FSDP, DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM)
    return accelerator.distributed_type not in sharded


@contextlib.contextmanager
def whole(model: nn.Module, accelerator: Accelerator) -> Iterator[Any]:
    """The model inside DDP or FSDP2, whose forward passes no other process takes part in.

    All of them enter and leave this together. Under FSDP2 each has all weights meanwhile.
    """
    inside = accelerator.unwrap_model(model)
    sharded: list[Any] = [part for part in inside.modules() if own_class(part) is not type(part)]
    if sharded:
        # A part that runs before the whole has run once would take itself for the whole.
        call_inside(inside, inside, lambda tokens: tokens, torch.zeros(1, dtype=torch.long))
    for part in sharded:
        part.set_reshard_after_forward(False, recurse=False)
        part.unshard()
    yield inside
    for part in sharded:
        # Those that were whole after a forward before, the root and the head, are so no more.
        part.set_reshard_after_forward(accelerator.state.fsdp_plugin.reshard_after_forward)
        part.reshard()


def of_first_process(accelerator: Accelerator, find: Callable[[], Result]) -> Result:
    """The result of `find`, which the first process alone calls, for all of them.

    An error that it raises there is raised in the other processes as a UsageError.
    """
    found, error = None, None
    if accelerator.is_main_process:
        try:
            found = find()
        except Exception as caught:
            error = caught
    if accelerator.num_processes > 1:
        text = None if error is None else f"{error} (in the first process)"
        found, text = broadcast_object_list([found, text])
        if text is not None and error is None:
            raise UsageError(text)
    if error is not None:
        raise error
    return found  # type: ignore[return-value]


def require_finite(loss: Tensor, module: nn.Module, accelerator: Accelerator, step: int) -> None:
    """Raise a NotFiniteError in all processes if the loss of one of them is not finite.

    Called before the weights change in the optimizer step numbered `step`; the model may be
    sharded.
    """
    finite = torch.isfinite(loss.detach())
    if accelerator.num_processes == 1:
        if not finite:
            raise NotFiniteError(_not_finite(loss, module, step))
        return
    if accelerator.gather(finite.long()[None]).all():
        return
    rank = accelerator.process_index
    found = [] if finite else [f"process {rank}: {_not_finite(loss, module, step)}"]
    raise NotFiniteError("\n".join(gather_object(found)))


def _not_finite(loss: Tensor, module: nn.Module, step: int) -> str:
    # Of a sharded one the own part: the other processes may be elsewhere.
    parts = ((name, getattr(p, "_local_tensor", p)) for name, p in module.named_parameters())
    broken = next((name for name, part in parts if not part.isfinite().all()), None)
    if step > 0:
        advice = "lower the learning rate, or set max_grad_norm=1.0"
    elif broken is not None:
        advice = f"its weights were not finite to begin with ({broken}): load the model again"
    else:
        advice = "look for extreme scores in the data"
    return f"the loss is {loss.item()} at step {step}; {advice}; in fp16, use bf16 or float32"
