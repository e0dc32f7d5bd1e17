"""The scorers against the official rules of SQuAD and HotpotQA, written here from their descriptions."""

from __future__ import annotations

import random
import string

import pytest

from atpo_fast.data.matching import exact_match, f1_score, normalise_answer

WORDS = [
    "a", "an", "the", "The", "AN", "yes", "no", "noanswer", "No", "Oslo", "oslo", "Zoë", "Zoe\u0308", "İzmir", "ǅ",
    "straße", "STRASSE", "Ａ", "1914–1918", "1914-1918", "“Oslo”", "O'Neil", "O’Neil", "!!!", "the-the", "a.", "_the_",
    "東京", "a東", "don't", "U.S.", "$", "½", "²", "\u00a0", "\u200b", "\t", "\n", "a\u0301", "Ａn", "3,000", "the1",
]  # fmt: skip


def official_normalise(text: str) -> str:
    """SQuAD: lower the text, remove ASCII punctuation, remove the words a, an, the, and fix white space."""
    kept = "".join(character for character in text.lower() if character not in string.punctuation)
    words, word = [], ""
    for character in [*kept, " "]:  # a word boundary is where letters, digits and underscores begin or end
        if character.isalnum() or character == "_":
            word += character
            continue
        words += [" " if word in ("a", "an", "the") else word, character]
        word = ""
    return " ".join("".join(words).split())


def official_em(prediction: str, gold: str) -> bool:
    return official_normalise(prediction) == official_normalise(gold)


def squad_f1(prediction: str, gold: str) -> float:
    """Precision and recall over the multisets of words."""
    predicted, wanted = official_normalise(prediction).split(), official_normalise(gold).split()
    left = list(wanted)
    shared = 0
    for word in predicted:
        if word in left:
            left.remove(word)
            shared += 1
    if not shared:
        return 0.0
    precision, recall = shared / len(predicted), shared / len(wanted)
    return 2 * precision * recall / (precision + recall)


def hotpot_f1(prediction: str, gold: str) -> float:
    """As SQuAD's, but yes, no and noanswer share nothing with any other answer."""
    sides = official_normalise(prediction), official_normalise(gold)
    special = ("yes", "no", "noanswer")
    return 0.0 if sides[0] != sides[1] and (sides[0] in special or sides[1] in special) else squad_f1(prediction, gold)


def random_text(generator: random.Random) -> str:
    parts = [generator.choice(WORDS) for _ in range(generator.randint(0, 5))]
    return generator.choice(["", " ", "\u3000"]).join(parts) if generator.random() < 0.2 else " ".join(parts)


def pairs(count: int) -> list[tuple[str, list[str]]]:
    """Predictions with golds that are often alike."""
    generator = random.Random(7)
    found = []
    for _ in range(count):
        gold = [random_text(generator) for _ in range(generator.randint(1, 3))]
        words = generator.choice(gold).split()
        generator.shuffle(words)
        near = " ".join(word for word in words if generator.random() < 0.8)
        found.append((generator.choice([near, near.upper(), random_text(generator), gold[0]]), gold))
    return found


def test_scores_are_the_official_ones() -> None:
    """Fails for another treatment of case, punctuation, articles, space, Unicode, yes and no, or several golds."""
    values = set()
    for prediction, golds in pairs(1000):
        em, f1 = exact_match(prediction, golds), f1_score(prediction, golds)
        assert normalise_answer(prediction) == official_normalise(prediction), repr(prediction)
        assert em == max(official_em(prediction, gold) for gold in golds), (prediction, golds)
        assert f1 == pytest.approx(max(hotpot_f1(prediction, gold) for gold in golds)), (prediction, golds)
        if not {"yes", "no", "noanswer"} & {official_normalise(text) for text in (prediction, *golds)}:
            assert f1 == pytest.approx(max(squad_f1(prediction, gold) for gold in golds)), (prediction, golds)
        values.add((em, f1))
    assert len(values) > 12 and {em for em, _ in values} == {0.0, 1.0}


def test_the_pairs_tell_rules_apart() -> None:
    """Fails if the pairs above would let a wrong rule pass: Unicode punctuation, or yes beside other words."""
    assert official_normalise("1914–1918") != official_normalise("1914-1918")
    assert squad_f1("no", "no way") > hotpot_f1("no", "no way") == 0.0
    found = pairs(1000)
    assert sum(any(squad_f1(p, g) != hotpot_f1(p, g) for g in golds) for p, golds in found) > 5
    assert sum(not p.isascii() for p, _ in found) > 300
