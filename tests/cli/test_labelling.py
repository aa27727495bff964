"""caption and mask, as a user meets them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image
from small_labellers import SAID, save_segformer, save_vit_gpt2
from typer.testing import CliRunner

from coeffdiff.cli import app
from coeffdiff.data.photos import read_photos
from coeffdiff.errors import ModelError

LABELS = {0: "wall", 1: "dog"}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    return {
        "captioner": str(save_vit_gpt2(folder / "captioner")),
        "sees": str(save_segformer(folder / "sees", LABELS, favourite=1)),
        "blind": str(save_segformer(folder / "blind", LABELS, favourite=0)),
    }


@pytest.fixture(autouse=True)
def photos(tmp_path, monkeypatch):
    """Three photos, of which one is captioned, and a file that is none."""
    monkeypatch.chdir(tmp_path)
    Path("photos").mkdir()
    for number in range(3):
        Image.effect_noise((40 + number, 30), 50).save(f"photos/{number}.jpg")
    Path("photos/1.txt").write_text("mine")
    Path("photos/broken.jpg").write_bytes(b"\xff\xd8\xff")


def call(*arguments: str):
    result = CliRunner().invoke(app, list(arguments))
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def new_files() -> list[str]:
    return sorted(
        path.name for path in Path("photos").iterdir() if path.suffix != ".jpg" and path.name != "1.txt"
    )


def test_photos_get_captions_that_training_reads(models):
    """Those that have one keep it, what is left out is named, and nothing is done twice."""
    arguments = [
        "caption",
        "photos",
        "--token",
        "ohwx",
        "--class-word",
        "dog",
        "--model",
        models["captioner"],
    ]
    said = "a photo of a ohwx dog on the sofa"
    dry = call(*arguments, "--dry-run")
    assert dry.exit_code == 0 and new_files() == []
    done = call(*arguments)
    assert done.exit_code == 0 and done.stdout == dry.stdout == f"0.txt  {said}\n2.txt  {said}\n"
    assert "kept     1 of 3 photos (1.jpg): there is a caption already" in done.stderr
    assert "left out broken.jpg: damaged" in done.stderr
    assert [photo.caption for photo in read_photos(Path("photos")).photos] == [said, "mine", said]
    again = json.loads(call(*arguments, "--json").stdout)
    assert again["written"] == [] and [kept["photo"] for kept in again["kept"]] == ["0.jpg", "1.jpg", "2.jpg"]
    assert [left["name"] for left in again["left_out"]] == ["broken.jpg"]
    replaced = json.loads(call(*arguments, "--json", "--overwrite").stdout)
    assert replaced["written"][1] == {"photo": "1.jpg", "file": str(Path("photos/1.txt")), "caption": said}


def test_without_a_token_captions_hold_its_place(models):
    done = call("caption", "photos", "--model", models["captioner"])
    assert done.exit_code == 0 and "without --token" in done.stderr
    assert Path("photos/0.txt").read_text() == f"<V>, {' '.join(SAID)}\n"


def test_the_name_of_the_folder_offers_token_and_class_word(models):
    Path("img").mkdir()
    Path("photos").rename("img/10_zwx dog")
    done = call("caption", "img", "--model", models["captioner"])
    assert done.exit_code == 0 and "0.txt  a photo of a zwx dog on the sofa" in done.stdout


def test_photos_get_masks_that_training_reads(models):
    done = call("mask", "photos", "--class-word", "dog", "--model", models["sees"])
    assert done.exit_code == 0 and new_files() == ["0.mask.png", "1.mask.png", "2.mask.png"]
    assert done.stdout.splitlines()[0] == "0.mask.png  100.0% of the photo"
    assert "0.mask.png marks nearly all of its photo" in done.stderr
    assert [photo.open_mask().size for photo in read_photos(Path("photos"), True).photos] == [
        (40, 30),
        (41, 30),
        (42, 30),
    ]
    again = call("mask", "photos", "--class-word", "dog", "--json")  # the usual model is not asked for
    assert len(json.loads(again.stdout)["kept"]) == 3


def test_a_subject_that_is_not_seen_gets_no_mask(models):
    """Not an empty one either, which training would refuse; a script that goes on to train stops here."""
    done = call("mask", "photos", "--class-word", "dog", "--model", models["blind"], "--json")
    assert done.exit_code == 2 and new_files() == []
    assert json.loads(done.stdout)["unseen"] == ["0.jpg", "1.jpg", "2.jpg"]
    assert 'sees no "dog" in 3 of 3 photos (0.jpg, 1.jpg, 2.jpg), which get no mask' in done.stderr


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["mask", "photos"], "It is not said what to look for: mask photos --class-word dog"),
        (["caption", "nowhere"], "There is no folder nowhere"),
        (["caption", "photos", "--token", "a" * 101], "1 to 100 visible characters"),
        (["caption", "photos", "--device", "cuda:77"], "--device cuda:77 cannot be used here"),
        (["caption", "photos", "--model", "photos"], "photos cannot be loaded"),
        (
            ["mask", "photos", "--class-word", "dog", "--model", "photos/0.jpg"],
            "photos/0.jpg is a file; pass the folder",
        ),
    ],
)
def test_a_mistake_is_one_sentence_and_leaves_nothing(arguments, sentence):
    done = call(*arguments)
    assert done.exit_code == 2 and sentence in done.stderr.splitlines()[-1] and new_files() == []


@pytest.mark.parametrize("command", [["caption", "photos"], ["mask", "photos", "--class-word", "dog"]])
def test_a_folder_that_cannot_be_written_is_found_before_a_model_is_loaded(command, monkeypatch):
    monkeypatch.setattr(
        "coeffdiff.utils.output_folder.why_unwritable", lambda folder: "Read-only file system"
    )
    monkeypatch.setattr("coeffdiff.models.finding.from_hub", lambda *_: pytest.fail("a model was looked for"))
    done = call(*command)
    assert done.exit_code == 2 and "The folder photos cannot be written: Read-only file system" in done.stderr


@pytest.mark.parametrize("command", [["caption", "photos"], ["mask", "photos", "--class-word", "dog"]])
def test_without_a_network_it_is_said_how_to_get_the_usual_model(command, hub):
    hub.down = True
    done = call(*command)
    assert done.exit_code == 2 and new_files() == []
    assert (
        ModelError.__name__ in done.stderr.splitlines()[-1]
        and "run `hf download " in done.stderr.splitlines()[-1]
    )
