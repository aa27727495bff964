"""Killed, on a full disk, changed behind its back, started twice: through the real command line, in real processes.

A child is a fork of this process, so that it need not load torch again; it runs the command line's own entry point. A
fault is set in it beforehand, at an exact moment. Whatever happens, nothing half-written is read afterwards, and the
run that goes on leaves the adapter of one that was left alone, bit for bit.
"""

from __future__ import annotations

import ctypes
import errno
import gc
import json
import os
import resource
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from coeffdiff.cli.root import app, main
from coeffdiff.data.latent_cache import read_cache
from coeffdiff.errors import AdapterError
from coeffdiff.hosts import diffusers
from coeffdiff.method.adapter_file import read_header
from coeffdiff.method.adapter_paths import COEFF_FILE, find_adapter
from coeffdiff.pocket.model import save_random
from coeffdiff.training import loop
from coeffdiff.training import step as training_step
from coeffdiff.training.checkpoints import load_checkpoint
from coeffdiff.training.run_folder import RunFolder
from coeffdiff.training.trainables import Trainables
from coeffdiff.utils import atomic

Fault = Callable[[], None]


@dataclass(frozen=True)
class Ended:
    """How a child ended: exit code, or minus the signal; what it said on standard error and output."""

    code: int
    said: str
    answered: str

    @property
    def sentence(self) -> str:
        """The one line that says what is wrong."""
        assert "Traceback" not in self.said, self.said
        (line,) = [
            line for line in self.said.splitlines() if line.partition(":")[0].isidentifier() and ": " in line
        ]
        return line


Child = tuple[int, int, int]  # process id, what it says, what it answers


def start(*arguments: str, fault: Fault = lambda: None) -> Child:
    """Begin `coeffdiff ARGUMENTS` in a child. Its words wait in pipes, which no full disk and no limit touches."""
    sys.stdout.flush()
    sys.stderr.flush()
    answered, said = os.pipe(), os.pipe()
    child = os.fork()
    if child:
        os.close(answered[1])
        os.close(said[1])
        return child, said[0], answered[0]
    code = 70
    gc.freeze()  # a collection would walk, and so copy, all that was inherited
    try:
        os.dup2(answered[1], 1)
        os.dup2(said[1], 2)
        sys.stdout, sys.stderr = open(1, "w"), open(2, "w", errors="backslashreplace")  # noqa: SIM115
        sys.argv = ["coeffdiff", *arguments]
        fault()
        main()
    except SystemExit as ended:
        code = ended.code if isinstance(ended.code, int) else 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def end(child: Child) -> Ended:
    process, said, answered = child
    words = []
    for pipe in (said, answered):
        with os.fdopen(pipe, "rb") as file:
            words.append(file.read())
    code = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
    return Ended(code, words[0].decode(errors="replace"), os.fsdecode(words[1]))


def coeffdiff(*arguments: str, fault: Fault = lambda: None) -> Ended:
    return end(start(*arguments, fault=fault))


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """The tiny model, two photos, and the adapters of runs that were left alone: DIR/whole-STEPS/adapter."""
    folder = tmp_path_factory.mktemp("place")
    save_random("micro", folder / "model")
    (folder / "photos").mkdir()
    for i in range(2):
        Image.radial_gradient("L").resize((70, 64)).convert("RGB").rotate(45 * i).save(
            folder / f"photos/{i}.png"
        )
    return folder


@pytest.fixture(autouse=True)
def here(place, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(place / "photos", "photos")
    Path("model").symlink_to(place / "model")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def command(*more: str, output: str = "run", steps: int = 3) -> list[str]:
    values = {
        "training.batch_size": 1,
        "training.checkpoint_every": 1,
        "validation.prompts": "[]",
        "method.lora.rank": 2,
        "method.lora.targets": "[to_q]",
    }
    settings = [part for name, value in values.items() for part in ("--set", f"{name}={value}")]
    subject = ["--model", "model", "--images", "photos", "--token", "sks", "--class-word", "ball"]
    return [
        "train",
        *subject,
        "--method",
        "coeff+lora",
        "--steps",
        str(steps),
        *settings,
        "--output",
        output,
        *more,
    ]


def weights(adapter: Path) -> dict[str, torch.Tensor]:
    return {k: t for file in sorted(adapter.glob("*.safetensors")) for k, t in load_file(file).items()}


@pytest.fixture
def is_whole(place, monkeypatch):
    """is_whole(run, steps): its adapter is that of a run of as many steps that nothing disturbed, bit for bit."""

    def check(run: str = "run", steps: int = 3) -> None:
        undisturbed = place / f"whole-{steps}"
        if not undisturbed.exists():
            with monkeypatch.context() as patch:
                patch.chdir(place)
                done = coeffdiff(*command(output=undisturbed.name, steps=steps))
            assert done.code == 0, done.said
        first, second = weights(undisturbed / "adapter"), weights(Path(run) / "adapter")
        assert first and first.keys() == second.keys()
        assert all(torch.equal(first[key], second[key]) for key in first)
        assert read_header(Path(run) / "adapter").trained_steps == steps
        log = [json.loads(line)["step"] for line in (Path(run) / "log.jsonl").read_text().splitlines()]
        assert log == list(range(1, steps + 1))
        assert not list(Path(run).rglob(".*")), "something half-written lies about"

    return check


# --- faults, to be set in a child ---------------------------------------------------------------------------------


def dies() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def full() -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def fails(
    owner: object, name: str, how: Fault, *, where: str = "", number: int = 1, when: str = "before"
) -> Fault:
    """owner.name does `how` at its number-th call with `where` in an argument: before its work, after it, or half-way
    (a write that has written half of what it should)."""

    def set_it() -> None:
        real, calls = getattr(owner, name), []

        def faulty(*args, **kwargs):
            if where in " ".join(str(arg)[:500] for arg in args if isinstance(arg, str | Path)):
                calls.append(1)
                if len(calls) == number:
                    if when == "half":
                        half = args[1][: len(args[1]) // 2]
                        real(args[0], half, *args[2:], **kwargs)
                    elif when == "after":
                        real(*args, **kwargs)
                    how()
            return real(*args, **kwargs)

        setattr(owner, name, faulty)

    return set_it


def half_an_older_checkpoint(how: Fault) -> Fault:
    """Clearing away an older checkpoint stops after its first file."""

    def set_it() -> None:
        def faulty(folder, **_options):
            next(iter(Path(folder).iterdir())).unlink()
            how()

        shutil.rmtree = faulty

    return set_it


CHECKPOINT = {  # moments in the writing of the second checkpoint of a process, each of six files and folders
    "half of the optimizer": lambda how: fails(
        Path, "write_bytes", how, where="optimizer.pt", number=2, when="half"
    ),
    "half of what learns": lambda how: fails(
        Path, "write_bytes", how, where="trainables", number=2, when="half"
    ),
    "without its state": lambda how: fails(
        Path, "write_text", how, where="state.json", number=2, when="half"
    ),
    "before the flush": lambda how: fails(atomic, "_flush", how, where=".step-", number=7),
    "before the rename": lambda how: fails(Path, "replace", how, where=".step-", number=2),
    "after the rename": lambda how: fails(Path, "replace", how, where=".step-", number=2, when="after"),
}
ADAPTER = {
    "half of alpha": lambda how: fails(Path, "write_bytes", how, where=".adapter.", when="half"),
    "before the LoRA": lambda how: fails(diffusers, "save_lora", how, where=".adapter."),
    "half of the LoRA": lambda how: fails(Path, "write_bytes", how, where=".adapter.", number=2, when="half"),
    "half of the card": lambda how: fails(Path, "write_bytes", how, where="README.md", when="half"),
    "before the flush": lambda how: fails(atomic, "_flush", how, where=".adapter."),
    "before the rename": lambda how: fails(Path, "replace", how, where=".adapter."),
}
CACHE = {
    "half an entry": lambda how: fails(Path, "write_bytes", how, where="/latents/.", when="half"),
    "before the rename": lambda how: fails(Path, "replace", how, where="/latents/."),
    "after the rename": lambda how: fails(Path, "replace", how, where="/latents/.", when="after"),
}


# --- kill -9 ------------------------------------------------------------------------------------------------------


def test_killed_at_every_moment_of_a_checkpoint(is_whole):
    """One run, killed at six moments and while it clears an older checkpoint away, resumed each time."""
    steps = len(CHECKPOINT) + 2
    reached = 0
    for moment, fault in [*CHECKPOINT.items(), ("clearing", half_an_older_checkpoint)]:
        again = ("--resume",) if reached else ()
        ended = coeffdiff(*command(*again, steps=steps), fault=fault(dies))
        assert ended.code == -signal.SIGKILL, (moment, ended.said)
        found = load_checkpoint(RunFolder(Path("run")))
        assert found is not None
        # The first checkpoint of each process is whole; the second only if its rename was done
        arrived = {"after the rename": 2, "clearing": 1}.get(moment, 1)
        assert found.step == reached + arrived, moment
        reached = found.step
        assert not Path("run/adapter").exists()
    ended = coeffdiff(*command("--resume", steps=steps))
    assert ended.code == 0, ended.said
    is_whole(steps=steps)


@pytest.mark.parametrize("method", ["coeff", "lora", "coeff+lora"])
def test_8_steps_are_3_a_kill_and_5(method):
    """With a token that is learned and a class that is kept: the resumed run's adapter, all of it, bit for bit."""
    more = [
        "--method",
        method,
        "--learn-token",
        "--set",
        "prior.weight=1",
        "--set",
        "training.checkpoint_every=3",
    ]
    whole = coeffdiff(*command(*more, output="whole", steps=8))
    assert whole.code == 0, whole.said
    killed = coeffdiff(*command(*more, steps=8), fault=fails(training_step, "draw_dropout", dies, number=5))
    assert killed.code == -signal.SIGKILL
    assert [path.name for path in RunFolder(Path("run")).checkpoints()] == ["step-000003"]
    resumed = coeffdiff("train", "--resume", "--output", "run")
    assert resumed.code == 0, resumed.said
    assert "after step 3" in resumed.said
    first, second = weights(Path("whole/adapter")), weights(Path("run/adapter"))
    assert {"clip_l", "clip_g"} < first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) for key in first)


def test_killed_at_every_moment_of_writing_the_adapter(is_whole):
    """There is none until it is whole; the next try finds all steps done and writes it."""
    for number, (moment, fault) in enumerate(ADAPTER.items()):
        ended = coeffdiff(*command(*(("--resume",) if number else ())), fault=fault(dies))
        assert ended.code == -signal.SIGKILL, (moment, ended.said)
        with pytest.raises(AdapterError, match="has no adapter yet"):
            find_adapter("run")
    assert coeffdiff(*command("--resume")).code == 0
    is_whole()


@pytest.mark.parametrize("when", ["before", "after"])
def test_killed_while_a_longer_runs_adapter_takes_the_place_of_the_first(is_whole, when):
    """Old or new, but at no moment none: where the system can swap two folders in one step."""
    assert coeffdiff(*command(steps=2)).code == 0
    ended = coeffdiff(*command("--resume"), fault=fails(atomic, "_exchange", dies, when=when))
    assert ended.code == -signal.SIGKILL, ended.said
    assert read_header(find_adapter("run")).trained_steps == (2 if when == "before" else 3)
    ended = coeffdiff(*command("--resume"))
    assert ended.code == (0 if when == "before" else 2), ended.said
    if when == "after":
        assert ended.sentence.startswith("ResumeError: run has finished its 3 steps")
    is_whole()


def test_killed_at_every_moment_of_caching(is_whole):
    """What a kill cut short is never read, and what was whole is."""
    for number, (moment, fault) in enumerate(CACHE.items()):
        ended = coeffdiff(*command(), fault=fault(dies))
        assert ended.code == -signal.SIGKILL, (moment, ended.said)
        assert not Path("run").exists()
        entries = [
            path for path in Path("cache/coeffdiff/latents").iterdir() if not path.name.startswith(".")
        ]
        assert len(entries) == (1 if moment == "after the rename" else 0)
        assert all(read_cache(entry, masked=False) for entry in entries)
        assert len(list(Path("cache/coeffdiff/latents").iterdir())) == min(number + 1, 2) + len(entries)
    assert coeffdiff(*command()).code == 0
    is_whole()


# --- a full disk --------------------------------------------------------------------------------------------------


def test_a_disk_that_fills_up_at_every_moment_of_a_checkpoint(is_whole):
    """Exit code 2, one sentence with the last good checkpoint, no litter; with room again the run goes on."""
    moments = {name: fault for name, fault in CHECKPOINT.items() if name != "after the rename"}
    steps = len(CHECKPOINT) + 2
    for number, (moment, fault) in enumerate(moments.items()):
        again = ("--resume",) if number else ()
        ended = coeffdiff(*command(*again, steps=steps), fault=fault(full))
        assert ended.code == 2, (moment, ended.said)
        assert ended.sentence == (
            f"TrainingError: The checkpoint of step {number + 2} cannot be written to run/checkpoints (No space left on "
            f"device). The last good checkpoint is run/checkpoints/step-{number + 1:06d}. "
            "Make room, then continue with train --resume."
        )
        assert not list(Path("run").rglob(".*"))
    assert coeffdiff(*command("--resume", steps=steps)).code == 0
    is_whole(steps=steps)


def test_a_disk_that_fills_up_at_every_moment_of_writing_the_adapter(is_whole):
    for number, (moment, fault) in enumerate(ADAPTER.items()):
        ended = coeffdiff(*command(*(("--resume",) if number else ())), fault=fault(full))
        assert ended.code == 2, (moment, ended.said)
        assert ended.sentence == (
            "TrainingError: The adapter run/adapter cannot be written: No space left on device. "
            "Make room, then continue with --resume."
        )
        assert not Path("run/adapter").exists() and not list(Path("run").rglob(".*"))
    assert coeffdiff(*command("--resume")).code == 0
    is_whole()


@pytest.mark.parametrize("moment", ["half an entry", "before the rename"])
def test_a_disk_too_full_for_the_cache_costs_only_time(is_whole, moment):
    """The run goes on without it, and nothing half-written stays there."""
    ended = coeffdiff(*command(), fault=CACHE[moment](full))
    assert ended.code == 0, ended.said
    assert all(read_cache(entry, masked=False) for entry in Path("cache/coeffdiff/latents").iterdir())
    is_whole()


@pytest.mark.parametrize("what", ["config.yaml", "log.jsonl"])
def test_a_disk_that_fills_up_when_the_run_begins(what):
    """Neither settings nor log can be written: one sentence; without its settings there is no run at all."""
    ended = coeffdiff(*command(), fault=fails(Path, "write_text", full, where=what, when="half"))
    assert ended.code == 2
    assert "cannot be written: No space left on device" in ended.sentence
    assert Path("run").exists() == (what == "log.jsonl")


class Disk:
    """Room for so many bytes, really: a tmpfs of that size, or else a limit to the size of a file in the child."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir()
        self.libc = ctypes.CDLL(None)
        self.mounted = sys.platform == "linux" and self._mount(b"size=64k") == 0
        self.limit = 0

    def _mount(self, options: bytes, flags: int = 0) -> int:
        return self.libc.mount(b"tmpfs", os.fsencode(self.folder), b"tmpfs", flags, options)

    def give(self, size: int, longest: int) -> None:
        """Room for `size` bytes in all; where that cannot be had, for `longest` in a file."""
        if self.mounted:
            assert self._mount(b"size=%d" % size, 32) == 0  # MS_REMOUNT
        self.limit = longest

    def fault(self) -> None:
        if not self.mounted:
            resource.setrlimit(resource.RLIMIT_FSIZE, (self.limit, resource.RLIM_INFINITY))

    def take_away(self) -> None:
        if self.mounted:
            self.libc.umount(os.fsencode(self.folder))


@pytest.fixture(params=["as it can be had here", "a limit"])
def disk(request, tmp_path, monkeypatch):
    if request.param == "a limit":
        monkeypatch.setattr(Disk, "_mount", lambda self, options, flags=0: -1)
    disk = Disk(tmp_path / "disk")
    yield disk
    disk.take_away()


def test_a_disk_that_is_really_full(disk, is_whole, monkeypatch):
    """Not a simulated error but the system's: run and cache on a disk without room, then with some, then with enough."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(disk.folder))
    said = r"No space left on device|File too large"
    run = "disk/run"
    disk.give(4 * 1024, 512)
    ended = coeffdiff(*command(output=run), fault=disk.fault)  # not even the settings
    assert ended.code == 2, ended.said
    assert ended.sentence.startswith("ConfigError: The run folder disk/run cannot be written: ")
    assert not Path(run).exists()
    disk.give(48 * 1024, 16 * 1024)
    ended = coeffdiff(*command(output=run), fault=disk.fault)  # settings and log, no checkpoint
    assert ended.code == 2, ended.said
    assert ended.sentence.startswith(
        "TrainingError: The checkpoint of step 1 cannot be written to disk/run/checkpoints ("
    )
    assert any(part in ended.sentence for part in said.split("|"))
    assert not list(Path(run).rglob(".*"))
    entries = list(disk.folder.glob("coeffdiff/latents/*"))
    assert all(read_cache(entry, masked=False) for entry in entries)
    disk.give(64 * 2**20, 2**20)
    ended = coeffdiff(*command("--resume", output=run), fault=disk.fault)
    assert ended.code == 0, ended.said
    is_whole(run)


# --- photos that change, runs that meet ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (
            lambda: Path("photos/1.png").unlink(),
            "was checked, but can no longer be read (No such file or directory).",
        ),
        (
            lambda: Image.new("RGB", (64, 64)).save("photos/1.png"),
            "has changed since it was checked; start again with the new file.",
        ),
    ],
    ids=["deleted", "changed"],
)
def test_a_photo_that_changes_after_it_was_checked(change, sentence):
    """Between the look at the folder and the encoding: one sentence, and no run."""
    ended = coeffdiff(*command(), fault=fails(loop, "encode", change))
    assert (ended.code, ended.sentence) == (2, f"PhotoError: photos/1.png {sentence}")
    assert not Path("run").exists()


CHANGES = {
    "1 of 2 are gone or changed": lambda: Path("photos/1.png").unlink(),
    "1 of 2 are gone or changed; new or changed: 1.png": lambda: Image.new("RGB", (64, 64)).save(
        "photos/1.png"
    ),
    "new or changed: 2.png": lambda: Image.new("RGB", (64, 64)).save("photos/2.png"),
}


def test_photos_that_change_between_the_start_and_a_resume(place, is_whole):
    """Deleted, changed, added: refused, with what has changed; put back, the run goes on."""
    assert coeffdiff(*command(steps=1)).code == 0
    for sentence, change in CHANGES.items():
        change()
        ended = coeffdiff(*command("--resume"))
        assert (ended.code, ended.sentence) == (
            2,
            f"ResumeError: The photos, masks or captions have changed since run began ({sentence}). "
            "Put them back, name where they are now with --images, or start a new run.",
        )
        shutil.rmtree("photos")
        shutil.copytree(place / "photos", "photos")
    assert coeffdiff(*command("--resume")).code == 0
    is_whole()


def waits_for(file: str) -> Fault:
    def wait() -> None:
        while not Path(file).exists():
            time.sleep(0.01)

    return wait


def wait_until(there: Callable[[], bool], child: int) -> None:
    deadline = time.monotonic() + 300
    while not there():
        assert time.monotonic() < deadline and os.waitpid(child, os.WNOHANG) == (0, 0)
        time.sleep(0.01)


def test_two_processes_do_not_train_one_run(is_whole):
    """While one is at its second step, a resume of the same run is refused, and so is a new run in its folder."""
    first = start(*command(), fault=fails(training_step, "denoising_loss", waits_for("go"), number=2))
    wait_until(lambda: Path("run/checkpoints/step-000001").exists(), first[0])
    second = coeffdiff(*command("--resume"))
    assert (second.code, second.sentence) == (
        2,
        "ResumeError: Another process is training in run now; wait for its end, or name another --output.",
    )
    third = coeffdiff(*command())
    assert (third.code, third.sentence) == (
        2,
        "ConfigError: run holds a run; continue it with --resume, or name another --output. Nothing was changed.",
    )
    Path("go").touch()
    assert end(first).code == 0
    is_whole()


def test_of_two_runs_that_begin_at_once_one_goes_on(is_whole):
    """Both found the folder free; the slower one is told so, and leaves the other's run alone."""
    slow = start(*command(), fault=fails(loop, "claim", waits_for("go")))
    assert coeffdiff(*command()).code == 0
    Path("go").touch()
    ended = end(slow)
    assert (ended.code, ended.sentence) == (
        2,
        "ConfigError: run has just been taken by another run; start again or name an --output.",
    )
    is_whole()


# --- words of strangers ---------------------------------------------------------------------------------------------

HOSTILE = (
    "\x1b[2J\x1b]0;owned\x07",
    "a\nPhotoError: all is lost",
    "[red]{token}%s<b>",
    "\u202egnp.exe",
    "x" * 200,
)


def harmless(text: str) -> bool:
    return not any(c != "\n" and (c < " " or "\x7f" <= c < "\xa0" or "\u202a" <= c <= "\u202e") for c in text)


def test_hostile_names_in_the_photo_folder(is_whole):
    """Photos, captions and junk with names that would clear the screen, fake a line or be no text at all."""
    shutil.rmtree("photos")
    Path("photos").mkdir()
    for number, name in enumerate((*HOSTILE, os.fsdecode(b"\xff\xfe"))):
        Image.new("RGB", (40, 40), (number, 0, 0)).save(Path("photos") / f"{name}.png")
        (Path("photos") / f"{name}.zip").write_bytes(b"PK")
    (Path("photos") / f"{HOSTILE[0]}.txt").write_bytes(b"\x1b[31m a {token}\x07 \xe2\x80\xae")
    ended = coeffdiff(*command(steps=1))
    assert ended.code == 0, ended.said
    assert harmless(ended.said)
    assert "photos   6 in photos, 6 left out" in ended.said
    assert "         left out \\x1b[2J\\x1b]0;owned\\x07.zip: " in ended.said
    assert not any(line.startswith("PhotoError") for line in ended.said.splitlines())


@pytest.mark.parametrize("name", [*HOSTILE, os.fsdecode(b"\xff\xfe")], ids=ascii)
def test_hostile_names_of_everything_else(name):
    """Each option that takes a name or a word is given a hostile one that does not exist: one harmless sentence."""
    tries = (
        ["train", "--model", "model", "--token", "sks", "--images", name],
        ["train", "--model", name, "--token", "sks", "--images", "photos"],
        ["train", "--config", name],
        ["train", name],
        ["train", f"--{name}"],
        ["train", "--steps", name],
        [name],
        ["train", "--set", f"{name}=1"],
        ["train", "--set", f"training.steps={name}"],
        ["train", "--resume", "--output", name],
        ["sample", "--prompt", "a", "--adapter", name],
        ["sample", "--prompt", "a", "--adapter", f"photos:{name}"],
        ["sample", "--prompts-file", name],
    )
    for arguments in tries:
        ended = CliRunner().invoke(app, arguments)  # no fault here, and so no child
        assert ended.exit_code == 2 and isinstance(ended.exception, SystemExit), (arguments, ended.exception)
        assert harmless(ended.stderr), (arguments, ended.stderr)


def test_an_answer_in_a_folder_of_any_name():
    """`--output` that is no UTF-8: the path on standard output is exact, byte for byte."""
    name = os.fsdecode(b"run \xff\x1b[31m")
    ended = coeffdiff(*command(output=name, steps=1))
    assert ended.code == 0, ended.said
    assert harmless(ended.said)
    assert Path(ended.answered.removesuffix("\n")) == Path(name) / "adapter"
    ended = coeffdiff(*command("--resume", output=name, steps=2))
    assert ended.code == 0, ended.said


def rewritten(adapter: Path, tensors=None, **fields) -> None:
    file = adapter / COEFF_FILE
    with safe_open(file, framework="pt") as opened:
        header = json.loads(opened.metadata()["coeffdiff"]) | fields
    tensors = load_file(file) if tensors is None else tensors
    save_file(tensors, file, {"coeffdiff": json.dumps(header)})


def test_hostile_adapters_at_the_command_line(place, is_whole):
    """Words with control characters, words of markup, an adapter for another base: refused or shown as they are."""
    assert coeffdiff(*command(steps=1)).code == 0
    adapter = Path("run/adapter")
    sample = [
        "sample",
        "--adapter",
        "run",
        "--prompt",
        "a <V>",
        "--steps",
        "1",
        "--model",
        "model",
        "--output",
    ]

    rewritten(adapter, token="[red]{0}<b>", class_word="`x`|![y](z)")
    ended = coeffdiff(*sample, "one")
    assert ended.code == 0, ended.said
    assert "token [red]{0}<b>)" in ended.said

    for words in HOSTILE[:2]:
        rewritten(adapter, token=words)
        ended = coeffdiff(*sample, "two")
        assert ended.sentence == (f"AdapterError: run/adapter/{COEFF_FILE} has a damaged header (token).")
    rewritten(adapter, token="sks")
    tensors = load_file(adapter / COEFF_FILE)
    name = next(iter(sorted(tensors)))
    layer = name.removesuffix(".alpha")
    heads = read_header(adapter).heads | {layer: 20}
    rewritten(adapter, tensors | {name: torch.zeros(20, 20)}, heads=heads)
    ended = coeffdiff(*sample, "two")
    assert ended.code == 2
    assert ended.sentence.startswith(
        f"AdapterMismatch: run/adapter has 20 x 20 coefficients for {layer}, but this UNet"
    )
    assert not Path("two").exists()


# --- numbers and memory ---------------------------------------------------------------------------------------------


def test_a_loss_that_is_not_finite_keeps_the_last_good_checkpoint():
    """A learning rate of 1e30: the first step is finite, the second is not; nothing of it is saved."""
    rate = ("--set", "method.coeff.learning_rate=1e30", "--method", "coeff")
    ended = coeffdiff(*command(*rate))
    assert ended.code == 2
    assert ended.sentence == (
        "NonFiniteLoss: The loss is not finite at step 2; the learning rate is the usual cause: start anew with "
        "a lower method.coeff.learning_rate (1e+30), as --resume with the same would end here again. The last good checkpoint is run/checkpoints/step-000001."
    )
    assert load_checkpoint(RunFolder(Path("run"))).step == 1
    assert not Path("run/adapter").exists()


def alpha_overflows() -> None:
    """Behind the optimizer's first step, whose loss and gradients were finite."""
    real = Trainables.mean_abs_alpha

    def moved(self):
        self.alphas[0].data.fill_(torch.inf)
        return real(self)

    Trainables.mean_abs_alpha = moved


def test_a_step_that_overflows_is_not_saved():
    """Finite loss, infinite alpha: neither a checkpoint nor an adapter of it."""
    ended = coeffdiff(*command(steps=1), fault=alpha_overflows)
    assert ended.code == 2
    assert ended.sentence.endswith(
        ".alpha is not finite after step 1: the learning rate is too high. No checkpoint had been written yet."
    )
    assert load_checkpoint(RunFolder(Path("run"))) is None
    assert not Path("run/adapter").exists()


def little_memory(extra: int) -> Fault:
    """The child may map only so much more than it has when training begins."""

    def set_it() -> None:
        def limit() -> None:
            pages = int(Path("/proc/self/statm").read_text().split()[0])
            most = pages * resource.getpagesize() + extra
            resource.setrlimit(resource.RLIMIT_AS, (most, most))

        fails(loop, "reset_peak", limit)()

    return set_it


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs Linux's accounting of address space")
def test_memory_that_runs_out_names_the_switches_that_are_left():
    """512 pictures at a time do not fit into 200 MiB; with that switch turned, it is not named again."""
    hungry = ("--resolution", "128", "--set", "training.batch_size=512")
    ended = coeffdiff(*command(*hungry), fault=little_memory(200 * 2**20))
    assert ended.code == 2, ended.said
    assert ended.sentence.startswith("OutOfMemory: This machine has too little memory for this (")
    assert ended.sentence.endswith(
        " more were asked for). In this order: --set training.gradient_checkpointing=true; --set training.batch_size=1 "
        "--set training.accumulate=512 (the same result); --set training.precision=bf16; --set model.quantize=int8 (frozen "
        "weights in 8 bits; needs pip install 'coeffdiff[quant]'); --resolution 64."
    )


# --- few and many, small and large ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("count", "size"),
    [(1, (64, 64)), (200, (20, 16)), (1, (5472, 3648)), (2, (16, 16)), (1, (1, 300))],
    ids=["1 photo", "200 photos", "20 megapixels", "16 pixels", "1 x 300"],
)
def test_photos_few_and_many_small_and_large(count, size):
    """From the folder to an adapter that samples."""
    shutil.rmtree("photos")
    Path("photos").mkdir()
    for number in range(count):
        picture = Image.new("RGB", size, (number, 255 - number, 40))
        picture.paste((255, 255, 255), (0, 0, size[0] // 2, size[1] // 2))
        picture.save(f"photos/{number:03d}.{'png' if count > 1 else 'jpg'}")
    ended = coeffdiff(*command(steps=2))
    assert ended.code == 0, ended.said
    assert f"photos   {count} in photos\n" in ended.said
    assert read_header(Path("run/adapter")).trained_steps == 2
    assert all(tensor.isfinite().all() for tensor in weights(Path("run/adapter")).values())
    if size == (64, 64):
        ended = coeffdiff(
            "sample", "--adapter", "run", "--prompt", "<V>", "--steps", "1", "--output", "pictures"
        )
        assert ended.code == 0, ended.said
        assert len(ended.answered.splitlines()) == 2
