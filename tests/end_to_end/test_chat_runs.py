"""Runs of conversations: training, evaluation, samples that answer, and mistakes."""

from __future__ import annotations

import importlib
import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import transformers
from commands import Command
from small import working_in

import ddiff as api
from ddiff.data.chat import ChatCorpus, ChatEncoder
from ddiff.data.chat_template import find_template
from ddiff.errors import ArgumentError
from ddiff.recipe.fields_recipe import require_text_recipe
from ddiff.recipe.resolve import read_recipe
from ddiff.runs.data import RunText
from ddiff.runs.run import Run
from ddiff.runs.text_stages import describe_samples

RECIPE = """
name = "chat"
plugins = ["mdlm", "dit"]
data = { kind = "number_questions", length = 56, answer_length = 14, count = 60, validation = 4 }
tokenizer = { kind = "bpe", size = 300 }
vocabulary = "flat"
process = "mdlm"
denoiser = { kind = "dit", width = 16, layers = 1, heads = 2 }
train = { steps = 6, batch = 4, warmup = 1, checkpoint_every = 6 }
evaluate = { batch = 16 }
sample = { steps = 3, count = 3 }
"""


@pytest.fixture(scope="module")
def chat(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Run]:
    with working_in(tmp_path_factory.mktemp("chat")):
        Path("chat.toml").write_text(RECIPE)
        yield api.run("chat.toml")


@pytest.mark.slow
def test_evaluation_of_answers_is_conditional_and_has_no_perplexity(chat: Run) -> None:
    found = json.loads((chat.run_dir / "evaluation.json").read_text())
    assert found["ppl"] is None
    assert found["bits_per_byte"] is None
    assert found["protocol"]["given"] == "prompts"
    assert "ppl" not in found["figures"]
    answers = [text.split("assistant: ")[1] for text in chat.data.documents.validation["text"]]
    ids = chat.tokenizer.encode([f" {answer}" for answer in answers])
    # one end mark per answer is counted, and neither prompts nor further end marks
    assert found["tokens"] == sum(len(answer) + 1 for answer in ids)


def write_conversations(chat: Run, path: str) -> None:
    """Write the validation conversations of a run as JSON lines, which also have a text."""
    with Path(path).open("w") as file:
        for messages in chat.data.documents.validation["messages"]:
            line = {"text": "other", "messages": json.loads(messages)}
            file.write(json.dumps(line) + "\n")


@pytest.mark.slow
@pytest.mark.parametrize("data", ["chat.toml", "dialogues.jsonl"])
def test_given_conversations_have_the_bound_of_their_answers(
    data: str, chat: Run, ddiff: Command
) -> None:
    write_conversations(chat, "dialogues.jsonl")
    code, out, err = ddiff("eval", str(chat.run_dir), "--data", data)
    assert code == 0, err
    assert "no perplexity of a text" in " ".join(out.split())
    found = json.loads((chat.run_dir / f"evaluation-{Path(data).stem}.json").read_text())
    recorded = json.loads((chat.run_dir / "evaluation.json").read_text())
    for key in ("nelbo_nats_per_token", "tokens", "ppl", "bits_per_byte"):
        assert found[key] == recorded[key]
    assert found["protocol"]["given"] == "prompts"
    assert found["protocol"]["answers"] == "last"


@pytest.mark.slow
def test_given_conversations_have_no_protocol_of_texts(chat: Run, ddiff: Command) -> None:
    code, _, err = ddiff("eval", str(chat.run_dir), "--data", "chat.toml", "--protocol", "ptb")
    assert code != 0
    assert "Leave out --protocol ptb" in " ".join(err.split())


@pytest.mark.slow
def test_given_texts_and_conversations_are_not_mixed(chat: Run, ddiff: Command) -> None:
    write_conversations(chat, "dialogues.jsonl")
    Path("plain.txt").write_text("A text.")
    names = ("--data", "dialogues.jsonl", "--data", "plain.txt")
    code, _, err = ddiff("eval", str(chat.run_dir), *names)
    assert code != 0
    assert "Evaluate them separately" in " ".join(err.split())


@pytest.mark.slow
def test_samples_at_the_end_of_a_run_answer_validation_prompts(chat: Run) -> None:
    lines = [json.loads(line) for line in (chat.run_dir / "samples.jsonl").open()]
    prompts = [text.split("\n")[0] for text in chat.data.documents.validation["text"][:3]]
    assert [f"user: {line['message']}" for line in lines] == prompts
    for line in lines:
        assert line["text"].startswith(f"User: {line['message']}\nAssistant:")
        assert len(line["ids"]) <= 56
        assert "<|eos|>" not in line["answer"]


@pytest.mark.slow
def test_loaded_run_answers_messages_with_its_own_template(chat: Run) -> None:
    loaded = api.load(chat.run_dir)
    turns = [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Ho"},
        {"role": "user", "content": "?"},
    ]
    first, second = loaded.sample(message=["Which?", turns], steps=2)
    assert first["text"].startswith("User: Which?\nAssistant:")
    assert second["text"].startswith("User: Hi\nAssistant: Ho<|eos|>\nUser: ?\nAssistant:")
    # the answer has `answer_length` tokens
    prompt = loaded.tokenizer.encode(["User: Which?\nAssistant:"])[0]
    assert len(first["ids"]) == len(prompt) + 14
    assert first["ids"][: len(prompt)] == prompt


@pytest.mark.slow
def test_sample_command_prints_the_answer(chat: Run, ddiff: Command) -> None:
    code, out, _ = ddiff("sample", str(chat.run_dir), "--message", "Which?", "--steps", "2")
    assert code == 0
    assert {"message", "answer", "text", "ids", "nfe"} <= json.loads(out.splitlines()[0]).keys()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("message", "expected"),
    [
        ("a<|eos|>", "contains the spelling of a special token"),
        ("long " * 30, "a sample has 56 tokens"),
    ],
)
def test_message_that_cannot_be_answered_is_refused(message: str, expected: str, chat: Run) -> None:
    with pytest.raises(ArgumentError, match=expected):
        chat.sample(message=message)


@pytest.mark.slow
def test_message_excludes_a_prompt(chat: Run) -> None:
    with pytest.raises(ArgumentError, match="message excludes prompt and infill"):
        chat.sample(message="a", prompt="b")


@pytest.mark.slow
def test_summary_names_answers_and_suggests_a_message(chat: Run, ddiff: Command) -> None:
    code, out, err = ddiff("run", "chat.toml", "--set", "name=short", "--set", "train.steps=1")
    assert code == 0, err
    assert "tokens of answers in" in out
    assert '`ddiff sample runs/short --message "..."`' in out
    assert "--count" not in out


@pytest.mark.slow
def test_measured_first_loss_of_answers_is_the_expected_one(chat: Run, ddiff: Command) -> None:
    """Filled end marks are scored, but are not counted as tokens."""
    code, out, err = ddiff("run", "chat.toml", "--dry-run", "--measure", "2")
    assert code == 0, err
    assert "Figures per token count the tokens of answers" in out
    assert "WARNING" not in out


@pytest.mark.slow
def test_saved_model_of_conversations_answers_like_its_run(chat: Run, ddiff: Command) -> None:
    assert ddiff("export", "runs/chat", "saved", "--format", "hf").code == 0
    expected = chat.sample(message="Which?", steps=2, seed=4)
    assert api.load("saved").sample(message="Which?", steps=2, seed=4) == expected
    code, out, _ = ddiff("import", "saved", "--out", "runs/again")
    assert code == 0
    assert 'ddiff sample runs/again --message "..."' in out
    arguments = ("--message", "Which?", "--steps", "2", "--seed", "4")
    code, out, _ = ddiff("sample", "runs/again", *arguments)
    assert code == 0
    assert json.loads(out.splitlines()[0])["ids"] == expected[0]["ids"]


@pytest.mark.slow
def test_saved_tokenizer_gives_the_prompts_of_the_run(chat: Run, tmp_path: Path) -> None:
    chat.save_pretrained(tmp_path / "saved")
    importlib.import_module("ddiff.hf")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "saved")
    turns = [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Ho"},
        {"role": "user", "content": "?"},
    ]
    ids = tokenizer.apply_chat_template(
        turns, add_generation_prompt=True, return_tensors="pt", return_dict=False
    )
    encoder = ChatEncoder(chat.tokenizer, find_template(chat.tokenizer))
    assert ids[0].tolist() == encoder.encode_prompt(turns)
    card = (tmp_path / "saved/README.md").read_text()
    assert "gives the prompts of\nddiff, token for token" in card
    model = transformers.AutoModel.from_pretrained(tmp_path / "saved")
    assert "model.generate(ids, length=ids.shape[1] + 14)" in card
    answered = model.generate(ids, length=ids.shape[1] + 14, steps=2)
    assert answered[0, : ids.shape[1]].tolist() == ids[0].tolist()


@pytest.mark.slow
def test_card_of_conversations_says_that_there_is_no_perplexity(chat: Run, tmp_path: Path) -> None:
    chat.save_pretrained(tmp_path / "saved")
    card = " ".join((tmp_path / "saved/README.md").read_text().split())
    assert "those of the answers, given their prompts, in nats per token of the answers" in card
    assert "neither a perplexity of a text nor bits per byte" in card
    assert "The perplexity that is computed from it" not in card
    assert 'run.sample(message="...")' in card


@pytest.mark.slow
def test_card_says_if_transformers_writes_other_prompts(chat: Run, tmp_path: Path) -> None:
    copied = tmp_path / "copied"
    shutil.copytree(chat.run_dir, copied)
    settings = json.loads((copied / "chat.json").read_text())
    # the library does not define this variable for the tokenizer of the run
    settings["template"] = "{{ bos_token is defined }}: {{ messages[0].content }}"
    (copied / "chat.json").write_text(json.dumps(settings))
    api.load(copied).save_pretrained(tmp_path / "saved")
    card = (tmp_path / "saved/README.md").read_text()
    assert "gives other tokens than ddiff" in card
    assert "token for token" not in card


@pytest.mark.slow
def test_data_command_refuses_conversations(chat: Run, ddiff: Command) -> None:
    code, _, err = ddiff("data", "chat.toml")
    assert code != 0
    assert "conversations have no token shards" in err


@pytest.mark.slow
@pytest.mark.parametrize("is_loaded", [False, True])
def test_saved_model_answers_messages_as_its_run(
    is_loaded: bool, chat: Run, tmp_path: Path
) -> None:
    run = api.load(chat.run_dir) if is_loaded else chat  # only the latter has read its documents
    run.save_pretrained(tmp_path / "saved")
    saved = api.load(tmp_path / "saved")
    assert saved.sample(message="Which?", steps=2) == run.sample(message="Which?", steps=2)
    loaded = api.load(chat.run_dir)
    assert saved.data.text.chat_settings() == loaded.data.text.chat_settings()


@pytest.mark.slow
def test_run_directory_keeps_the_rules_of_conversations(chat: Run, tmp_path: Path) -> None:
    settings = ['data.long="drop"', 'data.answers="each"', f'run_dir="{tmp_path}"']
    recipe = require_text_recipe(read_recipe("chat.toml", settings), "test")
    written = RunText(recipe, chat.tokenizer)
    assert isinstance(written.documents, ChatCorpus)
    written.save_chat(tmp_path)
    read = RunText(recipe, chat.tokenizer).chat_settings()  # has not read its documents
    for rule in ("answers", "answer_length", "long"):
        assert getattr(read, rule) == getattr(written.chat_settings(), rule)


@pytest.mark.slow
def test_words_of_prompts_are_not_counted_as_words_of_answers(chat: Run) -> None:
    lines = [json.loads(line) for line in (chat.run_dir / "samples.jsonl").open()]
    prompt = lines[0]["message"]
    strange = [{**line, "answer": "qqq zzz"} for line in lines]
    assert describe_samples(chat, strange).startswith("0% of the words of their answers")
    known = [{**line, "answer": prompt} for line in lines]
    assert describe_samples(chat, known).startswith("100% of the words of their answers")
