"""The text side of training: tokenizers, the packed corpus, and an order of batches that no layout changes."""

import json
import os
from itertools import pairwise
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from meshwright.spec.errors import UserError
from meshwright.train import corpus
from meshwright.train.batches import Batches, PackedTokens, check_vocabulary
from meshwright.train.corpus import documents, find_files, pack
from meshwright.train.tokenizer import load_tokenizer

TEXT = "The quick brown fox, naïve café, 東京 🦊\n\tdef f(x):\n        return x\r\n"


@pytest.fixture(scope="module")
def tokenizer_json(tmp_path_factory) -> Path:
    """A byte-level BPE saved as an encoder's would be: it cuts, pads and adds special tokens unless told not to."""
    return save_tokenizer(tmp_path_factory.mktemp("tokenizer"), ["<|endoftext|>", "[PAD]"])


def save_tokenizer(folder: Path, special: list[str]) -> Path:
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=special, initial_alphabet=alphabet, show_progress=False)
    bpe.train_from_iterator(["the quick brown fox jumps over the lazy dog"] * 4, trainer)
    if special:
        bpe.post_processor = processors.TemplateProcessing(single=f"{special[0]} $A", special_tokens=[(special[0], 0)])
        bpe.enable_truncation(8)
        bpe.enable_padding(length=8)
    path = folder / "tokenizer.json"
    bpe.save(str(path))
    return path


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text.encode())
    return path


def records(path: Path, *values: object) -> Path:
    return write(path, "".join(json.dumps(value) + "\n" for value in values))


def table(path: Path, **columns: list) -> Path:
    pq.write_table(pa.table(columns), path)
    return path


def packed(path: Path, tokens: int) -> Path:
    """A packed file whose token i is i, so that a batch shows where it came from."""
    np.save(path / "tokens.npy", np.arange(tokens, dtype=np.uint32))
    return path / "tokens.npy"


# Tokenizers


@pytest.mark.parametrize("ref", [None, "bytes"])
def test_bytes_are_their_own_ids(ref):
    tokenizer = load_tokenizer(ref)
    assert (tokenizer.name, tokenizer.vocab_size, tokenizer.end_of_document) == ("bytes", 257, 256)
    first, second, empty = tokenizer.encode_batch([TEXT, "a", ""])
    assert first.tolist() == list(TEXT.encode())
    assert second.tolist() == [97]
    assert empty.tolist() == []
    assert tokenizer.decode(first) == TEXT


def test_bytes_decode_what_a_model_may_sample():
    tokenizer = load_tokenizer("bytes")
    assert tokenizer.decode([104, 105, 256, 400]) == "hi"
    assert tokenizer.decode(torch.tensor([104, 0xE6])) == "h\ufffd"  # stopped inside a character


def test_tokenizer_json_round_trip(tokenizer_json):
    tokenizer = load_tokenizer(str(tokenizer_json))
    first, second = tokenizer.encode_batch([TEXT, "the quick"])
    assert tokenizer.decode(first) == TEXT  # all of it: the file's truncation is off
    assert tokenizer.decode(second) == "the quick"
    assert tokenizer.end_of_document == 0
    assert not {0, 1} & {*first.tolist(), *second.tolist()}  # neither special tokens nor padding
    assert max(first.max(), second.max()) < tokenizer.vocab_size <= 300
    assert len(second) < len("the quick")
    assert tokenizer.decode([*second, tokenizer.end_of_document]) == "the quick"


def test_a_directory_holds_the_same_tokenizer(tokenizer_json):
    assert load_tokenizer(str(tokenizer_json.parent)).fingerprint == load_tokenizer(str(tokenizer_json)).fingerprint


def test_fingerprints_differ(tokenizer_json, tmp_path):
    other = save_tokenizer(tmp_path, ["</s>"])
    prints = {load_tokenizer(ref).fingerprint for ref in ("bytes", str(tokenizer_json), str(other))}
    assert len(prints) == 3


def test_vocabulary_is_the_largest_id_plus_one(tmp_path):
    holes = Tokenizer(models.WordLevel({"</s>": 0, "far": 5000}, unk_token="</s>"))
    holes.save(str(tmp_path / "tokenizer.json"))
    tokenizer = load_tokenizer(str(tmp_path))
    assert tokenizer.encode_batch(["far"])[0].tolist() == [5000]
    assert tokenizer.vocab_size == 5001


def test_tokenizer_errors(tmp_path):
    with pytest.raises(UserError, match=r"no tokenizer at 'gpt2': give 'bytes', a tokenizer.json"):
        load_tokenizer("gpt2")
    with pytest.raises(UserError, match="no tokenizer at"):
        load_tokenizer(str(tmp_path))
    with pytest.raises(UserError, match=r"no end-of-document token .*</s>.* add one .* or use the tokenizer 'bytes'"):
        load_tokenizer(str(save_tokenizer(tmp_path, [])))
    with pytest.raises(UserError, match=r"not a Hugging Face tokenizer\.json"):
        load_tokenizer(str(write(tmp_path / "broken.json", "{}")))


# Files


@pytest.mark.parametrize("ref", [None, "stdlib"])
def test_the_standard_library_without_its_tests(ref):
    files = find_files(ref)
    assert files == sorted(files) == find_files(ref)
    names = {path.name for path in files}
    assert {"argparse.py", "dataclasses.py"} <= names
    assert "numpy" not in {part for path in files for part in path.parts}
    for name in ("test_argparse.py", "test_grammar.py", "bad_coding.py", "test_parser.py"):
        assert name not in names
    assert next(documents(files))


def test_a_directory_is_searched_without_hidden_files(tmp_path):
    kept = ["a.txt", "b/c.md", "b/d/e.py", "f.jsonl", "g.parquet"]
    for name in [*kept, "h.png", ".hidden.txt", ".git/i.txt", "b/.cache/j.txt"]:
        write(tmp_path / ".root" / name, "x")  # a hidden directory that the user names is not skipped
    assert find_files(str(tmp_path / ".root")) == [tmp_path / ".root" / name for name in kept]


def test_a_file_and_a_pattern(tmp_path):
    one, two, deep = (write(tmp_path / name, "x") for name in ("[1].c", "two.c", "d/three.c"))
    assert find_files(str(one)) == [one]  # a file that looks like a pattern is a file
    assert find_files(str(tmp_path / "*")) == [one, two]
    assert find_files(str(tmp_path / "**/*.c")) == [one, deep, two]


def test_no_files(tmp_path):
    for ref, message in [("nowhere", "no file or directory at"), (".", "no .txt .md"), ("*.txt", "no file matches")]:
        with pytest.raises(UserError, match=message) as error:
            find_files(str(tmp_path / ref))
        assert "\n" not in str(error.value)


# Documents


def test_documents_of_every_kind(tmp_path):
    files = [
        write(tmp_path / "a.txt", TEXT),
        write(tmp_path / "empty.txt", ""),
        records(tmp_path / "b.jsonl", {"text": "one\n", "id": 1}, {"text": ""}, {"text": None}, {"text": "東"}),
        table(tmp_path / "c.parquet", text=["three", None, "four"], id=[1, 2, 3]),
    ]
    assert list(documents(files)) == [TEXT, "one\n", "東", "three", "four"]


def test_blank_lines_of_jsonl_are_nothing(tmp_path):
    assert list(documents([write(tmp_path / "a.jsonl", '\n{"text": "x"}\r\n  \n')])) == ["x"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"text": ', "line 2: not JSON"),
        ("[1]", "line 2: expected an object with the key 'text', found list"),
        ('{"body": "x", "id": 1}', "line 2: no key 'text'; keys found: body, id"),
        ('{"text": 3}', "line 2: 'text' must be a string, found int"),
        ('{"text": "\\ud800"}', "line 2: 'text' is not valid Unicode"),
    ],
)
def test_bad_jsonl_names_its_line(tmp_path, line, message):
    with pytest.raises(UserError, match=message) as error:
        list(documents([write(tmp_path / "a.jsonl", f'{{"text": "good"}}\n{line}\n')]))
    assert str(tmp_path / "a.jsonl") in str(error.value)


def test_bad_files(tmp_path):
    (tmp_path / "latin.txt").write_bytes("café".encode("latin-1"))
    write(tmp_path / "fake.parquet", "not parquet at all")
    table(tmp_path / "body.parquet", body=["x"], id=[1])
    table(tmp_path / "number.parquet", text=[1])
    for name, message in [
        ("latin.txt", "not UTF-8"),
        ("fake.parquet", "not a Parquet file"),
        ("body.parquet", "no column 'text'; columns found: body, id"),
        ("number.parquet", "row 1: 'text' must be a string, found int"),
        ("gone.txt", "cannot read .*gone.txt: No such file"),
    ]:
        with pytest.raises(UserError, match=message):
            list(documents([tmp_path / name]))


# Packing


def test_pack_is_every_document_and_its_end(tmp_path):
    write(tmp_path / "in/a.txt", TEXT)
    records(tmp_path / "in/b.jsonl", {"text": "one"}, {"text": "two"})
    table(tmp_path / "in/c.parquet", text=["three"])
    path = pack(str(tmp_path / "in"), load_tokenizer("bytes"), tmp_path / "cache" / "deep")
    tokens = np.load(path, mmap_mode="r")
    assert isinstance(tokens, np.memmap)
    assert tokens.dtype == np.uint16
    expected = [id for text in (TEXT, "one", "two", "three") for id in [*text.encode(), 256]]
    assert tokens.tolist() == expected
    assert os.listdir(path.parent) == [path.name]


def test_pack_with_a_tokenizer_json(tmp_path, tokenizer_json):
    tokenizer = load_tokenizer(str(tokenizer_json))
    records(tmp_path / "a.jsonl", {"text": TEXT}, {"text": "the fox"})
    tokens = np.load(pack(str(tmp_path / "a.jsonl"), tokenizer, tmp_path)).tolist()
    end = tokens.index(tokenizer.end_of_document)
    assert tokenizer.decode(tokens[:end]) == TEXT
    assert tokenizer.decode(tokens[end + 1 : -1]) == "the fox"
    assert tokens[-1] == tokenizer.end_of_document


def test_a_large_vocabulary_takes_four_bytes(tmp_path):
    class Wide:
        name, vocab_size, end_of_document, fingerprint = "wide", 65_537, 65_536, "wide"

        def encode_batch(self, texts):
            return [np.array([65_535], np.uint32) for _ in texts]

    tokens = np.load(pack(str(write(tmp_path / "a.txt", "x")), Wide(), tmp_path))
    assert tokens.dtype == np.uint32
    assert tokens.tolist() == [65_535, 65_536]


def test_pieces_and_groups_do_not_show(tmp_path, monkeypatch):
    write(tmp_path / "in/a.txt", "".join(f"line {i} 東\n" for i in range(200)))
    records(tmp_path / "in/b.jsonl", *({"text": f"record {i}"} for i in range(50)))
    whole = np.load(pack(str(tmp_path / "in"), load_tokenizer("bytes"), tmp_path / "whole"))
    monkeypatch.setattr(corpus, "PIECE_BYTES", 64)
    monkeypatch.setattr(corpus, "GROUP_CHARS", 100)
    seen: list[tuple[int, int]] = []
    path = pack(str(tmp_path / "in"), load_tokenizer("bytes"), tmp_path / "cut", progress=lambda *args: seen.append(args))
    assert np.array_equal(whole, np.load(path))
    assert len(list(documents(find_files(str(tmp_path / "in"))))) == 51

    size = sum(file.stat().st_size for file in (tmp_path / "in").iterdir())
    assert len(seen) > 10
    assert seen[-1] == (size, size)
    assert all(before <= after for (before, _), (after, _) in pairwise(seen))


def test_pack_is_reused_until_something_changes(tmp_path, tokenizer_json, monkeypatch):
    source, tokenizer = write(tmp_path / "a.txt", TEXT), load_tokenizer("bytes")
    first = pack(str(source), tokenizer, tmp_path / "cache")
    with monkeypatch.context() as patch:
        patch.setattr(corpus, "_write_tokens", lambda *_: pytest.fail("tokenised again"))
        assert pack(str(source), tokenizer, tmp_path / "cache") == first
    assert pack(str(source), load_tokenizer(str(tokenizer_json)), tmp_path / "cache") != first
    stat = source.stat()
    os.utime(source, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))
    assert pack(str(source), tokenizer, tmp_path / "cache") != first


def test_a_failed_pack_leaves_nothing_behind(tmp_path):
    source = write(tmp_path / "a.jsonl", '{"text": "x"}\nbroken\n')
    with pytest.raises(UserError, match="line 2"):
        pack(str(source), load_tokenizer("bytes"), tmp_path / "cache")
    assert os.listdir(tmp_path / "cache") == []


def test_an_empty_corpus_is_refused(tmp_path):
    source = records(tmp_path / "a.jsonl", {"text": ""})
    with pytest.raises(UserError, match=r"has no text: files 1, bytes 13, documents 0"):
        pack(str(source), load_tokenizer("bytes"), tmp_path / "cache")
    assert os.listdir(tmp_path / "cache") == []


# Batches


@pytest.mark.parametrize(("tokens", "windows"), [(0, 0), (1, 0), (4, 0), (5, 1), (8, 1), (9, 2), (10, 2)])
def test_windows_share_one_token(tmp_path, tokens, windows):
    data = PackedTokens(packed(tmp_path, tokens), seq=4)
    assert len(data) == windows
    assert [data[i].tolist() for i in range(windows)] == [list(range(4 * i, 4 * i + 5)) for i in range(windows)]
    with pytest.raises(IndexError):
        data[windows]


def batches(tmp_path: Path, windows: int = 22, global_batch: int = 8, seed: int = 0) -> Batches:
    return Batches(PackedTokens(packed(tmp_path, windows * 4 + 1), seq=4), global_batch, seed)


def global_batch_of(source: Batches, step: int) -> torch.Tensor:
    ((tokens, _),) = source.micro_batches(step, 0, 1, source.global_batch)
    return tokens


def test_labels_are_the_next_tokens(tmp_path):
    for tokens, labels in batches(tmp_path).micro_batches(0, 0, 2, 2):
        assert tokens.shape == labels.shape == (2, 4)
        assert tokens.dtype == labels.dtype == torch.int64
        assert tokens.is_contiguous()
        assert labels.is_contiguous()
        assert torch.equal(labels, tokens + 1)


@pytest.mark.parametrize(("dp", "micro_batch"), [(1, 1), (1, 8), (2, 1), (2, 4), (4, 1), (4, 2), (8, 1)])
def test_every_layout_sees_the_same_global_batch(tmp_path, dp, micro_batch):
    source = batches(tmp_path)
    for step in (0, 2, 5):  # 2 and 5 take sequences from two epochs
        shares = [source.micro_batches(step, rank, dp, micro_batch) for rank in range(dp)]
        assert {len(share) for share in shares} == {8 // dp // micro_batch}
        assert all(tokens.shape == (micro_batch, 4) for share in shares for tokens, _ in share)
        union = torch.cat([tokens for share in shares for tokens, _ in share])
        assert torch.equal(union, global_batch_of(source, step))


def test_an_epoch_visits_every_window_once(tmp_path):
    source = batches(tmp_path)
    windows = [window for step in range(11) for window in source.windows(step)]  # 88 sequences = 4 epochs of 22
    epochs = [windows[start : start + 22] for start in range(0, 88, 22)]
    assert all(sorted(epoch) == list(range(22)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in [*epochs, range(22)]}) == 5  # shuffled, and anew in each epoch


def test_resuming_is_the_same_as_running_on(tmp_path):
    straight = batches(tmp_path)
    seen = [global_batch_of(straight, step) for step in range(12)]
    for step in (11, 0, 7, 2):
        assert torch.equal(global_batch_of(batches(tmp_path), step), seen[step])
        assert torch.equal(global_batch_of(straight, step), seen[step])  # and so is going back


def test_the_order_is_the_seeds_and_never_changes(tmp_path):
    assert batches(tmp_path).windows(2) == batches(tmp_path).windows(2)
    assert batches(tmp_path, seed=1).windows(2) != batches(tmp_path).windows(2)
    # Written down: a run that resumes under another release of NumPy must go on in this order.
    assert batches(tmp_path).windows(2) == [4, 10, 12, 16, 5, 9, 7, 10]


def test_a_short_corpus_is_refused_with_the_numbers(tmp_path):
    batches(tmp_path, windows=8)
    message = (
        r"8 sequences of 4 tokens need 33 tokens, found 29; try .*--seq.*--global-batch \(up to 7 fits\), or more data"
    )
    with pytest.raises(UserError, match=message):
        batches(tmp_path, windows=7)
    with pytest.raises(UserError, match=r"found 1; try a smaller --seq, a smaller --global-batch, or more data"):
        batches(tmp_path, windows=0)


def test_illegal_numbers_are_refused(tmp_path):
    for dp, micro_batch in [(3, 1), (2, 3), (4, 4), (1, 0)]:
        with pytest.raises(UserError, match=f"global_batch 8, dp {dp}, micro_batch {micro_batch}"):
            batches(tmp_path).micro_batches(0, 0, dp, micro_batch)
    with pytest.raises(UserError, match="global_batch must be at least 1, got 0"):
        batches(tmp_path, global_batch=0)
    with pytest.raises(UserError, match="seed must be at least 0, got -1"):
        batches(tmp_path, seed=-1)
    with pytest.raises(UserError, match="seq must be at least 1, got 0"):
        PackedTokens(packed(tmp_path, 9), seq=0)


def test_the_vocabulary_must_fit():
    tokenizer = load_tokenizer("bytes")
    check_vocabulary(tokenizer, 257)
    check_vocabulary(tokenizer, 32_000)
    with pytest.raises(UserError, match=r"bytes has 257 tokens, the model's vocabulary only 256: .* at least 257"):
        check_vocabulary(tokenizer, 256)
