"""A sweep of SGD's learning rate with Optuna, and one run with the computed learning rate beside it.

For the command there is `lit-lipschitz compare`, which repeats both over seeds and tests the difference.
"""

import lightning as L
import optuna
import torch
from lightning.pytorch import Callback

from lit_lipschitz import MLP, DigitsDataModule, ImageClassifier, LinearWarmupDecay, LipschitzLR


def accuracy(lr: float, *callbacks: Callback) -> tuple[float, float]:
    """Validation and test accuracy of an MLP on digits after five epochs."""
    L.seed_everything(0, verbose=False)
    module = ImageClassifier(
        network=MLP(),
        optimizer=lambda parameters: torch.optim.SGD(parameters, lr=lr, momentum=0.9),
        scheduler=LinearWarmupDecay,
    )
    data = DigitsDataModule(batch_size=32)
    trainer = L.Trainer(
        max_epochs=5,
        callbacks=list(callbacks),
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, data)
    validated = float(trainer.callback_metrics["val_acc"])
    (tested,) = trainer.test(module, data, verbose=False)
    return validated, tested["test_acc"]


def main(trials: int = 8) -> None:
    """Sweeps, and trains once with LipschitzLR."""
    optuna.logging.set_verbosity(optuna.logging.WARNING)

    def objective(trial: optuna.Trial) -> float:
        validated, tested = accuracy(trial.suggest_float("lr", 1e-3, 1.0, log=True))
        trial.set_user_attr("test_acc", tested)
        return validated

    study = optuna.create_study(direction="maximize", sampler=optuna.samplers.TPESampler(seed=0))
    study.optimize(objective, n_trials=trials)
    best = study.best_trial
    print(f"Optuna, {trials} runs: lr {best.params['lr']:.3g}, test_acc {best.user_attrs['test_acc']:.3f}")
    callback = LipschitzLR()
    _, tested = accuracy(0.1, callback)
    print(f"LipschitzLR, 1 run: lr {callback.rate:.3g}, test_acc {tested:.3f}")


if __name__ == "__main__":
    main()
