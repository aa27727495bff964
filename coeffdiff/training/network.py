"""The UNet, what learns on it, its optimizer and schedule, prepared by Accelerate."""

from __future__ import annotations

import math
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedDataParallelKwargs
from diffusers import DDPMScheduler
from diffusers.optimization import get_scheduler
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from coeffdiff.config.optimizers import make_optimizer
from coeffdiff.config.schema import MethodSettings, TrainingSettings
from coeffdiff.hosts.quantized import quantized_layers
from coeffdiff.models.fingerprints import fingerprints
from coeffdiff.training.average import Average, average_for
from coeffdiff.training.checkpoints import Checkpoint
from coeffdiff.training.continuing import check_weights
from coeffdiff.training.inputs import Inputs
from coeffdiff.training.plan import Plan
from coeffdiff.training.trackers import trackers_for
from coeffdiff.training.trainables import Trainables, make_trainable
from coeffdiff.utils.torch_setup import compile_blocks, prepare_kernels


@dataclass(frozen=True)
class Network:
    """What a step works with.

    model: the UNet as Accelerate prepared it, under DistributedDataParallel where there are several processes; unet:
    without. average: of what learns, if one is kept. noise_scheduler: of training; sampler: of validation pictures.
    weights: fingerprints of the base model.
    """

    unet: nn.Module
    model: nn.Module
    trainables: Trainables
    average: Average | None
    noise_scheduler: DDPMScheduler
    sampler: Any
    accelerator: Accelerator
    optimizer: Any
    schedule: Any
    weights: dict[str, str]

    def restore(self, checkpoint: Checkpoint) -> None:
        """Raises: ResumeError if it holds other parameters."""
        self.trainables.restore(checkpoint.tensors)
        if self.average:
            self.average.restore(checkpoint.average, checkpoint.averaged_steps)
        self.optimizer.load_state_dict(checkpoint.optimizer)
        self.schedule.load_state_dict(checkpoint.schedule)
        if self.accelerator.scaler and checkpoint.scaler:
            self.accelerator.scaler.load_state_dict(checkpoint.scaler)

    def shown(self) -> AbstractContextManager[None]:
        """Inside, what learns is what pictures and adapters are made of: its average, where one is kept."""
        return self.average.applied() if self.average else nullcontext()

    def states(self) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
        """state_dicts of optimizer, schedule and scaler, for a checkpoint."""
        scaler = self.accelerator.scaler
        return self.optimizer.state_dict(), self.schedule.state_dict(), scaler.state_dict() if scaler else {}


def build_network(plan: Plan, inputs: Inputs, checkpoint: Checkpoint | None) -> Network:
    """The base model's UNet, frozen, with alpha and LoRA on it; what learns of the text is in `inputs`.

    Raises: ResumeError if its weights are not those that `checkpoint` was trained on.
    """
    training, device = plan.settings.training, plan.state.device
    pipe = plan.load(plan.base, dtype=plan.dtype, parts={"unet"})
    weights = fingerprints(plan.base, plan.dtype)  # all its files are here now
    if checkpoint:
        check_weights(plan.run, checkpoint.model, weights, plan.base)
    unet, noise_scheduler = pipe.unet.to(device), DDPMScheduler.from_config(pipe.scheduler.config)
    prepare_kernels(device, plan.dtype, unet)
    trainables = make_trainable(unet, plan.settings, inputs.learned, inputs.encoders)
    if training.gradient_checkpointing:
        unet.enable_gradient_checkpointing()
    unet.train()
    if training.compile:
        compile_blocks(unet, device)
    groups = parameter_groups(trainables, plan.settings.method)
    bare = make_optimizer(training.optimizer, groups, training.optimizer_args)
    # The schedule is not prepared: it would step once per process
    schedule = get_scheduler(
        training.lr_schedule, bare, num_warmup_steps=training.warmup_steps, num_training_steps=plan.steps
    )
    AcceleratorState._reset_state()  # or a second train() in one process could not choose its own precision
    accelerator = Accelerator(
        mixed_precision=training.precision,
        gradient_accumulation_steps=plan.accumulate,
        log_with=trackers_for(plan.settings, plan.run) or None,
        kwargs_handlers=[DistributedDataParallelKwargs(broadcast_buffers=False)],
    )
    if quantized_layers(unet):
        _leave_out_of_ddp(unet)
    # DDP refuses a network without anything to learn; what learns of the text is none of its parameters
    model = accelerator.prepare_model(unet, evaluation_mode=not (trainables.alphas or trainables.lora))
    optimizer = accelerator.prepare(bare)
    return Network(
        unet,
        model,
        trainables,
        average_for(trainables, training.ema),
        noise_scheduler,
        pipe.scheduler,
        accelerator,
        optimizer,
        schedule,
        weights,
    )


def _leave_out_of_ddp(unet: nn.Module) -> None:
    """DDP sends all parameters from the first process to the others, and cannot send quantized ones. Each process has
    read the frozen ones itself."""
    frozen = [name for name, parameter in unet.named_parameters() if not parameter.requires_grad]
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(unet, frozen)


def parameter_groups(trainables: Trainables, method: MethodSettings) -> list[dict[str, Any]]:
    """The optimizer's groups, each with its own learning rate; alpha and token do not decay."""
    decay = {"lora": method.lora.weight_decay, "lora_text": method.lora.weight_decay}
    return [
        {"params": parameters, "lr": float(method.rates[name]), "weight_decay": decay.get(name, 0.0)}
        for name, parameters in trainables.groups.items()
    ]


def clip_gradients(
    accelerator: Accelerator, trainables: Trainables, training: TrainingSettings
) -> dict[str, Tensor]:
    """Clip each group apart, so that the many do not drown the few; returns their norms before clipping.

    Groups of the text encoders have the limits of the UNet's.
    """
    accelerator.unscale_gradients()
    limits = {"coeff": training.clip_coeff, "lora": training.clip_lora, "token": training.clip_token}
    return {
        name: nn.utils.clip_grad_norm_(parameters, limits[name.removesuffix("_text")] or math.inf).detach()
        for name, parameters in trainables.groups.items()
    }
