"""The one error tree. Library code raises these; only the command line prints them and picks the exit code.

UnderstudyError            exit 1: failed, with a cause and a remedy
├── UsageError             exit 2: wrong arguments or configuration
├── NotFoundError          exit 1: a named thing is not there
├── StorageError           exit 1: the store or a file could not be read or written
├── DocumentError          exit 1: a document cannot be ingested (also its quarantine reason)
├── EndpointError          exit 1: a model endpoint failed or answered nonsense
├── EngineError            exit 1: the vLLM engine could not be started or died
├── TrainingError          exit 1: training cannot start or go on
├── AdapterError           exit 1: an adapter is not what it claims to be
└── GateFailed             exit 3: done, but a quality gate said no
"""


class UnderstudyError(Exception):
    """A failure that a person can act on: what happened, and what to do about it."""

    exit_code = 1
    code = "failed"

    def __init__(self, message: str, remedy: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.remedy = remedy


class UsageError(UnderstudyError):
    """The command or the configuration is wrong."""

    exit_code = 2
    code = "usage"


class NotFoundError(UnderstudyError):
    """A file, model, adapter or document that was named does not exist."""

    code = "not_found"


class StorageError(UnderstudyError):
    """The store or a file could not be read or written."""

    code = "storage"


class DocumentError(UnderstudyError):
    """A document cannot be ingested; its message is the quarantine reason."""

    code = "document"


class EndpointError(UnderstudyError):
    """A model endpoint failed, timed out, or broke its protocol."""

    code = "endpoint"


class EngineError(UnderstudyError):
    """The vLLM engine could not be started, or died."""

    code = "engine"


class TrainingError(UnderstudyError):
    """Training cannot start or cannot go on."""

    code = "training"


class AdapterError(UnderstudyError):
    """An adapter, its manifest or its files are not what they claim to be."""

    code = "adapter"


class GateFailed(UnderstudyError):
    """The work is done, but a proof or quality gate said no."""

    exit_code = 3
    code = "gate"
