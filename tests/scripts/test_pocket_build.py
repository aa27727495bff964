"""Building the pocket models: every stage in small, resuming, and what is written."""

from __future__ import annotations

import copy
import dataclasses
import itertools
import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionXLPipeline, UNet2DConditionModel
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.attention_processor import Attention
from safetensors.torch import load_file
from transformers import CLIPModel, ViTModel

from coeffdiff.errors import ModelError, TrainingError
from coeffdiff.pocket import judges
from coeffdiff.pocket.sizes import unet_config
from coeffdiff.pocket.world import caption, mentioned, sample_scene
from coeffdiff.pocket.world.subjects import SUBJECTS
from coeffdiff.utils.seeding import generator_for, stable_seed
from pocket_build import clip, conditioned, dino, growing, renders, workshop
from pocket_build import judges as build_judges
from pocket_build.conditioned import Conditioned, denoising, spoken
from pocket_build.detail import power
from pocket_build.distances import distances
from pocket_build.fitting import Plan, fit, read_average
from pocket_build.growing import deepened
from pocket_build.latents import build_latents, varied
from pocket_build.renders import draw, individual, known_individuals, scene_of
from pocket_build.sharpening import Critic, against
from pocket_build.stages import STAGES
from pocket_build.unet import shallow_config, store_unfinished
from pocket_build.workshop import PLANS, Workshop


@pytest.fixture(scope="module")
def small():
    """Everything small enough for seconds: 8 pictures a file, two or three steps a network."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(renders, "SHARD", 8)
        patch.setattr(renders, "HELD_INDIVIDUALS", 2)
        patch.setattr(conditioned, "BATCH", 4)
        patch.setattr(clip, "CLIP_BATCH", 4)
        patch.setattr(build_judges, "JUDGES_BATCH", 8)
        patch.setattr(judges, "TRUSTED", 0.0)
        yield


@pytest.fixture(scope="module")
def built(small, tmp_path_factory):
    """A workshop in which every stage has run."""
    folder = tmp_path_factory.mktemp("pocket")
    plans = {name: dataclasses.replace(plan, steps=2) for name, plan in PLANS.items()}
    counts = {"train": 8, "heldout": 8, "individuals": 24}
    shop = Workshop(folder / "work", folder / "weights", "cpu", torch.float32, 1, plans, counts)
    for name, stage in STAGES.items():
        if name == "score":
            stage(shop, captions=2, steps=2)
        elif name in ("distances", "detail"):
            stage(shop, pictures=10, steps=2)
        else:
            stage(shop)
    return shop


def test_every_stage_leaves_its_weights_and_what_it_took(built):
    record = built.record()
    assert set(record) == set(STAGES)
    for stage, plan in built.plans.items():
        assert record[stage]["steps"] == plan.steps == 2
        assert built.finished(stage)
        curve = [json.loads(line) for line in (built.weights / "curves" / f"{stage}.jsonl").open()]
        assert [line["step"] for line in curve] == [2]
    assert record["score"]["unet_steps"] == 2
    assert sum(record["score"]["named"].values()) > 0
    assert record["distances"]["frechet"] > record["distances"]["frechet_vae"] > 0
    assert record["distances"]["precision"] == "float32"
    assert record["distances"]["frechet_of_fewer"] != record["distances"]["frechet_of_fewer_guided_weakly"]
    assert record["detail"]["8_to_16"] != record["detail"]["8_to_16_vae"]


def test_distances_can_be_measured_in_bfloat16_and_say_so(built):
    """From pictures of their own: those in float32 are not taken for them."""
    before, files = built.record()["distances"], set(built.folder.glob("features/*"))
    found = STAGES["distances"](dataclasses.replace(built, dtype=torch.bfloat16), pictures=10, steps=2)
    new = {file.name.rsplit("-", 1)[-1] for file in set(built.folder.glob("features/*")) - files}
    assert new == {"bfloat16"}
    assert built.record()["distances"]["precision"] == "bfloat16"
    for name, value in found.items():
        assert value == pytest.approx(before[name], rel=0.2, abs=0.02), name
        if name == "frechet":
            assert value != before[name]
    built.note("distances", **before)


def test_weights_are_stored_in_half_and_load_in_full_precision_by_the_plain_classes(built):
    """As anyone would load them: no dtype named, and everything is float32, with the values of the fp16 files."""
    files = [file for file in built.weights.rglob("*.safetensors") if file.parent.name != "judges"]
    assert len({file.parent for file in files}) == 6
    assert max(file.stat().st_size for file in files) <= 16_000_000
    pipe = StableDiffusionXLPipeline.from_pretrained(built.weights / "pocket")
    parts = (pipe.unet, pipe.vae, pipe.text_encoder, pipe.text_encoder_2)
    parts += (
        CLIPModel.from_pretrained(built.weights / "pocket-clip"),
        ViTModel.from_pretrained(built.weights / "pocket-dino", add_pooling_layer=False),
    )
    for part in parts:
        for weight in part.parameters():
            assert weight.dtype == torch.float32
            assert torch.equal(weight, weight.half().float())


def test_latents_have_unit_spread(built):
    """The VAE's factor is one over the deviation of its latents."""
    latents, time_ids = build_latents(built)
    assert latents.shape == (16, 8, 16, 16) and time_ids.shape == (16, 6)
    assert latents[0::2, :4].float().std() == pytest.approx(1.0, abs=0.1)


def test_compiling_takes_the_transformer_blocks_alone_and_leaves_every_name(built):
    """A checkpoint fits whether or not the UNet is compiled, and its average can be taken."""
    networks = Conditioned()
    names = list(networks.state_dict())
    denoising(dataclasses.replace(built, compiled=True), networks, "deep")
    compiled = {type(part) for part in networks.modules() if part._compiled_call_impl is not None}
    assert compiled == {BasicTransformerBlock}
    assert list(networks.state_dict()) == names == list(copy.deepcopy(networks).state_dict())


def shards(shop: Workshop) -> dict[str, torch.Tensor]:
    """The weights of the UNet that ships, out of all its files."""
    files = sorted((shop.weights / "pocket" / "unet").glob("*.safetensors"))
    return {name: weight for file in files for name, weight in load_file(file).items()}


def test_a_unet_cut_short_is_stored_and_continued_where_there_is_no_checkpoint(built, tmp_path):
    """Its average is what is stored; elsewhere, at a rate of zero, two more steps leave it as it is. The stages before it
    count as finished, although their weights are not there any more."""
    weights, away = tmp_path / "weights", tmp_path / "away"
    shutil.copytree(built.weights / "pocket" / "vae", weights / "pocket" / "vae")
    known = {stage: built.record()[stage] for stage in ("vae", "unet")}
    (weights / "record.json").write_text(json.dumps(known))
    longer = built.plans | {"deep": Plan(4, 0.0, warmup=1, weight_decay=0.0)}
    here = dataclasses.replace(built, weights=weights, plans=longer)
    assert store_unfinished(here) == 2 and not here.finished("deep")
    averaged = Conditioned()
    read_average("deep", built.folder, averaged)
    stored = shards(here)
    for name, weight in averaged.unet.state_dict().items():
        assert torch.equal(stored[name], weight.half()), name
    away.mkdir()
    (away / "renders").symlink_to(built.folder / "renders")
    (away / "latents").symlink_to(built.folder / "latents")
    there = dataclasses.replace(here, folder=away)
    with pytest.raises(TrainingError, match="There is no checkpoint"):
        store_unfinished(there)
    assert there.finished("unet")
    STAGES["deep"](there)
    assert there.finished("deep")
    again = shards(there)
    assert stored.keys() == again.keys() and all(torch.equal(stored[name], again[name]) for name in stored)
    curve = [json.loads(line)["step"] for line in (weights / "curves" / "deep.jsonl").open()]
    assert curve == [2, 4]
    with pytest.raises(TrainingError, match="has 2 steps, and more are stored already"):
        store_unfinished(here)


def test_what_led_to_a_lost_unet_is_made_again(built, tmp_path):
    """Weights of the stages before it are kept nowhere but in the work folder."""
    shop = dataclasses.replace(built, weights=Path(shutil.copytree(built.weights, tmp_path / "weights")))
    known = shop.record()
    del known["deep"]
    (shop.weights / "record.json").write_text(json.dumps(known))
    assert shop.finished("unet")
    lost = dataclasses.replace(shop, folder=tmp_path / "new")
    assert not lost.finished("unet")
    assert lost.so_far("unet") == {"start": 0, "seconds": 0.0}
    with pytest.raises(TrainingError, match="deep needs unet, which is not finished"):
        lost.require("deep")


def test_a_large_network_lies_in_files_that_any_host_takes(tmp_path, monkeypatch):
    """In shards with their index, which the plain class reads; those of an earlier, larger cut are gone."""
    torch.manual_seed(0)
    unet, folder = UNet2DConditionModel(**unet_config("micro")), tmp_path / "unet"
    for size, least in (("100KB", 3), ("400KB", 2), ("15MB", 1)):
        monkeypatch.setattr(workshop, "_SHARD", size)
        workshop.store(unet, folder)
        files = list(folder.glob("*.safetensors"))
        assert len(files) >= least and (len(files) > 1) == any(folder.glob("*.index.json"))
        again = UNet2DConditionModel.from_pretrained(folder)
        expected = unet.state_dict()
        assert all(torch.equal(weight, expected[name]) for name, weight in again.state_dict().items())
    assert len(files) == 1


def denoised(unet: UNet2DConditionModel, seed: int = 0) -> torch.Tensor:
    """What a UNet with pocket's text widths predicts for two noisy latents."""
    lot = torch.Generator().manual_seed(seed)
    given = (torch.randn(2, 4, 16, 16, generator=lot), torch.tensor([10, 900]))
    words, pooled, ids = (torch.randn(2, *size, generator=lot) for size in ((77, 224), (128,), (6,)))
    added = {"text_embeds": pooled, "time_ids": ids}
    return unet(*given, words, added_cond_kwargs=added).sample


def test_a_unet_as_deep_as_before_is_the_one_before():
    """Bit for bit, whatever the generator."""
    torch.manual_seed(0)
    shallow = UNet2DConditionModel(**shallow_config())
    same = deepened(shallow, shallow_config(), generator_for("same"))
    with torch.no_grad():
        assert torch.equal(denoised(shallow), denoised(same))


@torch.no_grad()
def test_the_deep_unet_begins_near_the_shallow_one(monkeypatch):
    """A row of blocks adds what the one block added, but for what each sees of those before it: where all outputs become
    ten times smaller, that difference becomes a hundred times smaller. With noise it stays small."""
    without_noise, with_noise, effects = [], [], []
    for scale in (0.1, 0.01):
        torch.manual_seed(0)
        shallow = UNet2DConditionModel(**shallow_config())
        outputs = [part for name, part in shallow.named_parameters() if growing.OUTPUT.search(name)]
        for part in outputs:
            part *= scale
        before = denoised(shallow)
        for noise, found in ((0.0, without_noise), (growing.NOISE, with_noise)):
            monkeypatch.setattr(growing, "NOISE", noise)
            deep = deepened(shallow, unet_config("pocket"), generator_for("deep"))
            found.append(float((denoised(deep) - before).norm()))
        for part in outputs:
            part.zero_()
        effects.append(float((denoised(shallow) - before).norm()))
    assert effects[0] / effects[1] == pytest.approx(10, rel=0.1)
    assert without_noise[0] < 0.1 * effects[0] and without_noise[0] / without_noise[1] > 50
    assert with_noise[0] < 0.5 * effects[0]


def test_every_block_of_the_deep_unet_learns_and_no_two_the_same():
    """The mean of a row's matrices is the old one; each block's gradient is its own, and of like size."""
    torch.manual_seed(0)
    shallow = UNet2DConditionModel(**shallow_config())
    deep = deepened(shallow, unet_config("pocket"), generator_for("deep"))
    denoised(deep).square().mean().backward()
    for name, old in shallow.named_parameters():
        if not name.endswith(("to_out.0.weight", "ff.net.2.weight", "to_v.weight")):
            continue
        before, after = name.split(".transformer_blocks.0.")
        row = [deep.get_parameter(f"{before}.transformer_blocks.{place}.{after}") for place in range(7)]
        share = 1 if "to_v" in name else 7
        torch.testing.assert_close(torch.stack([w.data for w in row]).mean(0) * share, old.data)
        slopes = [weight.grad for weight in row]
        sizes = [float(slope.norm()) for slope in slopes]
        assert min(sizes) > 0.3 * max(sizes) > 0
        assert not any(torch.equal(a, b) for a, b in itertools.combinations(slopes, 2))


@pytest.mark.parametrize(
    "other", [{"layers_per_block": 3}, {"cross_attention_dim": 64}, {"class_embed_type": "timestep"}]
)
def test_only_depth_may_differ_where_a_unet_is_deepened(other):
    small = unet_config("micro")
    with pytest.raises(ValueError, match="These weights are not the same in both UNets: "):
        deepened(UNet2DConditionModel(**small), small | other, generator_for("other"))


def test_the_deep_unet_is_distributed_as_sdxls():
    """No attention at the finest level, most of it at the coarsest and in the middle, heads of equal width."""
    unet, sdxl = (UNet2DConditionModel(**unet_config("pocket")), unet_config("sdxl"))
    layers = {name: m for name, m in unet.named_modules() if isinstance(m, Attention)}
    blocks = sum(p.numel() for name, p in unet.named_parameters() if ".transformer_blocks." in name)
    assert len(layers) == 56 and sum(layer.heads**2 for layer in layers.values()) == 5_600
    assert blocks / sum(p.numel() for p in unet.parameters()) > 0.7
    assert {layer.inner_dim // layer.heads for layer in layers.values()} == {16}
    own = unet_config("pocket")
    for name, finest, coarsest in (("down_block_types", 0, -1), ("up_block_types", -1, 0)):
        assert own[name][finest] == sdxl[name][finest] and own[name][coarsest] == sdxl[name][coarsest]
    assert own["mid_block_type"] == sdxl["mid_block_type"]


def test_two_processes_are_not_at_one_stage_in_one_folder(built, tmp_path):
    """They would write over each other's checkpoints and curves; another stage may be worked at meanwhile."""
    shop = dataclasses.replace(built, folder=tmp_path / "new")
    with shop.alone("vae"):
        with pytest.raises(TrainingError, match="Another process is at the stage vae in"), shop.alone("vae"):
            pytest.fail("both have it")
        with shop.alone("clip"):
            pass
    with shop.alone("vae"):
        pass


def test_a_stage_waits_for_those_it_builds_on(built, tmp_path):
    """And the score is taken again when the UNet or the VAE is another."""
    for stage in STAGES:
        built.require(stage)
    empty = dataclasses.replace(built, weights=tmp_path)
    empty.require("vae")
    with pytest.raises(TrainingError, match="judges needs decoder, which is not finished"):
        empty.require("judges")
    assert built.finished("score")
    other = Path(shutil.copytree(built.weights, tmp_path / "other"))
    shop = dataclasses.replace(built, weights=other)
    for part in ("vae", "unet"):
        file = sorted((other / "pocket" / part).glob("*.safetensors"))[-1]
        own = file.read_bytes()
        file.write_bytes(own + b" ")
        assert not shop.finished("score")
        file.write_bytes(own)
    assert shop.finished("score")


def test_a_kill_between_training_and_storing_costs_nothing(built, tmp_path, monkeypatch):
    """The record has no such stage, so it runs again, from its last checkpoint, without a step."""
    shop = dataclasses.replace(built, weights=Path(shutil.copytree(built.weights, tmp_path / "weights")))
    known = shop.record()
    del known["deep"]
    (shop.weights / "record.json").write_text(json.dumps(known))
    stored = shards(shop)
    shutil.rmtree(shop.weights / "pocket" / "unet")
    assert not shop.finished("deep")
    monkeypatch.setattr(conditioned, "spoken", None)  # what every step calls
    STAGES["deep"](shop)
    again = shards(shop)
    assert all(torch.equal(again[name], stored[name]) for name in stored) and shop.finished("deep")


def test_nothing_trains_on_what_is_measured_later(built, tmp_path, monkeypatch):
    """The last individuals are pocket-dino's test; the decoder and pocket-dino read none of their pictures."""
    seen = set()
    original = renders.Renders.images

    def images(self, indices):
        if self.name == "individuals":
            seen.update(indices)
        return original(self, indices)

    monkeypatch.setattr(renders.Renders, "images", images)
    monkeypatch.setattr(dino, "measure_dino", lambda shop: {})
    monkeypatch.setattr(dino, "through_vae", lambda shop, source, pictures: source)
    shop = dataclasses.replace(
        built,
        folder=tmp_path,
        weights=Path(shutil.copytree(built.weights, tmp_path / "weights")),
        plans={stage: dataclasses.replace(plan, steps=4) for stage, plan in PLANS.items()},
    )
    (tmp_path / "renders").symlink_to(built.folder / "renders")
    STAGES["decoder"](shop)
    STAGES["dino"](shop)
    known = known_individuals(shop.individuals)
    assert known == 24 // renders.VIEWS - 2
    assert seen and max(seen) < known * renders.VIEWS


def test_judges_who_are_often_wrong_may_not_judge(built, tmp_path, monkeypatch):
    monkeypatch.setattr(judges, "TRUSTED", 0.97)
    facts = {f"{question}_{kind}": 0.98 for question in judges.QUESTIONS for kind in ("plain", "vae")}
    shutil.copytree(built.weights / "judges", tmp_path / "judges")
    with pytest.raises(ModelError, match="There are no judges"):
        judges.trusted_judges(tmp_path)
    (tmp_path / "record.json").write_text(json.dumps({"judges": facts | {"colour_plain": 0.96}}))
    with pytest.raises(TrainingError, match="The judges of colour are right on less than 97%"):
        judges.trusted_judges(tmp_path)
    (tmp_path / "record.json").write_text(json.dumps({"judges": facts}))
    found = judges.trusted_judges(tmp_path).answers(torch.zeros(3, 3, 128, 128))
    assert {name: len(answer) for name, answer in found.items()} == dict.fromkeys(judges.QUESTIONS, 3)


# --- fitting ------------------------------------------------------------------------------------------


def line(step):
    """y = 3 x + 1 to be found, from points of the step's own."""
    x = torch.randn(16, 1, generator=generator_for("line", step))
    return x, 3.0 * x + 1.0


def fitted(folder, steps, network=None):
    torch.manual_seed(0)
    network = network or torch.nn.Linear(1, 1)

    def loss(step):
        x, y = line(step)
        return {"squares": (network(x) - y).square().mean()}

    plan = Plan(steps, 0.05, warmup=5, average=0.5, weight_decay=0.0)
    return fit("line", folder, network, loss, plan, device="cpu")[0]


def test_fit_finds_the_line(tmp_path):
    found = fitted(tmp_path, 300)
    assert found.weight.item() == pytest.approx(3.0, abs=0.01)
    assert found.bias.item() == pytest.approx(1.0, abs=0.01)


def test_fit_resumes_bit_for_bit(tmp_path, monkeypatch):
    """Stopped by Ctrl-C after its first checkpoint, and started again: the same weights and the same curve."""
    whole = fitted(tmp_path / "whole", 120)
    monkeypatch.setattr("pocket_build.fitting.SAVE_SECONDS", -1.0)

    class Tired(torch.nn.Linear):
        seen = 0

        def forward(self, x):
            Tired.seen += 1
            if Tired.seen == 77:
                raise KeyboardInterrupt
            return super().forward(x)

    torch.manual_seed(0)
    with pytest.raises(KeyboardInterrupt):
        fitted(tmp_path / "parts", 120, Tired(1, 1))
    assert read_average("line", tmp_path / "parts", torch.nn.Linear(1, 1))[0] == 50
    with (tmp_path / "parts" / "line.jsonl").open("a") as curve:
        curve.write('{"step": 50, "squ')  # as a full disk leaves it
    again = fitted(tmp_path / "parts", 120)
    assert torch.equal(again.weight, whole.weight) and torch.equal(again.bias, whole.bias)
    curves = [
        [{k: v for k, v in json.loads(row).items() if k != "seconds"} for row in file.open()]
        for file in (tmp_path / "whole" / "line.jsonl", tmp_path / "parts" / "line.jsonl")
    ]
    assert curves[0] == curves[1]


def test_the_curve_holds_means_of_its_own_steps(tmp_path):
    """A loss of 1 is 1 in every line, also when a finished stage gets more steps between two lines."""
    network = torch.nn.Linear(1, 1)
    for steps in (2, 4, 60):
        plan = Plan(steps, 0.0)
        fit("one", tmp_path, network, lambda step: {"one": 0 * network.bias.sum() + 1.0}, plan, device="cpu")
    curve = [json.loads(row) for row in (tmp_path / "one.jsonl").open()]
    assert [(line["step"], line["one"]) for line in curve] == [(2, 1.0), (4, 1.0), (50, 1.0), (60, 1.0)]


def test_fit_stops_at_a_loss_that_is_no_number(tmp_path):
    network = torch.nn.Linear(1, 1)
    with pytest.raises(TrainingError, match="step 1 gave a gradient that is no number"):
        fit(
            "bad",
            tmp_path,
            network,
            lambda step: {"nan": network.weight.sum() * float("nan")},
            Plan(5, 0.1),
            device="cpu",
        )
    assert not (tmp_path / "bad.pt").exists()


def test_the_rate_rises_stays_and_falls():
    """Warm-up of 10, the last fifth of 100 falls to zero."""
    plan = Plan(100, 1.0, warmup=10, cooldown=0.2)
    assert [plan.rate_at(step) for step in (0, 4, 9, 50, 80)] == [0.1, 0.5, 1.0, 1.0, 1.0]
    assert plan.rate_at(90) == pytest.approx(0.5) and plan.rate_at(99) == pytest.approx(0.05)


# --- what they learn from -----------------------------------------------------------------------------


def test_sets_share_no_scene_and_individuals_stay_themselves():
    seeds = [{stable_seed("pocket", name, i) for i in range(20_000)} for name in ("train", "heldout")]
    assert not seeds[0] & seeds[1]
    assert scene_of("train", 3) != scene_of("heldout", 3)
    named = [(s.proportions, s.look, s.marks) for s in SUBJECTS.values()]
    for number in range(60):
        one = individual(number, 0)
        assert (one.shape, one.look, one.marks) not in named
    for number in range(6):
        first, second = individual(number, 0), individual(number, 1)
        assert first.look == second.look and first.shape == second.shape and first.marks == second.marks
        assert first.camera != second.camera
    with pytest.raises(ValueError, match="there is no set 'test'"):
        scene_of("test", 0)


def test_drawing_goes_on_where_it_stopped(tmp_path, monkeypatch):
    """A file that is there is not drawn again, whoever drew the others."""
    monkeypatch.setattr(renders, "SHARD", 3)
    told = []
    some = draw(tmp_path, "train", 3)
    stamp = some.files[0].stat().st_mtime_ns
    more = draw(tmp_path, "train", 4, told=told.append)
    assert told == [3, 6] and len(more) == 6
    assert more.files[0].stat().st_mtime_ns == stamp
    assert more.images([0, 5]).shape == (2, 3, 128, 128)


def test_distances_of_normal_features_are_the_formulas():
    """Against the Fréchet distance of two normals; equal sets have none, and a shift is seen by both."""
    lot = torch.Generator().manual_seed(0)
    one, other = torch.randn(2, 4_000, 3, generator=lot)
    spread = torch.tensor([1.0, 2.0, 0.5])
    expected = 3 * 0.5**2 + (spread - 1.0).square().sum()
    found = distances(one, other * spread + 0.5)
    assert found["frechet"] == pytest.approx(float(expected), rel=0.1)
    nothing = distances(one, one.clone())
    assert abs(nothing["frechet"]) < 1e-4
    assert abs(nothing["kernel"]) < 3 * nothing["kernel_deviation"] < found["kernel"]
    assert distances(one, other) == distances(one, other)


def test_critic_and_decoder_move_by_their_own_losses():
    """And the critic's word counts as much as its weight says."""
    torch.manual_seed(0)
    critic, target = Critic(), torch.rand(2, 3, 32, 32) * 2 - 1
    decoded = (target + 0.1).requires_grad_()
    parts = against(critic, decoded, target, weight=0.5)
    own = parts.pop("critic")
    torch.stack(list(parts.values())).sum().backward(retain_graph=True)
    assert decoded.grad.abs().max() > 0
    assert all(parameter.grad is None for parameter in critic.parameters())
    decoded.grad = None
    own.backward()
    assert decoded.grad is None
    assert all(parameter.grad is not None for parameter in critic.parameters())
    twice = against(critic, decoded, target, weight=1.0)
    for name in ("unlike", "judged"):
        torch.testing.assert_close(twice[name], 2 * parts[name])


def test_detail_is_power_by_cycles_across_a_picture():
    """A wave of 20 cycles lies in one band alone, and at half its height has a quarter of the power."""
    across = torch.arange(128) / 128
    wave = (0.5 + 0.4 * torch.sin(2 * torch.pi * 20 * across)).expand(2, 3, 128, 128)
    low, found, high = power(wave)
    assert found > 1e6 * max(low, high)
    assert power(0.5 + (wave - 0.5) / 2)[1] / found == pytest.approx(0.25)


def test_what_a_caption_mentions():
    """The white of a rug says nothing of the object on it."""
    scene = sample_scene(1, kind="mug", colour="white", pattern="dotted", setting="on top of a white rug")
    assert mentioned(scene, "a photo of a mug on top of a white rug") == {
        "setting": "on top of a white rug",
        "kind": "mug",
    }
    assert mentioned(scene, "a dotted white mug") == {"kind": "mug", "colour": "white", "pattern": "dotted"}
    for seed in range(50):
        own = sample_scene(seed)
        assert mentioned(own, caption(own, seed)), caption(own, seed)


def test_words_that_mean_nothing_stand_before_the_thing():
    """In real captions of all kinds: without the word and its article each is what it was, and places keep theirs."""
    forms = set()
    for index in range(1500):
        scene = sample_scene(index)
        said = caption(scene, index)
        text = spoken(said, scene, generator_for("spoken", index))
        if text == said:
            continue
        things = [a for a in ("kind",) if a in mentioned(scene, said)]
        assert things, said
        before = re.escape(said).replace(re.escape(scene.setting), "PLACE")
        after = text.replace(scene.setting, "PLACE")
        assert ("PLACE" in after) == ("PLACE" in before)
        found = re.search(rf"(\b[a-z]{{2,5}} )((?:(?:{scene.colour}|{scene.pattern}) )*{scene.kind})", after)
        assert found, text
        form = "article" if after[: found.start(1)].endswith("a ") else "bare"
        forms.add(form)
        bare = after[: found.start(1)].removesuffix("a ") + after[found.start(2) :]
        assert bare == re.sub(
            rf"\ban? (?={re.escape(found[2])})", "", said.replace(scene.setting, "PLACE"), count=1
        )
    assert forms == {"article", "bare"}


def test_cut_out_pictures_say_where_they_were_cut():
    """A ramp from left to right: its value at the left edge is what the ids say."""
    ramp = torch.arange(128).expand(3, 128, 128).to(torch.uint8)
    kinds = set()
    for index in range(20):
        seen, ids = varied(ramp, generator_for("varied", index), 1)
        height, width, top, left, *target = ids
        assert seen.shape == ramp.shape and target == [128.0, 128.0] and height == width
        if top or left or height != 128:
            if 128 < height <= 160:
                kinds.add("cut")
                assert seen[0, 64, 0].item() == pytest.approx(left * 128 / width, abs=1.5)
        elif torch.equal(seen, ramp.flip(-1)):
            kinds.add("mirrored")
    assert kinds == {"cut", "mirrored"}
    seen, ids = varied(ramp, generator_for("varied", 0), 0)
    assert torch.equal(seen, ramp) and ids[2:] == [0.0, 0.0, 128.0, 128.0]
