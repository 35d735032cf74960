"""Router losses: the load-balancing term that a mixture of experts would add to its own loss.

A causal LM adds it behind its head, which the fused loss does not run. So the backbone is listened
to, and what it put out goes through the model's own forward once more, with one token a row left
for the head.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from plad_fast.errors import UsageError
from plad_fast.models.adapters import base_model, vocabulary_size
from plad_fast.models.encoder_decoder import is_encoder_decoder
from plad_fast.models.head import backbone_hidden, evaluating, find_backbone
from plad_fast.models.wrappers import replaced_forward

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_COEFFICIENTS = ("router_aux_loss_coef", "aux_loss_coef")


def asks_for_router_loss(model: nn.Module) -> bool:
    """Whether the config has the model add a router loss (`output_router_logits`)."""
    config = base_model(model).config
    configs = (config, config.get_text_config())
    return any(getattr(entries, "output_router_logits", False) for entries in configs)


@contextlib.contextmanager
def router_losses(
    model: nn.Module, *, wanted: bool | None = None, coefficient: float | None = None
) -> Iterator[list[Tensor]]:
    """Collects what the model would add to its loss, of every forward of its backbone meanwhile.

    It is the coefficient times a mean over tokens, those that the attention mask leaves out not
    counted. In packed rows a shared prompt counts as often as it would in padded ones: for each
    of its responses. To be used where `find_head` is, inside the wrapped forward.

    Args:
        wanted: whether to collect any; None does what the config asks for at present.
        coefficient: in place of the config's.

    Yields:
        A list, filled when the context is left: one scalar with its graph for every forward;
        none if they are not wanted.
    """
    losses: list[Tensor] = []
    if not (asks_for_router_loss(model) if wanted is None else wanted):
        yield losses
        return
    lm = base_model(model)
    if is_encoder_decoder(lm):
        raise UsageError(
            f"config.output_router_logits asks for a router loss, which is not known of "
            f"encoder-decoder models such as {type(lm).__name__}; set it to False"
        )
    backbone = find_backbone(lm)
    if torch.is_grad_enabled():
        _require_graph(backbone)
    heard: list[tuple[dict[str, Any], Any]] = []

    def ask(_: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        return args, {**kwargs, "output_router_logits": True}

    def hear(_: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        heard.append((kwargs, output))

    handles = [
        backbone.register_forward_pre_hook(ask, with_kwargs=True),
        backbone.register_forward_hook(hear, with_kwargs=True),
    ]
    try:
        yield losses
    finally:
        for handle in handles:
            handle.remove()
    losses += [_own_loss(lm, backbone, kwargs, output, coefficient) for kwargs, output in heard]


def check_router_loss(model: nn.Module, *, wanted: bool | None = None) -> None:
    """Raises, as `router_losses` would in training, if what is asked for is not there.

    The model must be whole, on its device, and not wrapped.

    Args:
        wanted: whether a router loss is asked for; None leaves it to the config.
    """
    if not (asks_for_router_loss(model) if wanted is None else wanted):
        return
    device = next(model.parameters()).device
    input_ids = torch.arange(4, device=device).remainder(vocabulary_size(model))[None]
    with evaluating(model), torch.no_grad(), router_losses(model, wanted=wanted):
        backbone_hidden(model, input_ids)


def _require_graph(backbone: nn.Module) -> None:
    """Re-entrant checkpoints run layers without a graph, and router logits are taken inside."""
    for module in backbone.modules():
        state = vars(module)
        if not (module.training and state.get("gradient_checkpointing")):
            continue
        function = state.get("_gradient_checkpointing_func")
        # torch takes the re-entrant kind where nothing is said.
        if getattr(function, "keywords", {}).get("use_reentrant") is not False:
            raise UsageError(
                "re-entrant gradient checkpointing leaves the router loss without a gradient; set "
                "gradient_checkpointing_kwargs={'use_reentrant': False}"
            )


def _own_loss(
    lm: PreTrainedModel,
    backbone: nn.Module,
    kwargs: dict[str, Any],
    output: Any,
    coefficient: float | None,
) -> Tensor:
    mask = kwargs["attention_mask"]
    if (layout := kwargs.get("row_layout")) is not None:
        # Where the loss weighs tokens by the mask, it may as well count some of them twice.
        mask = layout.multiplicities(kwargs["input_ids"].device)[None]
    with replaced_forward(backbone, lambda *_, **__: output):
        # Not `lm` itself: hooks around it are those of the forward that runs already.
        found = type(lm).forward(
            lm,
            input_ids=kwargs["input_ids"],
            attention_mask=mask,
            output_router_logits=True,
            logits_to_keep=1,
            use_cache=False,
            return_dict=True,
        )
    loss, config = getattr(found, "aux_loss", None), lm.config.get_text_config()
    named = [coefficient, *(getattr(config, name, None) for name in _COEFFICIENTS)]
    coefficient = next((value for value in named if value is not None), None)
    if not isinstance(loss, Tensor) or coefficient is None:
        raise UsageError(
            f"config.output_router_logits asks for a router loss, and {type(lm).__name__} has "
            "none; set it to False"
        )
    return coefficient * loss
