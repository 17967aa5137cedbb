"""One request over HTTP or HTTPS: which redirects are followed, and what its failures mean. Heavy to import."""

from __future__ import annotations

import contextlib
import http.client
import ssl
import urllib.parse
import urllib.request
from collections.abc import Iterator, Mapping
from typing import IO, Any
from urllib.error import HTTPError, URLError

from hvctl.hostside.download import Broken, DownloadError, Missing, Refused, Stalled, check_address

__all__ = ["HTTPError", "ask", "translated"]

_MOST_REDIRECTS = 10


def ask(address: str, headers: Mapping[str, str], *, timeout_s: float) -> Any:
    """The answer, a stream with `status`, `headers` and `length`. Raises HTTPError, and what `translated` translates."""
    return _make_opener().open(urllib.request.Request(address, headers=dict(headers)), timeout=timeout_s)


@contextlib.contextmanager
def translated(stall_s: float) -> Iterator[None]:
    """What urllib, http.client and ssl raise, as a DownloadError."""
    try:
        yield
    except HTTPError as error:
        with error:
            raise _explain_status(error) from error
    except URLError as error:
        reason = error.reason
        if isinstance(reason, TimeoutError):
            raise Stalled(f"the server did not answer within {stall_s:g} s") from error
        if isinstance(reason, ssl.SSLCertVerificationError):
            raise Refused(f"the server's certificate is not valid: {reason.verify_message}") from error
        raise Broken(str(getattr(reason, "strerror", None) or reason)) from error
    except TimeoutError as error:
        raise Stalled(f"the server sent nothing for {stall_s:g} s") from error
    except (http.client.HTTPException, ConnectionError, ssl.SSLError) as error:
        raise Broken(f"the connection broke: {error or type(error).__name__}") from error


class _Redirects(urllib.request.HTTPRedirectHandler):
    """To https, or within the same scheme; nowhere else."""

    max_redirections = _MOST_REDIRECTS

    def redirect_request(
        self, req: urllib.request.Request, fp: IO[bytes], code: int, msg: str, headers: Any, newurl: str
    ) -> urllib.request.Request | None:
        _check_redirect(req.full_url, newurl)
        return super().redirect_request(req, fp, code, msg, headers, newurl)

    def http_error_302(self, req: urllib.request.Request, fp: Any, code: int, msg: str, headers: Any) -> Any:
        """The base class has an opinion of its own on schemes, and a less clear one: ours comes first."""
        target = headers.get("Location") or headers.get("URI") or ""
        _check_redirect(req.full_url, urllib.parse.urljoin(req.full_url, target))
        return super().http_error_302(req, fp, code, msg, headers)

    http_error_301 = http_error_303 = http_error_307 = http_error_308 = http_error_302


def _check_redirect(source: str, target: str) -> None:
    try:
        check_address(target)
    except Refused as error:
        raise Refused(f"the server sends us on to {target[:200]!r}, and {error}") from error
    if source.startswith("https:") and not target.startswith("https:"):
        raise Refused(f"the server sends us on from https to {target[:200]!r}, which anybody on the way could change")


def _make_opener() -> urllib.request.OpenerDirector:
    """For web servers alone: none of urllib's handlers for files, FTP or data."""
    opener = urllib.request.OpenerDirector()
    for handler in (
        urllib.request.ProxyHandler(),
        urllib.request.HTTPHandler(),
        urllib.request.HTTPSHandler(context=ssl.create_default_context()),
        urllib.request.HTTPErrorProcessor(),
        urllib.request.HTTPDefaultErrorHandler(),
        _Redirects(),
    ):
        opener.add_handler(handler)
    return opener


def _explain_status(error: HTTPError) -> DownloadError:
    words = f"the server answers {error.code} {error.reason}"
    if error.code in (http.HTTPStatus.NOT_FOUND, http.HTTPStatus.GONE):
        return Missing(words)
    may_pass = error.code >= 500 or error.code in (http.HTTPStatus.TOO_MANY_REQUESTS, http.HTTPStatus.REQUEST_TIMEOUT)
    return Broken(words) if may_pass else Refused(words)
