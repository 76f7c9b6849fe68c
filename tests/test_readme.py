"""README's code runs, and its support table is what ``explain`` says."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from t2i.pipeline import SHIPPED
from t2i_kernels import explain
from t2i_kernels.registry import ORDER, ops

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")


def test_support_table():
    rows = re.findall(r"^\| `(\w+)` \| (.+) \|$", README, re.MULTILINE)
    table = {op: dict(zip(ORDER, cells.split(" | "), strict=True)) for op, cells in rows}
    expected = {
        op: {
            row.backend: "–" if (row.reason or "").startswith("this version has no") else "yes"
            for row in explain(op)
        }
        for op in ops()
    }
    assert table == expected


@pytest.mark.parametrize("number", range(2))
def test_code(number, tmp_path, monkeypatch):
    code = re.findall(r"```python\n(.*?)```", README, re.DOTALL)[number]
    if "from_pretrained()" in code and not (SHIPPED / "model.json").exists():
        pytest.skip("no weights ship with this version")
    monkeypatch.chdir(tmp_path)
    exec(compile(code, "README.md", "exec"), {})
