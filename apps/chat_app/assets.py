"""The built page, read into memory once."""

from __future__ import annotations

import mimetypes
from importlib.resources import files
from pathlib import Path

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Route

_YEAR_S = 31_536_000
_TYPES = {
    ".js": "text/javascript",
    ".css": "text/css",
    ".html": "text/html",
    ".woff2": "font/woff2",
}


def dist_folder() -> Path:
    """Return the folder of the built page."""
    return Path(str(files("mlx_mtp") / "apps" / "chat" / "dist"))


class Assets:
    """Files of the built page by path.

    Args:
        folder: folder of the built page.

    Raises:
        ValueError: the page is not built.
    """

    def __init__(self, folder: Path) -> None:
        if not (folder / "index.html").is_file():
            raise ValueError(
                f"{folder} contains no built page: run `npm ci && npm run build` in apps/chat"
            )
        paths = [path for path in folder.rglob("*") if path.is_file() and path.suffix != ".json"]
        self._files = {
            f"/{path.relative_to(folder).as_posix()}": path.read_bytes() for path in paths
        }

    def routes(self) -> list[BaseRoute]:
        """Return the routes that serve the files."""
        names = ["/", *(name for name in self._files if name != "/index.html")]
        return [Route(name, self._serve) for name in names]

    async def _serve(self, request: Request) -> Response:
        path = request.url.path
        name = "/index.html" if path == "/" else path
        # Names under assets contain a hash of the content, so they can be cached forever.
        immutable = path.startswith("/assets/")
        caching = f"private, max-age={_YEAR_S}, immutable" if immutable else "no-cache"
        suffix = Path(name).suffix
        media_type = (
            _TYPES.get(suffix) or mimetypes.guess_type(name)[0] or "application/octet-stream"
        )
        return Response(
            self._files[name], headers={"Cache-Control": caching}, media_type=media_type
        )
