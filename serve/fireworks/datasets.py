"""Bring a dataset's files to Fireworks: each under an id made of its content, so that what is there is never sent again."""

from __future__ import annotations

import time
from typing import Any

from serve.fireworks.ledger import SENT, Resource, state_of
from serve.fireworks.making import Hosted, ensure, wait
from serve.fireworks.requests import LARGEST_UPLOAD, DataFile, Request, create_dataset, get, upload_dataset, upload_endpoint, validate_upload
from serve.fireworks.wire import ApiError
from understudy.errors import EndpointError

READY, UPLOADING = "READY", "UPLOADING"


def upload_requests(file: DataFile) -> list[Request]:
    """What `upload` asks for a file that is not there yet, in order; a signed URL's own PUT is left out."""
    sending = [upload_endpoint(file), validate_upload(file)] if is_large(file) else [upload_dataset(file)]
    return [get("datasets", file.id), create_dataset(file), *sending, get("datasets", file.id)]


def is_large(file: DataFile) -> bool:
    """Whether a file is too large for one request."""
    return file.path.stat().st_size > LARGEST_UPLOAD


def upload(hosted: Hosted, file: DataFile, dataset: str) -> dict[str, Any]:
    """Bring one file over, unless it is there; the result is its part of the command's JSON.

    `dataset` is the digest of the dataset here. A run that was cut off is gone on with: a file that was taken is not sent again.
    Raises EndpointError.
    """
    facts = {"dataset": dataset, "split": file.split, "rows": str(file.rows)}
    resource = Resource(kind="datasets", id=file.id, facts=facts, created_at=time.time())
    found = ensure(hosted, resource, create_dataset(file), is_paid=False)
    if was_there := state_of(found) == READY:
        check_count(file, found)
    else:
        known = hosted.ledger.get("datasets", file.id)
        if known is None or known.facts.get("rows sent") != SENT:
            send(hosted, file)
            hosted.ledger.saw(resource, state_of(found), **{"rows sent": SENT})
        try:
            check_count(file, wait(hosted, resource, found))
        except EndpointError as error:
            if not isinstance(error, ApiError):  # an answer, and a bad one: the next run sends the rows anew
                hosted.ledger.saw(resource, UPLOADING, **{"rows sent": ""})
            raise
    return {"id": file.id, "split": file.split, "rows": file.rows, "bytes": file.path.stat().st_size, "state": READY, "sent": not was_there}


def send(hosted: Hosted, file: DataFile) -> None:
    """Send a file's rows: in one request, or to a signed URL where it is too large for that. Raises ApiError."""
    size = file.path.stat().st_size
    try:
        with hosted.show_progress(f"{file.path.name} (bytes)", size) as progress:
            if not is_large(file):
                hosted.api.call(upload_dataset(file), progress)
                return
            urls = hosted.api.call(upload_endpoint(file)).get("filenameToSignedUrls")
            url = urls.get(file.path.name) if isinstance(urls, dict) else None
            if not isinstance(url, str):
                raise ApiError(f"Fireworks named no place to send {file.path.name} to", "run the command again", status=400)
            hosted.api.put_file(url, file.path, progress)
        hosted.api.call(validate_upload(file))
    except ApiError:
        found = hosted.api.find("datasets", file.id)
        if found is None or state_of(found) != READY:  # an upload whose answer was lost
            raise


def check_count(file: DataFile, found: dict[str, Any]) -> None:
    """Raise EndpointError where the dataset there has another number of rows."""
    count = found.get("exampleCount")
    if count is not None and str(count) != str(file.rows):
        raise EndpointError(
            f"dataset {file.id} has {count} rows at Fireworks, and {file.path.name} has {file.rows}",
            f"`understudy fireworks delete datasets/{file.id}`, then upload again",
        )
