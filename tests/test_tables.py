"""The algebra of table runs against a list of tables per token, and the reference counts."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from patternkv_sgl.tables import ZERO_TABLE, TableRefs, TableRuns

FIXED = settings(derandomize=True, database=None, deadline=None)
TABLES = st.integers(0, 4)
PER_TOKEN = st.lists(TABLES, min_size=1, max_size=24)


def runs_of(per_token: list[int]) -> TableRuns:
    return TableRuns(enumerate(per_token))


def per_token_of(runs: TableRuns, begin: int, end: int) -> list[int]:
    """Tables of positions [begin, end), read off the runs themselves."""
    return [
        max((start, table) for start, table in runs if start <= p)[1] for p in range(begin, end)
    ]


def is_canonical(runs: TableRuns) -> bool:
    starts = [start for start, _ in runs]
    tables = [table for _, table in runs]
    return starts == sorted(set(starts)) and all(a != b for a, b in pairwise(tables))


@FIXED
@given(PER_TOKEN)
def test_runs_hold_the_table_of_every_token(per_token: list[int]) -> None:
    runs = runs_of(per_token)
    assert is_canonical(runs)
    assert per_token_of(runs, 0, len(per_token)) == per_token
    assert runs.tables == set(per_token)
    assert runs.last == per_token[-1]


@FIXED
@given(PER_TOKEN, st.data())
def test_slice(per_token: list[int], data: st.DataObject) -> None:
    begin = data.draw(st.integers(0, len(per_token)))
    end = data.draw(st.integers(begin, len(per_token)))
    part = runs_of(per_token).slice(begin, end)
    assert is_canonical(part)
    assert bool(part) == (begin < end)
    assert per_token_of(part, 0, end - begin) == per_token[begin:end]
    assert part.tables == set(per_token[begin:end])


@FIXED
@given(PER_TOKEN, PER_TOKEN, st.data())
def test_followed_by(per_token: list[int], other: list[int], data: st.DataObject) -> None:
    length = data.draw(st.integers(len(per_token), len(per_token) + 5))
    joined = runs_of(per_token).followed_by(length, runs_of(other))
    assert is_canonical(joined)
    expected = per_token + per_token[-1:] * (length - len(per_token))
    # The last run of either goes on for ever.
    assert (
        per_token_of(joined, 0, length + len(other))
        == expected + (other + other[-1:] * (length + len(other)))[length : length + len(other)]
    )


@FIXED
@given(PER_TOKEN, TABLES, st.data())
def test_extended(per_token: list[int], table: int, data: st.DataObject) -> None:
    start = data.draw(st.integers(0, len(per_token)))
    extended = runs_of(per_token).extended(start, table)
    assert is_canonical(extended)
    assert per_token_of(extended, 0, start + 5) == per_token[:start] + [table] * 5
    assert extended.last == table


@FIXED
@given(PER_TOKEN, st.data())
def test_spans_cover_the_range_once(per_token: list[int], data: st.DataObject) -> None:
    begin = data.draw(st.integers(0, len(per_token)))
    end = data.draw(st.integers(begin, len(per_token)))
    spans = list(runs_of(per_token).spans(begin, end))
    covered = [(p, table) for lo, hi, table in spans for p in range(lo, hi)]
    assert covered == list(enumerate(per_token))[begin:end]
    assert all(lo < hi for lo, hi, _ in spans)


def test_an_open_end_covers_later_tokens() -> None:
    assert list(TableRuns([(0, 1), (4, 2)]).spans(2, 100)) == [(2, 4, 1), (4, 100, 2)]


def test_the_last_of_two_runs_at_one_start_wins() -> None:
    assert TableRuns([(0, 1), (3, 2), (3, 1), (5, 4)]) == ((0, 1), (5, 4))


def test_no_tokens_have_no_runs() -> None:
    assert not TableRuns()
    assert not TableRuns([(0, 3)]).slice(2, 2)
    assert list(TableRuns().spans(0, 9)) == []


# Reference counts


def owned(refs: TableRefs, *owners: int) -> TableRefs:
    refs.acquire(owners)
    return refs


def test_allocation_hands_out_each_table_once_and_never_the_zero_table() -> None:
    refs = TableRefs(4)
    tables = [refs.allocate() for _ in range(3)]
    assert sorted(tables) == [1, 2, 3]
    assert refs.allocate() is None
    assert (refs.num_free, refs.live) == (0, 3)


def test_a_table_is_free_when_its_last_owner_lets_go() -> None:
    refs = TableRefs(3)
    table = refs.allocate()
    refs.acquire([table])
    refs.acquire([table])
    refs.release([table])
    assert (refs.live, refs.refs[table]) == (1, 1)
    refs.release([table])
    assert refs.live == 0
    assert {refs.allocate(), refs.allocate()} == {1, 2}


def test_the_zero_table_is_never_handed_out() -> None:
    refs = TableRefs(2)
    refs.acquire([ZERO_TABLE])
    refs.release([ZERO_TABLE])
    assert refs.allocate() == 1
    assert refs.allocate() is None


def test_clear_forgets_every_owner() -> None:
    refs = owned(TableRefs(4), ZERO_TABLE)
    refs.acquire([refs.allocate()])
    refs.clear()
    assert (refs.live, refs.num_free) == (0, 3)
    refs.check(Counter())


@pytest.mark.parametrize("table", [ZERO_TABLE, 1, 2])
def test_a_double_release_is_an_error(table: int) -> None:
    refs = owned(TableRefs(3), table)
    refs.release([table])
    with pytest.raises(AssertionError, match=rf"table {table} released more often.*count -1"):
        refs.release([table])


def test_check_accepts_the_true_owners() -> None:
    refs = TableRefs(4)
    a, b = refs.allocate(), refs.allocate()
    refs.acquire([ZERO_TABLE, a, b])
    refs.acquire([a])
    refs.check(Counter({ZERO_TABLE: 1, a: 2, b: 1}))


def test_check_finds_a_missing_owner() -> None:
    refs = TableRefs(4)
    table = refs.allocate()
    refs.acquire([table])
    with pytest.raises(AssertionError, match=rf"table references {{{table}: 1}} but owners {{}}"):
        refs.check(Counter())


def test_check_finds_an_unknown_owner() -> None:
    refs = TableRefs(4)
    with pytest.raises(AssertionError, match=r"table references {} but owners {2: 1}"):
        refs.check(Counter({2: 1}))


def test_check_finds_an_allocated_table_without_owner() -> None:
    refs = TableRefs(4)
    table = refs.allocate()
    with pytest.raises(AssertionError, match=rf"neither free nor owned: \[{table}\]"):
        refs.check(Counter())


def test_check_finds_a_table_that_is_free_and_owned() -> None:
    refs = owned(TableRefs(4), 2)
    with pytest.raises(AssertionError, match=r"both free and owned: \[2\]"):
        refs.check(Counter({2: 1}))


def test_check_finds_a_table_freed_twice() -> None:
    refs = TableRefs(4)
    refs._free.append(2)
    with pytest.raises(AssertionError, match=r"freed twice: \[1, 2, 2, 3\]"):
        refs.check(Counter())


@FIXED
@given(st.lists(st.tuples(st.booleans(), st.integers(0, 5)), max_size=60))
def test_live_tables_are_those_with_owners(steps: list[tuple[bool, int]]) -> None:
    refs, owners = TableRefs(4), Counter[int]()
    for acquire, pick in steps:
        if acquire:
            live = sorted(owners)
            table = refs.allocate() if pick < 3 or not live else live[pick % len(live)]
            if table is None:
                assert refs.live == 3
                continue
            assert pick >= 3 or table not in owners
            refs.acquire([table])
            owners[table] += 1
        elif owners:
            table = sorted(owners)[pick % len(owners)]
            refs.release([table])
            owners -= Counter([table])
        refs.check(owners)
        assert (refs.live, refs.num_free) == (len(owners), 3 - len(owners))
