"""A pytest plugin for a GPU: a worker whose CUDA context is lost ends, so that its other tests run in a new one."""

from __future__ import annotations

import os

import pytest

__all__ = ["pytest_runtest_logfinish", "pytest_runtest_logreport"]

# After these every further call of the process fails with them.
LOST = (
    "illegal memory access", "misaligned address", "unspecified launch failure", "device-side assert",
    "illegal instruction", "an illegal address",
)  # fmt: skip
_lost = False


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    global _lost
    if report.failed and "CUDA" in report.longreprtext and any(words in report.longreprtext for words in LOST):
        _lost = True


@pytest.hookimpl(trylast=True)
def pytest_runtest_logfinish() -> None:
    # In a worker of pytest-xdist, which is replaced; the report has been sent.
    if _lost and "PYTEST_XDIST_WORKER" in os.environ:
        os._exit(1)
