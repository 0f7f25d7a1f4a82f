"""Checkpoints from the Hugging Face hub, with the user's own access."""

import re
from pathlib import Path

_FILES = ["*.json", "*.safetensors", "*.model"]


def is_repo_id(source: str) -> bool:
    return re.fullmatch(r"[\w\-.]+/[\w\-.]+", source) is not None and not source.startswith(".")


def download(repo_id: str, token: str | None = None) -> Path:
    """Downloads (or finds in the local cache) the checkpoint files of `repo_id`.

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
