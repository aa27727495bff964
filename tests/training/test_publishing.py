"""What `coeffdiff push` uploads, with which card; a Hub on localhost takes it, see hub_stand_in.py."""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path

import pytest
import torch
from hub_stand_in import Repo
from huggingface_hub import ModelCard
from PIL import Image
from safetensors.torch import save
from typer.testing import CliRunner

from coeffdiff.cli.root import app
from coeffdiff.config.loading import load_settings
from coeffdiff.hosts.hub.lookup import resolve_adapter
from coeffdiff.hosts.hub.upload import check_repo_id
from coeffdiff.method.adapter_file import pack_coefficients, read_coefficients
from coeffdiff.method.adapter_header import BaseHeader
from coeffdiff.method.adapter_paths import COEFF_FILE, EMBEDS_FILE, LORA_FILE
from coeffdiff.training.card import model_card
from coeffdiff.training.hub_card import hub_card
from coeffdiff.utils.png import save_png

PICTURES = {
    "001-ohwx.png": "a photo of ohwx mug on a beach",
    "002-ohwx.png": "ohwx mug: a *drawing*",
    "grid.png": None,
}
PUSHED = sorted([COEFF_FILE, LORA_FILE, "README.md", *PICTURES])


@pytest.fixture
def run(small_adapter, tmp_path) -> Path:
    """A finished run's folder: photos, a checkpoint and things that are nobody's business lie in it too."""
    folder = tmp_path / "run"
    shutil.copytree(small_adapter, folder / "adapter")
    for name, prompt in PICTURES.items():
        save_png(Image.new("RGB", (8, 8)), folder / "adapter" / name, {"prompt": prompt} if prompt else None)
    header, _ = read_coefficients(folder / "adapter")
    settings = load_settings(None, {"method.coeff.learning_rate": 1e-2, "method.lora.learning_rate": 1e-3})
    (folder / "adapter/README.md").write_text(model_card(header, settings, 0.25, PICTURES))
    (folder / "config.yaml").write_text("{}")
    (folder / "checkpoints/step-000007").mkdir(parents=True)
    (folder / "checkpoints/step-000007/optimizer.pt").write_bytes(b"x")
    for name in ("photo.jpg", "me.png", "notes.txt", "style.safetensors"):
        (folder / "adapter" / name).write_bytes(b"private")
    return folder


@pytest.fixture
def login(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_me")
    return monkeypatch


def push(*arguments: object):
    result = CliRunner().invoke(app, ["push", *map(str, arguments)])
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def refusal(*arguments: object) -> str:
    result = push(*arguments)
    assert result.exit_code == 2 and result.output.count("\n") == 1, result.output
    return result.output


def test_a_push_uploads_exactly_the_adapter_its_card_and_pictures(hub, login, run, small_adapter):
    """Private, in one commit; fetched again it is the same adapter, file by file."""
    result = push(run, "me/mug", "--json")
    assert result.exit_code == 0, result.output
    repo = hub.repos["me/mug"]
    told = json.loads(result.stdout)
    assert told | {"files": None} == {
        "url": f"{hub.endpoint}/me/mug", "commit": repo.refs["main"], "private": True, "files": None,
    }  # fmt: skip
    assert sorted(repo.files) == sorted(told["files"]) == PUSHED
    assert repo.private and repo.messages == ["ohwx: coeff+lora, 7 steps"]
    for name in (COEFF_FILE, LORA_FILE):
        assert repo.files[name] == (small_adapter / name).read_bytes()
    fetched = resolve_adapter("me/mug")
    assert read_coefficients(fetched)[0] == read_coefficients(small_adapter)[0]


def test_the_card_has_all_that_the_hub_shows(hub, login, run, tmp_path):
    """Read by huggingface_hub itself: front matter, widgets with the prompts of their pictures, and how to load it."""
    push(run, "me/mug", "--license", "apache-2.0")
    (tmp_path / "README.md").write_bytes(hub.repos["me/mug"].files["README.md"])
    card = ModelCard.load(tmp_path / "README.md")
    assert card.data.to_dict() == {
        "library_name": "coeffdiff",
        "pipeline_tag": "text-to-image",
        "base_model": "me/tiny",
        "tags": [
            "text-to-image",
            "stable-diffusion-xl",
            "diffusers",
            "coeff-tuning",
            "lora",
            "template:sd-lora",
        ],
        "instance_prompt": "a photo of ohwx mug",
        "license": "apache-2.0",
        "widget": [
            {"text": prompt, "output": {"url": name}}
            for name, prompt in PICTURES.items()
            if prompt is not None
        ],
    }
    for part in (
        "coeffdiff sample --adapter me/mug --prompt 'a photo of ohwx mug in the snow'",
        'coeffdiff.load_adapter(pipe, "me/mug", scale=1)',
        'StableDiffusionXLPipeline.from_pretrained("me/tiny")',
        "hf download me/mug --local-dir models/coeffdiff/mug",
        "called **ohwx mug**",
        "![grid.png](grid.png)",
    ):
        assert part in card.text
    assert 'load_adapter(pipe, "."' not in card.text


def test_what_an_owner_wrote_into_the_card_stays(run):
    """A licence, a tag and a sentence; a base model that is a path goes, and a second push adds nothing."""
    header, _ = read_coefficients(run / "adapter")
    written = "---\nlicense: mit\ntags: [sloth]\nbase_model: /models/sdxl\n---\n\nMy sloth."
    once = hub_card(written, header, "me/mug", {"001-ohwx.png": "a sloth"})
    card = ModelCard(once)
    assert card.data.license == "mit" and card.data.tags[0] == "sloth" and "lora" in card.data.tags
    assert card.data.base_model == "me/tiny" and "My sloth." in card.text and "](001-ohwx.png)" in card.text
    assert hub_card(once, header, "me/mug", {"001-ohwx.png": "a sloth"}) == once
    elsewhere = header.model_copy(update={"base_model": "/models/sdxl"})
    assert ModelCard(hub_card(written, elsewhere, "me/mug", {})).data.base_model is None
    pocket = hub_card(written, header.model_copy(update={"base_model": "pocket"}), "me/mug", {})
    assert "ComfyUI" in once and "ComfyUI" not in pocket  # ComfyUI cannot load pocket


def test_a_step_without_a_card_gets_one_and_its_validation_pictures(hub, login, run, small_adapter):
    """As in a checkpoint: only the adapter's files are there, and the run has pictures of that step."""
    samples = run / "samples/step-000007"
    save_png(Image.new("RGB", (8, 8)), samples / "007-ohwx.png", {"prompt": "ohwx in samples"})
    shutil.rmtree(run / "adapter")
    shutil.copytree(small_adapter, run / "adapters/step-000007")
    assert push(f"{run}@7", "me/mug").exit_code == 0
    files = hub.repos["me/mug"].files
    assert sorted(files) == sorted([COEFF_FILE, LORA_FILE, "README.md", "007-ohwx.png"])
    card = ModelCard(files["README.md"].decode())
    assert card.data.widget == [{"text": "ohwx in samples", "output": {"url": "007-ohwx.png"}}]
    assert "| trained | 7 steps, 64 px |" in card.text and "learning rates" not in card.text


def test_a_dry_run_asks_nobody(hub, run):
    """Without a login: the files, their sizes and the card."""
    result = push(run, "me/mug", "--dry-run")
    assert result.exit_code == 0 and hub.asked == []
    for name in PUSHED:
        assert f"file     {name} (" in result.output
    assert "private if it is new" in result.output and "library_name: coeffdiff" in result.output
    told = json.loads(push(run, "me/mug", "--dry-run", "--json").stdout)
    assert sorted(told["files"]) == PUSHED and told["files"]["README.md"] == len(told["card"].encode())


def test_without_a_login_or_a_right_nothing_is_created(hub, run, monkeypatch):
    assert "You are not logged in to the Hub: run `hf auth login`" in refusal(run, "me/mug")
    assert hub.asked == []
    for token, repo in (("hf_other", "me/mug"), ("hf_reader", "me/mug"), ("hf_wrong", "me/mug")):
        monkeypatch.setenv("HF_TOKEN", token)
        assert "The hub refuses access to me/mug (40" in refusal(run, repo)
    assert hub.repos == {}


def test_a_repository_that_is_there(hub, login, run, small_adapter):
    """A private one of an adapter is renewed, and parts that the new one lacks go; a public one needs --public."""
    hub.repos["me/mug"] = Repo(private=True)
    old = {COEFF_FILE: b"old", EMBEDS_FILE: b"old", "LICENSE": b"mine"}
    hub.repos["me/mug"].commit(old)
    result = push(run, "me/mug", "--public")
    assert result.exit_code == 0 and "me/mug was private before, and stays so" in result.output
    assert sorted(hub.repos["me/mug"].files) == sorted([*PUSHED, "LICENSE"])
    hub.repos["me/mug"].private = False
    assert "is public, so everybody would see the adapter; pass --public" in refusal(run, "me/mug")
    assert len(hub.repos["me/mug"].commits) == 2
    assert push(run, "me/mug", "--public").exit_code == 0


def test_a_repository_of_something_else_is_left_alone(hub, login, run):
    hub.repos["me/model"] = Repo()
    hub.repos["me/model"].commit({"model_index.json": b"{}", "README.md": b"mine"})
    sentence = refusal(run, "me/model", "--public")
    assert (
        "me/model exists on the Hub and is something else than an adapter. It holds model_index.json"
        in sentence
    )
    hub.repos["me/set"] = Repo(kind="dataset")
    assert "The name me/set is in use on the Hub, by a repository of another kind" in refusal(run, "me/set")
    assert hub.repos["me/model"].files["README.md"] == b"mine" and not hub.repos["me/set"].files


def test_a_card_that_the_hub_refuses_creates_nothing(hub, login, run):
    sentence = refusal(run, "me/mug", "--license", "whatever")
    assert 'The Hub does not accept the card: "license" must be one of [apache-2.0' in sentence
    (run / "adapter/README.md").write_text("---\na: [\n---\n")
    assert "The front matter of the adapter's README.md cannot be read" in refusal(run, "me/mug")
    assert hub.repos == {}


def test_a_hub_that_does_not_answer_is_not_waited_for(hub, login, run):
    """The first request is held to a time of its own, as the look-up is."""
    login.setattr("coeffdiff.hosts.hub.upload.HUB_SECONDS", 0.3)
    hub.delay = 3
    begun = time.monotonic()
    assert "Nothing was uploaded to me/mug: the hub cannot be reached" in refusal(run, "me/mug")
    assert time.monotonic() - begun < 2 and hub.repos == {}


def test_no_network_and_wrong_names(hub, login, run):
    hub.down = True
    assert "Nothing was uploaded to me/mug: the hub cannot be reached" in refusal(run, "me/mug")
    for name in ("mug", "me/a--b", "me/mug/x", "./mug", "me/mug.git"):
        assert "is no name of a repository on the Hub" in refusal(run, name)
    assert check_repo_id("me/mug-2.0_x") == "me/mug-2.0_x"


def test_a_damaged_adapter_stays_here(hub, login, run):
    (run / "adapter" / LORA_FILE).write_bytes(save({"x": torch.tensor([float("nan")])}))
    assert "not a finite number" in refusal(run, "me/mug")
    assert hub.asked == []


def test_paths_of_this_machine_are_named(hub, run):
    header, alphas = read_coefficients(run / "adapter")
    here = header.model_copy(update={"base_model": "/models/sdxl", "base": BaseHeader(vae="/vae")})
    (run / "adapter" / COEFF_FILE).write_bytes(
        pack_coefficients(alphas, here.model_copy(update={"format_version": 3}))
    )
    result = push(run, "me/mug", "--dry-run")
    for path in ("/models/sdxl", "/vae"):
        assert f"the adapter names {path}, a path of this machine" in result.output
