"""Fixtures that several test files share: small random pipelines, and one call of a UNet."""

from __future__ import annotations

import copy
import gc
import json
import os
import sys

import pytest

from coeffdiff.utils.threads import choose_waiting

choose_waiting()  # processes that tests start inherit it

import torch  # noqa: E402

if (
    not torch.cuda.is_available()
):  # the kernels are tested in Triton's interpreter; it hears this when it is imported
    os.environ.setdefault("TRITON_INTERPRET", "1")

# One: small models gain nothing from more, and on a busy machine its threads mostly wait for each other.
torch.set_num_threads(1)


@pytest.fixture(scope="session")
def built_pipeline():
    from coeffdiff.pocket.model import build_pipeline

    return build_pipeline("tiny")


@pytest.fixture
def tiny_pipeline(built_pipeline):
    """A fresh copy of build_pipeline("tiny"): a test may do to it what it likes."""
    return copy.deepcopy(built_pipeline)


@pytest.fixture(scope="session")
def built_micro():
    from coeffdiff.pocket.model import build_pipeline

    return build_pipeline("micro")


@pytest.fixture
def micro_pipeline(built_micro):
    """A fresh copy of build_pipeline("micro"), for what does not depend on the number of layers."""
    return copy.deepcopy(built_micro)


@pytest.fixture(scope="session")
def sd15_folder(tmp_path_factory):
    """A small random Stable Diffusion 1.5 pipeline as a diffusers folder."""
    from coeffdiff.pocket.model import save_random

    return save_random("sd15-micro", tmp_path_factory.mktemp("models") / "sd15")


@pytest.fixture(scope="session")
def unet_inputs():
    """unet_inputs(unet, batch=2, seed=0, side=None): the arguments of one call of an SDXL UNet, in its dtype.

    side: of the latents, the model's own by default.
    """

    def draw(unet, batch=2, seed=0, side=None):
        config, generator = unet.config, torch.Generator().manual_seed(seed)

        def noise(*shape):
            return torch.randn(batch, *shape, generator=generator).to(unet.conv_in.weight.dtype)

        side = side or config.sample_size
        pooled = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
        time_ids = torch.tensor([[96.0, 64.0, 3.0, 5.0, 64.0, 64.0]]).expand(batch, -1)
        return {
            "sample": noise(config.in_channels, side, side),
            "timestep": torch.arange(batch) * 300 + 200,
            "encoder_hidden_states": noise(77, config.cross_attention_dim),
            "added_cond_kwargs": {"text_embeds": noise(pooled), "time_ids": time_ids},
        }

    return draw


@pytest.fixture(scope="session")
def unet_call(unet_inputs):
    """unet_call(unet, batch=2, seed=0): what the UNet predicts; equal arguments give equal inputs."""
    return lambda unet, **which: unet(**unet_inputs(unet, **which)).sample


@pytest.fixture(scope="session")
def vit(tmp_path_factory):
    """A vision transformer's folder as the hub holds it: random weights, 32 pixels."""
    from transformers import ViTConfig, ViTModel

    folder = tmp_path_factory.mktemp("vit")
    torch.manual_seed(0)
    config = ViTConfig(
        hidden_size=24,
        num_hidden_layers=2,
        num_attention_heads=3,
        intermediate_size=40,
        image_size=32,
        patch_size=8,
    )
    ViTModel(config, add_pooling_layer=False).save_pretrained(folder)
    processor = {
        "image_processor_type": "ViTImageProcessor",
        "size": {"height": 32, "width": 32},
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    return str(folder)


@pytest.fixture(scope="session")
def clip(tmp_path_factory):
    """The same of a CLIP: two encoders of different widths, projected to 14 numbers."""
    from transformers import CLIPConfig, CLIPModel

    from coeffdiff.pocket.model import tokenizer_pair

    folder = tmp_path_factory.mktemp("clip")
    torch.manual_seed(1)
    text = {"hidden_size": 20, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 28}
    text |= {"vocab_size": 514, "max_position_embeddings": 77, "eos_token_id": 2}
    vision = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 3, "intermediate_size": 40}
    vision |= {"image_size": 32, "patch_size": 8}
    CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=14)).save_pretrained(folder)
    tokenizer_pair()[0].save_pretrained(folder)
    processor = {
        "image_processor_type": "CLIPImageProcessor",
        "size": {"shortest_edge": 32},
        "crop_size": {"height": 32, "width": 32},
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    return str(folder)


# By far the longest files, begun first: a worker that began one of them last would keep all others waiting.
_LONGEST = (
    *("training/test_loop.py", "method/test_triton_kernels.py", "preflight/test_prediction.py"),
    *("pocket/test_pocket.py", "evaluation/test_compare.py", "models/test_base_checkpoints.py"),
    *("scripts/test_evidence.py", "training/test_nothing_breaks.py", "scripts/test_scripts.py"),
    *("hosts/test_unet.py", "cli/test_encodings.py", "models/test_opening.py", "hosts/test_lora.py"),
    *("scripts/test_pocket_build.py", "hosts/test_diffusers.py", "hosts/test_silence.py"),
    *("training/test_watch.py", "sampling/test_sampling.py"),
)


def pytest_collection_finish() -> None:
    """What the libraries and the tests' own modules hold stays to the end: collections need not walk it each time."""
    gc.collect()
    gc.freeze()


def pytest_unconfigure() -> None:
    gc.unfreeze()  # otherwise nanobind tells of leaks at the end


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """_LONGEST first, in this order; the others as they come."""
    rank = {name: number for number, name in enumerate(_LONGEST)}
    items.sort(key=lambda item: rank.get("/".join(item.path.parts[-2:]), len(rank)))


# More than half of what a run of a few steps costs, and what tests of something else do not look at: what `check` finds,
# the plot of the curves, and memory that is given back between the parts of a run. They are tested where they belong.
_SLOW_IN_RUNS = (
    ("coeffdiff.training.loop", "print_findings"),
    ("coeffdiff.training.watch", "draw_curves"),
    ("coeffdiff.training.inputs", "free_memory"),
    ("coeffdiff.training.preview", "free_memory"),
)


def _quicken(patch: pytest.MonkeyPatch) -> None:
    for module, name in _SLOW_IN_RUNS:
        if module in sys.modules:
            patch.setattr(sys.modules[module], name, lambda *_, **__: None)


@pytest.fixture(scope="session", autouse=True)
def _quick_fixtures():
    """Of what fixtures train, too; and a subject's photos are drawn once, however often they are written."""
    from coeffdiff.pocket.world.subjects import photos

    drawn: dict[tuple, tuple] = {}

    def draw_once(subject, *how):
        if (subject.name, *how) not in drawn:
            drawn[subject.name, *how] = draw(subject, *how)
        return drawn[subject.name, *how]

    draw = photos.subject_photos
    with pytest.MonkeyPatch.context() as patch:
        _quicken(patch)
        patch.setattr(photos, "subject_photos", draw_once)
        yield


@pytest.fixture(autouse=True)
def _quick_runs(request, monkeypatch):
    """Runs in this process do without _SLOW_IN_RUNS, unless a test takes `whole_runs`."""
    if "whole_runs" not in request.fixturenames:
        _quicken(monkeypatch)


@pytest.fixture
def replace_everywhere(monkeypatch):
    """replace_everywhere(real, stand_in): in every module of the package that has it, and in those still to be loaded.

    A patch of one module alone passes by all that have imported the name from it.
    """

    def replace(real, stand_in):
        for module in [module for name, module in sys.modules.items() if name.startswith("coeffdiff")]:
            for name in [name for name, value in vars(module).items() if value is real]:
                monkeypatch.setattr(module, name, stand_in)

    return replace


@pytest.fixture
def whole_runs(monkeypatch):
    """Runs in this process do all that they do for users, but predict no time, which is measured."""
    from coeffdiff.preflight.check import check
    from coeffdiff.training import curves, loop, run_summary, watch

    monkeypatch.setattr(loop, "print_findings", run_summary.print_findings)
    monkeypatch.setattr(watch, "draw_curves", curves.draw_curves)
    monkeypatch.setattr(run_summary, "check", lambda *a, **k: check(*a, **k | {"budget_seconds": 0.0}))


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """An empty Hub on localhost, see hub_stand_in.py, and an empty cache; nobody is logged in."""
    import hub_stand_in

    with hub_stand_in.serving(hub_stand_in.Hub()) as standing:
        hub_stand_in.point_at(monkeypatch, standing.endpoint, str(tmp_path / "hub-cache"))
        yield standing


@pytest.fixture(scope="session")
def small_adapter(built_pipeline, tmp_path_factory):
    """The folder of an adapter of the tiny model with random alphas and a LoRA of rank 2."""
    from coeffdiff.hosts.diffusers import save_adapter
    from coeffdiff.hosts.lora.layers import add_lora
    from coeffdiff.hosts.unet import inject
    from coeffdiff.method.adapter_header import AdapterHeader, LoraHeader

    unet, noise = copy.deepcopy(built_pipeline.unet), torch.Generator().manual_seed(0)
    for parameter in add_lora(unet, rank=2, alpha=2.0, targets=["to_q"], dora=False, seed=0).values():
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=noise)
    layers = inject(unet)
    for coefficients in layers.values():
        coefficients.alpha.data += 0.1 * torch.randn(coefficients.alpha.shape, generator=noise)
    header = AdapterHeader(
        format_version=1, kind="coeff+lora", base_model="me/tiny", token="ohwx", class_word="mug", trained_steps=7,
        resolution=64, heads={name: c.heads for name, c in layers.items()}, lora=LoraHeader(rank=2, alpha=2.0),
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("small") / "adapter"
    save_adapter(folder, unet, header)
    return folder
