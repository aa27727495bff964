"""What a run writes: checkpoints, adapters of some steps, validation pictures, and the adapter at its end."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from coeffdiff.config.auto import learning_rates
from coeffdiff.hosts.diffusers import save_adapter, write_adapter
from coeffdiff.method.adapter_header import AdapterHeader
from coeffdiff.method.coefficients import clear_dropout
from coeffdiff.models.opening import recipe
from coeffdiff.training.breakdown import Breakdown, find_breakdown
from coeffdiff.training.card import model_card
from coeffdiff.training.checkpoints import Checkpoint, save_checkpoint
from coeffdiff.training.continuing import with_absolute_paths
from coeffdiff.training.finite import check_learned
from coeffdiff.training.inputs import Inputs
from coeffdiff.training.network import Network
from coeffdiff.training.plan import Plan
from coeffdiff.training.preview import write_previews
from coeffdiff.training.run_folder import disk_errors
from coeffdiff.training.step_log import StepLog, read_log
from coeffdiff.training.trainables import header_for
from coeffdiff.training.watch import FinalState, Watch
from coeffdiff.utils.atomic import atomic_write, sweep
from coeffdiff.utils.console import print_info


class RunOutputs:
    """Everything is written by the main process; each method is called by all of them, and they wait for it.

    header: of the adapter, made at once although it is written last: what it refuses must not cost a whole run.
    """

    def __init__(self, plan: Plan, inputs: Inputs, network: Network, watch: Watch) -> None:
        self._plan, self._inputs, self._network, self._watch = plan, inputs, network, watch
        settings = with_absolute_paths(plan.settings)
        self.header = header_for(
            settings,
            network.trainables,
            plan.base.name,
            plan.steps,
            network.weights,
            family=plan.base.family.name,
        )

    def save(self, step: int, loss: float) -> None:
        """A checkpoint. Raises: NonFiniteLoss before anything is written; TrainingError if the disk refuses."""
        plan, network = self._plan, self._network
        learned = network.trainables.tensors()
        check_learned(learned, step, plan.run)
        if plan.state.is_main_process:
            watched, best = self._watch.state()
            optimizer, schedule, scaler = network.states()
            saved = Checkpoint(
                step=step,
                tensors=learned,
                optimizer=optimizer,
                schedule=schedule,
                scaler=scaler,
                photos=plan.identities,
                samples_a_step=plan.samples_a_step,
                loss=loss,
                watched=watched,
                best=best,
                model=network.weights,
                average=network.average.tensors() if network.average else {},
                averaged_steps=network.average.steps if network.average else 0,
            )
            write = functools.partial(self._write_adapter, step)
            with network.shown():
                save_checkpoint(plan.run, saved, plan.settings.training.keep_checkpoints, write)
        plan.state.wait_for_everyone()

    def keep(self, step: int, loss: float) -> None:
        """The adapter of this step, which no later one takes the place of."""
        plan = self._plan
        check_learned(self._network.trainables.tensors(), step, plan.run)
        if plan.state.is_main_process:
            extras = {"README.md": self._card(self._header_at(step), loss, [])}
            kept = plan.run.kept_adapter(step)
            with disk_errors(f"The adapter {kept}"), self._network.shown():
                with atomic_write(kept, durable=True) as temporary:
                    self._write_adapter(step, temporary, extras)
                sweep(kept.parent)
        plan.state.wait_for_everyone()

    def preview(
        self, step: int, loss: float, log: StepLog, on_progress: Callable[[float], None]
    ) -> list[Path]:
        """Validation pictures of this step, scored and shown. Returns: their files and their grid."""
        files: list[Path] = []
        if self._inputs.previews and self._plan.state.is_main_process:
            clear_dropout(self._network.trainables.all_coefficients)
            with self._network.shown():
                files = self._draw_previews(step, on_progress)
                self._watch.validated(step, loss, files, log, self._network.trainables)
        self._watch.draw()
        self._plan.state.wait_for_everyone()
        return files

    def finish(self, step: int, loss: float, pictures: list[Path], last: bool) -> None:
        """The adapter at the end of a run, or the best one. last: whether all validations are in."""
        plan, trainables = self._plan, self._network.trainables
        clear_dropout(trainables.all_coefficients)
        check_learned(trainables.tensors(), step, plan.run)
        if plan.state.is_main_process:
            final = FinalState(self.header, loss, pictures, self._watch.scores if pictures else {})
            with (
                disk_errors(f"The adapter {plan.run.adapter}"),
                self._network.shown(),
                self._watch.choice(trainables, final, last) as final,
            ):
                names = [picture.name for picture in final.pictures]
                extras = {picture.name: picture.read_bytes() for picture in final.pictures}
                extras |= {"README.md": self._card(final.header, final.loss, names, final.scores)}
                unet, rows = self._network.unet, trainables.token
                save_adapter(plan.run.adapter, unet, final.header, extras, rows=rows, encoders=self._encoders)
            if last and (broken := self._breakdown(step)):
                print_info(f"hint     {broken.advice(learning_rates(plan.settings))}")
        plan.state.wait_for_everyone()

    def _breakdown(self, step: int) -> Breakdown | None:
        """What had become of the training by this step."""
        lines = (line for line in read_log(self._plan.run.log) if line["step"] <= step)
        return find_breakdown(lines, self._plan.samples_a_step)

    def _card(
        self,
        header: AdapterHeader,
        loss: float,
        pictures: Iterable[str],
        scores: Mapping[str, float] | None = None,
    ) -> bytes:
        broken = self._breakdown(header.trained_steps)
        return model_card(header, self._plan.settings, loss, pictures, scores, broken).encode()

    def _header_at(self, step: int) -> AdapterHeader:
        return self.header.model_copy(update={"trained_steps": step})

    def _write_adapter(self, step: int, folder: Path, extras: dict[str, bytes] | None = None) -> None:
        rows, header = self._network.trainables.token, self._header_at(step)
        write_adapter(folder, self._network.unet, header, extras, rows=rows, encoders=self._encoders)

    @property
    def _encoders(self) -> dict[str, Any]:
        """The text encoders that train."""
        return self._inputs.encoders.encoders if self._inputs.encoders else {}

    def _draw_previews(self, step: int, on_progress: Callable[[float], None]) -> list[Path]:
        plan, inputs, network = self._plan, self._inputs, self._network
        parts = {"unet": network.unet, "vae": inputs.vae, "scheduler": network.sampler}
        adapter = {
            "path": str(plan.run.adapter),
            "scale": 1.0,
            "kind": self.header.kind,
            "token": " and ".join(self.header.tokens),
            "trained_steps": step,
        }
        details = recipe(plan.base) | {"adapters": [adapter]}
        encoded = inputs.live.encoded(list(inputs.previews)) if inputs.live else inputs.previews
        folder = plan.run.samples(step)
        return write_previews(folder, plan.settings, encoded, parts, details, plan.state, on_progress)
