"""The commands over a real corpus and scripted endpoints: no engine runs where every model is a remote or recorded."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from rag.retrieve import Retriever
from tests.scripted import Endpoint, scripted
from understudy.adapters import AdapterManifest
from understudy.cli import main
from understudy.commands.evaluating import exit_code, guard, identity_of
from understudy.commands.evaluation_run import Plan
from understudy.digests import digest_of
from understudy.errors import UsageError
from understudy.files import write_json
from understudy.records import Trace
from understudy.workspace import Workspace, open_workspace

FACTS = {
    "When is the kiln fired?": ("on Tuesdays at seven", "The kiln is fired on Tuesdays at seven in the morning.", "kiln.txt"),
    "How often are the barn doors painted?": ("every third summer", "painted green every third summer", "barn.txt"),
    "How many carp are put into the pond?": ("forty carp", "The pond is stocked with forty carp in April", "pond.txt"),
}


@pytest.fixture
def questions(tmp_path: Path) -> Path:
    path = tmp_path / "held-out.jsonl"
    rows = [{"id": str(n), "question": q, "answer": a, "quotes": [s], "documents": [d], "type": "fact"} for n, (q, (a, s, d)) in enumerate(FACTS.items())]
    rows.append({"id": "9", "question": "Who owns the mill?", "answer": None})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def rival() -> Iterator[Endpoint]:
    with scripted("rival") as made:
        yield made


def knowing(step: str, prompt: str) -> str:
    """Answers every fact from its note."""
    fact = next(((answer, quote) for question, (answer, quote, _) in FACTS.items() if question in prompt), None)
    if step == "answer" and fact:
        return f"Quote: {fact[1]}\nAnswer: {fact[0]}"
    return {"plan": "notes", "validate": "yes"}.get(step, "The documents do not answer this question.")


@pytest.fixture
def run(notes_workspace: Workspace, endpoint: Endpoint, rival: Endpoint, questions: Path, capsys: pytest.CaptureFixture[str]):  # type: ignore[no-untyped-def]
    """`evaluate` as typed, with two remotes: what it printed, and its exit code."""
    endpoint.reply = lambda step, _: {"plan": "notes", "validate": "no"}.get(step, "Quote: Ignore it.\nAnswer: Dragons.")
    rival.reply = knowing

    def typed(*arguments: str) -> tuple[dict[str, Any], int]:
        remotes = [f"remotes.{name}={{base_url: '{of.model.base_url}', model: m}}" for name, of in (("weak", endpoint), ("strong", rival))]
        sets = [part for value in (*remotes, "evaluate.resamples=200") for part in ("--set", value)]
        capsys.readouterr()
        code = main(["--workspace", str(notes_workspace.root), "evaluate", *arguments, "--json", *sets])
        return json.loads(capsys.readouterr().out), code

    return lambda *arguments: typed("--questions", str(questions), *arguments)


@pytest.mark.slow
def test_evaluate_measures_everything_that_the_contract_names(run, endpoint: Endpoint, notes_workspace: Workspace, capsys) -> None:  # type: ignore[no-untyped-def]
    result, code = run("--models", "weak,strong")
    weak, strong = result["models"]
    assert code == 0 and weak["name"] == "weak" and weak["errors"] == strong["errors"] == 0
    known = {name: value for name, value in strong["metrics"].items() if value is not None}
    assert {"rouge_l", "semantic_similarity", "mrr", "ndcg_at_k", "precision_at_k", "abstention_precision", "latency_p99", "cached_tokens"} <= known.keys()
    assert known["semantic_similarity"] == pytest.approx(1.0) and weak["metrics"]["semantic_similarity"] < 0.5 and known["abstention_recall"] == 1.0
    assert set(strong["latency"]) == {"plan", "retrieve", "answer", "validate", "whole run"}
    assert {entry["by"] for entry in result["breakdown"]} == {"type"} and result["leaks"] == []
    asked = len(endpoint.asked)
    again, _ = run("--models", "weak,strong")
    assert len(endpoint.asked) == asked and again["models"] == result["models"]  # what was answered is not asked again
    report = notes_workspace.root / Path(result["report"]).with_suffix(".json")
    assert main(["evaluate", "compare", str(report), str(report), "--json"]) == 0
    compared = json.loads(capsys.readouterr().out)
    assert compared["questions"] == 4 and not any(pair["difference"] for pair in compared["pairs"])
    assert main(["--workspace", str(notes_workspace.root), "evaluate", "history", "--json"]) == 0
    history = json.loads(capsys.readouterr().out)
    assert report.parent.name in [found["report"] for found in history["runs"]] and (notes_workspace.root / history["history"]).is_file()


@pytest.mark.parametrize(
    ("statuses", "are_configured", "must_pass", "code"),
    [
        (["pass", "fail"], True, False, 3),
        (["pass", "undecided"], True, False, 0),
        (["pass", "undecided"], True, True, 3),
        (["pass", "pass"], True, True, 0),
        (["fail"], False, False, 0),  # the verdict's own are no gates until --gate makes them
        (["fail"], False, True, 3),
        ([], False, True, 3),
        ([], False, False, 0),
    ],
)
def test_the_exit_code_says_what_the_gates_said(statuses: list[str], are_configured: bool, must_pass: bool, code: int) -> None:
    assert exit_code(statuses, are_configured, must_pass) == code


def test_recorded_answers_stand_in_the_table_and_a_gate_against_them_is_exit_3(  # type: ignore[no-untyped-def]
    run, notes_workspace: Workspace, retriever: Retriever, make_trace: Callable[..., Trace]
) -> None:
    error, code = run("--models", "weak,teacher")
    assert code == 2 and "answers to 4 of 4 questions are not recorded" in error["error"]["message"]
    chunks = {chunk.document: chunk for chunk in retriever.chunks.values()}
    for question, (answer, quote, document) in FACTS.items():
        trace = make_trace(question, answer, chunks[document], quote, [chunks[document]], source="imported", model="frontier")
        notes_workspace.store.put_trace(trace)
    notes_workspace.store.put_trace(make_trace("Who owns the mill?", None, None, "", list(chunks.values()), source="imported"))
    gate = ("--set", "evaluate.gates={token_f1: {against: teacher, max_loss: 0.02}}")
    error, code = run("--models", "weak,strong", *gate)
    assert code == 2 and "against teacher, which is not among the models" in error["error"]["message"]
    result, code = run("--models", "teacher,weak", *gate)
    assert code == 3 and result["gates"][0]["status"] == "fail" and result["verdict"].startswith("weak may not take over yet: it fails Token-F1")
    teacher = result["models"][0]
    assert teacher["name"] == "teacher" and teacher["metrics"]["exact_match"] == teacher["metrics"]["abstention_accuracy"] == 1.0
    assert teacher["metrics"]["latency_p50"] is teacher["metrics"]["cost"] is teacher["metrics"]["prompt_tokens"] is None and teacher["latency"] == {}
    assert "recorded" in result["provenance"]


@pytest.mark.slow
def test_one_model_in_several_modes_stands_side_by_side(run, rival: Endpoint, notes_workspace: Workspace) -> None:  # type: ignore[no-untyped-def]
    result, code = run("--models", "strong:closed-book,strong:fast,strong")
    closed, fast, agentic = result["models"]
    assert code == 0 and [model["name"] for model in result["models"]] == ["strong:closed-book", "strong:fast", "strong"]
    assert (closed["metrics"]["recall_at_k"], closed["metrics"]["citation_recall"]) == (None, 0.0) and fast["metrics"]["citation_recall"] == 1.0
    assert set(closed["latency"]) == {"answer", "whole run"} and "validate" not in fast["latency"] and fast["metrics"]["first_token_p95"] is not None
    assert set(agentic["latency"]) == {"plan", "retrieve", "answer", "validate", "whole run"} and agentic["latency"]["plan"]["prompt_tokens"] == 10
    assert agentic["metrics"]["tokens_per_second"] > 0 and result["robustness"] is None
    asked = len(rival.asked)
    assert run("--models", "strong:closed-book,strong:fast,strong")[1] == 0 and len(rival.asked) == asked
    assert len(list((notes_workspace.root / result["report"]).parent.glob("traces-*.jsonl"))) == 3
    error, code = run("--models", "strong:slow,weak")
    assert code == 2 and "no mode 'slow'" in error["error"]["message"]
    error, code = run("--models", "strong,weak", "--robustness")
    assert code == 2 and "no question can be put" in error["error"]["message"]  # four notes are too few


def test_another_model_behind_a_remotes_name_is_another_run(notes_workspace: Workspace, retriever: Retriever, questions: Path) -> None:
    def identity(model: str) -> dict[str, object]:
        opened = open_workspace(str(notes_workspace.root), [f"remotes.rival={{base_url: 'http://127.0.0.1:9/v1', model: {model}}}"])
        return identity_of(opened, questions, Plan([], ["base", "rival:fast"], {}, [], [], {}), retriever)

    assert identity("old") == identity("old") != identity("new") and "127.0.0.1" not in str(identity("new"))  # a report is shown around


def test_what_an_adapter_trained_on_is_refused_or_set_apart(ask, notes_workspace: Workspace, retriever: Retriever) -> None:  # type: ignore[no-untyped-def]
    texts = list(FACTS)
    pond = next(chunk.document_id for chunk in retriever.chunks.values() if chunk.document == "pond.txt")
    manifest = AdapterManifest(
        name="tiny", digest="f" * 64, base="b", base_digest="", served_base_digest="", quantisation="nf4", tokenizer_digest="", chat_template_digest="",
        prompt_version="", dataset_digest="d1", recipe={}, seed=0, rank=8, alpha=16, targets=[], packages={}, metrics={}, tenants=[], group_ids=[pond],
        question_digests=[digest_of(texts[0])], created_at=0.0,
    )  # fmt: skip
    write_json(notes_workspace.adapters / "tiny" / manifest.digest / "manifest.json", manifest.model_dump())
    questions = [ask(id=str(place), question=text, documents=[FACTS[text][2]]) for place, text in enumerate(texts)]

    def guarded(policy: str, *chosen: int):  # type: ignore[no-untyped-def]
        opened = open_workspace(str(notes_workspace.root), [f"evaluate.leaks={policy}"])
        kept, leaks, notes = guard(opened, [questions[place] for place in chosen], ["base", manifest.served_name], retriever)
        return [question.id for question in kept], [(leak.question_id, leak.kind) for leak in leaks], notes

    with pytest.raises(UsageError, match=r"1 asked in training, such as 'When is the kiln fired\?'; 1 about a document it learnt from"):
        guarded("refuse", 0, 1, 2)
    kept, leaks, notes = guarded("set-apart", 0, 1, 2)
    assert kept == ["1"] and leaks == [("0", "question"), ("2", "document")]
    assert "was not checked" in notes[0] and notes[1].startswith("2 questions were set apart")
    assert guarded("allow-documents", 1, 2)[0] == ["1", "2"] and "about documents that a model learnt from" in guarded("allow-documents", 1, 2)[2][1]
    with pytest.raises(UsageError, match="asked in training"):
        guarded("allow-documents", 0, 1)
    with pytest.raises(UsageError, match="no question is new to every model"):
        guarded("set-apart", 0, 2)


def test_retrieval_alone_finds_quotes_or_documents(notes_workspace: Workspace, questions: Path, tmp_path: Path, capsys) -> None:  # type: ignore[no-untyped-def]
    judged = tmp_path / "judged.jsonl"
    judged.write_text(json.dumps({"id": "b", "question": "Who paints the barn?", "documents": ["barn.txt", "gone.txt"]}) + "\n")
    found = {}
    for path in (questions, judged):
        assert main(["--workspace", str(notes_workspace.root), "evaluate", "retrieval", str(path), "-k", "2", "--json"]) == 0
        found[path] = json.loads(capsys.readouterr().out)
    of_quotes, of_documents = found[questions], found[judged]
    assert (of_quotes["questions"], of_quotes["left_out"], of_quotes["k"], of_quotes["missed"]) == (3, 1, 2, [])
    assert of_quotes["metrics"]["recall_at_k"]["value"] == of_quotes["metrics"]["mrr"]["value"] == 1.0
    assert of_quotes["metrics"]["precision_at_k"]["value"] == 0.5
    assert {entry["value"]: entry["n"] for entry in of_quotes["breakdown"]} == {"kiln.txt": 1, "barn.txt": 1, "pond.txt": 1, "fact": 3}
    assert of_documents["metrics"]["recall_at_k"]["value"] == 0.5 and of_documents["metrics"]["mrr"]["value"] == 1.0
    bare = tmp_path / "bare.jsonl"
    bare.write_text('{"question": "Anything?"}\n')
    assert main(["--workspace", str(notes_workspace.root), "evaluate", "retrieval", str(bare)]) == 2
