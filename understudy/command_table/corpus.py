"""The workspace, its documents and its index."""

from __future__ import annotations

from understudy.command_table.row import Command, arg, number

COMMANDS = [
    Command("init", "make a workspace", "setting_up:init"),
    Command("doctor", "check machine, packages, models, store and server, each with its remedy", "setting_up:doctor"),
    Command("config show", "what is in force, and where each value came from", "setting_up:config_show"),
    Command(
        "config set",
        "write settings into understudy.yaml; what else stands there stays",
        "setting_up:config_set",
        [arg("settings", nargs="+", metavar="key=value", help="for example retrieval.k=3; a value is YAML")],
    ),
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
            arg("--boost", type=number, metavar="X", help="weight of their passages' scores (1 is plain)"),
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
]
