"""What the whole suite shares: where the browser is, and a loud word where it is not."""

import shutil

import pytest

NO_BROWSER = "BROWSER TESTS DID NOT RUN: Chromium is absent"


@pytest.fixture(scope="session")
def chromium() -> str:
    """Path of the machine's Chromium; a test that asks for it is skipped where there is none."""
    path = shutil.which("chromium") or shutil.which("chromium-browser")
    if path is None:
        pytest.skip(f"{NO_BROWSER} (on Debian: apt install chromium)")
    return path


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    skipped = terminalreporter.getreports("skipped")
    count = sum(NO_BROWSER in str(report.longrepr) for report in skipped)
    if count:
        terminalreporter.section("browser", sep="!", red=True, bold=True)
        terminalreporter.line(f"{NO_BROWSER} ({count} skipped; on Debian: apt-get install chromium)", red=True)
