"""Class folders and CSV files: what is read, left out and refused; how examples are shared out."""

from __future__ import annotations

import pytest

from coeffdiff.errors import ConfigError, PhotoError
from coeffdiff.tasks.examples import read_examples
from coeffdiff.tasks.splits import split_examples


def csv(folder, content, name="texts.csv"):
    file = folder / name
    file.write_bytes(content.encode() if isinstance(content, str) else content)
    return file


def test_texts_are_read_once_and_repetitions_left_out(tmp_path):
    """Of nine rows: one without a label, one twice in its class, and one text in two classes, which says neither."""
    file = csv(
        tmp_path,
        '﻿label,text\nb,two words\na,one\na,one\na,\nb,both\na,both\nb, last \na,"with, comma"\nb\n',
    )
    found = read_examples(file)
    assert (found.kind, found.classes) == ("texts", ("a", "b"))
    assert [(item.label, item.content()) for item in found.items] == [
        (1, "two words"), (0, "one"), (1, "last"), (0, "with, comma"),
    ]  # fmt: skip
    assert found.notes == (
        "2 of 9 rows are left out: they have no text or no label.",
        "2 texts are left out: the same content stands in several classes.",
        "1 texts are left out: the same content came before.",
    )


def test_a_tab_separated_file_with_other_columns(tmp_path):
    """The columns by their options, the separator by the suffix."""
    found = read_examples(csv(tmp_path, "id\tsays\tis\n1\tx, y\ta\n2\tz\tb\n", "t.tsv"), "says", "is")
    assert [item.content() for item in found.items] == ["x, y", "z"]


def test_pictures_are_read_and_those_that_cannot_be_are_named(shades):
    """Sorted by class and name, decoded as photos are; a hidden folder is no class."""
    (shades / "dark" / "4.png").write_bytes(b"\x89PNG\r\n")
    (shades / "light" / "notes.pdf").write_bytes(b"%PDF")
    (shades / "light" / ".DS_Store").write_bytes(b"x")
    (shades / ".cache").mkdir()
    found = read_examples(shades)
    assert (found.kind, found.classes, len(found.items)) == ("images", ("dark", "light"), 8)
    assert found.items[-1].content().getpixel((0, 0)) == (215, 200, 200)
    assert [note.split(":")[0] for note in found.notes] == [
        "dark/4.png is left out", "light/notes.pdf is left out",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"text,label\ncaf\xe9,a\n", "is not UTF-8 .byte 0xe9 at 14."),
        ("text,kind\nx,a\n", "has no column 'label'; its first line names 'text', 'kind'"),
        ("", "has no column 'text'; its first line names none"),
        ("text,label\nx,a\ny,a\n", "one label only, a; at least two classes"),
        ("text,label\n,a\nx,\n", "no row with a text and a label"),
        ('text,label\n"' + "x" * 200_000 + '",a\n', "cannot be read as CSV: field larger"),
    ],
)
def test_a_bad_file_meets_one_sentence(tmp_path, content, says):
    with pytest.raises(ConfigError, match=says):
        read_examples(csv(tmp_path, content))


def test_a_bad_place_meets_one_sentence(tmp_path, shades):
    """Nothing there, another kind of file, no class folders, one alone, an empty one."""
    with pytest.raises(ConfigError, match=r"There is no .*nowhere"):
        read_examples(tmp_path / "nowhere")
    with pytest.raises(ConfigError, match="neither a folder of class folders"):
        read_examples(csv(tmp_path, "x", "texts.json"))
    with pytest.raises(ConfigError, match="has no class folders; at least two"):
        read_examples(shades / "dark")
    (shades / "empty").mkdir()
    with pytest.raises(PhotoError, match=r"no photos in .*empty; put the pictures of that class there"):
        read_examples(shades)
    (shades / "empty").rmdir()
    (shades / "dark").rename(tmp_path / "dark")
    with pytest.raises(ConfigError, match="has 1 class folder; at least two"):
        read_examples(shades)


def test_no_example_is_in_two_parts(weather):
    """12 a class: 5 to test on, 3 to tune on, the other 4 to draw from; few shots are among more; seeds differ."""
    examples = read_examples(weather)
    split = split_examples(examples, shots=4, test=5, validation=3)
    parts = [*split.test, *split.validation, *(index for pool in split.pool for index in pool)]
    assert sorted(parts) == list(range(36))
    assert (len(split.test), len(split.validation), [len(pool) for pool in split.pool]) == (15, 9, [4, 4, 4])
    assert [examples.items[index].label for index in split.shots(2, 0)] == [0, 0, 1, 1, 2, 2]
    assert set(split.shots(2, 0)) < set(split.shots(3, 0))
    assert len({split.shots(2, seed) for seed in range(5)}) > 1


def test_a_small_class_is_shared_out(weather):
    """10 shots of 12 leave 2: one for each part; without tuning both are tested on. 11 shots leave one."""
    examples = read_examples(weather)
    split = split_examples(examples, shots=10, test=40, validation=20)
    assert (len(split.test), len(split.validation)) == (3, 3)
    assert len(split_examples(examples, shots=10, test=40, validation=0).test) == 6
    assert len(split_examples(examples, shots=11, test=40, validation=0).test) == 3
    with pytest.raises(ConfigError, match=r"'rain' has 12 texts, and 11 shots with .* takes 13"):
        split_examples(examples, shots=11, test=40, validation=20)
