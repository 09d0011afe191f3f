"""The only folder from which requests may load adapters."""

from pathlib import Path

from moelora_jax.errors import RequestError
from moelora_jax.server.errors import ApiError


class AdapterRoot:
    """Turns the paths of requests into folders under one root, and refuses all others.

    Args:
        folder: the root.

    Raises:
        RequestError: it is not a folder.
    """

    def __init__(self, folder: Path) -> None:
        if not folder.is_dir():
            raise RequestError(f"--adapter-root {folder}: no such folder")
        self._root = folder.resolve(strict=True)

    def folder(self, path: str) -> Path:
        """The folder that a path means, relative to the root or absolute.

        Links are followed first: the folder and all that lies in it must be under the root then.

        Raises:
            ApiError: 403, it lies elsewhere; 404, there is no such folder.
        """
        try:
            # An outer "try", as each of these steps meets paths that no file system can hold.
            folder = self._root.joinpath(path).resolve()
            if not folder.is_relative_to(self._root):
                raise self._outside(path)
            if not folder.is_dir():
                raise ApiError(
                    404,
                    f"{path}: there is no such folder under the adapter root",
                    "adapter_not_found",
                    param="lora_path",
                )
            for file in folder.iterdir():
                if not file.resolve().is_relative_to(self._root):
                    raise self._outside(f"{path}/{file.name}")
        except (OSError, ValueError, RuntimeError) as cause:
            raise ApiError(
                400, f"{path!r} cannot be a folder: {cause}", "invalid_request", param="lora_path"
            ) from cause
        return folder

    def _outside(self, path: str) -> ApiError:
        return ApiError(
            403,
            f"{path}: lies outside the adapter root; adapters are loaded only from under it",
            "path_not_allowed",
            param="lora_path",
        )
