"""Embedded engines in processes of their own: ``python tests/engines.py JOB RESULT``.

The job is a JSON list of engines to run one after the other, the result the list of what each
answered. A spawned scheduler imports this file again, so it stays light.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

RUN_SECONDS = 900  # two engine starts on a busy machine


class EngineRun:
    """A process that runs embedded engines; several such processes may run at a time.

    Args:
        engines: per engine ``kwargs`` of ``sglang.Engine``, ``environment`` that its processes see
            and ``requests``, each the keyword arguments of one ``Engine.generate``.
        folder: where job, result and log go.
        environment: of the whole process.
    """

    def __init__(
        self, engines: list[dict[str, Any]], folder: Path, environment: dict[str, str]
    ) -> None:
        self._result, self.log = folder / "result.json", folder / "log"
        job = folder / "job.json"
        job.write_text(json.dumps(engines))
        self._process = subprocess.Popen(
            [sys.executable, __file__, str(job), str(self._result)],
            env=environment,
            stdout=self.log.open("wb"),
            stderr=subprocess.STDOUT,
        )

    def results(self) -> list[dict[str, Any]]:
        """``answers`` and ``stats`` of each engine, once the process has ended.

        Raises:
            AssertionError: it failed; shows its log.
        """
        try:
            code = self._process.wait(RUN_SECONDS)
        finally:
            self._process.terminate()
        log = self.log.read_text(errors="replace")
        assert code == 0 and "Traceback" not in log, f"engines ended with {code}:\n{log[-8000:]}"
        results: list[dict[str, Any]] = json.loads(self._result.read_text())
        return results


def run_engine(engine: dict[str, Any]) -> dict[str, Any]:
    """Start one engine, answer its requests in order, and shut it down.

    Returns:
        ``answers``, and ``stats``: the PatternKV numbers after each of them.
    """
    import sglang

    os.environ.update(engine["environment"])
    runtime = sglang.Engine(**engine["kwargs"])
    answers, stats = [], []
    try:
        for request in engine["requests"]:
            answers.append(runtime.generate(**request))
            (state,) = runtime.get_server_info()["internal_states"]
            stats.append(state.get("patternkv"))
    finally:
        runtime.shutdown()
        for name in engine["environment"]:
            del os.environ[name]
    return {"answers": answers, "stats": stats}


if __name__ == "__main__":
    _, job, result = sys.argv
    engines = json.loads(Path(job).read_text())
    Path(result).write_text(json.dumps([run_engine(engine) for engine in engines]))
