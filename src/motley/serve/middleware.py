"""Checks on every request before it reaches a route; security headers on every response.

Any web page can make a browser send requests to 127.0.0.1. Refused are therefore host names that are not this
server's (DNS rebinding), origins other than its own page's, and bodies that are not JSON (browsers send forms across
origins without a preflight request). On any but a loopback address an API key is required.
"""

import json
import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from http.cookies import CookieError, SimpleCookie
from ipaddress import ip_address
from urllib.parse import parse_qs, urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.responses import RedirectResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from motley.serve.openai import error_body

MOST_BODY_BYTES = 4 << 20
COOKIE = "motley_key"
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
HEADERS = {
    "Content-Security-Policy": POLICY,
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
}


def is_loopback(host: str) -> bool:
    """Whether a name or address is a loopback one."""
    if host == "localhost":
        return True
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return False


@dataclass(frozen=True)
class Refusal(Exception):
    """A request that no route gets to see, and why."""

    status: int
    message: str
    code: str


class AccessMiddleware:
    """ASGI middleware that checks host, origin, body and API key.

    Args:
        app: the application behind it.
        local: the server listens on a loopback address; then requests must name a loopback host.
        api_key: required on every path but /health; None: no key is required.
    """

    def __init__(self, app: ASGIApp, local: bool, api_key: str | None) -> None:
        self.app, self.local, self.api_key = app, local, api_key

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in HEADERS.items():
                    headers[name] = value
                headers["Cache-Control"] = cache_control(scope["path"])
            await send(message)

        headers = Headers(scope=scope)
        try:
            self._check_origin(headers)
            self._check_body(scope["method"], headers)
            if scope["path"] != "/health" and (opened := self._check_key(scope, headers)) is not None:
                await opened(scope, receive, send_with_headers)
                return
        except Refusal as refusal:
            await refusal_response(refusal)(scope, receive, send_with_headers)
            return
        await self.app(scope, limited(receive), send_with_headers)

    def _check_origin(self, headers: Headers) -> None:
        host = headers.get("host", "")
        try:
            name = urlsplit(f"//{host}").hostname or ""
        except ValueError:
            name = ""
        if self.local and not is_loopback(name):
            raise Refusal(
                403, "this server answers to localhost only, and the request names another host", "wrong_host"
            )
        origin = headers.get("origin")
        if origin is not None and netloc_of(origin) != host:
            raise Refusal(403, "this server does not answer pages of another origin", "wrong_origin")

    @staticmethod
    def _check_body(method: str, headers: Headers) -> None:
        if method not in ("POST", "PUT", "PATCH"):
            return
        kind = headers.get("content-type", "").split(";")[0].strip().lower()
        if kind != "application/json":
            raise Refusal(415, "the body must be JSON, with the header Content-Type: application/json", "not_json")
        length = headers.get("content-length", "0")
        if length.isdecimal() and int(length) > MOST_BODY_BYTES:
            raise Refusal(413, too_large(), "request_too_large")

    def _check_key(self, scope: Scope, headers: Headers) -> Response | None:
        """None if the request may pass; a response if a browser opened the address with the key in its query."""
        if self.api_key is None:
            return None
        if any(same(given, self.api_key) for given in given_keys(headers)):
            return None
        in_address = parse_qs(scope["query_string"].decode("latin-1")).get("key", [""])[0]
        if scope["method"] == "GET" and scope["path"] == "/" and same(in_address, self.api_key):
            response = RedirectResponse("/", status_code=303)
            response.set_cookie(COOKIE, self.api_key, httponly=True, samesite="strict", path="/")
            return response
        raise Refusal(401, "the API key is missing or wrong; send it as Authorization: Bearer KEY", "invalid_api_key")


def limited(receive: Receive) -> Receive:
    """`receive` that raises when a body without Content-Length grows too large."""
    received = 0

    async def counting() -> Message:
        nonlocal received
        message = await receive()
        received += len(message.get("body", b""))
        if received > MOST_BODY_BYTES:
            raise HTTPException(413, too_large())
        return message

    return counting


def too_large() -> str:
    return f"the request is larger than {MOST_BODY_BYTES >> 20} MiB"


def given_keys(headers: Mapping[str, str]) -> list[str]:
    """Keys in a request: bearer token, x-api-key, the page's cookie."""
    scheme, _, token = headers.get("authorization", "").partition(" ")
    keys = [headers.get("x-api-key", "")] + ([token.strip()] if scheme.lower() == "bearer" else [])
    try:
        cookie = SimpleCookie(headers.get("cookie", "")).get(COOKIE)
    except CookieError:
        cookie = None
    return [*keys, cookie.value] if cookie else keys


def same(given: str, key: str) -> bool:
    """Whether two keys are equal, in constant time."""
    return secrets.compare_digest(given.encode("utf-8", "surrogateescape"), key.encode("utf-8", "surrogateescape"))


def netloc_of(origin: str) -> str:
    try:
        return urlsplit(origin).netloc
    except ValueError:
        return ""


def cache_control(path: str) -> str:
    """Built assets have their digest in the name and may be cached; nothing else may."""
    return "public, max-age=31536000, immutable" if path.startswith("/assets/") else "no-store"


def refusal_response(refusal: Refusal) -> Response:
    kind = "authentication_error" if refusal.status == 401 else "invalid_request_error"
    body = json.dumps(error_body(refusal.message, kind, refusal.code))
    response = Response(body, refusal.status, media_type="application/json")
    if refusal.status == 401:
        response.headers["WWW-Authenticate"] = "Bearer"
    return response
