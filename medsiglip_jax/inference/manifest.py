"""The records of an embedding run: `run.json`, what was asked, and `manifest.json`, the result."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Annotated, Any

from medsiglip_jax.files import places, settings
from medsiglip_jax.files.documents import parse
from medsiglip_jax.files.failures import explained
from medsiglip_jax.model.config import PixelConfig
from medsiglip_jax.preprocess.dicom import rules

RUN, MANIFEST, ERRORS = "run.json", "manifest.json", "errors.parquet"
# The preset of vectors that another program made (`embeddings.elsewhere`).
UNKNOWN = "unknown"
MOST_ROWS = 10**12  # of a part; what is more is no number of rows


@dataclass(frozen=True)
class Weights:
    """Which weights made the embeddings.

    Attributes:
        source: where they came from.
        sha256: identity of their files; None for weights that were never saved.
    """

    source: str | None = None
    sha256: str | None = None


@dataclass(frozen=True)
class PartFile:
    """One Parquet file of a run: its name, rows, and size in bytes."""

    file: Annotated[str, settings.Check(places.is_plain_name, places.PLAIN_NAME)]
    rows: Annotated[int, settings.between(0, MOST_ROWS)]
    bytes: int | None = None


@dataclass(frozen=True, kw_only=True)
class RunRecord:
    """What makes two runs the same run: the content of `run.json`, in the order of its keys.

    Fields with a default are missing in the manifests of earlier versions.

    Attributes:
        model: the weights.
        tokenizer_sha256: of the SentencePiece model and of what else decides about ids, or None.
        preprocess: pixel preset, or `UNKNOWN`.
        pixels: the model's normalisation and resampling, where they are not SigLIP's.
        dicom: `Rules.to_dict` of the rules by which DICOM files became pixels.
        expansion: `Parts.to_dict`, what was made of files that hold more than one image.
        identifiers: how patients, studies and series are named, or None without such columns.
        normalized: unit vectors, or the raw pooled output.
        dtype, matmul_precision: of the computation.
        stored: element type of the vectors in the files.
        reference: `sha256` of the reference of known images, and the share `at` of them that is
            within the limit; None without the columns `distance` and `no_assist`.
        dim: numbers per vector.
        shard_size: input rows per Parquet file.
        rows, rows_sha256: number and digest of the inputs.
        versions: of the packages that make pixels and vectors; None where one is not installed. In
            `run.json` those that every run uses. A part also names those of the decoders that its
            files were given to, and the manifest those of all parts: a run goes on with the
            versions that its rows so far were made with, whatever else is installed or updated.
    """

    model: Weights
    tokenizer_sha256: str | None = None
    preprocess: str
    pixels: Mapping[str, Any] | None = None
    dicom: Mapping[str, Any] | None = None
    expansion: Mapping[str, Any] = field(default_factory=dict)
    identifiers: str | None = None
    normalized: bool
    dtype: str | None = None
    matmul_precision: str | None = None
    stored: str | None = None
    reference: Mapping[str, Any] | None = None
    dim: Annotated[int, settings.between(1, 1_000_000)]
    shard_size: int | None = None
    rows: int | None = None
    rows_sha256: str | None = None
    versions: Mapping[str, str | None] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """As JSON holds it."""
        return asdict(self)

    def differences(self, before: Mapping[str, Any]) -> list[str]:
        """Keys that differ from the `run.json` of an earlier run; equal weights may have moved."""
        sha256 = self.model.sha256
        model = before.get("model")
        same_weights = sha256 and isinstance(model, dict) and model.get("sha256") == sha256
        differ = [key for key, value in self.to_dict().items() if before.get(key) != value]
        return [key for key in differ if key != "model" or not same_weights]


@dataclass(frozen=True, kw_only=True)
class Manifest(RunRecord):
    """The content of `manifest.json`: the run, and what came of it.

    Attributes:
        embedded: rows with an embedding.
        errors: unreadable inputs.
        skipped: what is not among the inputs -> how often, as `data.rows.Rows` has it.
        turned, burned_in, multi_frame, unusual, dark, cut: as in `engine.Embedded`.
        parts: the Parquet files, in order.
    """

    embedded: int | None = None
    errors: int = 0
    skipped: Mapping[str, int] = field(default_factory=dict)
    turned: int = 0
    burned_in: int = 0
    multi_frame: int = 0
    unusual: int = 0
    dark: int = 0
    cut: int = 0
    parts: tuple[PartFile, ...]

    def __post_init__(self):
        rows = sum(part.rows for part in self.parts)
        if self.embedded not in (None, rows):
            raise ValueError(f"embedded is {self.embedded}, and the parts have {rows} rows")
        _ = self.dicom_rules  # both raise a ValueError for what is none
        PixelConfig.from_dict(self.pixels or {})

    @property
    def dicom_rules(self) -> rules.Rules:
        """The rules by which DICOM files became pixels; the default ones in old manifests."""
        return rules.from_dict(self.dicom)


# What is counted while a run goes on, beside rows and errors.
COUNTS = ("turned", "burned_in", "multi_frame", "unusual", "dark", "cut")


def parse_manifest(text: str | bytes, path: places.Place) -> Manifest:
    """A manifest from its JSON; keys of later versions are ignored.

    Raises:
        ValueError: it is not JSON, or not what `embed` writes; `path` is named.
    """
    with explained(path, "not a manifest that embed wrote"):
        content = parse(text)
        known = {f.name: content[f.name] for f in fields(Manifest) if f.name in content}
        return settings.build(Manifest, known, title="manifest")
