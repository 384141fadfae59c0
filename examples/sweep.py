"""A search for good settings: many short trainings, the hopeless ones ended early.

Run:    pip install optuna && python data.py && python examples/sweep.py --trials 20
See:    sweep/ holds every run, and trials.db the study (optuna-dashboard sqlite:///sweep/trials.db)
Start it again to go on with the study, or several times at once to search faster (set OMP_NUM_THREADS=1).
Optuna chooses the settings (Tree-structured Parzen Estimator, Bergstra et al., 2011) and prunes what does
worse than the median of the trials before it, at the same step.
"""

import argparse
import sys
from dataclasses import replace
from pathlib import Path

import optuna

from nanogpt import presets
from nanogpt.config import TrainConfig
from nanogpt.errors import UserError
from nanogpt.training.fit import fit


def config_of(trial: optuna.Trial, options: argparse.Namespace) -> TrainConfig:
    """The settings of a trial."""
    return replace(
        presets.get(options.preset),
        data_dir=options.data_dir,
        out_dir=str(Path(options.folder) / f"trial-{trial.number:04}"),
        overwrite=True,  # of a trial with this number that was killed
        max_iters=options.max_iters,
        eval_interval=max(1, options.max_iters // 8),
        eval_iters=20,
        learning_rate=trial.suggest_float("learning_rate", 1e-3, 1e-1, log=True),
        muon_lr=trial.suggest_float("muon_lr", 5e-3, 1e-1, log=True),
        dropout=trial.suggest_float("dropout", 0.0, 0.3),
        weight_decay=trial.suggest_float("weight_decay", 1e-3, 0.3, log=True),
    )


def objective(trial: optuna.Trial, options: argparse.Namespace) -> float:
    """Validation loss of a trial, nats a token."""

    def keep_going(step: int, loss: float) -> bool:
        trial.report(loss, step)
        return not trial.should_prune()

    result = fit(config_of(trial, options), keep_going)
    if result.reason == "callback":
        raise optuna.TrialPruned
    if result.exit_code:  # a signal stopped it
        raise KeyboardInterrupt
    return result.best_val_loss


def main() -> None:
    """Search, and say what was found."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--trials", type=int, default=20)
    parser.add_argument("--preset", default="speedrun")
    parser.add_argument("--max_iters", type=int, default=80)
    parser.add_argument("--data_dir", default="data")
    parser.add_argument("--folder", default="sweep")
    options = parser.parse_args()
    Path(options.folder).mkdir(parents=True, exist_ok=True)
    study = optuna.create_study(
        study_name="nanogpt",
        storage=f"sqlite:///{options.folder}/trials.db",
        load_if_exists=True,
        direction="minimize",
        pruner=optuna.pruners.MedianPruner(n_startup_trials=4),
    )
    study.optimize(lambda trial: objective(trial, options), n_trials=options.trials)
    pruned = sum(trial.state == optuna.trial.TrialState.PRUNED for trial in study.trials)
    print(f"{len(study.trials)} trials, {pruned} of them ended early")
    print(f"the best, trial {study.best_trial.number}, has a validation loss of {study.best_value:.4f} with")
    for name, value in study.best_params.items():
        print(f"  --{name} {value:.4g}")


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        sys.exit(f"error: {error}")
