"""One engine, many callers: first come first served, nobody waits for someone who has gone."""

import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from served import SlowEngine, running
from thinking_model import ANSWER, ENDLESS, QUESTION

from motley.infer.load import open_engine
from motley.infer.sampler import BrokenLogits
from motley.serve.about import read_about
from motley.serve.app import create_app


class House:
    """A server whose engine stands still until told to go on."""

    def __init__(self, address: str, engine: SlowEngine) -> None:
        self.address, self.engine = address, engine
        self.url = f"{address}/v1/chat/completions"

    def ask(self, question: str = QUESTION, **settings: Any) -> httpx.Response:
        return httpx.post(self.url, json=body(question, **settings), timeout=30)

    def later(self, question: str = QUESTION, **settings: Any) -> "Later":
        return Later(lambda: self.ask(question, **settings))

    def waiting(self) -> int:
        return httpx.get(f"{self.address}/health").json()["waiting"]

    def raw(self, **settings: Any) -> socket.socket:
        """A connection that has sent its question; closing it is hanging up."""
        sent = json.dumps(body(**settings)).encode()
        host, port = self.address.removeprefix("http://").split(":")
        connection = socket.create_connection((host, int(port)))
        head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: {host}:{port}\r\nContent-Type: application/json\r\n"
        connection.sendall(f"{head}Content-Length: {len(sent)}\r\n\r\n".encode() + sent)
        return connection


class Later(threading.Thread):
    def __init__(self, work: Callable[[], httpx.Response]) -> None:
        super().__init__(daemon=True)
        self.work = work
        self.start()

    def run(self) -> None:
        self.response = self.work()


def body(question: str = QUESTION, **settings: Any) -> dict[str, Any]:
    return {"model": "little", "messages": [{"role": "user", "content": question}], "temperature": 0, **settings}


def until(holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not holds():
        assert time.monotonic() < deadline, "it never came to that"
        time.sleep(0.01)


@pytest.fixture
def house(thinking_model: Path) -> Iterator[House]:
    engine = SlowEngine(open_engine(thinking_model, "cpu"))
    with running(create_app(engine, read_about(thinking_model, engine), max_waiting=2)) as address:
        yield House(address, engine)
        engine.go_on.set()


def test_a_full_line_turns_the_next_away_with_a_time_to_come_again(house: House) -> None:
    asked = [house.later() for _ in range(3)]  # one is answered, two wait
    until(lambda: house.waiting() == 2)
    refused = house.ask()
    assert refused.status_code == 429
    assert int(refused.headers["Retry-After"]) > 0
    assert refused.json()["error"]["type"] == "rate_limit_error"
    assert house.ask(stream=True).status_code == 429
    house.engine.go_on.set()
    for one in asked:
        one.join(timeout=20)
        assert one.response.json()["choices"][0]["message"]["content"] == ANSWER
    until(lambda: house.waiting() == 0)


@pytest.mark.parametrize("stream", [False, True])
def test_hanging_up_frees_the_engine(house: House, stream: bool) -> None:
    connection = house.raw(question=ENDLESS, stream=stream, max_tokens=4000)
    until(lambda: house.engine.running == 1)
    connection.close()
    until(lambda: house.engine.running == 0)
    house.engine.go_on.set()
    assert house.ask().json()["choices"][0]["message"]["content"] == ANSWER


@pytest.mark.parametrize("stream", [False, True])
def test_hanging_up_leaves_the_line(house: House, stream: bool) -> None:
    first = house.later()
    until(lambda: house.engine.running == 1)
    connection = house.raw(stream=stream)
    until(lambda: house.waiting() == 1)
    connection.close()
    house.engine.go_on.set()
    first.join(timeout=20)
    until(lambda: house.waiting() == 0)
    assert house.ask().status_code == 200


def test_bad_questions_do_not_stand_in_line(house: House) -> None:
    first = house.later()
    until(lambda: house.engine.running == 1)
    for _ in range(5):
        assert house.ask(temperature=9).status_code == 400
        assert house.ask("word " * 5000).status_code == 400
    assert house.waiting() == 0
    house.engine.go_on.set()
    first.join(timeout=20)
    assert first.response.status_code == 200


def test_a_model_that_breaks_says_so_and_the_server_lives_on(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    house.engine.go_on.set()
    weight = house.engine.model.model.norm.weight
    kept = weight.detach().clone()
    weight.data.fill_(float("nan"))
    whole = house.ask()
    assert whole.status_code == 500
    assert "its weights are broken" in whole.json()["error"]["message"]
    streamed = house.ask(stream=True)
    last = json.loads(streamed.text.strip().split("\n\n")[-1].removeprefix("data: "))
    assert "its weights are broken" in last["error"]["message"]
    assert "[DONE]" not in streamed.text
    weight.data.copy_(kept)
    assert house.ask().json()["choices"][0]["message"]["content"] == ANSWER
    assert issubclass(BrokenLogits, RuntimeError)


def test_answers_asked_for_at_once_are_the_answers_asked_for_alone(house: House) -> None:
    house.engine.go_on.set()
    alone = [house.ask(question, max_tokens=30).json()["choices"] for question in (QUESTION, ENDLESS)]
    together = [house.later(question, max_tokens=30) for question in (QUESTION, ENDLESS)]
    for one, choices in zip(together, alone, strict=True):
        one.join(timeout=20)
        assert one.response.json()["choices"] == choices
