"""coeffdiff caption"""

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
from coeffdiff.cli.options import NAME, ClassWord, PrecisionOption, ResultAsJson, Token
from coeffdiff.cli.root import answering, app
from coeffdiff.errors import PhotoError
from coeffdiff.labelling.defaults import CAPTIONER
from coeffdiff.utils.console import print_info, print_json, print_text, progress, visible

if TYPE_CHECKING:
    from coeffdiff.data.photos import Photo
    from coeffdiff.labelling.captioner import Captioner
    from coeffdiff.labelling.captioning import Captioned
    from coeffdiff.sampling.memory_options import Precision

Model = Annotated[str, typer.Option(help="Image-to-text model of transformers: hub id or folder.", **NAME)]
Prompt = Annotated[
    str | None, typer.Option(help="What the model is asked, or the words that a BLIP continues.")
]


@app.command()
@answering
def caption(
    folder: PhotoFolder,
    token: Token = None,
    class_word: ClassWord = None,
    model: Model = CAPTIONER,
    prompt: Prompt = None,
    batch_size: PhotosAtATime = 4,
    device: Device = None,
    precision: PrecisionOption = "auto",
    overwrite: Overwrite = False,
    dry_run: DryRun = False,
    as_json: ResultAsJson = False,
) -> None:
    """Write photo.txt beside each photo without a caption: a model describes it, and the token names the subject."""
    from coeffdiff.config.fields import PLACEHOLDER
    from coeffdiff.labelling.places import caption_places

    photos, subject = read_folder(folder, token, class_word, masks=False)
    places = caption_places(photos.photos, overwrite=overwrite)
    print_left(photos, places)
    token = subject.token or PLACEHOLDER
    if places.new and not subject.token:
        print_info(f"note     without --token captions name the subject {PLACEHOLDER}, which train fills in")
    written: list[Captioned] = []
    silent: list[Photo] = []
    if places.new:
        if not dry_run:
            refuse_read_only(places)
        captioner = _loaded(model, prompt, device, precision)
        from coeffdiff.labelling.captioning import write_captions
        from coeffdiff.utils.oom import oom_hints

        with (
            progress("captions", len(places.new)) as bar,
            oom_hints(lambda: smaller(batch_size, captioner.device)),
        ):
            written, silent = write_captions(
                places.new,
                captioner,
                token,
                subject.class_word,
                batch_size=batch_size,
                dry_run=dry_run,
                on_photo=bar,
            )
    if as_json:
        rows = [{"photo": one.photo.path.name, "file": str(one.file), "caption": one.text} for one in written]
        print_json(as_tree(photos, places, rows) | {"silent": [photo.path.name for photo in silent]})
    else:
        for one in written:
            print_text(f"{visible(one.file.name)}  {one.text}")
    if silent:
        raise PhotoError(
            f"{model} says nothing about {counted(silent, len(places.new))}, which get no caption; another --prompt "
            "or --model may help."
        )


def _loaded(model: str, prompt: str | None, device: str | None, precision: Precision) -> Captioner:
    from coeffdiff.labelling.captioner import find_captioner, load_captioner
    from coeffdiff.labelling.networks import named_device
    from coeffdiff.sampling.device import choose_device

    where = named_device(device)
    return load_captioner(find_captioner(model), *choose_device(precision, where), prompt)
