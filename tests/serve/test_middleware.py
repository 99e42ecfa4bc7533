"""The server answers those it should, and nobody else: other hosts, other pages, no key, too much."""

from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from served import open_app, running

from motley.serve.middleware import MOST_BODY_BYTES

KEY = "sesame"


@pytest.fixture(scope="module")
def local(thinking_model: Path) -> Iterator[httpx.Client]:
    with running(open_app(thinking_model)) as address, httpx.Client(base_url=address) as client:
        yield client


@pytest.fixture(scope="module")
def locked(thinking_model: Path) -> Iterator[str]:
    with running(open_app(thinking_model, local=False, api_key=KEY)) as address:
        yield address


def test_every_response_carries_the_security_headers(local: httpx.Client) -> None:
    for path in ("/", "/health", "/nothing", "/v1/models"):
        headers = local.get(path).headers
        assert "script-src 'self'" in headers["Content-Security-Policy"]
        assert "unsafe" not in headers["Content-Security-Policy"]
        assert headers["X-Content-Type-Options"] == "nosniff"
        assert headers["X-Frame-Options"] == "DENY"
        assert "Access-Control-Allow-Origin" not in headers
        assert "server" not in headers or "uvicorn" not in headers["server"] or path


@pytest.mark.parametrize("host", ["evil.example", "127.0.0.1.evil.example:80", "", "[", "localhost.evil:1", "0.0.0.0"])
def test_a_name_that_is_not_this_machines_is_turned_away(local: httpx.Client, host: str) -> None:
    refused = local.get("/v1/models", headers={"Host": host})
    assert refused.status_code in (400, 403)


@pytest.mark.parametrize("host", ["localhost", "localhost:9", "127.0.0.1:1234", "[::1]:8321"])
def test_this_machines_names_are_let_in(local: httpx.Client, host: str) -> None:
    assert local.get("/v1/models", headers={"Host": host}).status_code == 200


@pytest.mark.parametrize("origin", ["https://evil.example", "null", "http://localhost:1"])
def test_pages_of_another_origin_are_turned_away(local: httpx.Client, origin: str) -> None:
    refused = local.post("/v1/chat/completions", json={}, headers={"Origin": origin})
    assert refused.status_code == 403
    assert "another origin" in refused.json()["error"]["message"]


def test_the_page_itself_is_let_in(local: httpx.Client) -> None:
    own = str(local.base_url).rstrip("/")
    assert local.get("/api/about", headers={"Origin": own}).status_code == 200


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data", ""])
def test_what_a_form_could_send_is_not_read(local: httpx.Client, kind: str) -> None:
    refused = local.post("/v1/chat/completions", content=b'{"model": "little"}', headers={"Content-Type": kind})
    assert refused.status_code == 415


def test_too_large_a_body_is_refused_whether_it_says_so_or_not(local: httpx.Client) -> None:
    text = b'{"model": "' + b"x" * MOST_BODY_BYTES + b'"}'
    headers = {"Content-Type": "application/json"}
    assert local.post("/v1/chat/completions", content=text, headers=headers).status_code == 413
    pieces = (text[at : at + 65536] for at in range(0, len(text), 65536))
    assert local.post("/v1/chat/completions", content=pieces, headers=headers).status_code == 413


@pytest.mark.parametrize(
    "text",
    [b"", b"{", b"[]", b"null", b'"x"', b"\xff\xfe", b"[" * 100_000, b'{"model": 1e999}', b'{"model": "\\ud800"}'],
)
def test_a_body_that_is_no_request_gets_a_sentence(local: httpx.Client, text: bytes) -> None:
    refused = local.post("/v1/chat/completions", content=text, headers={"Content-Type": "application/json"})
    assert refused.status_code in (400, 404)
    assert refused.json()["error"]["message"]


def test_unknown_addresses_and_methods_get_a_sentence_too(local: httpx.Client) -> None:
    assert local.get("/v1/nothing").json()["error"]["message"] == "there is nothing at /v1/nothing"
    assert local.delete("/v1/models").status_code == 405
    assert local.get("/%2e%2e/%2e%2e/pyproject.toml").status_code == 404


def test_without_the_key_only_health_answers(locked: str) -> None:
    with httpx.Client(base_url=locked) as client:
        assert client.get("/health").status_code == 200
        for path in ("/", "/v1/models", "/api/about", "/openapi.json", "/assets/x.js"):
            refused = client.get(path)
            assert refused.status_code == 401
            assert refused.headers["WWW-Authenticate"] == "Bearer"
            assert client.get(path, headers={"Authorization": f"Bearer {KEY}x"}).status_code == 401
            assert client.get(path, headers={"Authorization": f"Basic {KEY}"}).status_code == 401
            assert client.get(path, headers={"Cookie": "motley_key=wrong; ="}).status_code == 401


@pytest.mark.parametrize("headers", [{"Authorization": f"Bearer {KEY}"}, {"x-api-key": KEY}])
def test_the_key_opens(locked: str, headers: dict[str, str]) -> None:
    assert httpx.get(f"{locked}/v1/models", headers=headers).status_code == 200


def test_the_address_with_the_key_opens_the_page_and_hides_the_key(locked: str) -> None:
    with httpx.Client(base_url=locked) as browser:
        assert browser.get("/", params={"key": "wrong"}).status_code == 401
        moved = browser.get("/", params={"key": KEY})
        assert (moved.status_code, moved.headers["Location"]) == (303, "/")
        cookie = moved.headers["Set-Cookie"].lower()
        assert "httponly" in cookie
        assert "samesite=strict" in cookie
        assert browser.get("/api/about").status_code == 200
        assert browser.get("/v1/models", params={"key": KEY}).status_code == 200
    with httpx.Client(base_url=locked) as other:
        assert other.get("/v1/models", params={"key": KEY}).status_code == 401, "a key in an address ends in logs"
