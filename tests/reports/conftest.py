"""Evidence for a report, with and without times."""

from __future__ import annotations

from dataclasses import replace

import pytest
from report_evidence import make_evidence

from igate_edge.reports.report import Evidence


@pytest.fixture
def evidence() -> Evidence:
    return make_evidence()


@pytest.fixture
def untimed() -> Evidence:
    return replace(make_evidence(), bench=None)
