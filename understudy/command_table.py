"""The table of commands: words, help, the function that runs each, and its arguments. Nothing is imported for it."""

from __future__ import annotations

from dataclasses import dataclass, field

Arguments = list[tuple[tuple[str, ...], dict[str, object]]]


@dataclass(frozen=True)
class Command:
    """One row of the table: words typed, help, the function that runs it, and its arguments."""

    words: str
    help: str
    run: str  # module:function, in understudy.commands
    arguments: Arguments = field(default_factory=list)


def arg(*names: str, **options: object) -> tuple[tuple[str, ...], dict[str, object]]:
    """An argument, as argparse takes it."""
    return names, options


MODEL = arg("--model", help="base, an adapter's name, or a configured remote; default: the newest adapter")
MODE = arg("--mode", choices=["agentic", "fast", "closed-book"], help="default: agent.mode of the configuration")
START = arg("--start", action="store_true", help="start the engine for this command if none is running")
NO_CACHE = arg("--no-cache", action="store_true", help="neither answer from the cache nor keep the answer in it")
QUESTIONS = arg("--questions", required=True, metavar="FILE", help="question file (JSONL)")
RUN = arg("name", nargs="?", metavar="RUN", help="a folder in reports/, or the beginning of its name; default: the newest evaluation")
TWO_MODELS = arg("--models", metavar="A,B", help="two models of the run; default: its first two")
FILTERS = [
    arg("--source", choices=["expert", "model", "imported"]),
    arg("--model", help="a resolved name, or an adapter's name for all its digests"),
    arg("--contains", metavar="TEXT", help="in the question, whatever the case"),
    arg("--min-score", type=float, metavar="SCORE"),
    arg("--max-score", type=float, metavar="SCORE"),
    arg("--since", metavar="TIME", help="from this day or time on: 2026-11-21, 2026-11-21T14:30 (UTC)"),
    arg("--until", metavar="TIME", help="before this day or time"),
    arg("--outcome", choices=["answered", "abstained", "incomplete"]),
]
COMMANDS = [
    Command("init", "make a workspace", "setting_up:init"),
    Command("doctor", "check machine, packages, models, store and server, each with its remedy", "setting_up:doctor"),
    Command("config show", "what is in force, and where each value came from", "setting_up:config_show"),
    Command("models add", "bring weights into the workspace: a packaged model, a folder, a hub id", "setting_up:models_add", [arg("model")]),
    Command("models ls", "the weights in the workspace", "setting_up:models_ls"),
    Command(
        "ingest",
        "load, chunk, embed and index documents; resumable",
        "corpus:ingest",
        [
            arg("paths", nargs="+", metavar="PATH", help="a file, a folder, a quoted glob, or - for a list on stdin"),
            arg("--tag", action="append", metavar="T", help="a tag of these documents; may be repeated"),
            arg("--valid-from", metavar="DATE", help="when they begin to hold, such as 2026-01-01"),
            arg("--valid-until", metavar="DATE", help="the last day on which they hold"),
            arg("--boost", type=float, metavar="X", help="weight of their passages' scores (1 is plain)"),
            arg("--watch", action="store_true", help="go on ingesting what changes in one folder, until Ctrl-C"),
            arg("--mirror", action="store_true", help="with --watch: a deleted file's document is removed"),
        ],
    ),
    Command("documents ls", "the documents in the corpus", "corpus:documents_ls", [arg("--tag", metavar="T", help="only those with this tag")]),
    Command("documents show", "a document's text, page by page", "corpus:documents_show", [arg("document", help="its id, the beginning of it, or its source")]),
    Command(
        "documents rm",
        "remove documents from the corpus, and list what was learnt from them",
        "corpus:documents_rm",
        [
            arg("documents", nargs="+", metavar="DOCUMENT", help="an id, the beginning of one, or a source"),
            arg("--purge", action="store_true", help="also rewrite the store's files, so that no byte of them stays there"),
        ],
    ),
    Command(
        "search",
        "retrieval, with every score",
        "retrieval:search",
        [
            arg("query"),
            arg("-k", type=int, help="passages shown"),
            arg("--where", action="append", default=[], metavar="CONDITION", help="tag=law, document=x.pdf, page<=3, type=…, valid=DATE; may be repeated"),
            arg("--explain", action="store_true", help="show ranks, contributions, boosts and penalties"),
        ],
    ),
    Command("index ls", "the live index generation and the snapshots", "retrieval:index_ls"),
    Command("index rebuild", "make the index anew from the store: after a change of embedder or chunk settings, or damage", "retrieval:index_rebuild"),
    Command("index snapshot", "keep the live generation under a name", "retrieval:index_snapshot", [arg("name")]),
    Command("index restore", "make a snapshot live, without what was removed since", "retrieval:index_restore", [arg("name")]),
    Command("index warm", "embed common queries ahead", "retrieval:index_warm", [arg("file", help="a query a line, or a question file (.jsonl)")]),
    Command(
        "store copy",
        "copy every record into another store, verified by digest; resumable",
        "storage:store_copy",
        [arg("source", help="a store's URL, or env:NAME for one in a variable"), arg("target", help="the same; empty, or an unfinished copy")],
    ),
    Command("store backup", "every record of the workspace in one file", "storage:store_backup", [arg("file")]),
    Command("store restore", "a backup's records in the workspace's empty store", "storage:store_restore", [arg("file")]),
    Command("ask", "a cited answer from the documents", "answers:ask", [arg("question"), MODEL, MODE, START, NO_CACHE]),
    Command(
        "chat",
        "a conversation: follow-up questions, answered from the documents; a question a line over a pipe",
        "chatting:chat",
        [MODEL, MODE, START, NO_CACHE],
    ),
    Command("traces ls", "the newest traces, newest last", "traces:traces_ls", [*FILTERS, arg("--limit", type=int, default=50, help="default: 50")]),
    Command("traces show", "one run as a tree, with passages, quotes and timings", "traces:traces_show", [arg("trace", help="its id, or the beginning of it")]),
    Command(
        "traces simulate",
        "a teacher writes questions about the chunks and answers them; resumable",
        "traces:traces_simulate",
        [
            arg("--teacher", default="teacher", help="a configured remote, or base; default: the remote called teacher"),
            arg("--questions", type=int, default=100, metavar="N", help="traces to keep, in all runs together; default: 100"),
            arg("--calls", type=int, metavar="N", help="model calls to spend at most, in all runs together"),
            arg("--tokens", type=int, metavar="N", help="prompt and completion tokens after which no call is begun, in all runs together"),
            arg("--unanswerable", type=float, default=0.2, metavar="SHARE", help="share of questions meant to find no answer; default: 0.2"),
            arg("--concurrency", type=int, default=4, metavar="N", help="questions in flight at once; default: 4"),
            arg("--seed", type=int, default=0),
        ],
    ),
    Command("cache ls", "the cached answers, and what the cache has saved", "caching:cache_ls"),
    Command(
        "cache explain",
        "why a question would be answered from the cache, or not",
        "caching:cache_explain",
        [arg("question"), arg("--model", help="whose answers; default: the newest adapter"), MODE],
    ),
    Command(
        "cache calibrate",
        "fit the decision on labelled pairs of questions; hits and wrong hits with intervals",
        "caching:cache_calibrate",
        [arg("file", help="JSONL rows {a, b, same}"), arg("--dry-run", action="store_true", help="measure what is in force, change nothing")],
    ),
    Command(
        "cache wrong", "say that an answer from the cache was wrong: its entry learns from it", "caching:cache_wrong", [arg("trace", help="of the answer")]
    ),
    Command("cache clear", "remove every cached answer", "caching:cache_clear"),
    Command(
        "traces import",
        "experts' answers, or another system's calls, become traces",
        "traces:traces_import",
        [
            arg("source", metavar="FILE", help="a question file, a log of calls, or mongodb://HOST/DATABASE?collection=NAME"),
            arg("--format", choices=["questions", "chat", "openai", "langsmith", "langchain-cache"], help="default: seen from the first row"),
            arg("--split", choices=["train", "calibration"], default="train", help="calibration: never trained on"),
        ],
    ),
    Command(
        "traces export",
        "whole traces as chat JSONL on stdout",
        "traces:traces_export",
        [*FILTERS, arg("--split", choices=["train", "calibration"], default="train", help="splits are never mixed; default: train")],
    ),
    Command(
        "dataset build",
        "verified training rows from the traces, and a ledger of those rejected",
        "datasets:dataset_build",
        [
            arg("--seed", type=int, default=0),
            arg("--unverified", action="store_true", help="imported traces without recovered passages or support too"),
            arg("--held-out", type=float, default=0.1, metavar="SHARE", help="of the traces, kept for `evaluate` where no split was declared; default: 0.1"),
            arg("--no-support", type=float, default=0.25, metavar="SHARE", help="abstention rows per answerable question; default: 0.25"),
            arg("--dose", type=int, metavar="N", help="exactly N distractors in every epoch, for studies of robustness; default: what fills retrieval.k"),
        ],
    ),
    Command(
        "dataset lint",
        "what would fail here, under TRL, on Fireworks or in vLLM, row by row; exit 3 where something would",
        "datasets:dataset_lint",
        [arg("dataset", nargs="?", help="a folder, the beginning of a digest, or a chat JSONL file; default: the newest dataset")],
    ),
    Command(
        "dataset show",
        "a dataset's rows and the traces it rejected, a page at a time",
        "datasets:dataset_show",
        [
            arg("dataset", nargs="?", help="a folder, or the beginning of a digest; default: the newest"),
            arg("--only", choices=["kept", "rejected"]),
            arg("--split", choices=["train", "validation"]),
            arg("--task", choices=["plan", "answer", "validate", "chat"]),
            arg("--kind", help="answerable, no-support, bad-number, …"),
            arg("--reason", metavar="TEXT", help="in the reason of a rejection"),
            arg("--contains", metavar="TEXT", help="in the question, whatever the case"),
            arg("--row", type=int, metavar="N", help="one row whole, as the model sees it"),
            arg("--page", type=int, default=1, metavar="N"),
            arg("--limit", type=int, default=20, metavar="N", help="lines a page; default: 20"),
        ],
    ),
    Command(
        "train",
        "QLoRA fine-tuning on the newest dataset; resumable",
        "learning:train",
        [
            arg("recipe", nargs="?", help="a recipe's name or YAML file; default: the workspace's"),
            arg("settings", nargs="*", metavar="key=value", help="settings of the recipe"),
            arg("--dry-run", action="store_true", help="show rows, truncation, memory and time estimates, and train nothing"),
        ],
    ),
    Command(
        "retriever tune",
        "fine-tune the embedder on what the traces cite; resumable; Recall@k before and after",
        "learning:retriever_tune",
        [
            arg("settings", nargs="*", metavar="key=value", help="settings of the tuning; name=… names the new embedder"),
            arg("--folds", type=int, metavar="N", help="cross-validate by document instead, and keep no model"),
        ],
    ),
    Command("adapters ls", "the registered adapters", "learning:adapters_ls"),
    Command("adapters show", "an adapter's manifest", "learning:adapters_show", [arg("adapter")]),
    Command("adapters verify", "check an adapter's files against its digest", "learning:adapters_verify", [arg("adapter")]),
    Command(
        "adapters import",
        "register a LoRA adapter that was trained elsewhere",
        "learning:adapters_import",
        [
            arg("folder", metavar="DIR", help="what PEFT's save_pretrained wrote: adapter_config.json, adapter_model.safetensors"),
            arg("--name", default="imported", help="default: imported"),
            arg("--base", metavar="MODEL", help="the model in models/ to serve it on; default: the one its configuration names"),
            arg("--dataset", metavar="DIGEST", help="the dataset here that it was trained on; default: unknown"),
        ],
    ),
    Command(
        "adapters export",
        "write an adapter outside the workspace",
        "learning:adapters_export",
        [
            arg("adapter"),
            arg("folder", metavar="DIR", help="a folder that is not there yet"),
            arg("--format", choices=["peft", "merged", "gguf"], default="peft", help="merged, gguf: base and adapter as one model; default: peft"),
        ],
    ),
    Command("serve", "run vLLM with the base and every registered adapter, and the gateway in front of it", "serving:serve"),
    Command(
        "keys create",
        "make a key to the gateway; it is shown once",
        "access:keys_create",
        [
            arg("name", help="whose it is: a person, a team, a program"),
            arg("--tenant", help="whose documents, traces and adapters it reaches; default: the workspace's tenant"),
            arg(
                "--scope",
                action="append",
                metavar="SCOPE",
                help="chat, rag, embeddings, feedback (all four are the default), remotes, metrics; may be repeated",
            ),
            arg("--requests-per-minute", type=int, default=600, metavar="N", help="default: 600"),
            arg("--days", type=float, metavar="N", help="how long it is valid; default: until it is revoked"),
        ],
    ),
    Command("keys ls", "the keys to the gateway, without the keys themselves", "access:keys_ls"),
    Command("keys revoke", "end a key; running gateways refuse it from the next request on", "access:keys_revoke", [arg("key", help="its name or id")]),
    Command("prove", "show that the engine serves what was trained", "serving:prove", [arg("adapter")]),
    Command(
        "calibrate",
        "fit a model's validation score and its decision to abstain, on questions of their own",
        "serving:calibrate",
        [arg("model"), QUESTIONS],
    ),
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
]
