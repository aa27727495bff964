"""The adapter's README.md: a model card that says what it is, how to use it and how it was made."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterable, Mapping

from coeffdiff.config.schema import MethodSettings, Settings, ValidationSettings
from coeffdiff.method.adapter_header import AdapterHeader
from coeffdiff.method.adapter_paths import EMBEDS_FILE, LORA_FILE

_CONTROL = (
    "Not Coeff-Tuning but a control for comparisons: its alpha recombines the heads' values before ordinary attention, "
    "where Coeff-Tuning recombines their attention maps. It needs coeffdiff."
)


def model_card(
    header: AdapterHeader,
    settings: Settings,
    loss: float,
    pictures: Iterable[str],
    scores: Mapping[str, float] | None = None,
) -> str:
    """Markdown with the front matter that model hubs read. pictures are file names beside the card.

    scores: of those pictures, where there was something to score them with.
    """
    training = settings.training
    subject = " ".join(filter(None, (header.token, header.class_word)))
    gallery = "".join(f"![{_plain(name)}]({name})\n" for name in pictures)
    holds, rates = _parts_and_rates(header, settings.method)
    rows = {
        "holds": "; ".join(holds),
        "trained": f"{header.trained_steps} steps{_kept(header)}, batch {training.batch_size} x {training.accumulate} "
        f"a process, {training.resolution} px, {training.precision} precision",
        "VAE": _vae(header),
        "learning rates": ", ".join(rates),
        "last loss": f"{loss:.4f}",
        "scores of its validation pictures": _judged(scores or {}, settings.validation),
        "seed": str(training.seed),
        "versions": ", ".join(f"{name} {version}" for name, version in header.versions.items()),
    }
    always = ("holds", "learning rates", "versions")
    table = "".join(f"| {name} | {text} |\n" for name, text in rows.items() if text or name in always)
    return f"""---
library_name: coeffdiff
base_model: {_quoted(header.base_model)}
tags: [text-to-image, stable-diffusion-xl, coeff-tuning{", lora" if header.lora else ""}]
instance_prompt: {_quoted(f"a photo of {subject}")}
---

# {_plain(subject)}

An adapter for {_code(header.base_model)}, trained with coeffdiff ({header.described}).

{gallery}
In prompts the subject is called **{_plain(subject.strip())}**.

    coeffdiff sample --adapter . --prompt {shlex.quote(f"a photo of {subject} in the snow")}

```python
adapter = coeffdiff.load_adapter(pipe, ".", scale={header.recommended_scale:g})
```

{_in_other_tools(header)}

| | |
|---|---|
{table}"""


def _parts_and_rates(header: AdapterHeader, method: MethodSettings) -> tuple[list[str], list[str]]:
    """What the adapter holds, and the learning rate of each part."""
    holds, rates = [], []
    if header.heads:
        alphas = sum(heads * heads for heads in header.heads.values())
        holds.append(f"alpha: {len(header.heads)} attention layers, {alphas:,} numbers ({header.form} form)")
        rates.append(f"alpha {method.coeff.learning_rate:g}")
    if header.lora:
        name = "DoRA" if header.lora.dora else "LoRA"
        holds.append(f"{name}: rank {header.lora.rank}, alpha {header.lora.alpha:g}")
        rates.append(f"LoRA {method.lora.learning_rate:g}")
    if header.vectors:
        plural = "s" * (header.vectors > 1)
        holds.append(f"learned token: {header.vectors} embedding{plural} in each text encoder")
        rates.append(f"token {method.token.learning_rate:g}")
    return holds, rates


def _in_other_tools(header: AdapterHeader) -> str:
    """Which parts other tools read, and which need coeffdiff."""
    control = header.mixes == "values"
    bound = "needs coeffdiff" if control else "cannot be merged into weights and needs coeffdiff"
    sentences = [_CONTROL] if control else []
    if header.lora and header.heads:
        sentences.append(
            f"The LoRA part alone also loads with diffusers' `load_lora_weights` ({LORA_FILE}); alpha {bound}."
        )
    elif header.lora:
        sentences.append(f"It also loads with diffusers' `load_lora_weights` ({LORA_FILE}).")
    elif header.heads and not control:
        sentences.append(
            "Mixing attention maps is no change of weights, so alpha cannot be merged or loaded elsewhere."
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
    named = ", ".join(f"{name} {value:.3f}" for name, value in scores.items())
    return f"{named}, by {by}" if named else ""


def _elsewhere(header: AdapterHeader) -> str:
    """How plain diffusers reads the learned token, and what it has to be told for the pooled text to be right."""
    return f"""The learned token is also read by plain diffusers. It pools a text where the highest id stands, which
is the new one, so tell it which id ends a text:

```python
state = safetensors.torch.load_file("{EMBEDS_FILE}")
parts = (("clip_l", pipe.text_encoder, pipe.tokenizer), ("clip_g", pipe.text_encoder_2, pipe.tokenizer_2))
for key, encoder, tokenizer in parts:
    pipe.load_textual_inversion(state[key], token={_quoted(header.token)}, text_encoder=encoder, tokenizer=tokenizer)
    getattr(encoder, "text_model", encoder).eos_token_id = tokenizer.eos_token_id
```"""


def _quoted(text: str) -> str:
    """Text that came from a person as a YAML string: JSON is a part of YAML."""
    return json.dumps(text, ensure_ascii=False)


def _plain(text: str) -> str:
    """Text that Markdown shows as it is: no links, pictures, tags or entities come out of it."""
    return "".join(f"\\{c}" if c in "\\`*_[]<>#|&!~$" else c for c in text)


def _code(text: str) -> str:
    """Text in a code span, where backslashes are no escapes: a fence longer than any run of backticks in it."""
    fence = "`" * (1 + max(map(len, re.findall("`+", text)), default=0))
    blank = " " if "`" in text else ""
    return f"{fence}{blank}{text}{blank}{fence}"
