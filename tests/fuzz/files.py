"""Mutated checkpoint files: each is refused with a ValueError, or loads as what was saved.

``python -m tests.fuzz.files [--count N] [--seed S]`` runs N cases in processes of their own, each case within
5 seconds and 1 GB of memory beyond what the process has at its start. ``make fuzz-files`` runs 10,000.

Kinds of mutation, and whether the file's checksum is computed anew afterwards:

- bits, bytes, truncated, extended, spliced, header json, duplicate names, shapes, dtypes, offsets, version of
  an older file: it is not. What the checksum covers has changed, so only a refusal (or the unchanged file)
  is right.
- sealed manifest, sealed header, sealed tensors: it is. The file is intact by its checksum, so that what is
  tried are the checks behind it. Manifest and header must then be refused or change nothing; a tensor that
  was replaced by another of the same name, shape and dtype is a file of another model, and is not made here.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import multiprocessing
import random
import resource
import signal
import struct
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dynaprune.nn import BlockSparseLayer, swap_layers
from dynaprune.saving.checkpoint import load, save
from dynaprune.saving.manifest import structure_manifest
from dynaprune.saving.reshape import METADATA_KEY

SECONDS, MEMORY = 5.0, 2**30
_AT_A_TIME = 500
_DIGITS = slice(len('{"__metadata__":{"checksum":"sha256:'), len('{"__metadata__":{"checksum":"sha256:') + 64)


class Network(nn.Module):
    """Every kind of thing that a file describes: ragged blocks with and without bias, strided and depthwise
    convolutions, norms with and without tensors, tied weights, integers."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 12, 3, stride=2)
        self.depthwise = nn.Conv2d(12, 12, 3, groups=12)
        self.norm, self.plain_norm = nn.BatchNorm2d(12), nn.InstanceNorm2d(12)
        self.activation = nn.PReLU(12)
        self.wide = nn.Conv2d(12, 20, 3, bias=False)
        self.hidden = nn.Linear(20, 27, bias=False)
        self.embedding, self.decoder = nn.Embedding(9, 27), nn.Linear(27, 9, bias=False)
        self.decoder.weight = self.embedding.weight
        self.register_buffer("flags", torch.tensor([True, False, True]))

    def forward(self, x: Tensor) -> Tensor:
        x = self.activation(self.plain_norm(self.norm(self.depthwise(self.stem(x)))))
        return self.decoder(torch.relu(self.hidden(self.wide(x).mean((2, 3)))))


def network(seed: int, sparse: bool = True) -> Network:
    """A network with weights of its own; ``sparse`` with block-sparse layers of which a third is dead."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Network()
        if sparse:
            swap_layers(model, 8, include=["wide", "hidden"])
            for layer in model.modules():
                if isinstance(layer, BlockSparseLayer):
                    layer.layout.release_(torch.rand(layer.layout.mask.shape) < 1 / 3)
    return model


def content(model: nn.Module) -> tuple[str, dict[str, bytes]]:
    """Structure and state of a model as values that can be compared."""
    state = {
        key: f"{value.dtype}{list(value.shape)}".encode()
        + value.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        for key, value in model.state_dict().items()
    }
    return json.dumps(structure_manifest(model)), state


def parts(data: bytes) -> tuple[dict[str, Any], bytes]:
    """Header and body of a safetensors file."""
    (length,) = struct.unpack("<Q", data[:8])
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def joined(header: Any, body: bytes) -> bytes:
    """The file of a header (a JSON value, or its text) and a body."""
    text = header if isinstance(header, str) else json.dumps(header, separators=(",", ":"))
    encoded = text.encode(errors="surrogatepass")
    encoded += b" " * (-len(encoded) % 8)
    return struct.pack("<Q", len(encoded)) + encoded + body


def sealed(header: dict[str, Any], body: bytes) -> bytes:
    """The file with a checksum that agrees."""
    metadata = {"checksum": "sha256:" + "0" * 64}
    metadata.update({k: v for k, v in header.get("__metadata__", {}).items() if k != "checksum"})
    rest = {key: value for key, value in header.items() if key != "__metadata__"}
    data = bytearray(joined({"__metadata__": metadata, **rest}, body))
    digits = slice(8 + _DIGITS.start, 8 + _DIGITS.stop)
    data[digits] = hashlib.sha256(data).hexdigest().encode()
    return bytes(data)


_VALUES: list[Any] = [
    *(None, True, False, 0, 1, -1, 2, 7, 8, 1.0, 2.0, 0.5, float("nan"), float("inf")),
    *(2**31 - 1, 2**31, 2**40, 2**63, 2**64, 10**30, -(2**63), "", "1", "Linear", "BlockSparseLinear"),
    *("F32", "I32", "BOOL", [], [1], [8, 8], [0, 0], [[]], {}, {"out": 1}, "\ud800", "x" * 5000),
]


def _places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    if path:
        yield path
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        yield from _places(item, (*path, key))


def _changed(value: Any, draw: random.Random) -> Any:
    """The JSON value with one to three places replaced, removed, nudged, added to or renamed."""
    value = json.loads(json.dumps(value))
    for _ in range(draw.choice([1, 1, 1, 2, 3])):
        places = list(_places(value))
        if not places:
            return draw.choice(_VALUES)
        *way, last = draw.choice(places)
        holder = value
        for key in way:
            holder = holder[key]
        action = draw.choice(["replace", "replace", "remove", "nudge", "nudge", "rename", "add", "swap"])
        old = holder[last]
        if action == "remove":
            del holder[last]
        elif action == "nudge" and type(old) is int:
            holder[last] = old + draw.choice([-8, -1, 1, 1, 8])
        elif action == "rename" and isinstance(holder, dict):
            holder[draw.choice([*holder, "x", "", f"{last}x", str(last)[:-1]])] = holder.pop(last)
        elif action == "add" and isinstance(old, (dict, list)):
            if isinstance(old, dict):
                old[draw.choice(["x", "type", "block", "eval"])] = draw.choice(_VALUES)
            else:
                old.insert(draw.randint(0, len(old)), draw.choice(_VALUES))
        elif action == "swap" and isinstance(holder, dict):
            other = draw.choice(list(holder))
            holder[last], holder[other] = holder[other], holder[last]
        else:
            holder[last] = draw.choice(_VALUES)
    return value


def _tensors(header: dict[str, Any]) -> list[str]:
    return [key for key in header if key != "__metadata__"]


def _bits(data: bytes, draw: random.Random, _: bytes) -> bytes:
    changed = bytearray(data)
    (length,) = struct.unpack("<Q", data[:8])
    end = draw.choice([8, 8 + length, len(data), len(data)])
    for _ in range(draw.choice([1, 1, 1, 2, 16])):
        changed[draw.randrange(end)] ^= 1 << draw.randrange(8)
    return bytes(changed)


def _bytes(data: bytes, draw: random.Random, _: bytes) -> bytes:
    start = draw.randrange(len(data))
    count = draw.choice([1, 4, 64, 1000])
    middle = draw.choice([b"", bytes(count), draw.randbytes(count), data[:count]])
    return data[:start] + middle + data[start + count :]


def _truncated(data: bytes, draw: random.Random, _: bytes) -> bytes:
    return data[: draw.choice([0, 1, 7, 8, 9, len(data) - 1, len(data) - 4, draw.randrange(len(data))])]


def _extended(data: bytes, draw: random.Random, _: bytes) -> bytes:
    return data + draw.choice([b"\0", draw.randbytes(4), draw.randbytes(1000), data, bytes(2**20)])


def _spliced(data: bytes, draw: random.Random, other: bytes) -> bytes:
    (mine, body), (theirs, their_body) = parts(data), parts(other)
    if draw.random() < 0.5:
        return joined(theirs, body) if draw.random() < 0.5 else joined(mine, their_body)
    at = draw.randrange(len(body))
    return joined(mine, body[:at] + their_body[at:])


def _header_json(data: bytes, draw: random.Random, _: bytes) -> bytes:
    header, body = parts(data)
    return joined(_changed(header, draw), body)


def _duplicate_names(data: bytes, draw: random.Random, _: bytes) -> bytes:
    header, body = parts(data)
    key = draw.choice(list(header))
    twice = json.dumps(draw.choice([header[key], header[draw.choice(list(header))]]))
    return joined(json.dumps(header)[:-1] + f", {json.dumps(key)}: {twice}" + "}", body)


def _shapes(data: bytes, draw: random.Random, _: bytes) -> bytes:
    header, body = parts(data)
    entry = header[draw.choice(_tensors(header))]
    size = draw.choice([0, 1, 2**20, 2**31, 2**40, 2**62, 2**63, 2**64, -1, 1e9, True, "8", None])
    entry["shape"] = draw.choice([[size], [size, size], [size] * 40, [0, size], entry["shape"][::-1], []])
    if draw.random() < 0.3:
        entry["data_offsets"] = [0, draw.choice([size, 2**63 - 1])]
    return joined(header, body)


def _dtypes(data: bytes, draw: random.Random, _: bytes) -> bytes:
    header, body = parts(data)
    entry = header[draw.choice(_tensors(header))]
    entry["dtype"] = draw.choice(
        ["F32", "F64", "F16", "I32", "U32", "I64", "U8", "BOOL", "C64", "x", 1, None]
    )
    return joined(header, body)


def _offsets(data: bytes, draw: random.Random, _: bytes) -> bytes:
    header, body = parts(data)
    first, second = (header[draw.choice(_tensors(header))] for _ in range(2))
    start, stop = first["data_offsets"]
    choice = draw.randrange(5)
    if choice == 0:
        first["data_offsets"], second["data_offsets"] = second["data_offsets"], first["data_offsets"]
    elif choice == 1:
        first["data_offsets"] = [start + 4, stop + 4]
    elif choice == 2:
        first["data_offsets"] = [stop, start]
    elif choice == 3:
        first["data_offsets"] = second["data_offsets"]
    else:
        first["data_offsets"] = [start, draw.choice([len(body), 2**40, -1, 2**63, 1.5, None])]
    return joined(header, body)


def _older_version(data: bytes, draw: random.Random, _: bytes) -> bytes:
    """Without the checksum, as files were before there was one, and then damaged or not."""
    header, body = parts(data)
    manifest = json.loads(header["__metadata__"][METADATA_KEY])
    del header["__metadata__"]["checksum"]
    for key in draw.sample(["file", "weights"], draw.randrange(3)):
        del manifest[key]
    header["__metadata__"][METADATA_KEY] = json.dumps(manifest)
    return joined(header, body)


def _sealed_manifest(data: bytes, draw: random.Random, _: bytes) -> bytes:
    header, body = parts(data)
    manifest = json.loads(header["__metadata__"][METADATA_KEY])
    if draw.random() < 0.5:
        layer = draw.choice(list(manifest["layers"]))
        manifest["layers"][layer] = _changed(manifest["layers"][layer], draw)
    else:
        manifest = _changed(manifest, draw)
    text = json.dumps(manifest)
    if draw.random() < 0.1:
        text = draw.choice(["", "{", "[" * 100_000, "null", text[:-1], text + "}", '{"layers":1,' + text[1:]])
    header["__metadata__"][METADATA_KEY] = text
    return sealed(header, body)


def _sealed_header(data: bytes, draw: random.Random, other: bytes) -> bytes:
    change = draw.choice([_header_json, _shapes, _dtypes, _offsets])
    try:
        header, body = parts(change(data, draw, other))
        if not isinstance(header, dict) or not isinstance(header.get("__metadata__"), dict):
            return data
        before, after = parts(data)[0], header
        # Two tensors of one shape and dtype that change places make a file of another model.
        if sorted(map(str, before.values())) == sorted(map(str, after.values())) or _same_tensors(
            before, after
        ):
            return data
        return sealed(header, body)
    except (ValueError, TypeError, UnicodeError):
        return data


def _same_tensors(before: dict[str, Any], after: dict[str, Any]) -> bool:
    """Whether all names have the shapes and dtypes that they had, at other places."""

    def kinds(header: dict[str, Any]) -> Any:
        tensors = {key: header[key] for key in header if key != "__metadata__"}
        if not all(isinstance(each, dict) for each in tensors.values()):
            return None
        return {key: (str(each.get("dtype")), str(each.get("shape"))) for key, each in tensors.items()}

    return kinds(before) == kinds(after)


def _sealed_tensors(data: bytes, draw: random.Random, _: bytes) -> bytes:
    """A tensor left out, or one more, or one with another name."""
    header, body = parts(data)
    key = draw.choice(_tensors(header))
    choice = draw.randrange(3)
    if choice == 0:
        header["more"] = {"dtype": "U8", "shape": [4], "data_offsets": [len(body), len(body) + 4]}
        body += bytes(4)
    elif choice == 1:
        start, stop = header.pop(key)["data_offsets"]
        body = body[:start] + body[stop:]
        for name in _tensors(header):
            offsets = header[name]["data_offsets"]
            if offsets[0] >= stop:
                header[name]["data_offsets"] = [offsets[0] - stop + start, offsets[1] - stop + start]
    else:
        header[draw.choice(["", "x", f"{key}.values", key.upper()])] = header.pop(key)
    return sealed(header, body)


KINDS: dict[str, Callable[[bytes, random.Random, bytes], bytes]] = {
    "bits": _bits,
    "bytes": _bytes,
    "truncated": _truncated,
    "extended": _extended,
    "spliced": _spliced,
    "header json": _header_json,
    "duplicate names": _duplicate_names,
    "shapes": _shapes,
    "dtypes": _dtypes,
    "offsets": _offsets,
    "older version": _older_version,
    "sealed manifest": _sealed_manifest,
    "sealed header": _sealed_header,
    "sealed tensors": _sealed_tensors,
}


# Without a checksum, or with one that was computed anew.
_MAY_BE_EQUAL = ("older version", "sealed manifest", "sealed header", "sealed tensors")


class TooLong(Exception):
    """A case took more than its time."""


def _ring(*_: Any) -> None:
    raise TooLong


def run_cases(seed: int, numbers: range, folder: Path) -> Iterator[tuple[int, str, str]]:
    """``(number, kind, outcome)`` of each case. "refused", "equal" and "unchanged" (the mutation left every
    byte as it was) are right, anything else is a fault.

    The models that are loaded into: one of the file's structure, one dense; they are used again as long as
    an error leaves them as they were.
    """
    path = folder / "case.safetensors"
    data = save(network(1), folder / "one.safetensors").read_bytes()
    other = save(network(2), folder / "two.safetensors").read_bytes()
    right = content(load(network(3), folder / "one.safetensors"))
    targets = [network(3), network(3, sparse=False)]
    before = [content(target) for target in targets]
    names = list(KINDS)
    for number in numbers:
        draw = random.Random(f"{seed}/{number}")
        kind = names[number % len(names)]
        changed = KINDS[kind](data, draw, other)
        path.write_bytes(changed)
        which = draw.randrange(2)
        started = time.perf_counter()
        try:
            load(targets[which], path)
            outcome = "equal" if content(targets[which]) == right else "CHANGED in silence"
            if outcome == "equal" and changed == data:
                outcome = "unchanged"
            elif outcome == "equal" and kind not in _MAY_BE_EQUAL:
                outcome = "loaded WITHOUT A WORD although bytes that the checksum covers had changed"
            targets[which] = network(3, sparse=which == 0)
        except ValueError as error:
            outcome = "refused" if str(error) else "refused WITHOUT A WORD"
            if content(targets[which]) != before[which]:
                outcome = f"the model is NOT AS IT WAS after: {error}"
                targets[which] = network(3, sparse=which == 0)
        except BaseException as error:
            outcome = f"{type(error).__name__}: {str(error)[:200]}"
            targets[which] = network(3, sparse=which == 0)
        if time.perf_counter() - started > SECONDS:
            outcome = f"took {time.perf_counter() - started:.1f} s"
        yield number, kind, outcome


def _work(seed: int, numbers: range, folder: Path, results: Any) -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    signal.signal(signal.SIGALRM, _ring)
    held = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (held + MEMORY, held + MEMORY))
    for case in run_cases(seed, numbers, folder):
        signal.setitimer(signal.ITIMER_REAL, SECONDS)  # for the next case
        results.send(case)
    signal.setitimer(signal.ITIMER_REAL, 0)


def fuzz(count: int, seed: int) -> tuple[Counter[tuple[str, str]], list[str]]:
    """Outcomes by kind, and what went wrong, each with the number that makes the case again."""
    outcomes: Counter[tuple[str, str]] = Counter()
    faults: list[str] = []
    context = multiprocessing.get_context("spawn")
    start = 0
    while start < count:
        numbers = range(start, min(start + _AT_A_TIME, count))
        with tempfile.TemporaryDirectory() as folder:
            mine, theirs = context.Pipe(duplex=False)
            process = context.Process(target=_work, args=(seed, numbers, Path(folder), theirs))
            process.start()
            theirs.close()
            start = numbers.start
            while mine.poll(120 if start == numbers.start else 4 * SECONDS):
                try:
                    number, kind, outcome = mine.recv()
                except EOFError:
                    break
                start = number + 1
                right = outcome in ("refused", "equal", "unchanged")
                outcomes[kind, outcome if right else "FAULT"] += 1
                if not right:
                    faults.append(f"case {number} of seed {seed} ({kind}): {outcome}")
            process.join(1)
            if start < numbers.stop:
                faults.append(f"case {start} of seed {seed}: the process ended with {process.exitcode}")
                start += 1
                process.kill()
                process.join()
    return outcomes, faults


def main() -> int:
    """Run the cases, print a table of outcomes by kind; the exit code says whether one was a fault."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--count", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    outcomes, faults = fuzz(given.count, given.seed)
    print(f"{given.count} mutated checkpoint files, seed {given.seed}")
    for kind in KINDS:
        found = {outcome: n for (k, outcome), n in sorted(outcomes.items()) if k == kind}
        print(f"  {kind:<16} {', '.join(f'{outcome} {n}' for outcome, n in found.items())}")
    for fault in faults[:50]:
        print(fault)
    print(f"{len(faults)} faults")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
