"""Adapters of the Hub: found, refused, cached. A Hub on localhost answers; see hub_stand_in.py."""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path

import pytest
import torch
from hub_stand_in import Repo
from huggingface_hub import constants
from safetensors.torch import save
from typer.testing import CliRunner

from coeffdiff import load_adapter
from coeffdiff.cli.root import app
from coeffdiff.errors import AdapterError, CachedAdapter
from coeffdiff.hosts.hub.address import Address, hub_address, origin_of
from coeffdiff.hosts.hub.lookup import resolve_adapter
from coeffdiff.method.adapter_file import pack_coefficients, read_coefficients
from coeffdiff.method.adapter_paths import COEFF_FILE, LORA_FILE
from coeffdiff.utils.png import read_recipe


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    """A working folder in which me/mug is no path, and no waiting between attempts."""
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    monkeypatch.setattr(time, "sleep", lambda seconds: None)


@pytest.fixture(scope="module")
def files(small_adapter) -> dict[str, bytes]:
    found = {name: (small_adapter / name).read_bytes() for name in (COEFF_FILE, LORA_FILE)}
    return found | {"README.md": b"# a card", "photos/me.jpg": b"x", "old/adapter.bin": b"\x80\x04."}


@pytest.fixture
def mug(hub, files) -> Repo:
    hub.repos["me/mug"] = Repo()
    hub.repos["me/mug"].commit(files)
    return hub.repos["me/mug"]


def refusal(path, **more) -> str:
    with pytest.raises(AdapterError) as caught:
        resolve_adapter(path, **more)
    return str(caught.value)


def same_files(folder: Path, files: dict[str, bytes]) -> bool:
    return all((folder / name).read_bytes() == files[name] for name in (COEFF_FILE, LORA_FILE))


def command(*arguments: object):
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


# --- which paths are addresses


@pytest.mark.parametrize(
    ("path", "address"),
    [
        ("me/mug", Address("me/mug")),
        ("me/mug@v1.0", Address("me/mug", "v1.0")),
        ("me/mug@refs/pr/3", Address("me/mug", "refs/pr/3")),
        ("hf://me/mug@v1/two/adapter", Address("me/mug", "v1", "two/adapter")),
        ("hf://me/mug/two/coeff.safetensors", Address("me/mug", None, "two")),
        ("hf://here/mug", Address("here/mug")),
        ("hf://runs/mug@200", Address("runs/mug", "200")),
        ("https://huggingface.co/me/mug/tree/dev", Address("me/mug", "dev")),
        ("runs/mug", None),  # runs are there, whether or not this one is
        ("here/mug", None),  # `here` is a folder
        ("me/mug@200", None),  # a step of a run
        ("me/mug@best", None),
        *(
            (path, None)
            for path in ("mug", "./me/mug", "/me/mug", "~/mug", "../mug", "me/mug/adapter", "me\\mug")
        ),
        *((path, None) for path in ("me/mug.safetensors", "me/mug.png", "datasets/mug", "me/a--b")),
        (Path("me/mug"), None),  # a Path is a path
    ],
)
def test_what_names_a_repository(path, address):
    Path("here").mkdir()
    assert hub_address(path) == address


def test_a_path_that_exists_wins(hub, mug, small_adapter):
    shutil.copytree(small_adapter, "me/mug")
    assert resolve_adapter("me/mug") == Path("me/mug") and hub.asked == []
    assert hub_address("me/other") is None
    assert "has no revision 'v1'" in refusal("me/mug", revision="v1")


def test_a_mistyped_path_never_reaches_the_network(hub, mug):
    Path("here").mkdir()
    for path, reason in (("runs/mug", "runs is where runs are"), ("here/mug", "here is a folder here")):
        assert refusal(path) == (
            f"There is no adapter {path}. The Hub was not asked, since {reason}; hf://{path} would ask it."
        )
    for path in ("./me/mug", "/me/mug", "mug", "me/mug/x"):
        assert refusal(path) == f"There is no adapter {Path(path)}."
    assert hub.asked == []


# --- what is fetched


def test_an_adapter_is_fetched_and_applied(hub, mug, files, small_adapter, tiny_pipeline, unet_call):
    """Its own files and no others; the same prediction as from the folder; a record that names the commit."""
    load_adapter(tiny_pipeline, small_adapter).remove()
    adapter = load_adapter(tiny_pipeline, small_adapter)
    expected = unet_call(tiny_pipeline.unet)
    adapter.remove()
    adapter = load_adapter(tiny_pipeline, "me/mug")
    assert torch.equal(unet_call(tiny_pipeline.unet), expected)
    assert sorted(hub.fetched()) == sorted([COEFF_FILE, LORA_FILE])
    assert same_files(adapter.path, files)
    assert origin_of(adapter.path) == f"me/mug@{mug.refs['main']}"
    adapter.remove()


def test_revisions_and_folders(hub, mug, files):
    """@revision, revision=, subfolder=, hf://...; a run's folder that was uploaded whole; several in one repository."""
    first = mug.refs["main"]
    mug.commit({f"two/adapter/{name}": files[name] for name in (COEFF_FILE, LORA_FILE)}, "moved")
    assert resolve_adapter(f"me/mug@{first}").name == first
    assert resolve_adapter("me/mug", revision=first).name == first
    for folder in (resolve_adapter("me/mug", subfolder="two"), resolve_adapter("hf://me/mug/two/adapter")):
        assert folder.parts[-2:] == ("two", "adapter") and same_files(folder, files)
    assert "in folders (two/adapter); name one, such as hf://me/mug/two/adapter" in refusal("me/mug")
    assert "already names" in refusal(f"me/mug@{first}", revision="main")
    assert refusal("me/mug", subfolder="../x") == "'../x' is no folder inside a repository."
    assert refusal("me/mug@nope") == (
        "me/mug is on the hub, but has no such revision; name a branch, a tag or a commit of it."
    )


def test_every_command_takes_a_repository(hub, mug, tmp_path):
    """inspect, merge, and sample and evaluate as far as the base model, which is not here."""
    shown = command("inspect", "me/mug", "--json")
    assert json.loads(shown.stdout)["header"]["token"] == "ohwx"
    twice = command("merge", "me/mug:0.5", f"me/mug@{mug.refs['main']}", "--output", tmp_path / "m")
    assert twice.exit_code == 2 and "same adapter, given twice" in twice.output
    for arguments in (
        ["sample", "--prompt", "a", "--adapter", "me/mug:0.5"],
        ["sample", "--prompt", "a", "--adapter", "hf://me/mug"],
    ):
        result = command(*arguments)
        assert result.exit_code == 2 and "The adapter was trained on it" in result.output
    result = command("evaluate", "me/mug")
    assert f"me/mug@{mug.refs['main']} does not say which photos it was trained on" in result.output
    result = command("sample", "--prompt", "a", "--adapter", "me/mug:half")
    assert result.exit_code == 2 and "the scale 'half' is not a number" in result.output


def test_a_picture_names_the_commit(hub, mug, tmp_path):
    from coeffdiff.pocket.model import save_random

    save_random("tiny", tmp_path / "model")
    options = ["--steps", "1", "--width", "64", "--height", "64", "--output", tmp_path / "out"]
    result = command(
        "sample", "--prompt", "a <V>", "--adapter", "me/mug:0.5", "--model", tmp_path / "model", *options
    )
    assert result.exit_code == 0, result.output
    [picture] = (tmp_path / "out").glob("0*.png")
    [adapter] = read_recipe(picture)["adapters"]
    assert adapter["path"] == f"me/mug@{mug.refs['main']}" and adapter["scale"] == 0.5
    assert f"adapter  me/mug@{mug.refs['main']} at scale 0.5" in result.output


# --- what is refused


def test_an_absent_and_a_private_repository(hub, mug):
    """The Hub does not tell them apart, so one sentence names both; with the owner's token the private one is there."""
    mug.private = True
    for path in ("me/mug", "me/nothing"):
        sentence = refusal(path)
        assert sentence.startswith(
            f"There is no adapter {path}: neither a folder of this name here nor a public"
        )
        assert "`hf auth login` if it is private" in sentence
        assert refusal(path, token="hf_other") == sentence
    refused = "The hub refuses access to me/mug (401 Invalid credentials in Authorization header); log in"
    assert refusal("me/mug", token="hf_wrong").startswith(refused)
    assert resolve_adapter("me/mug", token="hf_me").name == mug.refs["main"]
    result = command("inspect", "me/nothing")
    assert result.exit_code == 2 and result.output.count("\n") == 1


def test_a_gated_repository(hub, mug):
    mug.gated = True
    assert "me/mug is gated: accept its terms at" in refusal("me/mug")


def test_a_download_that_breaks_off_goes_on(hub, mug, files, monkeypatch):
    """Cut twice, it goes on both times after the last whole piece that had come."""
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 1024)  # usually 10 MB: all in one piece
    hub.cuts = 2
    assert same_files(resolve_adapter("me/mug"), files) and hub.resumed == 2


def test_a_download_that_keeps_breaking_off_is_one_sentence(hub, mug, files, monkeypatch):
    """Nothing half is in the cache, offline either; later the same command finds all."""
    resolve_adapter("me/mug", cache_dir="other")  # the header's file is whole in another cache, and no help
    hub.cuts = 10**6
    sentence = refusal("me/mug")
    assert sentence.startswith(f"{COEFF_FILE} of me/mug did not arrive whole, and ") and sentence.endswith(
        "again."
    )
    hub.cuts = 0
    assert "not complete in the cache" in refusal("me/mug", local_files_only=True)
    assert same_files(resolve_adapter("me/mug"), files)


HOSTILE = {
    "a pickle": (b"\x80\x04\x95.", "a zip file or a pickle, which is not opened"),
    "of another tool": (save({"x": torch.ones(2)}), "not written by coeffdiff"),
    "huge by its own word": (b"\xff" * 7 + b"\x7f{}", "damaged or not a safetensors file"),
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_a_hostile_file_is_refused_before_anything_else_is_fetched(hub, files, kind):
    content, sentence = HOSTILE[kind]
    hub.repos["me/mug"] = Repo()
    hub.repos["me/mug"].commit(files | {COEFF_FILE: content})
    told = refusal("me/mug")
    assert told.startswith("me/mug on the hub is no sound adapter: ") and sentence in told
    assert hub.fetched() == [COEFF_FILE]


def test_a_file_that_is_too_large_is_never_fetched(hub, mug):
    hub.sizes[COEFF_FILE] = 65 * 2**20
    assert refusal("me/mug") == f"{COEFF_FILE} of me/mug has 65 MiB; no {COEFF_FILE} is that large."
    assert hub.fetched() == []
    hub.sizes = {LORA_FILE: 9 * 2**30}
    assert "has 9216 MiB" in refusal("me/mug")
    assert hub.fetched() == [COEFF_FILE]


def test_names_that_lead_elsewhere_are_never_fetched(hub, mug, files, tmp_path):
    names = ("../../../evil.safetensors", "/etc/evil", f"..\\{LORA_FILE}", "a/../../x")
    mug.commit(files | dict.fromkeys(names, b"evil"))
    assert same_files(resolve_adapter("me/mug"), files)
    assert sorted(set(hub.fetched())) == sorted([COEFF_FILE, LORA_FILE])
    assert not list(tmp_path.rglob("*evil*"))


def test_a_part_that_is_missing_or_foreign(hub, mug, files, small_adapter):
    mug.commit({COEFF_FILE: files[COEFF_FILE]})
    assert "me/mug is incomplete: pytorch_lora_weights.safetensors is missing" in refusal("me/mug")
    header, alphas = read_coefficients(small_adapter)
    alone = pack_coefficients(alphas, header.model_copy(update={"kind": "coeff", "lora": None}))
    mug.commit({COEFF_FILE: alone, LORA_FILE: files[LORA_FILE]})
    assert f"{LORA_FILE} of me/mug does not belong there" in refusal("me/mug")
    assert LORA_FILE not in hub.fetched()


FOREIGN = {
    "model_index.json": "is a base model in diffusers' layout and no adapter; name it with --model",
    "adapter_config.json": "holds an adapter of PEFT's alone",
    LORA_FILE: "holds a plain LoRA without coeff.safetensors",
    "style.safetensors": "If style.safetensors is a LoRA, load it with diffusers' pipe.load_lora_weights",
    "old.ckpt": "is no adapter of coeffdiff: it has no coeff.safetensors. It holds old.ckpt",
}


@pytest.mark.parametrize("name", FOREIGN)
def test_a_repository_of_something_else_is_named_for_what_it_is(hub, name):
    hub.repos["me/other"] = Repo()
    hub.repos["me/other"].commit({name: b"x"})
    assert FOREIGN[name] in refusal("me/other")
    assert hub.fetched() == []


# --- without the Hub


def test_offline_the_cached_copy_serves(hub, mug, files, monkeypatch):
    """With a warning where the Hub is down, without one in offline mode; a commit that is there is not asked for."""
    commit = mug.refs["main"]
    folder = resolve_adapter("me/mug")
    hub.asked.clear()
    assert resolve_adapter(f"me/mug@{commit}") == folder == resolve_adapter("me/mug", local_files_only=True)
    assert hub.asked == []
    hub.down = True
    with pytest.warns(CachedAdapter, match=rf"me/mug is taken from the cache, as of commit {commit[:12]}"):
        assert resolve_adapter("me/mug") == folder
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert same_files(resolve_adapter("me/mug"), files)
    (folder / LORA_FILE).unlink()
    sentence = refusal("me/mug")
    assert (
        "me/mug is no folder here and not complete in the cache" in sentence
        and "HF_HUB_OFFLINE is set" in sentence
    )
    assert "`hf download me/mug --local-dir FOLDER`" in sentence


def test_without_a_network_or_a_copy_it_is_one_sentence(hub, mug):
    hub.down = True
    assert "not complete in the cache" in refusal("me/mug") and "the hub cannot be reached (" in refusal(
        "me/mug"
    )


def test_a_newer_version_is_taken(hub, mug, files):
    """Like diffusers, the main branch is asked for each time."""
    resolve_adapter("me/mug")
    newer = mug.commit(files, "again")
    assert resolve_adapter("me/mug").name == newer


# --- alphas of one model


def test_alphas_of_a_model_come_from_the_hub(hub, tmp_path):
    """attach_from takes user/repo and its revisions, from the cache without network, and no pipeline's adapter."""
    import coeffdiff

    model = torch.nn.MultiheadAttention(8, 2)
    (alpha,) = coeffdiff.attach(model).values()
    repo = hub.repos["me/alphas"] = Repo()
    for value in (1.0, 2.0):
        with torch.no_grad():
            alpha.fill_(value)
        coeffdiff.save(model, tmp_path)
        content = {COEFF_FILE: (tmp_path / COEFF_FILE).read_bytes(), LORA_FILE: b"of another tool"}
        repo.commit(content, branch="main" if value == 2 else "v1")

    def loaded(path, **options):
        fresh = torch.nn.MultiheadAttention(8, 2)
        (found,) = coeffdiff.attach_from(fresh, path, **options).values()
        return found.mean().item()

    assert loaded("me/alphas") == loaded("hf://me/alphas") == 2
    assert loaded("me/alphas@v1") == loaded("me/alphas", revision="v1") == 1
    assert set(hub.fetched()) == {COEFF_FILE}
    hub.down = True
    assert loaded("me/alphas", local_files_only=True) == 2
    with pytest.warns(CachedAdapter, match="me/alphas is taken from the cache"):
        assert loaded("me/alphas") == 2


def test_adapters_and_alphas_are_not_taken_for_each_other(hub, mug, tmp_path):
    """Each is refused with the call that loads it."""
    import coeffdiff

    model = torch.nn.MultiheadAttention(8, 2)
    with pytest.raises(
        AdapterError, match=r"me/mug on the hub is no sound adapter: .*coeffdiff.load_adapter"
    ):
        coeffdiff.attach_from(model, "me/mug")
    coeffdiff.attach(model)
    coeffdiff.save(model, tmp_path)
    hub.repos["me/alphas"] = Repo()
    hub.repos["me/alphas"].commit({COEFF_FILE: (tmp_path / COEFF_FILE).read_bytes()})
    assert "coeffdiff.attach_from(model, folder)" in refusal("me/alphas")
