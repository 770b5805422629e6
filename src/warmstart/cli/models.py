"""`--model`: the model that a plan is made for, from a class, a transformers folder or another checkpoint."""

from __future__ import annotations

import difflib
import inspect
import os
import re
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import nn

from warmstart.checkpoints.base import Checkpoint
from warmstart.cli.answers import UsageError
from warmstart.cli.opening import opened_beside
from warmstart.cli.parsing import find_modules_here
from warmstart.errors import CheckpointError

HELP = (
    "What to plan for: pkg.mod:Class (a module, or a function without arguments that makes one), a transformers folder "
    "with its config.json, or another checkpoint, of which names and shapes are taken."
)
_DOTTED = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*")
_PLACE = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_][\w.]*")


def model_of(text: str, checkpoint_key: str | None) -> nn.Module:
    """The model that `--model` names; of a checkpoint, the tree that `checkpoint_key` names.

    Raises:
        UsageError: It names no model, or the model cannot be built.
        CheckpointError: It names a checkpoint that cannot be read.
    """
    path = Path(text).expanduser()
    if (path / "config.json").is_file():
        return _of_transformers(path)
    if not path.exists() and _PLACE.fullmatch(text):
        return _of_class(text)
    if not path.exists() and _is_module(text):
        raise UsageError(f"--model {text}: {text} is a module; name what it has, {text}:Class")
    return skeleton(opened_beside(text, checkpoint_key, "model_checkpoint_key"))


def skeleton(checkpoint: Checkpoint) -> nn.Module:
    """A module with a checkpoint's names, shapes and dtypes, and without memory.

    Raises:
        CheckpointError: A name that no module can have.
    """
    root: nn.Module = type(Path(checkpoint.location).name or "Checkpoint", (nn.Module,), {})()
    for key in checkpoint.keys():
        info = checkpoint.info(key)
        *path, leaf = key.split(".")
        if not all((*path, leaf)):
            raise CheckpointError(
                f"{checkpoint.location}: '{key}' has an empty segment, as no entry of a model has; give the model itself"
            )
        module = root
        for name in path:
            # Not by add_module: a checkpoint's names may be those of a module's own attributes.
            module = module._modules.setdefault(name, nn.Module()) or module
        tensor = torch.empty(info.shape, dtype=info.dtype, device="meta")
        if info.dtype.is_floating_point or info.dtype.is_complex:
            module._parameters[leaf] = nn.Parameter(tensor)
        else:
            module._buffers[leaf] = tensor
    return root


def _is_module(text: str) -> bool:
    find_modules_here()
    try:
        return _DOTTED.fullmatch(text) is not None and find_spec(text) is not None
    except (ImportError, ValueError):
        return False


def _of_class(text: str) -> nn.Module:
    where, _, name = text.partition(":")
    find_modules_here()
    try:
        found: Any = import_module(where)
    except ModuleNotFoundError as error:
        if error.name is None or not (where == error.name or where.startswith(f"{error.name}.")):
            raise UsageError(f"--model {text}: importing {where} needs {error.name}, which is not installed") from error
        raise UsageError(
            f"--model {text}: there is no module {error.name} in {os.getcwd()} nor installed; check its name, or set "
            "PYTHONPATH to the folder that holds it"
        ) from error
    except Exception as error:
        raise UsageError(f"--model {text}: importing {where} raised {_raised(error)}") from error
    for part in name.split("."):
        if not hasattr(found, part):
            names = [n for n, value in vars(found).items() if inspect.isclass(value) and issubclass(value, nn.Module)]
            near = difflib.get_close_matches(part, names, n=1) or names[:4]
            hint = f"; did you mean {' or '.join(f'{where}:{n}' for n in near)}?" if near else ""
            raise UsageError(f"--model {text}: {where} has no {part}{hint}")
        found = getattr(found, part)
    if not isinstance(found, nn.Module):
        found = _built(found, text)
    if not isinstance(found, nn.Module):
        raise UsageError(f"--model {text}: gives {type(found).__name__}, not a torch.nn.Module")
    return found


def _built(make: Any, text: str) -> Any:
    if not callable(make):
        return make
    try:
        inspect.signature(make).bind()
    except TypeError as error:
        raise UsageError(
            f"--model {text}: cannot be built without arguments ({error}); name a function that builds it, such as "
            f"{text.partition(':')[0]}:make_model"
        ) from None
    except ValueError:  # a builtin without a signature
        pass
    try:
        return make()
    except Exception as error:
        raise UsageError(f"--model {text}: building it raised {_raised(error)}") from error


def _of_transformers(folder: Path) -> nn.Module:
    try:
        library = import_module("transformers")
    except ModuleNotFoundError as error:
        raise UsageError(
            f"--model {folder}: a transformers folder needs transformers: pip install 'warmstart[transformers]'; or give "
            "its file of weights, for their names and shapes"
        ) from error
    try:
        config = library.AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        (name, *_) = getattr(config, "architectures", None) or [None]
        kind = getattr(library, name, None) if name else None
        with torch.device("meta"):
            model = library.AutoModel.from_config(config) if kind is None else kind._from_config(config)
    except Exception as error:  # of a library and a config that are not ours
        raise UsageError(
            f"--model {folder}: transformers does not build it: {_raised(error)}; or give its file of weights, for their "
            "names and shapes"
        ) from error
    assert isinstance(model, nn.Module)
    return model


def _raised(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:500]}"
