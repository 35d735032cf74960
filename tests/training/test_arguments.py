"""`--training KEY=VALUE`, the same in a file, and what decides which checkpoint is the best."""

from __future__ import annotations

import json

import pytest
import torch
import yaml
from safetensors.torch import load_file

from plad_fast.cli import main
from plad_fast.errors import UsageError
from plad_fast.training.arguments import of_weights, training_arguments
from tests.support.recipe_runs import arguments, train, write_pairs
from tests.support.saved_trainings import interrupted


@pytest.fixture
def pairs(tmp_path):
    return write_pairs(tmp_path / "pairs.jsonl", 8)


def run(model, pairs, output, *extra: str):
    assert main(train(model, pairs, output, "--learning-rate", "1e-2", *extra)) == 0
    return load_file(output / "model.safetensors")


def record(output) -> dict:
    return json.loads((output / "training.json").read_text())


def test_settings_are_the_same_by_flag_and_in_a_file(tiny_teacher, pairs, tmp_path, capsys):
    by_flag = ("--training", "optim=sgd", "--training", "lr_scheduler_type=constant")
    by_flag += ("--training", "weight_decay=0.1", "--training", 'optim_args="momentum=0"')
    weights = run(tiny_teacher, pairs, tmp_path / "flag", *by_flag)
    settings = {"optim": "sgd", "lr-scheduler-type": "cosine", "weight_decay": 0.1}
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump({"training": {**settings, "optim_args": "momentum=0"}}))
    # A flag wins over the file, setting by setting.
    both = ("--config", str(config), "--training", "lr_scheduler_type=constant")
    same = run(tiny_teacher, pairs, tmp_path / "file", *both)
    assert all(torch.equal(same[name], weight) for name, weight in weights.items())
    assert record(tmp_path / "flag") == record(tmp_path / "file")
    assert record(tmp_path / "flag")["training"]["weight_decay"] == 0.1
    plain = run(tiny_teacher, pairs, tmp_path / "plain")
    assert not all(torch.equal(plain[name], weight) for name, weight in weights.items())
    assert "training" not in record(tmp_path / "plain")
    capsys.readouterr()
    assert main(train(tiny_teacher, pairs, tmp_path / "flag", "--training", "optim=sgd")) == 2
    assert "training.weight_decay was 0.1" in capsys.readouterr().err


def test_an_optimizer_takes_the_steps_of_pytorch(tiny_teacher, pairs, tmp_path):
    """One step of SGD at a constant rate is the gradient: the clipped norm says how long it is."""
    options = ("optim=sgd", "lr_scheduler_type=constant", "max_grad_norm=0.25")
    flags = [part for option in options for part in ("--training", option)]
    trained = run(tiny_teacher, pairs, tmp_path / "out", "--batch-size", "8", *flags)
    before = load_file(tiny_teacher / "model.safetensors")
    moved = sum(((trained[name] - weight) ** 2).sum() for name, weight in before.items()) ** 0.5
    assert moved.item() == pytest.approx(1e-2 * 0.25, rel=1e-3)


def test_where_it_is_logged_is_no_other_training(tiny_teacher, pairs, tmp_path, capsys):
    run(tiny_teacher, pairs, tmp_path / "out")
    logged = ("--training", "run_name=mine", "--training", "logging_steps=1")
    run(tiny_teacher, pairs, tmp_path / "out", *logged)
    assert "done before" in capsys.readouterr().out
    assert of_weights({"run_name": "mine", "report_to": ["x"], "optim": "sgd"}) == {"optim": "sgd"}


def test_without_a_progress_bar_every_log_is_a_line(tiny_teacher, pairs, tmp_path, capsys):
    run(tiny_teacher, pairs, tmp_path / "bar")
    assert "%|" in capsys.readouterr().err
    run(tiny_teacher, pairs, tmp_path / "out", "--training", "disable_tqdm=true")
    printed = capsys.readouterr()
    assert "%|" not in printed.err
    log = json.loads((tmp_path / "out" / "log_history.json").read_text())
    lines = [line for line in printed.out.splitlines() if line.startswith("{")]
    assert len(lines) == len(log) + 1  # the last one sums up


@pytest.mark.parametrize(
    ("setting", "named"),
    [
        ("bf16=true", "bf16: use --precision"),
        ("learning_rate=1", "learning_rate: use --learning-rate"),
        ("per_device_train_batch_size=2", "use --batch-size and --micro-batch-size"),
        ("save_steps=5", "save_steps: use --saves-per-stage"),
        ("save_total_limit=5", "save_total_limit: the command decides it itself"),
        ("output_dir=x", "use --output-dir"),
        ("eval_steps=5", "use --eval-pairs and --eval-steps"),
        ("push_to_hub=true", "use --push-to-hub"),
        ("fsdp=full_shard", "fsdp: start the command with `accelerate launch --config_file"),
        ("deepspeed=ds.json", "start the command with `accelerate launch --config_file"),
        ("ddp_backend=gloo", "the command decides it itself"),
        ("gradient_checkpointing=true", "use --gradient-checkpointing"),
        ("weight_decy=0.1", "did you mean weight_decay?"),
        ("flavour=0.1", "flavour: no such setting of the trainer"),
        ("lr=0.1", "--training lr: use --learning-rate"),
        ("lr_schedule=1", "did you mean lr_scheduler_type or lr_scheduler_kwargs?"),
        ("warmup=1", "did you mean warmup_steps"),
        ("zzz=1", "trainer; see transformers.TrainingArguments and plad_fast.training.PLaDConfig"),
        ("weight_decay=much", "weight_decay: invalid float value: 'much'"),
        ("optim=adamm", "optim: invalid choice: 'adamm'; did you mean"),
        ("lr_scheduler_type=cosinus", "did you mean cosine"),
        ("lr_scheduler_type=x", "'x'; see transformers.TrainingArguments"),
        ("lr_scheduler_type=reduce_lr_on_plateau", "lr_scheduler_type=reduce_lr_on_plateau"),
        ("report_to=tensorboard", "tensorboard to be installed"),
        ("report_to=pigeon", "pigeon is not supported"),
        ("torch_compile=true", "torch_compile=True is not supported"),
        ("adam_beta1=2", "--training adam_beta1=2.0: the trainer does not take it"),
        ("adam_epsilon=-1", "--training adam_epsilon=-1.0: the trainer does not take it"),
        ("weight_decay=-1", "--training: weight_decay must not be negative"),
        ("lr_scheduler_type=cosine_with_min_lr", "lr_scheduler_kwargs"),
        ("lr_scheduler_type=warmup_stable_decay", "num_decay_steps"),
        ("optim", "--training must be KEY=VALUE"),
    ],
)
def test_what_cannot_be_set_is_named_before_anything_is_read(
    setting, named, tiny_teacher, tmp_path, capsys
):
    """The pairs of `train` are not there, and no word is said of them."""
    for command in (
        train(tiny_teacher, tmp_path / "pairs.jsonl", tmp_path / "out"),
        arguments(tiny_teacher, tmp_path / "run"),
    ):
        assert main([*command, "--training", setting]) == 2
        error = capsys.readouterr().err
        assert named in error
        assert "--training" in error
        assert error.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_a_setting_of_the_trainer_typed_as_a_flag(tiny_teacher, pairs, tmp_path, capsys):
    with pytest.raises(SystemExit):
        main(train(tiny_teacher, pairs, tmp_path / "out", "--optim", "adafactor"))
    assert "--training optim=..." in capsys.readouterr().err


def test_no_value_leaves_a_setting_as_it_is():
    assert training_arguments(None) == training_arguments({"optim": None}) == {}
    assert training_arguments({"warmup_steps": 5})["warmup_steps"] == 5
    with pytest.raises(UsageError, match="did you mean optim"):
        training_arguments({"optm": None, "optim_": 3})


def test_the_setting_that_is_refused_is_named_alone():
    others = {"max_grad_norm": 0.5, "optim": "adamw_torch", "lr_scheduler_type": "cosine"}
    with pytest.raises(UsageError, match=r"--training optim=\S+ adam_beta2=1.5: .*beta") as caught:
        training_arguments({**others, "adam_beta2": 1.5})
    assert "cosine" not in str(caught.value)
    with pytest.raises(UsageError, match=r"--training lr_scheduler_\S+ lr_.*'cycles'.*") as caught:
        training_arguments({**others, "lr_scheduler_kwargs": {"cycles": 1}})
    assert "adamw" not in str(caught.value)


def test_a_number_in_a_mapping_is_one_however_yaml_reads_it():
    """YAML 1.1 takes 1e-7 for text; a flag's value is read as YAML."""
    kwargs = yaml.safe_load("{min_lr: 1e-7}")
    assert kwargs == {"min_lr": "1e-7"}
    given = {"lr_scheduler_type": "cosine_with_min_lr", "lr_scheduler_kwargs": kwargs}
    assert training_arguments(given)["lr_scheduler_kwargs"] == {"min_lr": 1e-7}


@pytest.fixture
def measured(pairs, tmp_path):
    """Flags that measure what is trained on the wrong way round: the first evaluation is the best.
    Twelve steps, and as many checkpoints as evaluations."""
    rows = [json.loads(line) for line in pairs.read_text().splitlines()]
    turned = [{**row, "chosen": row["rejected"], "rejected": row["chosen"]} for row in rows]
    file = tmp_path / "turned.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in turned))
    return ("--eval-pairs", str(file), "--eval-steps", "3", "--metric-for-best-model", "margin",
            "--learning-rate", "1e-2", "--epochs", "3", "--saves-per-stage", "4")  # fmt: skip


def test_the_best_checkpoint_becomes_the_model(
    tiny_teacher, pairs, measured, tmp_path, monkeypatch, capsys
):
    """Also of a training that was killed after it."""
    output = tmp_path / "out"
    weights = run(tiny_teacher, pairs, output, *measured)
    assert "best checkpoint: step 3, eval_loss" in capsys.readouterr().out
    log = json.loads((output / "log_history.json").read_text())
    margins = {entry["step"]: entry["eval_margin"] for entry in log if "eval_margin" in entry}
    assert list(margins) == [3, 6, 9, 12]
    assert max(margins, key=margins.get) == 3
    assert log[-1] == {"best_step": 3, "best_metric": margins[3]}
    last = run(tiny_teacher, pairs, tmp_path / "last", "--epochs", "3")
    assert not all(torch.equal(last[name], weight) for name, weight in weights.items())

    interrupted(
        train(tiny_teacher, pairs, tmp_path / "killed", *measured), monkeypatch, checkpoint=4
    )
    folder = tmp_path / "killed.checkpoints"
    kept = {path.name for path in folder.glob("checkpoint-*")}
    assert kept == {f"checkpoint-{step}" for step in (3, 6, 9, 12)}
    resumed = run(tiny_teacher, pairs, tmp_path / "killed", *measured)
    assert all(torch.equal(resumed[name], weight) for name, weight in weights.items())
    command = train(tiny_teacher, pairs, output, *measured, "--metric-for-best-model", "nll")
    assert main(command) == 2
    assert "metric_for_best_model was 'margin' and is 'nll'" in capsys.readouterr().err


def test_checkpoints_without_their_best_one_are_not_gone_on_from(
    tiny_teacher, pairs, measured, tmp_path, monkeypatch, caplog
):
    command = train(tiny_teacher, pairs, tmp_path / "out", *measured)
    interrupted(command, monkeypatch, checkpoint=4)
    (tmp_path / "out.checkpoints" / "checkpoint-3" / "model.safetensors").write_bytes(b"")
    assert main(command) == 0
    told = "".join(record.getMessage() for record in caplog.records)
    assert "checkpoint-9 (of checkpoint-3, the best until then, model.safetensors has 0" in told
    assert "goes on from its start" in told


def test_a_metric_that_no_evaluation_has(tiny_teacher, pairs, tmp_path, capsys):
    command = train(tiny_teacher, pairs, tmp_path / "out", "--metric-for-best-model", "bleu")
    assert main(command) == 2
    assert "--metric-for-best-model does nothing without --eval-pairs" in capsys.readouterr().err
    assert main([*command, "--eval-pairs", str(pairs)]) == 2
    assert "metric_for_best_model is 'bleu', and the evaluation has:" in capsys.readouterr().err
