"""What is wrong with a request, or with one instance of it: never more than may be told.

No message has a token, image bytes, a patient's tag or a path of the server in it.
"""

import logging
import traceback
from collections.abc import Mapping
from typing import Any

# Codes of the official container that say something here, and ours.
INTERNAL = "INTERNAL_ERROR"
INVALID_FIELD = "INVALID_REQUEST_FIELD_ERROR"
CREDENTIALS = "INVALID_CREDENTIALS_ERROR"
HTTP = "HTTP_ERROR"
NOT_ALLOWED = "UNAPPROVED_SOURCE_ERROR"  # ours; the official container fetches any address
BUSY = "TOO_MANY_REQUESTS_ERROR"  # ours: it would be answered later
DIMENSIONS = "IMAGE_DIMENSION_ERROR"
DICOM = "DICOM_ERROR"
UNREADABLE = "UNHANDLED_GENERIC_BYTES_ERROR"
OUTSIDE = "PATCH_OUTSIDE_OF_IMAGE_DIMENSIONS_ERROR"

LOG = logging.getLogger("medsiglip_jax.serve")
_LONGEST = 512  # characters of a description; an answer of 400 has at most 1 kB


class InstanceError(Exception):
    """One image or text of a request cannot be answered; the others can.

    Attributes:
        code: one of this module's.
        description: one line, at most 512 characters.
    """

    def __init__(self, code: str, description: str):
        self.code = code
        self.description = _one_line(description)
        super().__init__(f"{code}: {self.description}")

    def to_dict(self) -> dict[str, Any]:
        """As JSON has it: `code` and `description`."""
        return {"code": self.code, "description": self.description}


class RequestError(Exception):
    """A request cannot be answered at all.

    Attributes:
        status: of HTTP.
        message: one line.
        headers: such as Retry-After.
    """

    def __init__(self, status: int, message: str, headers: Mapping[str, str] | None = None):
        self.status, self.headers = status, dict(headers or {})
        self.message = _one_line(message)
        super().__init__(self.message)


def _one_line(text: str) -> str:
    return " ".join(text.split())[:_LONGEST]


def wrong_field(where: str, problem: str) -> RequestError:
    """The error of a field that is not as its contract says.

    Args:
        where: such as "instances[3].image.input_bytes".
        problem: such as "expected a string".
    """
    return RequestError(400, f"{where}: {problem}")


def note_bug(error: BaseException, request_id: str = "") -> None:
    """Logs the type of an error of ours and where it was raised, but not its message, which may
    quote the request; `request_id` is that of its line in the log."""
    frame = traceback.extract_tb(error.__traceback__)[-1]
    place = f"{frame.filename.rpartition('/')[2]}:{frame.lineno}"
    kind = type(error).__name__
    LOG.error("internal error", extra={"error": kind, "at": place, "request": request_id})
