"""fireworks upload, train, status, deploy, load-lora, download and delete: the hosted path over the same files."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from understudy.commands import Outcome, report, workspace_of
from understudy.errors import GateFailed, UsageError
from understudy.progress import show_progress
from understudy.terminal import printable
from understudy.workspace import Workspace

if TYPE_CHECKING:
    from serve.fireworks.making import Hosted
    from serve.fireworks.requests import Request, Training

SHOWN_FINDINGS = 3


@contextmanager
def hosted_by(workspace: Workspace) -> Iterator[Hosted]:
    """The configured account; raises what open_api raises, before any connection."""
    from serve.fireworks.api import open_api
    from serve.fireworks.ledger import Ledger
    from serve.fireworks.making import Hosted

    settings = workspace.config.fireworks
    with open_api(workspace.config) as api:
        yield Hosted(api, Ledger(workspace, api.account.id), _report, show_progress, settings.poll_seconds, settings.wait_seconds)


def _report(line: str) -> None:
    report(printable(line))


def fireworks_upload(args: Namespace) -> Outcome:
    """Lint a dataset, then bring its files to Fireworks."""
    from serve.fireworks.datasets import upload, upload_requests
    from serve.fireworks.requests import data_files

    workspace = workspace_of(args)
    path, dataset = _dataset(workspace, args.dataset)
    lint_first(workspace, path)
    files = data_files(path)
    if args.dry_run:
        return dry_run(workspace, [request for file in files for request in upload_requests(file)])
    with hosted_by(workspace) as hosted:
        sent = [upload(hosted, file, dataset) for file in files]
    lines = [f"{each['split']}: dataset {each['id']}, {each['rows']} rows, {'sent' if each['sent'] else 'was there already'}" for each in sent]
    return Outcome({"dataset": dataset, "path": workspace.relative(path), "uploads": sent}, [*lines, "next: `understudy fireworks train`"])


def lint_first(workspace: Workspace, path: Path) -> None:
    """Raise GateFailed where a dataset has an error that `dataset lint` finds."""
    from train.lint_folder import lint

    findings = lint(workspace, str(path))["findings"]
    errors = [f"{each['file']}{'' if each['row'] is None else ' row ' + str(each['row'])}: {each['message']}" for each in findings if each["level"] == "error"]
    if errors:
        more = f"; and {len(errors) - SHOWN_FINDINGS} more" if len(errors) > SHOWN_FINDINGS else ""
        raise GateFailed(
            f"nothing was sent: {printable('; '.join(errors[:SHOWN_FINDINGS]))}{more}", f"`understudy dataset lint {workspace.relative(path)}` lists all"
        )


def fireworks_train(args: Namespace) -> Outcome:
    """Train on an uploaded dataset, or go on waiting for the run that was begun."""
    from serve.fireworks.training import train, train_requests

    workspace = workspace_of(args)
    training, dataset = _training(workspace, args)
    if args.dry_run:
        return dry_run(workspace, train_requests(_account(workspace), training))
    with hosted_by(workspace) as hosted:
        result = train(hosted, training, dataset, args.again, not args.no_wait)
    following = "`understudy fireworks download`" if not args.no_wait else "`understudy fireworks status`, or the same command without --no-wait"
    return Outcome(result, [f"job {result['job']}: {result['state']}; model {result['model']}", f"next: {following}"])


def fireworks_status(args: Namespace) -> Outcome:
    """What this workspace has at Fireworks, as it is there now."""
    from serve.fireworks.hosting import status

    with hosted_by(workspace_of(args)) as hosted:
        rows = status(hosted)
    lines = [printable(_status_line(row)) for row in rows]
    return Outcome({"resources": rows}, lines or ["nothing at Fireworks: `understudy fireworks upload` begins"])


def _status_line(row: dict[str, Any]) -> str:
    parts = [f"{row['kind']}/{row['id']}  {row['state']}"]
    if row.get("percent") not in (None, 100):
        parts.append(f"{row['percent']} %")
    parts += [str(row[key]) for key in ("estimated_cost", "reason") if row.get(key)]
    return ", ".join(parts)


def fireworks_deploy(args: Namespace) -> Outcome:
    """Deploy a base that takes LoRA models, or a trained model merged into its base."""
    from serve.fireworks.hosting import deploy, remote_settings
    from serve.fireworks.requests import Hosting, create_deployment, full_name
    from serve.fireworks.training import trained_model

    workspace = workspace_of(args)
    settings, account = workspace.config.fireworks, _account(workspace)

    def hosting(model: str) -> Hosting:
        return Hosting(model, not args.merged, settings.accelerator, settings.scale_to_zero_seconds)

    if not args.merged and not (args.model or settings.base_model):
        raise UsageError("there is no base to deploy", "set fireworks.base_model, or name a model")
    if args.dry_run:
        named = args.model or ("MODEL" if args.merged else settings.base_model)
        return dry_run(workspace, [create_deployment(hosting(full_name(account, "models", named)))])
    with hosted_by(workspace) as hosted:
        model = trained_model(hosted, args.model).id if args.merged else args.model or settings.base_model
        result = deploy(hosted, hosting(full_name(account, "models", model)), args.again, not args.no_wait)
    lines = [f"deployment {result['deployment']}: {result['state']}"]
    if args.merged:
        result["remote"] = remote_settings(settings.url, result["model"], settings.api_key_env, full_name(account, "deployments", result["deployment"]))
        lines += remote_lines(result["remote"])
    else:
        lines.append("next: `understudy fireworks load-lora`")
    return Outcome(result, lines)


def fireworks_load_lora(args: Namespace) -> Outcome:
    """Load a trained model into a deployment, and say how to ask it."""
    from serve.fireworks.hosting import load, newest_deployment, remote_settings
    from serve.fireworks.requests import full_name, list_loaded, load_lora
    from serve.fireworks.training import trained_model

    workspace = workspace_of(args)
    settings, account = workspace.config.fireworks, _account(workspace)
    if args.dry_run:
        names = full_name(account, "models", args.model or "MODEL"), full_name(account, "deployments", args.deployment or "DEPLOYMENT")
        return dry_run(workspace, [list_loaded(*names), load_lora(*names)])
    with hosted_by(workspace) as hosted:
        result = load(hosted, trained_model(hosted, args.model).id, newest_deployment(hosted, args.deployment), not args.no_wait)
    result["remote"] = remote_settings(settings.url, result["model"], settings.api_key_env, result["deployment"])
    return Outcome(result, [f"{result['model']} in {result['deployment']}: {result['state']}", *remote_lines(result["remote"])])


def remote_lines(remote: dict[str, str]) -> list[str]:
    """What to write into understudy.yaml."""
    return ["to ask it, write into understudy.yaml:", "remotes:", "  hosted:", *(f'    {key}: "{value}"' for key, value in remote.items())]


def fireworks_download(args: Namespace) -> Outcome:
    """Bring a trained model's adapter here, and register it as any adapter from elsewhere."""
    from serve.fireworks.requests import download_endpoint
    from serve.fireworks.training import download, trained_model
    from train.exchange import import_adapter

    workspace = workspace_of(args)
    if args.dry_run:
        return dry_run(workspace, [download_endpoint(args.model or "MODEL")])
    with hosted_by(workspace) as hosted:
        brought = download(hosted, trained_model(hosted, args.model))
    result = import_adapter(workspace, brought["folder"], args.name or brought["name"], args.base or workspace.config.models.base, brought["dataset"] or None)
    lines = [f"adapter {result['adapter']}, to be served on {result['served_base']}; in {result['path']}", f"next: `understudy prove {result['adapter']}`"]
    return Outcome({**result, "model": brought["model"]}, lines)


def fireworks_delete(args: Namespace) -> Outcome:
    """Delete what this workspace made at Fireworks."""
    from serve.fireworks.hosting import check_kept, chosen, remove
    from serve.fireworks.ledger import Ledger
    from serve.fireworks.requests import delete

    workspace = workspace_of(args)
    ledger = Ledger(workspace, _account(workspace))
    resources = chosen(ledger, args.what)
    if not args.force:
        check_kept(ledger, resources)
    if args.dry_run:
        return dry_run(workspace, [delete(each.kind, each.id) for each in resources])
    with hosted_by(workspace) as hosted:
        for resource in resources:
            remove(hosted, resource)
            _report(f"{resource.key}: deleted")
    return Outcome({"deleted": [each.key for each in resources]}, [f"{len(resources)} deleted"])


def dry_run(workspace: Workspace, requests: list[Request]) -> Outcome:
    """The requests that would be made, the key redacted; nothing is sent."""
    from understudy.terminal import inert_json

    settings, account = workspace.config.fireworks, _account(workspace)
    shown = [request.shown(settings.url, account) for request in requests]
    lines = []
    for each in shown:
        lines += [f"{each['method']} {each['url']}", *(f"  {key}: {value}" for key, value in each["headers"].items())]
        lines += [f"  {inert_json(each['body'], None)}"] if "body" in each else []
        lines += [f"  file {each['file']['name']}, {each['file']['bytes']} bytes"] if "file" in each else []
    return Outcome({"requests": shown}, [*lines, "nothing was sent"])


def _account(workspace: Workspace) -> str:
    from serve.fireworks.api import account_of

    return account_of(workspace.config).id


def _dataset(workspace: Workspace, name: str | None) -> tuple[Path, str]:
    """The dataset's folder or file, and the digest of a dataset here ("" for a file, which has none)."""
    from train.dataset import find_dataset

    if name and Path(name).is_file():
        return Path(name), ""
    folder = find_dataset(workspace, name)
    return folder, folder.name


def _training(workspace: Workspace, args: Namespace) -> tuple[Training, str]:
    """What to train, from the arguments and the configuration, and the digest of its dataset."""
    from serve.fireworks.requests import Training, data_files
    from train.exchange import check_name

    check_name(args.name)
    path, dataset = _dataset(workspace, args.dataset)
    ids = {file.split: file.id for file in data_files(path)}
    base = "" if args.warm_start else args.base_model or workspace.config.fireworks.base_model
    return (
        Training(
            name=args.name,
            dataset=ids["train"],
            evaluation=ids.get("validation"),
            base_model=base,
            warm_start=args.warm_start or "",
            epochs=args.epochs,
            learning_rate=args.learning_rate,
            rank=args.rank,
            max_context=args.max_context,
        ),
        dataset,
    )
