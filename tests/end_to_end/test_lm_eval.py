"""Evaluation of runs by the lm-evaluation-harness, on tasks that the tests define."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from functools import partialmethod
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from commands import Command, refusal
from exact import exact_network, ids_of, row_nats
from small import CORPUS, working_in
from torch import Tensor

import ddiff as api
from ddiff.core.times import FlatTimes, Noisy, TimeRule, WindowTimes
from ddiff.data.tokenizer import BytePairTokenizer
from ddiff.errors import ArgumentError, DataError
from ddiff.evaluation.chain_rule import chain_rule_nll
from ddiff.evaluation.conditional import ConditionalScorer, Continuation, error_of_draws
from ddiff.evaluation.likelihood import Scored
from ddiff.lm_eval import main
from ddiff.nn.network import as_network
from ddiff.progress import show_progress
from ddiff.run_dir.evaluation_record import EvaluationRecord
from ddiff.runs.lm_eval import harness
from ddiff.runs.lm_eval.requests import Encoder, Limits, make_generation, split_windows
from ddiff.runs.lm_eval.scoring import Request, RequestScorer, Settings
from ddiff.runs.run import Run

LENGTH = 24
RECIPE = """
name = "NAME"
plugins = ["ar", "mdlm", "hdlm", "dit"]

[data]
kind = "text"
files = ["corpus.txt"]
split = "line"
held_out = 0.2
length = 24

[tokenizer]
kind = "bpe"
size = 270

[vocabulary]
kind = "flat"

[denoiser]
kind = "dit"
width = 16
layers = 1
heads = 2
time = false
head = "tokens"

[train]
steps = 40
batch = 8
warmup = 3

[evaluate]
batch = 16

[sample]
steps = 4
"""
CHOICE = """
task: toy_choice
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: "{{choices}}"
doc_to_target: "{{answer}}"
metric_list:
  - metric: acc
  - metric: acc_norm
"""
LAST = """
task: toy_last
output_type: loglikelihood
doc_to_text: "{{question}}"
doc_to_target: " {{choices[0]}}"
metric_list:
  - metric: perplexity
  - metric: acc
"""
ROLLING = """
task: toy_rolling
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list:
  - metric: byte_perplexity
  - metric: bits_per_byte
"""
GENERATED = """
task: toy_generated
output_type: generate_until
doc_to_text: "{{question}}"
doc_to_target: "{{choices[0]}}"
generation_kwargs:
  until: [" on"]
  max_gen_toks: 8
metric_list:
  - metric: exact_match
"""
TASKS = ["toy_choice", "toy_last", "toy_rolling", "toy_generated"]
DOCUMENTS = [
    {
        "question": "the old cat sat on",
        "choices": ["the x", "dog z", "cat cat"],
        "answer": 0,
        "text": "the old cat sat on the x. the red hat sat on the b, the old hat",
    },
    {"question": "the red hat", "choices": ["sat on", "on"], "answer": 1, "text": "the old hat"},
    {"question": "the", "choices": ["old", "hat", "on"], "answer": 2, "text": "sat on the c"},
]
NEEDS = "lm-eval is not installed: pip install 'discrete-diffusion[lm-eval]'"


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Folder with the runs `exact` and `masked`, and the folder `tasks` of task definitions."""
    folder = tmp_path_factory.mktemp("harness")
    with working_in(folder):
        Path("corpus.txt").write_text(CORPUS)
        exact = RECIPE + 'sampler = "left_to_right"\n\n[objective]\nkind = "ar"\n'
        Path("exact.toml").write_text(exact.replace("NAME", "exact"))
        masked = RECIPE.replace("NAME", "masked") + '\n[process]\nkind = "mdlm"\n'
        Path("masked.toml").write_text(masked)
        api.run("exact.toml")
        api.run("masked.toml")
        Path("tasks").mkdir()
        rows = "".join(json.dumps(document) + "\n" for document in DOCUMENTS)
        Path("tasks/documents.jsonl").write_text(rows)
        data = (
            "dataset_path: json\ndataset_kwargs:\n  data_files: "
            f"{folder}/tasks/documents.jsonl\ntest_split: train\nmetadata:\n  version: 1\n"
        )
        for name, text in zip(TASKS, (CHOICE, LAST, ROLLING, GENERATED)):
            Path(f"tasks/{name}.yaml").write_text(text + data)
        yield folder


@pytest.fixture(scope="module")
def exact(runs: Path) -> Run:
    return api.load(runs / "runs/exact")


@pytest.fixture(scope="module")
def masked(runs: Path) -> Run:
    return api.load(runs / "runs/masked")


@pytest.fixture(autouse=True)
def _few_tasks(runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Index only the tasks of the tests: indexing those of the harness takes many seconds."""
    monkeypatch.chdir(runs)
    monkeypatch.setenv("HF_DATASETS_CACHE", str(runs / "datasets"))

    def make_manager(options: harness.TaskOptions) -> Any:
        from lm_eval.tasks import TaskManager

        return TaskManager(include_path=options.include_path, include_defaults=False)

    monkeypatch.setattr(harness, "_make_manager", make_manager)


def pairs(*texts: tuple[str, str]) -> list[Request]:
    return [Request("toy", number, text) for number, text in enumerate(texts)]


def log_probs(run: Run, ids: Sequence[int]) -> Tensor:
    """Return ln p(next token | ids) [V] of an autoregressive run, from one network evaluation."""
    zt = torch.tensor([[*ids, 0]])
    noisy = Noisy(zt, torch.zeros(zt.shape).double(), torch.ones_like(zt, dtype=torch.bool))
    run.denoiser.eval()
    query = as_network(run.denoiser)(noisy)
    last = torch.tensor([len(ids)])
    root = torch.tensor([run.vocabulary.root])
    found: Tensor = query(last, root, lambda dist: dist.log_mass(0))[0].double()
    return found.log_softmax(-1)


def chain(run: Run, context: Sequence[int], tokens: Sequence[int]) -> tuple[float, bool]:
    """Return ln p(tokens | context), and whether each token is the most likely one."""
    total = 0.0
    is_greedy = True
    before = list(context)
    for token in tokens:
        found = log_probs(run, before)
        total += float(found[token])
        is_greedy = is_greedy and int(found.argmax()) == token
        before.append(token)
    return total, is_greedy


# ---------------------------------------------------------------------- exact likelihood


def test_exact_loglikelihoods_equal_a_product_of_next_token_probabilities(exact: Run) -> None:
    """Up to float32 rounding: the counterpart evaluates rows of other lengths."""
    texts = [("the old cat", " sat on"), ("", "the red"), ("the red hat sat ", "on the x")]
    scorer = RequestScorer(exact, Settings())
    encoder = Encoder(exact.tokenizer)
    for (nats, is_greedy), text in zip(scorer.score_pairs(pairs(*texts)), texts):
        context, tokens = encoder.encode_pair(*text, "text")
        assert (context, tokens) != ((), ())
        expected, likely = chain(exact, context, tokens)
        assert nats == pytest.approx(expected, rel=1e-4)
        assert is_greedy == likely
    assert scorer.errors["toy"].to_dict()["standard_error_nats"] is None


def test_greedy_flag_is_true_for_the_most_likely_continuation(exact: Run) -> None:
    ids = list(exact.tokenizer.encode(["the old"])[0])
    context = list(ids)
    for _ in range(3):
        ids.append(int(log_probs(exact, ids).argmax()))
    text = exact.tokenizer.decode([ids])[0]
    continuation = text.removeprefix("the old")
    scorer = RequestScorer(exact, Settings())
    assert exact.tokenizer.encode([text])[0] == ids, "the text has other tokens"
    assert scorer.score_pairs(pairs(("the old", continuation)))[0][1]
    other = chain(exact, context, exact.tokenizer.encode([" x"])[0])
    assert not other[1]
    assert not scorer.score_pairs(pairs(("the old", " x")))[0][1]


def test_exact_rolling_loglikelihood_is_the_sum_over_windows(exact: Run) -> None:
    text = DOCUMENTS[0]["text"]
    ids = exact.tokenizer.encode([text])[0]
    assert len(ids) > LENGTH
    expected = sum(chain(exact, *window)[0] for window in split_windows(tuple(ids), LENGTH))
    found = RequestScorer(exact, Settings()).score_documents([Request("toy", 0, (text,))])
    assert found == [pytest.approx(expected, rel=1e-4)]


# ---------------------------------------------------------------------- bound


def test_bound_of_a_masked_run_agrees_with_the_chain_rule(masked: Run) -> None:
    """The chain rule sums over the orders of the continuation; the context is always clean.

    The end terms of the window [0.001, 0.999] change the mean by less than 0.02 nats.
    """
    scorer = RequestScorer(masked, Settings(draws=600, batch=512))
    context, tokens = scorer.encoder.encode_pair("the old cat", " sat on the x", "text")
    tokens = tokens[:5]
    plain = as_network(masked.denoiser, masked.process)
    masked.denoiser.eval()

    def network(noisy: Noisy) -> Any:
        before = torch.tensor(context).expand(len(noisy.zt), -1)
        clean = torch.ones_like(before, dtype=torch.bool)
        whole = Noisy(
            torch.cat([before, noisy.zt], 1),
            torch.cat([torch.zeros(before.shape).double(), noisy.t], 1),
            torch.cat([clean, noisy.clean], 1),
        )
        query = plain(whole)

        def shifted(rows: Tensor, *arguments: Any) -> Any:
            size = noisy.zt.shape[1]
            place = rows // size * whole.zt.shape[1] + len(context) + rows % size
            return query(place, *arguments)

        return shifted

    assert masked.process is not None
    found = chain_rule_nll(network, masked.process, torch.tensor([tokens]))
    nats = scorer._score([Continuation(context, tokens, "q")])
    error = float(error_of_draws(nats)[0])
    assert abs(float(nats.mean()) - float(found.bound)) < 4 * error + 0.02
    assert float(nats.mean()) > float(found.nll) - 4 * error


def test_answers_of_one_question_share_random_numbers_and_questions_do_not(masked: Run) -> None:
    scorer = RequestScorer(masked, Settings(draws=4))
    answers = [
        Request("toy", 0, ("the old", " cat")),
        Request("toy", 0, ("the old", " cat")),
        Request("toy", 1, ("the old", " cat")),
    ]
    first, second, third = (nats for nats, _ in scorer.score_pairs(answers))
    assert first == pytest.approx(second, rel=1e-5)  # rows of one batch, up to rounding
    assert first != pytest.approx(third, rel=1e-3)


def test_answers_do_not_depend_on_the_batch(masked: Run) -> None:
    requests = pairs(("the old cat", " sat on"), ("the red", " hat"))
    first, second = (
        RequestScorer(masked, Settings(draws=8, batch=size)).score_pairs(requests)
        for size in (3, 64)
    )
    assert [nats for nats, _ in first] == pytest.approx([nats for nats, _ in second], rel=1e-4)


@pytest.mark.parametrize(
    "rule",
    [
        FlatTimes(),
        WindowTimes(3, "block", paired=True),
        WindowTimes(3, "slide", paired=True),
    ],
    ids=["flat", "blocks", "slide"],
)
def test_conditional_bound_holds_for_every_time_rule(rule: TimeRule) -> None:
    """With exact predictions the bound of each row is its -ln p, up to the end cost.

    The end terms take the positions of a block as independent, which changes the mean by less than
    0.02 nats in the window [0.001, 0.999]. The context ends within a block of 3 positions.
    """
    process = api.MixtureProcess(
        api.FlatVocabulary(4), api.LinearSchedule(), api.mask_distribution(api.FlatVocabulary(4))
    )
    source = api.MarkovSource(4, peakedness=1.0, seed=4)
    rows = ids_of(source, 3, 16)
    objective = OfNetwork(process, exact_network(process, source))
    scorer = ConditionalScorer(
        objective,
        lambda tokens: rule.with_window(1e-3, 0.999, tokens),
        longest=16,
        draws=1600,
        batch=2048,
    )
    continuations = [
        Continuation(tuple(row[:4]), tuple(row[4:]), str(number))
        for number, row in enumerate(rows.tolist())
    ]
    with show_progress(None, "scoring") as bar:
        nats = scorer.score(continuations, bar)
    exact = (row_nats(source, rows) - row_nats(source, rows[:, :4])).numpy()
    assert np.all(np.abs(nats.mean(-1) - exact) < 4 * error_of_draws(nats) + 0.02)
    assert float(error_of_draws(nats).max()) < 0.1 * exact.min()


class OfNetwork(Scored):
    """Objective with a given network in place of a denoiser."""

    def __init__(self, process: api.ForwardProcess, network: api.Network) -> None:
        self.process = process
        self.network = network

    def nll(self, batch: Any, rng: Any, slot: Tensor, slots: Any, times: Any) -> api.Likelihood:
        terms = api.nelbo(
            self.process, self.network, batch.ids, batch.scored, times, rng, slot, slots
        )
        return api.Likelihood(terms.by_name(), {})


def test_conditions_of_a_run_are_given_for_all_requests(labelled: Run) -> None:
    request = pairs(("ab", "ba"))
    free = RequestScorer(labelled, Settings(draws=2, greedy="never")).score_pairs(request)
    given = Settings(draws=2, greedy="never", conditions={"kind": 1})
    assert RequestScorer(labelled, given).score_pairs(request) != free
    with pytest.raises(ArgumentError, match="conditions"):
        RequestScorer(labelled, Settings(conditions={"kinds": 1}))


# ---------------------------------------------------------------------- generation


def test_generated_text_is_the_sample_cut_at_size_and_stop_string(exact: Run) -> None:
    whole = exact.sample(prompt="the old", settings=["temperature=0"])[0]
    ids = exact.tokenizer.encode(["the old"])[0]
    rest = whole["ids"][len(ids) :]
    if exact.tokenizer.eos_id in rest:
        rest = rest[: rest.index(exact.tokenizer.eos_id)]
    assert len(rest) > 4
    scorer = RequestScorer(exact, Settings())
    requests = [
        Request("toy", 0, ("the old", {"max_gen_toks": 3, "until": []})),
        Request("toy", 1, ("the old", {"max_gen_toks": 12, "until": [" on"]})),
    ]
    expected = [
        exact.tokenizer.decode([rest[:3]])[0],
        exact.tokenizer.decode([rest[:12]])[0].split(" on")[0],
    ]
    assert scorer.generate(requests) == expected


def test_generation_arguments_become_settings_of_the_sampler(exact: Run) -> None:
    encoder = Encoder(exact.tokenizer)
    limits = Limits(LENGTH, False)

    def settings(**options: Any) -> tuple[str, ...]:
        return make_generation("the", options, "text", encoder, limits).settings

    assert settings() == ("temperature=0.0",)
    assert settings(do_sample=True) == ("temperature=1.0",)
    assert settings(do_sample=True, temperature=0.7, top_k=5) == ("temperature=0.7", "top_k=5")
    assert settings(do_sample=False, temperature=0.7) == ("temperature=0.0",)
    made = make_generation("the", {"max_new_tokens": 4, "until": "x"}, "text", encoder, limits)
    assert (made.size, made.until) == (4, ("x",))
    free = make_generation("the", {}, "text", encoder, limits)
    assert free.size == LENGTH - len(free.template.ids)
    with pytest.raises(ArgumentError, match="'num_beams'"):
        settings(num_beams=4)


# ---------------------------------------------------------------------- requests


def test_windows_score_each_token_once_by_the_rule_of_the_harness() -> None:
    """The prefix token of the harness is here the first token, which is scored too."""
    utils = pytest.importorskip("lm_eval.utils", reason=NEEDS)
    for length in (2, 3, 8):
        for size in range(1, 30):
            ids = tuple(range(size))
            windows = split_windows(ids, length)
            assert tuple(token for _, tokens in windows for token in tokens) == ids
            assert max(len(context) + len(tokens) for context, tokens in windows) <= length
            rolled = utils.get_rolling_token_windows(list(ids[1:]), ids[0], length - 1, 1)
            expected = [utils.make_disjoint_window(window) for window in rolled]
            if expected:
                context, tokens = expected[0]
                expected[0] = ([], context + tokens)
            found = [(list(context), list(tokens)) for context, tokens in windows]
            assert found == (expected or [([], list(ids))])


def test_pairs_are_encoded_as_the_harness_encodes_them(exact: Run) -> None:
    model = pytest.importorskip("lm_eval.api.model", reason=NEEDS)

    class Harness(model.TemplateLM):  # type: ignore[name-defined]
        tokenizer = exact.tokenizer

        def tok_encode(self, string: str, **kwargs: Any) -> list[int]:
            return exact.tokenizer.encode([string])[0]

        eot_token_id = _loglikelihood_tokens = loglikelihood_rolling = generate_until = None

    encoder = Encoder(exact.tokenizer)
    for pair in (("the old", " cat sat"), ("the old ", "cat"), ("the", "re"), ("a\n\n", " the")):
        context, tokens = encoder.encode_pair(*pair, "text")
        assert Harness()._encode_pair(*pair) == (list(context), list(tokens))


def test_requests_that_do_not_fit_are_refused_and_contexts_may_be_truncated(exact: Run) -> None:
    long = " ".join(["the old cat sat on"] * 8)
    with pytest.raises(ArgumentError, match=r"document 0: context and continuation.*--truncate"):
        RequestScorer(exact, Settings()).score_pairs(pairs((long, " the x")))
    scorer = RequestScorer(exact, Settings(truncate=True))
    nats, _ = scorer.score_pairs(pairs((long, " the x")))[0]
    context, tokens = scorer.encoder.encode_pair(long, " the x", "text")
    room = LENGTH - len(tokens)
    assert nats == pytest.approx(chain(exact, context[-room:], tokens)[0], rel=1e-4)
    assert scorer.num_truncated == 1
    with pytest.raises(ArgumentError, match="the continuation has"):
        scorer.score_pairs(pairs(("the", long)))
    with pytest.raises(ArgumentError, match="from 1 to 24"):
        scorer.generate([Request("toy", 0, ("the", {"max_gen_toks": 25}))])
    too_long = [Request("toy", 0, (long, {"max_gen_toks": 4}))]
    with pytest.raises(ArgumentError, match="the context has"):
        RequestScorer(exact, Settings()).generate(too_long)
    with pytest.raises(DataError, match="adds no token"):
        scorer.score_pairs(pairs(("the", "")))


def test_texts_that_the_tokenizer_changes_are_counted(exact: Run) -> None:
    class Lower:
        """Tokenizer that changes upper case to lower case."""

        def __init__(self, inner: BytePairTokenizer) -> None:
            self.inner = inner

        def encode(self, texts: Sequence[str]) -> list[list[int]]:
            return self.inner.encode([text.lower() for text in texts])

        def decode(self, ids: Sequence[Sequence[int]]) -> list[str]:
            return self.inner.decode(ids)

    encoder = Encoder(Lower(exact.tokenizer))  # type: ignore[arg-type]
    encoder.encode_document("The", "text")
    encoder.encode_pair("the", " cat", "text")
    assert encoder.num_lossy == 1


# ---------------------------------------------------------------------- tasks


def test_record_of_tasks_holds_the_figures_of_the_harness(runs: Path, masked: Run) -> None:
    pytest.importorskip("lm_eval", reason=NEEDS)
    record = masked.lm_eval(TASKS, draws=4, include_path="tasks", steps=3)
    path = masked.run_dir / "lm-eval-toy_choice_toy_last_toy_rolling_toy_generated.json"
    saved = json.loads(path.read_text())
    assert saved == json.loads(json.dumps(record))
    checked = EvaluationRecord.from_tree(saved)
    assert checked.figures["toy_choice: acc"].unit == "share"
    assert checked.figures["toy_choice: acc"].protocol.endswith("bound of 4 draws, 0 examples")
    assert checked.protocol["likelihood"] == "bound"
    assert set(checked.fingerprints) >= {"weights", "tokenizer", "vocabulary"}

    # the accuracy by hand, from the likelihoods of the same random numbers
    scorer = RequestScorer(masked, Settings(draws=4))
    requests = []
    for number, document in enumerate(DOCUMENTS):
        for answer in document["choices"]:
            pair = (document["question"], f" {answer}")
            requests.append(Request("toy_choice", number, pair))
    nats = iter([nats for nats, _ in scorer.score_pairs(requests)])
    hits = []
    for document in DOCUMENTS:
        answers = [next(nats) for _ in document["choices"]]
        hits.append(int(np.argmax(answers)) == document["answer"])
    assert record["results"]["toy_choice"]["acc,none"] == pytest.approx(sum(hits) / 3)
    errors = record["monte_carlo"]
    assert errors["toy_choice"]["questions"] == 3
    assert errors["toy_choice"]["standard_error_nats"] > 0

    # bits per byte by hand, with the relative Monte-Carlo error of the nats
    documents = [Request("toy_rolling", n, (doc["text"],)) for n, doc in enumerate(DOCUMENTS)]
    total = -sum(scorer.score_documents(documents))
    num_bytes = sum(len(doc["text"].encode()) for doc in DOCUMENTS)
    bits = record["results"]["toy_rolling"]["bits_per_byte,none"]
    assert bits == pytest.approx(total / num_bytes / np.log(2), rel=1e-5)
    low, high = errors["toy_rolling"]["metrics"]["bits_per_byte,none"]
    half = errors["toy_rolling"]["half_width_nats"] / num_bytes / np.log(2)
    assert (high - low) / 2 == pytest.approx(half, rel=1e-5)


def test_model_of_the_harness_gives_the_figures_of_run_lm_eval(runs: Path, exact: Run) -> None:
    lm_eval = pytest.importorskip("lm_eval", reason=NEEDS)
    import ddiff.runs.lm_eval.model  # noqa: F401  # registers the model

    ours = exact.lm_eval(TASKS, include_path="tasks", out=str(runs / "exact.json"))
    options = harness.TaskOptions(include_path="tasks")
    theirs = lm_eval.simple_evaluate(
        model="ddiff",
        model_args=f"run={exact.run_dir},batch=2",
        tasks=TASKS,
        task_manager=harness._make_manager(options),
        batch_size=1,
        device="cuda:0",
        log_samples=False,
    )
    for task in TASKS:
        for name, value in ours["results"][task].items():
            if isinstance(value, float) and "stderr" not in name:
                assert theirs["results"][task][name] == pytest.approx(value, rel=1e-4)
    assert theirs["config"]["ddiff"]["protocol"]["likelihood"] == "exact"
    assert theirs["config"]["ddiff"]["monte_carlo"]["toy_choice"]["requests"] == 8


def test_few_shot_examples_are_those_of_the_harness(runs: Path, exact: Run) -> None:
    """The price is computed from the same prompts: more tokens, but not another choice."""
    pytest.importorskip("lm_eval", reason=NEEDS)
    with pytest.raises(ArgumentError, match="--truncate"):
        exact.lm_eval("toy_choice", include_path="tasks", num_fewshot=2, dry_run=True)
    record = exact.lm_eval(
        "toy_choice", include_path="tasks", num_fewshot=1, truncate=True, out="shots.json"
    )
    assert record["n-shot"]["toy_choice"] == 1


def test_dry_run_prices_the_job_and_writes_nothing(
    runs: Path, masked: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("lm_eval", reason=NEEDS)
    before = sorted(masked.run_dir.iterdir())
    price = masked.lm_eval(TASKS, draws=8, include_path="tasks", limit=2, dry_run=True)
    assert sorted(masked.run_dir.iterdir()) == before
    assert price["requests"] == {
        "loglikelihood": 7,
        "loglikelihood_rolling": 2,
        "generate_until": 2,
    }
    # at least the diffusion term of each draw of 7 answers and 3 windows, and 4 steps of 4 samples
    assert price["network_evaluations"] >= (7 + 3) * 8 + 4 * 4
    assert price["estimated_seconds"] > 0
    assert "network evaluations of a row, about" in capsys.readouterr().err


def test_command_prints_figures_and_refuses_invalid_requests(
    runs: Path, ddiff: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("lm_eval", reason=NEEDS)
    shared = ("--include-path", "tasks")
    done = ddiff("lm-eval", "runs/masked", "--tasks", "toy_choice", "--draws", "2", *shared)
    assert done.code == 0, done.err
    assert "toy_choice: acc" in done.out
    assert "2 draws, standard error" in done.out
    assert Path("runs/masked/lm-eval-toy_choice.json").is_file()
    unknown = ddiff("lm-eval", "runs/masked", "--tasks", "toy_choise", *shared)
    assert 'Did you mean "toy_choice"?' in refusal(unknown)
    odd = ddiff("lm-eval", "runs/masked", "--tasks", "toy_choice", "--draws", "3", *shared)
    assert "1, or an even number" in refusal(odd)
    missing = ddiff("lm-eval", "runs/masked", "--tasks", "toy_choice", "--include-path", "none")
    assert "include_path must be a folder" in refusal(missing)
    monkeypatch.setattr(harness, "find_spec", lambda name: None)
    absent = ddiff("lm-eval", "runs/masked", "--tasks", "toy_choice", *shared)
    assert "pip install 'discrete-diffusion[lm-eval]'" in refusal(absent)


def test_command_of_the_harness_knows_the_model(
    runs: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    manager = pytest.importorskip("lm_eval.tasks", reason=NEEDS).TaskManager
    few = partialmethod(manager.__init__, include_defaults=False)
    monkeypatch.setattr(manager, "__init__", few)
    arguments = "--model ddiff --tasks toy_choice --include_path tasks --limit 2 --model_args"
    monkeypatch.setattr("sys.argv", ["lm_eval", *arguments.split(), "run=runs/masked,draws=2"])
    main()
    written = capsys.readouterr()
    assert "toy_choice" in written.out
    assert "ddiff: 5 loglikelihood requests" in written.err
    monkeypatch.setattr("sys.argv", ["lm_eval", *arguments.split(), "run=runs/none"])
    with pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code == 2
    assert "runs/none is not a run directory" in capsys.readouterr().err


def test_chat_templates_are_refused(exact: Run) -> None:
    pytest.importorskip("lm_eval", reason=NEEDS)
    from ddiff.runs.lm_eval.model import HarnessModel

    model = HarnessModel(exact)
    with pytest.raises(ArgumentError, match="no chat template"):
        model.apply_chat_template([{"role": "user", "content": "the"}])
    with pytest.raises(ArgumentError, match="has no argument 'drwas'"):
        HarnessModel(exact, drwas=3)
