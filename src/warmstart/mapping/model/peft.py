"""PEFT's names: what its modules put into a model's names, and what its files leave out of them.

PEFT wraps a module and puts an adapter beside it: `base_model.model.encoder.query.base_layer.weight` is the base's
`encoder.query.weight`, `base_model.model.encoder.query.lora_A.default.weight` belongs to the adapter named `default`. The
file that `save_pretrained` writes holds one adapter and leaves its name out: `base_model.model.encoder.query.lora_A.weight`
(`peft.utils.save_and_load.get_peft_model_state_dict`). Everything goes by type, so that PEFT is never imported.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace

from torch import nn

from warmstart.mapping.model.names import join

# Type of the module -> the child it keeps the base under, by qualified name along the MRO.
BASES: Mapping[str, str] = {
    "peft.peft_model.PeftModel": "base_model",
    "peft.mixed_model.PeftMixedModel": "base_model",
    "peft.tuners.tuners_utils.BaseTuner": "model",
    "peft.tuners.tuners_utils.BaseTunerLayer": "base_layer",
    "peft.utils.other.TrainableTokensWrapper": "token_adapter",
    "peft.utils.other.AuxiliaryTrainingWrapper": "original_module",
}
# Types whose presence shows that the base's own names start below `base_model.model`; a prompt encoder leaves them
# below `base_model`.
_TUNERS = frozenset({"peft.tuners.tuners_utils.BaseTuner", "peft.tuners.tuners_utils.BaseTunerLayer"})
_MODELS = frozenset({"peft.peft_model.PeftModel", "peft.mixed_model.PeftMixedModel"})
_BUFFER_DICT = "peft.tuners._buffer_dict.BufferDict"
# What stands in the base's names in a file; none of them is ever a name's first segment.
_INFIXES = {
    "base_layer": r"base_layer",
    "original_module": r"original_module",
    "token_adapter": r"token_adapter(?=\.(?:base_layer|trainable_tokens_\w+)(?:\.|$))",
}
PEFT_SEGMENTS = frozenset({"base_model", *_INFIXES})

# What is saved of a prompt encoder, which is computed into its embedding.
_SAVED_PROMPTS = {
    "embedding.weight": "prompt_embeddings",
    "prompt_task_cols": "prompt_task_cols",
    "prompt_task_rows": "prompt_task_rows",
}
# Segments that adapters alone have, to tell their keys in a file when the model has no such adapter.
_SLOT = re.compile(
    "lora_([ABE]|embedding_[AB]|magnitude_vector)|ia3_l|hada_[wt][12](_[ab])?|lokr_(w[12](_[ab])?|t2)|b?oft_[Rs]|"
    "vera_(lambda_[bd]|[AB])|hra_u|ln_tuning_layers|vblora_logits_[AB]|fourierft_spectrum|c3a_kernel|shira_weight|"
    "randlora_(lambda|gamma)|(miss|bone)_block|trainable_tokens_delta|modules_to_save|prompt_embeddings"
)


@dataclass(frozen=True, slots=True)
class AdapterEntry:
    """Where an entry stands in an adapter.

    Attributes:
        holder: Clean path of the module that the adapter was put into.
        slot: What of the adapter it is: `lora_A`, `modules_to_save`, `prompt_encoder`.
        adapter: The adapter's name; empty where all of the model's adapters share the entry.
        rest: What follows the adapter's name; empty for a bare parameter.
    """

    holder: str
    slot: str
    adapter: str = ""
    rest: str = ""

    @property
    def saved(self) -> str:
        """Its name in the adapter's own file, without PEFT's segments."""
        if self.slot == "modules_to_save":
            return join(self.holder, self.rest)
        if self.slot == "prompt_encoder" and self.rest in _SAVED_PROMPTS:
            return join(self.holder, _SAVED_PROMPTS[self.rest])
        if self.slot == "lora_magnitude_vector":  # a parameter at first, a module now; the file did not change
            return join(self.holder, self.slot)
        return join(self.holder, self.slot, self.rest)


def base_child(module: nn.Module) -> str | None:
    """The child under which a module of PEFT keeps the base; None if it is no module of PEFT."""
    return _base_child(type(module))  # type: ignore[arg-type]  # a class has a hash


@functools.cache
def _base_child(kind: type[nn.Module]) -> str | None:
    return next((BASES[name] for name in _qualified(kind) if name in BASES), None)  # type: ignore[arg-type]


def member_of_adapter(
    module: nn.Module, base: str | None, clean: str, at: AdapterEntry | None, leaf: str
) -> AdapterEntry | None:
    """Where the child, parameter or buffer `leaf` of `module` stands in an adapter; None on the base's side.

    Args:
        module: Any module of the model.
        base: Its `base_child`.
        clean: Its path without wrapper segments.
        at: Where it stands itself.
        leaf: The member's name in it.
    """
    if at is None:
        if base is None or leaf == base:
            return None
        # A PeftModel also refers to the base's word embeddings; of an adapter it holds the prompt encoder only.
        of_base = leaf != "prompt_encoder" and not _MODELS.isdisjoint(_types(module))
        return None if of_base else AdapterEntry(clean, leaf)
    if at.adapter or at.rest:
        return replace(at, rest=join(at.rest, leaf))
    if isinstance(module, (nn.ModuleDict, nn.ParameterDict)) or _BUFFER_DICT in _types(module):
        return replace(at, adapter=leaf)
    return replace(at, rest=leaf)


def prefix_of(module: nn.Module) -> str:
    """The path that PEFT puts before the base's names in its files, if this module shows which one; else empty."""
    types = _types(module)
    if _TUNERS.intersection(types):
        return "base_model.model"
    return "base_model" if _MODELS.intersection(types) else ""


def cleaner(prefixes: Collection[str], segments: Collection[str]) -> Callable[[str], str]:
    """What takes PEFT's segments out of a file's keys.

    Args:
        prefixes: What `prefix_of` said of the model's modules.
        segments: Segments of the model's clean names; they are left where they are.
    """
    infixes = [pattern for segment, pattern in _INFIXES.items() if segment not in segments]
    infix = re.compile(rf"(?<=\.)(?:{'|'.join(infixes)})\." if infixes else r"(?!)")
    prefix = max((p for p in prefixes if "base_model" not in segments), key=len, default="")

    def clean(key: str) -> str:
        if prefix and "base_model" in key:
            key = f".{key}.".replace(f".{prefix}.", ".", 1).replace(".base_model.", ".", 1)[1:-1] or key
        return infix.sub("", key)

    return clean


@functools.lru_cache(maxsize=4096)
def is_slot(segment: str) -> bool:
    """Whether a segment is one that only adapters have."""
    return _SLOT.fullmatch(segment) is not None


def _types(module: nn.Module) -> tuple[str, ...]:
    return _qualified(type(module))  # type: ignore[arg-type]  # a class has a hash


@functools.cache
def _qualified(kind: type[nn.Module]) -> tuple[str, ...]:
    return tuple(f"{cls.__module__}.{cls.__qualname__}" for cls in kind.__mro__)
