"""Damages DICOM files and sends them through the decoder and `medsiglip-jax embed`.

    python scripts/fuzz_dicom.py                 # 2,000 files, minutes
    python scripts/fuzz_dicom.py --count 60 --json

The files are those of pydicom's wheel, which cover every transfer syntax. The exit code is 1 unless
every file is embedded or listed in errors.parquet, no file takes 30 s of CPU time, no process takes
2 GiB, and only the command itself prints anything.
"""

import argparse
import collections
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
import zlib
from pathlib import Path

import measure
import numpy as np

SECONDS, GIB = 30, 2.0  # of CPU time, of one file; of a process


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--count", type=int, default=2000, help="files, default 2000")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--keep", metavar="DIR", help="leave the files there; default nowhere")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--decode", metavar="DIR", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.decode:
        print(json.dumps(decode_all(Path(args.decode))))
        return 0
    with tempfile.TemporaryDirectory() as scratch:
        files = Path(args.keep or scratch) / "files"
        write(files, args.count, args.seed)
        report = judged(files, Path(scratch))
    print(json.dumps(report, indent=2) if args.json else text(report))
    return 1 if report["wrong"] else 0


# -------------------------------------------------------------------------------- damaged files


def write(folder: Path, count: int, seed: int) -> None:
    """Writes damaged files, equally many of every original and every kind of damage."""
    folder.mkdir(parents=True)
    rng, files, kinds = np.random.default_rng(seed), originals(), list(KINDS.items())
    for i in range(count):
        kind, damage = kinds[i % len(kinds)]
        data = damage(rng, files[rng.integers(len(files))])
        (folder / f"{i:05d}-{kind}.dcm").write_bytes(data)


def originals() -> list[bytes]:
    """pydicom's files that can be read and are not large."""
    import pydicom

    from medsiglip_jax.preprocess.decode import decode
    from medsiglip_jax.preprocess.facts import UnreadableImage

    found = []
    for path in sorted((Path(pydicom.__file__).parent / "data" / "test_files").glob("*.dcm")):
        if path.stat().st_size > 1 << 20:
            continue
        try:
            decode(path)
        except UnreadableImage:
            continue
        found.append(path.read_bytes())
    return found


def bits(rng, data: bytes) -> bytes:
    """Flips a few bits anywhere."""
    out = bytearray(data)
    for _ in range(rng.integers(1, 30)):
        out[rng.integers(132, len(out))] ^= 1 << rng.integers(8)
    return bytes(out)


def cut(rng, data: bytes) -> bytes:
    return data[: rng.integers(132, len(data))]


# Group 0028: samples, frames, rows, columns, bits, sign; and those of windows and rescale.
_NUMBERS = (0x02, 0x08, 0x10, 0x11, 0x100, 0x101, 0x102, 0x103, 0x1050, 0x1051, 0x1052, 0x1053)


def numbers(rng, data: bytes) -> bytes:
    """Changes the numbers that describe the image: huge, zero, or random."""
    out = bytearray(data)
    for element in rng.choice(_NUMBERS, 4, replace=False).tolist():
        at = data.find(b"\x28\x00" + element.to_bytes(2, "little"))
        if 132 < at < len(data) - 10:
            binary = element not in (0x08, 0x1050, 0x1051, 0x1052, 0x1053)
            values = [b"\xff\xff", b"\0\0", rng.bytes(2)] if binary else [b"99", b"-1", b"1E"]
            out[at + 8 : at + 10] = values[rng.integers(3)]
    return bytes(out)


def lengths(rng, data: bytes) -> bytes:
    """Changes lengths of elements: wrong, huge, undefined."""
    out = bytearray(data)
    for _ in range(3):
        group = (b"\x28\x00", b"\x08\x00", b"\xe0\x7f", b"\x02\x00")[rng.integers(4)]
        at = data.find(group, int(rng.integers(132, len(data))))
        if 0 < at < len(data) - 12:
            size = 2 if rng.random() < 0.7 else 6
            end = at + 6 + size
            out[at + 6 : end] = b"\xff" * size if rng.random() < 0.3 else rng.bytes(size)
    return bytes(out)


def stream(rng, data: bytes) -> bytes:
    """Changes the second half, where the compressed frames are."""
    out = bytearray(data)
    for _ in range(rng.integers(1, 12)):
        out[rng.integers(len(out) // 2, len(out))] = rng.integers(256)
    return bytes(out)


# Of undefined length: a VOI LUT sequence; and an item, before its length.
SEQUENCE, ITEM = b"\x28\x00\x10\x30SQ\0\0\xff\xff\xff\xff", b"\xfe\xff\x00\xe0"


def inserted(rng, data: bytes) -> bytes:
    """Inserts random bytes, or nested sequences."""
    at = int(rng.integers(132, len(data)))
    nested, empty = (SEQUENCE + ITEM + b"\xff" * 4) * 2000, SEQUENCE + (ITEM + bytes(4)) * 20000
    rubbish = [rng.bytes(int(rng.integers(1, 300))), bytes(4000), nested, empty]
    return data[:at] + rubbish[rng.integers(len(rubbish))] + data[at:]


def bomb(rng, data: bytes) -> bytes:
    """Deflates the file, with up to a gigabyte of one byte after it or in its place."""
    from medsiglip_jax.preprocess.dicom import sniff

    packer, start = zlib.compressobj(1, zlib.DEFLATED, -15), sniff.transfer_syntax(data)[1]
    out = packer.compress(data[start:]) if rng.random() < 0.5 else b""
    empty = (SEQUENCE + (ITEM + bytes(4)) * 4096) * 32
    piece = (bytes(1 << 20), b"\x08\x00\x18\x00UI\0\0" * (1 << 17), empty)[rng.integers(3)]
    for _ in range(int(rng.choice([20, 100, 200, 300, 1000]))):
        out += packer.compress(piece)
    return DEFLATED_META + out + packer.flush()


# Preamble, and a file meta information that names the deflated syntax.
DEFLATED_META = bytes(128) + b"DICM\x02\x00\x10\x00UI\x16\x001.2.840.10008.1.2.1.99"

KINDS = {f.__name__: f for f in (bits, cut, numbers, lengths, stream, inserted, bomb)}


# ----------------------------------------------------------------------------------- the verdict


def decode_all(folder: Path) -> dict:
    """Decodes by both rules: outcomes ("" for pixels), and CPU seconds of the slowest file.

    A file that takes longer than `SECONDS` ends the process with a traceback.
    """
    from medsiglip_jax.preprocess.decode import decode_with_facts
    from medsiglip_jax.preprocess.dicom.rules import Rules
    from medsiglip_jax.preprocess.facts import UnreadableImage

    outcomes: dict[str, dict[str, str]] = {"dicom": {}, "official": {}}
    slowest, start = (0.0, ""), time.perf_counter()
    for path in sorted(folder.iterdir()):
        data, begun = path.read_bytes(), time.process_time()
        with measure.cpu_limit(SECONDS):
            for name, found in outcomes.items():
                try:
                    image, _ = decode_with_facts(data, rules=Rules(name))
                    found[path.name] = ""
                    assert image.dtype == np.uint8 and image.shape[2] == 3
                except UnreadableImage as error:
                    found[path.name] = error.reason
        slowest = max(slowest, (round(time.process_time() - begun, 2), path.name))
    seconds = round(time.perf_counter() - start, 1)
    return {"outcomes": outcomes, "slowest": slowest, "seconds": seconds}


def measured(command: list[str]) -> dict:
    """Runs a command: its output, exit code, seconds and peak memory."""
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        start = time.perf_counter()
        root = str(Path(__file__).resolve().parents[1])
        places = os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])])
        child = subprocess.Popen(
            command, stdout=out, stderr=err, env={**os.environ, "PYTHONPATH": places}
        )
        _, status, used = os.wait4(child.pid, 0)
        child.returncode = os.waitstatus_to_exitcode(status)
        seconds = time.perf_counter() - start
        printed = []
        for file in (out, err):
            file.seek(0)
            printed.append(file.read().decode("utf-8", "replace"))
    return {
        "code": child.returncode, "out": printed[0], "err": printed[1],
        "seconds": round(seconds, 1), "peak_gib": round(used.ru_maxrss / 2**20, 2),
    }  # fmt: skip


def judged(files: Path, scratch: Path) -> dict:
    """Counts the outcomes, and lists what is wrong with them."""
    decoded = measured([sys.executable, __file__, "--decode", str(files)])
    if decoded["code"] != 0:
        return {"wrong": [f"the decoder ended with {decoded['code']}: {decoded['err'][-2000:]}"]}
    found = json.loads(decoded["out"])
    embedded, errors = embed(files, scratch)
    outcomes = found["outcomes"]
    refused = {name: why for name, why in outcomes["dicom"].items() if why}
    wrong = [f"somebody said: {decoded['err'][:500]}"] if decoded["err"] else []
    wrong += [f"a process took {x['peak_gib']} GiB" for x in (decoded, embedded)
              if x["peak_gib"] >= GIB]  # fmt: skip
    if embedded["code"] != (3 if refused else 0):
        wrong.append(f"embed ended with {embedded['code']}: {embedded['err'][-2000:]}")
    if errors != refused:
        wrong.append(f"errors.parquet differs: {sorted(errors.items() ^ refused.items())[:4]}")
    wrong += [f"a reason of {len(why)} characters: {name}" for one in outcomes.values()
              for name, why in one.items() if len(why) > 300 or "\n" in why]  # fmt: skip
    return {
        "files": len(outcomes["dicom"]),
        "pixels": {rules: sum(not why for why in one.values()) for rules, one in outcomes.items()},
        "refused": len(refused),
        "kinds": _by_kind(outcomes["dicom"]),
        "reasons": dict(collections.Counter(map(_general, refused.values())).most_common(12)),
        "slowest file, CPU seconds": found["slowest"],
        "decoder": {"seconds": found["seconds"], "peak_gib": decoded["peak_gib"]},
        "embed": {"seconds": embedded["seconds"], "peak_gib": embedded["peak_gib"]},
        "wrong": wrong,
    }


def embed(files: Path, scratch: Path) -> tuple[dict, dict[str, str]]:
    """Runs the command with a small model: its outcome, and the rows of errors.parquet."""
    import pyarrow.parquet as pq

    import medsiglip_jax

    medsiglip_jax.save(medsiglip_jax.init("tiny-56"), scratch / "model")
    run = "import sys; from medsiglip_jax import cli; sys.exit(cli.main(sys.argv[1:]))"
    command = [sys.executable, "-c", run, "embed", "--model", str(scratch / "model"), "--output"]
    done = measured([*command, str(scratch / "out"), str(files)])
    path = scratch / "out" / "errors.parquet"
    rows = pq.read_table(path).to_pylist() if path.is_file() else []
    return done, {Path(row["source"]).name: row["reason"] for row in rows}


def _by_kind(outcomes: dict[str, str]) -> dict[str, str]:
    counts: dict[str, list[bool]] = {}
    for name, why in outcomes.items():
        counts.setdefault(Path(name).stem.partition("-")[2], []).append(bool(why))
    return {kind: f"{sum(refused)} of {len(refused)} refused" for kind, refused in counts.items()}


def _general(reason: str) -> str:
    """An error message without its numbers."""
    return "".join("#" if c.isdigit() else c for c in reason)


def text(report: dict) -> str:
    lines = []
    for name, value in report.items():
        if name == "wrong":
            continue
        lines.append(name if isinstance(value, dict) else f"{name}: {value}")
        lines += [f"  {k}: {v}" for k, v in value.items()] if isinstance(value, dict) else []
    return "\n".join([*lines, *(f"WRONG: {line}" for line in report["wrong"])])


if __name__ == "__main__":
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    sys.exit(main())
