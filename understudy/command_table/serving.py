"""Releases, the engine, keys and proof."""

from __future__ import annotations

from understudy.command_table.row import QUESTIONS, Command, arg, number

RELEASE = arg("release", metavar="RELEASE", help="ALIAS@DIGEST, or ALIAS for its newest")
REASON = arg("--reason", default="", metavar="TEXT", help="kept with the decision")
DECIDED = [arg("--force", action="store_true", help="although evidence is missing; the decision's record says so"), REASON]

COMMANDS = [
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
            arg("--share", type=number, metavar="X", help="share of conversations; default: 0.1, or 1 with --tenant or --shadow"),
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
            arg("--days", type=number, metavar="N", help="how long it is valid; default: until it is revoked"),
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
]
