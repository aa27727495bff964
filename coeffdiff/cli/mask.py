"""coeffdiff mask"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from coeffdiff.cli.labelling import (
    Device,
    DryRun,
    Overwrite,
    PhotoFolder,
    PhotosAtATime,
    as_tree,
    counted,
    print_left,
    read_folder,
    refuse_read_only,
    smaller,
)
from coeffdiff.cli.options import NAME, ResultAsJson
from coeffdiff.cli.root import answering, app
from coeffdiff.errors import ConfigError, PhotoError
from coeffdiff.labelling.defaults import CONFIDENCE, GROW, SEGMENTER, THRESHOLD
from coeffdiff.utils.console import print_info, print_json, print_text, progress, visible

if TYPE_CHECKING:
    from coeffdiff.data.photos import Photo
    from coeffdiff.labelling.masking import Masked
    from coeffdiff.labelling.segmenter import Segmenter

ClassWord = Annotated[
    str | None, typer.Option(help='What to look for, such as dog or "stuffed animal": a label of the model.')
]
Model = Annotated[
    str,
    typer.Option(
        help="Segmentation model of transformers, CLIPSeg or one with labels: hub id or folder.", **NAME
    ),
]
Threshold = Annotated[
    float | None,
    typer.Option(
        min=0,
        max=1,
        help=f"How sure the model must be. (default: {THRESHOLD} for CLIPSeg, {CONFIDENCE} for others)",
    ),
]
Grow = Annotated[
    float, typer.Option(min=0, max=50, help="Move borders outwards, in percent of the longer side.")
]
NEARLY_WHOLE = 0.95


@app.command()
@answering
def mask(
    folder: PhotoFolder,
    class_word: ClassWord = None,
    model: Model = SEGMENTER,
    threshold: Threshold = None,
    grow: Grow = GROW,
    batch_size: PhotosAtATime = 4,
    device: Device = None,
    overwrite: Overwrite = False,
    dry_run: DryRun = False,
    as_json: ResultAsJson = False,
) -> None:
    """Write photo.mask.png beside each photo without a mask: white where a model sees the class word."""
    from coeffdiff.labelling.places import mask_places

    photos, subject = read_folder(
        folder, None, class_word, masks=False if overwrite else "auto", offer=class_word is None
    )
    word = subject.class_word
    if not word:
        raise ConfigError(f"It is not said what to look for: mask {folder} --class-word dog.")
    places = mask_places(photos.photos, overwrite=overwrite)
    print_left(photos, places)
    written: list[Masked] = []
    unseen: list[Photo] = []
    if places.new:
        if not dry_run:
            refuse_read_only(places)
        segmenter = _loaded(model, word, device, threshold)
        from coeffdiff.labelling.masking import write_masks
        from coeffdiff.utils.oom import oom_hints

        with (
            progress("masks", len(places.new)) as bar,
            oom_hints(lambda: smaller(batch_size, segmenter.device)),
        ):
            written, unseen = write_masks(
                places.new, segmenter, grow=grow, batch_size=batch_size, dry_run=dry_run, on_photo=bar
            )
    if as_json:
        rows = [
            {"photo": one.photo.path.name, "file": str(one.file), "share": round(one.share, 4)}
            for one in written
        ]
        print_json(as_tree(photos, places, rows) | {"unseen": [photo.path.name for photo in unseen]})
    else:
        for one in written:
            print_text(f"{visible(one.file.name)}  {one.share:.1%} of the photo")
    for one in written:
        if one.share > NEARLY_WHOLE:
            print_info(f"note     {one.file.name} marks nearly all of its photo, and changes next to nothing")
    if unseen:
        raise PhotoError(
            f'{model} sees no "{word}" in {counted(unseen, len(places.new))}, which get no mask. Other words for '
            "--class-word, a lower --threshold where the model has one, or another --model may find it."
        )


def _loaded(model: str, class_word: str, device: str | None, threshold: float | None) -> Segmenter:
    from coeffdiff.labelling.networks import named_device
    from coeffdiff.labelling.segmenter import find_segmenter, load_segmenter
    from coeffdiff.sampling.device import choose_device

    where = named_device(device)
    chosen, _ = choose_device("fp32", where)
    return load_segmenter(find_segmenter(model), class_word, chosen, threshold)
