"""A few conversations to learn by heart."""

import json

from motley.data.conversation import Message

WORDS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
CONVERSATIONS = [
    [Message("user", f"Say {word}."), Message("assistant", f"{word}!", f"the word is {word}")] for word in WORDS
] + [[Message("system", "Be brief."), Message("user", "Hello"), Message("assistant", "Hi")]]


def as_lines(conversations: list[list[Message]]) -> str:
    lines = []
    for conversation in conversations:
        messages = [
            {name: value for name, value in vars(message).items() if value is not None} for message in conversation
        ]
        lines.append(json.dumps({"messages": messages}) + "\n")
    return "".join(lines)
