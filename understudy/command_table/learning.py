"""Datasets, training and adapters; the same at Fireworks."""

from __future__ import annotations

from understudy.command_table.row import Command, arg, number

DATASET = arg("dataset", nargs="?", help="a folder, the beginning of a digest, or a chat JSONL file; default: the newest dataset")
TRAINED = arg("model", nargs="?", help="the id of a trained model; default: the newest")
AGAIN = arg("--again", action="store_true", help="make another where the last has failed or is gone; it is paid anew")
NO_WAIT = arg("--no-wait", action="store_true", help="begin it, and do not wait until it is ready")
DRY_RUN = arg("--dry-run", action="store_true", help="print the requests, the key redacted, and send nothing")

COMMANDS = [
    Command(
        "dataset build",
        "verified training rows from the traces, and a ledger of those rejected",
        "datasets:dataset_build",
        [
            arg("--seed", type=int, default=0),
            arg("--unverified", action="store_true", help="imported traces without recovered passages or support too"),
            arg("--held-out", type=number, default=0.1, metavar="SHARE", help="of the traces, kept for `evaluate` where no split was declared; default: 0.1"),
            arg("--no-support", type=number, default=0.25, metavar="SHARE", help="abstention rows per answerable question; default: 0.25"),
            arg("--validations", type=number, default=0.4, metavar="SHARE", help="of the answerable questions, judged in a row of their own; default: 0.4"),
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
            arg("--learning-rate", type=number, metavar="X"),
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
