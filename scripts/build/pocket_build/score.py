"""The score: what the judges see in pictures of random captions."""

from __future__ import annotations

from coeffdiff.pocket import POCKET
from coeffdiff.pocket.judges import QUESTIONS, trusted_judges, truth
from coeffdiff.pocket.world import mentioned
from coeffdiff.utils.console import progress
from pocket_build.drawn import TOGETHER, captioned_scene, drawn, measured_pipeline
from pocket_build.workshop import Workshop, fingerprint


def score(shop: Workshop, captions: int = 500, steps: int = 25, guidance: float = 5.0) -> dict[str, float]:
    """What the judges see in pictures of random captions: of what each caption names, the share that is there.

    Raises: TrainingError if a judge is not to be trusted.
    """
    judges = trusted_judges(shop.weights).to(shop.device)
    pipe = measured_pipeline(shop)
    scenes, said = zip(*(captioned_scene("score", i) for i in range(captions)), strict=True)
    right = truth(scenes)
    hits = {name: [0, 0] for name in QUESTIONS}
    with progress("pictures to judge", captions) as bar:
        for begin in range(0, captions, TOGETHER):
            own = range(begin, min(begin + TOGETHER, captions))
            images = drawn(pipe, "score", own, steps=steps, guidance=guidance) / 127.5 - 1.0
            answers = judges.answers(images)
            for place, i in enumerate(own):
                for name in mentioned(scenes[i], said[i]):
                    hits[name][0] += int(answers[name][place].cpu() == right[name][i])
                    hits[name][1] += 1
            bar(own.stop, "  ".join(f"{name} {a / max(b, 1):.3f}" for name, (a, b) in hits.items()))
    found = {name: round(a / b, 4) for name, (a, b) in hits.items() if b}
    shop.note(
        "score",
        **found,
        captions=captions,
        named={name: b for name, (_, b) in hits.items()},
        sampling_steps=steps,
        guidance=guidance,
        unet_steps=shop.record()["deep"]["steps"],
        of=fingerprint(shop.weights / POCKET),
        **shop.machine() | {"precision": "float32"},  # the pipeline's, whatever the stages are trained in
    )
    return found
