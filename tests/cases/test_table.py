"""`tests/CASES.md` is complete and names tests that exist."""

from __future__ import annotations

import re
from pathlib import Path

TESTS = Path(__file__).parent.parent
COUNTS = {"D2": 6, "FV": 5, "MM": 6, "TI": 6, "HF": 4, "AC": 5, "AN": 7, "ES": 5, "SB": 1, "CO": 5, "PL": 5, "TT": 5}
COUNTS |= {"TU": 3, "TF": 8, "KE": 3, "OR": 3, "BV": 2, "X": 15}


def table() -> list[tuple[str, str, str]]:
    lines = (TESTS / "CASES.md").read_text(encoding="utf-8").splitlines()
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")] for line in lines if re.match(r"\| [A-Z0-9]+-\d+ ", line)
    ]
    return [(case, test, remark) for case, test, remark in rows]


def test_every_case_is_there_once():
    cases = [case for case, _, _ in table()]
    assert len(set(cases)) == len(cases)
    assert {peer: sum(case.startswith(f"{peer}-") for case in cases) for peer in COUNTS} == COUNTS


def test_every_case_has_a_test_or_a_reason():
    for case, test, remark in table():
        if test == "none":
            assert remark, case
            continue
        path, name = test.strip("`").split("::")
        assert f"def {name}(" in (TESTS.parent / path).read_text(encoding="utf-8"), case
