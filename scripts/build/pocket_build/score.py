"""The score: what the judges see in pictures of random captions."""

from __future__ import annotations

from diffusers import StableDiffusionXLPipeline

from coeffdiff.pocket import POCKET
from coeffdiff.pocket.judges import QUESTIONS, trusted_judges, truth
from coeffdiff.pocket.world import caption, mentioned, sample_scene
from coeffdiff.utils.console import progress, quiet_libraries
from coeffdiff.utils.seeding import generator_for, stable_seed
from pocket_build.workshop import Workshop, fingerprint

SCORED_TOGETHER = 20


def score(shop: Workshop, captions: int = 500, steps: int = 25, guidance: float = 5.0) -> dict[str, float]:
    """What the judges see in pictures of random captions: of what each caption names, the share that is there.

    Raises: TrainingError if a judge is not to be trusted.
    """
    judges = trusted_judges(shop.weights).to(shop.device)
    with quiet_libraries():
        pipe = StableDiffusionXLPipeline.from_pretrained(shop.weights / POCKET).to(shop.device)
        pipe.set_progress_bar_config(disable=True)
    scenes = [sample_scene(stable_seed("score", i)) for i in range(captions)]
    said = [caption(scene, f"score {i}") for i, scene in enumerate(scenes)]
    right = truth(scenes)
    hits = {name: [0, 0] for name in QUESTIONS}
    with progress("pictures to judge", captions) as bar:
        for begin in range(0, captions, SCORED_TOGETHER):
            own = range(begin, min(begin + SCORED_TOGETHER, captions))
            images = pipe(
                [said[i] for i in own],
                num_inference_steps=steps,
                guidance_scale=guidance,
                generator=[generator_for("score", i) for i in own],
                output_type="pt",
            ).images
            # As a file would hold them.
            images = (images * 255.0).round() / 127.5 - 1.0
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
        unet_steps=shop.record()["unet"]["steps"],
        of=fingerprint(shop.unet_file),
        **shop.machine() | {"precision": "float32"},  # the pipeline's, whatever the stages are trained in
    )
    return found
