"""A model small enough to learn, in seconds and by heart, to think and then answer one question."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch
from torch.nn.functional import cross_entropy

from motley.data.conversation import ConversationEncoder, Message
from motley.data.tokenizer import train_tokenizer
from motley.files import write_json
from motley.model import SIZES, Transformer, save

QUESTION = "What is 2 + 3?"
THINKING = "Two and three: 2 + 3 = 5."
ANSWER = "The answer is **5**."
ENDLESS = "Think for ever"
ABOUT = {
    "about": ["It learned two questions by heart, and nothing else."],
    "prompts": [{"family": "chain_sum", "text": QUESTION}],
    "accuracy": None,
    "defaults": {"temperature": 0.0, "max_tokens": 4000, "remember": False},
}


def write_thinking_model(folder: Path) -> None:
    """Train it (about 3 s) and write a model folder that `motley serve` can open."""
    tokenizer = train_tokenizer([QUESTION, THINKING, ANSWER, ENDLESS], vocab_size=300)
    config = replace(
        SIZES["nano"],
        vocab_size=tokenizer.vocab_size,
        hidden_size=64,
        num_hidden_layers=2,
        num_nextn_predict_layers=0,
        initializer_range=0.05,
        bos_token_id=tokenizer.bos_id,
        eos_token_id=tokenizer.eos_id,
    )
    model = Transformer(config)
    model.initialize(seed=0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    rows = list(_rows(ConversationEncoder(tokenizer)))
    loss = torch.tensor(torch.inf)
    for _ in range(200):
        losses = [cross_entropy(model(ids)[:, :-1][mask].float(), ids[:, 1:][mask]) for ids, mask in rows]
        loss = torch.stack(losses).sum()
        if loss < 0.03:
            break
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 0.03, f"the little model did not learn its lines: loss {loss.item():.3f}"
    save(model, folder)
    tokenizer.save(folder)
    write_json(folder / "about.json", ABOUT)


def _rows(encoder: ConversationEncoder) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Ids [1, seq] and a mask [1, seq - 1] over what is to be predicted."""
    conversations = [
        [Message("user", QUESTION), Message("assistant", ANSWER, THINKING)],
        [Message("user", QUESTION), Message("assistant", ANSWER)],
        [Message("user", ENDLESS), Message("assistant", "", "on and " * 24)],
    ]
    for conversation in conversations:
        row = encoder.encode(conversation)
        mask = torch.tensor([row.loss_mask[1:]])
        if conversation[0].content == ENDLESS:
            mask[0, -2:] = False  # never taught to end
        yield torch.tensor([row.ids]), mask
