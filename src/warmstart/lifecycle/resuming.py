"""What a resume is to one warm start: watched for until training starts, and then held to until the first batch."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from torch import nn
from torch.utils.hooks import RemovableHandle

from warmstart.errors import CheckpointError
from warmstart.lifecycle.restoring import Restored, RestoreWatch
from warmstart.mapping.grouping import listed
from warmstart.mapping.model.names import strip


class Resuming:
    """Watches a model for restores. It makes no difference where none comes."""

    def __init__(self) -> None:
        self._watch = RestoreWatch(None)
        self._hook: RemovableHandle | None = None
        self._taken: Restored | None = None

    @property
    def seen(self) -> bool:
        """Whether a restore was seen."""
        return self._watch.seen

    def watch(self, model: nn.Module, warning: str | None, names: Collection[str]) -> None:
        """Notice what a load of the whole model's state dict matches; say `warning` then, and remember these parameters."""
        self.unwatch()
        self._watch = RestoreWatch(warning, names)
        self._hook = model.register_load_state_dict_post_hook(self._watch)  # type: ignore[no-untyped-call]

    def unwatch(self) -> None:
        """Notice no more, and hold to nothing."""
        self._taken = None
        if self._hook is not None:
            self._hook.remove()
            self._hook = None

    def was_told(self) -> None:
        """The warning is not needed any more."""
        self._watch.warning = None

    def saw_all_of(self, model: nn.Module) -> None:
        """Every entry was restored, part by part, where no load of the whole state dict was to be seen."""
        self._watch.seen = True
        self._watch.matched |= model.state_dict(keep_vars=True).keys()

    def refuse_passed_over(self, model: nn.Module) -> None:
        """Refuse a checkpoint that had nothing for the model.

        Raises:
            CheckpointError: It had not.
        """
        if self._watch.passed_over:
            raise CheckpointError(
                f"the checkpoint that is resumed matches none of the {len(model.state_dict())} entries of "
                f"{type(model).__name__}: its weights were passed over and training would go on without them\n"
                "  -> resume from a checkpoint of this model"
            )

    def refuse_instead_of(
        self, gone: CheckpointError, model: nn.Module, scopes: Sequence[str], knows_what_to_freeze: bool
    ) -> None:
        """Refuse a resume that cannot stand in for a source that is gone.

        Args:
            gone: Its error.
            model: The model.
            scopes: The paths that it would have been loaded into.
            knows_what_to_freeze: Whether that is known without it.

        Raises:
            CheckpointError: It cannot.
        """
        if not self._watch.seen:
            raise CheckpointError(
                f"{gone}\nWhether the checkpoint that is resumed has all that it would have given is not known: it was "
                "not loaded strictly, or not into the whole model\n  -> load it strictly, or put the source back"
            )
        if lacking := [n for n in self._watch.lacking(model) if any(strip(n, into) is not None for into in scopes)]:
            raise CheckpointError(
                f"{gone}\nThe checkpoint that is resumed cannot stand in for it: it lacks {len(lacking)} of "
                f"the model's entries\n{listed((name, '') for name in lacking)}"
            )
        if not knows_what_to_freeze:
            raise CheckpointError(
                f"{gone}\nA resumed run can do without it only if it is known what to freeze: name it, "
                'freeze=["encoder"], or resume from a checkpoint that holds this callback\'s state'
            )

    def take(self, model: nn.Module, *, keep: bool) -> None:
        """Training starts from what was restored, and nothing may have written to it since, nor up to the first batch.

        Args:
            model: The model.
            keep: False of an engine that restores it on its own, and writes it back later.

        Raises:
            VerificationError: Something has.
        """
        if not keep:
            return
        restored, self._watch.restored = self._watch.restored, None  # what trains on from here may start again
        if restored is not None:
            restored.refuse_other(model, "when training starts")
        self._taken = Restored(model, self._watch.names)

    def refuse_other(self, model: nn.Module) -> None:
        """Refuse a model that holds something else than what training started from, if that was restored.

        Raises:
            VerificationError: It does.
        """
        if self._taken is not None:
            self._taken.refuse_other(model, "before the first training batch")
