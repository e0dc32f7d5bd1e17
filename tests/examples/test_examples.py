"""Every example runs as its README says, and shows what it promises; that of a task: tests/integration.

Those that train have a model of one layer here: the loop, which is what they show, takes no notice of the layers.
"""

from __future__ import annotations

import ast
import re

import pytest

from tests.helpers.examples import ROOT, output


def test_custom_tool() -> None:
    """Fails if the tool is not described, a good call is not answered, or a bad one is not told what is wrong."""
    text = output("examples/custom_tool.py")
    form = '<convert> {"value": number, "unit": "km" or "mi", "digits": integer (optional)} </convert>'
    assert f"{form}: Convert a length from kilometres to miles, or from miles to kilometres. JSON schema: " in text
    assert "Unit that the value is given in." in text and "\nuser\nHow many miles are 42 km?" in text
    assert '{"value": 42, "unit": "km"} </convert> <result>\n26.1 mi\n</result>' in text
    assert "Tool(convert) was not called: unit: Input should be 'km' or 'mi'." in text


def test_minimal_at2po() -> None:
    """Fails if a station of the loop no longer takes what the one before it gives, or the loop outgrows a page."""
    text = output("examples/minimal_at2po.py", "--cold-start-steps", "10", "--steps", "2", one_layer=True)
    em = r"EM on 60 evaluation questions: [01]\.\d{3}\n"
    assert re.search(rf"cold start, step  10: \d+\.\d{{3}} nats a token\n{em}step   1: EM [01]\.\d{{3}}, ", text), text
    assert re.search(rf"\nstep   2: .*\n{em}", text), text
    source = (ROOT / "examples/minimal_at2po.py").read_text()
    loop = next(node for node in ast.parse(source).body if isinstance(node, ast.FunctionDef) and node.name == "train")
    assert loop.end_lineno is not None and loop.end_lineno - loop.lineno < 100


@pytest.mark.slow(reason="imports TRL, which trains two steps")
def test_trl_tree_search() -> None:
    """Fails if the leaves of our trees are no longer what TRL takes as completions."""
    pytest.importorskip("trl")
    text = output("examples/trl_tree_search.py", "--cold-start-steps", "3", "--steps", "2", one_layer=True)
    assert re.search(r"mean reward by step: -?[01]\.\d{3} -?[01]\.\d{3}\n", text), text
