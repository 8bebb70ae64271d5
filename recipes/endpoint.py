"""JSON over HTTP, as SGLang's servers speak it."""

from __future__ import annotations

from typing import Any

import requests


class Endpoint:
    """A running SGLang server.

    Args:
        url: its address. timeout: seconds to wait for one answer.
    """

    def __init__(self, url: str, timeout: float) -> None:
        self.url = url.rstrip("/")
        self._timeout = timeout

    def ask(self, path: str, body: Any = None) -> Any:
        """The answer to a POST of ``body``, or to a GET without one.

        Raises:
            RuntimeError: the server cannot be reached, or answers with an error.
        """
        url = f"{self.url}/{path}"
        try:
            response = requests.request(
                "GET" if body is None else "POST", url, json=body, timeout=self._timeout
            )
        except requests.RequestException as error:
            raise RuntimeError(f"{url}: {error}; is an SGLang server running there?") from error
        if not response.ok:
            raise RuntimeError(f"{url}: HTTP {response.status_code}: {response.text[:500]}")
        return response.json()
