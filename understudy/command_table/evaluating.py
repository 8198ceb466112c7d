"""Evaluation, and what it leads to."""

from __future__ import annotations

from understudy.command_table.row import Command, arg, number

RUN = arg("name", nargs="?", metavar="RUN", help="a folder in reports/, or the beginning of its name; default: the newest evaluation")
TWO_MODELS = arg("--models", metavar="A,B", help="two models of the run; default: its first two")

COMMANDS = [
    Command(
        "evaluate",
        "compare models on questions, paired; HTML and JSON report",
        "evaluating:evaluate",
        [
            arg("--questions", metavar="FILE", help="question file (JSONL); needed unless an action is named"),
            arg("--models", metavar="A,B:MODE,…", help="MODE: agentic, fast, closed-book; baseline first; teacher: recorded; default: base, newest adapter"),
            arg("--robustness", type=int, nargs="?", const=0, metavar="N", help="also with distractors, orders, injections, … (of N questions; default: all)"),
            arg("--paraphrases", metavar="FILE", help="question file (JSONL) with the same ids and other words, for --robustness; default: by rules"),
            arg("--gate", action="store_true", help="exit 3 unless every gate passes (evaluate.gates, else: better than the first in the verdict's metrics)"),
        ],
    ),
    Command(
        "evaluate retrieval",
        "retrieval alone, by document and type of question; needs no model",
        "evaluating:retrieval",
        [arg("file", metavar="QUESTIONS", help="question file (JSONL) with quotes, or with documents"), arg("-k", type=int, help="default: retrieval.k")],
    ),
    Command(
        "evaluate compare",
        "two evaluations against each other, question by question",
        "evaluating:compare",
        [arg("a", metavar="A.json", help="the report.json of one run"), arg("b", metavar="B.json", help="of the other")],
    ),
    Command(
        "evaluate review",
        "people compare blind answers on a local page, by keyboard; their agreement with the metrics",
        "reviewing:review",
        [
            RUN,
            TWO_MODELS,
            arg("--pairs", type=int, default=50, metavar="N", help="questions to look at, drawn from those answered differently; default: 50"),
            arg("--seed", type=int, default=0, help="of the draw and of which answer stands first; default: 0"),
            arg("--reviewer", metavar="NAME", help="who decides, where several people label the same pairs; their agreement is reported"),
            arg("--port", type=int, default=0, help="on 127.0.0.1; default: a free one"),
        ],
    ),
    Command(
        "evaluate judge",
        "a model compares the answers, in both orders; resumable",
        "reviewing:judge",
        [RUN, arg("--model", required=True, metavar="NAME", help="the judge: a configured remote, base or an adapter"), TWO_MODELS],
    ),
    Command("evaluate history", "every evaluation over time, with plots", "evaluating:history"),
    Command(
        "questions import",
        "a public set as a question file: BEIR, SQuAD, RAGAS, RAGChecker, CSV",
        "questions:questions_import",
        [
            arg("source", help="a file, or a BEIR folder"),
            arg("target", metavar="FILE", help="the question file to write"),
            arg("--format", choices=["beir", "squad", "ragas", "ragchecker", "csv"], help="default: seen from the source"),
            arg("--documents", metavar="DIR", help="also write the texts asked about there, to ingest"),
            arg("--split", default="test", help="of a BEIR folder's qrels; default: test"),
        ],
    ),
    Command(
        "questions export",
        "a question file as JSONL for another evaluation tool",
        "questions:questions_export",
        [
            arg("source", metavar="QUESTIONS", help="question file (JSONL)"),
            arg("target", metavar="FILE", help="the file to write"),
            arg("--format", choices=["lm-eval", "inspect"], required=True),
        ],
    ),
    Command(
        "drift",
        "whether questions, retrieval, abstentions and scores have moved since, and what is due",
        "drifting:drift",
        [
            arg("name", nargs="?", help="a model or a release's alias; default: the newest adapter"),
            arg("--days", type=number, default=7.0, metavar="N", help="which runs are recent; default: the last 7 days"),
            arg("--against", choices=["traces", "evaluation"], help="default: its runs before, where there are enough, else its newest evaluation"),
            arg("--confidence", type=number, default=0.99, metavar="X", help="that a change is none by chance, all signals together; default: 0.99"),
            arg("--gate", action="store_true", help="exit 3 where something is due"),
        ],
    ),
    Command(
        "cycle",
        "the whole loop once: new documents and traces in, a candidate on trial out; resumable, cheap where nothing is due",
        "cycling:cycle",
        [
            arg("--documents", metavar="FOLDER", help="what to ingest from; default: cycle.documents"),
            arg("--dry-run", action="store_true", help="say whether a cycle is due and what it would do, and do nothing"),
            arg("--anew", action="store_true", help="begin another although one is unfinished, which is left behind, or nothing is due"),
            arg("--refreeze", action="store_true", help="take a changed regression set; figures from now on do not compare with those before"),
        ],
    ),
    Command("cycle ls", "the cycles until now: when each began, how far it came, what it decided and why", "cycling:cycle_ls"),
]
