"""T5 and BART against their own forward with labels: numbers, gradients, trainings, answers."""

from __future__ import annotations

import copy
import json

import pytest
import torch
import transformers
from torch import nn

from plad_fast.cli import main
from plad_fast.data.packing import PreferenceCollator
from plad_fast.data.prompts import Prompt
from plad_fast.data.tokenization import encode_group, tokenize_dataset
from plad_fast.errors import UsageError
from plad_fast.models.adapters import base_model
from plad_fast.models.encoder_decoder import decoder_start_token
from plad_fast.models.head import backbone_hidden, causal_lm_logprobs, check_architecture
from plad_fast.models.layer_drop import depth, drop_layers
from plad_fast.models.loading import load_model
from plad_fast.models.response_scores import score_pairs
from plad_fast.models.sharing import prepare
from plad_fast.pairs.generation.local_model import LocalModel
from plad_fast.pairs.generation.sampling import Sampling
from plad_fast.training.micro_batches import pack
from tests.conftest import BOS, END
from tests.support.recipe_runs import arguments
from tests.support.trainings import PAIRS, assert_same_weights, build, last_log, weights

VOCAB = 262  # of the tiny tokenizer
GROUPS = [
    {"prompt_ids": [5, 6, 7, 8, 2], "response_ids": [[9, 0, 8, 2], [3, 2], [7, 7, 7, 7, 7, 2]]},
    {"prompt_ids": [11, 2], "response_ids": [[9, 2], [3, 4, 0, 6, 2], [2]]},
]


def _t5(**options):
    config = transformers.T5Config(
        **{"decoder_start_token_id": 0, "pad_token_id": 0, "eos_token_id": 2},
        **{"vocab_size": VOCAB, "d_model": 16, "d_kv": 4, "d_ff": 24, "num_heads": 4},
        **{"num_layers": 2, "num_decoder_layers": 3, "dropout_rate": 0.0},
        **options,
    )
    return transformers.T5ForConditionalGeneration(config)


def _t5_v1_1():
    """Gated, a head of its own, and no scale before it."""
    model = _t5(tie_word_embeddings=False, feed_forward_proj="gated-gelu")
    model.lm_head.weight = nn.Parameter(0.5 * torch.randn_like(model.lm_head.weight))
    return model


def _bart():
    """With positions, a bias on the logits and a start token that is also the end token."""
    config = transformers.BartConfig(
        **{"decoder_start_token_id": 2, "pad_token_id": 0, "eos_token_id": 2, "bos_token_id": 1},
        **{"vocab_size": VOCAB, "d_model": 16, "encoder_layers": 2, "decoder_layers": 3},
        **{"encoder_attention_heads": 4, "decoder_attention_heads": 4, "encoder_ffn_dim": 24},
        **{"decoder_ffn_dim": 24, "max_position_embeddings": 96, "init_std": 0.3, "dropout": 0.0},
    )
    model = transformers.BartForConditionalGeneration(config)
    model.final_logits_bias.normal_()
    return model


MODELS = {"t5": _t5, "t5_v1_1": _t5_v1_1, "bart": _bart}


def make_model(name):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = MODELS[name]()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim == 1:
                    parameter += 0.1 * torch.randn_like(parameter)
    return model.eval()


@pytest.fixture(scope="module")
def tokenizer(tiny_tokenizer):
    """Like T5's: EOS behind every text, nothing in front, no chat template."""
    return _tokenizer(tiny_tokenizer, f"$A {END}")


def _tokenizer(tiny_tokenizer, template):
    from tokenizers import processors

    made = copy.deepcopy(tiny_tokenizer)
    special = [(token, made.convert_tokens_to_ids(token)) for token in (BOS, END)]
    made.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=template, special_tokens=special
    )
    made.chat_template = None
    return made


def collate(model, groups, **options):
    return PreferenceCollator(
        0,
        len(groups[0]["response_ids"]),
        layout=prepare(model),
        decoder_start_token_id=decoder_start_token(model),
        **options,
    )(groups)


def own_logprobs(model, groups):
    """Of every response by `model(labels=...)`, one unpadded sequence at a time."""
    found = []
    for group in groups:
        for response in group["response_ids"]:
            labels = torch.tensor([response])
            logits = model(input_ids=torch.tensor([group["prompt_ids"]]), labels=labels).logits
            found.append(logits.log_softmax(-1).gather(2, labels[..., None])[0, :, 0])
    return found


@pytest.mark.parametrize("name", MODELS)
def test_logprobs_and_gradients_equal_the_models_own(name):
    """Every parameter's, under another weight for every sequence; pad ids stand inside texts."""
    model = make_model(name)
    check_architecture(model)
    weight = torch.tensor([1.0, -2.0, 0.5, 3.0, 0.0, -1.0])
    ours = causal_lm_logprobs(model, collate(model, GROUPS))
    (ours.sums @ weight).backward()
    gradients = {n: p.grad.clone() for n, p in model.named_parameters()}
    model.zero_grad()
    theirs = own_logprobs(model, GROUPS)
    (torch.stack([each.sum() for each in theirs]) @ weight).backward()
    torch.testing.assert_close(ours.token_logprobs, torch.cat(theirs), rtol=1e-5, atol=1e-5)
    largest = max(p.grad.norm() for p in model.parameters())
    for parameter, p in model.named_parameters():
        # The bias of a key has none, since it moves all scores of a query alike: this is rounding.
        error = (gradients[parameter] - p.grad).norm()
        assert error <= 1e-5 * p.grad.norm() + 1e-7 * largest, parameter


def test_the_encoder_reads_every_prompt_once():
    """Three responses to each of two prompts: one call of two rows."""
    model, seen = make_model("t5"), []
    model.get_encoder().register_forward_hook(lambda m, args, out: seen.append(len(out[0])))
    causal_lm_logprobs(model, collate(model, GROUPS)).sums.sum().backward()
    assert seen == [2]


def test_the_trainer_encodes_every_prompt_once(tokenizer, tmp_path, monkeypatch):
    """Eight pairs: a step and an evaluation encode eight rows each, and the reference did."""
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    options = {"per_device_train_batch_size": 8, "per_device_eval_batch_size": 8}
    trainer = make_trainer("t5", tokenizer, tmp_path, eval_rows=PAIRS, loss="dpo", **options)
    seen = []
    trainer.model.get_encoder().register_forward_hook(lambda m, a, out: seen.append(len(out[0])))
    trainer.train()
    trainer.evaluate()
    assert seen == [8, 8]


def adapt(model, targets=("q", "v", "q_proj", "v_proj"), **options):
    """Under adapters that are moved, and not their base."""
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=3, target_modules=list(targets), init_lora_weights=False, **options)
    torch.manual_seed(0)
    model = peft.get_peft_model(model, config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad and parameter.ndim == 1:
                parameter += torch.randn_like(parameter)
    return model


SEQ_2_SEQ = "SEQ_2_SEQ_LM"


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings:UserWarning")
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("t5_v1_1", {"task_type": SEQ_2_SEQ}),
        ("t5_v1_1", {"lora_bias": True}),
        # T5 scales what goes into a tied head: the adapter's bias comes after that.
        ("t5", {"lora_bias": True}),
        ("bart", {"lora_bias": True}),
    ],
    ids=["untied", "bias", "tied-bias", "two-biases"],
)
def test_adapters_in_both_halves_and_on_the_head(name, options):
    targets = ("q_proj", "v_proj", "lm_head") if name == "bart" else ("q", "v", "lm_head")
    if options.get("lora_bias"):
        targets = ("lm_head",)
    model = adapt(make_model(name), targets, **options)
    check_architecture(model)
    weight = torch.tensor([1.0, -2.0, 0.5, 3.0, 0.0, -1.0])
    ours = causal_lm_logprobs(model, collate(model, GROUPS))
    theirs = own_logprobs(model, GROUPS)
    torch.testing.assert_close(ours.token_logprobs, torch.cat(theirs), rtol=1e-5, atol=1e-4)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    parts = {part for n in trained for part in n.split(".")}
    assert set(["lm_head"] if len(targets) == 1 else ["encoder", "decoder", "lm_head"]) <= parts
    sums = torch.stack([each.sum() for each in theirs])
    both = [torch.autograd.grad(s @ weight, list(trained.values())) for s in (ours.sums, sums)]
    for name, got, expected in zip(trained, *both, strict=True):
        torch.testing.assert_close(
            got, expected, rtol=1e-4, atol=1e-4, msg=lambda m, n=name: f"{n}: {m}"
        )


def test_the_decoder_reads_responses_behind_its_start():
    """Shifted by one; an empty response has no row that predicts."""
    groups = [{"prompt_ids": [5, 6], "response_ids": [[7, 8, 2], []]}]
    batch = PreferenceCollator(0, 2, layout="encoder_decoder", decoder_start_token_id=4)(groups)
    assert batch["input_ids"].tolist() == [[5, 6]]
    assert batch["decoder_input_ids"].tolist() == [[4, 7, 8], [4, 0, 0]]
    assert batch["decoder_attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert batch["loss_rows"].tolist() == [0, 1, 2]
    assert batch["targets"].tolist() == [7, 8, 2]
    assert batch["cu_seqlens"].tolist() == [0, 3, 3]
    assert batch["group_tokens"].tolist() == [[5, 7]]


def test_two_widths_share_one_budget():
    """Encoder and decoder are padded each to its longest, wherever that comes from."""
    shapes = [(100, 2), (2, 100), (90, 4), (1, 1)]
    assert pack(shapes, 210, padded=True) == [[0, 2], [1, 3]]


@pytest.mark.parametrize(
    ("template", "front", "back"), [(f"$A {END}", 0, 1), (f"{BOS} $A {END}", 1, 1), ("$A", 0, 0)]
)
def test_prompts_and_responses_are_texts_of_their_own(tiny_tokenizer, template, front, back):
    """Each with its special tokens, also when cut; a response always ends in EOS."""
    tokenizer = _tokenizer(tiny_tokenizer, template)
    bos, end = tokenizer.bos_token_id, tokenizer.eos_token_id

    def group(prompt, length, side="left"):
        return encode_group(
            tokenizer,
            prompt,
            ["xyz", "w"],
            max_length=length,
            truncation_side=side,
            encoder_decoder=True,
        )

    letters = tokenizer("abcdefgh", add_special_tokens=False)["input_ids"]
    whole, left, right = group("abcdefgh", 10), group("abcdefgh", 6), group("abcdefgh", 6, "right")
    room = 6 - front - back
    assert whole["prompt_ids"] == [bos] * front + letters + [end] * back
    assert left["prompt_ids"] == [bos] * front + letters[-room:] + [end] * back
    assert right["prompt_ids"] == [bos] * front + letters[:room] + [end] * back
    assert (whole["truncated"], left["truncated"], left["fits"]) == (False, True, True)
    assert not group("abcdefgh", 3 + front)["fits"]
    xyz = tokenizer("xyz", add_special_tokens=False)["input_ids"]
    assert whole["response_ids"][0] == [bos] * front + xyz + [end]


def make_trainer(name, tokenizer, folder, rows=PAIRS, model=None, **options):
    model = make_model(name).train() if model is None else model
    return build(None, tokenizer, folder, rows, model=model, **options)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("t5", {"loss": "plad_ranking", "beta": 40.0, "sft_weight": 0.3}),
        ("t5_v1_1", {"loss": "dpo", "beta": 0.3}),
        # One group in memory at a time, which pads and normalises otherwise.
        ("bart", {"loss": "plad_ranking", "beta": 40.0, "max_tokens_per_batch": 1}),
    ],
    ids=["ranking", "dpo", "budget"],
)
def test_first_step_equals_the_naive_loss(name, options, tokenizer, tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    trainer = make_trainer(name, tokenizer, tmp_path, per_device_train_batch_size=8, **options)
    if options["loss"] == "dpo":  # by one that differs, or every margin is zero
        with torch.no_grad():
            trainer.model.lm_head.weight += 0.1
    start = copy.deepcopy(trainer.model)
    trainer.train()

    rows = tokenize_dataset(PAIRS, tokenizer, max_length=64, encoder_decoder=True)
    logps = own_logprobs(start, rows)
    s = torch.stack([each.sum() for each in logps]).view(-1, 2)
    nll = -s[:, 0].sum() / sum(map(len, logps[::2]))
    margins = s[:, 0] - s[:, 1]
    if options["loss"] == "dpo":
        reference = own_logprobs(make_model(name), rows)
        r = torch.stack([each.sum() for each in reference]).view(-1, 2).detach()
        loss = -nn.functional.logsigmoid(0.3 * (margins - r[:, 0] + r[:, 1])).mean()
    else:
        loss = torch.relu(40.0 - margins).mean() + options.get("sft_weight", 0.0) * nll
    loss.backward()
    with torch.no_grad():
        for parameter in start.parameters():
            parameter -= 0.05 * parameter.grad
    assert last_log(trainer)["loss"] == pytest.approx(loss.item(), rel=1e-4)
    assert_same_weights(weights(trainer), dict(start.named_parameters()), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["t5", "bart"])
def test_scores_equal_the_models_own(name, tokenizer):
    model = make_model(name)
    scores = score_pairs(model, tokenizer, PAIRS, batch_size=3, progress=False)
    rows = tokenize_dataset(PAIRS, tokenizer, max_length=64, encoder_decoder=True)
    expected = [each.sum().item() for each in own_logprobs(model, rows)]
    assert scores["chosen"].tolist() == pytest.approx(expected[::2], rel=1e-5)
    assert scores["rejected"].tolist() == pytest.approx(expected[1::2], rel=1e-5)


@pytest.mark.parametrize(
    ("name", "task"),
    [("t5_v1_1", ""), ("bart", ""), ("bart", None), ("bart", "CAUSAL_LM"), ("t5_v1_1", SEQ_2_SEQ)],
)
def test_answers_are_those_of_generate(name, task, tokenizer):
    """In batches of prompts of several lengths, without prompt or start token in them; under
    adapters too, whatever task they name."""
    model = make_model(name)
    with torch.no_grad():  # some answers end, some do not
        if name == "bart":
            model.final_logits_bias[0, 2] = 3.5
        else:
            model.lm_head.weight[2] *= 3
    if task != "":
        model = adapt(model, task_type=task)
    prompts = [Prompt(str(i), text) for i, text in enumerate(["a", "bcd", "efghijklmno", "pq"])]
    sampling = Sampling(max_new_tokens=12, temperature=0, batch_size=4)
    answers = {
        answer.prompt_id: answer
        for batch in LocalModel(model, tokenizer, "student").generate(prompts, sampling)
        for answer in batch
    }
    for prompt in prompts:
        ids = torch.tensor([tokenizer(prompt.content)["input_ids"]])
        expected = base_model(model).generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False,
            num_beams=1, forced_eos_token_id=None,
            use_cache=False,  # of this T5, generate makes one with too few layers
        )[0, 1:]  # fmt: skip
        text = tokenizer.decode(expected, skip_special_tokens=True).strip()
        assert answers[prompt.id].text == text
        assert answers[prompt.id].n_tokens == len(expected)
    assert len({answer.n_tokens for answer in answers.values()}) > 1


def test_a_prompt_that_the_encoder_has_no_room_for_is_refused(tokenizer):
    """Whatever the length of an answer, which has positions of its own."""
    model = LocalModel(make_model("bart"), tokenizer, "bart")
    says = r"prompt 'p' has 9\d+ tokens, and the encoder has 96 positions; drop"
    with pytest.raises(UsageError, match=says):
        model.generate([Prompt("p", "a" * 97)], Sampling(max_new_tokens=96))


def test_a_first_token_that_the_model_forces_is_kept(tokenizer):
    """As models of many languages do with the mark of the one to write in."""
    model = make_model("bart")
    [forced] = tokenizer("Q", add_special_tokens=False)["input_ids"]
    sampling, prompts = Sampling(max_new_tokens=4, temperature=0), [Prompt("1", "abc")]
    for wanted in (None, forced):
        model.generation_config.forced_bos_token_id = wanted
        [[answer]] = LocalModel(model, tokenizer, "bart").generate(prompts, sampling)
        assert answer.text.startswith("Q") == (wanted is not None)


def test_an_end_inside_of_a_response_is_no_end(tiny_tokenizer):
    bare = _tokenizer(tiny_tokenizer, "$A")
    end = bare.eos_token_id
    group = encode_group(bare, "p", [f"x{END}y"], max_length=9, encoder_decoder=True)
    assert group["response_ids"][0][-1] == end
    assert group["response_ids"][0].count(end) == 2


def test_distill_a_t5_of_a_decoder_only_teacher(tokenizer, tiny_teacher, tmp_path, capsys):
    """The recipe from pairs to report; the student loses decoder layers and keeps its encoder."""
    student, model = tmp_path / "t5", make_model("t5_v1_1")
    with torch.no_grad():
        model.lm_head.weight[tokenizer.eos_token_id] *= 4  # a random one hardly ends
    model.save_pretrained(student)
    tokenizer.save_pretrained(student)
    folder = tmp_path / "run"
    assert main(arguments(tiny_teacher, folder, "--student", str(student))) == 0
    assert "1 layers" in capsys.readouterr().out
    model = transformers.AutoModelForSeq2SeqLM.from_pretrained(folder / "plad")
    assert (model.config.num_layers, model.config.num_decoder_layers) == (2, 1)
    metrics = json.loads((folder / "metrics.json").read_text())
    rows = [
        json.loads(line) for line in (folder / "pairs" / "held-out.jsonl").read_text().splitlines()
    ]
    chosen, rejected = (
        [
            each.mean().item()
            for each in own_logprobs(
                model.eval(),
                tokenize_dataset(
                    [{"prompt": row["prompt"], "completion": row[side]} for row in rows],
                    tokenizer,
                    max_length=1024,
                    encoder_decoder=True,
                ),
            )
        ]
        for side in ("chosen", "rejected")
    )
    margin = (sum(chosen) - sum(rejected)) / len(rows)
    assert metrics["students"][1]["margin"]["mean"] == pytest.approx(margin, rel=1e-4)


@pytest.mark.parametrize("name", MODELS)
def test_a_student_of_fewer_layers_is_the_same_when_loaded(name, tmp_path):
    model = make_model(name)
    assert depth(model) == 3
    student = drop_layers(model, 2)
    student.save_pretrained(tmp_path)
    loaded = load_model(tmp_path)
    batch = collate(model, GROUPS)
    ours = causal_lm_logprobs(student, batch).token_logprobs
    torch.testing.assert_close(causal_lm_logprobs(loaded, batch).token_logprobs, ours)
    assert not torch.allclose(causal_lm_logprobs(model, batch).token_logprobs, ours)
    assert len(drop_layers(model, 1).get_encoder().state_dict()) == len(
        model.get_encoder().state_dict()
    )


@pytest.mark.parametrize("task", [None, SEQ_2_SEQ])
def test_checkpoint_of_adapters_loads_onto_its_base(task, tokenizer, tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    make_model("t5_v1_1").save_pretrained(tmp_path / "base")
    model = adapt(load_model(tmp_path / "base"), task_type=task)
    options = {"loss": "sft", "save_strategy": "steps", "save_steps": 1}
    trainer = make_trainer("t5", tokenizer, tmp_path, model=model, **options)
    trainer.train()
    loaded = load_model(tmp_path / "run" / "checkpoint-1")
    assert isinstance(loaded, transformers.T5ForConditionalGeneration)
    batch = collate(loaded, GROUPS)
    ours = causal_lm_logprobs(loaded, batch).token_logprobs
    torch.testing.assert_close(ours, causal_lm_logprobs(model.eval(), batch).token_logprobs)


def test_noise_on_embeddings_is_refused_in_words_that_lead_out(tokenizer, tmp_path, monkeypatch):
    """It would reach neither half of some models: transformers puts it on a third module."""
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    options = {"loss": "sft", "neftune_noise_alpha": 5.0}
    with pytest.raises(UsageError, match="leave neftune_noise_alpha out, as for an encoder-decod"):
        make_trainer("t5", tokenizer, tmp_path, **options)
    with pytest.raises(UsageError, match="T5ForConditionalGeneration; leave it out"):
        make_trainer("t5", tokenizer, tmp_path, layout="padded", **options)


def test_layers_that_cannot_be_dropped():
    with pytest.raises(UsageError, match="cannot lose these layers"):
        drop_layers(make_model("t5"), [1, 2])  # the first one has the relative positions


def test_other_layouts_and_models_are_refused(tiny_model, tokenizer, tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    model = make_model("t5")
    for layout in ("shared", "packed", "padded"):
        with pytest.raises(UsageError, match=f"'{layout}'.*encoder-decoder"):
            prepare(model, layout)
    with pytest.raises(UsageError, match="needs an encoder"):
        prepare(tiny_model, "encoder_decoder")
    with pytest.raises(UsageError, match="decoder_start_token_id"):
        PreferenceCollator(0, 3, layout="encoder_decoder")
    with pytest.raises(UsageError, match="do not go together"):
        causal_lm_logprobs(model, PreferenceCollator(0, 3)(GROUPS))
    with pytest.raises(UsageError, match="do not go together"):
        causal_lm_logprobs(tiny_model, collate(model, GROUPS))
    with pytest.raises(UsageError, match="encoder-decoder"):
        backbone_hidden(model, torch.tensor([[3, 4]]))
    with pytest.raises(UsageError, match="one alone is an encoder-decoder model"):
        make_trainer(
            "t5", tokenizer, tmp_path, loss="dpo", reference_model=copy.deepcopy(tiny_model)
        )
    with pytest.raises(UsageError, match="chat template"):
        score_pairs(model, tokenizer, [{**PAIRS[0], "prompt": [{"role": "user", "content": "a"}]}])
    del model.config.decoder_start_token_id
    model.generation_config.decoder_start_token_id = None
    with pytest.raises(UsageError, match="T5ForConditionalGeneration has no decoder_start_token"):
        make_trainer("t5", tokenizer, tmp_path, model=model, loss="sft")


def test_positions_bound_prompts_and_answers(tokenizer, tmp_path, monkeypatch):
    """Each on its own: both may have as many tokens as BART has positions."""
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    rows = [{"prompt": "a" * 95, "chosen": "b" * 95, "rejected": "c" * 95}]
    make_trainer("bart", tokenizer, tmp_path, rows, loss="sft")
    with pytest.raises(UsageError, match="97 tokens and the model has 96 positions"):
        make_trainer("bart", tokenizer, tmp_path, [{**rows[0], "chosen": "b" * 96}], loss="sft")
    local = LocalModel(make_model("bart"), tokenizer, "bart")
    fits, long = Prompt("1", "a" * 95), Prompt("2", "a" * 96)
    [[answer]] = local.generate([fits], Sampling(max_new_tokens=96, temperature=0))
    assert answer.n_tokens == 96
    with pytest.raises(UsageError, match="'2' has 97 tokens, and the encoder has 96"):
        local.generate([fits, long], Sampling(max_new_tokens=8))
    with pytest.raises(UsageError, match="max_new_tokens=97, and model bart has 96"):
        local.generate([fits], Sampling(max_new_tokens=97))


def _whisper():
    config = transformers.WhisperConfig(
        **{"vocab_size": 60, "d_model": 16, "encoder_layers": 1, "decoder_layers": 1},
        **{"encoder_attention_heads": 2, "decoder_attention_heads": 2, "encoder_ffn_dim": 16},
        **{"decoder_ffn_dim": 16, "pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 2},
        **{"decoder_start_token_id": 2, "num_mel_bins": 8},
    )
    return transformers.WhisperForConditionalGeneration(config)


def _bert_to_bert():
    half = transformers.BertConfig(
        vocab_size=60, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=16,
    )  # fmt: skip
    config = transformers.EncoderDecoderConfig.from_encoder_decoder_configs(half, half)
    return transformers.EncoderDecoderModel(config)


@pytest.mark.parametrize(
    ("make", "reason"),
    [(_whisper, "reads input_features"), (_bert_to_bert, "no decoder apart from its LM head")],
)
def test_models_that_are_refused(make, reason):
    with pytest.raises(UsageError, match=reason):
        check_architecture(make().eval())
