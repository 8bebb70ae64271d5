"""``python -m sglang.launch_server --kv-quant patternkv``: requests, cache, numbers, bad requests."""

from __future__ import annotations

import re
import threading
import uuid
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import pytest
import requests

from tests.servers import AT_4_BITS, assert_close, request, tokens_of

if TYPE_CHECKING:
    from tests.servers import Launcher, Model, Server
