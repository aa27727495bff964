"""YAML 1.2: what a scalar is, keys that stand once, values of a command line, text that comes back."""

from __future__ import annotations

import pytest
import yaml
from hypothesis import example, given, settings
from hypothesis import strategies as st

from coeffdiff.config import yaml12


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("true", True), ("False", False), ("TRUE", True), ("null", None), ("~", None), ("", None),
        ("yes", "yes"), ("no", "no"), ("On", "On"), ("off", "off"), ("y", "y"), ("tRUE", "tRUE"),
        ("10", 10), ("-3", -3), ("+5", 5), ("0", 0), ("0o10", 8), ("0x1F", 31), ("010", "010"), ("007", "007"),
        ("1:30", "1:30"), ("1_000", "1_000"), ("0b11", "0b11"), ("2001-01-01", "2001-01-01"), ("=", "="),
        ("1e3", 1000.0), ("1E-4", 1e-4), (".5", 0.5), ("5.", 5.0), ("-.inf", float("-inf")), ("1.5", 1.5),
        ("'1'", "1"), ('"true"', "true"), ("1.2.3", "1.2.3"), ("e3", "e3"), ("-", "-"), ("1" * 5000, "1" * 5000),
    ],
)  # fmt: skip
def test_scalars_are_those_of_the_core_schema(text, value):
    """In a file and after an equals sign; leading zeros keep their letters; nothing is a date."""
    if text != "-":  # an item of a list
        read = yaml12.read(f"a: {text}")[0]["a"]
        assert (read, type(read)) == (value, type(value))
    assigned = yaml12.value(text)
    assert (assigned, type(assigned)) == (value, type(value)) or text == "-"


def test_not_a_number_is_one():
    assert repr(yaml12.value(".nan")) == "nan"


@pytest.mark.parametrize(
    ("text", "name", "lines"),
    [
        ("a: 1\nb: 2\na: 3\n", "a", (1, 3)),
        ("t:\n  s: 1\nu: 2\nt:\n  r: 1\n", "t", (1, 4)),
        ("t:\n  s: 1\n  s: 2\n", "t.s", (2, 3)),
        ("t.s: 1\nt: {r: 2, s: 1}\n", "t.s", (1, 2)),
        ("m:\n  l: {r: 1}\n  l.r: 2\n", "m.l.r", (2, 3)),
        ("a.b:\n  c: 1\na:\n  b.c: 2\n", "a.b.c", (2, 4)),
        ("1: a\n'1': b\n", "1", (1, 2)),
        ("a: [{b: 1,\n b: 2}]\n", "a[1].b", (1, 2)),
    ],
)
def test_what_is_said_twice_is_named_with_both_lines(text, name, lines):
    with pytest.raises(yaml12.DuplicateKey) as twice:
        yaml12.read(text)
    assert (twice.value.name, (twice.value.first, twice.value.second)) == (name, lines)


def test_lines_are_those_of_the_settings():
    assert yaml12.read("t:\n  s: 1\n\nu.v: 2\n") == ({"t": {"s": 1}, "u.v": 2}, {"t.s": 2, "u.v": 4})
    assert yaml12.read("a: &x {b: 1, c: 2}\nd: {<<: *x, c: 3}\n")[0]["d"] == {
        "b": 1,
        "c": 3,
    }  # merged, not twice


@pytest.mark.parametrize(
    "text",
    ["&a {b: *a}", "a: &a [*a]", "? [a]\n: 1", "a: !!python/name:os.system", "a: 1\n---\nb: 2", "\x1b", "[" * 5000,
     "a: &a {b: 1, c: 2}\n" + "".join(f"x{i}: &x{i} {{p: *{'a' if not i else f'x{i - 1}'}, q: *{'a' if not i else f'x{i - 1}'}}}\n" for i in range(30))],
    ids=["a mapping in itself", "a list in itself", "a list as a key", "python", "two documents", "control", "deep", "aliases of aliases"],
)  # fmt: skip
def test_what_is_hostile_or_broken_is_refused_at_once(text):
    with pytest.raises((yaml.YAMLError, RecursionError)):
        yaml12.read(text)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("#sks", "#sks"), ("dog #2", "dog #2"), ("3 # three", "3 # three"), ("'a' # b", "'a' # b"),
        ("[a, 1, null, true]", ["a", 1, None, True]), ('["dog #2"]', ["dog #2"]), ("{a: 1}", {"a": 1}),
        ("  x  ", "x"), ("", None), ("# ", "#"), ("*sks", "*sks"), ("[dog #2, cat]", "[dog #2, cat]"), ("%x", "%x"),
    ],
)  # fmt: skip
def test_on_a_command_line_there_are_no_comments(text, value):
    assert yaml12.value(text) == value


@settings(deadline=None)
@example({"\x85": None, "a": ["\x85", "x\u2028y", "\u2029 z"]})
@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=20)
        | st.sampled_from(["no", "1e3", "010", "0o7", "1:30", "~", "on", "=", "<<", "1_0", ".5e1", "2001-01-01", "0x1"]),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
        max_leaves=6,
    )
)  # fmt: skip
def test_what_is_written_is_read_as_the_same_and_by_1_1_too(tree):
    """What 1.1 or 1.2 would take for something else is quoted."""
    text = yaml12.dump({"a": tree})
    assert yaml12.read(text)[0] == {"a": tree}
    assert yaml.safe_load(text) == {"a": tree}
