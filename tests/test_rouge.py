"""ROUGE-L: the published numbers on ASCII text, sense in other scripts, and time in proportion."""
import random
import time

import pytest
from rouge_score.rouge_scorer import RougeScorer

from safeeraser.metrics import rouge_l, MEASURES, rouge


def row(response, reference, **more): return {"response": response, "reference": reference, "verdicts": {}, **more}
def f1(response, reference): return rouge("fmeasure")(row(response, reference), {})
def random_text(rng, n): return "".join(rng.choice([f"{w}{sep}" for w in ("the", "Cups", "cup", "don't", "at_dawn", "running", "3.5", "a", "RED", "ties", "tied") for sep in (" ", ", ", "-", "\n")]) for _ in range(n))


@pytest.mark.parametrize("stems", [False, True])
def test_it_is_rouge_scores_number_on_ascii(stems):
    rng, scorer = random.Random(0), RougeScorer(["rougeL"], use_stemmer=stems)
    for _ in range(300):
        reference, response = (random_text(rng, rng.randrange(0, 40)) for _ in range(2))
        assert tuple(rouge_l(reference, response, stems)) == tuple(scorer.score(reference, response)["rougeL"]), (reference, response)


def test_stemmed_is_the_published_count_in_any_script():
    scorer = RougeScorer(["rougeL"], use_stemmer=True)
    for a, b in (("Größe 5 cups", "Grüße 5 cup"), ("杯子 red", "red 盒子"), ("Чашка", "Чашка")):
        assert tuple(rouge_l(a, b, stems=True)) == tuple(scorer.score(a, b)["rougeL"])


@pytest.mark.parametrize("text, other", [
    ("这是一个红色的杯子。", "这是一个蓝色的盒子。"), ("Красная чашка на столе.", "Синяя чашка под столом."), ("कप लाल रंग का है।", "कप नीले रंग का है।"),
    ("الكوب أحمر.", "الكوب أزرق."), ("Το φλιτζάνι είναι κόκκινο.", "Το κουτί είναι κόκκινο."), ("赤いカップです。", "青いカップです。"), ("컵은 빨간색입니다.", "컵은 파란색입니다."),
    ("ถ้วยสีแดง", "ถ้วยสีเขียว"), ("ခွက်က အနီရောင်", "ခွက်က အပြာရောင်"), ("Die Größe zählt.", "Die Grüße zählt.")])
def test_other_scripts(text, other):
    assert f1(text, text) == 1 and 0 < f1(text, other) < 1 and f1(text, "a red cup") == 0


def test_letters_of_their_own():
    assert f1("Größe", "Grüße") == 0 and f1("GRÖSSE été", "grösse ÉTÉ") == 1 and f1("e\u0301te\u0301", "\u00e9t\u00e9") == 1
    assert f1("I’m here", "I'm here") == 1


def test_what_cannot_be_compared_is_unscored():
    for reference in (None, 5, "", "...", "👍"): assert rouge("precision")(row("a cup", reference), {}) is None
    assert rouge("precision")({"response": "a cup"}, {}) is None
    of = MEASURES["rouge_l_precision"].of
    assert of(row("", "a cup", finish_reason="length"), "rule") is None and of(row("", "a cup"), "rule") == 0
    assert f1("<think>One cup, two cups?</think>a cup", "a cup") == 1


def test_long_texts_and_many_take_little_time():
    rng, lexicon = random.Random(1), [f"word{n}" for n in range(500)]
    long = [" ".join(rng.choices(lexicon, k=4000)) for _ in range(2)]
    begun = time.process_time()
    assert 0 < f1(*long) < 1
    assert time.process_time() - begun < 1
    texts = [" ".join(rng.choices(lexicon, k=60)) for _ in range(5001)]
    begun = time.process_time()
    for stems in (False, True):
        for a, b in zip(texts, texts[1:]): rouge_l(a, b, stems)
    assert time.process_time() - begun < 6
