"""The adapter's README.md: a model card that says what it is, how to use it and how it was made."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterable, Mapping

from coeffdiff.config.schema import Settings
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
    subject = " ".join(filter(None, (header.token, header.class_word)))
    alphas = sum(heads * heads for heads in header.heads.values())
    training, coeff, lora = settings.training, settings.method.coeff, settings.method.lora
    parts = []
    if header.heads:
        parts.append(f"alpha: {len(header.heads)} attention layers, {alphas:,} numbers ({header.form} form)")
    if header.lora:
        name = "DoRA" if header.lora.dora else "LoRA"
        parts.append(f"{name}: rank {header.lora.rank}, alpha {header.lora.alpha:g}")
    rates = [f"alpha {coeff.learning_rate:g}"] if header.heads else []
    rates += [f"LoRA {lora.learning_rate:g}"] if header.lora else []
    if header.vectors:
        parts.append(
            f"learned token: {header.vectors} embedding{'s' * (header.vectors > 1)} in each text encoder"
        )
        rates.append(f"token {settings.method.token.learning_rate:g}")
    control = header.mixes == "values"
    bound = "needs coeffdiff" if control else "cannot be merged into weights and needs coeffdiff"
    plain = (
        f"The LoRA part alone also loads with diffusers' `load_lora_weights` ({LORA_FILE}); alpha {bound}."
        if header.lora and header.heads
        else f"It also loads with diffusers' `load_lora_weights` ({LORA_FILE})."
        if header.lora
        else _CONTROL
        if control
        else "Mixing attention maps is no change of weights, so alpha cannot be merged or loaded elsewhere."
        if header.heads
        else ""
    )
    if control and header.lora:
        plain = f"{_CONTROL} {plain}"
    if header.vectors:
        plain = f"{plain}\n\n{_elsewhere(header)}".strip()
    kept = (
        f" (kept of {header.run_steps}: the best of the validations)"
        if header.run_steps is not None and header.run_steps != header.trained_steps
        else ""
    )
    judged = ", ".join(f"{name} {value:.3f}" for name, value in (scores or {}).items())
    by = " and ".join(_plain(name) for name in (settings.validation.dino, settings.validation.clip) if name)
    judged = f"| scores of its validation pictures | {judged}, by {by} |\n" if judged else ""
    vae = header.base.vae if header.base else None
    decoded = f"| VAE | {_code(vae)}, not the base model's own |\n" if vae else ""
    gallery = "".join(f"![{_plain(name)}]({name})\n" for name in pictures)
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

{plain}

| | |
|---|---|
| holds | {"; ".join(parts)} |
| trained | {header.trained_steps} steps{kept}, batch {training.batch_size} x {training.accumulate} a process, \
{training.resolution} px, {training.precision} precision |
{decoded}| learning rates | {", ".join(rates)} |
| last loss | {loss:.4f} |
{judged}| seed | {training.seed} |
| versions | {", ".join(f"{name} {version}" for name, version in header.versions.items())} |
"""


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
