"""The tests marked gpu, without those that compile for minutes; a row for each as it ends."""

from __future__ import annotations

import sys

import pytest

from benchmarks.common import ROOT
from benchmarks.gpu.worker import Section


class Rows:
    def __init__(self, section: Section) -> None:
        self.section = section
        self.count = 0

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when != "call" and report.passed:
            return
        self.count += 1
        with self.section.row(test=report.nodeid.rpartition("::")[2]) as row:
            row["seconds"] = round(report.duration, 2)
            if report.skipped:
                reason = report.longrepr[2]  # type: ignore[index]
                row["status"] = f"skipped: {reason.removeprefix('Skipped: ')}"
            elif report.failed:
                row["status"] = f"failed: {report.longreprtext.splitlines()[-1]}"[:300]


def main() -> int:
    section = Section("tests")
    rows = Rows(section)
    files = [
        str(path)
        for path in sorted((ROOT / "tests").rglob("test_*.py"))
        if "pytest.mark.gpu" in path.read_text(encoding="utf-8")
    ]
    options = ["-q", "-p", "no:cacheprovider", "-m", "gpu", "-k", "not graph and not flex"]
    status = pytest.main([*options, *files], plugins=[rows])
    return max(section.finish(), int(status), int(rows.count == 0))


if __name__ == "__main__":
    sys.exit(main())
