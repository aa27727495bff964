"""Load the pipeline of a model that was found, whatever layout it has."""

from __future__ import annotations

import contextlib
import importlib.util
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from coeffdiff.errors import ModelError
from coeffdiff.method.number_formats import Quantized
from coeffdiff.models.architecture import native_resolution, network_dtype, scheduler_config, vae_factor
from coeffdiff.models.checking import header_of, read_json
from coeffdiff.models.files import fetch_file, prefix_in_file, source_of, weights_of
from coeffdiff.models.foreign import CONTROL_KEYS
from coeffdiff.models.hub_errors import loading_errors
from coeffdiff.models.pipelines import make_pipeline
from coeffdiff.models.quantizing import loading_options, quantize
from coeffdiff.models.scaled_fp8 import is_beside, is_scaled
from coeffdiff.models.scaled_fp8 import read as read_scaled
from coeffdiff.models.source import INDEX, UNET, Backbone, Part, Source
from coeffdiff.utils.console import quiet_libraries
from coeffdiff.utils.heap import freed_at_once
from coeffdiff.utils.own_memory import own_memory

if TYPE_CHECKING:
    import torch

Loader = Callable[..., Any]  # load_pipeline, or what stands in for it


def load_pipeline(backbone: Backbone, *, dtype: torch.dtype, parts: Collection[Part] | None = None) -> Any:
    """The pipeline on CPU, in eval mode, frozen (requires_grad False), downloading what the cache lacks.

    A StableDiffusionXLPipeline or StableDiffusionPipeline; a safety checker in the folder is not loaded.
    Text encoders and UNet are in dtype. The VAE is in float32 if its config has force_upcast, as SDXL's has (in
    half precision it gives NaN and black pictures), else in dtype. Where the backbone says so, the linear layers of
    text encoders and UNet are quantized, and dtype is the type that they compute in.

    Args:
        parts: only these networks are loaded and the others are None, so that training can encode first and load
            the UNet when the text encoders have left memory. Tokenizers and scheduler always come along.
    Raises: ModelError, in one sentence, for anything wrong with the files, the cache or the network.
    """
    return assembled(backbone, read_networks(backbone, dtype, network_names(backbone, parts)))


def network_names(backbone: Backbone, parts: Collection[Part] | None) -> list[str]:
    """The networks that these parts are; None: all."""
    wanted = set(parts) if parts is not None else {"text", "vae", "unet"}
    return [name for name, network in backbone.networks.items() if network.part in wanted]


def read_networks(backbone: Backbone, dtype: torch.dtype, names: Sequence[str]) -> dict[str, Any]:
    """Networks by name, as load_pipeline describes them. Raises: ModelError."""
    from_file = [name for name in names if backbone.in_file(name)]
    from_folder = [name for name in names if name not in from_file]

    import torch

    # One variant for the whole model, the VAE included although it may be computed in float32.
    chosen = {name: weights_of(backbone, name, half=dtype != torch.float32) for name in from_folder}
    needed: dict[Source, set[str]] = {}
    for name, (_, files) in chosen.items():
        needed.setdefault(source_of(backbone, name)[0], set()).update(files)
    for source, together in needed.items():
        fetch_file(source, together)

    with quiet_libraries(), freed_at_once() if backbone.quantize else contextlib.nullcontext():
        networks: dict[str, Any] = {}
        for name, (variant, files) in chosen.items():
            networks[name] = _settled(
                _load_network(backbone, name, variant, files, network_dtype(backbone, name, dtype)),
                quantized_in(backbone, name),
            )
        for name in from_file:
            networks[name] = _settled(
                _load_from_single_file(backbone, name, network_dtype(backbone, name, dtype)),
                quantized_in(backbone, name),
            )
        return networks


def assembled(backbone: Backbone, networks: Mapping[str, Any]) -> Any:
    """A pipeline of these networks, those that it lacks being None, with tokenizers and scheduler of its own."""
    parts = dict.fromkeys(backbone.networks) | dict(networks)
    with quiet_libraries():
        with loading_errors(f"{backbone.name}: its tokenizers or scheduler"):
            others = {**_load_tokenizers(backbone), "scheduler": _load_scheduler(backbone)}
            pipe = make_pipeline(backbone.family, parts | others, **_indexed_options(backbone))
        # Where the UNet or the VAE is left out, diffusers takes SDXL's own, or none.
        pipe.default_sample_size = native_resolution(backbone) // vae_factor(backbone)
        pipe.vae_scale_factor = vae_factor(backbone)
        return pipe


def _load_network(
    backbone: Backbone, network: str, variant: str | None, files: list[str], dtype: torch.dtype
) -> Any:
    import diffusers
    import transformers

    source, subfolder = source_of(backbone, network)
    for file in files:
        if file.endswith(".safetensors"):
            header_of(source.folder / file)
    name = backbone.networks[network].kind
    kind = getattr(transformers if name.startswith("CLIP") else diffusers, name)
    what = f"The {network} of {source.name}"
    with loading_errors(what):
        loaded, report = kind.from_pretrained(
            str(source.folder / subfolder),
            variant=variant,
            use_safetensors=True,
            local_files_only=True,
            dtype=dtype,
            output_loading_info=True,
            **(loading_options(backbone.quantize) if quantizes_while_loading(backbone, network) else {}),
        )
    # Of several files diffusers looks for what is missing in their index, and leaves it without memory.
    unfilled = {name for name, weight in loaded.named_parameters() if weight.is_meta}
    missing = sorted(unfilled.union(report["missing_keys"]))
    if missing:  # the library would fill them with noise
        raise ModelError(f"{what} lacks {len(missing)} tensors that its config needs, such as {missing[0]}.")
    extra = sorted(report["unexpected_keys"])
    # Then the config is of a smaller model, and the rest would be dropped without a word. Text encoders and VAEs may
    # hold leftovers of older libraries.
    if extra and network == "unet":
        raise ModelError(
            f"{what} holds {len(extra)} tensors that its config has no place for, such as {extra[0]}."
        )
    return loaded


def _load_from_single_file(backbone: Backbone, network: str, dtype: torch.dtype) -> Any:
    import diffusers
    import transformers
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from diffusers.loaders.single_file_utils import create_diffusers_clip_model_from_ldm

    assert backbone.file is not None
    configs = str(backbone.source.folder)
    what = f"The {network} of {backbone.file} with the configs of {backbone.source.name}"
    options: dict[str, Any] = {"config": configs, "local_files_only": True}
    file = _tensors_in_file(backbone, network, dtype) or str(backbone.file)
    filled = False
    # diffusers leaves what the file did not fill without memory, and then stumbles over it.
    with loading_errors(what), contextlib.suppress(NotImplementedError):
        if network == "vae":
            loaded = AutoencoderKL.from_single_file(file, subfolder=network, dtype=dtype, **options)
        elif network == "unet":
            loaded = UNet2DConditionModel.from_single_file(file, subfolder=network, dtype=dtype, **options)
        elif isinstance(file, dict):
            kind = getattr(transformers, backbone.networks[network].kind)
            loaded = create_diffusers_clip_model_from_ldm(
                kind, file, subfolder=network, torch_dtype=dtype, **options
            )
        else:  # only the pipeline knows how to convert them
            family = backbone.family
            others = dict.fromkeys((*backbone.networks, *family.tokenizers, "scheduler"))
            del others[network]
            kind = getattr(diffusers, f"{family.pipelines}Pipeline")
            pipe = kind.from_single_file(file, dtype=dtype, **options, **others, **family.options)
            loaded = getattr(pipe, network)
        filled = not any(weight.is_meta for weight in loaded.parameters())
    if not filled:
        raise ModelError(f"{what} lacks tensors that the config needs; another model.config may fit.")
    if network == "unet":
        held_here = len(names_in_file(backbone, network))
        taken = len(loaded.state_dict())
        if held_here != taken:  # what the config has no place for would be dropped without a word
            raise ModelError(
                f"{what} holds {held_here} tensors where the config has place for {taken}; another model.config may "
                "fit."
            )
    return loaded


def names_in_file(backbone: Backbone, network: str, *, scales: bool = False) -> list[str]:
    """The tensors of a network in the single file, with their prefix; scales: also what scales them."""
    assert backbone.file is not None
    prefix = prefix_in_file(backbone, network)
    names = [name for name in header_of(backbone.file) if name.startswith(prefix)]
    own = [name for name in names if name.removeprefix(prefix) not in CONTROL_KEYS]
    return [name for name in own if scales or not is_beside(name)]


def _tensors_in_file(backbone: Backbone, network: str, dtype: torch.dtype) -> dict[str, torch.Tensor] | None:
    """Tensors that diffusers cannot read by itself, scaled ones or a UNet alone, under the names of a whole checkpoint
    (or under diffusers' where it has those). None: diffusers reads the file."""
    assert backbone.file is not None
    if not backbone.unet_alone and not is_scaled(names_in_file(backbone, network, scales=True)):
        return None
    names, prefix = names_in_file(backbone, network), prefix_in_file(backbone, network)
    added = "" if prefix or "conv_in.weight" in names else UNET.prefix
    return {added + name: tensor for name, tensor in read_scaled(backbone.file, names, dtype).items()}


def _settled(network: Any, kind: Quantized | None) -> Any:
    """A network that was read, quantized where it is to be, in memory of its own and frozen."""
    quantize(network, kind)
    own_memory(network)
    return network.requires_grad_(False).eval()


def quantizes_while_loading(backbone: Backbone, network: str) -> bool:
    """Whether a network is quantized tensor by tensor as it is read, and never wide in memory as a whole."""
    return network == "unet" and backbone.quantize in ("int8", "fp8") and not backbone.in_file(network)


def quantized_in(backbone: Backbone, network: str) -> Quantized | None:
    """How a network is quantized; a VAE, which is convolutions, is not."""
    return None if network == "vae" else backbone.quantize


def _indexed_options(backbone: Backbone) -> dict[str, Any]:
    """What the pipeline's index says that a constructor must be told."""
    index = read_json(backbone.source, INDEX)
    asked = {"force_zeros_for_empty_prompt"} & backbone.family.options.keys() & index.keys()
    return {name: index[name] for name in asked}


def _load_tokenizers(backbone: Backbone) -> dict[str, Any]:
    from transformers import CLIPTokenizer

    folder = backbone.source.folder
    return {
        name: CLIPTokenizer.from_pretrained(str(folder / name), local_files_only=True)
        for name in backbone.family.tokenizers
    }


def _load_scheduler(backbone: Backbone) -> Any:
    import diffusers

    config = scheduler_config(backbone)
    kind: Any = getattr(diffusers, str(config.get("_class_name")), None)
    is_scheduler = isinstance(kind, type) and issubclass(kind, diffusers.SchedulerMixin)
    if not is_scheduler:
        raise ModelError(
            f"{backbone.source.name} names {config.get('_class_name')!r}, which is no scheduler of diffusers."
        )
    if config.get("use_beta_sigmas") and importlib.util.find_spec("scipy") is None:
        raise ModelError(f"The scheduler of {backbone.source.name} needs scipy (pip install scipy).")
    return kind.from_config(config)
