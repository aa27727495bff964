"""Which adapter folder a person means by a path: a run, a step of it (RUN@200), or a file of either.

What is there is named for what it is by not_an_adapter.py; reading it is adapter_file.py's.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

from coeffdiff.errors import AdapterError
from coeffdiff.method.not_an_adapter import read_names, what_it_is
from coeffdiff.utils.paths import exists, expanded

COEFF_FILE = "coeff.safetensors"
LORA_FILE = "pytorch_lora_weights.safetensors"
EMBEDS_FILE = "learned_embeds.safetensors"
HEADER_KEY = "coeffdiff"  # the one metadata entry that is ours
_STEP_FOLDER = re.compile(r"step-(\d+)")
_WHICH = re.compile(r"(?P<run>.+)@(?P<which>\d+|best|last)")
# Files that lie in a run and mean it; any other file there may be somebody else's
_OF_A_RUN = ("config.yaml", "log.jsonl", "curves.png")
_OF_A_CHECKPOINT = ("trainables.safetensors", "optimizer.pt", "state.json")
_OF_AN_ADAPTER = (
    *(COEFF_FILE, LORA_FILE, EMBEDS_FILE),
    *("README.md", "grid.png"),
)


def find_adapter(path: str | Path) -> Path:
    """The adapter folder that is meant by a run, an adapter folder, a checkpoint, a file in one of them, or RUN@STEP.

    RUN@200 is the adapter of that step, as far as the run keeps it; RUN@last the newest that is kept, RUN@best that
    of the validation with the best score. A path that exists means itself, whatever its name.
    Raises: AdapterError if there is none, which says what is there instead.
    """
    try:
        path = Path(expanded(path))
    except ValueError as error:
        raise AdapterError(f"{path}: {error}.") from None
    if not exists(path) and (named := _WHICH.fullmatch(str(path))):
        return _of_step(Path(named["run"]), named["which"])
    if not exists(path):
        raise AdapterError(
            f"There is no adapter {path}{_refusal(path)}.{_nearest_step(path)}{_neighbours(path)}"
        )
    folder = _folder_of(path)
    for place in (folder, folder / "adapter"):
        if (place / COEFF_FILE).is_file():
            return place
    if (folder / "config.yaml").is_file():
        kept = kept_steps(folder)
        steps = f" Steps that it keeps: {_listed(kept)}; {folder}@{max(kept)} is the last." if kept else ""
        raise AdapterError(
            f"The run {folder} has no adapter yet: it has not finished. Continue it with train --resume.{steps}"
        )
    if folder.parent.name == "checkpoints" and (folder / "trainables.safetensors").is_file():
        raise AdapterError(
            f"The checkpoint {folder} was written before checkpoints held an adapter. Its run goes on from it with "
            "train --resume, and the next one holds one."
        )
    raise AdapterError(what_it_is(path))


def kept_steps(run: Path) -> dict[int, Path]:
    """The adapters that a run folder holds, by step, in order: its result, those kept, those of its checkpoints."""
    found: dict[int, Path] = {}
    for parent in (run / "checkpoints", run / "adapters"):
        for folder in parent.glob("step-*") if parent.is_dir() else ():
            adapter = folder / "adapter" if parent.name == "checkpoints" else folder
            if (step := _STEP_FOLDER.fullmatch(folder.name)) and (adapter / COEFF_FILE).is_file():
                found[int(step[1])] = adapter
    result = run / "adapter"
    if (made := _header_of(result).get("trained_steps")) is not None:
        found[made] = result
    return dict(sorted(found.items()))


def run_of(adapter: Path) -> Path | None:
    """The run folder that an adapter folder lies in: as its result, as one kept, or in a checkpoint."""
    adapter = adapter.resolve()
    result = adapter.name == "adapter"
    step = adapter.parent if result else adapter
    kept = step.parent.name == ("checkpoints" if result else "adapters") and _STEP_FOLDER.fullmatch(step.name)
    run = step.parent.parent if kept else adapter.parent
    if (kept or result) and (run / "config.yaml").is_file():
        return run
    return adapter.parent if _is_run(adapter.parent) else None


def _is_run(folder: Path) -> bool:
    """By more than a config.yaml, which may lie in any folder of a user's: an adapter put there is the run's."""
    also = (folder / "checkpoints").is_dir() or (folder / "log.jsonl").is_file()
    return also and (folder / "config.yaml").is_file()


def same_adapter(one: Path, other: Path) -> bool:
    """Whether two adapter folders are one, by whatever path, or hold equal files: a copy is the same adapter."""
    if one.samefile(other):
        return True
    names = [name for name in _OF_AN_ADAPTER if name.endswith(".safetensors")]
    return all(_equal(one / name, other / name) for name in names)


def same_run(one: Path, other: Path) -> bool:
    """Whether two adapter folders are steps of one run."""
    run, twin = run_of(one), run_of(other)
    return run is not None and twin is not None and run.samefile(twin)


def _equal(one: Path, other: Path) -> bool:
    if one.is_file() != other.is_file():
        return False
    if not one.is_file():
        return True
    if one.stat().st_size != other.stat().st_size:
        return False
    with one.open("rb") as left, other.open("rb") as right:
        while part := left.read(2**20):
            if part != right.read(2**20):
                return False
    return True


def _refusal(path: Path) -> str:
    """What the system says of a path beside that there is nothing: too long a name, no right to look."""
    try:
        path.stat()
    except FileNotFoundError:
        pass
    except (OSError, ValueError) as error:
        return f" ({getattr(error, 'strerror', None) or error})"
    return ""


def _folder_of(path: Path) -> Path:
    """The folder that a file of an adapter, a checkpoint or a run stands for; other paths stay."""
    if not path.is_file():
        return path
    parent, name = path.parent, path.name
    if (parent / COEFF_FILE).is_file():
        return parent if name in _OF_AN_ADAPTER or name.endswith((".png", ".jpg")) else path
    if (parent / "config.yaml").is_file() and name in _OF_A_RUN:
        return parent
    if (parent / "trainables.safetensors").is_file() and name in _OF_A_CHECKPOINT:
        return parent
    return path


def _of_step(run: Path, which: str) -> Path:
    """Raises: AdapterError for a step that is not kept, naming those that are."""
    if run.name == "adapter" and not (run / "config.yaml").is_file():  # RUN/adapter@200
        run = run.parent
    if not exists(run) or not run.is_dir():
        raise AdapterError(f"There is no run {run}, so there is no {run}@{which} either.")
    kept = kept_steps(run)
    if not kept:
        raise AdapterError(
            f"{run} holds no adapter of any step, so there is no {run}@{which}. Name a run folder; one that trains "
            "keeps adapters with training.keep_adapters_every."
        )
    if which == "last":
        return kept[max(kept)]
    step = _best_step(run, kept) if which == "best" else int(which)
    if step not in kept:
        what = f"the best validation of {run} is that of step {step}, which" if which == "best" else ""
        raise AdapterError(
            f"{what[:1].upper() + what[1:] if what else f'Step {step} of {run}'} is not kept. Kept are the adapters "
            f"of {_listed(kept)}; training.keep_adapters_every=N keeps that of every N-th step."
        )
    return kept[step]


def _best_step(run: Path, kept: dict[int, Path]) -> int:
    """The step whose validation has the best score: as the run chose it, or by its log."""
    result = _header_of(run / "adapter")
    if "run_steps" in result and "trained_steps" in result:
        return result["trained_steps"]
    scores: dict[int, float] = {}
    log = run / "log.jsonl"
    for text in log.read_text(encoding="utf-8", errors="replace").splitlines() if log.is_file() else ():
        try:
            line = json.loads(text)
            score = line["scores"]["score"]
            scores[int(line["step"])] = float(score)
        except (ValueError, KeyError, TypeError, RecursionError):  # a step without scores, a line cut short
            continue
    if not scores:
        raise AdapterError(
            f"{run} has no scored validation that could name the best step: validation.every, validation.dino and "
            f"validation.clip make them. Kept are the adapters of {_listed(kept)}; name one, as {run}@{max(kept)}."
        )
    return max(
        scores, key=lambda step: (scores[step], -step)
    )  # the earlier one of equals, as validation.keep has it


def _header_of(folder: Path) -> dict[str, int]:
    """The steps that an adapter says of itself; nothing for what is none."""
    try:
        header = json.loads(read_names(folder / COEFF_FILE)[1][HEADER_KEY])
        steps = ("trained_steps", "run_steps")
        return {name: header[name] for name in steps if isinstance(header.get(name), int)}
    except (KeyError, ValueError, TypeError, AttributeError, RecursionError):
        return {}


def _nearest_step(path: Path) -> str:
    """For RUN@100:0.5x, RUN@x and the like: how a step is named."""
    run, at, which = str(path).rpartition("@")
    if not at or not run or not exists(Path(run)) or not Path(run).is_dir():
        return ""
    kept = kept_steps(Path(run))
    steps = f" (kept: {_listed(kept)})" if kept else ""
    return f" A step of {run} is named by its number, best or last{steps}, not {which!r}."


def _neighbours(path: Path) -> str:
    """For a run or adapter that is not there: those beside it."""
    if not exists(path.parent):
        return ""
    runs = {file.parents[1].name for file in path.parent.glob(f"*/adapter/{COEFF_FILE}")}
    names = sorted(runs | {file.parent.name for file in path.parent.glob(f"*/{COEFF_FILE}")})
    more = ", ..." if len(names) > 5 else ""
    where = "The working folder" if path.parent == Path() else path.parent
    return f" {where} holds {', '.join(names[:5])}{more}." if names else ""


def _listed(kept: dict[int, Path]) -> str:
    steps = [str(step) for step in kept]
    if len(steps) > 20:
        steps = [*steps[:10], "...", *steps[-5:]]
    return f"step{'s' * (len(kept) > 1)} {', '.join(steps)}"
