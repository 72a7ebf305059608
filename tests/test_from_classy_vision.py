# Copyright (c) the ConvNeXt V2 toolkit authors.
# Licensed under the MIT License; see LICENSE.
"""The table of ClassyVision's options: each row has flags that work, or a reason."""

import re
import shlex
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import models
from config import parser
from models.heads import check_heads
from optim_factory import build_optimizer_call, build_rules
from training.hook_table import check_hooks
from training.hooks import Hook
from training.schedules import build_curves
from training.setup import check_task

PAGE = Path(__file__).resolve().parents[1] / "docs" / "from-classy-vision.md"
ROWS = re.findall(r"^\| ((?!ClassyVision \||-).+?) \| (.+) \|$", PAGE.read_text(), re.MULTILINE)
# Words of the page -> code that exists: `package.module:function` stands for four things.
OWN = {
    "--model package.module:function": "--model tests.tiny:other",
    "--loss package.module:Loss": "--loss tests.tiny:Temperature",
    "--metrics package.module:function": f"--metrics {__name__}:metric",
    "package.module:function(2)": f"{__name__}:power(2)",
    "package.module:MyHook": f"{__name__}:MyHook",
}


# Options of ClassyVision by their names in configurations, without those of video.
NAMES = {
    "command line": """config_file checkpoint_folder checkpoint_load_path pretrained_checkpoint_path
        checkpoint_period show_progress skip_tensorboard visdom_server visdom_port profiler debug
        ignore_checkpoint_config log_freq image_backend video_backend distributed_backend""",
    "task": """classification_task fine_tuning num_epochs phases_per_epoch test_only
        test_phase_period pretrained_checkpoint pretrained_checkpoint_load_strict
        checkpoint_load_strict reset_heads freeze_trunk simulated_global_batchsize clip_grad_norm
        bn_weight_decay amp_args amp_type opt_level use_gpu use_sharded_ddp
        dataloader_mp_context""",
    "mixup": "mixup alpha cutmix_alpha cutmix_minmax mix_prob switch_prob mode label_smoothing",
    "distributed": """broadcast_buffers before_eval forward_pass find_unused_parameters apex pytorch
        bucket_cap_mb fp16_grad_compress batch_norm_sync_mode batch_norm_sync_group_size""",
    "data": """image_path image_folder image_files classy_cifar10 classy_cifar100 root split
        download synthetic_image crop_size class_ratio seed synthetic_image_streaming length
        async_gpu_copy synthetic_video ucf101 hmdb51 kinetics400 batchsize_per_replica use_shuffle
        num_samples num_workers transforms imagenet_augment imagenet_no_augment imagenet_autoaugment
        lighting apply_transform_to_key tuple_to_map generic_image_transform video_default_augment
        DataloaderSkipNoneWrapper DataloaderAsyncGPUWrapper DataloaderLimitWrapper limit
        wrap_around""",
    "networks": """resnet18 resnet152 resnext50_32x4d resnext101_32x4d resnext152_32x4d
        efficientnet_b0 efficientnet_b7 regnet_x_400mf regnet_z_4gf regnet_y_256gf vit_b_32 vit_b_16
        vit_l_32 vit_l_16 vit_h_14 resnet resnext densenet efficientnet regnet anynet mlp
        vision_transformer resnext3d""",
    "options of networks": """num_blocks init_planes reduction small_input zero_init_bn_residuals
        basic_layer final_bn_relu use_se se_reduction_ratio base_width_and_cardinality growth_rate
        expansion model_name model_params bn_momentum bn_epsilon width_divisor min_width
        drop_connect_rate depth w_0 w_a w_m group_width bottleneck_multiplier stem_type stem_width
        block_type activation se_ratio depths widths group_widths bottleneck_multipliers strides
        image_size patch_size num_layers num_heads hidden_dim mlp_dim dropout_rate
        attention_dropout_rate classifier conv_stem_layers input_dim output_dim hidden_dims dropout
        first_dropout use_batchnorm first_batchnorm num_classes wrapper_cls input_shape input_key
        extract_features from_model from_checkpoint""",
    "heads": """fully_connected conv_planes normalize_inputs zero_init_bias identity fork_block
        unique_id in_plane vision_transformer_head fully_convolutional_linear pool_size
        activation_func""",
    "losses": """CrossEntropyLoss soft_target_cross_entropy normalize_targets ignore_index reduction
        label_smoothing_cross_entropy smoothing_param sum_arbitrary losses weights
        multi_output_sum_loss barron c size_average weight""",
    "optimizers": """sgd momentum nesterov use_larc larc_config trust_coefficient adam amsgrad adamw
        adamw_mt rmsprop centered rmsprop_tf zero base_optimizer lr weight_decay betas eps""",
    "schedulers": """param_schedulers constant value linear start_value end_value cosine polynomial
        base_value power step values multistep milestones step_with_fixed_gamma gamma num_decays
        composite schedulers lengths interval_scaling update_interval""",
    "meters": "accuracy topk precision_at_k recall_at_k video_accuracy",
    "hooks": """checkpoint phase_types ema_model_weights decay consider_bn_buffers device
        loss_lr_meter_logging model_complexity tensorboard_plot summary_writer log_period
        model_tensorboard output_csv id_key delimiter precise_bn cache_samples progress_bar
        torchscript use_trace trace_strict visdom""",
}


class MyHook(Hook):
    def __init__(self, arg: int) -> None:
        self.arg = arg


def metric(scores: torch.Tensor, targets: torch.Tensor) -> float:
    return 0.0


def power(progress: float, exponent: float) -> float:
    return (1 - progress) ** exponent


def spans(cell: str) -> list[str]:
    """Flags that a cell shows; a reason may name some too."""
    found = re.findall(r"`([^`]+)`", cell) if not cell.startswith("—") else []
    return [span for span in found if span.startswith("--")]


COMMANDS = [span for _, cell in ROWS for span in spans(cell)]


def parse(words: str) -> parser.FrozenNamespace:
    typed = shlex.split(words)
    folder = [] if "--data_path" in typed or "--data_set" in typed else ["--data_path", "images"]
    return parser.parse(parser.finetune_parser(), [*typed, *folder])


def test_every_row_has_flags_or_a_reason():
    for name, cell in ROWS:
        assert bool(spans(cell)) != cell.startswith("—"), name
        assert not cell.startswith("—") or len(cell.split()) > 3, name


@pytest.mark.parametrize("kind", NAMES)
def test_every_option_of_classy_vision_has_a_row(kind):
    code = " ".join(" ".join(re.findall(r"`([^`]+)`", name)) for name, _ in ROWS)
    assert set(NAMES[kind].split()) - set(re.findall(r"\w+", code)) == set()


@pytest.mark.parametrize("command", COMMANDS)
def test_flags_of_a_row_are_accepted(command, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run.yaml").write_text("epochs: 90\n")
    for words, existing in OWN.items():
        command = command.replace(words, existing)
    args = parse(command)
    models.check_model(args)
    for check in (build_optimizer_call, build_rules, build_curves, check_heads, check_hooks):
        check(args)
    check_task(args)


@pytest.mark.slow
@pytest.mark.parametrize(
    "command", [x for x in COMMANDS if "--model " in x or "--head" in x if ":function" not in x]
)
def test_networks_of_a_row_are_built(command):
    args = parse(command if "--model" in command else f"{command} --model timm:resnet18")
    classes = args.nb_classes or 10
    with torch.device("meta"):
        model = models.build_classifier(args, classes)
        images = torch.empty(2, 3, *args.input_size)
        assert model.eval()(images).shape == (2, classes)


@pytest.fixture
def files(tmp_path, monkeypatch) -> list[Path]:
    """The two YAML files of the page, and the hook that they name."""
    blocks = re.findall(r"```yaml\n(# (\S+): .*?)```", PAGE.read_text(), re.DOTALL)
    for text, name in blocks:
        (tmp_path / name).write_text(text)
    (hook,) = re.findall(r"```python\n(.*?)```", (PAGE.parent / "hooks.md").read_text(), re.DOTALL)
    (tmp_path / "my_fork").mkdir()
    (tmp_path / "my_fork/hooks.py").write_text(hook)
    monkeypatch.syspath_prepend(tmp_path)
    yield [tmp_path / name for _, name in blocks]
    for name in [name for name in sys.modules if name.partition(".")[0] == "my_fork"]:
        del sys.modules[name]


def test_configurations_of_the_page_build_their_runs(files, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=lambda **_: None))
    resnet, efficientnet = (
        parser.parse(parser.finetune_parser(), ["--config", str(path)]) for path in files
    )
    assert (resnet.model, efficientnet.model) == ("timm:resnet18", "torchvision:efficientnet_b0")
    for args in (resnet, efficientnet):
        check_heads(args)
        check_hooks(args)
        check_task(args)
        build_curves(args)
        with torch.device("meta"):
            model = models.build_classifier(args, 10)
            found = model(torch.empty(2, 3, *args.input_size))
        assert {name: tuple(x.shape) for name, x in found.items()} == {
            "main": (2, 10),
            "aux": (2, 10),
        }
