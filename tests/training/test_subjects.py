"""Several subjects in one run: exact to resume and to divide, scored one by one, and one adapter that knows all."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest
import test_loop
import torch
from accelerate import PartialState
from forking import fork_ranks
from PIL import Image
from safetensors.torch import load_file, save_file
from test_loop import WORKER, assert_close, assert_same, logged
from typer.testing import CliRunner

from coeffdiff import load_adapter
from coeffdiff.cli.root import app
from coeffdiff.config.loading import load_settings
from coeffdiff.config.schema import ModelSettings
from coeffdiff.config.subjects_file import settings_of_subjects
from coeffdiff.data.subjects import captions_of, prompts_of, read_subjects
from coeffdiff.errors import AdapterError, ConfigError, PhotoError, ResumeError
from coeffdiff.evaluation.evaluate import evaluate
from coeffdiff.hosts.kohya import export_kohya
from coeffdiff.hosts.merging import merge_adapters
from coeffdiff.method.adapter_file import read_header
from coeffdiff.method.adapter_header import AdapterHeader
from coeffdiff.method.adapter_paths import EMBEDS_FILE
from coeffdiff.models.finding import find_backbone
from coeffdiff.models.loading import load_pipeline
from coeffdiff.preflight.check import check
from coeffdiff.sampling.generation import generate
from coeffdiff.sampling.options import Options, Request
from coeffdiff.training import loop
from coeffdiff.training.refusals import refuse_early
from coeffdiff.training.resolve import resolve
from coeffdiff.training.resuming import settings_to_resume
from coeffdiff.training.run_folder import RunFolder

micro_folder, here = test_loop.micro_folder, test_loop.here
LEARNED = {"method.kind": "lora", "subject.learn_token": True, "method.token.vectors": 2}
SUBJECTS = """
- {images: photos, token: sks, class_word: ball, prior_images: class}
- {images: cubes, token: zwx, class_word: cube, prior_images: cubes-class}
"""


@pytest.fixture(autouse=True)
def subjects(here, tmp_path):
    """Beside the three balls a cube of one photo, with a mask and a caption that names both; pictures of cubes."""
    for folder, colours in (("cubes", ["navy"]), ("cubes-class", ["olive", "teal"])):
        (tmp_path / folder).mkdir()
        for number, colour in enumerate(colours):
            Image.new("RGB", (64, 64), colour).save(tmp_path / folder / f"{number}.png")
    Image.new("L", (64, 64), "white").save(tmp_path / "cubes" / "0.mask.png")
    (tmp_path / "cubes" / "0.txt").write_text("a photo of <V2> cube beside <V1> ball")
    (tmp_path / "subjects.yaml").write_text(SUBJECTS)


def settings_for(model: Path, output: str, **values):
    values = {
        "model.name": str(model),
        "output": output,
        "training.steps": 4,
        "training.batch_size": 2,
        "method.kind": "coeff+lora",
        "method.lora.rank": 3,
        "method.lora.learning_rate": 1e-3,
        "prior.weight": 0.5,
        "validation.prompts": [],
        **values,
    }
    return load_settings(None, settings_of_subjects(Path("subjects.yaml")) | values)


def test_a_run_with_moved_photos_resumes_exactly(micro_folder):
    """4 steps against 2 + 2, with all that a subject can have of its own, its folders elsewhere in between; and
    subjects whose photos have changed places are other subjects."""
    loop.train(settings_for(micro_folder, "whole", **LEARNED))
    loop.train(settings_for(micro_folder, "broken", **LEARNED, **{"training.steps": 2}))
    run = RunFolder(Path("broken"))
    shutil.move("cubes", "moved")
    with pytest.raises(ResumeError, match=r"the photos of zwx from .*Name .* with --subjects FILE"):
        loop.train(settings_to_resume(run, None, {"training.steps": 4}, []), resume=run)
    text = SUBJECTS.replace("images: cubes,", "images: moved,")
    Path("subjects.yaml").write_text(text)
    swapped = text.replace("photos", "@").replace("moved", "photos").replace("@", "moved")
    Path("swapped.yaml").write_text(swapped)
    asked = settings_of_subjects(Path("swapped.yaml")) | {"training.steps": 4}
    with pytest.raises(ResumeError, match="photos, masks or captions have changed"):
        loop.train(settings_to_resume(run, None, asked, []), resume=run)
    asked = settings_of_subjects(Path("subjects.yaml")) | {"training.steps": 4}
    loop.train(settings_to_resume(run, None, asked, []), resume=run)
    assert_same("whole", "broken")
    renamed = settings_of_subjects(Path("subjects.yaml"))
    renamed["subjects"][0]["token"] = "other"
    with pytest.raises(ResumeError, match="began with other settings: subjects was"):
        settings_to_resume(run, None, renamed, [])


def test_the_work_may_be_divided(micro_folder):
    """A batch of 4, 1 x 4, and two gloo ranks of 2 train one adapter, up to rounding."""
    loop.train(settings_for(micro_folder, "four", **{"training.batch_size": 4}))
    split = {"training.batch_size": 1, "training.accumulate": 4}
    loop.train(settings_for(micro_folder, "split", **split))
    assert_close("four", "split")
    sets = {"training.batch_size": 2, "method.lora.rank": 3, "validation.prompts": "[]", "prior.weight": 0.5}
    sets |= {"method.kind": "coeff+lora", "method.lora.learning_rate": 1e-3}
    more = [part for name, value in sets.items() for part in ("--set", f"{name}={value}")]
    line = ("train", "--model", str(micro_folder), "--subjects", "subjects.yaml", "--steps", "4", *more)
    done, _ = fork_ranks(WORKER, "two.pt", *line, "--output", "two")
    assert done.returncode == 0, done.stderr
    assert "photos   3 in" in done.stderr and "photos   1 in" in done.stderr
    assert_close("four", "two")


def test_each_subject_is_scored_and_the_best_adapter_is_that_of_their_mean(
    micro_folder, vit, clip, whole_runs
):
    """A prompt of both is drawn once and scored for neither; RUN@best is the highest mean."""
    values = {"validation.prompts": ["a photo of {token} {class_word}", "<V1> beside <V2>"]}
    values |= {"validation.every": 2, "validation.seeds": [7], "validation.steps": 1, "validation.dino": vit}
    values |= {"validation.clip": clip, "validation.keep": "best", "prior.weight": 0}
    Path("subjects.yaml").write_text(re.sub(r", prior_images: [\w-]+", "", SUBJECTS))
    loop.train(settings_for(micro_folder, "run", **values))
    lines = [line["scores"] for line in logged("run") if "scores" in line]
    assert len(lines) == 2
    for scores in lines:
        own = [scores[f"{token}/score"] for token in ("sks", "zwx")]
        assert scores["score"] == pytest.approx(sum(own) / 2, abs=1e-6)
        # Only cubes have masks, so there is no mean of what masks leave
        assert "zwx/dino_masked" in scores and "dino_masked" not in scores
    pictures = [file.name for file in sorted(Path("run/samples/step-000004").glob("0*.png"))]
    assert [name.partition("-")[2].partition("-seed")[0] for name in pictures] == [
        "a-photo-of-sks-ball",
        "a-photo-of-zwx-cube",
        "sks-beside-zwx",
    ]
    means = {2 * (number + 1): scores["score"] for number, scores in enumerate(lines)}
    assert read_header(Path("run/adapter")).trained_steps == max(means, key=lambda step: (means[step], -step))
    card = Path("run/adapter/README.md").read_text()
    assert "the subjects are called **sks ball** and **zwx cube**" in card and "zwx's score" in card


def test_without_a_prompt_of_its_own_a_subject_cannot_be_scored(micro_folder, vit):
    values = {"validation.prompts": ["<V1>", "<V1> beside <V2>"], "validation.dino": vit}
    settings = settings_for(micro_folder, "run", **values)
    with pytest.raises(ConfigError, match="No validation prompt names zwx alone"):
        loop.train(settings)
    assert not Path("run").exists()


def test_the_adapter_knows_all_of_its_words(micro_folder):
    """Its header, and what older readers take of it; merged and exported; sample's placeholders; evaluate."""
    loop.train(settings_for(micro_folder, "run", **{"training.steps": 1}))
    loop.train(
        load_settings(
            None,
            {"model.name": str(micro_folder), "output": "third", "subject.images": "class"}
            | {"subject.token": "qqq", "training.steps": 1, "validation.prompts": []},
        )
    )
    header = read_header(Path("run/adapter"))
    assert header.tokens == ("sks", "zwx") and header.calls == ("sks ball", "zwx cube")
    older = AdapterHeader.model_validate(header.model_dump(exclude={"subjects"}))
    assert (older.format_version, older.token) == (1, "sks")  # words that were not learned need no reader
    merged = merge_adapters([("run", 1.0), ("third", 0.5)], Path("merged"))
    assert merged.tokens == ("sks", "zwx", "qqq") and merged.subjects == ()
    export_kohya("run", Path("run.safetensors"))
    assert b"sks ball, zwx cube" in Path("run.safetensors").read_bytes()
    done = evaluate([("run", None)], Path("scored"), pictures=1, drift_pictures=0, limit=1,
                    options=Options(steps=1, width=64, height=64), dino="pocket-dino", clip="pocket-clip")  # fmt: skip
    assert [(run["run"], run["subject"]) for run in done.results["runs"]] == [
        ("run (sks)", "photos"),
        ("run (zwx)", "cubes"),
    ]


def test_learned_tokens_are_loaded_with_their_own_rows(micro_folder):
    """Each word changes pictures by its own vectors: with the rows of one set to zeros the other draws as before;
    removed, both are ordinary words. An older reader would know the first alone, so the format is a new one."""
    values = LEARNED | {"method.kind": "token", "method.token.learning_rate": 0.3}
    loop.train(settings_for(micro_folder, "run", **values))
    header, rows = read_header(Path("run/adapter")), load_file(f"run/adapter/{EMBEDS_FILE}")
    assert header.format_version == 4 and header.vectors == 2
    assert {key: len(tensor) for key, tensor in rows.items()} == dict.fromkeys(
        ("clip_l", "clip_g", "clip_l.1", "clip_g.1"), 2
    )
    pipe = load_pipeline(find_backbone(ModelSettings(name=str(micro_folder))), dtype=torch.float32)

    def pictures():
        options = Options(steps=1, width=64, height=64)
        requests = [Request(f"a {word}", 0) for word in ("sks", "zwx", "ball")]
        return [image.tobytes() for _, image in generate(pipe, requests, options)]

    bare = pictures()
    adapter = load_adapter(pipe, "run")
    ball, cube, other = pictures()
    assert ball != bare[0] and cube != bare[1] and other == bare[2]
    adapter.set_scale(0)
    assert pictures() == bare
    adapter.remove()
    assert pictures() == bare
    damaged = {key: tensor for key, tensor in rows.items() if key != "clip_g.1"}
    save_file(damaged, f"run/adapter/{EMBEDS_FILE}")
    with pytest.raises(AdapterError, match=r"does not hold 2 vectors each for .*clip_l.1 and clip_g.1"):
        load_adapter(pipe, "run")
    assert pictures() == bare


def test_photos_captions_and_prompts_know_their_subject():
    """<V1> and <V2> are the tokens, <V> the subject's own; a number beyond them is named."""
    settings = load_settings(None, settings_of_subjects(Path("subjects.yaml")) | {"prior.weight": 1})
    photos = read_subjects(settings).photos
    assert [photo.subject for photo in photos] == [0, 0, 0, 1]
    assert captions_of(settings.each_subject, photos)[2:] == [
        ("a photo of sks ball",),
        ("a photo of zwx cube beside sks ball",),
    ]
    assert prompts_of(settings.each_subject, ["<V>!", "<V1> and <V2>"]) == ["sks!", "zwx!", "sks and zwx"]
    with pytest.raises(ConfigError, match=r"There is no <V3> .*<V1> is sks, <V2> is zwx"):
        prompts_of(settings.each_subject, ["<V3>"])


def test_photos_of_two_subjects(tmp_path):
    """One folder for both is refused, and one photo in both is said; an empty folder as ever."""
    shutil.copy("photos/0.png", "cubes/same.png")
    settings = load_settings(None, settings_of_subjects(Path("subjects.yaml")) | {"prior.weight": 1})
    [note] = read_subjects(settings).notes
    assert note.startswith("same.png is a photo of sks and of zwx")
    for folder, sentence in (("photos", "sks and zwx have one folder of photos"), ("empty", "no photos in")):
        (tmp_path / "empty").mkdir(exist_ok=True)
        Path("subjects.yaml").write_text(SUBJECTS.replace("images: cubes,", f"images: {folder},"))
        settings = load_settings(None, settings_of_subjects(Path("subjects.yaml")) | {"prior.weight": 1})
        with pytest.raises(PhotoError, match=sentence):
            read_subjects(settings)


def test_pictures_of_classes_need_a_weight_and_class_words(micro_folder):
    settings = settings_for(micro_folder, "run", **{"prior.weight": 0})
    with pytest.raises(ConfigError, match=r"prior_images have no effect at prior.weight 0"):
        refuse_early(settings, read_subjects(settings), find_backbone(settings.model))
    Path("subjects.yaml").write_text(SUBJECTS.replace(", class_word: cube", ""))
    settings = settings_for(micro_folder, "run")
    photos = read_subjects(settings)
    with pytest.raises(ConfigError, match="there is none for zwx: add it, or leave it at 0"):
        refuse_early(settings, photos, find_backbone(settings.model))


def test_check_looks_at_each_subject(micro_folder):
    """Its photos are named with their folders, and a missing class word with its token."""
    Path("subjects.yaml").write_text(re.sub(r"(, class_word: cube)?, prior_images: [\w-]+", "", SUBJECTS))
    settings = load_settings(
        None, settings_of_subjects(Path("subjects.yaml")) | {"model.name": str(micro_folder)}
    )
    base = find_backbone(settings.model)
    settings, _ = resolve(settings, base, PartialState())
    report = check(settings, read_subjects(settings), base, torch.device("cpu"), budget_seconds=0)
    names = ["photos/0.png", "photos/1.png", "photos/2.png", "cubes/0.png"]
    assert [photo.name for photo in report.photos] == names
    said = [finding.sentence for finding in report.findings]
    assert any(sentence.startswith("zwx: without a class word") for sentence in said)
    assert any(sentence.startswith("sks is read as") for sentence in said)
    done = CliRunner().invoke(app, ["check", "--subjects", "subjects.yaml", "--token", "sks"])
    assert done.exit_code == 2 and "leave --token out" in done.stderr
