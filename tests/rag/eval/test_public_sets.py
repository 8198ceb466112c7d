"""Public sets become question files that we read; what is no question is skipped with its reason; exports keep what they hold."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rag.eval.exports import export_rows
from rag.eval.public_sets import file_name, import_set
from rag.eval.questions import read_questions
from rag.prompts import ABSTENTION
from understudy.cli import main
from understudy.errors import NotFoundError, StorageError, UsageError
from understudy.records import Question

OLD_WITHOUT_KEY = '\n{"question": "No key?", "contexts": []}\n'
CONTEXT = "The reading room opens at nine on weekdays. Visitors may borrow up to six books for three weeks. Cards are free."


def put(path: Path, content: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return path


def imported(source: Path, tmp_path: Path, **options: Any) -> tuple[dict[str, Any], list[Question]]:
    result = import_set(source, tmp_path / "q.jsonl", **options)
    return result, read_questions(tmp_path / "q.jsonl")


def test_squad_keeps_ids_answers_and_the_sentence_that_answers(tmp_path: Path) -> None:
    answers = [{"text": "six books", "answer_start": CONTEXT.index("six books")}, {"text": "up to six", "answer_start": CONTEXT.index("up to six")}]
    qas = [
        {"id": "1", "question": "How many books?", "answers": answers},
        {"id": "2", "question": "Who pays?", "answers": [], "is_impossible": True},
        {"id": "1", "question": "Again?", "answers": []},
        {"id": "4", "question": ""},
    ]
    source = put(tmp_path / "dev.json", {"version": "2", "data": [{"title": "../Reading Room", "paragraphs": [{"context": CONTEXT, "qas": qas}]}]})
    result, questions = imported(source, tmp_path, documents=tmp_path / "texts")
    assert (result["format"], result["imported"], result["with_answer"], result["documents"]) == ("squad", 2, 2, 1)
    assert result["skipped"] == [{"row": "4", "reason": "`question` is missing or empty"}, {"row": "1", "reason": "its id was used before"}]
    first, second = questions
    assert first.answers == ["six books", "up to six"] and first.quotes == ["Visitors may borrow up to six books for three weeks."]
    assert second.answers is None and second.has_answer_key and not second.quotes
    [file] = (tmp_path / "texts").iterdir()
    assert file.read_text() == CONTEXT and first.documents == second.documents == [file.name]


def test_a_beir_folder_gives_judged_questions_without_answers(tmp_path: Path) -> None:
    put(tmp_path / "b/corpus.jsonl", '{"_id": "d1", "title": "T", "text": "One."}\n{"_id": "a/../b", "title": "", "text": "Two."}\n')
    put(tmp_path / "b/queries.jsonl", '{"_id": "q1", "text": "First?"}\n{"_id": "q2", "text": "Not judged?"}\n{"_id": "q3"}\n')
    put(tmp_path / "b/qrels/test.tsv", "query-id\tcorpus-id\tscore\nq1\td1\t1\nq1\ta/../b\t2\nq1\td9\t0\nq3\td1\t1\n")
    result, [question] = imported(tmp_path / "b", tmp_path, documents=tmp_path / "texts")
    assert (result["format"], result["imported"], result["with_answer"]) == ("beir", 1, 0)
    assert result["skipped"] == [{"row": "q3", "reason": "'text' is missing"}]
    assert not question.has_answer_key and question.documents == ["d1.txt", file_name("a/../b")]
    assert {path.name: path.read_text() for path in (tmp_path / "texts").iterdir()} == {"d1.txt": "T\n\nOne.", file_name("a/../b"): "Two."}
    with pytest.raises(NotFoundError, match=r"dev\.tsv does not exist") as caught:
        imported(tmp_path / "b", tmp_path, split="dev")
    assert "splits there: test" in caught.value.remedy


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("r.json", [{"user_input": "How many books?", "reference": "up to six books", "reference_contexts": ["Nothing.", CONTEXT]}, {"user_input": "No key?"}]),
        (
            "r.jsonl",
            '{"question": "How many books?", "ground_truths": ["up to six books"], "contexts": ["' + CONTEXT + '"]}\n{"question": "x", "contexts": []}\n',
        ),
        (
            "c.json",
            {
                "results": [
                    {"query_id": "7", "query": "How many books?", "gt_answer": "up to six books", "retrieved_context": [{"doc_id": "0", "text": CONTEXT}]},
                    {"query_id": "8", "query": "No key?"},
                ]
            },
        ),
    ],
)
def test_ragas_and_ragchecker_quote_the_sentence_that_holds_the_answer(tmp_path: Path, name: str, content: Any) -> None:
    result, [question] = imported(put(tmp_path / name, content), tmp_path, documents=tmp_path / "texts")
    assert result["format"] == ("ragchecker" if name[0] == "c" else "ragas") and len(result["skipped"]) == 1
    assert question.answers == ["up to six books"] and question.quotes == ["Visitors may borrow up to six books for three weeks."]
    assert (tmp_path / "texts" / question.documents[0]).read_text() == CONTEXT


def test_csv_columns_are_ours(tmp_path: Path) -> None:
    text = (
        "\ufeffID,Question,Answer,Quote,Document,Page,Answerable,other\n"
        'a,"How many, at most?",Six,"up to six books",d.pdf,3,,x\n'
        "b,Who pays?,,,d.pdf,,no,\n"
        "c,Only asked?,,,,,,\n"
        "d,,Six,,,,,\n"
        "e,Bad page?,Six,,,three,,\n"
    )
    result, (full, unanswerable, bare) = imported(put(tmp_path / "q.csv", text), tmp_path)
    assert (full.answers, full.quotes, full.documents, full.pages) == (["Six"], ["up to six books"], ["d.pdf"], [3])
    assert unanswerable.has_answer_key and unanswerable.answers is None and not bare.has_answer_key
    assert [row["row"] for row in result["skipped"]] == ["line 5", "line 6"] and result["ignored_columns"] == ["other"]


@pytest.mark.parametrize(("separator", "name"), [(";", "q.csv"), ("\t", "q.csv"), (",", "q.tsv")])
def test_the_header_tells_what_separates_the_columns(tmp_path: Path, separator: str, name: str) -> None:
    rows = [
        ["question", "answer", "answerable"],
        ["Who?", "Ann", "YES"],
        ["When?", "nine", "nein"],
        ["Where?", "here", "", "or there"],
        ["How?", "so", "", "", ""],
    ]
    result, questions = imported(put(tmp_path / name, "\n".join(separator.join(row) for row in rows)), tmp_path)
    assert [question.question for question in questions] == ["Who?", "How?"]
    assert ["neither yes nor no" in row["reason"] or "more cells" in row["reason"] for row in result["skipped"]] == [True, True]


@pytest.mark.parametrize(
    ("text", "cause"), [("Frage;Antwort\nWer?;Ann\n", "no column `question` but frage, antwort"), ('question,answer\n"Who?,Ann\n', "cannot read")]
)
def test_a_table_of_somebody_else_is_refused_with_its_cause(tmp_path: Path, text: str, cause: str) -> None:
    with pytest.raises(StorageError, match=cause):
        imported(put(tmp_path / "q.csv", text), tmp_path)


@pytest.mark.parametrize(("name", "content"), [("x.json", {"other": 1}), ("x.json", [1]), ("x.txt", "plain"), ("x.json", [])])
def test_an_unknown_format_is_refused_with_the_known_ones(tmp_path: Path, name: str, content: Any) -> None:
    with pytest.raises((UsageError, StorageError)) as caught:
        imported(put(tmp_path / name, content), tmp_path)
    assert caught.value.remedy and not (tmp_path / "q.jsonl").exists()
    with pytest.raises(StorageError):
        imported(put(tmp_path / "y.json", {"data": [{"title": "t", "paragraphs": 3}]}), tmp_path, kind="squad")


@settings(max_examples=25)
@given(st.text(max_size=20), st.text(max_size=20))
def test_file_names_are_plain_and_distinct(left: str, right: str) -> None:
    for title in (left, right):
        name = file_name(title)
        assert Path(name).name == name and not name.startswith(".") and name.endswith(".txt") and "\0" not in name
    assert (file_name(left) == file_name(right)) == (left == right)


def test_commands_import_and_export(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = put(tmp_path / "in.csv", "id,question,answer,answerable\na,How many?,Six,\nb,Who?,,no\nc,Bare?,,\n")
    questions, target = str(tmp_path / "q.jsonl"), str(tmp_path / "out.jsonl")
    assert main(["questions", "import", str(source), questions, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["imported"] == 3
    for kind, key, about in (("lm-eval", "question", lambda row: row), ("inspect", "input", lambda row: row["metadata"])):
        assert main(["questions", "export", questions, target, "--format", kind]) == 0
        first, second = (json.loads(line) for line in Path(target).read_text().splitlines())
        assert (first[key], first["target"], first["id"], about(first)["answerable"]) == ("How many?", "Six", "a", True)
        assert second["target"] == ABSTENTION and not about(second)["answerable"]
    two = Question(id="1", question="Q?", answers=["a", "b"], has_answer_key=True)
    assert export_rows([two], "inspect")[0]["target"] == ["a", "b"] and export_rows([two], "lm-eval")[0]["targets"] == ["a", "b"]
