# SPDX-License-Identifier: Apache-2.0
"""SEBP in Hugging Face's Trainer. Imported only when it is used, as it imports transformers."""

from torch import nn
from tqdm.auto import tqdm
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from .._rules import RowRule, parse_rule
from .apply.layers import OWNER, Layers, Report, apply_sebp_to_model
from .common.work import LayerKind, Work, work_done
from .linear_layers.linear import take_rule
from .padding.models import has_asked, put_padding_back
from .report.savings import Savings


class SebpCallback(TrainerCallback):
    """Trains with SEBP, and shows and logs what that saves.

    SEBP is applied to the model when training begins and removed when it ends. With each loss the
    Trainer logs

    - ``sebp_activity``: active rows of dY / rows of dY, over all layers since the last log,
    - ``sebp_seconds_saved``: the time that PyTorch would have needed for the backward of these
      layers, minus the time they took, since the last log. This is an estimate. PyTorch's time per
      row is measured on 512 rows, once for each kind of layer in the first step. Time saved in the
      forward is not counted.

    With the summary at the end it logs both over the whole run. The progress bar shows the activity
    of the last step and the time saved so far. Each process counts its own work, and the first one
    logs.

    Reporters that the Trainer makes from ``report_to`` run before other callbacks, so they do not
    see the two. Put this callback first to change that::

        callbacks = trainer.callback_handler.callbacks
        callbacks.insert(0, trainer.pop_callback(sebp.SebpCallback))

    Parameters
    ----------
    rows : "nonzero", int, ("threshold", float), ("energy", float) or ("sampled", float)
        Which rows of dY to keep.
    layers : str, sequence of str, or callable, optional
        Which layers. Default: all.
    padding : bool, default False
        Leave padded tokens out in the forward too.
    check : bool, default True
        With `padding`, whether results are compared. All four parameters are those of
        :func:`~sebp.apply_sebp_to_model`.

    Attributes
    ----------
    report : Report or None
        The layers replaced, once training has begun.

    Raises
    ------
    TypeError, ValueError
        If `rows` is not a rule.

    Examples
    --------
    >>> trainer = Trainer(model, arguments, train_dataset=data, callbacks=[sebp.SebpCallback()])
    >>> trainer.train()
    """

    def __init__(
        self,
        rows: RowRule = "nonzero",
        layers: Layers = None,
        padding: bool = False,
        check: bool = True,
    ) -> None:
        self.rows = parse_rule(rows)
        self.layers = layers
        self.padding = padding
        self.check = check
        self.report: Report | None = None
        self._model: nn.Module | None = None
        self._had_padding = False
        self._savings = Savings()
        # The work done when training began, at the last log and at the last step.
        self._begin: dict[LayerKind, Work] = {}
        self._log: dict[LayerKind, Work] = {}
        self._step: dict[LayerKind, Work] = {}

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module,
        **kwargs: object,
    ) -> None:
        """Apply SEBP to the model, and remove it from that of an interrupted run."""
        self._leave()
        self._had_padding = has_asked(model, OWNER)
        self.report = apply_sebp_to_model(model, self.rows, self.layers, self.padding, self.check)
        self._model = model
        self._begin = self._log = self._step = work_done()

    def on_step_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: object,
    ) -> None:
        """Set the text of the progress bar, which the Trainer draws again."""
        if self._model is None or not state.is_world_process_zero:
            return
        activity, _ = self._savings.since(self._step)
        _, saved = self._savings.since(self._begin)
        self._step = work_done()
        if activity is not None:
            for bar in list(getattr(tqdm, "_instances", ())):
                if bar.total == state.max_steps:
                    bar.set_postfix_str(f"activity {activity:.1%}, saved {saved:.1f} s", False)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: object,
    ) -> None:
        """Add the two numbers to the logs of training."""
        if self._model is None or not state.is_world_process_zero:
            return
        if not logs or not {"loss", "train_runtime"} & logs.keys():
            return
        activity, saved = self._savings.since(self._begin if "train_runtime" in logs else self._log)
        self._log = work_done()
        if activity is not None:
            ours = {"sebp_activity": round(activity, 4), "sebp_seconds_saved": round(saved, 3)}
            logs.update(ours)
            state.log_history[-1].update(ours)

    def on_train_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module,
        **kwargs: object,
    ) -> None:
        """Remove SEBP from the layers that it was applied to."""
        self._leave()

    def _leave(self) -> None:
        """Restore the model that was changed, if there is one."""
        if self._model is None:
            return
        for name in self.report.replaced:
            take_rule(self._model.get_submodule(name))
        if not self._had_padding:
            put_padding_back(self._model, OWNER)
        self._model = None
