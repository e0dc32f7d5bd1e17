"""Summaries, tables and comparisons of answers that are made by hand."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from atpo_fast.common.errors import DataError
from atpo_fast.evaluation import AnsweredQuestion, Sample
from atpo_fast.evaluation.answers import append_answers, read_answers, to_record, write_header
from atpo_fast.evaluation.compare import compare, render
from atpo_fast.evaluation.published import PUBLISHED, SIZES
from atpo_fast.evaluation.sets import BENCHMARKS, benchmark_of
from atpo_fast.evaluation.summary import summarise
from atpo_fast.evaluation.tables import benchmark_table, set_table


def question(name: str, number: int, *ems: float, answers: list[str | None] | None = None) -> AnsweredQuestion:
    """A question of a set, with one sample for each EM."""
    texts = answers or [f"{em}" for em in ems]
    samples = tuple(
        Sample(answer=text, em=em, f1=em, format=em > 0, turns=2, tool_calls=1, tokens=10, response_tokens=30)
        for text, em in zip(texts, ems, strict=True)
    )
    return AnsweredQuestion(set=name, id=str(number), question=f"{number}?", answers=("x",), samples=samples)


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.split("|")[1:-1]]


def test_averages_count_every_question_the_same() -> None:
    """Fails if sets are averaged with equal weights, or the groups of the published tables are mixed."""
    answered = [question("hotpotqa", i, 1.0) for i in range(3)] + [question("2wiki", 0, 0.0)]
    answered += [question("nq", i, 0.0) for i in range(4)] + [question("own", 0, 1.0)]
    found = summarise(answered)
    assert found.averages["multi-hop"].em.mean == 0.75
    assert found.averages["single-hop"].em.mean == 0.0
    assert found.averages["all"].em.mean == pytest.approx(4 / 9)
    with pytest.raises(ValueError, match="no questions"):
        summarise([])


def test_the_table_has_the_published_layout() -> None:
    """Fails if a value stands in another column, an average lacks its mark, or published rows are not marked."""
    names = ["hotpotqa", "2WikiMultihopQA", "musique", "Bamboogle", "popqa"]
    answered = [question(name, i, float(i < n)) for n, name in enumerate(names) for i in range(4)]
    lines = benchmark_table(summarise(answered))
    assert cells(lines[0])[1:] == [
        "HotpotQA", "2Wiki", "MuSiQue", "Bamboogle", "Avg", "NQ", "TriviaQA", "PopQA", "Avg"
    ]  # fmt: skip
    assert cells(lines[2])[1:] == ["0.00", "25.00", "50.00", "75.00", "37.50", "–", "–", "100.00", "100.00\\*"]
    (published,) = (line for line in lines if "published: Qwen3-4B" in line and line.startswith("|"))
    assert cells(published) == [
        "*published: Qwen3-4B + GRPO*", "44.76", "51.40", "21.60", "50.40", "46.0", "", "", "", ""
    ]  # fmt: skip
    assert any("average over popqa only" in line for line in lines)
    assert {len(cells(line)) for line in lines if line.startswith("|")} == {10}
    assert benchmark_table(summarise([question("own", 0, 1.0)])) == []


def test_published_averages_follow_from_their_rows() -> None:
    """Fails for a number that was copied wrongly: the averages are weighted by the numbers of questions."""
    for row in PUBLISHED:
        total = sum(SIZES[name] for name in row.exact_match)
        mean = sum(SIZES[name] * value for name, value in row.exact_match.items()) / total
        assert round(mean, 1) == row.average
        assert {b.name for b in BENCHMARKS if b.group == row.group} == set(row.exact_match)


@pytest.mark.parametrize(
    ("name", "expected"),
    [("tq", "TriviaQA"), ("2wiki", "2Wiki"), ("hotpot_qa", "HotpotQA"), ("Natural-Questions", "NQ"), ("gsm8k", None)],
)
def test_names_of_benchmarks(name: str, expected: str | None) -> None:
    found = benchmark_of(name)
    assert (found and found.name) == expected


def test_several_samples() -> None:
    """Fails if pass@k counts a mean, a vote is not normalised, or EM is not the mean over samples."""
    answered = [
        question("own", 0, 1, 1, 0, 0, answers=["Oslo", "the oslo!", "Rome", "Paris"]),
        question("own", 1, 0, 0, 0, 1, answers=[None, "no", "no", "yes"]),
    ]
    found = summarise(answered).sets["own"]
    assert found.em.mean == pytest.approx(3 / 8)
    assert found.pass_at == {1: pytest.approx(3 / 8), 2: pytest.approx((5 / 6 + 1 / 2) / 2), 4: 1.0}
    assert found.majority == 0.5
    headings, _, row = set_table(summarise(answered))
    shown = dict(zip(cells(headings), cells(row), strict=True))
    assert (shown["pass@1"], shown["pass@4"], shown["maj@4"], shown["questions"]) == ("37.50", "100.00", "50.00", "2")


def test_both_normalisations_are_reported() -> None:
    """Fails if one of them is that which the run scored by, or an unread answer is left out of the mean."""
    samples = tuple(Sample(answer=answer) for answer in ("1914–1918", "1914-1918", None, "1920"))
    answered = [AnsweredQuestion(set="nq", id="0", question="?", answers=("1914-1918",), samples=samples)]
    found = summarise(answered)
    normalised = found.sets["nq"].normalised
    assert (normalised["published"].em, normalised["unicode"].em, found.sets["nq"].em.mean) == (0.25, 0.5, 0.0)
    (row,) = (line for line in benchmark_table(found) if line.startswith("| EM, unicode"))
    assert cells(row)[-4:] == ["50.00", "–", "–", "50.00\\*"]


def test_files_round_trip_and_old_files_are_named(tmp_path: Path) -> None:
    """Fails if a field is lost, a lone surrogate breaks the file, or a repeated question counts twice."""
    answered = [question("own", 0, 1.0, 0.0), question("nq", 0, 0.5, answers=["\ud800é"])]
    write_header(tmp_path / "a.jsonl", {"model": "m"})
    append_answers(tmp_path / "a.jsonl", answered)
    assert read_answers(tmp_path / "a.jsonl") == ({"model": "m"}, answered)
    assert to_record(answered[0])["em"] == 0.5
    append_answers(tmp_path / "a.jsonl", answered[:1])
    with pytest.raises(DataError, match="'0' of the set 'own' stands there twice"):
        read_answers(tmp_path / "a.jsonl")
    (tmp_path / "old.jsonl").write_text(json.dumps({"id": "1", "em": 1.0}) + "\n")
    with pytest.raises(DataError, match="answered question 1 cannot be read"):
        read_answers(tmp_path / "old.jsonl")


def test_comparison_pairs_questions() -> None:
    """Fails if questions are paired by their order, those of one side count, or the sign is turned round."""
    first = [question("own", i, float(i < 2)) for i in range(10)]
    second = [question("own", i, float(i < 9)) for i in reversed(range(10))] + [question("nq", 0, 1.0)]
    found = compare(first, second)
    assert found.left_out == (0, 1) and list(found.sets) == ["own"]
    em = found.all.em
    assert (em.first, em.second, em.only_first, em.only_second) == (0.2, 0.9, 0, 7)
    assert em.difference.mean == pytest.approx(0.7) and em.difference.low > 0.3
    assert em.p_value == 2 / 2**7 and em.test == "McNemar, exact"
    assert "| own | 10 | EM | 20.00 | 90.00 | +70.00 (+" in render(found, ("a", "b"))
    assert "1 of b alone" in render(found, ("a", "b"))


def test_comparison_of_means_over_samples_is_randomised() -> None:
    """Fails if fractions are put into a test for right and wrong."""
    first = [question("own", i, 0.0, 1.0) for i in range(12)]
    second = [question("own", i, 1.0, 1.0) for i in range(12)]
    em = compare(first, second).all.em
    assert em.test == "paired randomisation" and em.p_value == pytest.approx(2 / 2**12, abs=1e-3)


def test_comparisons_that_make_no_sense() -> None:
    with pytest.raises(DataError, match="no question in common"):
        compare([question("own", 0, 1.0)], [question("nq", 0, 1.0)])
    changed = AnsweredQuestion(set="own", id="0", question="other?", answers=("x",), samples=(Sample(answer=None),))
    with pytest.raises(DataError, match="'0' of the set 'own' is not the same"):
        compare([question("own", 0, 1.0)], [changed])
