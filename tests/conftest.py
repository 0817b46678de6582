"""Options of the test run."""

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    """Golden files are rewritten on demand only; the difference is for a reviewer to read."""
    parser.addoption("--update-goldens", action="store_true", help="rewrite golden files")
