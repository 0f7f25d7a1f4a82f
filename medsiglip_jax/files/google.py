"""Google's application default credentials: those of gcloud, of a key file, or of the machine."""

import threading
from collections.abc import Mapping

# Cloud Healthcare takes no narrower one that Cloud Storage takes, too; IAM says what may be read.
_SCOPE = "https://www.googleapis.com/auth/cloud-platform"


class Expired(PermissionError):
    """The credentials are not valid any more."""


class Credentials:
    """Application default credentials.

    Args:
        purpose: what needs them, for messages.

    Raises:
        ModuleNotFoundError: google-auth is not installed.
        ValueError: there are none.
    """

    def __init__(self, purpose: str):
        try:
            import google.auth
            from google.auth.exceptions import GoogleAuthError
        except ModuleNotFoundError:
            raise ModuleNotFoundError(
                f"{purpose} needs google-auth: pip install 'medsiglip-jax[gcs]'"
            ) from None
        try:
            self._credentials, _ = google.auth.default(scopes=[_SCOPE])
        except GoogleAuthError:
            raise ValueError(
                f"{purpose} needs Google's application default credentials, of which none can "
                "be found: run `gcloud auth application-default login`, or set "
                "GOOGLE_APPLICATION_CREDENTIALS to a key file"
            ) from None
        self._lock = threading.Lock()

    def headers(self) -> Mapping[str, str]:
        """The headers that authorize a request; blocks while a token is asked for.

        Raises:
            Expired: the credentials are not valid any more.
        """
        from google.auth.exceptions import GoogleAuthError
        from google.auth.transport.requests import Request

        headers: dict[str, str] = {}
        try:
            with self._lock:
                self._credentials.before_request(Request(), "GET", "", headers)
        except GoogleAuthError:
            raise Expired("Google's application default credentials are not valid") from None
        return headers
