import random
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

from motley.data import pack, shards
from motley.data.conversation import ConversationEncoder, Message
from motley.data.pack import DataConfig, pack_conversations, prepare
from motley.data.shards import SPLITS, Prepared
from motley.data.stream import NO_LOSS, PADDING, Batch, TokenStream, permute
from motley.data.tokenizer import train_tokenizer
from motley.errors import InputError


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Prepared:
    """Documents of very different lengths in many small shards, some shorter and some longer than a row."""
    folder = tmp_path_factory.mktemp("text")
    rng = random.Random(1)
    for number in range(80):
        words = (f"word{rng.randrange(50)}" for _ in range(rng.choice([1, 3, 30, 300])))
        (folder / f"{number:02d}.txt").write_text(f"{number} " + " ".join(words))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shards, "SHARD_TOKENS", 400)
        config = DataConfig(data=(str(folder),), vocab_size=300, valid_share=0.1)
        return prepare(config, folder.parent / "text-data")


@pytest.fixture(scope="module")
def talks() -> list[list[Message]]:
    rng = random.Random(2)
    return [
        [
            Message("user", f"{number} + {rng.randrange(1000)}?"),
            Message("assistant", str(number), rng.choice([None, "so " * rng.randrange(12)])),
        ]
        for number in range(200)
    ]


@pytest.fixture(scope="module")
def talk(talks: list[list[Message]], tmp_path_factory: pytest.TempPathFactory) -> Prepared:
    tokenizer = train_tokenizer(["so 1 + 2?\n" * 50], 290)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shards, "SHARD_TOKENS", 500)
        patch.setattr(pack, "ROW_BUFFER", 20)
        return pack_conversations(talks, tokenizer, tmp_path_factory.mktemp("talk") / "data", 64, 0.1)


def equal(one: Batch, two: Batch) -> bool:
    return all(torch.equal(getattr(one, name), getattr(two, name)) for name in ("input_ids", "targets", "documents"))


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("seq_len", [1, 7, 64, 1000])
def test_all_documents_can_be_read_back_from_the_rows(text: Prepared, split: shards.Split, seq_len: int) -> None:
    stream = TokenStream(text.folder, split, seq_len=seq_len, shuffle=False)
    batch = stream.rows(0, stream.rows_per_epoch)
    assert batch.input_ids.shape == batch.targets.shape == batch.documents.shape == (stream.rows_per_epoch, seq_len)
    assert {tensor.dtype for tensor in (batch.input_ids, batch.targets, batch.documents)} == {torch.int64}
    real = batch.documents != PADDING
    assert (batch.input_ids[~real] == stream.pad_id).all()
    assert (batch.targets[~real] == NO_LOSS).all()
    assert not real.logical_not()[:-1].any()  # only the last row is padded
    expected = np.concatenate([shards.Shard(text, entry).tokens for entry in text.shards[split]]).tolist()
    tokens = batch.input_ids[real].tolist()
    last = batch.targets[real][-1].item()
    assert [*tokens, last] == expected
    # Every token is a target once, and follows its input; only begin tokens are none.
    tokenizer = text.tokenizer
    following = batch.targets[real].tolist()
    assert following == [NO_LOSS if one == tokenizer.bos_id else one for one in expected[1:]]


def test_documents_are_numbered_from_their_begin_tokens(text: Prepared) -> None:
    stream = TokenStream(text.folder, seq_len=50, shuffle=False)
    begin = text.tokenizer.bos_id
    batch = stream.rows(0, stream.rows_per_epoch)
    several = 0
    for ids, documents in zip(batch.input_ids.tolist(), batch.documents.tolist(), strict=True):
        number = 0
        for place, (one, document) in enumerate(zip(ids, documents, strict=True)):
            number += one == begin and place > 0
            assert document in (number, PADDING)
        several += number > 0
    assert several > 3


@pytest.mark.parametrize("kind", ["text", "talk"])
def test_every_row_comes_once_in_every_epoch_and_each_time_in_another_order(kind: str, request) -> None:
    prepared: Prepared = request.getfixturevalue(kind)
    stream = TokenStream(prepared.folder, seq_len=prepared.seq_len or 32, seed=5)
    rows = stream.rows_per_epoch
    epochs = [stream.row_numbers(epoch * rows, rows).tolist() for epoch in range(3)]
    assert all(sorted(epoch) == list(range(rows)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3
    assert epochs[0] != sorted(epochs[0])
    assert TokenStream(prepared.folder, seq_len=stream.seq_len, seed=6).row_numbers(0, rows).tolist() != epochs[0]


@pytest.mark.parametrize("kind", ["text", "talk"])
def test_the_stream_is_a_function_of_the_position_for_any_number_of_readers(kind: str, request) -> None:
    prepared: Prepared = request.getfixturevalue(kind)
    seq_len = prepared.seq_len or 32
    stream = TokenStream(prepared.folder, seq_len=seq_len, seed=1)
    count = 2 * stream.rows_per_epoch + 5  # over the ends of epochs
    whole = stream.rows(3, count)
    rng = random.Random(4)
    for _ in range(3):
        position, parts = 3, []
        while position < 3 + count:
            some = min(rng.randrange(1, 40), 3 + count - position)
            reader = TokenStream(prepared.folder, seq_len=seq_len, seed=1)  # as after a restart, or another machine
            parts.append(reader.rows(position, some))
            position += some
        names = ("input_ids", "targets", "documents")
        assert equal(whole, Batch(*(torch.cat([getattr(part, name) for part in parts]) for name in names)))


def test_conversations_stay_whole_and_only_the_assistants_words_are_targets(
    talk: Prepared, talks: list[list[Message]]
) -> None:
    encoder = ConversationEncoder(talk.tokenizer)
    fitting = [encoded for one in talks if len((encoded := encoder.encode(one)).ids) <= 65]
    expected = Counter((tuple(one.ids), tuple(one.loss_mask)) for one in fitting)
    found: Counter = Counter()
    for split in SPLITS:
        stream = TokenStream(talk.folder, split)
        batch = stream.rows(0, stream.rows_per_epoch)
        for ids, targets, documents in zip(batch.input_ids, batch.targets, batch.documents, strict=True):
            numbers = documents[documents != PADDING]
            assert (documents[len(numbers) :] == PADDING).all()
            assert (ids[len(numbers) :] == stream.pad_id).all()
            assert (targets[len(numbers) :] == NO_LOSS).all()
            assert numbers.tolist() == sorted(numbers.tolist())
            for number in range(int(numbers.max()) + 1):
                own, following = ids[documents == number].tolist(), targets[documents == number].tolist()
                assert following[-1] == talk.tokenizer.eos_id  # only predicted
                mask = (False, *(one != NO_LOSS for one in following))
                assert all(a in (NO_LOSS, b) for a, b in zip(following, own[1:], strict=False))
                found[(*own, talk.tokenizer.eos_id), mask] += 1
    assert found == expected
    assert talk.train.rows < talk.train.documents  # several share a row


def test_validation_rows_come_in_order(text: Prepared) -> None:
    stream = TokenStream(text.folder, "valid", seq_len=16, shuffle=False)
    assert stream.row_numbers(0, stream.rows_per_epoch).tolist() == list(range(stream.rows_per_epoch))


def test_a_permutation_reaches_every_order_about_equally_often() -> None:
    for size in (*range(1, 40), 1000, 1 << 16, 99_991):
        assert np.array_equal(np.sort(permute(np.arange(size), size, 7, 3)), np.arange(size))
    orders = Counter(tuple(permute(np.arange(4), 4, seed, 0).tolist()) for seed in range(4800))
    assert len(orders) == 24
    assert max(orders.values()) < 300  # 200 on average, standard deviation 14
    assert min(orders.values()) > 100
    far = permute(np.array([0, 10**12, 2 * 10**12 - 1]), 2 * 10**12, 0, 0)  # nothing of that size is held
    assert len(set(far.tolist())) == 3
    neighbours = permute(np.arange(10_000), 10_000, 1, 1)
    assert abs(np.corrcoef(neighbours[:-1], neighbours[1:])[0, 1]) < 0.05


@pytest.mark.parametrize("damage", ["truncated", "missing", "pickle", "other length"])
@pytest.mark.parametrize("kind", ["tokens", "documents", "loss", "rows"])
def test_a_damaged_shard_is_named(talk: Prepared, tmp_path: Path, damage: str, kind: str) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    for file in talk.folder.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    victim = folder / f"train-00001.{kind}.npy"
    if damage == "truncated":
        victim.write_bytes(victim.read_bytes()[:-3])
    elif damage == "missing":
        victim.unlink()
    elif damage == "pickle":
        np.save(victim, np.array([{}], dtype=object), allow_pickle=True)
    else:
        np.save(victim, np.load(victim)[1:])
    with pytest.raises(InputError, match=rf"{victim} .*prepare the data again"):
        TokenStream(folder)


@pytest.mark.parametrize(
    "content", ["{", "[]", '{"format": 0}', '{"format": 1}', '{"format": 1, "inputs": {}, "train": {"x": 1}}']
)
def test_a_damaged_description_is_named(tmp_path: Path, content: str) -> None:
    (tmp_path / "data.json").write_text(content)
    with pytest.raises(InputError, match=r"data\.json"):
        TokenStream(tmp_path, seq_len=8)


def test_a_stream_that_cannot_be_is_refused(text: Prepared, talk: Prepared, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no split 'test'"):
        TokenStream(text.folder, "test", seq_len=8)  # pyright: ignore[reportArgumentType]
    with pytest.raises(InputError, match="seq_len must say"):
        TokenStream(text.folder)
    with pytest.raises(InputError, match="at least 1"):
        TokenStream(text.folder, seq_len=0)
    with pytest.raises(InputError, match="rows of 64 tokens, not 32"):
        TokenStream(talk.folder, seq_len=32)
    with pytest.raises(InputError, match=r"data\.json does not exist"):
        TokenStream(tmp_path, seq_len=8)
    with pytest.raises(InputError, match="seed"):
        TokenStream(text.folder, seq_len=8, seed=-1)
    with pytest.raises(ValueError, match="position"):
        TokenStream(text.folder, seq_len=8).rows(-1, 1)


def test_rows_that_are_cut_keep_their_tokens_their_order_and_every_target() -> None:
    ids = torch.arange(12).view(2, 6)
    batch = Batch(ids, ids + 1, torch.tensor([[0, 0, 0, 1, 1, 1], [0, 0, 1, PADDING, PADDING, PADDING]]))
    cut = batch.cut(3)
    assert cut.input_ids.tolist() == [[0, 1, 2], [3, 4, 5], [6, 7, 8], [9, 10, 11]]
    assert cut.targets.tolist() == [[1, 2, 3], [4, 5, 6], [7, 8, 9], [10, 11, 12]]
    assert cut.documents.tolist() == [[0, 0, 0], [1, 1, 1], [0, 0, 1], [PADDING] * 3]
    assert batch.cut(6) is batch
    assert batch.cut(7) is batch
    assert Batch(ids[:0], ids[:0], ids[:0]).cut(2).input_ids.shape == (0, 2)


@pytest.mark.parametrize("limit", [10_000_000, 3000, 40])
def test_the_text_is_all_tokens_in_order_or_as_much_of_each_shard(text: Prepared, limit: int) -> None:
    found = TokenStream(text.folder, "train", seq_len=8).text(limit)
    arrays = [np.asarray(shards.Shard(text, entry).tokens) for entry in text.shards["train"]]
    share = min(1.0, limit / sum(map(len, arrays)))
    expected = [token for array in arrays for token in array[: int(len(array) * share)]]
    assert found.tolist() == expected
    assert (len(found) == sum(map(len, arrays))) == (share == 1)
    assert len(found) <= limit
