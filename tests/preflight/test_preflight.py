"""What is said before a run: photos that are soft, small, equal or cut, and whether memory, time and disk suffice."""

from __future__ import annotations

import json
import os
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image, ImageFilter
from typer.testing import CliRunner

from coeffdiff.cli.root import app
from coeffdiff.config.loading import load_settings
from coeffdiff.config.tree import with_values
from coeffdiff.data.photos import read_photos
from coeffdiff.errors import PhotoError
from coeffdiff.models.architecture import bucket_step
from coeffdiff.models.finding import find_backbone
from coeffdiff.pocket.model import save_random
from coeffdiff.pocket.world.subjects import SUBJECTS, write_photos
from coeffdiff.preflight.check import check, remedies_for
from coeffdiff.preflight.machine import _group_limits, free_ram
from coeffdiff.preflight.photos import SOFT, check_photos, detail, difference_hash, photo_findings, small_grey
from coeffdiff.preflight.prediction import Prediction
from coeffdiff.preflight.report import MOST_LISTED, Finding, Free, Remedy, Report, lines, table
from coeffdiff.preflight.resources import run_findings
from coeffdiff.preflight.settings import idle_findings, warmup_findings
from coeffdiff.preflight.texts import text_findings
from coeffdiff.utils.sizes import GIB

CPU = torch.device("cpu")
PLENTY = Free(64 * GIB, 64 * GIB, 1000 * GIB, 1000 * GIB)


@pytest.fixture(scope="session")
def renders(tmp_path_factory) -> Path:
    """Three renders of a mug at 256 px."""
    folder = tmp_path_factory.mktemp("renders")
    write_photos(SUBJECTS["robot_mug"], folder, 3)
    return folder


@pytest.fixture
def photos(tmp_path, renders):
    """A folder of one's own with them."""
    folder = tmp_path / "photos"
    folder.mkdir()
    for file in renders.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    return folder


@pytest.fixture(scope="session")
def pocket():
    return find_backbone(load_settings(None, {"model.name": "pocket"}).model)


@pytest.fixture(scope="session")
def micro(tmp_path_factory):
    """For what holds of any model: its operations are soon counted."""
    folder = save_random("micro", tmp_path_factory.mktemp("models") / "micro")
    return find_backbone(load_settings(None, {"model.name": str(folder)}).model)


def settings_for(photos: Path, **values):
    common = {
        "model.name": "pocket",
        "subject.images": str(photos),
        "subject.token": "sks",
        "subject.class_word": "mug",
        "photos.augmentations": 1,
        "photos.cache": str(photos.parent / "cache"),
        "method.kind": "coeff+lora",
        "method.lora.learning_rate": 1e-3,
        "method.lora.alpha": 16,
        "method.coeff.learning_rate": 1e-2,
        "training.steps": 300,
        "training.batch_size": 4,
        "training.accumulate": 1,
        "training.resolution": 128,
        "training.precision": "no",
        "training.gradient_checkpointing": False,
        "output": str(photos.parent / "run"),
    }
    return load_settings(None, common | values)


def look(photos: Path, pocket, **values):
    return look_at(settings_for(photos, **values), read_photos(photos).photos, pocket)


def look_at(settings, photos, pocket):
    resolution = settings.training.resolution
    where = {"resolution": resolution, "step": bucket_step(pocket, resolution), "crop": settings.photos.crop}
    return check_photos(photos, settings.each_subject, **where, seed=0)


def findings_on_texts(settings, looked, pocket):
    return text_findings(looked, settings.each_subject, pocket, prompts=settings.validation.prompts)


def about(looked, settings, name: str) -> list[str]:
    return [f.sentence for f in photo_findings(looked, settings.training) if f.subject == name]


def test_sharp_renders_raise_no_finding(photos, pocket):
    """The project's own photos: above the threshold, all different, large enough, nothing cut."""
    looked = look(photos, pocket)
    assert photo_findings(looked, settings_for(photos).training) == []
    assert all(photo.sharpness > 1.5 * SOFT for photo in looked)
    assert [(photo.width, photo.bucket, photo.cut, photo.duplicates) for photo in looked] == [
        (256, (128, 128), 0, ())
    ] * 3


def test_a_blurred_photo_is_named(photos, pocket):
    """Three pixels of 128 (six of the file's 256): less than half the threshold, and the others stay unnamed."""
    file = photos / "01.jpg"
    Image.open(file).filter(ImageFilter.GaussianBlur(6)).save(file, quality=95)
    looked = look(photos, pocket)
    assert looked[1].sharpness < SOFT / 1.5
    assert "looks blurred" in about(looked, settings_for(photos), "01.jpg")[0]
    assert about(looked, settings_for(photos), "00.jpg") == []


def test_sharpness_does_not_depend_on_the_files_size(photos, pocket):
    """The same picture from 256 and from 1024 pixels, decoded at a reduced size: within a third."""
    Image.open(photos / "00.jpg").resize((1024, 1024), Image.Resampling.LANCZOS).save(
        photos / "big.jpg", quality=95
    )
    looked = {photo.name: photo for photo in look(photos, pocket)}
    assert looked["big.jpg"].sharpness == pytest.approx(looked["00.jpg"].sharpness, rel=0.35)


def test_a_picture_of_one_colour_has_no_detail():
    assert detail(Image.new("L", (64, 64), 90)) == 1


def test_the_hash_by_hand():
    """Brighter to the right everywhere: all 64 bits; mirrored: none."""
    ramp = Image.linear_gradient("L").rotate(90)
    bits = (
        difference_hash(ramp),
        difference_hash(ramp.transpose(Image.Transpose.FLIP_LEFT_RIGHT)),
    )
    assert sorted(bits) == [0, 2**64 - 1]


def test_nearly_equal_photos_are_found(photos, pocket):
    """Recompressed, halved and trimmed by 2 % they are the first again; another photo of the subject is not."""
    original = Image.open(photos / "00.jpg")
    original.save(photos / "10.jpg", quality=40)
    original.resize((130, 130)).save(photos / "11.png")
    original.crop((3, 3, 253, 253)).save(photos / "12.jpg", quality=95)
    looked = {photo.name: photo for photo in look(photos, pocket)}
    assert looked["10.jpg"].duplicates == ("00.jpg",)
    assert looked["11.png"].duplicates == ("00.jpg", "10.jpg")
    assert "00.jpg" in looked["12.jpg"].duplicates
    assert looked["01.jpg"].duplicates == looked["02.jpg"].duplicates == ()
    found = about(list(looked.values()), settings_for(photos), "11.png")
    assert any("nearly the same picture as 00.jpg, 10.jpg;" in sentence for sentence in found)


def test_small_and_cut_photos_are_named(photos, pocket):
    """16 pixels are enlarged eight times for 128; of 1:1 in a square nothing is cut, of 1:9 half and more."""
    image = Image.open(photos / "00.jpg")
    image.resize((16, 16)).save(photos / "tiny.png")
    image.resize((900, 100)).save(photos / "wide.png")
    settings = settings_for(photos)
    looked = {photo.name: photo for photo in look(photos, pocket)}
    assert looked["tiny.png"].enlarged == 8
    assert looked["wide.png"].bucket[0] == 4 * looked["wide.png"].bucket[1]
    assert looked["wide.png"].cut == pytest.approx(1 - 4 / 9, abs=0.01)
    findings = {
        f.subject: f
        for f in photo_findings(list(looked.values()), settings.training)
        if "enlarged" in f.sentence
    }
    assert findings["tiny.png"].severity == "problem"
    assert "16 x 16 pixels are enlarged 8.0 times for 128 px" in findings["tiny.png"].sentence
    assert any(
        "loses 56% at its borders" in sentence
        for sentence in about(list(looked.values()), settings, "wide.png")
    )
    square = look(photos, pocket, **{"photos.crop": "center"})
    assert {photo.name: photo.cut for photo in square}["wide.png"] == pytest.approx(8 / 9, abs=0.01)


def test_captions_masks_and_the_token(photos, pocket):
    """A caption without the token is named; sksy is another word; the mask beside a photo is found."""
    (photos / "00.txt").write_text("a red mug")
    (photos / "01.txt").write_text("a photo of SKS mug")
    (photos / "02.txt").write_text("a sksy mug")
    Image.new("L", (256, 256), 255).save(photos / "01.mask.png")
    settings = settings_for(photos)
    looked = look(photos, pocket)
    assert [photo.token_in_captions for photo in looked] == [False, True, False]
    assert [photo.mask for photo in looked] == [None, "01.mask.png", None]
    found = findings_on_texts(settings, looked, pocket)
    assert [f.subject for f in found] == ["token", "captions"]
    assert found[0].sentence.startswith("sks is read as")
    assert found[1].sentence.startswith("00.jpg, 02.jpg have captions without sks")


def test_without_token_and_class_word_that_is_said(photos, pocket):
    """Captions then show <V>, and are not blamed for lacking a token."""
    settings = with_values(settings_for(photos), {"subject.token": None, "subject.class_word": None})
    looked = look_at(settings, read_photos(photos).photos, pocket)
    assert looked[0].captions == ("a photo of <V>",)
    assert [f.subject for f in findings_on_texts(settings, looked, pocket)] == ["token", "class word"]


def test_one_photo_and_two_hundred(photos, pocket):
    """One is told that its background comes along; 200 with few steps, how seldom each is seen."""
    one = look(photos, pocket)[:1]
    assert "one photo alone" in about(one, settings_for(photos), "photos")[0]
    seldom = about(one, settings_for(photos, **{"training.steps": 1}), "photos")[1]
    assert seldom == "it is seen 4.0 times in this run; more steps teach more"
    many = [SimpleNamespace(**vars(one[0]) | {"name": f"{i}.jpg", "sharpness": 1.0}) for i in range(200)]
    found = photo_findings(many, settings_for(photos, **{"training.steps": 100}).training)
    assert "200 photos and 400 samples a process: each is seen 2.0 times" in found[0].sentence
    said = lines(found)
    assert len(said) == 1 + MOST_LISTED + 1
    assert f"and {200 - MOST_LISTED} more findings" in said[-1]


def test_no_name_of_a_file_moves_the_terminal_or_breaks_the_table(photos, pocket):
    """Escape sequences, line ends and bytes that are no UTF-8 are written out; a line stays a line."""
    names = ["00.jpg", "\x1b[2Ja\nb.jpg", os.fsdecode(b"\xff.jpg"), "\x1b[31m.txt"]
    for name in names[1:]:
        (photos / name).write_bytes((photos / "00.jpg").read_bytes())
    settings, found = settings_for(photos), read_photos(photos)
    looked = look_at(settings, found.photos, pocket)
    findings = photo_findings(looked, settings.training)
    report = Report(tuple(looked), None, PLENTY, (), tuple(findings))
    shown = table(report, found)
    assert len(shown) == 1 + len(looked) + len(found.skipped) + len(found.notes) + len(findings)
    assert all(line.isprintable() for line in shown)
    "\n".join(shown).encode()
    assert any("\\x1b[2Ja\\nb.jpg" in line for line in shown)


def test_a_large_jpeg_is_not_decoded_in_full(photos, monkeypatch):
    """20 megapixels: the decoder is asked for a quarter of the side or less, and Photo.open is not used."""
    file = photos / "big.jpg"
    Image.open(photos / "00.jpg").resize((5184, 3888)).save(file, quality=80)
    photo = SimpleNamespace(path=file, open=lambda: pytest.fail("decoded in full"))
    sizes = []
    convert = Image.Image.convert
    monkeypatch.setattr(
        Image.Image, "convert", lambda self, *a, **k: (sizes.append(self.size), convert(self, *a, **k))[1]
    )
    grey = small_grey(photo, 512)
    assert max(grey.size) == 512
    assert max(sizes[0]) <= 5184 / 4


def test_a_photo_that_vanished_is_one_sentence(photos):
    found = read_photos(photos).photos[0]
    found.path.unlink()
    with pytest.raises(PhotoError, match=r"00\.jpg was checked, but can no longer be read"):
        small_grey(found, 64)


def prediction(**values) -> Prediction:
    common = {
        "device": "cuda",
        "trained": 1000,
        "phases": {"encoding": 2 * GIB, "training": 10 * GIB},
        "ram_bytes": 8 * GIB,
        "seconds": {"loading": 5.0, "training": 600.0},
        "seconds_a_step": 2.0,
        "disk": {"cache": 2**20, "checkpoints": 3 * GIB, "adapter": 2**20, "pictures": 0, "download": 0},
    }
    return Prediction(**common | values)


def findings(photos: Path, free: Free, **values) -> dict[str, Finding]:
    remedies = (
        Remedy("training.batch_size=1", 6 * GIB, True),
        Remedy("--resolution 512", 9 * GIB, False),
    )
    return {f.subject: f for f in run_findings(prediction(**values), free, remedies, cache=photos)}


@pytest.mark.parametrize(
    ("free_gib", "severity", "verdict"),
    [
        (24, "note", "24.0 GiB are free"),
        (11, "hint", "it may not fit on this GPU"),
        (8, "problem", "it will not fit on this GPU"),
    ],
)
def test_memory_is_judged_with_a_fifth_to_spare(photos, free_gib, severity, verdict):
    """10 GiB against 24, 11 and 8; what would help is named with its own figure, enough or not."""
    free = Free(free_gib * GIB, 64 * GIB, 1000 * GIB, 1000 * GIB)
    found = findings(photos, free)["memory"]
    assert found.severity == severity
    assert "about 10.0 GiB at most (encoding 2.00 GiB, training 10.0 GiB)" in found.sentence
    assert verdict in found.sentence
    named = "training.batch_size=1: 6.00 GiB, --resolution 512: 9.00 GiB (not enough)" in found.sentence
    assert named == (severity != "note")


def test_time_and_disk_are_said(photos):
    """605 s in all; a run of 3 GiB on a disk with 2 GiB left is a problem, a full cache disk costs time alone."""
    found = findings(photos, PLENTY)
    assert found["time"].sentence.startswith(
        "about 10 min 5 s (loading 5 s, training 10 min 0 s; 2 s a step)"
    )
    assert found["disk"].severity == "note"
    assert "checkpoints 3.0 GiB" in found["disk"].sentence and "pictures" not in found["disk"].sentence
    full = run_findings(prediction(), Free(99 * GIB, 99 * GIB, 2 * GIB, 0), cache=photos)
    assert [f.severity for f in full if f.subject == "disk"] == ["problem", "hint"]
    assert findings(photos, PLENTY, disk={"adapter": 1})["disk"].sentence.startswith("under 1 MiB (adapter")
    assert "time" not in findings(photos, PLENTY, seconds={})


def test_reading_the_model_takes_ram_beside_a_gpu(photos):
    free = Free(24 * GIB, 4 * GIB, 1000 * GIB, 1000 * GIB)
    found = run_findings(prediction(), free, cache=photos)
    assert any(
        f.severity == "hint" and "reading the model takes 8.00 GiB of RAM, 4.00 GiB are free" in f.sentence
        for f in found
    )


def test_where_it_does_not_fit_every_switch_has_its_own_figure(photos, micro):
    """A model into no memory at all: each switch lowers the peak, and together they lower it most."""
    settings = settings_for(photos, **{"training.batch_size": 64})
    free = Free(1, 64 * GIB, 1000 * GIB, 1000 * GIB)
    report = check(settings, read_photos(photos), micro, CPU, budget_seconds=0, free=free)
    peaks = {remedy.switch: remedy.peak_bytes for remedy in report.remedies}
    assert {"training.gradient_checkpointing=true", "training.precision=bf16", "--resolution 64"} < set(peaks)
    assert "training.batch_size=1 training.accumulate=64 (the same result)" in peaks
    assert not any(remedy.fits for remedy in report.remedies)
    largest = report.prediction.peak_bytes
    assert all(peak <= largest for peak in peaks.values())
    assert peaks["all of these"] == min(peaks.values()) < peaks["training.precision=bf16"] < largest
    assert any(
        f.severity == "problem" and "it will not fit on this cpu" in f.sentence for f in report.findings
    )


@pytest.mark.parametrize("native", [True, False])
def test_a_gpu_that_imitates_bfloat16_is_offered_float16(native, photos, micro, monkeypatch):
    """A T4 or a V100 says that it can, unless it is asked without imitation."""
    monkeypatch.setattr(
        torch.cuda, "is_bf16_supported", lambda including_emulation=True: native or including_emulation
    )
    remedies = remedies_for(
        settings_for(photos), read_photos(photos), micro, torch.device("cuda"), 1, process_bytes=0
    )
    offered = {remedy.switch for remedy in remedies if "precision" in remedy.switch}
    assert offered == {"training.precision=bf16" if native else "training.precision=fp16"}


def test_what_fits_is_not_computed_again(photos, pocket):
    """No switches are tried, and without a budget no time is said."""
    report = check(settings_for(photos), read_photos(photos), pocket, CPU, budget_seconds=0, free=PLENTY)
    assert report.remedies == ()
    assert {f.subject for f in report.findings} == {"token", "memory", "disk"}


def test_control_groups_limit_what_is_free(tmp_path):
    """Version 2 and 1: the smallest rest of all groups above the process, pages of files not counted as used."""
    group = tmp_path / "box/inner"
    group.mkdir(parents=True)
    (tmp_path / "box/memory.max").write_text("1000\n")
    (tmp_path / "box/memory.current").write_text("700\n")
    (tmp_path / "box/memory.stat").write_text("anon 500\ninactive_file 150\n")
    (group / "memory.max").write_text("max\n")
    (tmp_path / "cgroup2").write_text("0::/box/inner\n")
    assert _group_limits(tmp_path, tmp_path / "cgroup2") == [1000 - (700 - 150)]
    old = tmp_path / "memory/job"
    old.mkdir(parents=True)
    (old / "memory.limit_in_bytes").write_text("500")
    (old / "memory.usage_in_bytes").write_text("100")
    (old / "memory.stat").write_text("total_inactive_file 40\n")
    (tmp_path / "cgroup1").write_text("3:cpu:/job\n4:memory:/job\n")
    assert _group_limits(tmp_path, tmp_path / "cgroup1") == [500 - (100 - 40)]
    assert _group_limits(tmp_path, tmp_path / "none") == []
    assert 0 < free_ram() < 2**50


def call(*arguments: str):
    result = CliRunner().invoke(app, list(arguments))
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def test_the_command_prints_a_line_a_photo_and_writes_nothing(photos, monkeypatch):
    """Names, sizes, captions, what was left out, memory, time and disk; afterwards the folder is as it was."""
    (photos / "notes.doc").write_text("x")
    monkeypatch.chdir(photos.parent)
    before = sorted(photos.parent.rglob("*"))
    shown = call(
        "check", "--images", "photos", "--model", "pocket", "--token", "sks", "--class-word", "mug"
    ).stdout
    for expected in (
        "00.jpg  256 x 256",
        "128 x 128",
        '"a photo of sks mug"',
        "left out notes.doc: .doc is not among",
    ):
        assert expected in shown
    for subject in ("memory: about", "time: about", "disk: about"):
        assert subject in shown
    assert sorted(photos.parent.rglob("*")) == before


def test_json_holds_the_same_as_data(photos, monkeypatch):
    """One document on stdout: photos, prediction, what is free, findings with severity, subject and sentence."""
    monkeypatch.chdir(photos.parent)
    Image.open(photos / "00.jpg").resize((16, 16)).save(photos / "small.png")
    arguments = ["--images", "photos", "--model", "pocket", "--method", "coeff", "--steps", "7", "--json"]
    report = json.loads(call("check", *arguments).stdout)
    assert {photo["name"] for photo in report["photos"]} == {"00.jpg", "01.jpg", "02.jpg", "small.png"}
    assert report["prediction"]["trained"] == 5600  # all alphas of pocket
    assert report["prediction"]["peak_bytes"] == max(report["prediction"]["phases"].values())
    assert report["settings"]["training"]["steps"] == 7
    problem = next(f for f in report["findings"] if f["severity"] == "problem")
    assert problem["subject"] == "small.png" and "enlarged" in problem["sentence"]


def test_a_check_needs_a_folder():
    result = call("check", "--model", "pocket")
    assert result.exit_code == 2
    assert "ConfigError: A check needs --images" in result.stderr


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"method.kind": "coeff", "method.lora.rank": 64}, "method.lora.rank does nothing: the method coeff trains no lora"),
        (
            {"method.kind": "lora", "method.coeff.dropout": 0.5, "method.token.vectors": 2},
            "method.coeff.dropout and method.token.vectors do nothing: the method lora trains no coeff or token",
        ),
        ({"method.kind": "coeff", "training.clip_lora": 0.5}, "training.clip_lora does nothing: the method coeff trains no lora"),
        ({"method.kind": "coeff", "method.lora.learning_rate": 1e-3, "method.coeff.dropout": 0.5}, None),
        ({"method.kind": "token", "method.token.vectors": 2}, None),
        ({"subject.learn_token": True, "method.token.vectors": 2}, None),
        ({}, None),
    ],
)  # fmt: skip
def test_a_setting_of_what_is_not_trained_is_said(tmp_path, values, said):
    """Given, and quietly ignored, it would look as if it had been obeyed; rates may come from "auto"."""
    settings = settings_for(tmp_path / "photos", **values)
    assert [finding.sentence for finding in idle_findings(settings)] == ([said] if said else [])


def test_a_report_is_plain_data(photos, pocket):
    """as_dict survives JSON unchanged but for tuples."""
    report = check(settings_for(photos), read_photos(photos), pocket, CPU, budget_seconds=0, free=PLENTY)
    assert isinstance(report, Report)
    tree = json.loads(json.dumps(report.as_dict()))
    assert tree["free"]["memory"] == 64 * GIB
    assert tree["photos"][0]["bucket"] == [128, 128]


def test_texts_that_the_model_does_not_read_to_their_end_are_said(photos, pocket):
    """A caption and a validation prompt: what training hints at, a check does too."""
    (photos / "00.txt").write_text("a sks mug " + "and a mug " * 40)
    settings = settings_for(photos, **{"validation.prompts": ["a sks mug " + "in snow " * 60]})
    found = findings_on_texts(settings, look(photos, pocket), pocket)
    assert sum("and the model reads 77" in f.sentence for f in found if f.subject == "captions") == 2


@pytest.mark.parametrize(("warmup", "said"), [(0, 0), (299, 0), (300, 1), (600, 1)])
def test_a_warm_up_that_takes_the_whole_run_is_said(photos, warmup, said):
    schedule = {"training.lr_schedule": "linear", "training.warmup_steps": warmup}
    found = warmup_findings(settings_for(photos, **schedule).training)
    assert len(found) == said
    if warmup == 600:
        assert "takes 600 steps and the run has 300: the learning rate reaches 50%" in found[0].sentence


@pytest.mark.parametrize("orientation", [2, 3, 6, 8])
def test_nearly_equal_photos_are_found_however_they_are_stored(photos, pocket, orientation):
    """The same picture, its pixels lying otherwise and EXIF telling how."""
    from coeffdiff.data.decoding import turned

    back = {6: 8, 8: 6}.get(orientation, orientation)
    exif = Image.Exif()
    exif[0x0112] = orientation
    with Image.open(photos / "00.jpg") as image:
        turned(image, back).save(photos / "99.jpg", exif=exif, quality=95)
    assert look(photos, pocket)[-1].duplicates == ("00.jpg",)
