"""Sends hostile files and tables through every reader, in processes of 4 GB of address space.

    python scripts/fuzz_inputs.py                 # 1,000 files, twenty minutes
    python scripts/fuzz_inputs.py --count 60 --json

Images, volumes, slides, shards, lists and tables are damaged, claim sizes that they do not have, or
hold cells that are no names. All have planted words in them. Each is drawn by `preview`, or listed
as `embed` lists it, in a process that reads a few of them and says which one it is at. The exit
code is 1 if a process ends, raises, says nothing of a file that cannot be read, says more than a
line on an error, or quotes a planted word.
"""

import argparse
import collections
import contextlib
import io
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "scripts")]

import measure  # noqa: E402
import planted_files  # noqa: E402
import worst_images  # noqa: E402

Rng = np.random.Generator
LIMIT = 4 << 30  # bytes of address space of a process
PER_PROCESS, SECONDS = 50, 90  # files; of CPU time, of a file
WORDS = [f"Wolpertinger{n:03d}" for n in range(100)]
LEFT_OUT = ("rgb.avif", "lossless.webp", "lossy.webp", "alpha.webp", "jxl.dcm", "j2k.dcm")


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--count", type=int, default=1000, help="files, default %(default)s")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--child", nargs="+", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        return read_all(args.child)
    with tempfile.TemporaryDirectory() as scratch:
        report = judged(Path(scratch), args.count, args.seed)
    print(json.dumps(report, indent=2) if args.json else text(report))
    return 1 if report["wrong"] else 0


def judged(scratch: Path, count: int, seed: int) -> dict:
    """Writes the files, some at a time, and reads them."""
    found: list[dict] = []
    numbers, makers = range(count), list(KINDS.items())
    for start in range(0, count, PER_PROCESS):
        folder = scratch / "in"
        folder.mkdir()
        paths = []
        for i in numbers[start : start + PER_PROCESS]:
            kind, make = makers[i % len(makers)]
            name, data = make(np.random.default_rng([seed, i]), i // len(makers))
            below = folder / f"{i:04d}-{kind}"
            below.mkdir()
            (below / name).write_bytes(data)
            paths.append(str(below / name))
        found += measured(paths)
        wrong = [f"{row['file']}: {row['wrong']}" for row in found[start:] if row["wrong"]]
        print(f"{len(found)} of {count}", *wrong, sep="\n", file=sys.stderr, flush=True)
        for path in sorted(folder.rglob("*"), reverse=True):
            path.rmdir() if path.is_dir() and not path.is_symlink() else path.unlink()
        folder.rmdir()
    return report(found)


def report(found: list[dict]) -> dict:
    by_kind = collections.defaultdict(list)
    for row in found:
        by_kind[row["kind"]].append(row)
    kinds = {
        kind: {
            "files": len(rows), "read": sum(row["code"] == 0 for row in rows),
            "gib": max(row["gib"] for row in rows), "seconds": max(row["seconds"] for row in rows),
        }
        for kind, rows in by_kind.items()
    }  # fmt: skip
    slowest = max(found, key=lambda row: row["seconds"])
    return {
        "files": len(found), "kinds": kinds,
        "peak GiB": max(row["gib"] for row in found),
        "slowest": {key: slowest[key] for key in ("file", "seconds", "said")},
        "wrong": [f"{row['file']}: {row['wrong']}" for row in found if row["wrong"]],
    }  # fmt: skip


def measured(paths: list[str]) -> list[dict]:
    """What a process says of each; the one it was at is named where it ends."""
    rows = []
    while paths:
        command = [sys.executable, __file__, "--child", *paths]
        places = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
        child = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            env={**os.environ, "PYTHONPATH": places},
        )  # fmt: skip
        out, err = child.communicate()
        done = [json.loads(line) for line in out.splitlines() if line.startswith("{")]
        rows += done
        paths = paths[len(done) :]
        if paths:
            why = f"the process ended with {child.returncode}: {err.strip()[-300:]}"
            rows.append(row_of(paths[0], -1, "", why))
            paths = paths[1:]
    return rows


def row_of(path: str, code: int, said: str, wrong: str, seconds=0.0, gib=0.0) -> dict:
    place = Path(path).parent.name
    return {
        "file": f"{place}/{Path(path).name}"[:120], "kind": place.partition("-")[2], "code": code,
        "said": said[:200], "wrong": wrong, "seconds": seconds, "gib": gib,
    }  # fmt: skip


def text(report: dict) -> str:
    lines = [f"{'kind':16} files  read  peak GiB  slowest s"]
    lines += [
        f"{kind:16} {row['files']:5} {row['read']:5} {row['gib']:9.2f} {row['seconds']:10.1f}"
        for kind, row in report["kinds"].items()
    ]
    slowest = report["slowest"]
    lines += [f"{report['files']} files, at most {report['peak GiB']} GiB",
              f"slowest: {slowest['file']}, {slowest['seconds']} s: {slowest['said']}"]  # fmt: skip
    return "\n".join([*lines, *(f"WRONG {line}" for line in report["wrong"])])


# ------------------------------------------------------------------------------------ in a process


def read_all(paths: list[str]) -> int:
    import medsiglip_jax.inference.preview  # noqa: F401, before there is a limit

    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_AS, (LIMIT, LIMIT))
    for path in paths:
        start = time.process_time()
        with measure.cpu_limit(SECONDS):
            code, said, wrong = outcome(path)
        seconds = round(time.process_time() - start, 1)
        row = row_of(path, code, said, wrong, seconds, peak())
        print(json.dumps(row, ensure_ascii=True), flush=True)
    return 0


def peak() -> float:
    """GiB since the last call."""
    status = Path("/proc/self/status").read_text()
    gib = round(int(status.partition("VmHWM:")[2].split()[0]) / 2**20, 2)
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
    return gib


def outcome(path: str) -> tuple[int, str, str]:
    """The exit code of `preview`, what it said, and what is wrong with it."""
    from medsiglip_jax import cli

    out, err, page = io.StringIO(), io.StringIO(), Path(path).parent / "page.html"
    flags = ["--output", str(page), "--volume", "percentile", "--size", "56", "--limit", "8"]
    flags += ["--mpp", "20", "--tissue", "0"] if path.endswith((".svs", ".mrxs", ".vms")) else []
    flags += ["--frame", "all"] if "frames" in path else []
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            with warnings.catch_warnings():
                warnings.simplefilter("default")
                code = cli.main(["preview", path, *flags])
            listed = texts_of(path)
    except BaseException:
        last = traceback.format_exc().strip().splitlines()
        return -1, "", f"raises {last[-1][:200]} ({' '.join(last[-4:-1])[:300]})"
    drawn = page.read_text() if page.exists() else ""
    page.unlink(missing_ok=True)
    said = out.getvalue() + err.getvalue() + listed
    wrong = judge(code, err.getvalue(), said)
    if any(word.lower() in (said + drawn).lower() for word in WORDS):
        wrong.append(f"quotes a planted word: {said[:300]}")
    first = next(iter((err.getvalue() if code == 2 else out.getvalue()).splitlines()), "")
    return code, first.replace(path, "FILE"), "; ".join(wrong)


def judge(code: int, err: str, said: str) -> list[str]:
    wrong = []
    errors = [line for line in err.splitlines() if line.startswith("medsiglip-jax")]
    if code not in (0, 2, 3):
        wrong.append(f"exit code {code}: {err.strip()[-300:]}")
    if code == 2 and len(errors) != 1:
        wrong.append(f"{len(errors)} lines: {err.strip()[:300]}")
    if "Traceback" in err:
        wrong.append("a traceback")
    if len(said) > 20_000:
        wrong.append(f"{len(said)} characters are said")
    return wrong


def texts_of(path: str) -> str:
    """Lists the texts too, which `preview` leaves out; "" or the error."""
    from medsiglip_jax.data import inputs

    if not path.endswith((".csv", ".gz", ".tsv", ".jsonl", ".parquet", ".txt", ".tar")):
        return ""
    try:
        return " ".join(filter(None, inputs.rows([path]).reasons))
    except (ValueError, OSError) as error:
        return str(error)


# ---------------------------------------------------------------------------------- hostile files


Made = tuple[str, bytes]
Maker = Callable[[Rng, int], Made]


def damaged_image(rng: Rng, turn: int) -> Made:
    """Of every format in turn."""
    originals = planted_files.files(WORDS[turn % 100])
    name = list(originals)[turn % len(originals)]
    return name, planted_files.damaged(rng, originals[name])


def broken_image(rng: Rng, turn: int) -> Made:
    broken = planted_files.broken(WORDS[turn % 100])
    name = list(broken)[turn % len(broken)]
    data = broken[name]
    return name, data if turn < len(broken) else planted_files.damaged(rng, data)


def damaged_dicom(rng: Rng, turn: int) -> Made:
    import fuzz_dicom

    damage = list(fuzz_dicom.KINDS.values())[turn % len(fuzz_dicom.KINDS)]
    return "frames.dcm", damage(rng, planted_files.dicom(WORDS[turn % 100]))


def bomb(rng: Rng, turn: int) -> Made:
    names = [name for name in worst_images.WORST if name not in LEFT_OUT]
    name = names[(turn * 7) % len(names)]
    return name.partition("#")[0], worst_images.WORST[name]()


def lying_size(rng: Rng, turn: int) -> Made:
    """An image whose width or height, wherever it is, is another."""
    originals = planted_files.files(WORDS[turn % 100])
    name = list(originals)[turn % len(originals)]
    data = bytearray(originals[name])
    value = int(rng.choice([0, 1, 33, 65_535, 65_500, 13_000, 1 << 20, (1 << 31) - 1, 0xFFFFFFFF]))
    for code, size in (("<", 4), (">", 4), ("<", 2), (">", 2)):
        order = "little" if code == "<" else "big"
        at = data.find((32).to_bytes(size, order), int(rng.integers(1, 3)))
        if at >= 0 and value < 1 << 8 * size:
            data[at : at + size] = value.to_bytes(size, order)
            break
    return name, bytes(data)


def special(rng: Rng, turn: int) -> Made:
    word, image = WORDS[turn % 100], planted_files.png(WORDS[turn % 100])
    files = [
        ("empty.png", b""), ("a\nb\x1b[31m.png", image), ("\u202egnp.exe.png", image[:99]),
        ("dots..png", image), ("#frame=3.png", image), ("x#0:5.png", image), ("x.png#0:5", image),
        ("name" * 60 + ".png", image), ("DICOMDIR", image), ("a.hdr", word.encode() * 99),
        ("a.img", word.encode() * 99), ("%s{0}.png", image), ("-rf.png", image), ("*.png", image),
    ]  # fmt: skip
    return files[turn % len(files)]


# Cells that are no names of images, or not of any that is there.
CELLS = (
    "a\0b.png", "x.png#0:99999999999", "x.png#9999999999999999999:1", "x.png#frame=" + "9" * 5000,
    "x.png#tile=1,2,99999999999999999,9999999999", "a" * 5000, "a/" * 3000, "../../../etc/passwd",
    "/dev/zero", "/proc/self/mem", "/dev/stdin", "file:///etc/passwd", "ftp://a/b", "://", "#", "/",
    "\ud800.png", "\x1b]0;a\x07.png", "'; drop", "=cmd|' /C calc'!A0", "x.nii#frame=1", " ", "NaN",
    "x.svs#tile=0,0,0,0", "a\0.svs", "a\0.nii.gz", "a\0.dcm#frame=2", "x.parquet#row=1,a",
    "x.png#row=99999999999999999999,a", "x.tar", "~/x.png", "$HOME/x.png", "-1", "1e400",
)  # fmt: skip


def cells(rng: Rng, turn: int) -> Made:
    """A table, or a list, of hostile cells beside each other."""
    chosen = [CELLS[n] for n in rng.choice(len(CELLS), 6, replace=False)]
    form = turn % 4
    if form == 0:
        lines = [json.dumps({"image": cell, "text": WORDS[turn % 100]}) for cell in chosen]
        return "a.jsonl", "\n".join(lines).encode()
    plain = [cell.encode("utf-8", "replace").decode() for cell in chosen]
    if form == 1:
        rows = ["image", *('"' + cell.replace('"', '""') + '"' for cell in plain)]
        return "a.csv", "\n".join(rows).encode()
    if form == 2:
        return "a.parquet", parquet({"image": plain, "text": WORDS[:6]})
    return "a.txt", "\n".join(f"{cell}.png" for cell in plain).encode()


def parquet(columns: dict) -> bytes:
    out = io.BytesIO()
    pq.write_table(pa.table(columns), out, store_schema=False)
    return out.getvalue()


def repeated(value: str | None, count: int) -> pa.Array:
    if value is None:
        return pa.nulls(count, pa.string())
    indices = pa.Array.from_buffers(pa.int32(), count, [None, pa.py_buffer(bytes(4 * count))])
    return pa.DictionaryArray.from_arrays(indices, pa.array([value]))


def picture_bomb() -> bytes:
    picture = worst_images.png(64, 64, 8, 2, before=bytes(0)) + bytes(1 << 20)
    indices = pa.array([0] * 9_000, pa.int32())
    return parquet({"image": pa.DictionaryArray.from_arrays(indices, pa.array([picture]))})


def table(rng: Rng, turn: int) -> Made:
    """Tables that are large where they look small, or no tables."""
    word = WORDS[turn % 100]
    deep = b'{"image": ' + b"[" * 100_000 + b"]" * 100_000 + b"}"
    makers: list[tuple[str, Callable[[], bytes]]] = [
        ("nulls.parquet", lambda: parquet({"text": repeated(None, 100_000_000)})),
        ("equal.parquet", lambda: parquet({"text": repeated(word, 20_000_000)})),
        ("long.parquet", lambda: parquet({"text": repeated(word * 1000, 1_000_000)})),
        ("pictures.parquet", picture_bomb),
        ("long.csv", lambda: b"text\n" + word.encode() * 10_000_000),
        ("lines.txt", lambda: b"a\n" * 200_000),
        ("bomb.csv.gz", lambda: gzipped(b"text\n", 3 << 30)),
        ("deep.jsonl", lambda: deep),
        ("digits.jsonl", lambda: b'{"image": ' + b"9" * 10_000 + b"}"),
        ("columns.csv", lambda: b",".join(b"c%d" % n for n in range(200_000)) + b"\n"),
        ("quote.csv", lambda: b'image\n"' + word.encode() * 100),
        ("nul.csv", lambda: b"image\na\0b\n\0\n"),
        ("latin.csv", lambda: b"image\n\xff\xfe\n"),
        ("blank.jsonl", lambda: b"\n" * 1_000_000),
        ("number.jsonl", lambda: b'{"image": 1e999, "text": NaN}\n[]\n'),
        ("utf16.txt", lambda: word.encode("utf-16")),
        ("footer.parquet", lambda: b"PAR1" + b"\xff" * 40 + b"\xff\xff\xff\x7fPAR1"),
    ]
    name, make = makers[turn % len(makers)]
    return name, make()


def gzipped(start: bytes, count: int) -> bytes:
    packer, block = zlib.compressobj(9, wbits=31), bytes(b"a" * (1 << 20))
    out = [packer.compress(start)]
    out += [packer.compress(block) for _ in range(count >> 20)]
    return b"".join([*out, packer.flush()])


def damaged_table(rng: Rng, turn: int) -> Made:
    word = WORDS[turn % 100]
    image = planted_files.png(word)
    rows = {"image": [image] * 3, "text": [word] * 3, "id": ["1", "2", "3"]}
    originals = {
        "a.parquet": parquet(rows), "a.csv": b"image,text\na.png,b\n" * 9,
        "a.jsonl": b'{"image": "a.png", "text": "b"}\n' * 9, "a.csv.gz": gzipped(b"image\na", 0),
        "a.tar": planted_files.tar({"1.png": image, "1.txt": word.encode(), "2.json": b'{"a": 1}'}),
    }  # fmt: skip
    name = list(originals)[turn % len(originals)]
    return name, planted_files.damaged(rng, originals[name])


def shard(rng: Rng, turn: int) -> Made:
    """Tars with members that are no files, or lie about themselves."""
    word = WORDS[turn % 100]
    image = planted_files.files(word)
    members = [
        {"1.json": b'{"caption": ' + b"[" * 50_000}, {"1.txt": word.encode() * 3_000_000},
        {"a.png": b"", "b.png": word.encode()}, {"a\0.png": image["a.png"]}, {"../a.png": b"x"},
        {"a.json": b"9" * 9_000}, {"a.txt": b"\xff" + word.encode()},
        {f"{n}.png": b"" for n in range(99)},
        {name: data[: len(data) // 2] for name, data in image.items()},
    ]  # fmt: skip
    data = bytearray(planted_files.tar(members[turn % len(members)]))
    if turn >= len(members):  # another size, and its checksum
        size = b"%011o" % int(rng.choice([0, 1, 1 << 20, (1 << 33) - 1]))
        data[124:135] = size
        data[148:156] = b" " * 8
        data[148:156] = b"%06o\0 " % sum(data[:512])
    return "a.tar", bytes(data)


KINDS: dict[str, Maker] = {
    "image": damaged_image, "broken": broken_image, "dicom": damaged_dicom, "bomb": bomb,
    "size": lying_size, "special": special, "cells": cells, "table": table,
    "damaged table": damaged_table, "shard": shard,
}  # fmt: skip


def kinds() -> Iterator[str]:
    yield from KINDS


if __name__ == "__main__":
    sys.exit(main())
