"""Counters that Nsight Compute prints become rows and a table."""

from __future__ import annotations

import csv
import io

import pytest

from benchmarks.kernel_cases import TARGETS
from benchmarks.kernel_counters import (
    BITS,
    METRICS,
    STALLS,
    STORED_TOKENS,
    kernel_name,
    markdown,
    ncu_command,
    rows_of,
)

MANGLED = {
    "window": "_ZN9patternkv6window13attend_kernelI6__halfLi1ELi4EEEvNS_5merge11MergeParamsIT_EE",
    "narrow": "_ZN9patternkv6narrow13attend_kernelILi4EEEvNS_12DecodeParamsE",
    "warpgroup": "_ZN9patternkv9warpgroup13attend_kernelILi64EEEvNS_12DecodeParamsE",
    "merge": "_ZN9patternkv5merge12merge_kernelI6__halfLi4ELi4ELb0EEEvNS0_11MergeParamsIT_EE",
    "store": "_ZN9patternkv5store10store_manyI13__nv_bfloat16EEvNS_11StoreParamsEi",
    "plan": "_ZN9patternkv4plan11plan_kernelENS0_10PlanParamsE",
}
MADE_WITH = {"gpu": "a GPU", "versions": {"torch": "2"}, "commit": "abc"}


def printed(kernels: list[str]) -> str:
    """What ``ncu --csv --page raw`` prints of ``kernels``, whose n-th takes ``n`` µs."""
    text = io.StringIO()
    writer = csv.writer(text, quoting=csv.QUOTE_ALL)
    writer.writerow(["ID", "Kernel Name", *METRICS.values()])
    writer.writerow(["", "", "ns", *["%"] * (len(METRICS) - 1)])
    for i, kernel in enumerate(kernels):
        numbers = [f"{i:,}000", "41.5", *["0.25"] * (len(METRICS) - 2)]
        writer.writerow([str(i), MANGLED[kernel], *numbers])
    return f"==PROF== Connected\nnoise\n{text.getvalue()}"


def complete() -> list[str]:
    decodes = len(TARGETS) * len(BITS)
    return ["narrow", "warpgroup", "merge"] * decodes + ["store"] * len(BITS)


def test_kernels_are_told_by_their_namespace() -> None:
    found = {name: kernel_name(mangled) for name, mangled in MANGLED.items()}
    assert found == {name: None if name == "plan" else name for name in MANGLED}
    assert kernel_name("_ZN2at6native5mergeE") is None


def test_rows_follow_the_cases() -> None:
    rows = list(rows_of(printed(complete())))
    assert len(rows) == len(complete())
    cases = [(case.name, *bits) for case in TARGETS for bits in BITS for _ in range(3)]
    cases += [(f"store {STORED_TOKENS} tokens", *bits) for bits in BITS]
    assert [(row["case"], row["bits_k"], row["bits_v"]) for row in rows] == cases
    assert [row["kernel"] for row in rows] == complete()
    assert rows[7]["us"] == 7.0 and rows[7]["issue_pct"] == 41.5
    assert {f"stall_{name}" for name in STALLS} < set(rows[7])


def test_missing_counters_are_an_error() -> None:
    with pytest.raises(ValueError, match=r"no counters of .*'store 65536 tokens', \(2, 2\)"):
        list(rows_of(printed(complete()[:-1])))
    with pytest.raises(ValueError, match="more kernels than expected"):
        list(rows_of(printed([*complete(), "store"])))
    with pytest.raises(ValueError, match="printed no counters: …==ERROR== no permission"):
        list(rows_of("==ERROR== no permission"))


def test_the_table_leaves_out_what_had_nothing_to_do() -> None:
    rows = [row | MADE_WITH for row in rows_of(printed(complete()))]
    table = markdown(rows).splitlines()
    assert "| 4x(32768+512) | 2/2 | warpgroup | 4.0 | 42 |" in table[2]
    assert len(table) == 2 + len(rows) - 4 + 2
    assert table[-1] == "a GPU; torch 2; commit abc."


def test_what_is_profiled_is_this_script() -> None:
    command = ncu_command("/opt/ncu")
    assert command[0] == "/opt/ncu" and command[-1] == "--run"
    assert command[command.index("--metrics") + 1].count(",") == len(METRICS) - 1
