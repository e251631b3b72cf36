"""What TensorBoard opens with after a run of the command: its layout, and hyperparameters with their outcome."""

import re
import sys
from pathlib import Path

import numpy as np
import pytest
from helpers import ROOT
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar.layout_pb2 import Layout
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

from lit_lipschitz.cli.fit.tensorboard_summary import TensorBoardSummary, hyperparameters
from lit_lipschitz.cli.main import main
from lit_lipschitz.cli.report.runs import find_runs

FIT = ["fit", "--config", "digits", "--trainer.accelerator", "cpu", "--trainer.max_epochs", "1"]


@pytest.fixture
def events(monkeypatch):
    """Fits in this process; returns the events of the run."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["lit-lipschitz", *FIT, *arguments])
        assert main() == 0
        (folder,) = Path("lightning_logs").iterdir()
        found = EventAccumulator(str(folder))
        found.Reload()
        return found

    return run


def hparams(events, tag):
    metadata = events.SummaryMetadata(f"_hparams_/{tag}")
    return HParamsPluginData.FromString(metadata.plugin_data.content)


def test_rate_constant_and_activations_are_side_by_side(events):
    found = events("--test_after_fit", "false")
    (tensor,) = found.Tensors("custom_scalars__config__")
    (category,) = Layout.FromString(tensor.tensor_proto.string_val[0]).category
    assert [chart.title for chart in category.chart] == ["rate", "lr", "constant"]
    for chart in category.chart:
        (pattern,) = chart.multiline.tag
        assert [name for name in found.Tags()["scalars"] if re.search(pattern, name)] == [f"lipschitz/{chart.title}"]


def test_hyperparameters_come_with_the_curves_that_are_their_outcome(events):
    found = events("--model.optimizer.weight_decay", "0.001", "--lipschitz.bound", "smooth")
    start = hparams(found, "session_start_info").session_start_info.hparams
    assert start["model.optimizer"].string_value == "torch.optim.SGD"
    assert start["model.optimizer.weight_decay"].number_value == 0.001
    assert start["lipschitz.bound"].string_value == "smooth"
    assert start["data"].string_value == "lit_lipschitz.DigitsDataModule"
    assert start["trainer.max_epochs"].number_value == 1
    metrics = [info.name.tag for info in hparams(found, "experiment").experiment.metric_infos]
    assert sorted(metrics) == ["test_acc", "test_loss", "train_acc", "train_loss", "val_acc", "val_loss"]
    # TensorBoard shows the last value of each.
    assert set(metrics) <= set(found.Tags()["scalars"])
    assert hparams(found, "session_end_info").HasField("session_end_info")
    # They are no curves.
    (run,) = find_runs(["lightning_logs"])
    assert set(run.curves) == {
        *metrics,
        *(
            f"lipschitz/{n}"
            for n in ("rate", "lr", "constant", "measured", "activation_norm", "weight_norm", "step_scale")
        ),
    }


def test_a_baseline_has_hyperparameters_of_its_own_and_no_layout(events):
    found = events("--fixed_rate", "true", "--test_after_fit", "false")
    assert "custom_scalars__config__" not in found.Tags()["tensors"]
    names = set(hparams(found, "session_start_info").session_start_info.hparams)
    assert "model.optimizer.lr" in names
    assert not [name for name in names if name.startswith("lipschitz.")]


def test_what_is_not_set_is_no_hyperparameter():
    config = {
        "seed_everything": 0,
        "fixed_rate": False,
        "model": {"class_path": "a.B", "init_args": {"width": 3, "inner": {"class_path": "c.D"}, "none": None}},
        "data": None,
        "trainer": {"max_epochs": 5, "precision": None, "devices": "auto", "callbacks": []},
        "lipschitz": {"optimizers": [0, 1]},
        "ckpt_path": "x",
    }
    assert hyperparameters(config) == {
        "seed_everything": 0, "fixed_rate": False, "model": "a.B", "model.width": 3, "model.inner": "c.D",
        "lipschitz.optimizers": "[0, 1]", "trainer.max_epochs": 5, "trainer.devices": "auto",
    }  # fmt: skip


# -- the picture in the documentation ----------------------------------------------------------------------------------


@pytest.fixture
def script(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "docs"))
    import tensorboard_picture

    return tensorboard_picture


def charts(picture, count):
    """How many pixels each run's curve has in each chart, the charts being side by side right of the settings."""
    image = pytest.importorskip("matplotlib.image").imread(picture)[..., :3]
    colours = np.array([[255, 112, 67], [0, 119, 187]]) / 255  # of the first two runs
    found = []
    for chart in range(count):
        left = 375 + 350 * chart
        area = image[155:335, left : left + 345]
        found.append([int((np.abs(area - colour).max(axis=-1) < 0.03).sum()) for colour in colours])
    return image.shape, found


def test_the_picture_is_in_the_page_with_the_commands_that_made_it(script):
    page = " ".join((ROOT / "docs" / "guide" / "start.md").read_text().split())
    (alt,) = re.findall(r"!\[([^]]+)\]\(\.\./tensorboard\.png\)", page)
    (titles,) = TensorBoardSummary.LAYOUT.values()
    for title in titles:
        assert re.search(rf"\b{title}\b", alt)
    for i, command in enumerate(script.COMMANDS):
        assert f"`{command}` (version_{i})" in page


def test_the_picture_has_a_curve_of_each_run_in_each_chart_of_the_layout(script):
    assert script.PICTURE.stat().st_size < 200_000
    (titles,) = TensorBoardSummary.LAYOUT.values()
    (height, width, _), found = charts(script.PICTURE, len(titles))
    assert (width, height) == (script.WIDTH, script.HEIGHT)
    assert np.min(found) > 200, found


@pytest.mark.slow
def test_tensorboard_draws_the_layout_of_new_runs(script):
    if script.browser() is None:
        pytest.skip("no Chromium on the PATH")
    script.make(Path("new.png"), "--trainer.max_epochs", "5")
    (titles,) = TensorBoardSummary.LAYOUT.values()
    _, found = charts("new.png", len(titles))
    assert np.min(found) > 200, found
