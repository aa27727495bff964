"""The adapter's README.md: a model card that says what it is, how to use it and how it was made."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterable, Mapping

from huggingface_hub import ModelCardData

from coeffdiff.config.schema import MethodSettings, Settings, ValidationSettings
from coeffdiff.method.adapter_header import AdapterHeader, row_key
from coeffdiff.method.adapter_paths import EMBEDS_FILE, LORA_FILE
from coeffdiff.method.networks import UNET, network_of
from coeffdiff.training.breakdown import Breakdown
from coeffdiff.utils.hub import HUB_ID

_CONTROL = (
    "Not Coeff-Tuning but a control for comparisons: its alpha recombines the heads' values before ordinary attention, "
    "where Coeff-Tuning recombines their attention maps. It needs coeffdiff."
)


def model_card(
    header: AdapterHeader,
    settings: Settings | None,
    loss: float | None,
    pictures: Iterable[str],
    scores: Mapping[str, float] | None = None,
    broken: Breakdown | None = None,
) -> str:
    """Markdown with the front matter that model hubs read. pictures are file names beside the card.

    settings, loss: of its run; None where they are not known.
    scores: of those pictures, where there was something to score them with.
    broken: what had become of the training by the adapter's step.
    """
    holds, rates = _parts_and_rates(header, settings.method if settings else None)
    rows = {
        "holds": "; ".join(holds),
        "trained": _trained(header, settings),
        "VAE": _vae(header),
        "learning rates": ", ".join(rates),
        "last loss": "" if loss is None else f"{loss:.4f}",
        "the training broke down": str(broken or ""),
        "scores of its validation pictures": _judged(scores or {}, settings.validation) if settings else "",
        "seed": str(settings.training.seed) if settings else "",
        "versions": ", ".join(f"{name} {version}" for name, version in header.versions.items()),
    }
    always = ("holds", "versions", *["learning rates"] * bool(settings))
    table = "".join(f"| {name} | {text} |\n" for name, text in rows.items() if text or name in always)
    subject = subject_of(header)
    front = "\n".join(f"{name}: {_quoted(value)}" for name, value in front_matter(header).to_dict().items())
    return f"""---
{front}
---

# {_plain(subject)}

An adapter for {_code(header.base_model)}, trained with coeffdiff ({header.described}).

{gallery(pictures)}
In prompts {_called(header)}.

{usage(header)}

{_in_other_tools(header)}

| | |
|---|---|
{table}"""


def front_matter(header: AdapterHeader) -> ModelCardData:
    """What the Hub reads of an adapter. It refuses a base model that is no id of its own, so others are left out."""
    loras = ["lora", "template:sd-lora"] if header.lora else []
    return ModelCardData(
        library_name="coeffdiff",
        pipeline_tag="text-to-image",
        base_model=header.base_model if HUB_ID.fullmatch(header.base_model) else None,
        tags=["text-to-image", header.base_family.tag, "diffusers", "coeff-tuning", *loras],
        instance_prompt=f"a photo of {subject_of(header)}",
    )


def subject_of(header: AdapterHeader) -> str:
    """How prompts call the subject: the token and the class word; of several subjects each."""
    return " and ".join(header.calls)


def _called(header: AdapterHeader) -> str:
    names = " and ".join(f"**{_plain(call.strip())}**" for call in header.calls)
    return f"the subjects are called {names}" if header.subjects else f"the subject is called {names}"


def gallery(pictures: Iterable[str]) -> str:
    return "".join(f"![{_plain(name)}]({name})\n" for name in pictures)


def usage(header: AdapterHeader, place: str = ".") -> str:
    """How coeffdiff loads the adapter from a place: at the command line, and on a pipeline of diffusers."""
    prompt = shlex.quote(f"a photo of {subject_of(header)} in the snow")
    return f"""    coeffdiff sample --adapter {place} --prompt {prompt}

```python
adapter = coeffdiff.load_adapter(pipe, "{place}", scale={header.recommended_scale:g})
```"""


def _trained(header: AdapterHeader, settings: Settings | None) -> str:
    steps = f"{header.trained_steps} steps{_kept(header)}"
    if settings is None:
        return f"{steps}, {header.resolution} px"
    training = settings.training
    return (
        f"{steps}, batch {training.batch_size} x {training.accumulate} a process, {training.resolution} px, "
        f"{'fp32' if training.precision == 'no' else training.precision} precision"
    )


def _parts_and_rates(header: AdapterHeader, method: MethodSettings | None) -> tuple[list[str], list[str]]:
    """What the adapter holds, and the learning rate of each part, as far as the settings are known."""
    holds, rates = [], []
    if header.heads:
        alphas = sum(heads * heads for heads in header.heads.values())
        of_text = sum(network_of(layer) != UNET for layer in header.heads)
        where = f", {of_text} of them in the text encoders" if of_text else ""
        holds.append(
            f"alpha: {len(header.heads)} attention layers{where}, {alphas:,} numbers ({header.form} form)"
        )
        rates += [f"alpha {method.coeff.learning_rate:g}"] if method else []
        rates += [f"text encoders' alpha {method.coeff.text_learning_rate:g}"] if method and of_text else []
    if header.lora:
        name = "DoRA" if header.lora.dora else "LoRA"
        of_text = len(header.lora.encoders)
        where = " in UNet and text encoders" if of_text else ""
        holds.append(f"{name}{where}: rank {header.lora.rank}, alpha {header.lora.alpha:g}")
        rates += [f"LoRA {method.lora.learning_rate:g}"] if method else []
        rates += [f"text encoders' LoRA {method.lora.text_learning_rate:g}"] if method and of_text else []
    if header.vectors:
        plural = "s" * (header.vectors > 1)
        where = "each text encoder" if len(header.base_family.encoders) > 1 else "the text encoder"
        each = f"{len(header.subjects)} learned tokens, each" if header.subjects else "learned token:"
        holds.append(f"{each} {header.vectors} embedding{plural} in {where}")
        rates += [f"token {method.token.learning_rate:g}"] if method else []
    return holds, rates


def _in_other_tools(header: AdapterHeader) -> str:
    """Which parts other tools read, and which need coeffdiff."""
    control = header.mixes == "values"
    bound = "needs coeffdiff" if control else "cannot be merged into weights and needs coeffdiff"
    sentences = [_CONTROL] if control else []
    whole = ", UNet and text encoders" if header.lora and header.lora.encoders else ""
    if header.lora and header.heads:
        sentences.append(
            f"The LoRA part alone also loads with diffusers' `load_lora_weights` ({LORA_FILE}{whole}); alpha {bound}."
        )
    elif header.lora:
        sentences.append(f"It also loads with diffusers' `load_lora_weights` ({LORA_FILE}{whole}).")
    elif header.heads and not control:
        sentences.append(
            "Mixing attention maps is no change of weights, so alpha cannot be merged into a model and needs coeffdiff."
        )
    plain = " ".join(sentences)
    return f"{plain}\n\n{_elsewhere(header)}".strip() if header.vectors else plain


def _kept(header: AdapterHeader) -> str:
    if header.run_steps is None or header.run_steps == header.trained_steps:
        return ""
    return f" (kept of {header.run_steps}: the best of the validations)"


def _vae(header: AdapterHeader) -> str:
    vae = header.base.vae if header.base else None
    return f"{_code(vae)}, not the base model's own" if vae else ""


def _judged(scores: Mapping[str, float], validation: ValidationSettings) -> str:
    by = " and ".join(_plain(name) for name in (validation.dino, validation.clip) if name)
    named = ", ".join(f"{_score_name(name)} {value:.3f}" for name, value in scores.items())
    return f"{named}, by {by}" if named else ""


def _score_name(name: str) -> str:
    """dino, or ohwx's dino: of one subject of several."""
    token, _, kind = name.rpartition("/")
    return f"{_plain(token)}'s {kind}" if token else kind


def _elsewhere(header: AdapterHeader) -> str:
    """How plain diffusers reads the learned token, and what it has to be told for the pooled text to be right."""
    named = [(row_key("", number), _quoted(one.token)) for number, one in enumerate(header.named)]
    if not header.base_family.pools:
        key = header.base_family.keys[0]
        lines = [
            f'pipe.load_textual_inversion(state["{key}{ending}"], token={token})' for ending, token in named
        ]
        return "\n".join(
            [
                "The learned token is also read by plain diffusers:\n\n```python",
                f'state = safetensors.torch.load_file("{EMBEDS_FILE}")',
                *lines,
                "```",
            ]
        )
    several = [f'"{ending}": {token}' for ending, token in named]
    load = f"""\
    pipe.load_textual_inversion(state[key], token={_quoted(header.token)}, text_encoder=encoder, tokenizer=tokenizer)"""
    if header.subjects:
        load = f"""\
    for ending, token in {{{", ".join(several)}}}.items():
        pipe.load_textual_inversion(state[key + ending], token=token, text_encoder=encoder, tokenizer=tokenizer)"""
    return f"""The learned token is also read by plain diffusers. It pools a text where the highest id stands, which
is the new one, so tell it which id ends a text:

```python
state = safetensors.torch.load_file("{EMBEDS_FILE}")
parts = (("clip_l", pipe.text_encoder, pipe.tokenizer), ("clip_g", pipe.text_encoder_2, pipe.tokenizer_2))
for key, encoder, tokenizer in parts:
{load}
    getattr(encoder, "text_model", encoder).eos_token_id = tokenizer.eos_token_id
```"""


def _quoted(value: str | list[str]) -> str:
    """Text that came from a person as a YAML string, or a list of texts: JSON is a part of YAML."""
    return json.dumps(value, ensure_ascii=False)


def _plain(text: str) -> str:
    """Text that Markdown shows as it is: no links, pictures, tags or entities come out of it."""
    return "".join(f"\\{c}" if c in "\\`*_[]<>#|&!~$" else c for c in text)


def _code(text: str) -> str:
    """Text in a code span, where backslashes are no escapes: a fence longer than any run of backticks in it."""
    fence = "`" * (1 + max(map(len, re.findall("`+", text)), default=0))
    blank = " " if "`" in text else ""
    return f"{fence}{blank}{text}{blank}{fence}"
