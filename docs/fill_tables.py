"""Fills the tables of docs/performance.md from benchmarks/results/*.json: `python docs/fill_tables.py`."""

import json
import pathlib
import re
from collections.abc import Callable
from typing import Any

RESULTS = pathlib.Path(__file__).parents[1] / "benchmarks" / "results"
TABLES: dict[str, Callable[[], str]] = {}


def filled(page: str) -> str:
    return page


if __name__ == "__main__":
    page = pathlib.Path(__file__).parent / "performance.md"
    page.write_text(filled(page.read_text()))
