"""Push a folder to the Hugging Face hub."""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError, HFValidationError

from mlx_mtp.storage.safetensors import shown


def upload(folder: Path, repo_id: str, *, private: bool = False) -> str:
    """Create a model repository if necessary, and push a folder to it in one commit.

    The hub library handles the login (``hf auth login``).

    Args:
        folder: folder to push.
        repo_id: ``user/name``, or ``name`` in the user's namespace.
        private: whether a new repository is private.

    Returns:
        The repository's address.

    Raises:
        ValueError: the folder does not exist, the name is wrong, or the hub refuses or cannot be
            reached; one line.
    """
    if not folder.is_dir() or not any(folder.iterdir()):
        raise ValueError(f"{folder} is not a folder with files to upload")
    api = HfApi()
    try:
        repo = api.create_repo(repo_id, repo_type="model", private=private, exist_ok=True)
        api.upload_folder(
            repo_id=repo.repo_id,
            folder_path=folder,
            repo_type="model",
            commit_message="Upload a model converted by mlx-mtp",
        )
    except HFValidationError as error:
        raise ValueError(f"{repo_id} is not a valid repository name: {shown(error)}") from None
    except HfHubHTTPError as error:
        raise ValueError(f"the hub refuses {repo_id}: {shown(error)}") from None
    except Exception as error:  # no network, for which the HTTP library has many types
        raise ValueError(f"cannot upload {folder} to {repo_id}: {shown(error)}") from None
    return str(repo)
