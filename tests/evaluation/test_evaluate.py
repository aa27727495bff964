"""Evaluation: the same numbers by hand in numpy, from one process or two; DreamBooth's layout; the page."""

from __future__ import annotations

import copy
import csv
import html.parser
import json
from dataclasses import replace
from pathlib import Path

import accelerate
import numpy as np
import pytest
import torch
from forking import fork_ranks
from PIL import Image
from typer.testing import CliRunner

from coeffdiff.cli.root import app
from coeffdiff.config.fields import EVALUATION_FIRST_SEED
from coeffdiff.config.schema import Settings
from coeffdiff.config.tree import save_settings, with_values
from coeffdiff.data.photos import read_photos
from coeffdiff.errors import ConfigError, OutOfMemory, PhotoError
from coeffdiff.evaluation import evaluate as scoring_module
from coeffdiff.evaluation.evaluate import evaluate
from coeffdiff.evaluation.facts import device_name
from coeffdiff.evaluation.prompts import LISTING, Prompts
from coeffdiff.evaluation.protocol import Protocol, Subject, asked_for
from coeffdiff.evaluation.report import render_report
from coeffdiff.evaluation.scoring import score_adapter
from coeffdiff.hosts.diffusers import load_adapter, save_adapter
from coeffdiff.hosts.unet import inject
from coeffdiff.method.adapter_header import AdapterHeader
from coeffdiff.metrics.encoders import Encoders, load_clip, load_dino
from coeffdiff.models.loading import load_pipeline
from coeffdiff.pocket.model import save_random
from coeffdiff.sampling import generation
from coeffdiff.sampling.options import Options, Request
from coeffdiff.utils.locks import try_lock
from coeffdiff.utils.png import read_recipe

HOSTILE = "a {token} <script>alert(1)</script> \"><img src=x onerror='alert(2)'> &amp; ball"
QUICK = ["--steps", "2", "-n", "2", "--drift-pictures", "1", "--batch-size", "3"]


def write_photos(folder: Path, count: int, masks: int) -> None:
    """Noise of unequal sizes; the first `masks` have one, white in the middle."""
    folder.mkdir(parents=True)
    for number in range(count):
        lot = np.random.default_rng(number)
        Image.fromarray(lot.integers(0, 255, (40 + number, 50, 3), dtype=np.uint8)).save(
            folder / f"{number}.png"
        )
        if number < masks:
            mask = np.zeros((40 + number, 50), np.uint8)
            mask[10:30, 10:40] = 255
            Image.fromarray(mask).save(folder / f"{number}.mask.png")


@pytest.fixture(scope="module")
def studio(built_micro, tmp_path_factory) -> Path:
    """A data set in DreamBooth's layout, the tiny model, and a run on one of its subjects, of large random alphas."""
    folder = tmp_path_factory.mktemp("studio")
    save_random("micro", folder / "model")
    write_photos(folder / "data" / "ball3", 3, masks=2)
    write_photos(folder / "data" / "cat9", 2, masks=0)
    (folder / "data" / LISTING).write_text(
        "subject_name,class\nball3,ball\ncat9,cat\n\nObject Prompts\n"
        + "".join(
            f"'a {{0}} {{1}} {where}'.format(unique_token, class_token),\n" for where in ("at sea", "on ice")
        )
        + "Live Subject Prompts\n'a {0} {1} asleep'.format(unique_token, class_token)\n"
    )
    unet, generator = copy.deepcopy(built_micro.unet), torch.Generator().manual_seed(3)
    layers = inject(unet)
    with torch.no_grad():
        for c in layers.values():
            c.alpha.copy_(torch.randn(c.alpha.shape, generator=generator))
    header = AdapterHeader(
        format_version=1, kind="coeff", base_model=str(folder / "model"), token="sks", class_word="ball",
        heads={name: c.heads for name, c in layers.items()}, trained_steps=7, resolution=64,
    )  # fmt: skip
    run = folder / "runs" / "ball"
    save_adapter(run / "adapter", unet, header)
    settings = with_values(
        Settings(), {"subject.images": str(folder / "data" / "ball3"), "subject.token": "sks"}
    )
    save_settings(settings, run / "config.yaml")
    lines = [{"step": step, "loss": 1 / step, "alpha": step / 9, "lr": [0.1]} for step in range(1, 8)]
    (run / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


@pytest.fixture(scope="module")
def encoders(vit, clip) -> Encoders:
    return Encoders(load_dino(vit), load_clip(clip))


@pytest.fixture(scope="module")
def command(vit, clip) -> list[str]:
    return ["evaluate", "--dino", vit, "--clip", clip, *QUICK]


@pytest.fixture(scope="module")
def evaluated(studio, command, tmp_path_factory):
    """The run at its own scale and at 0, with one of its prompts hostile; the folder and what was printed."""
    folder = tmp_path_factory.mktemp("evaluated")
    (folder / "prompts.txt").write_text(f"{HOSTILE}\na {{token}} ball on ice\n")
    run = str(studio / "runs" / "ball")
    arguments = [
        *command,
        run,
        f"{run}:0",
        "--prompts",
        str(folder / "prompts.txt"),
        "--output",
        str(folder / "out"),
    ]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    return folder / "out", result.output


def subject_of(studio: Path, name: str = "ball3") -> Subject:
    photos = read_photos(studio / "data" / name).photos
    return Subject(name, photos, [photo.open_mask() for photo in photos], "sks", "ball")


PROTOCOL = Protocol(
    Prompts("two", ("a {token} {class_word} at sea", "an {token} {class_word}, old"), ("a red house",)),
    pictures=2,
    drift_pictures=1,
    options=Options(steps=2, batch_size=3),
)


def test_seeds_are_evaluations_own_and_never_shared_by_two_prompts():
    """2 prompts x 2 pictures, then 2 of the class and 1 unrelated, one each."""
    asked = asked_for(PROTOCOL, "sks", "ball")
    first = EVALUATION_FIRST_SEED
    assert [(a.group, a.prompt, a.seed - first) for a in asked] == [
        ("subject", "a sks ball at sea", 0),
        ("subject", "a sks ball at sea", 1),
        ("subject", "an sks ball, old", 2),
        ("subject", "an sks ball, old", 3),
        ("class", "a ball at sea", 0),
        ("class", "an ball, old", 1),
        ("unrelated", "a red house", 0),
    ]
    bare = asked_for(PROTOCOL, "sks", "ball", known=False)
    assert [(a.prompt, a.seed) for a in bare[:2]] == [("a ball at sea", first), ("a ball at sea", first + 1)]
    assert {a.group for a in bare} == {"subject"}
    assert [a.group for a in asked_for(PROTOCOL, "sks", None)] == ["subject"] * 4 + ["unrelated"]
    with pytest.raises(ConfigError, match=r"begin at 100000.*validation's; 42 is one of them"):
        replace(PROTOCOL, first_seed=42)
    with pytest.raises(ConfigError, match="at least 1 picture"):
        replace(PROTOCOL, pictures=0)


def test_scores_are_those_of_the_definitions_in_numpy(studio, encoders, micro_pipeline, tmp_path):
    """From the PNGs and nothing else but the encoders' features of one picture or text at a time."""
    load_adapter(micro_pipeline, studio / "runs" / "ball")
    singly = replace(
        PROTOCOL, options=replace(PROTOCOL.options, batch_size=1)
    )  # so that they can be made again
    scored = score_adapter(micro_pipeline, subject_of(studio), singly, encoders, folder=tmp_path).data

    def looked(kind, image):
        return getattr(encoders, kind).features([image])[0].double().numpy()

    files = sorted(tmp_path.iterdir())
    assert [read_recipe(file)["seed"] for file in files] == [100_000, 100_001, 100_002, 100_003]
    pictures = [Image.open(file) for file in files]
    photos = [Image.open(studio / "data" / "ball3" / f"{n}.png") for n in range(3)]
    cut = []
    for n in range(2):
        values, mask = np.array(photos[n]), np.array(Image.open(studio / "data" / "ball3" / f"{n}.mask.png"))
        values[mask == 0] = 128
        cut.append(Image.fromarray(values))
    expected = {}
    for kind, name in (("dino", "dino"), ("clip", "clip_i")):
        mine = np.stack([looked(kind, p) for p in pictures])
        for suffix, references in (("", photos), ("_masked", cut)):
            theirs = np.stack([looked(kind, p) for p in references])
            expected[name + suffix] = np.mean([[a @ b for b in theirs] for a in mine])
        if kind == "dino":
            expected["diversity"] = 1 - (mine[0] @ mine[1] + mine[2] @ mine[3]) / 2
        else:
            texts = encoders.clip.text_features(["a ball at sea", "an ball, old"]).double().numpy()
            expected["clip_t"] = np.mean([mine[i] @ texts[i // 2] for i in range(4)])
    asked = [("a ball at sea", 100_000), ("an ball, old", 100_001), ("a red house", 100_000)]
    moved = []
    for prompt, seed in asked:
        both = []
        for scale in (1.0, 0.0):
            request = Request(prompt, seed, scale)
            both.append(next(generation.generate(micro_pipeline, [request], singly.options))[1])
        moved.append(1 - looked("dino", both[0]) @ looked("dino", both[1]))
    expected |= {
        "drift": np.mean(moved), "drift_class": np.mean(moved[:2]), "drift_unrelated": moved[2],
    }  # fmt: skip
    assert scored["scores"].keys() == expected.keys()
    for name, value in expected.items():
        assert scored["scores"][name] == pytest.approx(value, abs=2e-6), name
    assert min(moved) > 1e-3
    assert [p["dino"] for p in scored["pictures"]] == pytest.approx(
        [np.mean([looked("dino", p) @ looked("dino", photo) for photo in photos]) for p in pictures], abs=2e-6
    )
    among = [looked("dino", photos[a]) @ looked("dino", photos[b]) for a, b in ((0, 1), (0, 2), (1, 2))]
    assert scored["photos"]["dino"] == pytest.approx(np.mean(among), abs=2e-6)
    assert (scored["photos"]["count"], scored["photos"]["with_masks"]) == (3, 2)


def test_nothing_drifts_at_scale_zero_and_the_base_is_made_once(
    studio, encoders, micro_pipeline, monkeypatch
):
    """At scale 0 the pictures are the base model's, so drift is 0; what `base` holds is not made again."""
    adapter = load_adapter(micro_pipeline, studio / "runs" / "ball", 0.0)
    base, made = {}, []
    generate = generation.generate
    monkeypatch.setattr(
        "coeffdiff.evaluation.scoring.generate",
        lambda pipe, wanted, *a, **k: made.append(len(wanted)) or generate(pipe, wanted, *a, **k),
    )
    first = score_adapter(micro_pipeline, subject_of(studio), PROTOCOL, encoders, base=base).data
    assert first["scores"]["drift"] == pytest.approx(0, abs=2e-6)
    assert made == [7, 3] and len(base) == 3
    adapter.set_scale(1.0)
    second = score_adapter(micro_pipeline, subject_of(studio), PROTOCOL, encoders, base=base).data
    assert made == [7, 3, 7] and adapter.scale == 1.0
    assert second["scores"]["drift"] > 1e-3
    assert second["photos"] == first["photos"]


def test_the_bare_model_is_asked_without_the_token(studio, encoders, micro_pipeline):
    """No adapter, no drift; masks in none of the photos leave out what needs them; encoders may be missing."""
    subject = subject_of(studio, "cat9")
    data = score_adapter(micro_pipeline, subject, PROTOCOL, Encoders(None, encoders.clip)).data
    assert list(data["scores"]) == ["clip_i", "clip_t", "diversity"]
    assert data["drift"] == [] and data["pictures"][0]["prompt"] == "a ball at sea"
    assert data["photos"]["with_masks"] == 0


def test_a_gpu_is_named(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: f"card {device.index}")
    assert device_name(torch.device("cuda", 1)) == "card 1"
    monkeypatch.setattr(Path, "read_text", lambda self: "processor\t: 0\nmodel name\t: Some CPU 7\n")
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    assert device_name(torch.device("cpu")) == "CPU (Some CPU 7), 3 threads"


def test_the_folder_holds_pictures_numbers_a_table_and_a_page(evaluated):
    """Two runs, 4 pictures each; the CSV has their scores; the one at scale 0 does not drift."""
    folder, printed = evaluated
    names = ("evaluation.csv", "evaluation.json", "pictures", "report.html")
    assert tuple(sorted(p.name for p in folder.iterdir())) == names
    assert sorted(p.name for p in (folder / "pictures").iterdir()) == ["01-ball", "02-ball"]
    assert all(len(list(p.iterdir())) == 4 for p in (folder / "pictures").iterdir())
    results = json.loads((folder / "evaluation.json").read_text())
    own, off = results["runs"]
    assert (own["scale"], off["scale"]) == (1.0, 0.0)
    assert own["scores"]["drift"] > 1e-3 and off["scores"]["drift"] == pytest.approx(0, abs=2e-6)
    assert len(own["pictures"]) == 4 and own["prompts"] == "prompts.txt"
    assert results["protocol"]["first_seed"] == EVALUATION_FIRST_SEED
    rows = list(csv.DictReader((folder / "evaluation.csv").open()))
    assert [float(row["dino"]) for row in rows] == [own["scores"]["dino"], off["scores"]["dino"]]
    assert [Path(row["run"]).name for row in rows] == ["ball", "ball:0"]
    assert rows[0]["pictures"] == "4" and rows[0]["class_word"] == "ball"
    assert f"{own['scores']['clip_t']:.3f}" in printed and "mean" in printed


class Page(html.parser.HTMLParser):
    """Tags with their attributes, what is open, and all text outside of style."""

    VOID = frozenset(("meta", "img", "br"))

    def __init__(self, text):
        super().__init__()
        self.tags, self.open, self.text = [], [], ""
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if "style" not in self.open:
            self.text += data


def test_the_page_is_well_formed_self_contained_and_hostile_prompts_stay_text(evaluated):
    folder, _ = evaluated
    page = Page((folder / "report.html").read_text())
    assert page.open == []
    tags = {tag for tag, _ in page.tags}
    assert "script" not in tags and "table" in tags
    assert HOSTILE.replace("{token}", "sks") in page.text
    images = [attributes for tag, attributes in page.tags if tag == "img"]
    # For each run 3 photos, 4 pictures, both of each pair for drift, the curves and the heat maps
    drifts = json.loads((folder / "evaluation.json").read_text())["runs"][0]["drift"]
    assert len(images) == 2 * (3 + 4 + 2 * len(drifts) + 2)
    for attributes in images:
        assert attributes["src"].startswith("data:image/jpeg;base64,") and attributes["alt"]
        assert not {name for name in attributes if name.startswith("on")}
    assert all(not a.get("href", "#").startswith(("http", "//")) for _, a in page.tags)
    alts = [a["alt"] for a in images]
    assert alts.count(HOSTILE.replace("{token}", "sks")) == 4
    assert any(tag == "meta" and a.get("name") == "viewport" for tag, a in page.tags)


def test_a_page_without_curves_maps_and_drift_is_one_too(studio, evaluated):
    """A LoRA from a bare adapter folder, without clip, class word and drift."""
    from coeffdiff.evaluation import report

    folder, _ = evaluated
    results = json.loads((folder / "evaluation.json").read_text())
    data = results["runs"][0] | {"drift": [], "class_word": None, "run": "<b>", "scores": {"dino": 0.5}}
    data["photos"] = {"count": 1, "with_masks": 0}
    thumbnails = {f"subject-{i}": b"x" for i in range(4)}
    one = report.RunPage(data, thumbnails, None, studio / "runs" / "ball" / "adapter", [b"x"])
    page = Page(render_report(results, [one]))
    assert (
        page.open == []
        and "<b>" in page.text
        and "details" in {t for t, _ in page.tags}
        and "base model left" not in page.text
    )


def test_two_processes_come_to_the_numbers_of_one(studio, command, tmp_path):
    """Pictures and scores are equal but for rounding: on some processors a product over memory that is not aligned is
    rounded otherwise, and where a process has its tensors is chance."""
    arguments = [*command, str(studio / "runs" / "ball"), "--prompts", "dreambooth", "--output"]
    one = CliRunner().invoke(app, [*arguments, str(tmp_path / "one")])
    assert one.exit_code == 0, one.output
    ranks = fork_ranks("-m", "coeffdiff", *arguments, str(tmp_path / "two"))
    assert [rank.returncode for rank in ranks] == [0, 0], ranks
    assert ranks[1].stdout == "" and "in 2 processes" in ranks[0].stderr
    first, second = (json.loads((tmp_path / name / "evaluation.json").read_text()) for name in ("one", "two"))
    assert (first["processes"], second["processes"]) == (1, 2)
    for results in (first, second):
        results["runs"][0].pop("seconds")
    assert_near(first["runs"], second["runs"])
    assert first["runs"][0]["prompts"] == "dreambooth, object" and first["runs"][0]["subject"] == "ball3"
    names = sorted(p.name for p in (tmp_path / "one" / "pictures" / "01-ball").iterdir())
    assert len(names) == 4
    for name in names:
        both = [
            np.asarray(Image.open(tmp_path / of / "pictures" / "01-ball" / name)) for of in ("one", "two")
        ]
        assert np.abs(np.subtract(*both, dtype=int)).max() <= 2


def assert_near(one, other):
    """Equal trees, but for the last digits of numbers."""
    if isinstance(one, dict):
        assert one.keys() == other.keys()
        for name in one:
            assert_near(one[name], other[name])
    elif isinstance(one, list):
        assert len(one) == len(other)
        for pair in zip(one, other, strict=True):
            assert_near(*pair)
    else:
        assert one == (pytest.approx(other, abs=1e-4) if isinstance(one, float) else other)


def test_mistakes_are_one_sentence_and_nothing_is_written(studio, vit, clip, tmp_path):
    run, adapter = studio / "runs" / "ball", studio / "runs" / "ball" / "adapter"
    free, scorers = tmp_path / "out", {"dino": vit, "clip": clip}
    moved = tmp_path / "run"
    (moved / "adapter").mkdir(parents=True)
    (moved / "adapter" / "coeff.safetensors").write_bytes((adapter / "coeff.safetensors").read_bytes())
    with pytest.raises(
        ConfigError, match=r"run does not say which photos it was trained on; name them with --images"
    ):
        evaluate([(str(moved), None)], free, **scorers)
    settings = with_values(Settings(), {"subject.images": str(tmp_path / "gone"), "subject.token": "sks"})
    save_settings(settings, moved / "config.yaml")
    with pytest.raises(PhotoError, match=r"are no longer in .*gone; name their folder with --images"):
        evaluate([(str(moved), None)], free, **scorers)
    with pytest.raises(ConfigError, match=r"holds the subjects ball3, cat9, and none of them.*'gone'"):
        evaluate([(str(moved), None)], free, images=studio / "data", **scorers)
    with pytest.raises(ConfigError, match="nothing to evaluate"):
        evaluate([], free, **scorers)
    with pytest.raises(ConfigError, match="not empty; name another --output"):
        evaluate([(str(run), None)], studio / "data", **scorers)
    with pytest.raises(ConfigError, match="seeds of evaluation begin at 100000"):
        evaluate([(str(run), None)], free, first_seed=7, **scorers)
    result = CliRunner().invoke(app, ["evaluate", str(tmp_path / "nowhere")])
    assert result.exit_code == 2 and "AdapterError: There is no adapter" in result.output
    assert not free.exists()


def test_two_at_once_have_folders_of_their_own(studio, vit, clip, tmp_path, monkeypatch):
    """Each takes its number before it loads the base model; one that another command writes to is refused."""
    monkeypatch.chdir(tmp_path)
    asked = {"drift_pictures": 0, "options": Options(steps=2), "dino": vit, "clip": clip}
    run, taken = [(str(studio / "runs" / "ball"), None)], []

    def stop(*_: object) -> None:
        taken.append([place.name for place in Path("evaluations").iterdir()])
        if len(taken) < 2:
            evaluate(run, **asked)
        raise KeyboardInterrupt

    monkeypatch.setattr(scoring_module, "_score_group", stop)
    with pytest.raises(KeyboardInterrupt):
        evaluate(run, **asked)
    assert list(map(sorted, taken)) == [["001"], ["001", "002"]] and [*tmp_path.iterdir()] == []
    with try_lock(tmp_path), pytest.raises(ConfigError, match="Another command is at work in"):
        evaluate(run, tmp_path, **asked)
    assert len(taken) == 2


def test_adapters_follow_each_other_under_sequential_offload(studio, vit, clip, tmp_path, monkeypatch):
    """With the CPU as its GPU: two adapters one after the other have the scores that they have without offload."""
    real = accelerate.cpu_offload
    monkeypatch.setattr(
        accelerate, "cpu_offload", lambda m, _device, **more: real(m, torch.device("cpu"), **more)
    )
    for module in ("sampling.device", "evaluation.evaluate"):
        monkeypatch.setattr(f"coeffdiff.{module}.refuse_offload", lambda device, offload: None)
    (tmp_path / "prompts.txt").write_text("a {token} ball at sea\n")
    run = str(studio / "runs" / "ball")
    found = []
    for offload in ("none", "sequential"):
        results = evaluate(
            [(run, 1.0), (run, 0.5)],
            tmp_path / offload,
            prompts=str(tmp_path / "prompts.txt"),
            pictures=2,
            drift_pictures=1,
            options=Options(steps=2),
            offload=offload,
            dino=vit,
            clip=clip,
        ).results
        found.append([one["scores"] for one in results["runs"]])
    assert found[0] == found[1] and found[0][0] != found[0][1]


def test_out_of_memory_names_the_options_that_evaluate_has(studio, vit, clip, tmp_path, monkeypatch):
    """Not where the networks are lent, as by a batch, whose options have other names."""

    def full(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(scoring_module, "_score_candidate", full)
    asked = {"drift_pictures": 0, "options": Options(steps=2, batch_size=4), "dino": vit, "clip": clip}
    run = [(str(studio / "runs" / "ball"), None)]
    with pytest.raises(OutOfMemory, match="--batch-size 1"):
        evaluate(run, tmp_path / "own", **asked)
    with pytest.raises(torch.OutOfMemoryError):
        evaluate(run, tmp_path / "lent", load=load_pipeline, **asked)


def test_a_mask_that_cannot_be_read_is_named(tmp_path):
    write_photos(tmp_path / "p", 1, masks=1)
    (tmp_path / "p" / "0.mask.png").write_bytes(b"no picture")
    with pytest.raises(PhotoError, match=r"The mask .*0\.mask\.png cannot be used"):
        read_photos(tmp_path / "p")


def test_every_prompt_that_is_too_long_is_told_once(studio, command, tmp_path):
    """Whichever it is, and before anything is made: the output folder is taken."""
    long = " ".join(["snow"] * 90)
    (tmp_path / "prompts.txt").write_text(f"a {{token}} ball at sea\na {{token}} ball in {long}\n")
    run = str(studio / "runs" / "ball")
    arguments = [*command, run, "--prompts", str(tmp_path / "prompts.txt"), "--output", str(tmp_path)]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 2 and "is not empty" in result.output
    hints = [line for line in result.output.splitlines() if line.startswith("hint ")]
    assert len(hints) == len(set(hints)) > 0 and all("snow" in hint for hint in hints)
