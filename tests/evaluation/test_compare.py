"""Comparisons: cells are made once, resume after any interruption, are the same wherever they are computed, and are
told apart by everything that decides them."""

from __future__ import annotations

import dataclasses
import json
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image
from test_evaluate import Page, write_photos
from typer.testing import CliRunner

from coeffdiff.cli.root import app
from coeffdiff.config.loading import load_section
from coeffdiff.config.tree import with_values
from coeffdiff.errors import ConfigError, Interrupted, NonFiniteLoss, NonFinitePicture, PhotoError
from coeffdiff.evaluation import comparison_runner
from coeffdiff.evaluation.cells import CellFolder
from coeffdiff.evaluation.compare import compare
from coeffdiff.evaluation.comparison_facts import place_scores
from coeffdiff.evaluation.comparison_plan import Comparison
from coeffdiff.evaluation.comparison_runner import ComparisonRunner
from coeffdiff.evaluation.comparison_subjects import find_subjects
from coeffdiff.evaluation.prompts import LISTING
from coeffdiff.hosts.diffusers import loaded_adapters
from coeffdiff.pocket.model import save_random
from coeffdiff.pocket.world import render, sample_scene, subjects
from coeffdiff.utils.locks import try_lock

HOSTILE = "<b>&arm"


@pytest.fixture(scope="module")
def shop(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("shop")
    save_random("micro", folder / "model")
    write_photos(folder / "data" / "ball3", 3, masks=1)
    write_photos(folder / "data" / "cat9", 2, masks=0)
    (folder / "prompts.txt").write_text("a {token} {class_word} at sea\na {token} {class_word} on ice\n")
    return folder


@pytest.fixture(scope="module")
def plan(shop, vit, clip) -> Comparison:
    return load_section(
        Comparison,
        None,
        {
            "model.name": str(shop / "model"),
            "subjects": str(shop / "data"),
            "class_word": "thing",
            "arms": {"base": None, "lora": {"method.kind": "lora"}, HOSTILE: {"method.kind": "coeff"}},
            "settings": {"training.steps": 2, "training.batch_size": 1, "photos.cache": str(shop / "cache")},
            "checkpoints": [1],
            "seeds": [0],
            "prompts": str(shop / "prompts.txt"),
            "drift_pictures": 0,
            "denoising_steps": 2,
            "dino": str(vit),
            "clip": str(clip),
        },
    )


@pytest.fixture(scope="module")
def done(plan, tmp_path_factory):
    """The whole plan: its outcome."""
    return compare(plan, tmp_path_factory.mktemp("done") / "out")


def cells_of(folder: Path) -> dict[str, dict]:
    """Name -> what does not depend on when and how fast it was made."""
    cells = {file.name: json.loads(file.read_text()) for file in sorted((folder / "cells").glob("*.json"))}
    for cell in cells.values():
        for name in ("seconds_a_step", "peak_gib"):
            cell.get("cost", {}).pop(name, None)
        del cell["made"]["date"]
    return cells


def forbidden(*_: object, **__: object) -> None:
    raise AssertionError("nothing is left to be computed")


def test_every_cell_is_there_and_equal_prompts_have_equal_seeds(done):
    """2 subjects x (base, and 2 arms at 2 steps) = 10; the noise of a prompt is the same in every arm."""
    cells = cells_of(done.folder)
    assert len(cells) == 10 and done.missing == []
    asked = {
        (cell["subject"], cell["arm"], cell["steps"]): [(p["text"], p["seed"]) for p in cell["pictures"]]
        for cell in cells.values()
    }
    assert len({tuple(pictures) for pictures in asked.values()}) == 1
    assert {steps for _, arm, steps in asked if arm == HOSTILE} == {1, 2}
    assert all(set(cell["scores"]) >= {"dino", "clip_i", "clip_t"} for cell in cells.values())
    lora = next(c for c in cells.values() if c["arm"] == "lora" and c["steps"] == 2)
    alpha = next(c for c in cells.values() if c["arm"] == HOSTILE and c["steps"] == 2)
    assert lora["cost"]["parameters"] > alpha["cost"]["parameters"] > 0
    assert alpha["cost"]["mean_abs_alpha"] > 0 and "mean_abs_alpha" not in lora["cost"]
    assert {f.name for f in done.folder.iterdir()} == {
        "cells", "work", "asked.yaml", "comparison.json", "comparison.csv", "comparison.png", "report.html"
    }  # fmt: skip
    assert json.loads((done.folder / "comparison.json").read_text()) == done.results
    assert done.results["paired"][HOSTILE]["pairs"] == 2


def test_the_page_is_well_formed_and_strange_names_stay_text(done):
    page = Page((done.folder / "report.html").read_text())
    assert page.open == [] and HOSTILE in page.text
    assert not {"script", "link", "b&arm"} & {tag for tag, _ in page.tags}
    images = [a for tag, a in page.tags if tag == "img"]
    assert all(a["src"].startswith("data:image/jpeg;base64,") and a["alt"] for a in images)
    # the plot; 3 and 2 photos; a strip for each of 3 arms and 2 subjects
    assert len(images) == 1 + 5 + 6
    assert Image.open(done.folder / "comparison.png").size[0] > 800


def test_nothing_is_computed_twice(plan, done, monkeypatch):
    for name in ("train", "score_adapter"):
        monkeypatch.setattr(comparison_runner, name, forbidden)
    again = compare(plan, done.folder)
    assert again.results == done.results


def test_cells_alone_make_the_same_comparison(plan, done, tmp_path, monkeypatch):
    """Gathered from other machines: without pictures, without adapters."""
    shutil.copytree(done.folder / "cells", tmp_path / "cells")
    for name in ("train", "score_adapter"):
        monkeypatch.setattr(comparison_runner, name, forbidden)
    assert compare(plan, tmp_path).results == done.results


def test_packed_cells_make_the_same_comparison(plan, done, tmp_path, monkeypatch):
    """In one file, and nothing is computed again; of a part of the plan only its own cells are packed."""
    shutil.copytree(done.folder / "cells", tmp_path / "cells")
    for name in ("train", "score_adapter"):
        monkeypatch.setattr(comparison_runner, name, forbidden)
    before = CellFolder(tmp_path / "cells").all()
    compare(plan.only(["base"]), tmp_path, pack_as="part")  # base and the reference, lora
    assert len(list((tmp_path / "cells").glob("*.json"))) == 4
    assert compare(plan, tmp_path, pack_as="whole").results == done.results
    assert sorted(file.name for file in (tmp_path / "cells").iterdir()) == ["part.jsonl", "whole.jsonl"]
    assert CellFolder(tmp_path / "cells").all() == before
    assert compare(plan, tmp_path).results == done.results


def test_interrupted_anywhere_it_goes_on_and_comes_to_the_same(plan, done, tmp_path, monkeypatch):
    """Ctrl-C in the third training: what was finished stays and is reported, the rest follows."""
    calls = []

    def interrupted(settings, **how):
        calls.append(settings)
        if len(calls) == 3:
            raise Interrupted("Stopped.")
        return module_train(settings, **how)

    module_train = comparison_runner.train
    monkeypatch.setattr(comparison_runner, "train", interrupted)
    with pytest.raises(Interrupted):
        compare(plan, tmp_path)
    results = json.loads((tmp_path / "comparison.json").read_text())
    assert 0 < len(cells_of(tmp_path)) < 10 and len(results["missing"]) == 10 - len(cells_of(tmp_path))
    monkeypatch.undo()
    assert compare(plan, tmp_path).missing == []
    assert cells_of(tmp_path) == cells_of(done.folder)


def test_a_checkpoint_is_what_so_many_steps_make(plan, done, tmp_path):
    """One step asked for alone gives the cell that two steps left on their way, of the same name."""
    short = plan.model_copy(update={"settings": plan.settings | {"training.steps": 1}, "checkpoints": []})
    compare(short, tmp_path)
    alone, together = cells_of(tmp_path), cells_of(done.folder)
    assert len(alone) == 6 and all(together[name] == cell for name, cell in alone.items())


def test_a_second_compare_in_one_folder_is_refused(plan, tmp_path):
    with try_lock(tmp_path) as mine, pytest.raises(ConfigError, match=r"Another compare .* --workers N"):
        assert mine
        compare(plan, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_job_that_fails_does_not_stop_the_others(plan, tmp_path, monkeypatch):
    """The first of two trainings fails: the second is there, and then the failure is told."""

    def fails(settings, **how):
        if settings.subject.images.name == "ball3":
            raise PhotoError("The photos are gone.")
        return module_train(settings, **how)

    module_train = comparison_runner.train
    monkeypatch.setattr(comparison_runner, "train", fails)
    with pytest.raises(PhotoError, match="are gone"):
        compare(plan.only(["lora"]), tmp_path)
    missing = json.loads((tmp_path / "comparison.json").read_text())["missing"]
    assert {name.rpartition(", ")[0] for name in missing} == {"ball3, lora, seed 0"} and len(missing) == 2


def test_shares_keep_arms_together_and_make_up_the_whole(plan, tmp_path, monkeypatch):
    """2 subjects with one seed in 3 parts: the third has nothing to do."""
    worked: dict[int, list[str]] = {1: [], 2: [], 3: []}
    for k, share in worked.items():
        monkeypatch.setattr(ComparisonRunner, "work", lambda self, job, share=share: share.append(job.label))
        compare(plan, tmp_path, part=(k, 3))
    assert [label.split(",")[0] for label in worked[1]] == ["ball3"] * 3
    assert [label.split(",")[0] for label in worked[2]] == ["cat9"] * 3 and worked[3] == []


def test_checkpoints_of_a_longer_plan_are_not_taken_for_a_shorter_one(plan, done, tmp_path, monkeypatch):
    """Stopped at step 2 of 3 without an adapter, then asked for 1 step: the cells are those of 1 step."""

    def stopped(settings, **_):
        train(with_values(settings, {"training.steps": 2, "training.checkpoint_every": 2}))
        shutil.rmtree(Path(settings.output) / "adapter")
        raise Interrupted("Stopped.")

    train = comparison_runner.train
    monkeypatch.setattr(comparison_runner, "train", stopped)
    longer = plan.settings | {"training.steps": 3}
    with pytest.raises(Interrupted, match="The same command goes on"):
        compare(plan.only(["lora"]).model_copy(update={"settings": longer, "checkpoints": []}), tmp_path)
    assert list(tmp_path.glob("work/*/run/checkpoints/step-000002"))
    monkeypatch.undo()
    short = plan.settings | {"training.steps": 1}
    compare(plan.only(["lora"]).model_copy(update={"settings": short, "checkpoints": []}), tmp_path)
    found, right = cells_of(tmp_path), cells_of(done.folder)
    assert len(found) == 2 and all(right[name] == cell for name, cell in found.items())


def test_settings_may_be_nested_or_dotted_and_null_is_a_value(plan, shop, tmp_path):
    """What an arm sets stays in it; the seed is the plan's in all of them."""
    arms = {
        "a": {"training": {"steps": 7}, "method.kind": "lora"},
        "b": {"method": {"kind": "lora"}, "training.snr_gamma": None},
    }
    changed = {"settings": {"training": {"batch_size": 3}}, "arms": arms, "reference": "a", "seeds": [5]}
    jobs = {
        job.arm: job.settings for job in ComparisonRunner(plan.model_copy(update=changed), tmp_path).jobs()
    }
    assert {arm: (s.training.steps, s.training.snr_gamma) for arm, s in jobs.items()} == {
        "a": (7, 5.0), "b": (200, None)
    }  # fmt: skip
    assert all(
        (s.training.seed, s.training.batch_size, s.subject.token) == (5, 3, "sks") for s in jobs.values()
    )
    assert changed["settings"] == {"training": {"batch_size": 3}}


def test_the_steps_of_a_schedule_that_ends_name_a_training(plan, tmp_path):
    """Cosine over 2 steps is no beginning of cosine over 4; a constant rate is."""
    names = {}
    for schedule in ("constant", "cosine"):
        for steps in (2, 4):
            own = {"training.lr_schedule": schedule, "training.steps": steps}
            update = {"settings": plan.settings | own, "checkpoints": []}
            job = ComparisonRunner(plan.only(["lora"]).model_copy(update=update), tmp_path).jobs()[0]
            names[schedule, steps] = job.key
    assert names["constant", 2] == names["constant", 4] and len(set(names.values())) == 3


def test_every_kind_of_arm_leaves_the_model_as_it_was(plan, tmp_path):
    """A learned token, mixed values, two scales and drift on one shared pipeline: base cells computed after them equal
    those computed first, and at scale 0.5 something else is seen than at 1."""
    arms = {
        "token": {"method.kind": "token"},
        "values": {"method.kind": "coeff", "method.coeff.mixes": "values", "method.coeff.learning_rate": 1.0},
        "base": None,
    }
    update = {"arms": arms, "reference": "base", "scales": [0.5, 1.0], "drift_pictures": 1, "limit": 1}
    update |= {"checkpoints": [], "subjects": str(Path(plan.subjects) / "cat9")}
    compare(plan.model_copy(update=update), tmp_path / "after")
    compare(plan.model_copy(update=update).only([]), tmp_path / "alone")
    together, alone = cells_of(tmp_path / "after"), cells_of(tmp_path / "alone")
    assert len(together) == 5 and len(alone) == 1
    assert all(together[name] == cell for name, cell in alone.items())
    values = {c["scale"]: c["scores"] for c in together.values() if c["arm"] == "values"}
    assert values[0.5]["dino"] != values[1.0]["dino"] and values[0.5]["drift"] < values[1.0]["drift"]


def test_a_cell_is_named_by_all_that_decides_it_and_by_nothing_else(plan, shop, tmp_path):
    """Moved folders, caches and looks at the losses change no name; photos, captions, rates, seeds and prompts do."""

    def keys(**update):
        changed = plan.model_copy(update=update)
        studio = ComparisonRunner(changed, tmp_path)
        jobs = [job for job in studio.jobs() if job.arm == "lora"]
        return {job.cells[job.end]: job.subject.name for job in jobs}

    own = keys()
    shutil.copytree(shop / "data", tmp_path / "data")
    shutil.copytree(shop / "model", tmp_path / "model")
    moved = plan.model.model_copy(update={"name": str(tmp_path / "model")})
    indifferent = {"photos.cache": str(tmp_path), "training.log_every": 7, "tracking.tensorboard": True}
    indifferent["method.coeff.dropout"] = 0.5  # no alpha learns here
    assert keys(subjects=str(tmp_path / "data"), model=moved, settings=plan.settings | indifferent) == own
    for update in (
        {"settings": plan.settings | {"method.lora.learning_rate": 1e-5}},
        {"seeds": [1]},
        {"guidance": 4.0},
        {"pictures": 2},
        {"class_word": "toy"},
        {"scales": [0.5]},
    ):
        assert not keys(**update).keys() & own.keys(), update
    (tmp_path / "data" / "ball3" / "0.txt").write_text("a sks ball")
    changed = keys(subjects=str(tmp_path / "data"))
    assert [name for key, name in changed.items() if key in own] == ["cat9"]


def test_a_training_that_diverges_is_a_finding(plan, tmp_path, monkeypatch):
    def diverges(settings, **_):
        raise NonFiniteLoss("The loss of step 2 is nan.")

    monkeypatch.setattr(comparison_runner, "train", diverges)
    outcome = compare(plan.only(["lora"]), tmp_path)
    assert outcome.missing == [] and list(outcome.results["arms"]) == []
    assert (
        len(outcome.results["failed"]) == 4
        and "ball3, lora, seed 0: The loss" in outcome.results["failed"][0]
    )


def test_subjects_are_pockets_own_a_data_set_or_a_folder(shop, tmp_path):
    own = list(find_subjects("fresh:2@7", None, tmp_path))
    assert not (tmp_path / "work").exists()
    for sitter in own:
        sitter.write_photos()
    assert [s.name for s in own] == [subjects.fresh_subject(seed).name for seed in (7, 8)]
    assert (
        sum(1 for _ in own[0].folder.glob("*.jpg")) == 5
        and own[0].class_word == subjects.fresh_subject(7).kind
    )
    unaware, told = (list(find_subjects(group, None, tmp_path)) for group in ("tellable", "told"))
    assert [s.name for s in unaware] == [s.name for s in told] and unaware[2].class_word == "mug"
    assert told[2].class_word == "red striped mug" and told[2].identity != unaware[2].identity
    with pytest.raises(ConfigError, match="name wooden_pot twice"):
        list(find_subjects("wooden_pot,comet_car,wooden_pot", None, tmp_path))
    mixed = shutil.copytree(shop / "data", tmp_path / "mixed")
    shutil.copy(next((shop / "data" / "ball3").glob("*.png")), mixed)
    with pytest.raises(PhotoError, match="so it may be one subject or several"):
        list(find_subjects(str(mixed), "ball", tmp_path))
    single = list(find_subjects(str(shop / "data" / "ball3"), "ball", tmp_path))
    assert [(s.name, s.class_word) for s in single] == [("ball3", "ball")]
    shutil.copytree(shop / "data", tmp_path / "set")
    (tmp_path / "set" / LISTING).write_text(
        "subject_name,class\ncat9,cat\n\nObject Prompts\n'a {0} {1}'.format(a, b)\n"
        "Live Subject Prompts\n'a {0} {1} asleep'.format(a, b)\n"
    )
    listed = list(find_subjects(str(tmp_path / "set"), "thing", tmp_path))
    assert [(s.name, s.class_word) for s in listed] == [("cat9", "cat")]
    of_set = list(find_subjects(str(tmp_path / "set" / "cat9"), "thing", tmp_path))
    assert [(s.name, s.class_word) for s in of_set] == [("cat9", "cat")]
    shutil.rmtree(tmp_path / "set" / "cat9")
    with pytest.raises(PhotoError, match="None of the subjects"):
        list(find_subjects(str(tmp_path / "set"), None, tmp_path))
    with pytest.raises(ConfigError, match="There are no subjects 'mars'"):
        list(find_subjects("mars", None, tmp_path))


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--part", "3/2"], "--part takes a share"),
        (["--seeds", "0,x"], "--seeds takes whole numbers"),
        (["--arm", "lor"], "The plan has no arm 'lor'; it has base, lora, coeff, coeff+lora."),
        (["--set", "seeds=[1,1]"], "it names a value twice"),
        (["--set", "reference=dora"], "the reference 'dora' is none of the arms"),
        (["--set", "denoising=3"], "Unknown setting denoising"),
        (
            ["--set", "checkpoints=[1]", "--set", "settings={training.lr_schedule: cosine}"],
            "follows a schedule",
        ),
        (["--set", "arms={lora: {method.rank: 3}}"], "Unknown setting method.rank"),
        (["--set", "settings={training: {seed: 3}}"], "training.seed cannot be set for arms"),
        (["--set", "arms={lora: {validation.keep: best}}"], "validation.keep cannot be set for arms"),
        (["--set", "checkpoints=[0]"], "checkpoints (given: 0)"),
        (["--set", "arms={lora: {1: 2}}"], "The arm 'lora': Unknown setting 1 in the settings"),
        (["--set", "arms={lora: 3}"], "arms (given: 3): it must be settings by their names"),
    ],
)
def test_a_mistake_is_one_sentence_and_nothing_is_written(shop, vit, clip, tmp_path, arguments, sentence):
    plain = [
        "--model",
        str(shop / "model"),
        "--subjects",
        str(shop / "data"),
        "--output",
        str(tmp_path / "out"),
    ]
    encoders = ["--set", f"dino={vit}", "--set", f"clip={clip}", "--set", f"prompts={shop / 'prompts.txt'}"]
    result = CliRunner().invoke(app, ["compare", *plain, *encoders, *arguments])
    assert result.exit_code == 2 and sentence in result.output.replace("\n", " "), result.output
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"subjects": "nowhere"}, "There are no subjects 'nowhere'"),
        ({"arms": {"lora": {}, "wide": {"method.lora.rank": 0}}}, r"The arm 'wide': .*method\.lora\.rank"),
        ({"settings": {"training": {"steps": -1}}}, r"The arm 'lora': .*training\.steps"),
    ],
)
def test_a_mistake_in_a_plan_is_told_before_a_model_is_loaded(monkeypatch, tmp_path, change, sentence):
    monkeypatch.setattr(
        "coeffdiff.evaluation.compare.ComparisonRunner", lambda *a: pytest.fail("it was loaded")
    )
    with pytest.raises(ConfigError, match=sentence):
        compare(Comparison(**{"arms": {"lora": {}}} | change), tmp_path / "out")


def test_a_file_in_the_way_is_one_sentence(shop, tmp_path):
    (tmp_path / "out").write_text("mine")
    result = CliRunner().invoke(app, ["compare", "--model", "pocket", "--output", str(tmp_path / "out")])
    assert result.exit_code == 2 and "is a file" in result.output and (tmp_path / "out").read_text() == "mine"


def test_several_processes_of_one_launch_are_refused(monkeypatch, plan, tmp_path):
    for name, value in {"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0"}.items():
        monkeypatch.setenv(name, value)
    result = CliRunner().invoke(app, ["compare", "--output", str(tmp_path / "out")])
    assert result.exit_code == 2 and "--executor ray --workers N" in result.output


def test_on_pocket_the_judges_say_where_a_picture_is(tmp_path):
    """Renders of the three places that are asked for: 1. Two of them exchanged: only the third is where it should be."""
    plan = load_section(
        Comparison, None, {"model.name": "pocket", "subjects": "wooden_pot", "arms": {"lora": {}}, "limit": 3}
    )
    studio = ComparisonRunner(plan, tmp_path)
    job = studio.jobs()[0]
    places = [
        prompt.removeprefix("a photo of a {token} {class_word} ") for prompt in job.protocol.prompts.subject
    ]
    values, _ = render([sample_scene(seed, kind="mug", setting=place) for seed, place in enumerate(places)])
    pixels = (values * 255).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
    for order, share in (((0, 1, 2), 1.0), ((1, 0, 2), 1 / 3)):
        for number, index in enumerate(order):
            Image.fromarray(pixels[index]).save(tmp_path / f"{number}.png")
        assert place_scores(studio.base.name, job.protocol, tmp_path) == {"place": pytest.approx(share)}


def test_pictures_that_are_no_numbers_are_a_finding_of_their_scale(plan, tmp_path, monkeypatch):
    """The other scale of the same adapter has its cell."""

    def scored(pipe, *arguments, **named):
        if any(adapter.scale > 1 for adapter in loaded_adapters(pipe)):
            raise NonFinitePicture("The picture is not finite.")
        return score_adapter(pipe, *arguments, **named)

    score_adapter = comparison_runner.score_adapter
    monkeypatch.setattr(comparison_runner, "score_adapter", scored)
    update = {"scales": [1.0, 9.0], "checkpoints": [], "subjects": str(Path(plan.subjects) / "cat9")}
    outcome = compare(plan.only(["lora"]).model_copy(update=update), tmp_path)
    assert outcome.missing == [] and outcome.results["arms"]["lora"]["scale"] == 1.0
    assert outcome.results["failed"] == ["cat9, lora, seed 0: The picture is not finite."]


def test_a_cell_that_is_not_whole_is_missing(plan, done, tmp_path, monkeypatch):
    shutil.copytree(done.folder / "cells", tmp_path / "cells")
    file = next((tmp_path / "cells").glob("ball3-base*"))
    file.write_text(file.read_text()[:50])
    monkeypatch.setattr(ComparisonRunner, "work", lambda self, job: None)
    assert compare(plan, tmp_path).missing == ["ball3, base, seed 0, 0 steps at scale 1"]


def test_a_cell_is_found_whatever_an_arm_is_called(plan, done):
    renamed = {"nothing" if arm == "base" else f"my {arm}": given for arm, given in plan.arms.items()}
    studio = ComparisonRunner(plan.model_copy(update={"arms": renamed, "reference": "nothing"}), done.folder)
    assert not any(studio.made.missing_points(job) for job in studio.jobs())
    assert {studio.made.read(job, job.end)["arm"] for job in studio.jobs()} == set(renamed)
    travelled = pickle.loads(pickle.dumps(studio.jobs()))  # to a worker on another machine
    assert [job.cells for job in travelled] == [job.cells for job in studio.jobs()]
    assert [job.settings for job in travelled] == [job.settings for job in studio.jobs()]


def test_a_fresh_subject_is_the_same_on_every_processor():
    """Marks are placed by torch, whose last digits differ between processors; a digit that counts still counts."""
    from coeffdiff.evaluation.comparison_subjects import _rounded
    from coeffdiff.pocket.world.subjects import fresh_subject

    subject = fresh_subject(103)
    name = next(iter(subject.shape))

    def moved(by):
        return dataclasses.replace(subject, shape={**subject.shape, name: round(subject.shape[name], 4) + by})

    assert repr(_rounded(moved(1e-7))) == repr(_rounded(moved(0.0)))
    assert repr(_rounded(moved(1e-3))) != repr(_rounded(moved(0.0)))
