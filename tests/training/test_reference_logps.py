"""Reference log-probabilities: the right numbers, for the right rows, computed once."""

from __future__ import annotations

import copy
import json
from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset
from torch import nn

from plad_fast.data.packing import PreferenceCollator
from plad_fast.data.store import RowStore
from plad_fast.errors import UsageError
from plad_fast.models.sharing import prepare
from plad_fast.training.fingerprint import adapters_digest, weights_digest
from plad_fast.training.reference_logps import add_reference_logps

# (prompt, response, response): neither sorted nor equal, so that rows change places in batches.
LENGTHS = [(3, 2, 4), (9, 1, 1), (2, 5, 3), (12, 6, 7), (1, 1, 2), (7, 3, 3), (4, 8, 2)]


@pytest.fixture
def dataset():
    draw = torch.Generator().manual_seed(0)

    def ids(count):
        return torch.randint(6, 262, (count,), generator=draw).tolist()

    rows = [{"prompt_ids": ids(p), "response_ids": [ids(a), ids(b)]} for p, a, b in LENGTHS]
    return Dataset.from_list([{**row, "length": 0} for row in rows])


@pytest.fixture
def model(tiny_model):
    return copy.deepcopy(tiny_model)


class Forwards:
    """Counts passes through the model's body, and ends the run at the one it is told to."""

    def __init__(self, model):
        self.count, self.kill_at, self.seen = 0, None, []
        model.base_model.register_forward_pre_hook(self, with_kwargs=True)

    def __call__(self, module, args, kwargs):
        self.count += 1
        self.seen.append((kwargs["input_ids"].numel(), module.training, torch.is_grad_enabled()))
        if self.count == self.kill_at:
            raise KeyboardInterrupt


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (
            {"prompt_ids": [262], "response_ids": [[7], [8]]},
            r"under the reference model, data, row 8: the prompt has .* 262",
        ),
        (
            {"prompt_ids": [5], "response_ids": [[7], [-100]]},
            r"data, row 8: the response .*-100",
        ),
        (
            {"prompt_ids": [5] * 250, "response_ids": [[7], [8] * 9]},
            r"row 8 has 259 tokens, .* 256",
        ),
        (
            {"prompt_ids": [5], "response_ids": [[7.5], [8]]},
            "response_ids should be lists",
        ),
        ({"prompt": "p"}, "data has no prompt_ids and no response_ids"),
    ],
)
def test_rows_that_the_reference_cannot_read_are_refused(dataset, model, row, message):
    rows = [row] if "prompt" in row else [*dataset.to_list(), {**row, "length": 0}]
    for data in (rows, Dataset.from_list(rows).with_format("torch")):
        with pytest.raises(UsageError, match=message):
            add(data, model, name="data")


def add(dataset, model, cache=None, **options):
    options = {"max_tokens_per_batch": 60, "progress": False, "cache": cache} | options
    options.setdefault("collate", PreferenceCollator(0, 2))
    return add_reference_logps(dataset, model, **options)


def naive(dataset, model, temperature=1.0):
    """Sequence by sequence from the model's own logits."""
    rows = []
    for row in dataset:
        rows.append([])
        for response in row["response_ids"]:
            ids = torch.tensor([row["prompt_ids"] + response])
            with torch.no_grad():
                logps = (model(ids).logits[0].double() / temperature).log_softmax(1)
            start = len(row["prompt_ids"]) - 1
            rows[-1].append(sum(logps[start + i, t].item() for i, t in enumerate(response)))
    return torch.tensor(rows)


def values(dataset):
    return torch.tensor(dataset["reference_logps"])


@pytest.mark.parametrize("max_tokens", [1, 60, 10_000])
def test_equals_the_models_own_logits_row_by_row(dataset, model, max_tokens):
    forwards = Forwards(model)
    got = add(dataset, model, max_tokens_per_batch=max_tokens, temperature=0.7)
    assert got.remove_columns("reference_logps").to_list() == dataset.to_list()
    largest = max(2 * (p + max(a, b)) for p, a, b in LENGTHS)
    assert all(tokens <= max(max_tokens, largest) for tokens, *_ in forwards.seen)
    assert forwards.count == {1: 7, 60: 4, 10_000: 1}[max_tokens]
    torch.testing.assert_close(values(got), naive(dataset, model, 0.7).float())


@pytest.mark.parametrize("layout", ["packed", "shared"])
def test_packed_rows_hold_the_limit_and_give_the_same_numbers(dataset, model, layout):
    want = naive(dataset, model).float()
    prepare(model, layout, check=False)
    forwards = Forwards(model)
    collate = PreferenceCollator(0, 2, layout=layout)
    got = add(dataset, model, collate=collate, max_tokens_per_batch=40)
    torch.testing.assert_close(values(got), want)
    assert forwards.count == {"packed": 4, "shared": 3}[layout]
    assert all(tokens <= 40 for tokens, *_ in forwards.seen)


def test_the_model_is_in_eval_mode_without_gradients_and_left_as_it_was(dataset, model):
    """Also where only a part of it was in train mode, and after a failure."""
    model.train()
    model.lm_head.eval()
    before = [module.training for module in model.modules()]
    forwards = Forwards(model)
    add(dataset, model)
    assert {seen[1:] for seen in forwards.seen} == {(False, False)}
    assert [module.training for module in model.modules()] == before
    forwards.kill_at = forwards.count + 1
    with pytest.raises(KeyboardInterrupt):
        add(dataset, model)
    assert [module.training for module in model.modules()] == before


def test_progress_is_shown_from_the_start(dataset, model, tmp_path, capfd):
    """Also while rows are read and packed, before the model runs."""
    Forwards(model).kill_at = 1
    with pytest.raises(KeyboardInterrupt):
        add(dataset, model, tmp_path, progress=True)
    shown = capfd.readouterr().err
    assert "reading dataset" in shown.partition("reference log-probs")[0]


def test_a_finished_file_runs_no_model(dataset, model, tmp_path):
    """Nor does it need the lock that a writer takes: all processes read at once."""
    first = add(dataset, model, tmp_path)
    (path,) = tmp_path.iterdir()
    forwards = Forwards(model)
    settings = json.loads(path.read_text().splitlines()[0])["fingerprint"]
    with RowStore.open(path, settings):
        # Sizes of batches and their layout are no part of what the numbers are.
        second = add(dataset, model, tmp_path, max_tokens_per_batch=7)
    assert forwards.count == 0
    assert torch.equal(values(first), values(second))


@pytest.mark.parametrize("torn", [0, 5, 60])
def test_a_killed_run_goes_on_and_repeats_one_batch_at_most(dataset, model, tmp_path, torn):
    """Killed between batches, within a line, and within a batch of several lines."""
    want = values(add(dataset, model))
    forwards = Forwards(model)
    forwards.kill_at = 4
    with pytest.raises(KeyboardInterrupt):
        add(dataset, model, tmp_path)
    (path,) = tmp_path.iterdir()
    content = path.read_bytes()
    path.write_bytes(content[: len(content) - torn])
    forwards.kill_at = None
    got = add(dataset, model, tmp_path)
    assert forwards.count - 4 == (1 if torn == 0 else 2)
    assert torch.equal(values(got), want)
    assert list(tmp_path.iterdir()) == [path]


def _other_weights(model, rows, options):
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[0, 0] += 1e-3


def _other_dtype(model, rows, options):
    model.bfloat16()


def _other_config(model, rows, options):
    model.config.rms_norm_eps = 1e-3


def _other_tokens(model, rows, options):
    rows[2]["response_ids"][1][0] += 1


def _other_border(model, rows, options):
    """The same tokens in a row, of which one more belongs to the response."""
    rows[3]["response_ids"][0].insert(0, rows[3]["prompt_ids"].pop())


def _other_temperature(model, rows, options):
    options["temperature"] = 0.5


def _autocast(model, rows, options):
    options["autocast"] = lambda: torch.autocast("cpu", dtype=torch.bfloat16)


def _no_ranked_ends(model, rows, options):
    options["collate"] = PreferenceCollator(0, 2, rank_end_token=False)
    with pytest.raises(UsageError, match=r"data: .*rank_end_token=False.*whole_responses"):
        add(Dataset.from_list(rows), model, name="data", **options)
    options["whole_responses"] = False


@pytest.mark.parametrize(
    "change",
    [
        _other_weights,
        _other_dtype,
        _other_config,
        _other_tokens,
        _other_border,
        _other_temperature,
        _autocast,
        _no_ranked_ends,
    ],
)
def test_nothing_stale_is_used(dataset, model, tmp_path, change):
    add(dataset, model, tmp_path)
    rows, options = dataset.to_list(), {}
    change(model, rows, options)
    changed = Dataset.from_list(rows)
    got = add(changed, model, tmp_path, **options)
    assert len(list(tmp_path.iterdir())) == 2
    assert torch.equal(values(got), values(add(changed, model, **options)))


def test_a_model_loaded_again_is_the_same_model(dataset, model, tmp_path):
    """Saving and loading changes a config's entries that say nothing of the model."""
    add(dataset, model, tmp_path / "cache")
    model.save_pretrained(tmp_path / "model")
    again = type(model).from_pretrained(tmp_path / "model")
    again.config.use_cache = False
    forwards = Forwards(again)
    add(dataset, again, tmp_path / "cache")
    assert forwards.count == 0


class Adapter(nn.Module):
    """A stand-in with the attributes of PEFT's layers."""

    adapter_layer_names = ("lora_A",)

    def __init__(self):
        super().__init__()
        self.base_layer = nn.Linear(2, 2)
        self.lora_A = nn.ModuleDict({"default": nn.Linear(2, 2)})
        self.disable_adapters = False


def test_adapters_that_are_off_are_no_part_of_the_reference():
    model = nn.Sequential(Adapter())
    on = weights_digest(model)
    model[0].disable_adapters = True
    off = weights_digest(model)
    assert on != off
    nn.init.normal_(model[0].lora_A["default"].weight)
    assert weights_digest(model) == off
    nn.init.normal_(model[0].base_layer.weight)
    assert weights_digest(model) != off


def test_weights_are_hashed_whole_block_by_block(monkeypatch):
    """Every element counts; strides do not."""
    monkeypatch.setattr("plad_fast.training.fingerprint._BLOCK", 4)
    model = nn.Linear(5, 3)
    seen = {weights_digest(model)}
    for index in range(15):
        with torch.no_grad():
            model.weight.view(-1)[index] += 1
        seen.add(weights_digest(model))
    assert len(seen) == 16
    model.weight.data = model.weight.data.T.contiguous().T
    assert weights_digest(model) in seen


def test_what_is_not_finite_names_its_row_and_is_not_kept(dataset, model, tmp_path):
    token = dataset[5]["response_ids"][0][1]
    with torch.no_grad():
        model.model.embed_tokens.weight[token] = float("nan")
    with pytest.raises(UsageError, match=r"train set, row 6: .* not finite"):
        add(dataset, model, tmp_path, name="train set", max_tokens_per_batch=1)
    (path,) = tmp_path.iterdir()
    assert "NaN" not in path.read_text()


def test_values_that_are_there_already_are_kept_and_checked(dataset, model):
    given = dataset.add_column("reference_logps", [[-1.0, -2.0]] * len(dataset))
    forwards = Forwards(model)
    assert add(given, model) is given
    assert forwards.count == 0
    for bad, message in (([-1.0], "1 reference_logps for 2"), ([-1.0, float("nan")], "not finite")):
        rows = dataset.add_column("reference_logps", [[-1.0, -2.0]] * 6 + [bad])
        with pytest.raises(UsageError, match=f"row 7: .*{message}"):
            add(rows, model)


def test_damage_and_bad_options_are_refused(dataset, model, tmp_path):
    with pytest.raises(UsageError, match="max_tokens_per_batch must be at least 1, got 0"):
        add(dataset, model, max_tokens_per_batch=0)
    add(dataset, model, tmp_path)
    (path,) = tmp_path.iterdir()
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join([*lines[:2], "{oops\n", *lines[3:]]))
    with pytest.raises(UsageError, match="line 3 is damaged"):
        add(dataset, model, tmp_path)


def test_settings_of_adapters_have_one_digest_whatever_the_order_of_their_sets():
    """PEFT keeps the names of its targets in sets, whose order is another in every process."""
    found = set()
    for numbers in ([0, 8], [8, 0]):
        model = nn.Linear(1, 1)
        model.peft_config = {"a": SimpleNamespace(r=8, target_modules=set(numbers))}
        assert list(set(numbers)) == numbers
        found.add(adapters_digest(model))
    assert len(found) == 1
    assert found != {None}
