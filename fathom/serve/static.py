"""The page and its parts, and the page of the inspector."""

from importlib import resources

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from fathom.serve.errors import ApiError

_MEDIA_TYPES = {"html": "text/html", "css": "text/css", "js": "text/javascript", "svg": "image/svg+xml"}

# The inspector's scripts are in the page. They run in an origin of their own, without this one's storage, and reach no
# network.
_INSPECTOR_POLICY = "sandbox allow-scripts; default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'"


def page_routes() -> list[Route]:
    """The page at / and what it loads from /page. The files are read here: no request names one."""
    folder = resources.files("fathom.serve") / "page"
    files = {file.name: file.read_bytes() for file in folder.iterdir() if file.is_file()}

    def response(name: str) -> Response:
        if name not in files:
            raise ApiError(404, f"the page has no part {name[:200]!r}")
        media_type = _MEDIA_TYPES[name.rpartition(".")[2]]
        return Response(files[name], headers={"Cache-Control": "no-cache"}, media_type=media_type)

    async def index(request: Request) -> Response:
        return response("index.html")

    async def part(request: Request) -> Response:
        return response(request.path_params["name"])

    return [Route("/", index), Route("/page/{name}", part)]


def inspector_route(page: bytes | None) -> Route:
    """`page`: what `fathom inspect` made, if anything."""

    async def inspect(request: Request) -> Response:
        if page is None:
            raise ApiError(404, "no page is served here: fathom inspect makes one, fathom serve --inspector shows it")
        return Response(page, headers={"Content-Security-Policy": _INSPECTOR_POLICY}, media_type="text/html")

    return Route("/inspect", inspect)
