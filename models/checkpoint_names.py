"""A model's parameters under the names and shapes of its checkpoint.

transformers holds some parameters otherwise than they are stored: the experts of a mixture are one tensor `[E, 2I, D]`
in the module, and E gates `[I, D]` and E ups `[I, D]` on disk. The learner trains and publishes the module's; engines
of others, and whoever reads an exported folder, know the checkpoint's.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    rename_source_key,
    revert_weight_conversion,
)

from .folders import stored_tensors
from .loading import empty_causal_lm, locate_model


class CheckpointNames:
    """Turns published parameters of `model` into tensors of its own folder's layout, as `save_pretrained` writes them.

    Of transformers' conversions those are reverted that loading this folder needs. Raises ModelError where
    transformers has no causal language model of its architecture.
    """

    def __init__(self, model: str) -> None:
        self._model: Any = empty_causal_lm(model)
        conversions = get_model_conversion_mapping(self._model)
        renamings = [step for step in conversions if isinstance(step, WeightRenaming)]
        converters = [step for step in conversions if isinstance(step, WeightConverter)]
        for name in stored_tensors(model, locate_model(model)):
            rename_source_key(name, renamings, converters)  # notes which conversions this name uses
        self._model._weight_conversions = [step for step in conversions if step.was_used()]
        self._together = _stored_together(self._model)
        self._waiting: dict[str, torch.Tensor] = {}

    def of(self, name: str, tensor: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
        """The checkpoint's tensors that parameter `name` becomes, itself for most; experts are copied once.

        Where several parameters are stored as one tensor, nothing comes before the last of them, and then that.
        """
        others = self._together.get(name)
        if others is None:
            yield name, tensor
            return
        self._waiting[name] = tensor
        if self._waiting.keys() >= others:
            yield from revert_weight_conversion(self._model, {own: self._waiting.pop(own) for own in others}).items()


def _stored_together(model: PreTrainedModel) -> Mapping[str, frozenset[str]]:
    """Parameters that are stored otherwise than they are held → all that are stored in the same tensors."""
    steps = [step.reverse_transform() for step in reversed(model._weight_conversions)]  # pyright: ignore
    renamings = [step for step in steps if isinstance(step, WeightRenaming)]
    converters = [step for step in steps if isinstance(step, WeightConverter)]
    groups: dict[str, set[str]] = {}
    for name in model.state_dict():
        stored, converter = rename_source_key(name, renamings, converters, reverse=True)
        if converter is not None or stored != name:
            groups.setdefault(stored, set()).add(name)
    return {name: frozenset(group) for group in groups.values() for name in group}
