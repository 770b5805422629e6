"""What transformers does to an original checkpoint when it loads it, as warmstart's own rules."""

from __future__ import annotations

import itertools
import re
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from typing import Any, TypeAlias

try:
    from transformers import PreTrainedModel
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        "warmstart_transformers needs transformers. Install it with: pip install 'warmstart[transformers]'",
        name=error.name,
    ) from error

from warmstart import MappingError, PretrainedFields
from warmstart.mapping.conversions.conversion import Conversion
from warmstart.mapping.conversions.ops.base import Op
from warmstart.mapping.conversions.ops.joining import Concat, Split
from warmstart.mapping.conversions.ops.layout import RopePermute, Transpose
from warmstart.mapping.conversions.ops.stacking import Stack

# The library's `WeightTransform` and `ConversionOps`, which its releases before 5 do not have.
Transform: TypeAlias = Any
HfOp: TypeAlias = Any


def conversion_rules(model: PreTrainedModel) -> PretrainedFields:
    """The rules by which transformers itself loads an original checkpoint into `model`, as fields of a `Pretrained`.

    What authors publish often has other names than the library's class, and other tensors: a matrix for each expert where
    the model has one for all, or query, key and value in one. transformers (from version 5) keeps a mapping for this,
    which its `from_pretrained` follows. Here that mapping becomes `rename` stages and `convert`, taken from the installed
    library each time, for this very model: with a head or without, and for the models inside it.

    Every rule is optional, since a file may have some of the old names only. As in the library, a base model's file goes
    into a model with a head, and the other way round, and a key that names an entry as it is stays so where a rule would
    lead it out of the model. A conversion that would make no entry of this model is left out.

    Args:
        model: The model that will be loaded; its parameters may be on the meta device. Where it is a part of another one,
            give the part here, and its path as `into`.

    Returns:
        `rename` and `convert`.

    Raises:
        MappingError: The library converts checkpoints of this model in a way that no rule says; the message names it. Or
            it is a release that keeps no conversions.
        TypeError: `model` is no model of transformers.

    Example::

        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained("mixtral"))
        report = warmstart.load(model, "mixtral", **conversion_rules(model))
    """
    try:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter
    except ImportError as error:
        raise MappingError(
            "this release of transformers keeps no conversions; pip install 'transformers>=5', or leave conversion_rules out"
        ) from error
    if not isinstance(model, PreTrainedModel):
        raise TypeError(
            f"{type(model).__name__} is no model of transformers; give the part that is one, and its path as into="
        )
    transforms = get_model_conversion_mapping(model)
    converters = [transform for transform in transforms if isinstance(transform, WeightConverter)]
    renamings = [transform for transform in transforms if not isinstance(transform, WeightConverter)]
    return {
        "rename": _stages(model, renamings, converters),
        "convert": [
            conversion for converter in converters for conversion in _conversions(model, converter, converters)
        ],
    }


def _stages(model: PreTrainedModel, renamings: list[Transform], converters: list[Transform]) -> list[dict[str, str]]:
    """One stage for each renaming: the library runs them in turn, each on what the one before it left."""
    for renaming in renamings:
        kind = type(renaming).__name__
        if kind not in ("WeightRenaming", "PrefixChange", "GroupWeightRename"):
            raise _refused(model, renaming, f"a {kind} computes names, and a rename is a regex")
        if any("*." in text for text in renaming.source_patterns):
            raise _refused(model, renaming, "it gives several keys one name, and the library takes the first of them")
        paths = [path for _, path in _scopes(renaming) if path]
        if paths and "(?<" in renaming.compiled_sources.pattern:
            raise _refused(model, renaming, f"its lookbehind would see the '{paths[0]}' that the library hides from it")
    kept = _kept(model, renamings, converters)
    return [*(_stage(renaming, kept) for renaming in renamings), _base_prefix(model)]


def _kept(model: PreTrainedModel, renamings: list[Transform], converters: list[Transform]) -> dict[str, str]:
    """The model's names that the rules lead out of it: the library takes such a key as it is.

    Returns:
        A regex for each of them, with any index in the place of its own if every name that it fits then is kept.
    """
    from transformers.core_model_loading import rename_source_key

    entries = model.state_dict()
    kept = []
    for name in entries:
        renamed, _ = rename_source_key(name, renamings, converters, model.base_model_prefix, entries)
        if renamed in entries:
            continue
        kept.append(name)
        if converter := _taker(name, converters):
            raise _refused(model, converter, f"it must leave the entry '{name}' alone")
    in_all, in_kept = Counter(map(_any_index, entries)), Counter(map(_any_index, kept))
    regexes = {name: _any_index(name) for name in kept}
    return {name: any_ if in_all[any_] == in_kept[any_] else re.escape(name) for name, any_ in regexes.items()}


def _any_index(name: str) -> str:
    return r"\.".join(r"\d+" if segment.isdigit() else re.escape(segment) for segment in name.split("."))


def _stage(renaming: Transform, kept: Mapping[str, str]) -> dict[str, str]:
    """One renaming. Its leftmost match decides, and the first place where the matched text stands is replaced."""
    compiled = renaming.compiled_sources
    spared = sorted({regex for name, regex in kept.items() if renaming.rename_source_key(name)[0] != name})
    guard = f"(?!(?:{'|'.join(spared)})$)" if spared else ""
    paired = len(renaming.target_patterns) > 1
    stage = {}
    for start, path in _scopes(renaming):
        # The library looks at what is behind the path only, so that `^` is there.
        pattern = re.sub(r"(?<![\\\[])\^", rf"(?<=^{re.escape(path)})", compiled.pattern) if path else compiled.pattern
        for number in range(len(renaming.source_patterns)):
            group, target = f"g{number}", renaming.target_patterns[number if paired else 0]
            outer = compiled.groupindex[group]
            new = _within(outer, target)
            rule = rf"?^{guard}{start}(?=.*?(?:{pattern}))(?P<before>.*?)(?P={group})(?P<after>.*)"
            stage[rule] = rf"{path}\g<before>{new}\g<after>"
    return stage


def _within(outer: int, replacement: str) -> str:
    """A replacement whose groups are counted inside the group `outer`, with the whole rule's numbers."""
    return re.sub(r"\\(\d)", lambda found: rf"\g<{outer + int(found[1])}>", replacement)


def _scopes(transform: Transform) -> list[tuple[str, str]]:
    """The starts of the keys that a transform is for: as a regex, and as text.

    That of a model inside this one is for its path only, with or without the base model's before it.
    """
    if transform.scope_prefix is None:
        return [("", "")]
    base, scope = (f"{path}." if path else "" for path in (transform.base_model_prefix, transform.scope_prefix))
    full = re.escape(base + scope)
    return [(full, base + scope), (f"(?!{full}){re.escape(scope)}", scope)] if base else [(full, scope)]


def _base_prefix(model: PreTrainedModel) -> dict[str, str]:
    """The stage that adds or removes the base model's prefix, key by key, as the library does.

    Planning infers one prefix for all keys, which is not enough where a rule has written it into some of them.
    """
    if not model.base_model_prefix:
        return {}
    base = f"{model.base_model_prefix}."
    names = set(model.state_dict())
    inside = {name.removeprefix(base) for name in names if name.startswith(base)}
    if not inside:
        return {rf"?^{re.escape(base)}": ""}
    stage = {}
    if paths := _beginnings(names, inside):
        stage[rf"?^{re.escape(base)}(?=(?:{paths})(?:\.|$))"] = ""
    if paths := _beginnings(inside, names):
        stage[rf"?^(?=(?:{paths})(?:\.|$))"] = base
    return stage


def _beginnings(names: Collection[str], others: Collection[str]) -> str:
    """A regex for the shortest leading paths by which `names` differ from all the others."""
    shared = {path for name in others for path in _leading(name)}
    firsts = {path for name in names if (path := next((p for p in _leading(name) if p not in shared), None))}
    return "|".join(map(re.escape, sorted(firsts)))


def _leading(name: str) -> Iterator[str]:
    return itertools.accumulate(name.split("."), "{}.{}".format)


def _conversions(model: PreTrainedModel, converter: Transform, converters: list[Transform]) -> Iterator[Conversion]:
    """One conversion for each way in which entries of the model go on around the name that the converter makes.

    Its patterns are pieces of names: `attn.qkv` stands for `self_attn.qkv.weight` and `self_attn.qkv.bias`. A template is a
    whole name, so what stands around the piece is taken from the model.
    """
    made = converter.target_patterns[0]
    paths = [path for _, path in _scopes(converter)]
    around = set()
    for name in model.state_dict():
        path = next((path for path in paths if name.startswith(path)), None)
        if path is not None and made in (local := name.removeprefix(path)):
            before, _, after = local.partition(made)
            # What stands before a piece that starts with a dot is a whole segment, and any.
            around.add((path, "" if made.startswith(".") else before.rpartition(".")[2], after))
    for path, before, after in sorted(around):
        sources = [f"{before}{_template(source)}{after}".removeprefix(".") for source in converter.source_patterns]
        targets = [f"{before}{target}{after}".removeprefix(".") for target in converter.target_patterns]
        keys = [f"{path}0.{source.replace(_ANY, '0')}" for source in sources]
        if any(_taker(key, converters) is not converter for key in keys):
            continue  # the piece must end elsewhere, or an earlier converter takes it
        start = f"{path}{{path...}}."
        yield Conversion(
            [f"?{start}{source}" for source in sources],
            [f"{start}{target}" for target in targets],
            _ops(model, converter),
        )


def _taker(key: str, converters: list[Transform]) -> Transform | None:
    """The converter that takes a key: the first one that matches it."""
    return next((converter for converter in converters if converter.rename_source_key(key)[1] is not None), None)


_ANY = "{i}"  # what `*` stands for


def _template(pattern: str) -> str:
    return pattern.replace("\\.", ".").replace("*.", f"{_ANY}.")


def _ops(model: PreTrainedModel, converter: Transform) -> list[Op]:
    """The converter's operations as ops.

    Raises:
        MappingError: There is no such op.
    """
    ops: list[Op] = []
    for op in converter.operations:
        match type(op).__name__:
            case "MergeModulelist":
                ops.append(Stack(over="i", dim=op.dim))
            case "Concatenate":
                ops.append(Concat(dim=op.dim))
            case "Split":
                ops.append(Split(dim=op.dim))
            case "Chunk" if op.num_shards_attribute is None:
                ops.append(Split(dim=op.dim))
            case "Transpose" if not op.check_dims:
                ops.append(Transpose(op.dim0, op.dim1))
            case "PermuteForRope" if op.permute_layer_names is None:
                ops.append(RopePermute(_heads(op, model.config), to="interleaved" if op.inverse else "half"))
            case _:
                options = ", ".join(f"{name}={value!r}" for name, value in vars(op).items())
                raise _refused(model, converter, f"there is no op for {type(op).__name__}({options})")
    return ops


def _heads(op: HfOp, config: Any) -> int:
    if op.subconfig_key is not None:
        config = getattr(config, op.subconfig_key, config)
    return int(getattr(config, "num_attention_heads", 1))


def _refused(model: PreTrainedModel, transform: Transform, why: str) -> MappingError:
    name = type(model).__name__
    return MappingError(
        f"{name}: transformers converts its checkpoints by {transform!r}, which no rule says: {why}\n"
        f"  -> let transformers convert it: warmstart.load(model, {name}.from_pretrained(...))"
    )
