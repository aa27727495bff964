"""Lists of prompts: what they hold, which is chosen for whom, and DreamBooth's own file."""

from __future__ import annotations

import pytest

from coeffdiff.config.fields import VALIDATION_PROMPTS
from coeffdiff.data.templates import fill
from coeffdiff.errors import ConfigError
from coeffdiff.evaluation.prompts import (
    LISTING,
    LIVING_PROMPTS,
    OBJECT_PROMPTS,
    POCKET_PROMPTS,
    UNRELATED_PROMPTS,
    choose_prompts,
    is_living,
    parse_listing,
    read_listing,
    spread,
    without_token,
)
from coeffdiff.pocket.world import KINDS, vocabulary

DATA_SET = """Classes

subject_name,class
rabbit7,rabbit
old_kettle,tea kettle

Prompts

Object Prompts

prompt_list = [
'a {0} {1} under a bridge'.format(unique_token, class_token),
"a {0} {1} in an artist's studio".format(unique_token, class_token)
]

Live Subject Prompts

prompt_list = [
'a {0} {1} in a tree'.format(unique_token, class_token),
]
"""


@pytest.fixture
def data_set(tmp_path):
    (tmp_path / LISTING).write_text(DATA_SET)
    (tmp_path / "rabbit7").mkdir()
    return tmp_path


@pytest.mark.parametrize("prompts", [OBJECT_PROMPTS, LIVING_PROMPTS, POCKET_PROMPTS])
def test_every_prompt_asks_for_the_subject_once(prompts):
    """Each names token and class once; none is validation's, which may have chosen the adapter."""
    assert len(set(prompts)) == len(prompts)
    for template in prompts:
        assert template.count("{token} {class_word}") == 1
        assert fill(template, "sks", "dog") not in {fill(seen, "sks", "dog") for seen in VALIDATION_PROMPTS}


def test_as_many_as_dreambooth_has():
    assert len(OBJECT_PROMPTS) == len(LIVING_PROMPTS) == 25
    assert len(POCKET_PROMPTS) == 13
    assert not any("{" in prompt for prompt in UNRELATED_PROMPTS)


@pytest.mark.parametrize("kind", KINDS)
def test_pocket_is_asked_in_words_that_it_knows(kind):
    """All its words are in the world's captions; the unrelated ones are of other things."""
    chosen = choose_prompts("auto", base_model="pocket", class_word=kind)
    known = set(vocabulary())
    for template in chosen.subject:
        assert set(without_token(fill(template, "sks", kind), "sks").split()) <= known
    assert len(chosen.unrelated) >= 4
    for prompt in chosen.unrelated:
        assert set(prompt.split()) <= known
        assert not prompt.startswith(f"a photo of a {kind} ")


def test_the_choice_follows_model_photos_and_class(data_set):
    listing = read_listing(data_set / "rabbit7")
    sdxl = {"base_model": "stabilityai/stable-diffusion-xl-base-1.0"}
    assert choose_prompts("auto", class_word="corgi dog", **sdxl).subject == LIVING_PROMPTS
    assert choose_prompts("auto", class_word="dog toy", **sdxl).subject == OBJECT_PROMPTS
    assert choose_prompts("object", class_word="dog", **sdxl).subject == OBJECT_PROMPTS
    own = choose_prompts("auto", class_word="rabbit", listing=listing, **sdxl)
    assert (own.name, own.subject) == ("dreambooth, living", ("a {token} {class_word} in a tree",))
    assert choose_prompts("dreambooth", class_word="tea kettle", listing=listing, **sdxl).subject == (
        "a {token} {class_word} under a bridge",
        "a {token} {class_word} in an artist's studio",
    )
    assert (
        choose_prompts("auto", base_model="pocket", class_word="dog", listing=listing).subject
        == POCKET_PROMPTS
    )


def test_classes_that_breathe():
    assert [
        word for word in ("cat", "Guinea-pig", "stuffed animal", "dog house", "", None) if is_living(word)
    ] == [
        "cat",
        "Guinea-pig",
    ]


def test_the_data_sets_file_is_read_whole(data_set):
    listing = parse_listing(data_set / LISTING)
    assert listing.classes == {"rabbit7": "rabbit", "old_kettle": "tea kettle"}
    assert (len(listing.objects), len(listing.living)) == (2, 1)
    assert read_listing(data_set) == read_listing(data_set / "rabbit7") == listing
    assert read_listing(data_set / "rabbit7" / "below") is None


@pytest.mark.parametrize(
    ("text", "missing"),
    [
        ("Object Prompts\n'a {0} {1}'.format(a, b)\nLive Prompts\n'a {0} {1}'.format(a, b)", "classes"),
        ("dog,dog\nLive Prompts\n'a {0} {1}'.format(a, b)", "object prompts"),
        ("dog,dog\n'a {0} {1}'.format(a, b)", "live subject prompts"),
    ],
)
def test_another_layout_is_one_sentence(tmp_path, text, missing):
    (tmp_path / LISTING).write_text(text)
    with pytest.raises(ConfigError, match=f"not laid out as DreamBooth's: there are no {missing} in it"):
        read_listing(tmp_path)


def test_a_prompt_without_its_token_reads_well():
    assert without_token("a sks elephant in the snow", "sks") == "an elephant in the snow"
    assert without_token("a green SKS apple", "sks") == "a green apple"
    assert without_token("A sks owl, a sks owl", "sks") == "An owl, an owl"


def test_few_are_spread_over_many():
    """0, 10/3, 20/3 -> 0, 3, 6."""
    assert spread(tuple(range(10)), 3) == (0, 3, 6)
    assert spread(tuple(range(3)), 5) == spread(tuple(range(3)), None) == (0, 1, 2)


def test_a_file_of_ones_own(tmp_path):
    file = tmp_path / "mine.txt"
    file.write_text("# places\na <V> dog at sea\n\na {token} dog on Mars\n")
    chosen = choose_prompts(str(file), base_model="x", class_word="dog", limit=1)
    assert (chosen.name, chosen.subject) == ("mine.txt", ("a <V> dog at sea",))
    file.write_text("a dog at sea")
    with pytest.raises(ConfigError, match=r"'a dog at sea' lacks \{token\}"):
        choose_prompts(str(file), base_model="x", class_word="dog")
    file.write_text("# nothing")
    with pytest.raises(ConfigError, match="holds no prompts"):
        choose_prompts(str(file), base_model="x", class_word="dog")
    with pytest.raises(ConfigError, match="There is no list of prompts 'objects': auto, object, living"):
        choose_prompts("objects", base_model="x", class_word="dog")
    with pytest.raises(
        ConfigError, match=r"no prompts_and_classes.txt beside the photos; choose --prompts object"
    ):
        choose_prompts("dreambooth", base_model="x", class_word="dog")
