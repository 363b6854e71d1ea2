"""Push a folder to the Hugging Face hub."""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError, HFValidationError

from mlx_mtp.storage.safetensors import shown


def upload(folder: Path, repo_id: str, *, private: bool = False) -> str:
    """Create a model repository, if it is not there, and push a folder to it in one commit.

    Who is allowed to do that is the hub library's own business (``hf auth login``).

    Args:
        folder: what to push, as it is.
        repo_id: ``user/name``, or ``name`` in the user's own space.
        private: whether a new repository is hidden.

    Returns:
        The repository's address.

    Raises:
        ValueError: the folder is not there, the name is wrong, the hub refuses or is out of reach;
            one line.
    """
    if not folder.is_dir() or not any(folder.iterdir()):
        raise ValueError(f"{folder} is not a folder with files to upload")
    api = HfApi()
    try:
        found = api.create_repo(repo_id, repo_type="model", private=private, exist_ok=True)
        api.upload_folder(
            repo_id=found.repo_id,
            folder_path=folder,
            repo_type="model",
            commit_message="Upload a model converted by mlx-mtp",
        )
    except HFValidationError as error:
        raise ValueError(f"{repo_id} is no name for a repository: {shown(error)}") from None
    except HfHubHTTPError as error:
        raise ValueError(f"the hub refuses {repo_id}: {shown(error)}") from None
    except Exception as error:  # no network, whatever the HTTP library calls that
        raise ValueError(f"cannot upload {folder} to {repo_id}: {shown(error)}") from None
    return str(found)
