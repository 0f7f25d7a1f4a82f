"""Local copies of checkpoints on the Hugging Face hub or in a bucket."""

import contextlib
import hashlib
import os
import re
from pathlib import Path

from tqdm import tqdm
from upath import UPath

from medsiglip_jax.files import places, storage
from medsiglip_jax.files.credentials import without
from medsiglip_jax.files.json_text import to_hash

_FILES = ["*.json", "*.safetensors", "*.model", "*.md", "*.txt", "*.jinja", "LICENSE*"]


def is_repo_id(source: str) -> bool:
    return re.fullmatch(r"[\w\-.]+/[\w\-.]+", source) is not None and not source.startswith(".")


def download(repo_id: str, token: str | None = None) -> Path:
    """Downloads the checkpoint files of `repo_id`, unless they are in the local cache.

    Raises:
        FileNotFoundError: no such repository, or none in the cache while offline.
        PermissionError: the repository is gated and this user has no access yet.
    """
    from huggingface_hub import errors, snapshot_download

    try:
        return Path(snapshot_download(repo_id, allow_patterns=_FILES, token=token))
    except errors.GatedRepoError:
        raise PermissionError(
            f"{repo_id}: access is gated. Accept the terms at https://huggingface.co/{repo_id}, "
            "then log in with `hf auth login` or set HF_TOKEN"
        ) from None
    except errors.RepositoryNotFoundError:
        raise FileNotFoundError(
            f"{repo_id}: no such local folder, and no such Hugging Face repository (or it is "
            "private: log in with `hf auth login` or set HF_TOKEN). MedSigLIP is "
            "google/medsiglip-448"
        ) from None
    except errors.LocalEntryNotFoundError:
        raise FileNotFoundError(_offline(repo_id)) from None
    except (OSError, errors.HfHubHTTPError) as error:
        raise ConnectionError(f"{_offline(repo_id)} ({type(error).__name__}: {error})") from None


def _offline(repo_id: str) -> str:
    return (
        f"{repo_id}: no such local folder, and the Hugging Face hub cannot be reached while no "
        "complete copy is in the local cache. Connect, or download the files elsewhere "
        f"(`hf download {repo_id} --local-dir FOLDER`) and give that folder"
    )


def check_login(token: str | None = None) -> None:
    """Raises PermissionError unless somebody is logged in who may upload."""
    from huggingface_hub import HfApi, errors

    try:
        HfApi(token=token).whoami()
    except errors.LocalTokenNotFoundError:
        raise PermissionError(
            "nobody is logged in to the Hugging Face hub: `hf auth login`, or set HF_TOKEN"
        ) from None
    except (OSError, errors.HfHubHTTPError) as error:
        raise ConnectionError(
            f"the Hugging Face hub does not answer to this login: {error}"
        ) from None


def push(folder: Path, repo_id: str, token: str | None = None) -> str:
    """Uploads a folder as a model that only its owner sees, unless it exists and is public.

    Returns:
        Where it is.

    Raises:
        ConnectionError: the hub cannot be reached or refuses.
    """
    from huggingface_hub import HfApi, errors

    api = HfApi(token=token)
    try:
        repo = api.create_repo(repo_id, private=True, exist_ok=True)
        api.upload_folder(repo_id=repo.repo_id, folder_path=folder)
    except (OSError, ValueError, errors.HfHubHTTPError) as error:
        raise ConnectionError(
            f"{folder} is complete, but uploading it as {repo_id} failed ({error}); to try again: "
            f"hf upload {repo_id} {folder}"
        ) from None
    return str(repo)


def fetch(uri: str) -> Path:
    """Copies a checkpoint from a bucket (gs://…) to the local cache, unless it is there already.

    A copy is used again until something in the bucket changes. The cache is `medsiglip_jax/` in
    $XDG_CACHE_HOME or ~/.cache.

    Raises:
        FileNotFoundError: nothing is there.
    """
    place = UPath(places.at(uri))
    files = dict(place.fs.find(place.path, detail=True))
    if not files:
        raise FileNotFoundError(f"{without(uri)}: no such file or folder")
    name = without(uri).rstrip("/").rpartition("/")[2]
    copy = places.cache() / f"{name}-{_version(uri, files)}"
    if not copy.exists():
        with storage.temporary(copy, folder=True) as partial:
            _copy(place, list(files), partial)
            with contextlib.suppress(OSError):  # another process was first
                os.rename(partial, copy)
    return copy / name if (copy / name).is_file() else copy  # of http, folders are files, too


def _version(uri: str, files: dict[str, dict]) -> str:
    """A hash of the listing; each file system has its own name for an object's version or time."""
    names = ("size", "generation", "etag", "ETag", "mtime", "created", "LastModified")
    facts = [
        [without(path), *(str(files[path].get(name)) for name in names)] for path in sorted(files)
    ]
    return hashlib.sha256(to_hash([without(uri), facts])).hexdigest()[:16]


def _copy(place: UPath, files: list[str], folder: Path) -> None:
    above = place.parent.path if files == [place.path] else place.path
    for file in tqdm(files, without(str(place)), unit="file", disable=None):
        # Buckets take "../x" for a name like any other.
        name = without(file).removeprefix(without(above)).lstrip("/")
        target = Path(str(places.below(folder, name)))
        target.parent.mkdir(parents=True, exist_ok=True)
        place.fs.get_file(file, str(target))
