"""Fireworks' management API on a local socket, as documented: strict about fields, states and orders, and failing as told.

Shapes: docs.fireworks.ai, "Gateway REST API" 4.259, and the types of fireworks-ai 1.2.30 (November 2026). Errors have google.rpc.Status's
form. What goes on there by itself (a dataset is checked, a job trains) goes on by one step each time it is looked at.
"""

from __future__ import annotations

import json
import re
import socket
import struct
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from email.message import Message
from email.parser import BytesParser
from email.policy import HTTP
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

KEY, ACCOUNT, BASE = "fw-very-secret-0123456789", "acme", "accounts/fireworks/models/little"
ID = re.compile(r"[a-z][a-z0-9-]{0,62}")
HOME = f"accounts/{ACCOUNT}"
FIELDS = {
    "datasets": {"datasetId", "dataset", "sourceDatasetId"},
    "dataset": {"displayName", "exampleCount", "userUploaded", "format"},
    "supervisedFineTuningJobs": {
        "displayName", "dataset", "evaluationDataset", "outputModel", "baseModel", "warmStartFrom", "epochs", "learningRate", "loraRank", "maxContextLength",
        "batchSize", "batchSizeSamples", "earlyStop", "evalAutoCarveout", "jinjaTemplate",
    },
    "deployments": {
        "displayName", "baseModel", "minReplicaCount", "maxReplicaCount", "autoscalingPolicy", "enableAddons", "acceleratorType", "acceleratorCount",
        "deploymentShape", "precision",
    },
    "deployedModels": {"model", "deployment", "displayName", "description", "default", "serverless", "public"},
    "upload endpoint": {"filenameToSize", "readMask"},
}  # fmt: skip
Fault = Callable[["Handler"], bool]  # whether the request is answered by it


class Refusal(Exception):
    """An error answer: HTTP status, google.rpc code and message."""

    def __init__(self, status: int, code: int, message: str) -> None:
        super().__init__(message)
        self.status, self.code, self.message = status, code, message


def invalid(message: str) -> Refusal:
    return Refusal(400, 3, message)


def precondition(message: str) -> Refusal:
    return Refusal(400, 9, message)


class FireworksServer:
    """The account `acme`, its key, and all that was made in it."""

    def __init__(self) -> None:
        self.resources: dict[str, dict[str, dict[str, Any]]] = {kind: {} for kind in ("datasets", "supervisedFineTuningJobs", "models", "deployments")}
        self.resources["deployedModels"] = {}
        self.coming: dict[str, list[dict[str, Any]]] = {}  # by KIND/ID: what a resource becomes, one step a look
        self.job_steps: list[dict[str, Any]] = [
            {"state": "JOB_STATE_VALIDATING"},
            {"state": "JOB_STATE_RUNNING", "jobProgress": {"percent": 40, "epoch": 0}},
            {"state": "JOB_STATE_COMPLETED", "jobProgress": {"percent": 100, "epoch": 1}},
        ]
        self.deployment_steps: list[dict[str, Any]] = [{"state": "READY"}]
        self.dataset_steps: list[dict[str, Any]] = [{"state": "READY"}]
        self.upload_limit = 150_000_000
        self.files: dict[str, bytes] = {}  # of every trained model
        self.stored: dict[str, bytes] = {}  # signed URL's token → what was put there
        self.faults: list[tuple[str, Fault]] = []  # a pattern of "METHOD path", and what happens to the next request that matches
        self.asked: list[str] = []
        self.made: list[str] = []  # KIND/ID of every creation that had an effect: what is paid
        self.sent: list[str] = []  # datasets whose rows were taken whole
        self.leaks: list[str] = []  # where a key came that is none of its business
        self.lock = threading.RLock()
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), type("Bound", (Handler,), {"fireworks": self}))
        self.server.daemon_threads = True
        threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True).start()
        self.url = f"http://127.0.0.1:{self.server.server_port}"

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()

    # creations

    def create(self, kind: str, body: dict[str, Any], query: dict[str, str]) -> dict[str, Any]:
        known(FIELDS[kind], body)
        identity, resource, steps = getattr(self, f"new_{kind}")(body, query)
        if not ID.fullmatch(identity):
            raise invalid(f"{identity!r} is not a resource id")
        if identity in self.resources[kind]:
            raise Refusal(409, 6, f"{HOME}/{kind}/{identity} already exists")
        self.resources[kind][identity] = {"name": f"{HOME}/{kind}/{identity}", **resource}
        self.coming[f"{kind}/{identity}"] = list(steps)
        self.made.append(f"{kind}/{identity}")
        return self.resources[kind][identity]

    def new_datasets(self, body: dict[str, Any], query: dict[str, str]) -> tuple[str, dict[str, Any], list[dict[str, Any]]]:
        known(set(), query)
        dataset = body.get("dataset") or {}
        known(FIELDS["dataset"], dataset)
        if dataset.get("userUploaded") != {} or not str(dataset.get("exampleCount", "")).isdigit() or not isinstance(dataset["exampleCount"], str):
            raise invalid("userUploaded and exampleCount (int64, a string in JSON) are required")
        if not 3 <= int(dataset["exampleCount"]) <= 3_000_000:
            raise invalid("a dataset has 3 to 3,000,000 examples")
        return str(body.get("datasetId")), {**dataset, "state": "UPLOADING"}, []

    def new_supervisedFineTuningJobs(self, body: dict[str, Any], query: dict[str, str]) -> tuple[str, dict[str, Any], list[dict[str, Any]]]:
        known({"supervisedFineTuningJobId"}, query)
        if ("baseModel" in body) == ("warmStartFrom" in body):
            raise invalid("exactly one of base_model and warm_start_from must be set")
        if "baseModel" in body and body["baseModel"] != BASE:
            raise Refusal(404, 5, f"model {body['baseModel']} not found")
        if "warmStartFrom" in body:
            self.named("models", body["warmStartFrom"])
        for dataset in (body.get("dataset"), body.get("evaluationDataset", body.get("dataset"))):
            if self.named("datasets", dataset)["state"] != "READY":
                raise precondition(f"dataset {dataset} is not ready")
        if not 4 <= body.get("loraRank", 8) <= 64 or not all(type(body.get(key, 1)) is int for key in ("epochs", "loraRank", "maxContextLength")):
            raise invalid("lora_rank must be 4 to 64, and epochs, lora_rank and max_context_length integers")
        output = str(body.get("outputModel", "")).removeprefix(f"{HOME}/models/")
        if not ID.fullmatch(output) or output in self.resources["models"]:
            raise invalid(f"output model {output!r} is not a new resource id")
        cost = {"currencyCode": "USD", "units": "2", "nanos": 500_000_000}
        return query.get("supervisedFineTuningJobId", "random-id"), {**body, "state": "JOB_STATE_CREATING", "estimatedCost": cost}, self.job_steps

    def new_deployments(self, body: dict[str, Any], query: dict[str, str]) -> tuple[str, dict[str, Any], list[dict[str, Any]]]:
        known({"deploymentId", "acceptShapelessRisk"}, query)
        window = str(body.get("autoscalingPolicy", {}).get("scaleToZeroWindow", "300s"))
        if not re.fullmatch(r"\d+s", window) or int(window[:-1]) < 300:
            raise invalid("scale_to_zero_window must be at least 5 minutes")
        if ("deploymentShape" in body) == (query.get("acceptShapelessRisk") == "true"):
            raise invalid("a deployment has a shape, or says that it accepts to have none")
        if body.get("baseModel") != BASE:
            model = self.named("models", body.get("baseModel"))
            if body.get("enableAddons"):
                raise invalid(f"{model['name']} is an addon: it takes none")
        return query.get("deploymentId", "random-id"), {**body, "state": "CREATING"}, self.deployment_steps

    def new_deployedModels(self, body: dict[str, Any], query: dict[str, str]) -> tuple[str, dict[str, Any], list[dict[str, Any]]]:
        known({"replaceMergedAddon"}, query)
        model, deployment = self.named("models", body.get("model")), self.named("deployments", body.get("deployment"))
        if deployment["state"] != "READY" or model["state"] != "READY":
            raise precondition("model and deployment must be ready")
        if not deployment.get("enableAddons") or deployment["baseModel"] != model["peftDetails"]["baseModel"]:
            raise precondition(f"{deployment['name']} takes no addons of {model['name']}")
        if any(each["model"] == body["model"] and each["deployment"] == body["deployment"] for each in self.resources["deployedModels"].values()):
            raise Refusal(409, 6, "the model is deployed there already")
        return f"loaded-{len(self.made)}", {**body, "state": "DEPLOYING"}, [{"state": "DEPLOYED"}]

    # what else is asked

    def named(self, kind: str, name: object) -> dict[str, Any]:
        found = self.resources[kind].get(str(name).removeprefix(f"{HOME}/{kind}/"))
        if found is None or not str(name).startswith(f"{HOME}/{kind}/"):
            raise Refusal(404, 5, f"{kind} {name} not found")
        return found

    def look(self, kind: str, identity: str) -> dict[str, Any]:
        found = self.named(kind, f"{HOME}/{kind}/{identity}")
        answer = dict(found)
        if steps := self.coming.get(f"{kind}/{identity}"):
            found |= steps.pop(0)
            if found["state"] == "JOB_STATE_COMPLETED":
                model = found["outputModel"].rpartition("/")[2]
                peft = {"baseModel": BASE, "r": found.get("loraRank", 8), "targetModules": ["q_proj"]}
                self.resources["models"][model] = {"name": f"{HOME}/models/{model}", "state": "UPLOADING", "kind": "HF_PEFT_ADDON", "peftDetails": peft}
                self.coming[f"models/{model}"] = [{"state": "READY"}]
            if found["state"] == "GONE":
                del self.resources[kind][identity]
        return answer

    def remove(self, kind: str, identity: str) -> dict[str, Any]:
        found = self.named(kind, f"{HOME}/{kind}/{identity}")
        if kind == "deployments" and any(each["deployment"] == found["name"] for each in self.resources["deployedModels"].values()):
            raise precondition("the deployment has loaded models")
        if kind == "deployedModels":  # takes a moment
            found["state"] = "UNDEPLOYING"
            self.coming[f"{kind}/{identity}"] = [{"state": "GONE"}]
            return {}
        if kind == "models" and any(each["model"] == found["name"] for each in self.resources["deployedModels"].values()):
            raise precondition("the model is deployed")
        del self.resources[kind][identity]
        return {}

    def loaded(self, query: dict[str, str]) -> dict[str, Any]:
        known({"filter", "pageSize", "pageToken", "orderBy", "readMask"}, query)
        wanted = re.fullmatch(r'model="([^"]+)" AND deployment="([^"]+)"', query.get("filter", ""))
        if not wanted:
            raise invalid("this server knows one filter")
        rows = [each for each in self.resources["deployedModels"].values() if (each["model"], each["deployment"]) == wanted.groups()]
        return {"deployedModels": rows, "totalSize": len(rows)}

    def take_rows(self, identity: str, content: bytes) -> None:
        """What happens to the rows of a dataset once they are all there."""
        dataset = self.named("datasets", f"{HOME}/datasets/{identity}")
        self.sent.append(identity)
        rows = [json.loads(line) for line in content.splitlines() if line.strip()]
        good = len(rows) == int(dataset["exampleCount"]) and all(is_conversation(row) for row in rows)
        self.coming[f"datasets/{identity}"] = list(self.dataset_steps) if good else []
        if not good:
            dataset["status"] = {"code": "INVALID_ARGUMENT", "message": "rows are not conversations, or not as many as stated"}


def known(fields: set[str], body: dict[str, Any]) -> None:
    if unknown := sorted(set(body) - fields):
        raise invalid(f"unknown field {unknown[0]!r}")


def is_conversation(row: Any) -> bool:
    messages = row.get("messages") if isinstance(row, dict) else None
    roles = [message.get("role") for message in messages or []]
    return bool(roles) and set(roles) <= {"system", "user", "assistant"} and "system" not in roles[1:] and all(isinstance(m["content"], str) for m in messages)


class Handler(BaseHTTPRequestHandler):
    fireworks: FireworksServer
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def do_GET(self) -> None:
        self.handle_any()

    def do_POST(self) -> None:
        self.handle_any()

    def do_PUT(self) -> None:
        self.handle_any()

    def do_DELETE(self) -> None:
        self.handle_any()

    def handle_any(self) -> None:
        parts = urlsplit(self.path)
        asked = f"{self.command} {unquote(parts.path)}"
        self.fireworks.asked.append(asked)
        for place, (pattern, fault) in enumerate(self.fireworks.faults):
            if re.search(pattern, asked):
                del self.fireworks.faults[place]
                if fault(self):
                    return
                break
        self.answer()

    def answer(self) -> None:
        """Do what was asked, by the book."""
        parts = urlsplit(self.path)
        query = {key: values[0] for key, values in parse_qs(parts.query).items()}
        content = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        try:
            with self.fireworks.lock:
                status, value = self.route(unquote(parts.path), query, content)
        except Refusal as refusal:
            status, value = refusal.status, {"code": refusal.code, "message": refusal.message, "details": []}
        self.send(status, value)

    def route(self, path: str, query: dict[str, str], content: bytes) -> tuple[int, Any]:
        if path.startswith("/bucket/"):
            return self.bucket(path.removeprefix("/bucket/"), content)
        if self.headers.get("Authorization") != f"Bearer {KEY}":
            raise Refusal(401, 16, "invalid API key")
        match = re.fullmatch(rf"/v1/accounts/{ACCOUNT}/(\w+)(?:/([^/:]+))?(?::(\w+))?", path)
        if not match or match[1] not in self.fireworks.resources:
            raise Refusal(404, 5, f"no route {path}")
        kind, identity, verb = match.groups()
        if verb:
            return 200, self.special(self.command, kind, identity, verb, content)
        if self.command == "POST" and identity is None:
            return 200, self.fireworks.create(kind, self.json_body(content), query)
        if self.command == "GET":
            return 200, self.fireworks.look(kind, identity) if identity else self.fireworks.loaded(query)
        if self.command == "DELETE" and identity:
            return 200, self.fireworks.remove(kind, identity)
        raise Refusal(405, 12, "no such method")

    def special(self, method: str, kind: str, identity: str, verb: str, content: bytes) -> dict[str, Any]:
        server = self.fireworks
        found = server.named(kind, f"{HOME}/{kind}/{identity}")
        if (method, kind, verb) == ("GET", "models", "getDownloadEndpoint"):
            if found["state"] != "READY":
                raise precondition("the model is not ready")
            return {"filenameToSignedUrls": {f"checkpoint/{name}": f"{server.url}/bucket/{identity}/{name}" for name in server.files}}
        if (method, kind) != ("POST", "datasets"):
            raise Refusal(404, 5, f"no method {verb}")
        if found["state"] != "UPLOADING":
            raise precondition(f"dataset {identity} is {found['state']}, not UPLOADING")
        if verb == "upload":
            name, rows = self.form_file(content)
            if len(rows) > server.upload_limit:
                raise Refusal(413, 3, "over the limit of one request: use getUploadEndpoint")
            server.take_rows(identity, rows)
            return {"id": identity, "object": "file", "bytes": len(rows), "filename": name, "purpose": "fine-tune"}
        body = self.json_body(content)
        if verb == "getUploadEndpoint":
            known(FIELDS["upload endpoint"], body)
            sizes = body.get("filenameToSize") or {}
            if len(sizes) != 1 or not all(isinstance(size, str) and size.isdigit() for size in sizes.values()):
                raise invalid("filename_to_size: one file, its size an int64 (a string in JSON)")
            (name, size) = next(iter(sizes.items()))
            return {"filenameToSignedUrls": {name: f"{server.url}/bucket/{identity}/{size}/{name}?X-Goog-Signature=secret"}}
        if verb == "validateUpload":
            if body:
                raise invalid("the body is {}")
            if identity not in server.stored:
                raise precondition("nothing was uploaded")
            server.take_rows(identity, server.stored[identity])
            return {}
        raise Refusal(404, 5, f"no method {verb}")

    def bucket(self, path: str, content: bytes) -> tuple[int, Any]:
        """Where signed URLs lead: files go in and come out, the key does not belong here."""
        if self.headers.get("Authorization"):
            self.fireworks.leaks.append(path)
        identity, _, rest = path.partition("/")
        if self.command == "PUT":
            size = rest.partition("/")[0]
            signed = (self.headers.get("Content-Type"), self.headers.get("x-goog-content-length-range"))
            if signed != ("application/octet-stream", f"{size},{size}") or len(content) != int(size):
                return 403, b"<Error><Code>SignatureDoesNotMatch</Code></Error>"
            self.fireworks.stored[identity] = content
            return 200, b""
        return 200, self.fireworks.files[rest]

    def json_body(self, content: bytes) -> dict[str, Any]:
        if not str(self.headers.get("Content-Type")).startswith("application/json"):
            raise invalid("the body is JSON")
        body = json.loads(content)
        assert isinstance(body, dict)
        return body

    def form_file(self, content: bytes) -> tuple[str, bytes]:
        head = f"Content-Type: {self.headers['Content-Type']}\r\n\r\n".encode()
        form: Message = BytesParser(policy=HTTP).parsebytes(head + content)
        parts = [(part.get_param("name", header="content-disposition"), part) for part in form.iter_parts()] if form.is_multipart() else []  # type: ignore[attr-defined]
        if [name for name, _ in parts] != ["file"] or not str(parts[0][1].get_filename()).endswith(".jsonl"):
            raise invalid("multipart/form-data with one .jsonl `file`")
        payload = parts[0][1].get_payload(decode=True)
        assert isinstance(payload, bytes)
        return str(parts[0][1].get_filename()), payload

    def send(self, status: int, value: Any, **headers: str) -> None:
        content = value if isinstance(value, bytes) else json.dumps(value).encode()
        wanted = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", "")) if status == 200 else None
        if wanted:
            start = int(wanted[1])
            status, headers = (206, {"Content_Range": f"bytes {start}-{len(content) - 1}/{len(content)}"}) if start < len(content) else (416, {})
            content = content[start:] if status == 206 else b""
        self.send_response(status)
        self.send_header("Content-Length", str(len(content)))
        for name, text in headers.items():
            self.send_header(name.replace("_", "-"), text)
        self.end_headers()
        self.wfile.write(content)

    def reset(self) -> None:
        """End the connection rudely."""
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.close_connection = True
        self.connection.shutdown(socket.SHUT_RDWR)

    def log_message(self, *_: object) -> None:
        pass


@contextmanager
def fireworks_server() -> Iterator[FireworksServer]:
    made = FireworksServer()
    try:
        yield made
    finally:
        made.close()
