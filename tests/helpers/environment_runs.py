"""Trees of an environment from the command line, written by a small model that was taught its actions.

An action is what the policy writes: plain text, or a pair of a tool and the text between its tags.
"""

from __future__ import annotations

import contextlib
import json
import random
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from atpo_fast.environment import Result, Session, format_result
from atpo_fast.environment.arguments import SchemaArguments
from atpo_fast.environment.own_code import load_own
from atpo_fast.environment.tags import parse_call, unescape_tags
from atpo_fast.rollout.branch import hashed
from atpo_fast.tree.storage import read_forest, read_forest_texts
from tests.helpers.adapter_sessions import Caller, caller
from tests.helpers.forked_runs import start_command
from tests.helpers.runs import ROOT

MODEL = {"hidden_size": 64, "layers": 2, "heads": 4, "kv_heads": 2, "head_dim": 16, "intermediate_size": 128}
CALLS = 3
Action = str | tuple[str, str]


@dataclass(frozen=True)
class Rolled:
    """What `atpo-fast rollout` printed, and what its trees hold."""

    counts: dict[str, int]
    paths: list[tuple[str, list[tuple[str, str]]]]  # id of the question, (action, observation) of each turn
    branched: int  # turns with an observation that several turns continue


def roll_out(folder: Path, factory: str, task: dict[str, Any], actions: list[Action], long: bool = False) -> Rolled:
    """Teach a model from scratch to write some actions, and roll out trees of four questions with it.

    `long` openings are questions of their own too, behind those rolled out, so that the tokenizer learns their words.
    """
    tasks = [{"id": str(i), "question": f"Task {i}.", "answers": ["x"], **task} for i in range(8)]
    played = _demonstrations(factory, tasks, actions)
    openings = [{**tasks[0], "id": f"opening {i}", "question": one["question"]} for i, one in enumerate(played[:8])]
    _write(folder / "questions.jsonl", tasks + (openings if long else []))
    _write(folder / "demonstrations.jsonl", played)
    probe = [_written(action) for action in actions[:2]]
    config = {
        "run_dir": str(folder / "run"),
        "deepspeed": str(ROOT / "configs/deepspeed/zero3.json"),
        "device": "cpu",
        "data": {"train_files": [str(folder / "questions.jsonl")]},
        "task": {"prompt": "short", "rewards": ["session"]},
        "environment": {"factory": factory, "probe": probe},
        "model": {"dtype": "float32", "max_positions": 1024, **MODEL},
        "tools": {"builtin": [], "call_limit": CALLS, "max_result_tokens": 64},
        "rollout": {
            "temperature": 0.7,
            "initial_chains": 4,
            "expansion_rounds": 2,
            "expansions_per_round": 3,
            "max_turn_tokens": 32,
            "max_response_tokens": 256,
        },
        "cold_start": {"demonstrations": str(folder / "demonstrations.jsonl"), "steps": 80, "batch_size": 8},
        "train": {"questions_per_step": 8},
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    out = folder / "trees.jsonl"
    _run("cold-start", "--config", str(folder / "config.yaml"))
    printed = _run("rollout", "--config", str(folder / "config.yaml"), "--questions", "4", "--out", str(out))
    (line,) = [line for line in printed.splitlines() if line.startswith("sessions: ")]
    found = re.findall(r"(\d+) (opened|actions|lost|native|copied|by replay|mismatches)", line)
    counts = {name: int(number) for number, name in found}
    print(line)
    return Rolled(counts, _paths(out), sum(_branches(out)))


def played_alone(factory: str, task: dict[str, Any], rolled: Rolled) -> list[tuple[str, str]]:
    """Repeat every path in a session of its own; the observations (recorded, repeated) of all actions that succeed."""
    open_session, pairs = load_own(factory, "factory"), []
    with caller() as call:
        for name, path in rolled.paths:
            record = {"id": name, "question": f"Task {name}.", "answers": ["x"], **task}
            session = call(open_session(record, hashed(0, name, 0, "session")))
            for text, observation in path[1:]:
                action = _read(text, session)
                if action is not None and "<result>" in observation:
                    with contextlib.suppress(Exception):  # what it raises is an answer too, in other words
                        pairs.append((unescape_tags(observation), format_result(_act(call, session, action).text, str)))
            call(session.close())
    return pairs


def _written(action: Action) -> str:
    tool, text = ("act", action) if isinstance(action, str) else action
    return f"<{tool}> {text} </{tool}>"


def _read(text: str, session: Session) -> Action | None:
    """Read the action that a turn holds, if it holds one."""
    tools = [tool["function"]["name"] for tool in getattr(session, "tools", [])]
    found = parse_call(text, tools or ["act"])
    if found is None or found.problem:
        return None
    return (found.tool, found.argument) if tools else found.argument


def _act(call: Caller, session: Session, action: Action) -> Result:
    if isinstance(action, str):
        return call.steps(session, action)[0]
    (schema,) = (tool["function"]["parameters"] for tool in session.tools if tool["function"]["name"] == action[0])
    return call.calls(session, (action[0], SchemaArguments(schema).parse(action[1])))[0]


def _demonstrations(factory: str, tasks: list[dict[str, Any]], actions: list[Action]) -> list[dict[str, Any]]:
    """Chains of actions drawn from a list, in real sessions."""
    draw, records = random.Random(0), []
    open_session = load_own(factory, "factory")
    with caller() as call:
        for seed, task in enumerate(tasks * 8):
            session = call(open_session(task, seed))
            turns: list[dict[str, str]] = []
            done = False
            while len(turns) < CALLS and not done:
                action = draw.choice(actions)
                result = _act(call, session, action)
                turns.append({"action": _written(action), "observation": format_result(result.text)})
                done = result.done
            call(session.close())
            turns.append({"action": "<answer> done </answer>"})
            opening = f"\n{session.opening}" if session.opening else ""
            records.append({"question": task["question"] + opening, "turns": turns})
    return records


def _paths(out: Path) -> list[tuple[str, list[tuple[str, str]]]]:
    paths = []
    for tree, record in zip(read_forest(out), read_forest_texts(out, 99), strict=True):
        for leaf in tree.leaves:
            turns = [record["turns"][n] for n in tree.path(leaf)]
            paths.append((str(tree.question_id), [(turn["text"], turn["observation"]) for turn in turns]))
    return paths


def _branches(out: Path) -> list[int]:
    return [
        sum(len(turn.children) > 1 and bool(len(turn.observation_ids)) for turn in tree.turns[1:])
        for tree in read_forest(out)
    ]


def _run(*words: str) -> str:
    output, _ = start_command(*words).communicate(timeout=900)
    print(output[-1500:])
    return output


def _write(path: Path, records: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
