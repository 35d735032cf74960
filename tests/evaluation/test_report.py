"""Plots and the HTML report: files that exist, stand alone, and claim no more than the data."""

from __future__ import annotations

import re
from dataclasses import replace
from html.parser import HTMLParser

import numpy as np
import pytest
from plad_fast.evaluation.report.html import headline, write_report

from plad_fast.errors import UsageError
from plad_fast.evaluation.calibration import ScoredSamples
from plad_fast.evaluation.compare import evaluate_students
from plad_fast.evaluation.report.parts import margin_unit
from plad_fast.evaluation.report.plots import (
    plot_comparison,
    plot_margins,
    plot_reliability,
    plot_training,
)
from plad_fast.evaluation.samples import measure_calibration
from plad_fast.evaluation.students import StudentOutputs

ATTACK = "<script>alert('x')</script> & \"quotes\""
WORDS = [f"w{i}" for i in range(13)]
HISTORY = [{"step": s, "loss": 2.0 / s, "active_pairs": 1.0 / s, "epoch": 1.0} for s in (1, 2, 3)]


def student(name, *, lead, kept, n=40):
    """Its margins are about `lead`, and it keeps that many of the teacher's words."""
    rng = np.random.default_rng(len(name))
    ids = [f"p{i}" for i in range(n)]
    answers = {key: " ".join(WORDS[: kept + i % 3]) for i, key in enumerate(ids)}
    rejected = rng.normal(-20.0, 3.0, n)
    return StudentOutputs(name, answers, rejected + rng.normal(lead, 1.0, n), rejected, ids)


def evaluate(*students, **options):
    return evaluate_students(
        students, dict.fromkeys(students[0].answers, " ".join(WORDS)), n_resamples=200, **options
    )


def samples(name, sign):
    """Quality rises with likelihood, or falls; one prompt of five has a single sample."""
    logps = [[-3.0, -2.0, -1.0]] * 4 + [[-1.0]]
    quality = [[0.5 + sign * x / 10 for x in row] for row in logps]
    return ScoredSamples(name, list("abcde"), logps, quality, [-2.0] * 5, n_unfinished=2)


def calibration(*students, quality="ROUGE-L to the reference"):
    return measure_calibration(students, 3, quality)


class Words:
    """Scorer and judge by the number of words."""

    name = "words"

    def score(self, items):
        return [len(text.split()) for _, text in items]

    def compare(self, items):
        return [1.0 if len(a) > len(b) else 0.0 for _, a, b in items]


SFT = student("SFT student", lead=0.0, kept=4)
PLAD = student("PLaD student", lead=3.0, kept=8)


class Page(HTMLParser):
    """Tags and the attributes that make a browser fetch something."""

    def __init__(self, html):
        super().__init__()
        self.tags, self.links = set(), []
        self.feed(html)

    def handle_starttag(self, tag, attributes):
        self.tags.add(tag)
        wanted = {"src", "href", "srcset", "action", "data"}
        self.links += [value for name, value in attributes if name in wanted]


@pytest.fixture(scope="module")
def plots(tmp_path_factory):
    folder = tmp_path_factory.mktemp("plots") / "new"
    stages = {"SFT": [*HISTORY, {"step": 3, "eval_loss": 1.0}], "Calibration": HISTORY}
    return [
        plot_training(stages, folder / "training.png"),
        plot_margins([SFT, PLAD], folder / "margins.png"),
        plot_comparison(evaluate(SFT, PLAD), folder / "comparison.png"),
        plot_reliability(
            calibration(samples("SFT student", -1), samples("PLaD student", 1)),
            folder / "reliability.png",
        ),
    ]


@pytest.fixture
def html(tmp_path, plots):
    judge = Words()
    judge.name = f"judge {ATTACK}"
    prompts = dict.fromkeys(SFT.answers, "q")
    metrics = evaluate(SFT, PLAD, scorers={ATTACK: Words()}, judge=judge, prompts=prompts)
    metrics["calibration"] = calibration(
        samples(f"SFT {ATTACK}", -1), samples("PLaD student", 1), quality=ATTACK
    )
    path = write_report(
        tmp_path / "report.html",
        title=f"Run {ATTACK}",
        config={"beta": 1.0, "hub_token": "hf_1", "sampling": {"api_key": "s3", "note": ATTACK}},
        stages=[{"name": ATTACK, "seconds": 3725.0, "summary": {ATTACK: 0.123456789}}],
        metrics=metrics,
        plots=[(ATTACK, path) for path in plots],
        examples=[
            {
                "prompt": ATTACK + "x" * 900,
                "teacher": ATTACK,
                "students": {"SFT student": "", ATTACK: ATTACK},
            },
            {"prompt": [{"role": "user", "content": ATTACK}], "teacher": "t", "reference": "r"},
        ],
        command=f"plad-fast distill --api-key s3cret --max-new-tokens 64 {ATTACK}",
        versions={"torch": ATTACK},
    )
    return path.read_text(encoding="utf-8")


def test_plots_are_small_png_files(plots):
    for path in plots:
        data = path.read_bytes()
        assert data.startswith(b"\x89PNG")
        assert 2_000 < len(data) < 100_000


def test_plots_of_one_example_and_of_ties(tmp_path):
    """No spread, no width: the axes still need one."""
    single = student("only", lead=1.0, kept=3, n=1)
    tied = StudentOutputs("tied", {}, [-1.0, -1.0], [-1.0, -1.0], ["a", "b"])
    for index, students in enumerate(([single], [tied])):
        assert plot_margins(students, tmp_path / f"{index}.png").exists()
    assert plot_comparison(evaluate(single), tmp_path / "comparison.png").exists()
    alone = ScoredSamples("one", ["a"], [[-1.0]], [[0.5]])
    assert plot_reliability(calibration(alone), tmp_path / "reliability.png").exists()


def test_nothing_to_plot(tmp_path):
    texts_only = StudentOutputs("SFT", {"p": "a"})
    row = {"name": "SFT", "reliability": {"rank": [], "quantile": []}}
    with pytest.raises(UsageError, match="no student has samples to draw"):
        plot_reliability({"students": [row]}, tmp_path / "a.png")
    with pytest.raises(UsageError, match="no training step was logged"):
        plot_training({"SFT": [{"step": 1, "train_runtime": 1.0}]}, tmp_path / "a.png")
    with pytest.raises(UsageError, match="no student was scored"):
        plot_margins([texts_only], tmp_path / "a.png")


def test_report_stands_alone_and_escapes_all_text(html):
    page = Page(html)
    assert "script" not in page.tags
    assert len(page.links) == 5
    assert all(link.startswith("data:") for link in page.links)
    assert not re.search(r"url\(|@import", html)
    # Title twice, caption in alt and figcaption of four plots, and each place that has text.
    assert html.count("&lt;script&gt;alert(&#x27;x&#x27;)&lt;/script&gt;") >= 24
    assert "<script" not in html


def test_report_shows_results_and_masks_secrets(html):
    text = re.sub(r"<[^>]+>", " ", html)
    for expected in ("Distillation paid off", "ROUGE-L to the teacher", "1 h 2 min", "0.123457"):
        assert expected in text
    assert "s3" not in re.sub(r'src="[^"]*"', "", html)
    assert "hf_1" not in text
    assert "--max-new-tokens 64" in text


def cells(html, label):
    """The text of a row's cells."""
    row = re.search(rf"<tr><th scope=row>{label}.*?</th>(.*?)</tr>", html)[1]
    return [re.sub(r"<[^>]+>", " ", cell).strip() for cell in re.findall("<td.*?</td>", row)]


def write(path, metrics):
    write_report(path, title="t", config={}, stages=[], metrics=metrics)
    return path.read_text(encoding="utf-8")


def test_report_counts_wins_by_every_scorer(tmp_path):
    prompts = dict.fromkeys(SFT.answers, "q")
    metrics = evaluate(SFT, PLAD, scorers={"word count": Words()}, prompts=prompts)
    html = write(tmp_path / "r.html", metrics)
    by_rouge, by_words = re.findall("<tbody><tr><th scope=rowgroup.*?</tbody>", html)
    assert "Judged by ROUGE-L to the teacher" in by_rouge
    assert "Judged by word count" in by_words
    for table in (by_rouge, by_words):
        share, counts, p_value = cells(table, "PLaD student <small>against SFT")
        assert share.split()[:2] == ["▲", "100%"]
        assert counts == "40&thinsp;/&thinsp;0&thinsp;/&thinsp;0"
        assert p_value == "p &lt; 0.001"
    # By default the teacher's answers are the measure, and nobody is compared with them.
    assert "against the teacher" not in by_rouge
    assert cells(by_words, "SFT student <small>against the teacher")[0].startswith("▼ 0%")
    assert cells(html, "Score: word count")[0].startswith("13.000")
    # More words are neither good nor bad, so the arrow has no colour.
    assert cells(html, "Words in an answer")[-1].startswith("▲ +4.0")
    assert '<td class="same">▲ +4.0' in html


def test_more_repetition_is_a_loss(tmp_path):
    loop = StudentOutputs("loop", dict.fromkeys(SFT.answers, "a b c d a b c d"))
    html = write(tmp_path / "r.html", evaluate(SFT, loop))
    assert '<td class="down">▲ +0.200' in html


def test_report_shows_the_calibration(tmp_path):
    metrics = evaluate(SFT, PLAD)
    metrics["calibration"] = calibration(samples("SFT student", -1), samples("PLaD student", 1))
    html = write(tmp_path / "r.html", metrics)
    assert [cell.split()[0] for cell in cells(html, "Better of two samples")[:2]] == ["0%", "100%"]
    assert cells(html, "Better of two samples")[2].startswith("▲ +100 pts")
    assert cells(html, "Kendall, within prompts")[1].startswith("1.00")
    assert cells(html, "Kendall, within prompts")[2].startswith("▲ +2.00")
    # The likeliest is 0.1 better than the mean of its prompt's three; of a single one, not at all.
    assert cells(html, "Gain by taking the likeliest")[1].startswith("0.100")
    assert "PLaD student: 13 samples, 4 of 5 prompts can be ranked, 2 samples left out" in html
    metrics["calibration"] = None
    assert "Likelihood and quality" not in write(tmp_path / "r.html", metrics)


def test_every_student_has_its_answer_under_its_own_name(tmp_path):
    """First and last in the colours of the plots, any number between."""
    answers = {"base": "b", "fine-tuned": "f", "distilled": "d"}
    path = write_report(
        tmp_path / "r.html",
        title="t",
        config={},
        stages=[],
        metrics=evaluate(SFT),
        examples=[
            {"prompt": "p", "teacher": "t", "students": answers},
            {"prompt": "p", "teacher": "t", "students": {"alone": "a"}},
        ],
    )
    found = re.findall(
        r'<div class="(\w+)"><h3>(.*?)</h3><p class="text">(.*?)</p>', path.read_text()
    )
    assert found == [
        ("teacher", "Teacher", "t"),
        ("first", "base", "b"),
        ("student", "fine-tuned", "f"),
        ("last", "distilled", "d"),
        ("teacher", "Teacher", "t"),
        ("last", "alone", "a"),
    ]


@pytest.mark.parametrize(
    ("alpha", "unit"), [(0.0, "nat"), (1.0, "nat per token"), (0.5, "nat per token^0.5")]
)
def test_the_unit_of_margins_follows_the_length_normalisation(alpha, unit, tmp_path):
    path = write_report(
        tmp_path / "r.html",
        title="t",
        config={},
        stages=[],
        metrics=evaluate(SFT),
        margin_unit=margin_unit(alpha),
    )
    assert f"Margin [{unit}]<" in path.read_text()


def test_report_of_the_bare_minimum(tmp_path):
    path = write_report(tmp_path / "r.html", title="t", config={}, stages=[], metrics=evaluate(SFT))
    html = path.read_text(encoding="utf-8")
    assert "evaluated alone" in html
    assert "<h2>Plots" not in html


@pytest.mark.parametrize("content", [None, b"GIF89a"])
def test_report_refuses_what_is_no_png(tmp_path, content):
    plot = tmp_path / "plot.png"
    if content:
        plot.write_bytes(content)
    report = tmp_path / "r.html"
    with pytest.raises(UsageError, match=r"plot\.png"):
        write_report(
            report, title="t", config={}, stages=[], metrics=evaluate(SFT), plots=[("c", plot)]
        )
    assert not report.exists()


@pytest.mark.parametrize(
    ("first", "last", "opening"),
    [
        ((0.0, 4), (3.0, 8), "Distillation paid off: b answers better than a."),
        ((0.0, 8), (3.0, 4), "Distillation did harm: b answers worse than a."),
        ((0.0, 4), (3.0, 4), "b learned to prefer the teacher's answers, but its own answers are"),
        ((3.0, 4), (0.0, 4), "Distillation did harm: b prefers the teacher's answers less"),
        ((0.0, 4), (0.0, 4), "Distillation bought nothing measurable: b is no better than a."),
    ],
)
def test_headline_says_what_the_intervals_allow(first, last, opening):
    students = [
        student(name, lead=lead, kept=kept)
        for name, (lead, kept) in zip("ab", (first, last), strict=True)
    ]
    assert headline(evaluate(*students)).startswith(opening)


def test_headline_concludes_nothing_from_a_handful():
    students = [student("a", lead=0.0, kept=4, n=5), student("b", lead=9.0, kept=9, n=5)]
    assert "too small to tell whether b is better than a" in headline(evaluate(*students))


def test_headline_concludes_nothing_from_many_pairs_of_a_handful_of_prompts():
    students = [student("a", lead=0.0, kept=4), student("b", lead=3.0, kept=4)]
    few = [replace(s, pair_prompts=[f"p{i % 8}" for i in range(40)]) for s in students]
    text = headline(evaluate(*few))
    assert text.startswith("Distillation bought nothing measurable: b is no better than a.")
    assert "of 40 pairs of 8 prompts, a in" in text


def test_headline_concludes_nothing_from_a_handful_of_verdicts():
    """Of many prompts a judge decided few."""
    students = [student(name, lead=0.0, kept=kept) for name, kept in (("a", 4), ("b", 8))]
    metrics = evaluate(*students)
    metrics["comparisons"][0]["wins"] = {"wins": 5, "ties": 0, "losses": 0, "p_value": 0.0625}
    text = headline(metrics)
    assert text.startswith("Distillation bought nothing measurable: b is no better than a.")
    assert "On 5 held-out prompts" in text


def test_headline_tells_whose_merit_it_was():
    """Both beat the untrained student; the last stage added nothing."""
    students = [
        student(name, lead=3.0, kept=kept) for name, kept in (("base", 2), ("SFT", 8), ("PLaD", 8))
    ]
    text = headline(evaluate(*students))
    assert text.startswith("Distillation paid off: PLaD answers better than base.")
    assert text.endswith(
        "Against SFT it wins 50% (95% interval 50% to 50%): no measurable difference."
    )


def test_what_to_look_at_in_the_data_stands_first_and_is_escaped(tmp_path):
    data = {
        "findings": [f"3 of 4 answers are {ATTACK}"],
        "funnels": {ATTACK: [("prompts", 4, {}), ("kept", 1, {"empty": 2, "close": 1})]},
    }
    metrics = evaluate(student("A", lead=1, kept=5))
    options = {"title": "t", "config": {}, "stages": [], "metrics": metrics}
    page = write_report(tmp_path / "r.html", data=data, **options).read_text()
    assert "<script" not in page
    assert page.index("<h2>Check your data</h2>") < page.index("<h2>Results</h2>")
    assert "<td>2 empty, 1 close</td>" in page
    page = write_report(tmp_path / "r.html", data={"findings": []}, **options).read_text()
    assert "Check your data" not in page
    assert "dropped.jsonl" not in page
