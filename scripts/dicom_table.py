"""What happens to every DICOM file in pydicom's wheel, as a Markdown table.

python scripts/dicom_table.py                        # by the standard's rules
python scripts/dicom_table.py --dicom-rules official FILE_OR_FOLDER
"""

import argparse
import collections
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("inputs", nargs="*", help="files or folders; default those of pydicom")
    parser.add_argument("--dicom-rules", default="dicom", help="dicom (default) or official")
    args = parser.parse_args()
    rows = list(table([Path(p) for p in args.inputs] or [brought()], args.dicom_rules))
    header = ("file", "transfer syntax", "outcome", "ms")
    for row in (header, ("---",) * len(header), *rows):
        print(f"| {' | '.join(row)} |")
    kinds = collections.Counter("pixels" if row[2].endswith(" pixels") else row[2] for row in rows)
    print(f"\n{len(rows)} files")
    for kind, count in kinds.most_common():
        print(f"- {count}: {kind}")
    return 0


def brought() -> Path:
    """The folder of the files in pydicom's wheel."""
    import pydicom

    return Path(pydicom.__file__).parent / "data"


def table(roots: Sequence[Path], rules: str) -> Iterator[tuple[str, str, str, str]]:
    """Rows of file, transfer syntax, image size or the reason for having none, and milliseconds."""
    from pydicom.uid import UID

    from medsiglip_jax.preprocess.decode import decode
    from medsiglip_jax.preprocess.dicom import sniff
    from medsiglip_jax.preprocess.dicom.rules import Rules
    from medsiglip_jax.preprocess.facts import UnreadableImage

    for root in roots:
        files = [root] if root.is_file() else sorted(p for p in root.rglob("*") if p.is_file())
        for path in files:
            if path.suffix in (".py", ".pyc"):
                continue
            syntax, start = sniff.transfer_syntax(path.read_bytes())[0], time.perf_counter()
            try:
                outcome = "{1}x{0} pixels".format(*decode(path, Rules(rules)).shape)
            except UnreadableImage as error:
                outcome = error.reason
            milliseconds = 1e3 * (time.perf_counter() - start)
            name = path.name if path == root else str(path.relative_to(root))
            yield name, UID(syntax).name if syntax else "not said", outcome, f"{milliseconds:.0f}"


if __name__ == "__main__":
    sys.exit(main())
