"""Write a format into a temporary folder, add the card, upload, compare what arrived."""

from __future__ import annotations

import os
import re
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from fastplug.errors import MissingExtra, OptionError
from fastplug.exporters.api import ExportError, ExportResult
from fastplug.exporters.folder import digest_of, list_files, write_manifest
from fastplug.exporters.hub.card import model_card

_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")


def hub(
    model: Any,
    path: str | os.PathLike[str],
    *,
    weights: str = "merged_16bit",
    private: bool = True,
    token: str | None = None,
    endpoint: str | None = None,
    revision: str | None = None,
    message: str | None = None,
    data: str | Sequence[str] = (),
    license: str | None = None,
    folder: str | os.PathLike[str] | None = None,
    **options: Any,
) -> ExportResult:
    """Push a model to a Hugging Face hub.

    Args:
        model: A live model, or what else ``weights`` takes.
        path: The repository, ``"user/name"``. It is made if it does not exist.
        weights: The format to push: ``"merged_16bit"``, ``"lora"``, ``"gguf"``, any format that writes a folder.
        private: Whether a new repository is private.
        token: A write token; default: the one of ``hf auth login``.
        endpoint: Another hub than ``HF_ENDPOINT``'s.
        revision: The branch; default: ``main``.
        message: The commit's message.
        data: What the model was trained on, for the card: dataset ids, or plain words.
        license: For the card.
        folder: Where to keep the folder that is uploaded; default: a temporary one.
        options: The options of ``weights``.

    Returns:
        What was uploaded; the notes say where.

    Raises:
        OptionError: Not a name of a repository, or an unknown option.
        ExportError: What arrived is not what was sent; the hub refused; and what ``weights`` raises.
    """
    from fastplug.exporting import export

    try:
        import huggingface_hub
    except ImportError as error:
        raise MissingExtra("huggingface_hub", "hf", "pushing to a hub") from error
    repo = os.fspath(path)
    if not _NAME.fullmatch(repo):
        raise OptionError(f"fastplug: {repo!r} is not the name of a repository; it is like user/name")
    if weights.partition(":")[0] == "hub":
        raise OptionError("fastplug: weights= is a format that writes a folder, not hub itself")
    began = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="fastplug-hub-") as temporary:
        result = export(model, folder or Path(temporary, "model"), weights, **options)
        live = model if not isinstance(model, (str, os.PathLike)) else None
        if live is not None:
            described = (data,) if isinstance(data, str) else tuple(data)
            card = model_card(live, repo, result, data=described, license=license)
            (result.path / "README.md").write_text(card, encoding="utf-8")
            write_manifest(result.path)
        api = huggingface_hub.HfApi(endpoint=endpoint, token=token)
        try:
            url = api.create_repo(repo, private=private, exist_ok=True)
            repo = getattr(url, "repo_id", repo)
            commit: Any = api.upload_folder(
                repo_id=repo,
                folder_path=result.path,
                revision=revision,
                commit_message=message or f"Upload {weights} with fastplug",
            )
            _compare(api, repo, getattr(commit, "oid", None) or revision, result.path)
        except (OSError, ValueError, huggingface_hub.errors.HfHubHTTPError) as error:
            if isinstance(error, ExportError):
                raise
            reason = str(error).strip().splitlines() or [type(error).__name__]
            kept = f"; the folder is kept as {folder}" if folder is not None else "; folder=DIR keeps what was written"
            raise ExportError(f"fastplug: the hub did not take {repo}: {reason[0]}{kept}") from error
        files = list_files(result.path)
        size = sum((result.path / name).stat().st_size for name in files)
    where = f"{(endpoint or huggingface_hub.constants.ENDPOINT).rstrip('/')}/{repo}"
    return replace(
        result, format="hub", path=Path(repo), files=files, bytes=size, seconds=time.perf_counter() - began,
        notes=(*result.notes, f"Pushed to {where}."),
    )  # fmt: skip


def _compare(api: Any, repo: str, revision: str | None, folder: Path) -> None:
    """Ask the hub what it holds: size of every file, SHA-256 of the large ones."""
    names = list(list_files(folder))
    found = {item.path: item for item in api.get_paths_info(repo, names, revision=revision)}
    for name in names:
        item: Any = found.get(name)
        wrong = item is None or item.size != (folder / name).stat().st_size
        lfs = getattr(item, "lfs", None)
        if not wrong and lfs is not None:
            wrong = lfs.sha256 != digest_of(folder / name)
        if wrong:
            raise ExportError(f"fastplug: {name} did not arrive at {repo} as it was sent; push again")


__all__ = ["hub"]
