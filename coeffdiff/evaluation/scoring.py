"""One adapter and one subject: make the pictures, score them."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from coeffdiff.errors import ConfigError
from coeffdiff.evaluation.protocol import (
    THUMBNAIL,
    Asked,
    Protocol,
    Scored,
    Seen,
    Subject,
    asked_for,
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
from coeffdiff.sampling.generation import generate
from coeffdiff.sampling.options import Options
from coeffdiff.sampling.output import plan, recipe
from coeffdiff.utils.distributed import ONE_PROCESS, DistributedContext
from coeffdiff.utils.grids import fitted
from coeffdiff.utils.jpeg import jpeg_bytes
from coeffdiff.utils.png import save_png


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
    """Make all pictures with the adapter on `pipe`, or with the base model, and score them against the subject.

    Several processes make whole batches each and all return the same scores. A batch is made and encoded by one
    process, so that its features do not depend on the number of processes.

    Args:
        references: from see_photos, for a subject that is scored several times.
        base: the base model's pictures for drift, by prompt and seed; missing ones are added. Share it among
            adapters on one model with one protocol.
        folder: where the subject's pictures go, as PNGs with their recipes.
        on_progress: takes how many pictures are done, the base model's for drift among them.
    Returns: data with
        scores: dino, clip_i and, where photos have masks, dino_masked, clip_i_masked; clip_t; diversity; drift,
            drift_class, drift_unrelated; as far as encoders, masks and prompts allow;
        photos: the photos' similarity to each other (dino, clip_i), their number, and how many have masks;
        pictures: each of the subject's pictures with prompt, text, seed and its own scores;
        drift: each prompt without the token, seed by seed, with its drift.
    Raises: ConfigError if several adapters are loaded; NonFinitePicture.
    """
    adapters = loaded_adapters(pipe)
    if len(adapters) > 1:
        raise ConfigError("One adapter is scored at a time, and several are loaded.")
    asked = asked_for(protocol, subject.token, subject.class_word, known=bool(adapters))
    base = {} if base is None else base
    missing = [one for one in asked if one.group != "subject" and (one.prompt, one.seed) not in base]
    references = references or see_photos(encoders, subject)
    make = functools.partial(_make, pipe, options=protocol.options, encoders=encoders, team=team)
    seen = make(asked, on_progress=on_progress, folder=folder, details=details)
    if missing:
        with _switched_off(adapters[0]):
            found = make(missing, on_progress=lambda done: on_progress(len(asked) + done))
        base |= {(one.prompt, one.seed): picture for one, picture in zip(missing, found, strict=True)}
    pairs = list(zip(asked, seen, strict=True))
    of_subject = [(one, picture) for one, picture in pairs if one.group == "subject"]
    others = [(one, picture) for one, picture in pairs if one.group != "subject"]
    data = {
        "scores": _scores(of_subject, others, base, references, encoders),
        "photos": _photo_scores(subject, references),
        "pictures": _each_picture(of_subject, references, encoders),
        "drift": _each_drift(others, base),
    }
    return Scored(data, _thumbnails(of_subject, others, base))


def see_photos(encoders: Encoders, subject: Subject) -> References:
    """The photos' features, with and without their background."""
    pairs = zip(subject.photos, subject.masks, strict=True)
    return joined([references_of(encoders, [photo.open()], [mask]) for photo, mask in pairs])


@contextmanager
def _switched_off(adapter: Any) -> Iterator[None]:
    """The adapter at scale 0, where each layer runs its original processor: the base model, bit for bit."""
    scale = adapter.scale
    adapter.set_scale(0.0)
    try:
        yield
    finally:
        adapter.set_scale(scale)


def _make(
    pipe: Any,
    asked: Sequence[Asked],
    *,
    options: Options,
    encoders: Encoders,
    team: DistributedContext,
    on_progress: Callable[[float], None],
    folder: Path | None = None,
    details: Mapping[str, Any] | None = None,
) -> list[Seen]:
    """Make and encode all pictures; each process makes every n-th batch and returns all of them."""
    requests = [one.request for one in asked]
    batches = plan(requests, options.batch_size)[team.rank :: team.size]
    own = [requests[index] for batch in batches for index in batch]
    made: dict[int, Seen] = {}
    pictures = generate(pipe, own, options, on_progress=lambda done: on_progress(done * team.size))
    with closing(pictures):
        for batch in batches:
            images = [next(pictures)[1] for _ in batch]
            made |= zip(batch, _encode(images, encoders), strict=True)
            for index, image in zip(batch, images, strict=True):
                if folder and asked[index].group == "subject":
                    file = folder / f"{index + 1:03d}-seed{asked[index].seed}.png"
                    save_png(image, file, recipe(pipe, requests[index], options, details))
    everyones = {index: seen for part in team.gather(made) for index, seen in part.items()}
    return [everyones[index] for index in range(len(asked))]


def _encode(images: Sequence[Image.Image], encoders: Encoders) -> list[Seen]:
    """Features and thumbnails of one batch."""
    features = {kind: encoder.features(images) for kind, encoder in _kinds(encoders)}
    return [
        Seen(
            {kind: of[place] for kind, of in features.items()},
            jpeg_bytes(fitted(image, THUMBNAIL, smoothly=True)),
        )
        for place, image in enumerate(images)
    ]


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
    of_subject: Sequence[tuple[Asked, Seen]],
    others: Sequence[tuple[Asked, Seen]],
    base: Mapping[tuple[str, int], Seen],
    references: References,
    encoders: Encoders,
) -> dict[str, float]:
    """The scores of an adapter on a subject; those that cannot be computed are left out."""
    kinds = list(encoders.names())
    scores: dict[str, float | None] = dict(_fidelity({k: _stacked(of_subject, k) for k in kinds}, references))
    if encoders.clip:
        texts = encoders.clip.text_features([one.text for one, _ in of_subject])
        scores["clip_t"] = mean_paired_cosine(_stacked(of_subject, "clip"), texts)
    apart = "dino" if encoders.dino else "clip"
    prompts = dict.fromkeys(one.prompt for one, _ in of_subject)
    groups = [[pair for pair in of_subject if pair[0].prompt == prompt] for prompt in prompts]
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
    """The photos' similarity to each other: the best that pictures of the same subject could reach."""
    found: dict[str, Any] = {
        "count": len(subject.photos),
        "with_masks": sum(mask is not None for mask in subject.masks),
    }
    if len(subject.photos) > 1:
        found |= {_FIDELITY[kind]: round(mean_cosine_among(of), 6) for kind, of in references.whole.items()}
    return found


def _each_picture(
    of_subject: Sequence[tuple[Asked, Seen]], references: References, encoders: Encoders
) -> list[dict[str, Any]]:
    texts = encoders.clip.text_features([one.text for one, _ in of_subject]) if encoders.clip else None
    found = []
    for number, (one, seen) in enumerate(of_subject):
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
    of_subject: Sequence[tuple[Asked, Seen]],
    others: Sequence[tuple[Asked, Seen]],
    base: Mapping[tuple[str, int], Seen],
) -> dict[str, bytes]:
    found = {f"subject-{i}": seen.thumbnail for i, (_, seen) in enumerate(of_subject)}
    for i, (one, seen) in enumerate(others):
        found |= {f"drift-{i}": seen.thumbnail, f"base-{i}": base[one.prompt, one.seed].thumbnail}
    return found
