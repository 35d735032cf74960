"""The files of an evaluation. Its report stands alone, escapes all text, masks secrets and shows
every result."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from html import unescape
from html.parser import HTMLParser

import pytest

from plad_fast.data.prompts import Prompt
from plad_fast.evaluation.held_out import HeldOut
from plad_fast.evaluation.report.plots import plot_margins
from plad_fast.evaluation.report.write import (
    example_answers,
    margin_unit,
    write_report,
    write_results,
)
from plad_fast.evaluation.students import StudentOutputs
from plad_fast.training.trained_folders import LOG
from tests.support.evaluations import PLAD, SFT, WORDS, Words, calibration, evaluate, samples

PROMPTS = [Prompt(key, f"Question {key}", "r" if key == "p1" else None) for key in SFT.answers]
HELD_OUT = HeldOut(PROMPTS, dict.fromkeys(SFT.answers, " ".join(WORDS)), [], [])
ATTACK = "<script>alert('x')</script> & \"quotes\""


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


@pytest.fixture
def html(tmp_path):
    judge = Words()
    judge.name = f"judge {ATTACK}"
    prompts = dict.fromkeys(SFT.answers, "q")
    metrics = evaluate(SFT, PLAD, scorers={ATTACK: Words()}, judge=judge, prompts=prompts)
    metrics["calibration"] = calibration(
        samples(f"SFT {ATTACK}", -1), samples("PLaD student", 1), quality=ATTACK
    )
    plot = plot_margins([SFT, PLAD], tmp_path / "plot.png")
    path = write_report(
        tmp_path / "report.html",
        title=f"Run {ATTACK}",
        config={"beta": 1.0, "hub_token": "hf_1", "sampling": {"api_key": "s3", "note": ATTACK}},
        stages=[{"name": ATTACK, "seconds": 3725.0, "summary": {ATTACK: 0.123456789}}],
        metrics=metrics,
        data={
            "findings": [ATTACK],
            "funnels": {ATTACK: [(ATTACK, 4, {}), ("kept", 1, {ATTACK: 2, "close": 1})]},
        },
        plots=[(ATTACK, plot)],
        examples=[
            {
                "group": ATTACK,
                "prompt": ATTACK + "x" * 900,
                "teacher": ATTACK,
                "students": {"SFT student": "", ATTACK: ATTACK},
            },
            {"prompt": [{"role": "user", "content": ATTACK}], "teacher": "t", "reference": ATTACK},
        ],
        command=f"plad-fast distill --api-key s3cret --max-new-tokens 64 {ATTACK}",
        versions={"torch": ATTACK},
    )
    return path.read_text(encoding="utf-8")


def test_report_stands_alone_and_escapes_all_text(html):
    page = Page(html)
    assert "script" not in page.tags
    assert len(page.links) == 2
    assert all(link.startswith("data:") for link in page.links)
    assert not re.search(r"url\(|@import", html)
    assert "default-src 'none'; img-src data:; style-src 'unsafe-inline'" in html
    # Title and caption twice, the long prompt's beginning too, and each place that has text.
    assert html.count("&lt;script&gt;alert(&#39;x&#39;)&lt;/script&gt;") >= 26
    assert "<script" not in html


def test_report_shows_results_and_masks_secrets(html):
    text = re.sub(r"<[^>]+>", " ", html)
    for expected in ("PLaD student answers better", "ROUGE-L to the teacher", "1 h 2 min"):
        assert expected in text
    assert "0.123457" in text
    assert "s3" not in re.sub(r'src="[^"]*"', "", html)
    assert "hf_1" not in text
    assert "--max-new-tokens 64" in text


def cells(html, label):
    """The text of a row's cells."""
    row = re.search(rf'<tr><th scope="row">{label}.*?</th>(.*?)</tr>', html, re.DOTALL)[1]
    return [plain(cell) for cell in re.findall("<td.*?</td>", row)]


def plain(html):
    return " ".join(unescape(re.sub(r"<[^>]+>", " ", html)).split())


def write(path, metrics, **options):
    write_report(path, **{"title": "t", "config": {}, "stages": [], "metrics": metrics, **options})
    return path.read_text(encoding="utf-8")


def test_report_counts_wins_by_every_scorer(tmp_path):
    prompts = dict.fromkeys(SFT.answers, "q")
    metrics = evaluate(SFT, PLAD, scorers={"word count": Words()}, prompts=prompts)
    html = write(tmp_path / "r.html", metrics)
    by_rouge, by_words = re.findall(r'<tbody><tr><th scope="rowgroup".*?</tbody>', html, re.DOTALL)
    assert "Judged by ROUGE-L to the teacher" in by_rouge
    assert "Judged by word count" in by_words
    for table in (by_rouge, by_words):
        share, counts, p_value = cells(table, "PLaD student <small>against SFT")
        assert share.split()[:2] == ["▲", "100%"]
        assert (counts.replace(" ", ""), p_value) == ("40/0/0", "p < 0.001")
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
    assert cells(html, "Kendall")[1].startswith("1.00")
    assert cells(html, "Kendall")[2].startswith("▲ +2.00")
    # The likeliest is 0.1 better than the mean of its prompt's three; of a single one, not at all.
    assert cells(html, "Gain by taking the likeliest")[1].startswith("0.100")
    counts = "PLaD student: 13 samples, 4 of 5 prompts can be ranked, 2 samples left out"
    assert counts in plain(html)
    metrics["calibration"] = None
    assert "Likelihood and quality" not in write(tmp_path / "r.html", metrics)


def test_every_student_has_its_answer_under_its_own_name(tmp_path):
    """First and last in the colours of the plots; an answer that was cut off is marked."""
    answers = {"base": "b", "fine-tuned": "f", "distilled": "d"}
    html = write(
        tmp_path / "r.html",
        evaluate(SFT, PLAD),
        examples=[
            {"prompt": "p", "teacher": "t", "students": answers, "badge": "lost",
             "cut_off": ["fine-tuned"]},
            {"prompt": "p", "teacher": "t", "students": {"alone": "a"}},
        ],
    )  # fmt: skip
    found = re.findall(r'<div class="(\w+)"><h3>(.*?)</h3><p class="text">(.*?)</p>', html, re.S)
    assert [(kind, plain(name), text) for kind, name, text in found] == [
        ("teacher", "Teacher", "t"),
        ("first", "base", "b"),
        ("student", "fine-tuned cut off", "f"),
        ("last", "distilled", "d"),
        ("teacher", "Teacher", "t"),
        ("last", "alone", "a"),
    ]
    assert re.findall(r'class="badge (\w+)">', html) == ["lost", "cut"]
    assert "PLaD student against SFT student, judged by ROUGE-L" in plain(html)


def test_report_of_the_bare_minimum(tmp_path):
    html = write(tmp_path / "r.html", evaluate(SFT))
    assert "evaluated alone" in html
    for section in ("Plots", "Example answers", "Check your data", "Judge", "Settings"):
        assert f"<h2>{section}" not in html
    assert "dropped.jsonl" not in html


def test_the_funnel_and_the_findings_stand_before_the_results(tmp_path):
    data = {
        "findings": ["3 of 4 answers are blank"],
        "funnels": {"pairs": [("prompts", 4, {}), ("kept", 1, {"empty": 2, "close": 1})]},
    }
    html = write(tmp_path / "r.html", evaluate(SFT), data=data)
    headings = re.findall("<section.*?<h2>(.*?)</h2>", html, re.DOTALL)
    assert headings == ["From prompts to kept pairs", "Check your data", "Results"]
    assert cells(html, "kept") == ["1", "", "2 empty, 1 close"]
    assert 'style="width: 25.0%"' in html


def test_one_call_writes_all_files(tmp_path):
    results = evaluate(SFT, PLAD)
    results["calibration"] = calibration(samples("SFT student", -1), samples("PLaD student", 1))
    model = tmp_path / "model"
    model.mkdir()
    (model / LOG).write_text(json.dumps([{"step": 1, "loss": 1.0}, {"step": 2, "loss": 0.5}]))
    folder = tmp_path / "run"
    report = write_results(
        folder,
        results,
        [SFT, PLAD],
        HELD_OUT,
        title="Evaluation of two students",
        config={"beta": 1.0},
        length_normalization=1.0,
        trainings={"calibration": model, "of a model from elsewhere": tmp_path},
    )
    assert report == folder / "report.html"
    assert json.loads((folder / "metrics.json").read_text()) == results
    names = {"comparison", "margins", "reliability", "training"}
    assert {file.stem for file in (folder / "plots").iterdir()} == names
    html = report.read_text()
    assert html.count("data:image/png") == len(names)
    assert "Margin [nat per token]<" in html


def test_examples_hold_the_biggest_wins_and_losses():
    """The others are the first prompts, in their order."""
    mixed = {key: SFT.answers[key] for key in SFT.answers}
    mixed |= {"p7": " ".join(WORDS), "p8": " ".join(WORDS[:10]), "p9": " ".join(WORDS[:5])}
    mixed |= {"p20": "w0", "p21": "", "p22": "w0 w1"}
    last = replace(PLAD, answers=mixed, cut_off={"p7", "p1"})
    examples = example_answers(HELD_OUT, [SFT, last], evaluate(SFT, last))
    shown = [(e["group"], e["badge"], e["prompt"].split()[1]) for e in examples]
    assert shown == [
        ("Biggest wins", "won", "p7"),
        ("Biggest wins", "won", "p8"),
        ("Biggest losses", "lost", "p20"),
        ("Biggest losses", "lost", "p21"),
        *(("Other prompts", "tied", f"p{i}") for i in range(4)),
    ]
    assert examples[0]["cut_off"] == ["PLaD student"]
    assert examples[0]["students"] == {
        "SFT student": SFT.answers["p7"],
        "PLaD student": mixed["p7"],
    }
    assert [e["reference"] for e in examples[4:6]] == [None, "r"]


def test_examples_of_one_student_are_the_first_prompts():
    examples = example_answers(HELD_OUT, [SFT], evaluate(SFT))
    assert [e["prompt"] for e in examples] == [f"Question p{i}" for i in range(8)]
    assert {(e["group"], e["badge"]) for e in examples} == {("", None)}


@pytest.mark.parametrize(
    ("alpha", "unit"), [(0.0, "nat"), (1.0, "nat per token"), (0.5, "nat per token^0.5")]
)
def test_the_unit_of_margins_follows_the_length_normalisation(alpha, unit):
    assert margin_unit(alpha) == unit
