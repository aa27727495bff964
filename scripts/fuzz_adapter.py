"""Damaged and hostile adapter folders, by the thousand: each must load, or be refused with the one clear error.

python scripts/fuzz_adapter.py                         # 20,000 inputs, counts by outcome
python scripts/fuzz_adapter.py --seed 3 --only 1234    # one of them again, with what was done to it

Input i of a seed and a size is the same everywhere: a real adapter (alpha, LoRA, both, DoRA) of a random model with
one to three changes to its bytes, safetensors header, own header, tensors or files. It may load and verify, or raise
AdapterError or AdapterMismatch with one printable sentence; the UNet must be bare afterwards. Anything else counts as
a crash: another exception, a signal, more than SECONDS, or GROWTH more address space. Exit code 1 if there is any.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import copy
import itertools
import json
import os
import queue
import random
import re
import resource
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

sys.path.insert(0, str(Path(__file__).parent.parent))  # so that it runs where the package is not installed

from coeffdiff.errors import AdapterError
from coeffdiff.hosts.diffusers import load_adapter, loaded_adapters, save_adapter
from coeffdiff.hosts.lora.layers import add_lora
from coeffdiff.hosts.unet import inject, injected_names
from coeffdiff.method.adapter_header import FORMAT_VERSION, AdapterHeader, LoraHeader
from coeffdiff.method.adapter_paths import COEFF_FILE, LORA_FILE
from coeffdiff.pocket.model import build_pipeline
from coeffdiff.utils.seeding import generator_for, stable_seed

SECONDS = 20  # of computing, for one input; a sound adapter takes a tenth of one
PATIENCE = 900  # seconds by the clock, for an input that waits instead
GROWTH = 2**30  # bytes of address space beyond what the process had when it began
LONGEST = 2000  # characters of a sentence, the path to the folder included

# --- what is hostile -------------------------------------------------------------------------------------------

NUMBERS: tuple[Any, ...] = (
    0,
    1,
    -1,
    2,
    3,
    255,
    2**31,
    2**32,
    2**53,
    2**63 - 1,
    2**63,
    2**64 - 1,
    10**30,
    -(2**63),
)
NUMBERS = (*NUMBERS, 0.5, -0.0, 1e308, 1e-320)
TEXTS = (
    "",
    " ",
    "\x1b[2J\x1b]0;owned\x07",
    "a\nError: all is lost",
    "\r\x08\x00",
    "\u202etxt.exe",
    "../../../../etc/passwd",
    "/dev/zero",
    "C:\\con",
    "{token}{0.__class__}%s%n${HOME}`id`",
    "[bold red]x[/bold red][link=file:///etc/passwd]",
    "<script>alert(1)</script>![x](javascript:alert(1))",
    "| --- | `a` **b**",
    "x" * 300,
    "x" * 100_000,
    "\ud800",
    "𝕏" * 50,
    "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q.lora.down.weight",
    "coeffdiff",
    "__metadata__",
    "\N{ZERO WIDTH SPACE}",
)
DTYPES = (
    "F64",
    "F32",
    "F16",
    "BF16",
    "F8_E4M3",
    "F8_E5M2",
    "F8_E8M0",
    "F4",
    "F6_E2M3",
    "C64",
    "I64",
    "U64",
    "U16",
    "U8",
)
DTYPES = (*DTYPES, "BOOL", "P99", "", "f32")


def value(draw: random.Random, depth: int = 0) -> Any:
    """Any JSON value, of the kinds that programs stumble over."""
    kind = draw.randrange(8 if depth < 3 else 5)
    if kind == 5:
        return [value(draw, depth + 1) for _ in range(draw.randrange(4))]
    if kind == 6:
        return {draw.choice(TEXTS): value(draw, depth + 1) for _ in range(draw.randrange(4))}
    if kind == 7:
        return [float("nan"), float("inf"), float("-inf")][draw.randrange(3)]
    return [None, draw.random() < 0.5, draw.choice(NUMBERS), draw.choice(TEXTS), draw.randrange(-5, 60)][kind]


# --- changes: each takes a folder and a source of randomness -----------------------------------------------------


def split(file: Path) -> tuple[Any, bytes]:
    """A safetensors file's header and data; the header is None where an earlier change left none."""
    content = file.read_bytes()
    try:
        length = struct.unpack("<Q", content[:8])[0]
        header = json.loads(content[8 : 8 + length])
        return (header if isinstance(header, dict) else None), content[8 + length :]
    except (struct.error, ValueError, RecursionError, MemoryError, OverflowError):
        return None, content


def join(file: Path, header: Any, data: bytes, length: int | None = None) -> None:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)


def any_file(folder: Path, draw: random.Random) -> Path:
    files = [path for path in sorted(folder.glob("*.safetensors")) if path.is_file()]
    return draw.choice(files) if files else folder / COEFF_FILE


def change_bytes(folder: Path, draw: random.Random) -> None:
    file = any_file(folder, draw)
    content = bytearray(file.read_bytes() if file.is_file() else b"\0" * 8)
    reach = draw.choice([8, 200, 3000, len(content)])
    for _ in range(draw.choice([1, 1, 2, 5, 50])):
        at = draw.randrange(max(1, min(reach, len(content))))
        action = draw.randrange(4)
        if action == 0:
            content[at : at + 1] = bytes([draw.randrange(256)])
        elif action == 1:
            content[at : at + 1] = bytes([content[at] ^ 1 << draw.randrange(8)]) if at < len(content) else b""
        elif action == 2:
            content[at:at] = draw.randbytes(draw.choice([1, 8, 100]))
        else:
            del content[at : at + draw.choice([1, 8, 100])]
    file.write_bytes(content)


def cut_or_grow(folder: Path, draw: random.Random) -> None:
    file = any_file(folder, draw)
    content = file.read_bytes() if file.is_file() else b""
    at = draw.choice([0, 1, 7, 8, 9, len(content) // 2, len(content) - 1, draw.randrange(len(content) + 1)])
    grown = content + draw.randbytes(draw.choice([1, 4, 1000]))
    zeros = content[:at] + bytes(max(0, len(content) - at))
    file.write_bytes(draw.choice([content[:at], content[at:], grown, zeros, content + content]))


def change_length(folder: Path, draw: random.Random) -> None:
    file = any_file(folder, draw)
    content = file.read_bytes() if file.is_file() else b""
    own = int.from_bytes(content[:8], "little")
    lengths = [
        0,
        1,
        2,
        own - 1,
        own + 1,
        own + 8,
        len(content),
        len(content) - 8,
        2**31,
        2**40,
        2**63,
        2**64 - 1,
    ]
    lengths += [100_000_000, 100_000_001, 4 * 2**20 + 1]
    length = draw.choice(lengths) % 2**64
    if length < 2**27 and draw.random() < 0.3:  # and a file that really is so large, without taking the space
        file.write_bytes(struct.pack("<Q", length) + content[8:])
        os.truncate(file, length + 8)
    else:
        file.write_bytes(struct.pack("<Q", length) + content[8:])


def change_entry(folder: Path, draw: random.Random) -> None:
    """One tensor's dtype, shape, offsets or name in the container's header."""
    file = any_file(folder, draw)
    header, data = split(file) if file.is_file() else (None, b"")
    if not header:
        return
    name = draw.choice(sorted(header))
    entry = header[name]
    if not isinstance(entry, dict) or draw.random() < 0.1:
        header[name] = value(draw)
        join(file, header, data)
        return
    offsets, shape = entry.get("data_offsets", [0, 0]), entry.get("shape", [])
    what = draw.choice(["dtype", "shape", "offsets", "gone", "more", "renamed", "key", "swapped"])
    if what == "dtype":
        entry["dtype"] = draw.choice(DTYPES) if draw.random() < 0.8 else value(draw)
    elif what == "shape":
        shapes = [[], [-1], [0], [2**62, 2**62], [2**32, 2**32, 0], [1] * draw.choice([9, 65, 10_000])]
        entry["shape"] = draw.choice([*shapes, [*shape, 1], shape[::-1], [draw.choice(NUMBERS)], value(draw)])
    elif what == "offsets" and isinstance(offsets, list) and len(offsets) == 2:
        begin, end = (o if isinstance(o, int) else 0 for o in offsets)
        odd = [
            [begin - 8, end],
            [-8, 0],
            [end, begin],
            [begin, end + 4],
            [begin, end, end],
            [0, 0],
            [begin, 2**63],
        ]
        entry["data_offsets"] = draw.choice([*odd, [0.5, 1], value(draw)])
    elif what == "gone":
        del header[name]
    elif what == "more":
        header[draw.choice(TEXTS)] = {"dtype": "F32", "shape": [0], "data_offsets": [len(data), len(data)]}
    elif what == "renamed":
        header[draw.choice([*TEXTS, name + "x", name.upper()])] = header.pop(name)
    elif what == "key":
        entry[draw.choice(["dtype", "shape", "data_offsets", "extra"])] = value(draw)
    else:
        other = draw.choice(sorted(header))
        header[name], header[other] = header[other], header[name]
    join(file, header, data)


def change_container(folder: Path, draw: random.Random) -> None:
    """The container's header as a whole."""
    file = any_file(folder, draw)
    header, data = split(file) if file.is_file() else (None, b"")
    if not header:
        return
    text = json.dumps(header).encode()
    entry = b'{"dtype":"F32","shape":[0],"data_offsets":[0,0]}'
    many = draw.choice([1000, 100_000])
    odd = [
        lambda: b"{" + text[1:-1] + b"," + text[1:],  # every key twice
        lambda: b"[" * many,
        lambda: b'{"a":' * many + b"1" + b"}" * many,
        lambda: text + b" " * draw.choice([1, 7, 10**6, 5 * 2**20]),
        lambda: b" " + text,
        lambda: text.replace(b'"', b"'"),
        lambda: text[: len(text) // 2],
        lambda: text.replace(b"F32", b"F\xff2"),
        lambda: text.replace(b":", b":\x00", 1),
        lambda: b"{" + b",".join(b'"%d":%s' % (i, entry) for i in range(many)) + b"}",
        lambda: text[:-1] + b"," + b",".join(b'"%d":%s' % (i, entry) for i in range(many)) + b"}",
        lambda: b'{"__metadata__":{' + b",".join(b'"%d":""' % i for i in range(many)) + b"}," + text[1:],
        lambda: draw.randbytes(len(text)),
        lambda: b"",
        lambda: b"null",
    ]
    join(file, draw.choice(odd)(), data)


def change_own_header(folder: Path, draw: random.Random) -> None:
    """What the adapter says of itself: a field of another value or type, missing, or too many."""
    file = folder / COEFF_FILE
    header, data = split(file) if file.is_file() else (None, b"")
    metadata = header.get("__metadata__") if header else None
    if not isinstance(metadata, dict):
        return
    try:
        own = json.loads(metadata.get("coeffdiff", "{}"))
    except (ValueError, RecursionError, TypeError):
        own = {}
    own = own if isinstance(own, dict) else {}
    many = draw.choice([100, 10_000, 100_000])
    field = draw.choice([*sorted(AdapterHeader.model_fields), "another"])
    whole = draw.random()
    if whole < 0.7:
        nested = own.get(field)
        if isinstance(nested, dict) and nested and draw.random() < 0.6:
            key = draw.choice(sorted(nested))
            if draw.random() < 0.3:
                nested[draw.choice(TEXTS)] = nested.pop(key)
            else:
                nested[key] = value(draw)
        elif draw.random() < 0.2:
            own.pop(field, None)
        else:
            own[field] = value(draw)
        text = json.dumps(own)
    else:
        odd = [
            lambda: "[" * many,
            lambda: '{"heads":' * many,
            lambda: "[" + "{}," * many + "{}]",
            lambda: '{"kind":"coeff",' + json.dumps(own)[1:],
            lambda: json.dumps(own)[: draw.randrange(1, 200)],
            lambda: "1" * many,
            lambda: json.dumps(own | {"heads": {str(i): 1 for i in range(many)}}),
            lambda: json.dumps(own | {"templates": ["x"] * many}),
            lambda: json.dumps(own | {"versions": {"x" * 500: draw.choice(TEXTS)}}),
            lambda: json.dumps(own | {"token": draw.choice(TEXTS), "class_word": draw.choice(TEXTS)}),
            lambda: "",
            lambda: "NaN",
        ]
        text = draw.choice(odd)()
    metadata["coeffdiff"] = text if draw.random() < 0.97 else value(draw)
    join(file, header, data)


def change_numbers(folder: Path, draw: random.Random) -> None:
    """NaN, infinities and extremes among the tensors' numbers."""
    file = any_file(folder, draw)
    header, data = split(file) if file.is_file() else (None, b"")
    if not header or len(data) < 4:
        return
    content = bytearray(data)
    for _ in range(draw.choice([1, 10])):
        at = draw.randrange(len(content) // 4) * 4
        number = draw.choice([float("nan"), float("inf"), float("-inf"), 3e38, 1e-45, 0.0])
        content[at : at + 4] = struct.pack("<f", number)
    join(file, header, bytes(content))


def change_words(folder: Path, draw: random.Random) -> None:
    """Words and numbers that are allowed, however odd: most of these load."""
    file = folder / COEFF_FILE
    header, data = split(file) if file.is_file() else (None, b"")
    metadata = header.get("__metadata__") if header else None
    if not isinstance(metadata, dict) or not isinstance(metadata.get("coeffdiff"), str):
        return
    with contextlib.suppress(ValueError, RecursionError, TypeError):
        own = json.loads(metadata["coeffdiff"])
        words = [text for text in TEXTS if text.isprintable() and 0 < len(text) <= 200]
        for field in ("token", "class_word", "base_model"):
            own[field] = draw.choice(words)
        own["templates"] = draw.sample(words, 3)
        own["recommended_scale"] = draw.choice([0, 1, -1, 0.5, 1e30, 1e-30])
        own["trained_steps"] = draw.choice([0, 1, 10**9])
        metadata["coeffdiff"] = json.dumps(own)
        join(file, header, data)


def change_shapes(folder: Path, draw: random.Random) -> None:
    """A sound file whose tensors have other shapes, dtypes or places: of another model, rank or layer."""
    file = any_file(folder, draw)
    try:
        with safe_open(file, framework="pt") as opened:
            metadata, tensors = opened.metadata(), {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, RuntimeError, ValueError, TypeError, UnicodeError):
        return
    chosen = [name for name in sorted(tensors) if draw.random() < draw.choice([0.1, 1])]
    what = draw.randrange(7)
    for name in chosen:
        tensor = tensors[name]
        if what == 0:
            tensors[name] = tensor.t().contiguous() if tensor.dim() == 2 else tensor[:1]
        elif what == 1:
            tensors[name] = torch.cat([tensor, tensor])
        elif what == 2:
            tensors[name] = tensor.to(draw.choice([torch.float16, torch.bfloat16, torch.float64, torch.int8]))
        elif what == 3:
            tensors[name] = tensor[..., None]
        elif what == 4:
            tensors[name] = tensor.flatten()[:0]
        elif what == 5:
            tensors[name.replace("mid_block", draw.choice(["up_blocks.0", "mid_block.x", ""]))] = tensors.pop(
                name
            )
        else:
            tensors[name] = tensor * draw.choice([0.0, 1e30, -1.0])
    save_file(tensors, file, metadata)


def change_files(folder: Path, draw: random.Random) -> None:
    """Files that are missing, folders, links, pipes, or somebody else's."""
    name = draw.choice([COEFF_FILE, LORA_FILE])
    file = folder / name
    what = draw.randrange(8)
    others = sorted(path for path in folder.parent.parent.glob(f"shelf/*/{name}") if path.parent != folder)
    foreign = draw.choice(others).read_bytes() if others else b""
    if file.is_dir():
        return
    file.unlink(missing_ok=True)
    if what == 1:
        file.mkdir()
    elif what == 2:
        file.symlink_to(draw.choice([name, "nowhere", "/dev/zero", "/proc/self/mem", ".."]))
    elif what == 3:
        os.mkfifo(file)
    elif what == 4:
        file.write_bytes(
            draw.choice([b"", b"\x80\x04.", b"PK\x03\x04", b"<html>404</html>" * 50, bytes(10_000)])
        )
    elif what >= 5:
        file.write_bytes(foreign)


CHANGES: tuple[Callable[[Path, random.Random], None], ...] = (
    *(change_bytes, change_bytes, cut_or_grow, change_length, change_entry, change_entry, change_container),
    *(change_own_header, change_own_header, change_own_header, change_numbers, change_files),
    *(change_words, change_words, change_shapes, change_shapes),
)


# --- sound adapters, and what they become ------------------------------------------------------------------------

KINDS: dict[str, tuple[str, LoraHeader | None]] = {
    "coeff": ("coeff", None),
    "lora": ("lora", LoraHeader(rank=2, alpha=2)),
    "coeff+lora": ("coeff+lora", LoraHeader(rank=2, alpha=3)),
    "dora": ("coeff+lora", LoraHeader(rank=2, alpha=3, dora=True)),
}


def stock(shelf: Path, size: str) -> None:
    """One sound adapter of each kind, on a few layers of a model of this size: a load then takes little time."""
    pipe = build_pipeline(size)
    for name, (kind, lora) in KINDS.items():
        unet, heads = copy.deepcopy(pipe.unet), {}
        if lora:
            for key, p in add_lora(
                unet, rank=lora.rank, alpha=lora.alpha, dora=lora.dora, targets=["to_q"]
            ).items():
                p.data += 0.1 * torch.randn(p.shape, generator=generator_for(name, key))
        if "coeff" in kind:
            layers = inject(unet, blocks=["mid_block"])
            for key, c in layers.items():
                c.alpha.data += 0.1 * torch.randn(c.alpha.shape, generator=generator_for(name, key))
            heads = {key: c.heads for key, c in layers.items()}
        header = AdapterHeader(
            format_version=FORMAT_VERSION,
            kind=kind,  # type: ignore[arg-type]
            base_model=size,
            token="sks",
            class_word="mug",
            templates=("a photo of {token} {class_word}",),
            heads=heads,
            lora=lora,
            trained_steps=7,
            resolution=64,
            versions={"torch": str(torch.__version__)},
        )
        save_adapter(shelf / name, unet, header, {"README.md": b"# card"})


def make(shelf: Path, folder: Path, seed: int, number: int) -> str:
    """Input `number` of `seed`, written to `folder`; returns what was done to which adapter."""
    draw = random.Random(stable_seed("fuzz", seed, number))
    kind = draw.choice(sorted(KINDS))
    shutil.copytree(shelf / kind, folder)
    changes = [draw.choice(CHANGES) for _ in range(draw.choice([1, 1, 2, 3]))]
    changes.sort(
        key=lambda change: change is change_files
    )  # nothing here may write through a link it has made
    for change in changes:
        change(folder, draw)
    return f"{kind}: {', '.join(change.__name__ for change in changes)}"


def judge(pipe: Any, folder: Path) -> str:
    """Load it and say what came of it. Raises: whatever is not allowed."""
    try:
        adapter = load_adapter(pipe, folder)
    except AdapterError as error:
        sentence, outcome = str(error), type(error).__name__
        if not sentence.isprintable() or len(sentence) > LONGEST:
            raise AssertionError(f"a sentence of {len(sentence)} characters: {sentence[:500]!r}") from None
        if not re.search(r"\w", sentence):
            raise AssertionError(f"a sentence that says nothing: {sentence!r}") from None
    else:
        outcome = "loads"
        adapter.verify()
        adapter.remove()
    if loaded_adapters(pipe) or injected_names(pipe.unet) or getattr(pipe.unet, "peft_config", None):
        raise AssertionError("something stayed on the UNet")
    return outcome


# --- many of them, in a process that may die ---------------------------------------------------------------------


def work(shelf: Path, size: str, seed: int, first: int, last: int) -> None:
    """Judge inputs first to last - 1; one JSON line before each and one after it."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    pipe = build_pipeline(size)
    weights = {name: tensor.clone() for name, tensor in pipe.unet.state_dict().items()}
    for kind in KINDS:
        assert judge(pipe, shelf / kind) == "loads", kind
    limit = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize() + GROWTH
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    with tempfile.TemporaryDirectory() as place:
        for number in range(first, last):
            folder = Path(place) / "adapter"
            done = make(shelf, folder, seed, number)
            print(json.dumps({"number": number, "done": done}), flush=True)
            signal.setitimer(
                signal.ITIMER_PROF, SECONDS
            )  # either ends this process, and the one above notices
            signal.alarm(PATIENCE)
            try:
                outcome = {"outcome": judge(pipe, folder)}
            except Exception as error:
                problem = f"{type(error).__name__}: {error}"[:500]
                outcome = {"crash": problem, "trace": traceback.format_exc()[-3000:]}
                pipe = build_pipeline(size)
            signal.setitimer(signal.ITIMER_PROF, 0)
            signal.alarm(0)
            print(json.dumps({"number": number, "done": done, **outcome}), flush=True)
            shutil.rmtree(folder, ignore_errors=True)
    now = pipe.unet.state_dict()
    if now.keys() != weights.keys() or any(not torch.equal(now[name], weights[name]) for name in weights):
        print(
            json.dumps(
                {"number": last - 1, "done": "all", "crash": "the UNet's weights have changed", "trace": ""}
            )
        )


def results(shelf: Path, size: str, seed: int, first: int, last: int) -> Iterator[dict[str, Any]]:
    """One result for each input, from worker processes: a new one takes over behind an input that kills its own."""
    while first < last:
        command = [sys.executable, sys.argv[0], "--worker", str(shelf), "--size", size, "--seed", str(seed)]
        with subprocess.Popen(
            [*command, "--range", str(first), str(last)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        ) as process:
            assert process.stdout is not None and process.stderr is not None
            at: dict[str, Any] | None = None
            for line in process.stdout:
                said = json.loads(line)
                if "outcome" in said or "crash" in said:
                    first, at = said["number"] + 1, None
                    yield said
                else:
                    at = said
            complaint = process.stderr.read()[-3000:]
        if process.returncode == 0:
            return
        if at is None:  # it never came so far: a defect of this script or of the installation
            raise SystemExit(
                f"The worker ended with code {process.returncode} before its first input:\n{complaint}"
            )
        signal_name = signal.Signals(-process.returncode).name if process.returncode < 0 else "exit"
        yield at | {"crash": f"the process died ({signal_name} {process.returncode})", "trace": complaint}
        first = at["number"] + 1


def fuzz(count: int, size: str, seed: int, first: int = 0, workers: int = 1) -> dict[str, Any]:
    """Counts by outcome, and every crash."""
    begun = time.monotonic()
    outcomes: collections.Counter[str] = collections.Counter()
    by_change: collections.Counter[str] = collections.Counter()
    crashes = []
    with tempfile.TemporaryDirectory() as place:
        shelf = Path(place) / "shelf"
        warnings.simplefilter("ignore")
        stock(shelf, size)
        for result in together(shelf, size, seed, first, first + count, workers):
            outcomes[result.get("outcome", "crash")] += 1
            by_change.update(result["done"].partition(": ")[2].split(", "))
            if "crash" in result:
                crashes.append(result)
                again = f"--size {size} --seed {seed} --only {result['number']}"
                print(
                    f"crash    {result['crash']}\n         {result['done']}; again with {again}",
                    file=sys.stderr,
                )
            if sum(outcomes.values()) % 1000 == 0:
                print(f"{sum(outcomes.values())}/{count} {dict(outcomes)}", file=sys.stderr, flush=True)
    return {
        "seed": seed,
        "inputs": sum(outcomes.values()),
        "outcomes": dict(outcomes.most_common()),
        "changes": dict(by_change.most_common()),
        "crashes": sorted(crashes, key=lambda crash: crash["number"]),
        "seconds": round(time.monotonic() - begun, 1),
    }


def together(
    shelf: Path, size: str, seed: int, first: int, last: int, workers: int
) -> Iterator[dict[str, Any]]:
    """results() of several worker processes at a time, as they come."""
    found: queue.SimpleQueue[Any] = queue.SimpleQueue()

    def one(begin: int, end: int) -> None:
        try:
            for result in results(shelf, size, seed, begin, end):
                found.put(result)
            found.put(None)
        except BaseException as error:
            found.put(error)

    borders = [first + (last - first) * worker // workers for worker in range(workers + 1)]
    for begin, end in itertools.pairwise(borders):
        threading.Thread(target=one, args=(begin, end), daemon=True).start()
    at_work = workers
    while at_work:
        result = found.get()
        if isinstance(result, BaseException):
            raise result
        if result is None:
            at_work -= 1
        else:
            yield result


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--count", type=int, default=20_000)
    parser.add_argument("--size", choices=("micro", "tiny"), default="tiny", help="of the model")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=1, help="processes at a time")
    parser.add_argument("--only", type=int, metavar="N", help="input N alone, with its traceback")
    parser.add_argument("--json", action="store_true", help="the whole result on standard output")
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--range", type=int, nargs=2, help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.worker:
        work(chosen.worker, chosen.size, chosen.seed, *chosen.range)
        return 0
    only = chosen.only is not None
    workers = 1 if only else chosen.workers
    result = fuzz(1 if only else chosen.count, chosen.size, chosen.seed, chosen.only if only else 0, workers)
    if chosen.json:
        print(json.dumps(result))
    else:
        for outcome, number in result["outcomes"].items():
            print(f"{number:8,}  {outcome}")
        print(f"{result['inputs']:8,}  inputs of seed {chosen.seed} in {result['seconds']:.0f} s")
        for crash in result["crashes"] if only else ():
            print(f"{crash['done']}\n{crash['trace']}")
    return 1 if result["crashes"] else 0


if __name__ == "__main__":
    sys.exit(main())
