"""`Pretrained`: what to take, from where, and where it goes, declared as plain data."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, Literal, SupportsFloat, TypeAlias, TypedDict

import numpy as np
from torch import Tensor, nn

from warmstart.checkpoints.base import Checkpoint
from warmstart.errors import MappingError
from warmstart.locations import public
from warmstart.mapping.adapters.base import Adapter
from warmstart.mapping.adapters.registry import adapter
from warmstart.mapping.conversions.conversion import Conversion, conversion
from warmstart.mapping.declared import plain
from warmstart.patterns import Patterns, as_patterns

# Paths come last, because YAML tools take anything for one.
Source: TypeAlias = str | Mapping[str, Tensor | np.ndarray[Any, Any]] | nn.Module | Checkpoint | os.PathLike[str]
Renames: TypeAlias = Mapping[str, str] | Sequence[Mapping[str, str]]

_PATTERN_FIELDS = ("select", "include", "exclude", "allow_missing", "allow_unexpected", "allow_mismatched")


class PretrainedFields(TypedDict, total=False):
    """`Pretrained`'s fields but the source, for the common call with one source: `load(model, path, into="encoder")`."""

    checkpoint_key: str | None
    select: str | Sequence[str]
    strip_prefix: str | None
    into: str
    include: str | Sequence[str]
    exclude: str | Sequence[str]
    match: Literal["prefix", "suffix"]
    rename: Mapping[str, str] | Sequence[Mapping[str, str]]
    convert: Sequence[Conversion | Mapping[str, Any]]
    adapt: Mapping[str, Adapter | Mapping[str, Any] | str]
    fill: Mapping[str, float]
    allow_missing: str | Sequence[str]
    allow_unexpected: str | Sequence[str]
    allow_mismatched: str | Sequence[str]
    min_coverage: float | None
    dtype: Literal["model", "checkpoint"]
    allow_narrowing: bool
    freeze: bool | str | Sequence[str]
    sha256: str | None
    trust_pickle: bool
    revision: str | None
    subfolder: str | None


@dataclass(frozen=True, eq=False)
class Pretrained:
    """One checkpoint and the rules by which it goes into a model. All of it but in-memory sources can be YAML.

    Attributes:
        source: A path of a file or folder, a model of the hub (`org/name`, `org/name@revision`, `hf://...`), a state dict of
            tensors or numpy arrays, a module, or an opened `Checkpoint`.
        checkpoint_key: Which tree of the file, as a dotted path: `"state_dict"`, `"model_ema"`. None: the only one.
        select: Consider only the checkpoint keys that these patterns match; the others are `ignored`.
        strip_prefix: A leading path to remove from keys. None infers one (strip, add) pair; `""` strips nothing.
        into: The submodule to load into; what lies outside is out of scope.
        include: Narrow the scope to the model entries that these patterns match.
        exclude: Take the model entries that these patterns match out of the scope.
        match: `"suffix"` matches each key with the entry of the longest common suffix of whole segments and of equal shape,
            instead of inferring one prefix; what ties is an error.
        rename: Regex to replacement on keys, in whole path segments. One mapping is one simultaneous stage, a list is
            stages in order. A rule that starts with `?` may hit nothing.
        convert: Conversions, which make, merge, multiply or re-number tensors, as objects or as
            `{sources: ..., targets: ..., ops: [...]}`.
        adapt: Pattern of model entries to the adapter that makes them of a tensor of another shape, as an object or as
            `{resize_pos_embed: {prefix_tokens: 1}}`.
        fill: Pattern of model entries to the constant they get instead of a key.
        allow_missing: Model entries that may keep their own initialisation.
        allow_unexpected: Checkpoint keys that may stay unused.
        allow_mismatched: Model entries of another shape that may keep their own initialisation.
        min_coverage: The least share (0..1) of the elements in scope that must be loaded.
        dtype: `"model"` casts to the dtype of the model's entry, `"checkpoint"` gives the entry the checkpoint's.
        allow_narrowing: False makes a cast that can round (float32 to bfloat16) an error. Overflow to inf always is one.
        freeze: True freezes exactly what this source loaded; patterns freeze what they match.
        sha256: Refuse a file whose SHA-256 is another.
        trust_pickle: Unpickle the file with full rights to run code. Nothing else ever does.
        revision: The branch, tag or commit of a model of the Hugging Face hub.
        subfolder: The folder within a folder or a model of the hub, such as `unet`.

    Raises:
        MappingError: A value that cannot be meant, such as a regex that does not compile.
        TypeError: A value of another type.
    """

    source: Source
    checkpoint_key: str | None = None
    select: Patterns = ()
    strip_prefix: str | None = None
    into: str = ""
    include: Patterns = ()
    exclude: Patterns = ()
    match: Literal["prefix", "suffix"] = "prefix"
    rename: Renames = ()
    convert: Sequence[Conversion | Mapping[str, Any]] = ()
    adapt: Mapping[str, Adapter | Mapping[str, Any] | str] = field(default_factory=dict)
    fill: Mapping[str, float] = field(default_factory=dict)
    allow_missing: Patterns = ()
    allow_unexpected: Patterns = ()
    allow_mismatched: Patterns = ()
    min_coverage: float | None = None
    dtype: Literal["model", "checkpoint"] = "model"
    allow_narrowing: bool = True
    freeze: bool | Patterns = False
    sha256: str | None = None
    trust_pickle: bool = False
    revision: str | None = None
    subfolder: str | None = None

    def __post_init__(self) -> None:
        if isinstance(self.source, Pretrained):
            raise TypeError("source is a Pretrained already; pass it as it is")
        if not isinstance(self.source, str | os.PathLike | Mapping | nn.Module | Checkpoint):
            raise TypeError(
                f"source must be a path, a state dict, a module or a Checkpoint, not {type(self.source).__name__}"
            )
        # YAML tools hand over their own containers: keep plain ones, so that pickles and messages stay plain.
        for name in _PATTERN_FIELDS:
            self._set(name, _plain_patterns(getattr(self, name), name))
        if not isinstance(self.freeze, bool):
            self._set("freeze", _plain_patterns(self.freeze, "freeze"))
        self._set("rename", _plain_renames(self.rename))
        self._set("convert", _conversions(self.convert))
        self._set(
            "adapt", {pattern: adapter(how, f"adapt[{pattern!r}]") for pattern, how in _by_pattern(self, "adapt")}
        )
        self._set("fill", {pattern: _number(value, pattern) for pattern, value in _by_pattern(self, "fill")})
        if not isinstance(self.into, str):
            raise TypeError(
                f'into={self.into!r}: the path of a submodule, such as into="encoder"; "" is the whole model'
            )
        if not isinstance(self.strip_prefix, str | None):
            raise TypeError(f'strip_prefix={self.strip_prefix!r}: a leading path; None infers one, "" strips nothing')
        self._set("into", self.into.strip("."))
        if self.match not in ("prefix", "suffix"):
            raise MappingError(f'match={self.match!r}: write match="prefix" or match="suffix"')
        if self.dtype not in ("model", "checkpoint"):
            raise MappingError(f'dtype={self.dtype!r}: write dtype="model" or dtype="checkpoint"')
        if self.min_coverage is not None:
            if not isinstance(self.min_coverage, SupportsFloat):
                raise TypeError(f"min_coverage={self.min_coverage!r}: a number between 0 and 1")
            self._set("min_coverage", float(self.min_coverage))
        if self.min_coverage is not None and not 0 <= self.min_coverage <= 1:
            raise MappingError(f"min_coverage={self.min_coverage:g}: a share between 0 and 1, such as min_coverage=0.9")
        if self.sha256 is not None and not re.fullmatch(r"[0-9a-fA-F]{64}", self.sha256):
            raise MappingError(f"sha256={self.sha256!r}: 64 hexadecimal digits, as `sha256sum FILE` prints them")

    def _set(self, name: str, value: object) -> None:
        object.__setattr__(self, name, value)

    @property
    def stages(self) -> tuple[Mapping[str, str], ...]:
        """The rename stages, in order."""
        return (self.rename,) if isinstance(self.rename, Mapping) else tuple(self.rename)

    @property
    def conversions(self) -> tuple[Conversion, ...]:
        """`convert`, as objects."""
        return tuple(conversion(item, "convert") for item in self.convert)

    @property
    def adapters(self) -> dict[str, Adapter]:
        """`adapt`, as objects."""
        return {pattern: adapter(how, "adapt") for pattern, how in self.adapt.items()}

    @property
    def label(self) -> str:
        """The source in a few words, for messages."""
        if isinstance(self.source, Checkpoint):
            return self.source.location
        if isinstance(self.source, nn.Module):
            return f"a {type(self.source).__name__} in memory"
        if isinstance(self.source, Mapping):
            return "a state dict in memory"
        return public(os.fspath(self.source))

    @property
    def short_label(self) -> str:
        """The same without the folders of a path, for one line."""
        label = self.label
        return label.replace("\\", "/").rstrip("/").rpartition("/")[2] or label

    def rules(self) -> dict[str, Any]:
        """Every field but the source that differs from its default, as plain data."""
        rules = {
            f.name: plain(value)
            for f in fields(self)
            if f.name != "source" and (value := getattr(self, f.name)) != f.default and value not in ([], {})
        }
        if "convert" in rules:  # all of one kind: the name of the kind says nothing
            rules["convert"] = [item["conversion"] for item in rules["convert"]]
        return rules

    def __repr__(self) -> str:
        rules = "".join(f", {name}={value!r}" for name, value in self.rules().items())
        return f"Pretrained({self.label!r}{rules})"


def as_parts(
    pretrained: Source | Pretrained | Sequence[Source | Pretrained], options: PretrainedFields
) -> list[Pretrained]:
    """What the verbs take as `pretrained`, as a list of `Pretrained`.

    As plain data, from YAML, a `Pretrained` is a dict of its fields.

    Raises:
        TypeError: Fields were given beside anything but one bare source, or one that there is not.
        MappingError: An empty list.
    """
    if not isinstance(pretrained, Sequence) or isinstance(pretrained, str):
        return [_part(pretrained, options)]
    if options:
        raise TypeError(f"{_words(options)} cannot be given beside a list; give each Pretrained(...) its own fields")
    if not pretrained:
        raise MappingError("an empty list of sources: pass at least one")
    return [_part(one, {}) for one in pretrained]


def _part(one: Source | Pretrained, options: PretrainedFields) -> Pretrained:
    if isinstance(one, Mapping) and isinstance(one.get("source"), str):
        written: dict[str, Any] = {str(name): value for name, value in one.items()}
        one = _checked(written.pop("source"), written)
    if not isinstance(one, Pretrained):
        return _checked(one, options)
    if options:
        raise TypeError(
            f"{_words(options)} cannot be given beside a Pretrained; write Pretrained(..., {_words(options)})"
        )
    return one


def _checked(source: Source, options: Mapping[str, Any]) -> Pretrained:
    known = {f.name for f in fields(Pretrained)} - {"source"}
    if unknown := sorted(set(options) - known):
        raise TypeError(f"unknown field {', '.join(unknown)}; the fields are {', '.join(sorted(known))}")
    return Pretrained(source, **options)


def _words(options: PretrainedFields) -> str:
    return ", ".join(f"{name}=..." for name in options)


def _plain_patterns(value: Any, where: str) -> str | list[str]:
    if not isinstance(value, str) and not isinstance(value, Sequence | set | frozenset):
        raise TypeError(f"{where}={value!r}: a pattern is a string, several are a list of strings")
    plain = value if isinstance(value, str) else list(value)
    if plain == "":
        return []
    as_patterns(plain, where=where)
    return plain


def _plain_renames(value: Any) -> dict[str, str] | list[dict[str, str]]:
    if isinstance(value, Mapping):
        return _plain_stage(value)
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [_plain_stage(stage) for stage in value]
    raise TypeError(f"rename={value!r}: a mapping of regex to replacement, or a list of such mappings")


def _conversions(value: Any) -> list[Conversion]:
    if isinstance(value, Conversion | Mapping):
        value = [value]
    if not isinstance(value, Sequence) or isinstance(value, str):
        raise TypeError(f"convert={value!r}: a list of Conversion(sources, targets, ops)")
    return [conversion(item, f"convert[{number}]") for number, item in enumerate(value)]


def _by_pattern(pretrained: Pretrained, name: str) -> list[tuple[str, Any]]:
    value = getattr(pretrained, name)
    if not isinstance(value, Mapping):
        raise TypeError(f"{name}={value!r}: a mapping from patterns of model entries")
    as_patterns(list(value), where=name)
    return list(value.items())


def _number(value: Any, pattern: str) -> float:
    if not isinstance(value, bool) and isinstance(value, SupportsFloat | str):  # YAML reads 1e-5 as text
        try:
            return float(value)
        except (ValueError, OverflowError):
            pass
    raise TypeError(f"fill[{pattern!r}]={value!r}: a number")


def _plain_stage(stage: Any) -> dict[str, str]:
    if not isinstance(stage, Mapping):
        raise TypeError(f"rename: a stage is a mapping of regex to replacement, not {stage!r}")
    for rule, replacement in stage.items():
        if not isinstance(rule, str) or not isinstance(replacement, str):
            raise TypeError(f"rename: {rule!r}: {replacement!r} must be two strings")
    return dict(stage)
