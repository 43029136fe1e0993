"""Markdown whose cells, code spans and sentences hold anything."""

from __future__ import annotations

from terdit_cli.report.markdown import clean, code, details, prose, table


def test_code_spans_hold_anything() -> None:
    assert code("a_b*c") == "`a_b*c`"
    assert code("a`b") == "``a`b``"
    assert code("``") == "``` `` ```"
    assert code("a|b\nc") == "`a\N{BROKEN BAR}b c`"
    assert code("") == ""
    assert len(code("x" * 5000)) < 1100
    assert prose("1 < 2 @you #3 http://x a:b") == (
        "1 \\< 2 @<!-- -->you \\#<!-- -->3 http:<!-- -->//x a:b"
    )


def test_a_table_and_what_is_folded_away() -> None:
    shown = table(("a", "b"), [("1", code("x|y"))])
    assert shown == "| a | b |\n| --- | --- |\n| 1 | `x\N{BROKEN BAR}y` |"
    assert details("<b>", shown).startswith("<details>\n<summary>&lt;b&gt;</summary>\n\n| a |")


def test_what_no_file_may_hold_is_replaced() -> None:
    assert clean("a\0\ud800\u202e\tb") == "a\ufffd\ufffd\ufffd\tb"
