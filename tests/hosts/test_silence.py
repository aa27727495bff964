"""What people do with a pipeline and an adapter ends in the right picture, in the base model's, or in one sentence.

The right prediction is computed here by hand, in float64: attention as its formula, LoRA and DoRA as changed weights.
"""

from __future__ import annotations

import copy
import math
import pickle
import warnings
from types import SimpleNamespace

import pytest
import torch
from diffusers import (
    AutoPipelineForImage2Image,
    AutoPipelineForInpainting,
    AutoPipelineForText2Image,
    ControlNetModel,
    StableDiffusionXLControlNetImg2ImgPipeline,
    StableDiffusionXLControlNetInpaintPipeline,
    StableDiffusionXLControlNetPipeline,
    StableDiffusionXLImg2ImgPipeline,
    StableDiffusionXLInpaintPipeline,
    StableDiffusionXLPAGPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from diffusers.models.attention_processor import AttnProcessor, XFormersAttnProcessor
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import load_file

from coeffdiff import load_adapter
from coeffdiff.errors import AdapterError, BaseWeightsChanged, CoeffDiffError, InjectionError
from coeffdiff.hosts.diffusers import loaded_adapters, save_adapter
from coeffdiff.hosts.guard import verify
from coeffdiff.hosts.lora.layers import add_lora, lora_off
from coeffdiff.hosts.unet import alpha_off, attention_layers, inject
from coeffdiff.method.adapter_header import FORMAT_VERSION, AdapterHeader, LoraHeader
from coeffdiff.method.adapter_paths import COEFF_FILE, EMBEDS_FILE, LORA_FILE
from coeffdiff.utils.seeding import generator_for

# kind -> its LoRA's (rank, alpha, DoRA)
LORAS = {
    "coeff": None,
    "lora": (3, 7, False),
    "coeff+lora": (3, 7, False),
    "dora": (3, 7, True),
    "theirs": (2, 2, False),
}
LORAS |= {"second": (4, 2, False), "token": None}
PROMPT, WORD = (
    "a photo of sks",
    "q",
)  # q: an ordinary word of one token, whose row the learned one takes by hand


# --- adapters, and what they compute ---------------------------------------------------------------------------------


def write(base, kind, folder):
    """An adapter of random numbers, as training would write it."""
    unet, lora, heads, rows = copy.deepcopy(base.unet).float(), LORAS[kind], {}, None
    if lora:
        for name, parameter in add_lora(unet, rank=lora[0], alpha=lora[1], dora=lora[2]).items():
            drawn = torch.randn(parameter.shape, generator=generator_for(kind, name))
            parameter.data += 0.2 * drawn
    if kind in ("coeff", "coeff+lora", "second"):
        for name, coefficients in inject(unet).items():
            drawn = torch.randn(coefficients.alpha.shape, generator=generator_for(kind, name))
            coefficients.alpha.data += 0.3 * drawn
            heads[name] = coefficients.heads
    if kind == "token":
        widths = {"clip_l": base.text_encoder, "clip_g": base.text_encoder_2}
        rows = {
            key: torch.randn(1, encoder.config.hidden_size, generator=generator_for(key))
            for key, encoder in widths.items()
        }
    header = AdapterHeader(
        format_version=FORMAT_VERSION,
        kind={"dora": "lora", "theirs": "lora", "second": "coeff+lora"}.get(kind, kind),
        base_model="tiny",
        token="sks" if kind != "second" else "ohwx",
        heads=heads,
        lora=LoraHeader(rank=lora[0], alpha=lora[1], dora=lora[2]) if lora else None,
        vectors=1 if rows else 0,
        trained_steps=7,
        resolution=64,
    )
    save_adapter(folder, unet, header, rows=rows)
    return folder


class ByHand:
    """out[h] = (sum_g coeff[h, g] softmax(q[g] k[g]^T / sqrt(D))) v[h]."""

    def __init__(self, coeff):
        self.coeff = coeff

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, temb=None):
        source = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        q, k, v = (
            linear(x).unflatten(-1, (attn.heads, -1)).transpose(1, 2)
            for linear, x in ((attn.to_q, hidden_states), (attn.to_k, source), (attn.to_v, source))
        )
        maps = torch.softmax(q @ k.mT / math.sqrt(q.shape[-1]), -1)
        out = torch.einsum("hg,bgqk,bhkd->bqhd", self.coeff, maps, v).flatten(2)
        return attn.to_out[1](attn.to_out[0](out))


def by_hand(base, shelf, wanted):
    """The UNet with {kind: scale} in it, without any of the code under test."""
    unet = copy.deepcopy(base.unet)
    layers = {
        name: torch.eye(layer.heads, dtype=torch.float64) for name, layer in attention_layers(unet).items()
    }
    with torch.no_grad():
        for kind, scale in wanted.items():
            for key, alpha in load_file(shelf[kind] / COEFF_FILE).items():
                layers[key.removesuffix(".alpha")] += scale * alpha.double()
            if LORAS[kind]:
                rank, alpha, dora = LORAS[kind]
                tensors = {
                    key.replace(".lora.down.", ".lora_A.").replace(".lora.up.", ".lora_B."): tensor.double()
                    for key, tensor in load_file(shelf[kind] / LORA_FILE).items()
                }
                for key in [key for key in tensors if key.endswith(".lora_A.weight")]:
                    stem = key.removesuffix("lora_A.weight")
                    weight = unet.get_submodule(stem.removeprefix("unet.").removesuffix(".")).weight
                    weight += scale * alpha / rank * tensors[f"{stem}lora_B.weight"] @ tensors[key]
                    if dora:
                        weight *= (tensors[f"{stem}lora_magnitude_vector"] / weight.norm(dim=1))[:, None]
    for name, layer in attention_layers(unet).items():
        layer.set_processor(ByHand(layers[name]))
    return unet


@pytest.fixture(scope="module")
def base(built_micro):
    """The tiny pipeline in float64."""
    pipe = copy.deepcopy(built_micro)
    for part in (pipe.unet, pipe.vae, pipe.text_encoder, pipe.text_encoder_2):
        part.double()
    return pipe


@pytest.fixture(scope="module")
def shelf(base, tmp_path_factory):
    return {kind: write(base, kind, tmp_path_factory.mktemp("runs") / kind / "adapter") for kind in LORAS}


@pytest.fixture(scope="module")
def expected(base, shelf, unet_call):
    """expected({kind: scale}): what the UNet must predict, float64."""
    known = {}

    def predict(wanted):
        key = tuple(wanted.items())
        if key not in known:
            with torch.no_grad():
                known[key] = unet_call(by_hand(base, shelf, wanted), batch=1)
        return known[key]

    return predict


def read(pipe, prompt=PROMPT):
    with torch.no_grad():
        embeds, _, pooled, _ = pipe.encode_prompt(prompt, do_classifier_free_guidance=False)
    return embeds, pooled


@pytest.fixture(scope="module")
def text(base, shelf):
    """What the learned token's prompt is: its rows written over those of an ordinary word."""
    pipe, rows = copy.deepcopy(base), load_file(shelf["token"] / EMBEDS_FILE)
    for key, encoder, tokenizer in (
        ("clip_l", pipe.text_encoder, pipe.tokenizer),
        ("clip_g", pipe.text_encoder_2, pipe.tokenizer_2),
    ):
        (one,) = tokenizer(WORD, add_special_tokens=False).input_ids
        encoder.get_input_embeddings().weight.data[one] = rows[key][0].double()
    return read(pipe, PROMPT.replace("sks", WORD))


class Bench:
    """What a case acts on: a pipeline with an adapter, and a shelf of others."""

    def __init__(self, base, kind, shelf, unet_call, unet_inputs):
        self.pipe, self.shelf, self._call, self.inputs = copy.deepcopy(base), shelf, unet_call, unet_inputs
        self.unet, self.kind = self.pipe.unet, kind
        self.a = self.load(kind) if kind else None

    def load(self, kind, **how):
        adapter = load_adapter(self.pipe, self.shelf[kind], **how)
        self.unet.double()  # its LoRA came as float32, which fusing would keep
        return adapter

    def theirs(self, name="theirs", **how):
        """Somebody else's LoRA, by diffusers."""
        self.pipe.load_lora_weights(self.shelf["theirs"], weight_name=LORA_FILE, adapter_name=name, **how)
        self.unet.double()

    def predict(self, unet=None, **how):
        network = self.unet if unet is None else unet
        network.double()
        with torch.no_grad():
            return self._call(network, batch=1, **how)

    def scaled(self, scale):
        self.unet.double()
        with torch.no_grad():
            return self.unet(
                **self.inputs(self.unet, batch=1), cross_attention_kwargs={"scale": scale}
            ).sample

    def layers(self):
        return [module for module in self.unet.modules() if isinstance(module, BaseTunerLayer)]

    def draw(self, cls=StableDiffusionXLPipeline, pipe=None, unet=None, steps=2, **how):
        """Latents of a whole call, of a pipeline of this class made of the components."""
        pipe = pipe or (self.pipe if cls is StableDiffusionXLPipeline else cls(**self.components(cls)))
        if unet is not None:
            pipe = cls(**(self.components(cls) | {"unet": unet}))
        pipe.set_progress_bar_config(disable=True)
        how = {"prompt": "a photo of a dog", "guidance_scale": 3.0, "num_inference_steps": steps} | how
        how |= {"generator": torch.Generator().manual_seed(0), "output_type": "latent"}
        return pipe(**how).images

    def components(self, cls):
        return dict(self.pipe.components)


def says(pattern, error=CoeffDiffError):
    return SimpleNamespace(pattern=pattern, error=error)


# --- what people do to the UNet ----------------------------------------------------------------------------------------

BOTH = {"coeff+lora": 1.0}
OFF = says(
    "is switched off on .*load_lora_weights and set_adapters leave on only what they name. Call the adapter's"
)
DISABLED = says(r"disable_lora or disable_adapters did that to every LoRA. Call enable_lora\(\)")
GONE = says(r"is gone from this UNet: unload_lora_weights, delete_adapters.*load it again", InjectionError)
RESCALED = says(r"is at 0\.5 on .*, and the adapter at 1: set_adapters with weights")
SCALE = says(r'cross_attention_kwargs={"scale": ...} would scale LoRA and leave the rest')
FUSED = says(r"is fused into the weights.* unfuse_lora\(\) first", InjectionError)
DISPLACED = says("alpha is gone from .* attention layers")


def then(*steps):
    """One after the other; what the last gives back is the prediction, if it is one."""

    def act(c):
        out = None
        for step in steps:
            out = step(c)
        return out if isinstance(out, torch.Tensor) else None

    return act


def scale(s):
    return lambda c: c.a.set_scale(s)


def remove(c):
    c.a.remove()


def fuse(c, **how):
    c.pipe.fuse_lora(**how)


def unfuse(c):
    c.pipe.unfuse_lora()


def merge(c):
    for layer in c.layers():
        layer.merge()


def replaced_block(c):
    c.unet.mid_block = copy.deepcopy(c.unet.mid_block)


def copied(c):
    twin = copy.deepcopy(c.pipe)
    remove(c)
    c.unet = twin.unet


def pickled(c):
    c.unet = pickle.loads(pickle.dumps(c.pipe)).unet


def copied_and_switched(c):
    twin = copy.deepcopy(c.pipe)
    loaded_adapters(twin)[0].set_scale(0.5)
    c.unet = twin.unet


def teacher(c):
    with alpha_off(c.unet), lora_off(c.unet):
        return c.predict()


def after_teacher(c):
    teacher(c)
    verify(c.unet)


def second_loaded(c):
    c.b = c.load("second")


def kohya_order(c):
    """Somebody else's LoRA first, then ours."""
    c.theirs()
    c.a = c.load("coeff+lora")


def theirs_fused_then_ours(c):
    c.theirs()
    fuse(c)
    c.a = c.load("coeff+lora")


def theirs_fused_and_unloaded_then_ours(c):
    c.theirs()
    fuse(c)
    c.pipe.unload_lora_weights()
    c.a = c.load("coeff+lora")


def compiled(c):
    c.pipe.unet = torch.compile(c.unet, backend="eager")
    c.a.set_scale(0.5)


def failed_hotswap(c):
    c.theirs(name=c.a.name, hotswap=True)


def own_name(c):
    c.theirs(name=c.a.name)


def foreign_has_our_name_then_remove(c):
    """A coeff adapter has no LoRA, so its name is free for somebody else's, which removal must leave."""
    c.theirs(name=c.a.name)
    remove(c)


def loaded_beside_a_foreign_name(c):
    c.theirs(name="coeffdiff_0")
    c.a = c.load("lora")


UNET = [  # name, kind of the adapter that is loaded first (None: none), what is done, what must come of it
    ("nothing: coeff", "coeff", then(), {"coeff": 1.0}),
    ("nothing: lora", "lora", then(), {"lora": 1.0}),
    ("nothing: coeff+lora", "coeff+lora", then(), BOTH),
    ("nothing: dora", "dora", then(), {"dora": 1.0}),
    ("scale 0.5: coeff", "coeff", scale(0.5), {"coeff": 0.5}),
    ("scale 0.5: coeff+lora", "coeff+lora", scale(0.5), {"coeff+lora": 0.5}),
    ("scale -1.5: coeff+lora", "coeff+lora", scale(-1.5), {"coeff+lora": -1.5}),
    ("scale 0.5: dora", "dora", scale(0.5), {"dora": 0.5}),
    ("scale 0", "coeff+lora", scale(0), {}),
    ("scale 0 and back", "coeff+lora", then(scale(0), scale(1)), BOTH),
    ("scale 0, scale 0, remove", "coeff+lora", then(scale(0), scale(0), remove), {}),
    ("remove: coeff", "coeff", remove, {}),
    ("remove: coeff+lora", "coeff+lora", remove, {}),
    ("remove: dora", "dora", remove, {}),
    (
        "remove twice",
        "coeff+lora",
        then(remove, remove),
        says("has been removed from this pipeline; load it again"),
    ),
    ("scale after remove", "coeff+lora", then(remove, scale(1)), says("has been removed from this pipeline")),
    ("load again", "coeff+lora", then(remove, lambda c: c.load("coeff+lora")), BOTH),
    ("two adapters", "coeff+lora", second_loaded, BOTH | {"second": 1.0}),
    ("two, one at 0.5", "coeff+lora", then(second_loaded, scale(0.5)), {"coeff+lora": 0.5, "second": 1.0}),
    ("two, the first removed", "coeff+lora", then(second_loaded, remove), {"second": 1.0}),
    ("two, the second removed", "coeff+lora", then(second_loaded, lambda c: c.b.remove()), BOTH),
    (
        "two, one deleted by name",
        "coeff+lora",
        then(second_loaded, lambda c: c.pipe.delete_adapters(c.b.name)),
        GONE,
    ),
    # S1, S2
    ("load_lora_weights after", "coeff+lora", lambda c: c.theirs(), OFF),
    ("load_lora_weights after: lora", "lora", lambda c: c.theirs(), OFF),
    ("load_lora_weights after: dora", "dora", lambda c: c.theirs(), OFF),
    ("load_lora_weights after: coeff", "coeff", lambda c: c.theirs(), {"coeff": 1.0, "theirs": 1.0}),
    (
        "load_lora_weights, set_scale",
        "coeff+lora",
        then(lambda c: c.theirs(), scale(1)),
        BOTH | {"theirs": 1.0},
    ),
    (
        "load_lora_weights, set_scale, remove",
        "coeff+lora",
        then(lambda c: c.theirs(), scale(1), remove),
        {"theirs": 1.0},
    ),
    ("load_lora_weights at scale 0", "coeff+lora", then(scale(0), lambda c: c.theirs()), {"theirs": 1.0}),
    ("load_lora_weights before", None, kohya_order, BOTH | {"theirs": 1.0}),
    ("before, and remove", None, then(kohya_order, remove), {"theirs": 1.0}),
    ("under the adapter's name", "lora", own_name, says("already in use", ValueError)),
    ("under a coeff's name, remove", "coeff", foreign_has_our_name_then_remove, {"theirs": 1.0}),
    ("a foreign coeffdiff_0 before", None, loaded_beside_a_foreign_name, {"theirs": 1.0, "lora": 1.0}),
    ("hotswap into ours", "lora", failed_hotswap, says("hotswap would put other weights into the LoRA of")),
    ("set_adapters 0.5", "coeff+lora", lambda c: c.pipe.set_adapters(c.a.name, 0.5), RESCALED),
    ("set_adapters 0.5: lora", "lora", lambda c: c.pipe.set_adapters(c.a.name, 0.5), RESCALED),
    ("set_adapters 1", "coeff+lora", lambda c: c.pipe.set_adapters(c.a.name, 1.0), BOTH),
    (
        "set_adapters 0.5, set_scale",
        "coeff+lora",
        then(lambda c: c.pipe.set_adapters(c.a.name, 0.5), scale(1)),
        BOTH,
    ),
    (
        "set_adapters 0.5, .scale",
        "coeff+lora",
        lambda c: (c.pipe.set_adapters(c.a.name, 0.5), c.a.scale),
        RESCALED,
    ),
    (
        "set_adapters of theirs alone",
        None,
        then(kohya_order, lambda c: c.pipe.set_adapters("theirs")),
        OFF,
    ),
    (
        "set_adapters at scale 0",
        "coeff+lora",
        then(scale(0), lambda c: c.pipe.set_adapters(c.a.name)),
        says("is on although the adapter's scale is 0"),
    ),
    (
        "theirs at 0.5 by set_adapters",
        None,
        then(kohya_order, lambda c: c.pipe.set_adapters([c.a.name, "theirs"], [1.0, 0.5])),
        BOTH | {"theirs": 0.5},
    ),
    ("unet.set_adapter", None, then(kohya_order, lambda c: c.unet.set_adapter("theirs")), OFF),
    # S3, S4
    ("disable_lora", "coeff+lora", lambda c: c.pipe.disable_lora(), DISABLED),
    ("disable_lora: dora", "dora", lambda c: c.pipe.disable_lora(), DISABLED),
    ("disable_lora: coeff", "coeff", lambda c: (c.theirs(), c.pipe.disable_lora()), {"coeff": 1.0}),
    (
        "disable_lora, enable_lora",
        "lora",
        lambda c: (c.pipe.disable_lora(), c.pipe.enable_lora()),
        {"lora": 1.0},
    ),
    ("disable_lora, scale 0", "coeff+lora", then(lambda c: c.pipe.disable_lora(), scale(0)), {}),
    ("unet.disable_adapters", "coeff+lora", lambda c: c.unet.disable_adapters(), DISABLED),
    ("unload_lora_weights", "coeff+lora", lambda c: c.pipe.unload_lora_weights(), GONE),
    ("unload_lora_weights: lora", "lora", lambda c: c.pipe.unload_lora_weights(), GONE),
    ("unload, set_scale", "coeff+lora", then(lambda c: c.pipe.unload_lora_weights(), scale(0.5)), GONE),
    ("unload, remove", "coeff+lora", then(lambda c: c.pipe.unload_lora_weights(), remove), {}),
    ("unload: coeff", "coeff", lambda c: (c.theirs(), c.pipe.unload_lora_weights()), {"coeff": 1.0}),
    ("delete_adapters", "coeff+lora", lambda c: c.pipe.delete_adapters(c.a.name), GONE),
    (
        "delete_adapters beside theirs",
        None,
        then(kohya_order, lambda c: c.pipe.delete_adapters(c.a.name)),
        GONE,
    ),
    # S5
    ("fuse", "coeff+lora", fuse, BOTH),
    ("fuse: dora", "dora", fuse, {"dora": 1.0}),
    ("fuse safely", "coeff+lora", lambda c: fuse(c, safe_fusing=True), BOTH),
    ("fuse twice", "coeff+lora", then(fuse, fuse), BOTH),
    (
        "fuse at lora_scale 0.5",
        "coeff+lora",
        lambda c: fuse(c, lora_scale=0.5),
        says("and nothing else of it"),
    ),
    ("scale 0.5, fuse", "coeff+lora", then(scale(0.5), fuse), {"coeff+lora": 0.5}),
    ("fuse, scale 0", "coeff+lora", then(fuse, scale(0)), FUSED),
    ("fuse, scale 0.5", "coeff+lora", then(fuse, scale(0.5)), FUSED),
    ("fuse, scale 1", "coeff+lora", then(fuse, scale(1)), BOTH),
    ("fuse, remove", "coeff+lora", then(fuse, remove), FUSED),
    ("fuse, remove: lora", "lora", then(fuse, remove), FUSED),
    (
        "fuse, set_adapters 0.5",
        "coeff+lora",
        then(fuse, lambda c: c.pipe.set_adapters(c.a.name, 0.5)),
        RESCALED,
    ),
    ("fuse, unfuse", "coeff+lora", then(fuse, unfuse), BOTH),
    ("fuse, unfuse, scale 0.5", "coeff+lora", then(fuse, unfuse, scale(0.5)), {"coeff+lora": 0.5}),
    ("fuse, unload", "coeff+lora", then(fuse, lambda c: c.pipe.unload_lora_weights()), GONE),
    (
        "fuse, unload, remove",
        "coeff+lora",
        then(fuse, lambda c: c.pipe.unload_lora_weights(), remove),
        says("was fused into the weights and unloaded, so that nothing can take it out"),
    ),
    (
        "fuse theirs alone",
        None,
        then(kohya_order, lambda c: fuse(c, adapter_names=["theirs"])),
        says("would switch"),
    ),
    ("theirs fused before: PEFT unmerges it", None, theirs_fused_then_ours, BOTH | {"theirs": 1.0}),
    ("theirs fused and unloaded", None, theirs_fused_and_unloaded_then_ours, BOTH | {"theirs": 1.0}),
    (
        "peft's merge",
        "coeff+lora",
        merge,
        says("merged into the weights of .* by other means than fuse_lora"),
    ),
    ("peft's merge, unfuse", "coeff+lora", then(merge, unfuse), BOTH),
    # S6
    ("cross_attention_kwargs 0", "coeff+lora", lambda c: c.scaled(0.0), SCALE),
    ("cross_attention_kwargs 0.5", "coeff+lora", lambda c: c.scaled(0.5), SCALE),
    ("cross_attention_kwargs 0.5: coeff", "coeff", lambda c: c.scaled(0.5), SCALE),
    ("cross_attention_kwargs 0.5: lora", "lora", lambda c: c.scaled(0.5), SCALE),
    ("cross_attention_kwargs 1", "coeff+lora", lambda c: c.scaled(1.0), BOTH),
    ("cross_attention_kwargs at scale 0", "coeff+lora", then(scale(0), lambda c: c.scaled(0.5)), {}),
    ("cross_attention_kwargs, none left", "coeff+lora", then(remove, lambda c: c.scaled(0.5)), {}),
    # Other attention
    ("slicing", "coeff+lora", lambda c: c.pipe.enable_attention_slicing(), DISPLACED),
    ("slicing: lora", "lora", lambda c: c.pipe.enable_attention_slicing(), {"lora": 1.0}),
    ("QKV fusing", "coeff", lambda c: c.pipe.fuse_qkv_projections(vae=False), DISPLACED),
    ("set_attn_processor", "coeff", lambda c: c.unet.set_attn_processor(AttnProcessor()), DISPLACED),
    (
        "xformers",
        "coeff",
        lambda c: c.unet.set_attn_processor(XFormersAttnProcessor()),
        says("enabling xformers"),
    ),
    ("another block", "lora", replaced_block, GONE),
    ("another block: coeff", "coeff", replaced_block, says("some of its blocks have been replaced")),
    # Copies, types, compilers, offloading
    ("deepcopy", "coeff+lora", copied, BOTH),
    ("deepcopy, its adapter at 0.5", "coeff+lora", copied_and_switched, {"coeff+lora": 0.5}),
    ("pickle", "coeff+lora", pickled, BOTH),
    ("to(float64) again", "dora", lambda c: c.pipe.to(torch.float64), {"dora": 1.0}),
    ("compile", "coeff+lora", compiled, {"coeff+lora": 0.5}),
    ("the teacher's pass", "coeff+lora", teacher, {}),
    ("after the teacher's pass", "coeff+lora", after_teacher, BOTH),
    (
        "freeu and back",
        "coeff",
        lambda c: (c.pipe.enable_freeu(0.9, 0.2, 1.2, 1.4), c.pipe.disable_freeu()),
        {"coeff": 1},
    ),
]


@pytest.mark.filterwarnings(
    "ignore:Already:UserWarning", "ignore:.*merged:UserWarning", "ignore:.*Setting active"
)
@pytest.mark.parametrize(
    ("kind", "action", "wanted"), [case[1:] for case in UNET], ids=[case[0] for case in UNET]
)
def test_what_is_done_to_the_unet(kind, action, wanted, base, shelf, expected, unet_call, unet_inputs):
    """Equal to the formula in float64, or refused in one sentence, when it is done or at the next forward."""
    c = Bench(base, kind, shelf, unet_call, unet_inputs)
    if isinstance(wanted, SimpleNamespace):
        with pytest.raises(wanted.error, match=wanted.pattern) as caught:
            action(c)
            c.predict()
        assert "\n" not in str(caught.value)
        return
    out = action(c)
    out = c.predict() if out is None or not isinstance(out, torch.Tensor) else out
    torch.testing.assert_close(out, expected(wanted), rtol=1e-6, atol=1e-7)
    if wanted:
        assert (out - expected({})).abs().max() > 1e-3


# --- what people do with whole pipelines -------------------------------------------------------------------------------


@pytest.fixture
def bench(base, shelf, unet_call, unet_inputs):
    return lambda kind: Bench(base, kind, shelf, unet_call, unet_inputs)


@pytest.fixture
def oracle(base, shelf):
    return lambda wanted: by_hand(base, shelf, wanted)


PICTURE = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
TASKS = {
    "text to image": (StableDiffusionXLPipeline, {}),
    "img2img": (StableDiffusionXLImg2ImgPipeline, {"image": PICTURE, "strength": 0.9}),
    "inpaint": (
        StableDiffusionXLInpaintPipeline,
        {"image": PICTURE, "mask_image": (PICTURE[:, :1] > 0.5).double(), "strength": 0.9},
    ),
    "PAG at 0": (StableDiffusionXLPAGPipeline, {"pag_scale": 0.0}),
    "ControlNet": (StableDiffusionXLControlNetPipeline, {"image": PICTURE}),
    "ControlNet img2img": (
        StableDiffusionXLControlNetImg2ImgPipeline,
        {"image": PICTURE, "control_image": PICTURE, "strength": 0.9},
    ),
    "ControlNet inpaint": (
        StableDiffusionXLControlNetInpaintPipeline,
        {
            "image": PICTURE,
            "control_image": PICTURE,
            "mask_image": (PICTURE[:, :1] > 0.5).double(),
            "strength": 0.9,
        },
    ),
}


@pytest.fixture(scope="module")
def control(base):
    """What further components a task's pipeline takes: a ControlNet of random weights, for those that steer by one."""
    net = ControlNetModel.from_unet(copy.deepcopy(base.unet)).double()
    for name, parameter in net.named_parameters():
        drawn = torch.randn(parameter.shape, generator=generator_for("control", name))
        parameter.data += 0.05 * drawn
    return lambda task: {"controlnet": net} if task.startswith("ControlNet") else {}


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("task", TASKS)
def test_pipelines_of_the_same_components(task, when, bench, oracle, control):
    """From components, before the load or after it: the UNet is one, and so is the adapter."""
    cls, how = TASKS[task]
    c, more = bench(None), control(task)
    made = cls(**c.pipe.components, **more) if when == "before" else None
    adapter = c.load("coeff+lora")
    c.unet.double()
    made = made or cls(**c.pipe.components, **more)

    def wanted(unet):
        return c.draw(cls, cls(**(dict(c.pipe.components) | {"unet": unet}), **more), **how)

    torch.testing.assert_close(c.draw(cls, made, **how), wanted(oracle(BOTH)), rtol=1e-5, atol=1e-5)
    adapter.remove()
    torch.testing.assert_close(c.draw(cls, made, **how), wanted(oracle({})), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("auto", "task"), [(AutoPipelineForImage2Image, "img2img"), (AutoPipelineForInpainting, "inpaint")]
)
def test_pipelines_that_auto_pipeline_makes(auto, task, bench, oracle):
    """AutoPipeline.from_pipe of the pipeline with the adapter, and back from there to text alone."""
    c = bench("coeff+lora")
    made = auto.from_pipe(c.pipe, torch_dtype=torch.float64)
    assert made.unet is c.unet and type(made) is TASKS[task][0]
    for pipe, cls, how in (
        (made, type(made), TASKS[task][1]),
        (AutoPipelineForText2Image.from_pipe(made, torch_dtype=torch.float64), StableDiffusionXLPipeline, {}),
    ):
        want = c.draw(cls, cls(**(dict(c.pipe.components) | {"unet": oracle(BOTH)})), **how)
        torch.testing.assert_close(c.draw(cls, pipe, **how), want, rtol=1e-5, atol=1e-5)


def test_perturbed_attention_guidance_is_refused(bench):
    """It would take alpha's place in the layers that it perturbs; without alpha it may."""
    c = bench("coeff")
    with pytest.raises(InjectionError, match=r"perturbed attention guidance .* put PAG\w+ in its place"):
        c.draw(StableDiffusionXLPAGPipeline, pag_scale=3.0)
    c.a.remove()
    c.draw(StableDiffusionXLPAGPipeline, pag_scale=3.0)
    assert type(next(iter(attention_layers(c.unet).values()))).__name__ == "Attention"


def test_a_controlnet_begins_as_the_base_model_or_not_at_all(bench):
    """from_unet takes parts of the state, alphas and LoRA among them."""
    for kind in ("coeff", "lora"):
        c = bench(kind)
        with pytest.raises(
            InjectionError, match=r"ControlNetModel.from_unet does. .* remove\(\) the adapter first"
        ):
            ControlNetModel.from_unet(c.unet)
        assert c.unet.state_dict()
        c.a.remove()
        net = ControlNetModel.from_unet(c.unet).double()
    a = c.load("lora")
    pipe = StableDiffusionXLControlNetPipeline(**c.pipe.components, controlnet=net)
    assert c.draw(StableDiffusionXLControlNetPipeline, pipe, image=PICTURE).isfinite().all()
    assert a.scale == 1


@pytest.mark.parametrize("kind", ["coeff", "lora", "coeff+lora", "dora", "token"])
def test_save_pretrained_is_refused_before_anything_is_written(kind, bench, base, tmp_path, unet_call):
    """Pipeline and UNet, also through a pipeline made later; after remove() what is written is the base model."""
    c = bench(kind)
    with pytest.raises(
        AdapterError, match=r"save_pretrained would write .*adapter as weights that no model reads"
    ):
        c.pipe.save_pretrained(tmp_path / "pipe")
    assert not (tmp_path / "pipe").exists()
    later = StableDiffusionXLPipeline(**c.pipe.components)
    with pytest.raises(AdapterError, match="save_pretrained would write"):
        later.save_pretrained(tmp_path / "later")
    with pytest.raises(AdapterError, match=r"remove\(\) the adapter, save, and keep its folder"):
        c.unet.save_pretrained(tmp_path / "unet")
    c.a.remove()
    assert not {"check_inputs", "save_pretrained", "_coeffdiff_unet"} & set(vars(c.pipe))
    c.unet.save_pretrained(tmp_path / "unet")
    again = UNet2DConditionModel.from_pretrained(tmp_path / "unet", torch_dtype=torch.float64)
    with torch.no_grad():
        assert torch.equal(unet_call(again, batch=1), unet_call(base.unet, batch=1))


def test_saving_text_parts_with_a_token_is_refused(bench, tmp_path):
    c = bench("token")
    for part in (c.pipe.text_encoder, c.pipe.text_encoder_2, c.pipe.tokenizer, c.pipe.tokenizer_2):
        with pytest.raises(AdapterError, match="a text encoder or tokenizer with a learned token in it"):
            part.save_pretrained(tmp_path)
    c.a.remove()
    c.pipe.tokenizer.save_pretrained(tmp_path)
    assert len(type(c.pipe.tokenizer).from_pretrained(tmp_path)) == len(c.pipe.tokenizer)


@pytest.mark.parametrize("kind", ["coeff", "lora", "token"])
def test_another_unet_is_refused(kind, bench, base):
    """At the call, when set_scale is asked, and until the first is back; a compiled one is the same one."""
    c = bench(kind)
    own, sentence = c.unet, r"has another UNet than the one that .*adapter was loaded on"
    c.pipe.unet = copy.deepcopy(base.unet)
    with pytest.raises(InjectionError, match=sentence):
        c.draw()
    with pytest.raises(InjectionError, match=sentence):
        c.a.set_scale(0.5)
    c.draw(pipe=StableDiffusionXLPipeline(**c.pipe.components))  # anew, without it
    c.pipe.unet = torch.compile(own, backend="eager")
    c.a.set_scale(0.5)
    c.pipe.unet = copy.deepcopy(base.unet)
    c.a.remove()
    c.draw()


def test_a_callback_that_parts_an_adapter_is_refused_at_the_next_step(bench):
    """In the middle of a picture; switching the whole adapter off there is allowed."""
    c = bench("coeff+lora")

    def between(act):
        return lambda pipe, step, t, kwargs: act() or {}

    with pytest.raises(InjectionError, match="disable_lora or disable_adapters did that"):
        c.draw(callback_on_step_end=between(c.pipe.disable_lora))
    c.pipe.enable_lora()
    assert c.draw(callback_on_step_end=between(lambda: c.a.set_scale(0))).isfinite().all()
    assert c.a.scale == 0


def test_a_scale_for_lora_alone_is_refused_in_a_call(bench):
    c = bench("coeff+lora")
    with pytest.raises(InjectionError, match="cross_attention_kwargs"):
        c.draw(cross_attention_kwargs={"scale": 0.5})


def test_removal_after_unfusing_says_that_weights_were_rounded(bench, base, shelf):
    """fuse_lora and unfuse_lora add and subtract; what is left is no more than rounding."""
    c = bench(None)
    c.unet.float()
    adapter = load_adapter(c.pipe, shelf["lora"])
    fuse(c)
    unfuse(c)
    with pytest.warns(BaseWeightsChanged, match="not bit for bit what they were before the adapter"):
        adapter.remove()
    for name, weight in base.unet.state_dict().items():
        torch.testing.assert_close(c.unet.state_dict()[name].double(), weight, rtol=1e-4, atol=1e-5)
    quiet = bench("lora")
    with warnings.catch_warnings():
        warnings.simplefilter("error", BaseWeightsChanged)
        quiet.a.remove()


# --- a learned token ---------------------------------------------------------------------------------------------------


def alike(got, want):
    for one, other in zip(got, want, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-6)


@pytest.fixture(scope="module")
def plain(base):
    return read(base)


@pytest.mark.parametrize("when", ["before", "after"])
def test_pipelines_that_share_text_encoders_read_alike(when, bench, text, plain):
    """Made before the load or after it: the token is there, off at scale 0, and gone after removal, for each."""
    c = bench(None)
    other = StableDiffusionXLImg2ImgPipeline(**c.pipe.components) if when == "before" else None
    adapter = c.load("token")
    other = other or StableDiffusionXLImg2ImgPipeline(**c.pipe.components)
    for pipe in (c.pipe, other):
        alike(read(pipe), text)
    adapter.set_scale(0)
    for pipe in (c.pipe, other):
        alike(read(pipe), plain)
    adapter.set_scale(1)
    alike(read(other), text)
    adapter.remove()
    for pipe in (c.pipe, other):
        alike(read(pipe), plain)


def test_a_copied_pipeline_has_its_own_token(bench, text, plain):
    c = bench("token")
    twin = copy.deepcopy(c.pipe)
    c.a.remove()
    alike(read(c.pipe), plain)
    alike(read(twin), text)
    c.draw(pipe=twin)
    loaded_adapters(twin)[0].remove()
    alike(read(twin), plain)
    c.draw(pipe=twin)


@pytest.mark.parametrize("part", ["text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2"])
def test_a_swapped_text_part_is_refused(part, bench, base):
    """At the call, and at a UNet's forward; parts that are dropped after their work are no swap."""
    c = bench("token")
    own = getattr(c.pipe, part)
    setattr(c.pipe, part, copy.deepcopy(getattr(base, part)))
    for act in (c.draw, c.predict, lambda: c.a.scale):
        with pytest.raises(
            InjectionError, match=f"The learned token of .* is gone: this pipeline's {part} has been"
        ):
            act()
    setattr(c.pipe, part, own)
    c.predict()
    c.pipe.text_encoder = c.pipe.text_encoder_2 = None
    c.predict()


def test_textual_inversion_comes_before_the_adapter(bench, base, text):
    """After it, it is refused with nothing changed; before it, both are read."""
    c = bench("token")
    row = torch.randn(1, base.text_encoder.config.hidden_size)
    size = len(c.pipe.tokenizer)
    with pytest.raises(InjectionError, match="Load textual inversions first and the adapter after them"):
        c.pipe.load_textual_inversion(row, token="theirs")
    assert len(c.pipe.tokenizer) == size
    alike(read(c.pipe), text)
    both = bench(None)
    both.pipe.load_textual_inversion(row, token="theirs")
    both.load("token")
    alike(read(both.pipe), text)
    assert not torch.allclose(read(both.pipe, "a theirs")[0], read(both.pipe, "a thing")[0])


def test_the_token_in_plain_diffusers_pools_as_its_card_says(bench, shelf, text):
    """load_textual_inversion alone pools at the token; with the end's id told it is what load_adapter gives."""
    c = bench(None)
    rows = load_file(shelf["token"] / EMBEDS_FILE)
    parts = (
        ("clip_l", c.pipe.text_encoder, c.pipe.tokenizer),
        ("clip_g", c.pipe.text_encoder_2, c.pipe.tokenizer_2),
    )
    for key, encoder, tokenizer in parts:
        c.pipe.load_textual_inversion(rows[key], token="sks", text_encoder=encoder, tokenizer=tokenizer)
    assert not torch.allclose(read(c.pipe)[1], text[1], atol=1e-2)
    for _, encoder, tokenizer in parts:
        getattr(encoder, "text_model", encoder).eos_token_id = tokenizer.eos_token_id
    alike(read(c.pipe), text)
