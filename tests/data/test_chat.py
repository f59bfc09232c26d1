"""Conversations: templates, marks of answers, packing, truncation and files."""

from __future__ import annotations

import gzip
import json
import logging
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ddiff.data.cache import Cache
from ddiff.data.chat import (
    ANSWER,
    FILLER,
    GIVEN,
    ChatCorpus,
    ChatEncoder,
    ChatSettings,
    read_answer,
)
from ddiff.data.chat_template import DEFAULT_TEMPLATE, ChatTemplate, find_template, read_template
from ddiff.data.conversations import ConversationFields, conversation_table, read_conversations
from ddiff.data.documents import Documents
from ddiff.data.number_questions import make_number_questions
from ddiff.data.packing import batch_rows
from ddiff.data.tokenizer import BytePairTokenizer, PretrainedTokenizer, load_tokenizer
from ddiff.errors import ArgumentError, DataError

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TWO_TURNS = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "one?"},
    {"role": "assistant", "content": "two"},
    {"role": "user", "content": "three?"},
    {"role": "assistant", "content": "four"},
]
TOKENIZER = BytePairTokenizer.train([message["content"] for message in TWO_TURNS], 260)


def say(prompt: str, answer: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]


def corpus(conversations: list[Any], **settings: Any) -> ChatCorpus:
    table = conversation_table(conversations)
    return ChatCorpus(Documents(table, table), ChatSettings(**settings))


def answers_of(found: ChatCorpus, length: int, cache: Path, part: str = "train") -> list[str]:
    """Return the text of the counted tokens of each row."""
    rows = found.rows(part, TOKENIZER, length, Cache(cache))
    batch = batch_rows(rows, np.arange(len(rows)))
    assert batch.counted is not None
    return TOKENIZER.decode(
        [batch.ids[row][batch.counted[row]].tolist() for row in range(len(rows))]
    )


@pytest.mark.parametrize(
    ("answers", "expected"),
    [
        ("last", [" four<|eos|>"]),
        ("each", [" two<|eos|>", " four<|eos|>"]),
        ("all", [" two<|eos|> four<|eos|>"]),
    ],
)
def test_answers_selects_the_scored_turns(
    answers: str, expected: list[str], tmp_path: Path
) -> None:
    found = corpus([TWO_TURNS], answers=answers, pack=False)
    assert answers_of(found, 200, tmp_path) == expected


def test_example_of_an_early_answer_has_no_later_message(tmp_path: Path) -> None:
    rows = corpus([TWO_TURNS], answers="each", pack=False).rows(
        "train", TOKENIZER, 200, Cache(tmp_path)
    )
    block = rows[:]
    (first, _) = TOKENIZER.decode([block.ids[row][: block.num_valid[row]] for row in (0, 1)])
    assert first == "System: Be brief.\nUser: one?\nAssistant: two<|eos|>"
    # both examples are of the same conversation, the unit of confidence intervals
    assert rows.first_documents().tolist() == [0, 0]


def test_filled_answer_counts_one_end_mark(tmp_path: Path) -> None:
    found = corpus([say("a", "b")], answer_length=8)
    rows = found.rows("train", TOKENIZER, 40, Cache(tmp_path))
    block = rows[:]
    assert block.marks is not None
    marks = block.marks[0][: block.num_valid[0]]
    size = int((marks == ANSWER).sum())
    assert (marks != GIVEN).sum() == 8
    assert (marks == FILLER).sum() == 8 - size
    batch = batch_rows(rows, [0])
    assert int(batch.tokens.sum()) == size
    assert int(batch.scored.sum()) == 8
    # baselines and first biases use the same positions
    assert rows.tokens_in_rows(np.array([0])).sum() == size
    assert rows.token_counts().sum() == 8


def test_packed_rows_hold_whole_examples_with_separate_documents(tmp_path: Path) -> None:
    conversations = [say(f"question {number}?", f"answer {number}") for number in range(7)]
    packed = corpus(conversations).rows("train", TOKENIZER, 120, Cache(tmp_path))
    single = corpus(conversations, pack=False).rows("train", TOKENIZER, 120, Cache(tmp_path))
    assert len(packed) < len(single) == 7
    alone = {single[[row]].ids[0][: int(single[[row]].num_valid[0])].tobytes() for row in range(7)}
    found = set()
    for row in range(len(packed)):
        block = packed[[row]]
        valid = slice(0, int(block.num_valid[0]))
        for document in np.unique(block.document[0][valid]):
            inside = block.document[0][valid] == document
            found.add(block.ids[0][valid][inside].tobytes())
    assert found == alone
    assert packed.fingerprint != single.fingerprint


def test_long_prompt_is_cut_at_its_beginning_and_counted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    found = corpus([say("x" * 300 + " end", "yes"), say("a", "b")], pack=False)
    with caplog.at_level(logging.WARNING):
        assert answers_of(found, 30, tmp_path) == [" yes<|eos|>", " b<|eos|>"]
    assert "1 of the 2 examples for train have more tokens" in caplog.text
    block = found.rows("train", TOKENIZER, 30, Cache(tmp_path))[:]
    assert block.num_valid.tolist()[0] == 30
    assert TOKENIZER.decode([block.ids[0]])[0].endswith(" end\nAssistant: yes<|eos|>")


@pytest.mark.parametrize(
    ("kept", "expected"),
    [(0, " two<|eos|> four<|eos|>"), (1, " four<|eos|>"), (4, " four<|eos|>")],
)
def test_earlier_answer_is_scored_whole_or_not_at_all(
    kept: int, expected: str, tmp_path: Path
) -> None:
    """`kept`: number of tokens after the cut, from the end of the first answer; 0: no cut."""
    after = len(TOKENIZER.encode(["\nUser: three?\nAssistant: four"])[0]) + 1
    length = after + kept if kept else 200
    found = corpus([TWO_TURNS], answers="all")
    assert answers_of(found, length, tmp_path) == [expected]


@pytest.mark.parametrize("long", ["cut", "drop"])
def test_answer_that_does_not_fit_is_left_out(long: str, tmp_path: Path) -> None:
    found = corpus([say("a", "y" * 300), say("a", "b")], long=long)
    assert answers_of(found, 40, tmp_path) == [" b<|eos|>"]


def test_error_rule_names_the_conversation_and_its_size(tmp_path: Path) -> None:
    found = corpus([say("a", "b"), say("a", "y" * 300)], long="error")
    with pytest.raises(
        DataError, match=r"conversation 1 needs \d+ tokens, 30\d of them .*length = 40"
    ):
        found.rows("train", TOKENIZER, 40, Cache(tmp_path))


def test_no_remaining_conversation_is_an_error_with_the_numbers(tmp_path: Path) -> None:
    found = corpus([say("a", "y" * 300), say("<|eos|>", "b")])
    with pytest.raises(DataError, match=r"of 2 examples, 1 do not fit .* 1 contain the spelling"):
        found.rows("train", TOKENIZER, 40, Cache(tmp_path))


def test_answer_length_without_end_mark_is_refused(tmp_path: Path) -> None:
    from ddiff.data.tokenizer import LettersTokenizer

    with pytest.raises(ArgumentError, match="the tokenizer has none"):
        corpus([say("a", "b")], answer_length=4).rows(
            "train", LettersTokenizer(), 40, Cache(tmp_path)
        )


def test_training_on_the_validation_conversations_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="all 1 validation documents are in the training text"):
        corpus([say("a", "b")]).check_repetitions(TOKENIZER, 40, Cache(tmp_path))


# ---------------------------------------------------------------------- templates


@pytest.fixture(scope="module")
def chat_folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Folder of a pretrained tokenizer with the special tokens and the template of ChatML."""
    from tokenizers import Tokenizer
    from tokenizers.decoders import ByteLevel as Decoder
    from tokenizers.models import BPE
    from tokenizers.pre_tokenizers import ByteLevel
    from tokenizers.trainers import BpeTrainer
    from transformers import PreTrainedTokenizerFast

    fast = Tokenizer(BPE())
    fast.pre_tokenizer = ByteLevel(add_prefix_space=False)
    fast.decoder = Decoder()
    trainer = BpeTrainer(
        special_tokens=["<|im_start|>", "<|im_end|>"], initial_alphabet=ByteLevel.alphabet()
    )
    fast.train_from_iterator(["user assistant system"], trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=fast, bos_token="<|im_start|>", eos_token="<|im_end|>"
    )
    tokenizer.chat_template = CHATML
    folder = tmp_path_factory.mktemp("tokenizer")
    tokenizer.save_pretrained(folder)
    return str(folder)


def test_template_of_the_tokenizer_is_used_and_saved(chat_folder: str, tmp_path: Path) -> None:
    tokenizer = PretrainedTokenizer.from_pretrained(chat_folder)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    for each in (tokenizer, load_tokenizer(str(tmp_path / "tokenizer.json"))):
        assert find_template(each).source == CHATML
        assert find_template(each, DEFAULT_TEMPLATE).source == DEFAULT_TEMPLATE


def test_special_tokens_of_the_template_become_ids(chat_folder: str) -> None:
    tokenizer = PretrainedTokenizer.from_pretrained(chat_folder)
    encoder = ChatEncoder(tokenizer, find_template(tokenizer))
    (pieces,) = encoder.split(say("hi", "ho"), "last")
    example = encoder.encode(pieces, encoder.encode_texts([piece.text for piece in pieces]))
    start, end = (tokenizer.tokens().index(f"<|im_{name}|>") for name in ("start", "end"))
    assert [example.ids[0], example.ids[-1]] == [start, end]
    # the line end after the last end mark belongs to the template, not to the answer
    scored = [id for id, mark in zip(example.ids, example.marks) if mark == ANSWER]
    assert tokenizer.decode([scored]) == ["ho<|im_end|>"]
    prompt = encoder.encode_prompt(say("hi", "ho")[:1])
    assert example.ids[: len(prompt)] == prompt


def test_message_cannot_write_special_tokens(chat_folder: str) -> None:
    tokenizer = PretrainedTokenizer.from_pretrained(chat_folder)
    encoder = ChatEncoder(tokenizer, find_template(tokenizer))
    assert encoder.has_special(say("ignore<|im_end|>", "x"))
    assert not encoder.has_special(say("ignore", "x"))


LLAMA3 = (
    "{% for message in messages %}<|turn|>{{ message.role }}\n{{ message.content }}<|eot_id|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|turn|>assistant\n{% endif %}"
)


@pytest.fixture
def turn_marks() -> PretrainedTokenizer:
    """Tokenizer whose turns end with another token than its texts, like that of Llama 3.

    Only the definition of the tokenizer declares the marks of turns as special.
    """
    from tokenizers import Tokenizer
    from tokenizers.decoders import ByteLevel as Decoder
    from tokenizers.models import BPE
    from tokenizers.pre_tokenizers import ByteLevel
    from tokenizers.trainers import BpeTrainer
    from transformers import PreTrainedTokenizerFast

    fast = Tokenizer(BPE())
    fast.pre_tokenizer = ByteLevel(add_prefix_space=False)
    fast.decoder = Decoder()
    trainer = BpeTrainer(
        special_tokens=["<|end|>", "<|turn|>", "<|eot_id|>"],
        initial_alphabet=ByteLevel.alphabet(),
    )
    fast.train_from_iterator(["user assistant system"], trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=fast, eos_token="<|end|>")
    tokenizer.chat_template = LLAMA3
    return PretrainedTokenizer(tokenizer)


def test_turn_marks_that_the_library_does_not_list_are_special(
    turn_marks: PretrainedTokenizer,
) -> None:
    assert turn_marks.special_ids == (0, 1, 2)
    (ids,) = turn_marks.encode(["a<|eot_id|>b"])
    assert not set(ids) & {0, 1, 2}
    encoder = ChatEncoder(turn_marks, find_template(turn_marks))
    assert encoder.has_special(say("ignore<|eot_id|>", "x"))
    assert encoder.encode_prompt(say("hi", "ho")[:1]).count(1) == 2


def test_answer_ends_with_the_mark_of_its_turn(turn_marks: PretrainedTokenizer) -> None:
    encoder = ChatEncoder(turn_marks, find_template(turn_marks))
    (pieces,) = encoder.split(say("hi", "ho"), "last")
    example = encoder.encode(pieces, encoder.encode_texts([piece.text for piece in pieces]))
    scored = [id for id, mark in zip(example.ids, example.marks) if mark == ANSWER]
    # neither the line end of the template nor a second end mark belongs to the answer
    assert turn_marks.decode([scored]) == ["ho<|eot_id|>"]


def test_sampled_answer_ends_at_any_special_token(turn_marks: PretrainedTokenizer) -> None:
    ho, junk = turn_marks.encode(["ho", "junk"])
    assert read_answer([*ho, 2, 0, *junk], turn_marks) == "ho"
    assert read_answer([*ho, 0, *junk], turn_marks) == "ho"
    assert read_answer(ho, turn_marks) == "ho"
    assert read_answer([2, *ho], turn_marks) == ""


def test_template_that_rewrites_earlier_messages_is_refused() -> None:
    source = "{{ messages | length }}" + DEFAULT_TEMPLATE
    encoder = ChatEncoder(TOKENIZER, find_template(TOKENIZER, source))
    with pytest.raises(DataError, match="writes the messages before an answer differently"):
        encoder.split(TWO_TURNS, "all")


def test_template_cannot_reach_python_objects() -> None:
    template = ChatTemplate("{{ messages.__class__.__mro__ }}", {})
    with pytest.raises(DataError, match="refuses a conversation"):
        template.render(TWO_TURNS)


def test_refusal_of_a_template_is_reported_with_its_message() -> None:
    template = ChatTemplate("{{ raise_exception('no system role') }}", {})
    with pytest.raises(DataError, match="no system role"):
        template.render(TWO_TURNS)


def test_broken_template_is_a_data_error() -> None:
    with pytest.raises(DataError, match="is not a Jinja template"):
        ChatTemplate("{% for %}", {}).render(TWO_TURNS)


# ---------------------------------------------------------------------- files


def test_json_lines_parquet_and_compressed_files_give_the_same_documents(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    records = [
        {"prompt": f"question {number}", "response": f"answer {number}"} for number in range(40)
    ]
    lines = "\n".join(json.dumps(record) for record in records)
    (tmp_path / "a.jsonl").write_text(lines)
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    pq.write_table(pa.Table.from_pylist(records), tmp_path / "a.parquet")
    messages = [
        {"turns": say(record["prompt"], record["response"]), "extra": 1} for record in records
    ]
    (tmp_path / "b.jsonl").write_text("\n".join(map(json.dumps, messages)))
    fields = ConversationFields(messages="turns")
    found = []
    for name in ("a.jsonl", "a.jsonl.gz", "a.parquet", "b.jsonl"):
        documents = read_conversations([str(tmp_path / name)], fields=fields, held_out=0.2)
        found.append(documents.fingerprint)
        assert len(documents.train) + len(documents.validation) == 40
    assert len(set(found)) == 1


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"question": "a"}, r"line 1 has neither the field \"messages\" nor \"prompt\""),
        ({"messages": []}, "messages must be a list such as"),
        ({"messages": [{"from": "human", "value": "a"}]}, 'the texts "role" and "content"'),
        ({"messages": [{"role": "gpt", "content": "a"}]}, "the role of a message must be one of"),
        ({"messages": say("a", "b")[:1]}, "must have a message of the assistant"),
        ({"prompt": "a", "response": 3}, 'the texts "role" and "content"'),
    ],
)
def test_wrong_record_is_refused_with_its_line(
    record: dict[str, Any], message: str, tmp_path: Path
) -> None:
    (tmp_path / "a.jsonl").write_text(json.dumps(record))
    with pytest.raises(DataError, match=message):
        read_conversations([str(tmp_path / "a.jsonl")])


def test_number_questions_are_distinct_and_correct() -> None:
    documents = make_number_questions(30, 10, largest=10)
    texts = [*documents.train["text"], *documents.validation["text"]]
    assert len(set(texts)) == 40
    for text in texts:
        question, answer = text.split("\n")
        first, second = (int(word.strip("?")) for word in question.split() if word[0].isdigit())
        winner = max(first, second) if "larger" in question else min(first, second)
        assert answer.startswith(f"assistant: {winner} is")
    with pytest.raises(ArgumentError, match="give 180 questions"):
        make_number_questions(180, 1, largest=10)


@pytest.mark.parametrize("content", ["", "\n\n"])
def test_empty_file_is_refused_as_one_without_conversations(content: str, tmp_path: Path) -> None:
    path = tmp_path / "empty.jsonl"
    path.write_text(content)
    with pytest.raises(DataError, match=r"holds no conversation\. Name files that contain conv"):
        read_conversations([str(path)])


def test_few_conversations_that_cannot_be_divided_are_called_conversations(tmp_path: Path) -> None:
    path = tmp_path / "one.jsonl"
    path.write_text('{"prompt": "a", "response": "b"}\n')
    with pytest.raises(DataError, match=r"^1 conversation\(s\) cannot be divided"):
        read_conversations([str(path)])


@pytest.mark.parametrize(
    "template",
    ["{% for %}", "{{ raise_exception('Roles must alternate!') }}", "{{ messages | unknown }}"],
)
def test_messages_about_templates_have_single_end_marks(template: str) -> None:
    with pytest.raises(DataError) as caught:
        ChatTemplate(template, {}).render(say("a", "b"))
    assert not re.search(r"[.!?:]\s*[.!?]", str(caught.value))


def test_message_about_an_unreadable_template_has_single_end_marks(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="Name a file") as caught:
        read_template(str(tmp_path / "nowhere.jinja"))
    assert not re.search(r"\.\W*\. ", str(caught.value))
