"""`ddiff import`: run directories, tokenizers and refusals."""

from __future__ import annotations

import errno
import json
from pathlib import Path

import pytest
from commands import Command, is_refusal
from imports import OPTIONS, SETTINGS, import_run
from reference_forward import SYMBOLS, TOKENS, write_family
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import ddiff as api
from ddiff import CheckpointError, DataError
from ddiff.checkpoint.checkpoints import Checkpoints
from ddiff.data.tokenizer import PretrainedTokenizer, load_tokenizer


def write_tokenizer(folder: Path, size: int = TOKENS, **roles: str) -> Path:
    """Write a tokenizer of `size` words: the symbols, and further words after them."""
    words = [*SYMBOLS, "[MASK]", *(f"word{number}" for number in range(400))][:size]
    model = models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="a")
    made = Tokenizer(model)
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=made, unk_token="a", **roles)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("family", ["mdlm", "bd3lm", "hybrid_epsilon", "duo_ar"])
def test_imported_run_samples_evaluates_and_reports(
    folder: Path, ddiff: Command, family: str
) -> None:
    write_family(Path("published"), family)
    code, out, _ = ddiff("import", "published", "--out", "runs/mine", *OPTIONS)
    assert code == 0
    assert f"layout             {family} (ddiff_dit" in out
    assert "ddiff sample runs/mine" in out
    code, out, _ = ddiff("sample", "runs/mine", "--count", "2")
    samples = [json.loads(line) for line in out.splitlines()]
    assert code == 0
    assert [len(sample["ids"]) for sample in samples] == [8, 8]
    assert ddiff("eval", "runs/mine")[0] == 0
    evaluation = json.loads(Path("runs/mine/evaluation.json").read_text())
    assert evaluation["step"] == 0
    bound = evaluation["bound"].lower()
    assert evaluation[f"{bound}_nats_per_symbol"] > 1.0
    assert ddiff("report", "runs/mine", "--out", "report.html")[0] == 0
    page = Path("report.html").read_text()
    assert f"Imported from published by the layout {family} (ddiff_dit" in page


def test_compare_lists_imports_and_asks_for_their_evaluation(folder: Path, ddiff: Command) -> None:
    for number in range(2):
        write_family(Path(f"published{number}"), "mdlm", seed=number)
        import_run(Path(f"published{number}"), f"runs/import{number}")
    places = ("runs/import0", "runs/import1")
    assert is_refusal(ddiff("compare", *places), "has no evaluation.json", "ddiff eval runs/import")
    for place in places:
        assert ddiff("eval", place)[0] == 0
    code, out, _ = ddiff("compare", *places)
    assert code == 0
    rows = api.compare(list(places)).rows
    assert [row.run for row in rows] == ["import0", "import1"]
    assert {(row.tokens_seen, row.train_seconds, row.sample_seconds) for row in rows} == {
        (None, None, None)
    }
    assert "import0" in out


def test_origin_records_files_layout_and_notes(folder: Path) -> None:
    write_family(Path("published"), "hybrid_epsilon")
    imported = api.import_published("published", "runs/mine", settings=SETTINGS)
    origin = json.loads(Path("runs/mine/origin.json").read_text())
    assert origin["source"] == "published"
    assert origin["layout"].startswith("hybrid_epsilon (ddiff_dit")
    assert set(origin["files"]) == {"config.json", "model.safetensors"}
    assert origin["notes"] == list(imported.origin.notes)
    assert "gives the mask a probability of at most" in origin["notes"][0]
    assert imported.parameters == sum(
        parameter.numel() for parameter in api.load("runs/mine").denoiser.parameters()
    )


def test_existing_directory_is_refused_unless_fresh(folder: Path, ddiff: Command) -> None:
    write_family(Path("published"), "mdlm")
    arguments = ("import", "published", "--out", "runs/mine", *OPTIONS)
    Path("runs/mine").mkdir(parents=True)
    assert ddiff(*arguments)[0] == 0  # the directory was empty
    before = Path("runs/mine/origin.json").stat().st_mtime_ns
    assert is_refusal(ddiff(*arguments), "runs/mine exists and is not empty", "--fresh")
    assert Path("runs/mine/origin.json").stat().st_mtime_ns == before
    assert ddiff(*arguments, "--fresh")[0] == 0
    Path("runs/mine/thesis.txt").write_text("mine")
    assert is_refusal(ddiff(*arguments, "--fresh"), "thesis.txt", "did not write")
    assert Path("runs/mine/thesis.txt").read_text() == "mine"
    assert [path.name for path in Path("runs").iterdir()] == ["mine"]


def test_failed_import_leaves_the_existing_run(folder: Path, ddiff: Command) -> None:
    write_family(Path("published"), "mdlm")
    assert ddiff("import", "published", "--out", "runs/mine", *OPTIONS)[0] == 0
    Path("published/model.safetensors").write_bytes(b"\0" * 100)
    result = ddiff("import", "published", "--out", "runs/mine", "--fresh", *OPTIONS)
    assert is_refusal(result, "is damaged or incomplete")
    assert api.load("runs/mine").step == 0


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(errno.ENOSPC, "No space left")])
def test_interrupted_import_leaves_no_file(
    folder: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    write_family(Path("published"), "mdlm")

    def fail(*arguments: object) -> None:
        assert [path.name for path in Path("runs").glob("*.partial-*")] != []
        raise error

    monkeypatch.setattr(Checkpoints, "save", fail)
    with pytest.raises((KeyboardInterrupt, CheckpointError)):
        api.import_published("published", "runs/mine", settings=SETTINGS)
    assert [path.name for path in folder.iterdir() if path.name != "published"] in ([], ["runs"])
    assert list(folder.glob("runs/*")) == []


def test_run_refuses_to_train_in_the_directory_of_an_import(folder: Path, ddiff: Command) -> None:
    write_family(Path("published"), "mdlm")
    import_run(Path("published"))
    Path("again.toml").write_text(Path("runs/imported/recipe.toml").read_text())
    result = ddiff("run", "again.toml")
    assert is_refusal(result, "`ddiff import` read from published", "init = { run =")
    assert Path("runs/imported/origin.json").exists()


def test_export_command_writes_a_folder_that_import_reads(folder: Path, ddiff: Command) -> None:
    write_family(Path("published"), "mdlm")
    import_run(Path("published"))
    code, out, _ = ddiff("export", "runs/imported", "out", "--format", "mdlm")
    assert (code, out) == (0, "out: the trained weights of step 0 of runs/imported, layout mdlm\n")
    assert sorted(path.name for path in Path("out").iterdir()) == [
        "config.json",
        "model.safetensors",
    ]
    assert ddiff("import", "out", "--out", "runs/again", *OPTIONS)[0] == 0
    result = ddiff("export", "runs/imported", "out", "--format", "mdlm")
    assert is_refusal(result, "new or empty", "Use another folder")
    result = ddiff("export", "runs/imported", "other", "--format", "mdlmm")
    assert is_refusal(result, "no layout 'mdlmm'", 'Did you mean "mdlm"?')
    result = ddiff("export", "runs/imported", "other", "--format", "hybrid_epsilon")
    assert is_refusal(result, "[process] kind = 'hybrid_epsilon'; got 'mdlm'")
    assert not Path("other").exists()


def test_unknown_layout_is_refused_with_a_suggestion(folder: Path, ddiff: Command) -> None:
    write_family(Path("published"), "mdlm")
    result = ddiff("import", "published", "--out", "runs/mine", "--layout", "mdml", *OPTIONS)
    assert is_refusal(result, "--layout: there is no layout 'mdml'", 'Did you mean "mdlm"?')


# ---------------------------------------------------------------------- tokenizer


def test_tokenizer_in_the_folder_of_the_checkpoint_is_used(folder: Path, ddiff: Command) -> None:
    write_family(Path("published"), "mdlm")
    write_tokenizer(Path("published"))
    assert ddiff("import", "published", "--out", "runs/mine")[0] == 0
    run = api.load("runs/mine")
    assert run.tokenizer.tokens() == list(SYMBOLS)
    assert run.tokenizer.encode(["c a b"]) == [[2, 0, 1]]
    # The bundled novels are the data, so that the evaluation works without further settings.
    assert run.recipe.data.component.name == "bundled"


def test_offline_import_without_tokenizer_names_the_option(folder: Path, ddiff: Command) -> None:
    write_family(Path("published"), "mdlm")
    result = ddiff("import", "published", "--out", "runs/mine")
    assert is_refusal(result, "'gpt2'", "--tokenizer FOLDER", "has no tokenizer")
    assert not Path("runs").exists()
    write_tokenizer(Path("words"))
    code, out, _ = ddiff("import", "published", "--out", "runs/mine", "--tokenizer", "words")
    assert (code, "tokenizer          words, 11 tokens" in out) == (0, True)


def test_missing_folder_of_the_tokenizer_option_is_named(folder: Path, ddiff: Command) -> None:
    write_family(Path("published"), "mdlm")
    result = ddiff("import", "published", "--out", "runs/mine", "--tokenizer", "nofolder")
    assert is_refusal(result, "The folder nofolder of --tokenizer does not exist")
    assert "has no tokenizer" not in result.err
    assert not Path("runs").exists()


@pytest.mark.parametrize(
    ("size", "reason"),
    [(5, "has 5 tokens"), (12, "'[MASK]' with the id 11"), (410, "with the id")],
)
def test_tokenizer_of_another_size_is_refused(
    folder: Path, ddiff: Command, size: int, reason: str
) -> None:
    write_family(Path("published"), "mdlm")
    write_tokenizer(Path("words"), size)
    result = ddiff("import", "published", "--out", "runs/mine", "--tokenizer", "words")
    assert is_refusal(result, reason, "--tokenizer FOLDER")
    assert not Path("runs").exists()


def test_tokenizer_setting_of_another_size_is_refused(folder: Path, ddiff: Command) -> None:
    write_family(Path("published"), "mdlm")
    setting = '--set=tokenizer={kind="alphabet", symbols="abc"}'
    result = ddiff("import", "published", "--out", "runs/mine", setting)
    assert is_refusal(result, "The tokenizer has 3 tokens, but the network has 11")
    assert not Path("runs").exists()


def test_num_tokens_drops_an_added_mask(folder: Path) -> None:
    write_tokenizer(Path("words"), TOKENS + 1, mask_token="[MASK]")
    whole = PretrainedTokenizer.from_pretrained("words")
    assert whole.num_tokens == TOKENS + 1
    dropped = PretrainedTokenizer.from_pretrained("words", num_tokens=TOKENS)
    assert dropped.tokens() == list(SYMBOLS)
    assert TOKENS not in dropped.special_ids
    assert dropped.fingerprint != whole.fingerprint
    dropped.save("saved.json")
    again = load_tokenizer("saved.json")
    assert (again.num_tokens, again.fingerprint) == (TOKENS, dropped.fingerprint)


def test_num_tokens_adds_a_few_unused_ids(folder: Path) -> None:
    write_tokenizer(Path("words"), 400)
    padded = PretrainedTokenizer.from_pretrained("words", num_tokens=403)
    assert padded.special_ids == (0, 400, 401, 402)  # the unknown token, and the unused ids
    assert padded.decode([[1, 402]]) == ["b"]
    with pytest.raises(DataError, match="At most 6 ids may have no token"):
        PretrainedTokenizer.from_pretrained("words", num_tokens=407)


def test_num_tokens_refuses_text_with_a_dropped_token(folder: Path) -> None:
    """The mask of this tokenizer is an added token that may occur in text."""
    write_tokenizer(Path("words"))
    tokenizer = PretrainedTokenizer.from_pretrained("words")._tokenizer
    tokenizer.add_tokens(["[GAP]"])
    tokenizer.save_pretrained("words")
    dropped = PretrainedTokenizer.from_pretrained("words", num_tokens=TOKENS)
    assert dropped.encode(["a b"]) == [[0, 1]]
    with pytest.raises(DataError, match=r"'\[GAP\]', which cannot be tokenized"):
        dropped.encode(["a", "b [GAP]"])
