"""Random calls of what stands around the ops: rows, batches, pairs, metrics, prompts, options.

See `tests.support.fuzzing`. Valid calls are held to a few lines of Python, or to what must hold of
any result; the others have one fault.
"""

from __future__ import annotations

import functools
import json
import math
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from tests.support.fuzzing import Case, Draw, call_text

TEXTS = ["a", "one two", "the cat sat on the mat the cat sat on", "Ünïcödé ß", "猫が好き", "x" * 40]
NO_TEXT: list[Any] = [None, 5, 1.5, [], ["a"], b"bytes", {"role": "user"}]
NO_COUNT: list[Any] = [None, "5", 1.5, 0, -1, math.nan]


def plain(name: str, fn: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any],
          check: Callable[[Any], None], names: tuple[str, ...] = ()) -> Case:  # fmt: skip
    return Case(call_text(name, *args, **kwargs), lambda: fn(*args, **kwargs), check, names)


@functools.cache
def tokenizer() -> Any:
    """A token for every byte, and three special ones."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: i for i, token in enumerate(["<pad>", "<s>", "</s>", *alphabet])}
    made = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    made.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=made, bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    )


def encoding(draw: Draw) -> Case:
    from plad_fast.data.text_ids import TextIds

    prompt, size = draw.choice(TEXTS), draw.randint(1, 4)
    texts = [draw.choice(TEXTS) for _ in range(size)]
    options: dict[str, Any] = {
        "max_length": draw.randint(2, 90), "truncation_side": draw.choice(["left", "right"]),
    }  # fmt: skip
    names: tuple[str, ...] = ()
    if draw.maybe(0.4):
        fault = draw.choice(["prompt", "responses", "max_length", "truncation_side", "unicode"])
        names = (fault,)
        if fault == "prompt":
            prompt = draw.choice(NO_TEXT[:3])
        elif fault == "responses":
            texts = draw.choice([[], None, 5, [None], [5]])
            names = ("response",)
        elif fault == "unicode":
            texts, names = ["\ud800"], ("response", "Unicode", "surrogate")
        else:
            # A group that cannot fit is no fault: `fits` says so.
            kinds = {"max_length": [None, "5", 1.5, math.nan], "truncation_side": [None, "up", 3]}
            options[fault] = draw.choice(kinds[fault])
    arguments = (prompt, texts)

    def check(group: Any) -> None:
        longest = max(len(ids) for ids in group["response_ids"])
        room = options["max_length"] - longest
        assert group["fits"] == (room >= 1), "fits"
        for text, ids in zip(texts, group["response_ids"], strict=True):
            assert text in tokenizer().decode(ids), "a response was cut"
        if group["fits"]:
            assert len(group["prompt_ids"]) + longest <= options["max_length"], "too long"
        assert group["prompt_ids"], "no prompt"

    return plain("encode", TextIds(tokenizer()).encode, arguments, options, check, names)


def collating(draw: Draw) -> Case:
    import torch

    from plad_fast.data.packing import PreferenceCollator

    size, layout = draw.randint(1, 4), draw.choice(["padded", "packed", "shared"])

    def ids(low: int, high: int) -> list[int]:
        return [draw.randrange(50) for _ in range(draw.randint(low, high))]

    features: Any = [
        {"prompt_ids": ids(1, 6), "response_ids": [ids(0, 5) for _ in range(size)]}
        for _ in range(draw.randint(1, 4))
    ]
    if draw.maybe(0.3):
        for feature in features:
            feature["scores"] = [draw.random() for _ in range(size)]
    options: dict[str, Any] = {"layout": layout}
    names: tuple[str, ...] = ()
    if draw.maybe(0.3):
        options["layout"], names = draw.choice([None, "", 5]), ("layout",)
    elif draw.maybe(0.3):
        features[-1]["response_ids"], names = [[1]] * (size + 1), ("responses",)

    def call() -> Any:
        return PreferenceCollator(0, size, **options)(features)

    def check(batch: Any) -> None:
        responses = [r for f in features for r in f["response_ids"]]
        assert batch["targets"].tolist() == [token for r in responses for token in r]
        assert batch["cu_seqlens"].diff().tolist() == [len(r) for r in responses]
        # A model whose hidden state is its input: what predicts a token is the token before it.
        rows = batch["input_ids"][..., None]
        if layout == "padded":
            before = rows.flatten(0, 1)[batch["loss_rows"], 0]
        else:
            before = batch["row_layout"].predicting(rows)[:, 0]
        expected = [
            token
            for feature in features
            for r in feature["response_ids"]
            for token in [feature["prompt_ids"][-1], *r][: len(r)]
        ]
        assert before.tolist() == expected, "rows that predict"
        if "scores" in features[0]:
            scores = torch.tensor([s for f in features for s in f["scores"]])
            assert torch.equal(batch["scores"], scores)

    text = call_text("PreferenceCollator", 0, size, **options) + f"({features!r})"
    return Case(text, call, check, names)


def pairing(draw: Draw) -> Case:
    from plad_fast.data.prompts import Prompt
    from plad_fast.pairs.build import build_pairs
    from plad_fast.pairs.generation.text_model import Answer
    from plad_fast.pairs.select import NEED_SCORES, SELECTIONS, PairFilters

    prompts = [Prompt(str(i), draw.choice(TEXTS)) for i in range(draw.randint(1, 4))]

    ends = ["stop", "stop", "length"]

    def answers(most: int) -> dict[str, list[Answer]]:
        return {
            p.id: [
                Answer(p.id, draw.choice([*TEXTS, ""]), draw.choice(ends), 1, n)
                for n in range(draw.randint(0, most))
            ]
            for p in prompts
            if draw.maybe(0.9)
        }  # fmt: skip

    given = answers(2), answers(3)
    scores = {
        (a.prompt_id, a.text): draw.choice([0.0, 1.0, draw.random(), math.nan, -math.inf])
        for of_model in given
        for several in of_model.values()
        for a in several
    }
    select = draw.choice(sorted(SELECTIONS))
    ranges: dict[str, list[Any]] = {
        "min_gap": [0.5, 0], "max_length_ratio": [2, 1.0], "max_repetition": [0.2, 1],
        "max_overlap": [0.5, 0],
    }  # fmt: skip
    filters = {name: draw.choice(of) for name, of in ranges.items() if draw.maybe(0.15)}
    options: dict[str, Any] = {"select": select, "scores": scores if draw.maybe(0.7) else None}
    # With no pair left that is said, with the reasons.
    names: tuple[str, ...] = ("no pair is left",)
    fault = draw.choice(["", "", "", "select", "filter", "list_size", "ids"])
    if options["scores"] is None and (select in NEED_SCORES or "min_gap" in filters):
        names = ("scores",)
        fault = ""
    elif fault == "select":
        options["select"], names = draw.choice(["best", None, 3]), ("selection",)
    elif fault == "filter":
        name = draw.choice(sorted(ranges))
        filters[name], names = draw.choice([-1, math.nan, "1", [1], -math.inf]), (name,)
    elif fault == "list_size":
        options["list_size"], names = draw.choice([0, 1, -2, "2", 1.5]), ("list_size",)
    elif fault == "ids":
        prompts.append(prompts[0])
        names = ("prompt ids",)
    must = names != ("no pair is left",)

    def call() -> Any:
        return build_pairs(prompts, *given, filters=PairFilters(**filters), **options)

    def check(result: Any) -> None:
        rows, report = result
        assert report.kept == len(rows) > 0, "the report does not add up"
        assert report.total == report.kept + sum(report.dropped.values())
        texts = {a.text for of_model in given for several in of_model.values() for a in several}
        for row in rows:
            responses = row.get("responses") or [row["chosen"], row["rejected"]]
            assert {r.strip() for r in responses} <= texts, "an answer nobody gave"
            if select == "ranked":
                assert row["scores"] == sorted(row["scores"], reverse=True), "not by score"

    text = f"build_pairs({prompts}, {given}, filters={filters}, {options})"
    return Case(text, call, check, names, may_pass=not must)


def measuring(draw: Draw) -> Case:
    from plad_fast.evaluation import metrics
    from plad_fast.pairs import text_metrics

    which = draw.choice(["rouge", "distinct_n", "bootstrap", "sign_test"])
    count = draw.randint(1, 5)
    texts: Any = [draw.choice([*TEXTS, ""]) for _ in range(count)]
    if which == "rouge":
        others = [draw.choice(TEXTS) for _ in texts]

        def check(found: Any) -> None:
            for values in found.values():
                assert values.shape == (count,)
                assert ((values >= 0) & (values <= 1)).all()
            for text, other, value in zip(texts, others, found["rougeL"], strict=True):
                assert not text or text != other or not value or value == 1.0, "itself"

        return plain("rouge", text_metrics.rouge, (texts, others), {}, check, ())
    if which == "distinct_n":
        n = draw.randint(1, 4)

        def check_share(found: Any) -> None:
            def grams(text: str) -> list[tuple[str, ...]]:
                words = text_metrics.words(text)
                return [tuple(words[i : i + n]) for i in range(max(0, len(words) - n + 1))]

            together = [gram for text in texts for gram in grams(text)]
            want = len(set(together)) / len(together) if together else 0.0
            assert math.isclose(found, want, abs_tol=1e-12), f"{found}, not {want}"

        return plain(which, text_metrics.distinct_n, (texts, n), {}, check_share, ())
    values: Any = [draw.choice([0.0, 0.5, 1.0]) for _ in range(count)]
    names: tuple[str, ...] = ()
    fault = draw.choice(["", "", "values", "n_resamples", "seed"])
    bad = draw.choice(
        [[], None, 5, "text", [[1.0, 2.0]], [math.nan], [math.inf], ["a"], [1j], [[1], [1, 2]]]
    )  # fmt: skip
    if fault == "values":
        values, names = bad, ("values ", "outcomes", "outcome")
    if which == "sign_test":

        def check_sign(found: Any) -> None:
            assert found.wins + found.ties + found.losses == count
            assert 0 < found.p_value <= 1

        return plain(which, metrics.sign_test, (values,), {}, check_sign, names)
    options: dict[str, Any] = {"n_resamples": draw.choice([2, 50])}
    if fault == "n_resamples":
        options[fault], names = draw.choice([*NO_COUNT, 1]), (fault,)
    elif fault == "seed":
        options[fault], names = draw.choice(["x", -1, 1.5]), (fault,)

    def check_interval(found: Any) -> None:
        assert math.isclose(found.mean, np.mean(values), abs_tol=1e-12)
        assert found.low <= found.mean <= found.high

    return plain(which, metrics.paired_bootstrap, (values,), options, check_interval, names)


@functools.cache
def folder() -> Path:
    """Gone with the process."""
    folder.keep = tempfile.TemporaryDirectory()  # type: ignore[attr-defined]
    return Path(folder.keep.name)  # type: ignore[attr-defined]


def reading(draw: Draw) -> Case:
    from plad_fast.data.prompts import load_prompts

    chat = [{"role": "user", "content": "hi"}]
    good = [draw.choice([*TEXTS, chat]) for _ in range(draw.randint(1, 4))]
    rows: list[Any] = [{"prompt": p, "answer": "x"} for p in good]
    options: dict[str, Any] = {}
    names: tuple[str, ...] = ()
    fault = draw.choice(["", "", "value", "row", "json", "bytes", "column", "limit", "template"])
    if fault == "value":
        rows[-1]["prompt"] = draw.choice([None, 5, "", "  ", [], [5], [{"role": "user"}], "\ud800"])
        names = ("prompt",)
    elif fault == "row":
        rows[-1], names = draw.choice([None, 5, "text", []]), ("line", "row", "prompt")
    elif fault == "column":
        options["prompt_column"], names = draw.choice(["no", "", "prompt "]), ("column",)
    elif fault == "limit":
        options["limit"], names = draw.choice([0, -1, "5", 1.5]), ("limit",)
    elif fault == "template":
        options["prompt_template"] = draw.choice(["{no}", "{", "{}", "plain", "{prompt[x]}"])
        names = ("template",)
    path = folder() / f"{draw.torch_seed()}.jsonl"
    data = "\n".join(json.dumps(row) for row in rows).encode()
    if fault == "json":
        data, names = data + b'\n{"prompt": ', ("line", path.name)
    elif fault == "bytes":
        data, names = data + b'\n{"prompt": "\xff"}', ("UTF-8", "utf-8", path.name)

    def call() -> Any:
        path.write_bytes(data)
        try:
            return load_prompts(path, **options)
        finally:
            os.unlink(path)

    def check(found: Any) -> None:
        assert [p.content for p in found] == good
        assert len({p.id for p in found}) == len(good)

    return Case(f"load_prompts({data!r}, {options})", call, check, names)


def configuring(draw: Draw) -> Case:
    from plad_fast.losses.registry import available
    from plad_fast.training.config import PLaDConfig

    faults: dict[str, list[Any]] = {
        "loss": [None, "plad", 5, ["dpo"]],
        "beta": [math.nan, math.inf, -1.0, "x"],
        "sft_weight": [math.nan, math.inf, -0.1, "x"],
        "length_normalization": [math.nan, -1.0, "x"],
        "temperature": [0.0, -1.0, math.nan, "x", None],
        "max_length": [0, 1, -5, "x", None],
        "truncation_side": [None, "middle", 5],
        "layout": [None, "rows", 5],
        "attention": [None, "fast", 5],
        "max_tokens_per_batch": [0, -1, "x"],
        "impl": [None, "cuda", 5],
        "scratch_mib": [0, -1, "x"],
        "loss_args": ["{", "[1]", {"gama": 1}, 5, {"beta": None}],
    }
    options: dict[str, Any] = {
        "loss": draw.choice(["plad_ranking", "dpo", "simpo", "plad_listwise"])
    }
    assert options["loss"] in available()
    names: tuple[str, ...] = ()
    if draw.maybe(0.3):
        options |= {"beta": 0.5, "sft_weight": 0.1, "max_length": 64, "temperature": 0.7}
    if draw.maybe(0.7):
        name = draw.choice(sorted(faults))
        options[name] = draw.choice(faults[name])
        names = (name, "beta") if name == "loss_args" else (name,)
        if name == "loss_args":
            options.pop("beta", None)

    def check(config: Any) -> None:
        assert all(getattr(config, name) == value for name, value in options.items())

    arguments = {"output_dir": str(folder()), "use_cpu": True, **options}
    return plain("PLaDConfig", PLaDConfig, (), arguments, check, names)


MAKERS: list[tuple[Callable[[Draw], Case], int]] = [
    (encoding, 4), (collating, 4), (pairing, 4), (measuring, 5), (reading, 3), (configuring, 2),
]  # fmt: skip
