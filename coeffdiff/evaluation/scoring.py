"""One adapter and one subject: pictures made and scored."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from coeffdiff.data.templates import fill
from coeffdiff.errors import ConfigError
from coeffdiff.evaluation.prompts import without_token
from coeffdiff.evaluation.protocol import (
    DRIFT_PROMPTS,
    ONE_PROCESS,
    THUMBNAIL,
    Asked,
    Protocol,
    Scored,
    Seen,
    Subject,
)
from coeffdiff.hosts.diffusers import loaded_adapters
from coeffdiff.metrics.encoders import Encoders
from coeffdiff.metrics.features import (
    diversity,
    drift,
    mean_cosine_among,
    mean_paired_cosine,
    mean_pairwise_cosine,
)
from coeffdiff.metrics.pictures import References, joined, references_of
from coeffdiff.sampling import output
from coeffdiff.sampling.generation import generate
from coeffdiff.sampling.options import Options
from coeffdiff.sampling.output import plan
from coeffdiff.utils.distributed import DistributedContext
from coeffdiff.utils.grids import fitted
from coeffdiff.utils.png import save_png


def asked_for(protocol: Protocol, token: str, class_word: str | None, *, known: bool = True) -> list[Asked]:
    """Every picture of an evaluation, in order. known: whether the model knows the token; the bare one does not,
    and is asked for any of the class."""
    asked = []
    prompts = [fill(template, token, class_word) for template in protocol.prompts.subject]
    texts = [without_token(prompt, token) for prompt in prompts]
    groups = [("subject", prompts if known else texts, texts, protocol.pictures)]
    if known and protocol.drift_pictures:
        of_class = texts[:: max(1, len(texts) // DRIFT_PROMPTS)][:DRIFT_PROMPTS] if class_word else []
        groups.append(("class", of_class, of_class, protocol.drift_pictures))
        others = list(protocol.prompts.unrelated)
        groups.append(("unrelated", others, others, protocol.drift_pictures))
    for group, wanted, without, count in groups:
        for number, (prompt, text) in enumerate(zip(wanted, without, strict=True)):
            seeds = range(protocol.first_seed + number * count, protocol.first_seed + (number + 1) * count)
            asked += [Asked(group, prompt, text, seed) for seed in seeds]
    return asked


def score_adapter(
    pipe: Any,
    subject: Subject,
    protocol: Protocol,
    encoders: Encoders,
    *,
    references: References | None = None,
    base: dict[tuple[str, int], Seen] | None = None,
    folder: Path | None = None,
    details: Mapping[str, Any] | None = None,
    team: DistributedContext = ONE_PROCESS,
    on_progress: Callable[[float], None] = lambda done: None,
) -> Scored:
    """Make all pictures with what is loaded on `pipe`, one adapter or none, and score them against the subject.

    Several processes of a team make whole batches each, and all of them return the same: a batch is made and looked
    at by one of them, of whichever size the team is.

    Args:
        references: from see_photos, for a subject that is scored several times.
        base: the base model's pictures for drift, which are looked up here and added here; share it among adapters
            on one model with one protocol.
        folder: where the subject's pictures go, as PNGs with their recipes.
        on_progress: how many pictures are done, the base model's for drift among them.
    Returns: data with
        scores: dino, clip_i and, where photos have masks, dino_masked, clip_i_masked; clip_t; diversity; drift,
            drift_class, drift_unrelated; those that encoders, masks and prompts allow of;
        photos: how near the photos are to each other (dino, clip_i), how many there are and how many have masks;
        pictures: for each of the subject's pictures its prompt, text, seed and own scores;
        drift: for each prompt without the token, seed by seed, how far it moved.
    """
    adapters = loaded_adapters(pipe)
    if len(adapters) > 1:
        raise ConfigError("One adapter is scored at a time, and several are loaded.")
    asked = asked_for(protocol, subject.token, subject.class_word, known=bool(adapters))
    away = [one for one in asked if one.group != "subject"]
    base = {} if base is None else base
    lacking = [one for one in away if (one.prompt, one.seed) not in base]
    references = references or see_photos(encoders, subject)

    def told(before: int) -> Callable[[float], None]:
        return lambda done: on_progress(before + done)

    seen = _make(pipe, asked, protocol.options, encoders, team, told(0), folder, details)
    if lacking:
        with _switched_off(adapters[0]):
            found = _make(pipe, lacking, protocol.options, encoders, team, told(len(asked)))
        base |= {(one.prompt, one.seed): picture for one, picture in zip(lacking, found, strict=True)}
    pairs = list(zip(asked, seen, strict=True))
    mine = [(one, picture) for one, picture in pairs if one.group == "subject"]
    others = [(one, picture) for one, picture in pairs if one.group != "subject"]
    return Scored(
        {
            "scores": _scores(mine, others, base, references, encoders),
            "photos": _photo_scores(subject, references),
            "pictures": _each_picture(mine, references, encoders),
            "drift": _each_drift(others, base),
        },
        _thumbnails(mine, others, base),
    )


def see_photos(encoders: Encoders, subject: Subject) -> References:
    """The photos as the encoders see them."""
    pairs = zip(subject.photos, subject.masks, strict=True)
    return joined([references_of(encoders, [photo.open()], [mask]) for photo, mask in pairs])


@contextmanager
def _switched_off(adapter: Any) -> Iterator[None]:
    """At scale 0 a layer runs its original processor: the base model, bit for bit."""
    scale = adapter.scale
    adapter.set_scale(0.0)
    try:
        yield
    finally:
        adapter.set_scale(scale)


def _make(
    pipe: Any,
    asked: Sequence[Asked],
    options: Options,
    encoders: Encoders,
    team: DistributedContext,
    on_progress: Callable[[float], None],
    folder: Path | None = None,
    details: Mapping[str, Any] | None = None,
) -> list[Seen]:
    """Pictures and features of all that is asked for, on every process: each makes every n-th batch."""
    requests = [one.request for one in asked]
    batches = plan(requests, options.batch_size)[team.rank :: team.size]
    order = [index for batch in batches for index in batch]
    made: dict[int, Seen] = {}
    pictures = generate(
        pipe, [requests[i] for i in order], options, on_progress=lambda done: on_progress(done * team.size)
    )
    with closing(pictures):
        for batch in batches:
            images = [next(pictures)[1] for _ in batch]
            # In the lots that they were made in, so that no feature depends on how many processes there are
            features = {kind: encoder.features(images) for kind, encoder in _kinds(encoders)}
            for place, (index, image) in enumerate(zip(batch, images, strict=True)):
                own = {kind: of[place] for kind, of in features.items()}
                made[index] = Seen(own, jpeg_bytes(fitted(image, THUMBNAIL, smoothly=True)))
                if folder and asked[index].group == "subject":
                    recipe = output.recipe(pipe, requests[index], options, details)
                    save_png(image, folder / f"{index + 1:03d}-seed{asked[index].seed}.png", recipe)
    together = {index: seen for part in team.gather(made) for index, seen in part.items()}
    return [together[index] for index in range(len(asked))]


def _kinds(encoders: Encoders) -> list[tuple[str, Any]]:
    return [(kind, getattr(encoders, kind)) for kind in encoders.names()]


def _stacked(pictures: Sequence[tuple[Asked, Seen]], kind: str) -> Tensor:
    return torch.stack([seen.features[kind] for _, seen in pictures])


_FIDELITY = {"dino": "dino", "clip": "clip_i"}


def _fidelity(features: Mapping[str, Tensor], references: References) -> dict[str, float]:
    found = {}
    for kind, of in features.items():
        found[_FIDELITY[kind]] = mean_pairwise_cosine(of, references.whole[kind])
        if kind in references.masked:
            found[f"{_FIDELITY[kind]}_masked"] = mean_pairwise_cosine(of, references.masked[kind])
    return found


def _scores(
    mine: Sequence[tuple[Asked, Seen]],
    others: Sequence[tuple[Asked, Seen]],
    base: Mapping[tuple[str, int], Seen],
    references: References,
    encoders: Encoders,
) -> dict[str, float]:
    """All numbers that describe an adapter on a subject."""
    kinds = list(encoders.names())
    scores: dict[str, float | None] = dict(_fidelity({k: _stacked(mine, k) for k in kinds}, references))
    if encoders.clip:
        texts = encoders.clip.text_features([one.text for one, _ in mine])
        scores["clip_t"] = mean_paired_cosine(_stacked(mine, "clip"), texts)
    apart = "dino" if encoders.dino else "clip"
    prompts = dict.fromkeys(one.prompt for one, _ in mine)
    groups = [[pair for pair in mine if pair[0].prompt == prompt] for prompt in prompts]
    scores["diversity"] = diversity([_stacked(group, apart) for group in groups])
    for name, wanted in (
        ("drift", ("class", "unrelated")), ("drift_class", ("class",)), ("drift_unrelated", ("unrelated",)),
    ):  # fmt: skip
        moved = [pair for pair in others if pair[0].group in wanted]
        if moved:
            before = torch.stack([base[one.prompt, one.seed].features[apart] for one, _ in moved])
            scores[name] = drift(_stacked(moved, apart), before)
    return {name: round(value, 6) for name, value in scores.items() if value is not None}


def _photo_scores(subject: Subject, references: References) -> dict[str, Any]:
    """How near photos are to each other: what a perfect adapter would reach, were its pictures photos of the same."""
    found: dict[str, Any] = {
        "count": len(subject.photos),
        "with_masks": sum(mask is not None for mask in subject.masks),
    }
    if len(subject.photos) > 1:
        found |= {_FIDELITY[kind]: round(mean_cosine_among(of), 6) for kind, of in references.whole.items()}
    return found


def _each_picture(
    mine: Sequence[tuple[Asked, Seen]], references: References, encoders: Encoders
) -> list[dict[str, Any]]:
    texts = encoders.clip.text_features([one.text for one, _ in mine]) if encoders.clip else None
    found = []
    for number, (one, seen) in enumerate(mine):
        own = _fidelity({kind: of[None] for kind, of in seen.features.items()}, references)
        if texts is not None:
            own["clip_t"] = mean_paired_cosine(seen.features["clip"][None], texts[number : number + 1])
        values = {name: round(value, 6) for name, value in own.items()}
        found.append({"prompt": one.prompt, "text": one.text, "seed": one.seed, **values})
    return found


def _each_drift(
    others: Sequence[tuple[Asked, Seen]], base: Mapping[tuple[str, int], Seen]
) -> list[dict[str, Any]]:
    found = []
    for one, seen in others:
        before = base[one.prompt, one.seed].features
        moved = {kind: round(drift(of[None], before[kind][None]), 6) for kind, of in seen.features.items()}
        found.append({"group": one.group, "prompt": one.prompt, "seed": one.seed, **moved})
    return found


def _thumbnails(
    mine: Sequence[tuple[Asked, Seen]],
    others: Sequence[tuple[Asked, Seen]],
    base: Mapping[tuple[str, int], Seen],
) -> dict[str, bytes]:
    found = {f"subject-{i}": seen.thumbnail for i, (_, seen) in enumerate(mine)}
    for i, (one, seen) in enumerate(others):
        found |= {f"drift-{i}": seen.thumbnail, f"base-{i}": base[one.prompt, one.seed].thumbnail}
    return found


def jpeg_bytes(image: Image.Image) -> bytes:
    content = io.BytesIO()
    image.convert("RGB").save(content, "JPEG", quality=85)
    return content.getvalue()
