"""Without a process group it is a plain block; two processes agree in warmstart_transformers/test_ddp.py."""

from __future__ import annotations

import pytest

from warmstart import VerificationError
from warmstart.loading import agreement


def test_alone_an_error_is_itself():
    with pytest.raises(VerificationError) as caught, agreement.raised_on_all():
        raise VerificationError("here", tensors=("a",))
    assert str(caught.value) == "here"
    assert caught.value.tensors == ("a",)


def test_alone_nothing_is_raised_where_nothing_was():
    with agreement.raised_on_all():
        pass


class Ranks:
    """Stands in for torch.distributed: what the other rank found is given."""

    def __init__(self, own, other):
        self.own, self.other = own, other

    is_available = is_initialized = staticmethod(lambda: True)
    get_world_size = staticmethod(lambda: 2)

    def all_gather_object(self, found, mine):
        found[self.own], found[1 - self.own] = mine, self.other


FOUND = (VerificationError, "w differs", {"tensors": ("w",)})


def test_what_the_other_rank_found_is_raised_here(monkeypatch):
    monkeypatch.setattr(agreement, "dist", Ranks(0, FOUND))
    with pytest.raises(VerificationError, match=r"^on rank 1 of 2: w differs$") as caught, agreement.raised_on_all():
        pass
    assert caught.value.tensors == ("w",)


def test_what_both_found_is_raised_as_it_is(monkeypatch):
    monkeypatch.setattr(agreement, "dist", Ranks(1, FOUND))
    with pytest.raises(VerificationError, match=r"^w differs$") as caught, agreement.raised_on_all():
        raise VerificationError("w differs", tensors=("w",))
    assert isinstance(caught.value.__cause__, VerificationError)


def test_an_error_of_another_kind_stays_itself_where_it_was_raised(monkeypatch):
    monkeypatch.setattr(agreement, "dist", Ranks(1, None))
    with pytest.raises(ZeroDivisionError), agreement.raised_on_all():
        raise ZeroDivisionError


def test_and_is_a_warm_start_error_elsewhere():
    kind, message, facts = agreement._portable(OSError("no disk"))
    assert (kind.__name__, message, facts) == ("WarmStartError", "OSError: no disk", {})
