"""`WarmStartArguments`: a warm start from the command line or a file, beside `TrainingArguments`."""

# ruff: noqa: RUF009 - `_help` makes a dataclass field

from __future__ import annotations

import json
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

from warmstart import MappingError, Pretrained
from warmstart_transformers.callback import WarmStartCallback

_PREFIX = "warmstart_"
_JSON = ("rename", "convert", "adapt", "fill", "unfreeze")  # structured: JSON on the command line


def _help(text: str) -> Any:
    return field(default=None, metadata={"help": text})


@dataclass
class WarmStartArguments:
    """`WarmStartCallback`'s keywords as flags for `HfArgumentParser`; what is left out keeps the callback's default.

    In YAML and JSON files (`parse_yaml_file`, `parse_json_file`) structured values are written as they are, on the command
    line as JSON. Several sources with rules of their own go into a file that `--warmstart_config` names.

    Example::

        parser = HfArgumentParser((WarmStartArguments, TrainingArguments))
        warm, args = parser.parse_args_into_dataclasses()
        Trainer(model, args, callbacks=warm.callbacks())
    """

    warmstart_source: list[str] | None = _help("Checkpoint files or folders, or models of the hub.")
    warmstart_config: str | None = _help(
        "A YAML or JSON file of WarmStartCallback's keywords, `pretrained` among them; other flags take precedence."
    )
    warmstart_checkpoint_key: str | None = _help("Which tree of the file, as a dotted path: state_dict, model_ema.")
    warmstart_select: list[str] | None = _help("Consider only the checkpoint keys that these patterns match.")
    warmstart_strip_prefix: str | None = _help("A leading path to remove from keys; inferred if left out.")
    warmstart_into: str | None = _help("The submodule to load into.")
    warmstart_include: list[str] | None = _help("Narrow the scope to these model entries.")
    warmstart_exclude: list[str] | None = _help("Take these model entries out of the scope.")
    warmstart_match: Literal["prefix", "suffix"] | None = _help("How keys are matched with entries.")
    warmstart_rename: dict[str, Any] | str | None = _help("Regex to replacement on keys, as JSON.")
    warmstart_convert: str | None = _help("Conversions of tensors, as a JSON list.")
    warmstart_adapt: dict[str, Any] | str | None = _help("Pattern of model entries to shape adapter, as JSON.")
    warmstart_fill: dict[str, Any] | str | None = _help("Pattern of model entries to the constant they get, as JSON.")
    warmstart_allow_missing: list[str] | None = _help("Model entries that may keep their own initialisation.")
    warmstart_allow_unexpected: list[str] | None = _help("Checkpoint keys that may stay unused.")
    warmstart_allow_mismatched: list[str] | None = _help("Entries of another shape that may keep their initialisation.")
    warmstart_min_coverage: float | None = _help("The least share (0 to 1) of the scope that must be loaded.")
    warmstart_dtype: Literal["model", "checkpoint"] | None = _help("Whose dtype a loaded entry has.")
    warmstart_allow_narrowing: bool | None = _help("Whether a cast may round.")
    warmstart_freeze: list[str] | None = _help("`true` freezes exactly what is loaded, patterns what they match.")
    warmstart_unfreeze: dict[str, Any] | str | None = _help('What to release when, as JSON: {"1": "encoder.layer.11"}.')
    warmstart_unfreeze_unit: Literal["epoch", "step"] | None = _help("What warmstart_unfreeze counts.")
    warmstart_on_freeze_change: Literal["error", "allow"] | None = _help("If the resumed run had frozen other entries.")
    warmstart_sha256: str | None = _help("Refuse a file with another SHA-256.")
    warmstart_trust_pickle: bool | None = _help("Unpickle the file with full rights to run code.")
    warmstart_revision: str | None = _help("Branch, tag or commit of a model of the hub.")
    warmstart_subfolder: str | None = _help("The folder within a folder or a model of the hub.")
    warmstart_verify: Literal["full", "sample", "off"] | None = _help("How values are compared.")
    warmstart_held: Literal["eval", "train"] | None = _help("The mode of modules that are frozen as a whole.")
    warmstart_lock: str | None = _help("A lock file: a plan that came out different is refused.")
    warmstart_read: Literal["local", "broadcast"] | None = _help("Who reads: every rank, or one of each node for all.")
    warmstart_log: bool | None = _help("Print, log and write the report.")
    warmstart_name: str | None = _help("The callback's name in checkpoints.")

    def callbacks(self) -> list[WarmStartCallback]:
        """The callback, in a list for `Trainer(callbacks=...)`; an empty one if no source was given.

        Raises:
            MappingError: A value that cannot be meant.
            TypeError: Rules were given beside several sources.
        """
        options = self._file() | self._flags()
        pretrained = options.pop("pretrained", None)
        if isinstance(pretrained, list) and len(pretrained) == 1:
            (pretrained,) = pretrained
        if pretrained is None:
            if options:
                given = ", ".join(f"--{_PREFIX}{name}" for name in options)
                raise MappingError(f"{given} without a source; add --{_PREFIX}source FILE")
            return []
        return [WarmStartCallback(pretrained, **options)]

    def _flags(self) -> dict[str, Any]:
        flags = {f.name.removeprefix(_PREFIX): getattr(self, f.name) for f in fields(self)}
        given = {name: _read(name, value) for name, value in flags.items() if value is not None and name != "config"}
        if "source" in given:
            given["pretrained"] = given.pop("source")
        return given

    def _file(self) -> dict[str, Any]:
        if self.warmstart_config is None:
            return {}
        options = _parsed(Path(self.warmstart_config))
        if not isinstance(options, dict):
            raise MappingError(f"{self.warmstart_config} holds no mapping; write `pretrained: FILE` and the like")
        pretrained = options.get("pretrained")
        if isinstance(pretrained, dict):
            options["pretrained"] = Pretrained(**pretrained)
        elif isinstance(pretrained, list):
            options["pretrained"] = [Pretrained(**p) if isinstance(p, dict) else p for p in pretrained]
        return options


def _parsed(path: Path) -> Any:
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".json":
        return json.loads(text)
    import yaml  # transformers needs it too

    return yaml.safe_load(text)


def _read(name: str, value: Any) -> Any:
    if name in _JSON and isinstance(value, str):
        try:
            return json.loads(value)
        except ValueError as error:
            raise MappingError(
                f"--{_PREFIX}{name} {value!r} is no JSON ({error}); write --{_PREFIX}{name} '{{...}}'"
            ) from error
    if name == "freeze" and isinstance(value, list) and [str(v).lower() for v in value] in (["true"], ["false"]):
        return str(value[0]).lower() == "true"
    return value
