"""What the callbacks use of PyTorch Lightning, from the package ``lightning`` or the stand-alone ``pytorch_lightning``.

Each of the two has classes of its own. ``Callback`` is that of the package that has been imported before, so that its
Trainer and its command accept the callbacks; of both if both have been, and of the installed one if none has been.
"""

import importlib
import sys
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lightning.pytorch import Callback, LightningModule, Trainer
    from lightning.pytorch.utilities.model_helpers import is_overridden
    from lightning.pytorch.utilities.rank_zero import rank_zero_info
    from lightning.pytorch.utilities.seed import isolate_rng
else:
    _NAMES = {"lightning": "lightning.pytorch", "pytorch_lightning": "pytorch_lightning"}
    _imported = [name for name in _NAMES.values() if name in sys.modules]
    _installed = [name for package, name in _NAMES.items() if package in sys.modules or find_spec(package)]
    _packages = [importlib.import_module(name) for name in _imported or _installed[:1] or ["lightning.pytorch"]]
    _first = _packages[0]
    Callback = _first.Callback
    if len(_packages) > 1:
        Callback = type("Callback", tuple(package.Callback for package in _packages), {"__module__": __name__})
    LightningModule, Trainer = _first.LightningModule, _first.Trainer
    is_overridden = importlib.import_module(f"{_first.__name__}.utilities.model_helpers").is_overridden
    rank_zero_info = importlib.import_module(f"{_first.__name__}.utilities.rank_zero").rank_zero_info
    isolate_rng = importlib.import_module(f"{_first.__name__}.utilities.seed").isolate_rng

__all__ = ["Callback", "LightningModule", "Trainer", "class_in", "is_overridden", "isolate_rng", "rank_zero_info"]


def class_in(instance: Any, name: str) -> type | None:
    """The class of either package that has a name and that an object is an instance of; None if there is none."""
    packages = ("lightning", "pytorch_lightning")
    classes = (kind for kind in type(instance).__mro__ if kind.__module__.partition(".")[0] in packages)
    return next((kind for kind in classes if kind.__name__ == name), None)
