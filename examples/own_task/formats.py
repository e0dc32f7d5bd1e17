"""Write the questions of this example as other trainers keep theirs: `python examples/own_task/formats.py FOLDER`."""

from __future__ import annotations

import csv
import json
import sys
from pathlib import Path

import pyarrow
import pyarrow.parquet

QUESTIONS = Path(__file__).parent / "train.jsonl"


def main(folder: Path) -> None:
    """Write verl.parquet, trl.jsonl and sums.csv."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = [json.loads(line) for line in QUESTIONS.read_text().splitlines()]
    verl = [
        {
            "data_source": "sums",
            "prompt": [{"role": "user", "content": row["question"]}],
            "ability": "math",
            "reward_model": {"style": "rule", "ground_truth": str(row["answer"])},
            "extra_info": {"split": "train", "index": i},
        }
        for i, row in enumerate(rows)
    ]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(verl), folder / "verl.parquet")
    trl = [{"prompt": [{"role": "user", "content": row["question"]}], "solution": str(row["answer"])} for row in rows]
    (folder / "trl.jsonl").write_text("".join(json.dumps(row) + "\n" for row in trl))
    with (folder / "sums.csv").open("w", newline="") as file:
        table = csv.DictWriter(file, ["problem", "result"])
        table.writeheader()
        table.writerows({"problem": row["question"], "result": row["answer"]} for row in rows)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
