"""`motley serve` and `motley chat` as a user runs them."""

import io
import os
import re
import signal
import socket
import subprocess
import threading
from functools import partial
from pathlib import Path

import httpx
import pytest
from spawned_ranks import MOTLEY, start
from thinking_model import ANSWER, ENDLESS, QUESTION, THINKING

from motley.cli import main
from motley.errors import InputError
from motley.infer.load import open_engine
from motley.serve import app
from motley.serve.about import Defaults, read_defaults
from motley.serve.app import ServeConfig, listen, serve
from motley.serve.chat import Chat, ChatConfig


def test_serve_says_its_address_once_it_listens_and_ends_quietly_on_ctrl_c(thinking_model: Path) -> None:
    server = start([*MOTLEY, "serve", str(thinking_model), "--port", "0"])
    line = server.first_line()
    found = re.search(r"http://127\.0\.0\.1:\d+/", line)
    assert found, server.said
    about = httpx.get(found[0] + "api/about").json()
    assert (about["model"], about["context_length"]) == ("little", 4096)
    assert about["prompts"][0]["text"] == QUESTION
    server.send_signal(signal.SIGINT)
    _, error = server.communicate(30)
    assert server.returncode == 0
    assert error == ""


def look_for_pages_in(folder: Path) -> None:
    app.PAGES = folder


def test_without_its_page_serve_says_where_the_api_is(thinking_model: Path, tmp_path: Path) -> None:
    server = start([*MOTLEY, "serve", str(thinking_model), "--port", "0"], before=partial(look_for_pages_in, tmp_path))
    line = server.first_line()
    server.send_signal(signal.SIGINT)
    assert server.wait(30) == 0
    assert re.search(r"^the API is at http://127\.0\.0\.1:\d+/v1; the page was not built", line), line
    assert "talk to it at" not in line


def test_a_port_that_is_taken_is_named_or_passed_over() -> None:
    with listen("127.0.0.1", 0) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(InputError, match=rf"cannot listen on 127\.0\.0\.1 port {port}: .* --port"):
            listen("127.0.0.1", port)
        with listen("127.0.0.1", port, other_ports=20) as other:
            assert port < other.getsockname()[1] <= port + 20


def test_other_machines_are_let_in_only_with_a_key(thinking_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MOTLEY_API_KEY", raising=False)
    with pytest.raises(InputError, match="API key"):
        serve(ServeConfig(thinking_model, host="0.0.0.0", port=0))


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["serve", "nowhere"], "nowhere is not a folder"),
        (["serve", ".", "--port", "99999"], "--port is 99999"),
        (["chat", "nowhere"], "nowhere is not a folder"),
    ],
)
def test_bad_input_is_one_sentence_and_status_2(
    arguments: list[str], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 2
    error = capfd.readouterr().err
    assert said in error
    assert "Traceback" not in error


def test_a_host_that_is_not_of_this_machine_is_named() -> None:
    with pytest.raises(InputError, match="host"), listen("no.such.host.invalid", 0) as bound:
        assert isinstance(bound, socket.socket)


def test_chat_reads_questions_from_standard_input(thinking_model: Path) -> None:
    asked = f"{QUESTION}\n/think\n{QUESTION}\n"
    done = subprocess.run(
        [*MOTLEY, "chat", str(thinking_model), "--temperature", "0", "--remember", "no"],
        input=asked, capture_output=True, text=True, env={**os.environ, "NO_COLOR": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"{THINKING}\n{ANSWER}\nThinking is off.\n{ANSWER}\n"


@pytest.fixture
def chat(thinking_model: Path) -> Chat:
    config = ChatConfig(thinking_model, temperature=0, max_tokens=60)
    return Chat(open_engine(thinking_model, "cpu"), config, Defaults(), io.StringIO())


def said(chat: Chat) -> str:
    assert isinstance(chat.out, io.StringIO)
    return chat.out.getvalue()


def test_chat_remembers_until_told_to_forget(chat: Chat) -> None:
    chat.ask(QUESTION)
    assert [message.role for message in chat.messages] == ["user", "assistant"]
    assert chat.messages[1].content == ANSWER
    chat.command("/new")
    assert chat.messages == []
    with pytest.raises(EOFError):
        chat.command("/quit")


def test_a_stopped_answer_is_not_remembered(chat: Chat) -> None:
    cancelled = threading.Event()
    cancelled.set()
    chat.ask(ENDLESS, cancelled)
    assert "stopped" in said(chat)
    assert chat.messages == []


def test_a_model_says_how_it_is_best_asked_and_the_user_has_the_last_word(thinking_model: Path, tmp_path: Path) -> None:
    (tmp_path / "about.json").write_text('{"defaults": {"remember": false, "temperature": 0, "max_tokens": 60}}')
    engine, defaults = open_engine(thinking_model, "cpu"), read_defaults(tmp_path)
    chat = Chat(engine, ChatConfig(thinking_model), defaults, io.StringIO())
    chat.ask(QUESTION)
    chat.ask(QUESTION)
    assert said(chat) == 2 * f"{THINKING}\n{ANSWER}\n"
    assert len(chat.messages) == 2, "the second question did not carry the first along"
    assert Chat(engine, ChatConfig(thinking_model, remember="yes"), defaults, io.StringIO()).remember


def test_defaults_of_another_kind_are_named(tmp_path: Path) -> None:
    assert read_defaults(tmp_path) == Defaults()
    (tmp_path / "about.json").write_text('{"defaults": {"temperature": "warm"}}')
    with pytest.raises(InputError, match=r"about.json: defaults.temperature"):
        read_defaults(tmp_path)


def test_a_cut_answer_says_so(chat: Chat) -> None:
    chat.ask(ENDLESS)
    assert said(chat).endswith("(cut at 60 tokens)\n")
