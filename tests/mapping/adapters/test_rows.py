from __future__ import annotations

import pickle
import time

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from warmstart import MappingError
from warmstart.mapping.adapters.labels import Labels
from warmstart.mapping.adapters.rows import MapRows
from warmstart.tensors import same_bits

CATS = ["cat", "dog", "fox"]


def mapped(adapter: MapRows, value: torch.Tensor, current: torch.Tensor) -> torch.Tensor:
    adapter.check(tuple(value.shape), tuple(current.shape))
    return adapter.apply(value, current)


def refusal(adapter: MapRows, source: tuple[int, ...], target: tuple[int, ...]) -> str:
    with pytest.raises(MappingError) as error:
        adapter.check(source, target)
    assert str(error.value).startswith(f"checkpoint {source}, model {target}: ")
    return str(error.value)


def test_field_note_28_a_permuted_vocabulary_goes_where_its_labels_are():
    table = torch.tensor([[1.0, 10.0], [2.0, 20.0], [3.0, 30.0]])
    got = mapped(MapRows(CATS, ["fox", "cat", "dog"]), table, torch.zeros(3, 2))
    assert got.tolist() == [[3, 30], [1, 10], [2, 20]]


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_every_label_keeps_its_row_whatever_the_order_and_form(data):
    labels = data.draw(st.lists(st.text(max_size=4), min_size=1, max_size=12, unique=True))
    new = data.draw(st.permutations([*labels, *data.draw(st.lists(st.sampled_from(labels), max_size=4))]))
    value = torch.randn(len(labels), 3)
    want = value[[labels.index(label) for label in new]]
    forms = [MapRows(labels, new), MapRows({x: i for i, x in enumerate(labels)}, new)]
    forms.append(MapRows(None, [labels.index(x) for x in new]))
    forms.append(MapRows(None, {i: labels.index(x) for i, x in enumerate(new)}))
    for adapter in forms:
        assert same_bits(mapped(adapter, value, torch.zeros(len(new), 3)), want)
        assert same_bits(adapter.undo(want, (len(labels), 3)), value)


def test_weight_bias_and_transposed_head_follow_one_map():
    adapter = MapRows(CATS, ["owl", "fox", "dog", "cat"], new_rows=0.5)
    assert mapped(adapter, torch.tensor([1.0, 2.0, 3.0]), torch.zeros(5)).tolist() == [0.5, 3, 2, 1, 0.5]
    head = MapRows(CATS, ["owl", "fox", "dog", "cat"], dim=1, new_rows=0.5)
    assert mapped(head, torch.tensor([[1.0, 2.0, 3.0]]), torch.zeros(1, 5)).tolist() == [[0.5, 3, 2, 1, 0.5]]
    last = MapRows(CATS, ["owl", "fox", "dog", "cat"], dim=-1, new_rows=0.5)
    assert mapped(last, torch.tensor([[1.0, 2.0, 3.0]]), torch.zeros(1, 5)).tolist() == [[0.5, 3, 2, 1, 0.5]]
    assert head.loaded((1, 3), (1, 5)).tolist() == [[False, True, True, True, False]]
    assert adapter.loaded((3, 2), (5, 2)).tolist() == [[False], [True], [True], [True], [False]]
    assert same_bits(last.undo(torch.tensor([[0.5, 3, 2, 1, 0.5]]), (1, 3)), torch.tensor([[1.0, 2.0, 3.0]]))


def test_a_repeated_label_copies_its_row_to_each():
    adapter = MapRows(CATS, ["cat", "cat", "dog", "fox", "cat"])
    value = torch.randn(3, 2)
    got = mapped(adapter, value, torch.zeros(5, 2))
    assert same_bits(got, value[[0, 0, 1, 2, 0]])
    assert adapter.loaded((3, 2), (5, 2)) is None
    trained = got.clone()
    trained[4] += 1
    assert same_bits(adapter.undo(trained, (3, 2)), value)  # the first copy


def test_new_rows_are_the_mean_of_the_carried_ones_each_once():
    value = torch.tensor([[1.0], [3.0], [100.0], [float("nan")]])
    adapter = MapRows([*CATS, None], ["cat", "cat", "dog", "owl"], allow_drop=True)
    got = mapped(adapter, value, torch.full((5, 1), 9.0))
    assert got.tolist() == [[1], [1], [3], [2], [2]]
    keep = MapRows([*CATS, None], ["cat", "dog", "owl"], new_rows="keep", allow_drop=True)
    assert mapped(keep, value, torch.full((4, 1), 9.0)).tolist() == [[1], [3], [9], [9]]


def test_the_mean_is_that_of_float64_in_blocks():
    value = torch.randn(10_000, 3).half()
    names = [str(i) for i in range(10_000)]
    got = mapped(MapRows(names, [*names, "new"]), value, torch.zeros(10_001, 3))
    torch.testing.assert_close(got[-1].double(), value.double().mean(0), rtol=1e-6, atol=1e-9)
    bias = mapped(MapRows(names, [*names, "new"]), value[:, 0], torch.zeros(10_001))
    assert bias[-1] == got[-1, 0]


def test_the_mean_is_the_same_whatever_the_number_of_threads():
    count = 100_000
    bias, table = torch.randn(count, dtype=torch.float64), torch.randn(count, 4, dtype=torch.float64)
    adapter = MapRows(None, [*range(count), None])
    threads, means = torch.get_num_threads(), []
    try:
        for number in (1, 2, 7):
            torch.set_num_threads(number)
            means.append(
                (
                    mapped(adapter, bias, bias.new_zeros(count + 1))[-1:],
                    mapped(adapter, table, table.new_zeros(count + 1, 4))[-1],
                )
            )
    finally:
        torch.set_num_threads(threads)
    assert all(same_bits(a, b) for mean in means for a, b in zip(mean, means[0], strict=True))


def test_rows_of_nan_and_infinity_are_carried_bit_for_bit():
    value = torch.tensor([[float("nan"), -0.0], [float("inf"), 1e-42], [float("-inf"), 1.0]])
    value.view(torch.int32)[0, 0] = 0x7FC01234  # a NaN with a payload
    got = mapped(MapRows(CATS, ["fox", "owl", "cat", "dog"]), value, torch.zeros(4, 2))
    assert same_bits(got[[2, 3, 0]], value)
    assert got[1].isnan().tolist() == [True, False]


def test_field_note_28_a_silent_shrink_is_impossible():
    message = refusal(MapRows(CATS, ["cat"]), (5, 2), (1, 2))
    assert "4 of 5 checkpoint rows go nowhere: row 1 ('dog'), row 2 ('fox'), row 3, row 4\n" in message
    assert message.endswith('-> adapt={"<entry>": MapRows(old=old, new=new, allow_drop=True)}')
    adapter = MapRows(CATS, ["cat"], allow_drop=True)
    assert mapped(adapter, torch.tensor([1.0, 2, 3, 4, 5]), torch.zeros(1)).tolist() == [1]
    assert adapter.no_inverse((5, 2), (1, 2)) == "4 of 5 rows were dropped"


def test_hf_32852_padding_rows_count_as_dropped():
    names = [str(i) for i in range(8)]
    assert "2 of 10 checkpoint rows go nowhere: row 8, row 9\n" in refusal(MapRows(names, names), (10, 4), (8, 4))


def test_labels_beyond_the_rows_name_both_sizes():
    assert "old goes up to row 2, but the checkpoint has 2 rows" in refusal(MapRows(CATS, CATS), (2, 4), (3, 4))
    assert "new goes up to row 2, but the model has 2 rows" in refusal(MapRows(CATS, CATS), (3, 4), (2, 4))
    assert "new goes up to row 7, but the checkpoint has 3 rows" in refusal(MapRows(None, [0, 7, 1]), (3, 4), (3, 4))
    assert "new goes up to row 7, but the model has 3 rows" in refusal(MapRows(None, {7: 0}), (3, 4), (3, 4))


def test_labels_that_have_nothing_in_common_are_shown():
    message = refusal(MapRows(["▁the", "▁a"], ["Ġthe", "Ġa"], allow_drop=True), (2, 4), (2, 4))
    assert "no label of old is in new. In old: '▁the', '▁a'; in new: 'Ġthe', 'Ġa'" in message
    assert "no row is carried" in refusal(MapRows(None, [None, -1], allow_drop=True), (2, 4), (2, 4))
    assert "no row is carried" in refusal(MapRows([], ["a"]), (0, 4), (1, 4))


def test_another_dimension_is_named_where_the_rows_run():
    message = refusal(MapRows(CATS, ["fox", "cat", "dog", "owl"]), (4, 3), (4, 4))
    assert message.endswith('-> adapt={"<entry>": MapRows(old=old, new=new, dim=1)}')
    assert "there is no dimension 2" in refusal(MapRows(CATS, CATS, dim=2), (3, 4), (3, 4))
    assert refusal(MapRows(CATS, CATS), (3, 4), (3, 4, 1)).endswith('-> allow_mismatched=["<entry>"]')
    assert "there is no dimension 0" in refusal(MapRows(CATS, CATS), (), ())


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"old": ["a", "b", "a"]}, "old has 1 labels more than once: 'a'"),
        ({"new": {"a": 1, "b": 1}}, "new has several labels for one row: 1"),
        ({"old": "abc"}, "old='abc': a list of labels"),
        ({"new": 5}, "new=5: a list of labels"),
        ({"old": [1.5]}, "old has the label 1.5"),
        ({"old": [True]}, "old has the label True"),
        ({"old": {"a": -1}}, "old has the row -1"),
        ({"old": {"a": "0"}}, "old has the row '0'"),
        ({"old": None, "new": [0, -2]}, "new has the row -2"),
        ({"old": None, "new": ["a"]}, "new has the row 'a'"),
        ({"new_rows": "zeros"}, "new_rows='zeros': write"),
        ({"new_rows": True}, "new_rows=True: write"),
        ({"dim": "0"}, "dim='0': write dim=0"),
        ({"allow_drop": 1}, "allow_drop=1: write allow_drop=True"),
        ({"freeze_old": "yes"}, "freeze_old='yes': write freeze_old=True"),
    ],
)
def test_values_that_cannot_be_meant_are_refused(options, words):
    with pytest.raises(MappingError) as error:
        MapRows(**({"old": CATS, "new": CATS} | options))
    assert str(error.value).startswith(words)
    assert "write" in str(error.value)


def test_hostile_labels_are_printed_escaped():
    adapter = MapRows(["a", "\x1b[31m\n" + "x" * 1000], ["a"])
    message = refusal(adapter, (2, 2), (1, 2))
    assert "\x1b" not in message + repr(adapter)
    assert len(message) < 400
    assert len(repr(adapter)) < 400
    MapRows(["\ud800"], ["\ud800"]).check((1,), (1,))
    assert repr(MapRows(["\ud800"], ["\ud800"]))


def test_old_rows_with_two_labels_are_read_for_both():
    adapter = MapRows({"a": 0, "alias": 0, "b": 1}, ["alias", "b", "a"])
    value = torch.randn(2, 3)
    assert same_bits(mapped(adapter, value, torch.zeros(3, 3)), value[[0, 1, 0]])
    assert adapter.no_inverse((2, 3), (3, 3)) is None


def test_arrays_tensors_and_bytes_are_taken():
    value = torch.randn(3, 2)
    for new in ([2, 0, 1], (2, 0, 1), np.array([2, 0, 1]), torch.tensor([2, 0, 1]), {0: 2, 1: 0, 2: 1}):
        assert same_bits(mapped(MapRows(None, new), value, torch.zeros(3, 2)), value[[2, 0, 1]])
    assert MapRows(None, np.array([2, 0, 1])) == MapRows(None, [2, 0, 1])
    assert same_bits(
        mapped(MapRows([b"a", b"\xff", "a"], ["a", b"a", b"\xff"]), value, torch.zeros(3, 2)), value[[2, 0, 1]]
    )
    assert MapRows(np.array(CATS), CATS) == MapRows(CATS, CATS)


def test_equal_maps_are_equal_whatever_their_form():
    as_list, as_dict = MapRows(CATS, CATS), MapRows({"fox": 2, "cat": 0, "dog": 1}, CATS)
    assert as_list == as_dict
    assert hash(as_list) == hash(as_dict) == hash(pickle.loads(pickle.dumps(as_dict)))
    assert as_list != MapRows(CATS, CATS[::-1])
    assert as_list != MapRows(CATS, CATS, freeze_old=True)
    assert Labels(["a"], [0]) != ["a"]
    assert MapRows([1, 2], [1, 2]) != MapRows(["1", "2"], ["1", "2"])


def test_the_caller_s_list_may_change_afterwards():
    names = list(CATS)
    adapter = MapRows(names, names)
    names.reverse()
    assert adapter == MapRows(CATS, CATS)


def test_large_vocabularies_are_quick_and_print_short():
    names = [f"token{i}" for i in range(250_000)]
    start = time.process_time()
    adapter = MapRows({name: i for i, name in enumerate(names)}, [*names[::-1], "new"])
    adapter.check((250_000, 4), (250_048, 4))
    mask = adapter.loaded((250_000, 4), (250_048, 4))
    seconds = time.process_time() - start
    assert int(mask.sum()) == 250_000
    assert seconds < 5  # about half a second on one core
    assert len(repr(adapter)) < 400
