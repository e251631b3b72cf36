"""A trained classifier with its preprocessing as a file that needs none of this project's code."""

import io
from importlib.util import find_spec
from typing import Literal

import torch
from torch import Tensor, nn

from lit_lipschitz.errors import ConfigurationError

Format = Literal["pt2", "onnx"]


class Classifier(nn.Module):
    """Pixels of 0 to 255 to class probabilities.

    Args:
        network: Normalised images to logits.
        mean: What is subtracted from pixels / 255, of a shape that broadcasts to (channels, height, width).
        std: What the difference is divided by, likewise.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, network: nn.Module, mean: Tensor, std: Tensor) -> None:
        super().__init__()
        self.network = network
        self.register_buffer("mean", mean)
        self.register_buffer("std", std)

    def forward(self, pixels: Tensor) -> Tensor:
        """Probabilities of shape (batch, classes) for uint8 pixels of shape (batch, channels, height, width)."""
        return self.network((pixels.float() / 255 - self.mean) / self.std).softmax(dim=1)


def exported(classifier: nn.Module, image_shape: tuple[int, ...], kind: Format) -> bytes:
    """The content of a ``.pt2`` or ``.onnx`` file, for batches of any size.

    Args:
        classifier: The module; it is evaluated on the CPU.
        image_shape: Channels, height and width.
        kind: ``"pt2"`` is read by ``torch.export.load``, ``"onnx"`` by any ONNX runtime.

    Raises:
        ConfigurationError: The packages that write ONNX are missing.
    """
    classifier = classifier.cpu().eval()
    pixels = torch.zeros(2, *image_shape, dtype=torch.uint8)
    program = torch.export.export(classifier, (pixels,), dynamic_shapes=({0: torch.export.Dim("batch")},))
    file = io.BytesIO()
    if kind == "pt2":
        torch.export.save(program, file)
        return file.getvalue()
    if missing := [name for name in ("onnx", "onnxscript") if find_spec(name) is None]:
        raise ConfigurationError(f"ONNX files need {' and '.join(missing)}: pip install onnx onnxscript, or use pt2")
    result = torch.onnx.export(program, dynamo=True, input_names=["pixels"], output_names=["probabilities"],
                               verbose=False)  # fmt: skip
    assert result is not None
    return result.model_proto.SerializeToString()
