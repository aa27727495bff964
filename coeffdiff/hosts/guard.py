"""What adapters left on a UNet is compared with what is there before each of its forwards, and refused in a sentence.

Each kind of part (alpha, a LoRA, a token) registers itself here and knows how to tell that it is no longer what its
adapter says. Some methods of diffusers would do lasting harm before the next forward; they are gated, so that they ask
first.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, Protocol

from diffusers.models.attention_processor import Attention
from torch import nn

from coeffdiff.errors import InjectionError
from coeffdiff.utils.wrappers import unwrapped as unwrapped

Place = tuple[nn.Module, str, nn.Module]  # a module, and the child that it should have under a key


class Part(Protocol):
    """One part of one adapter, or all alphas of a UNet. Traced by torch.compile, so plain Python and cheap."""

    @property
    def on(self) -> bool:
        """Whether it changes what the UNet predicts, and how strongly depends on the adapter's scale."""

    def problem(self) -> str:
        """The sentence for a person if something is not as the adapter left it; otherwise empty."""


def parts_of(unet: nn.Module) -> dict[str, Part]:
    """What is registered, by key; kept on the UNet, so that it travels with it."""
    bare = unwrapped(unet)
    if not hasattr(bare, "_coeffdiff_parts"):
        bare._coeffdiff_parts = {}
    parts: dict[str, Part] = bare._coeffdiff_parts
    return parts


def watch(unet: nn.Module, key: str, part: Part) -> None:
    """From now on every forward of the UNet compares this part too."""
    bare = unwrapped(unet)
    parts_of(bare)[key] = part
    if getattr(bare, "_coeffdiff_guard", None) is None:
        bare._coeffdiff_guard = bare.register_forward_pre_hook(_guard, with_kwargs=True)


def unwatch(unet: nn.Module, key: str) -> None:
    """Forget a part; the hook goes with the last one."""
    bare = unwrapped(unet)
    parts = parts_of(bare)
    parts.pop(key, None)
    if not parts and getattr(bare, "_coeffdiff_guard", None) is not None:
        bare._coeffdiff_guard.remove()
        bare._coeffdiff_guard = None


def verify(unet: nn.Module) -> None:
    """Raises: InjectionError, naming the likely cause, if a part of an adapter is gone, off, or of another scale."""
    for part in parts_of(unet).values():
        problem = part.problem()
        if problem:
            raise InjectionError(problem)


def _guard(unet: nn.Module, _inputs: Any, options: dict[str, Any]) -> None:
    # Under torch.compile as well: it traces this check, and what it compares, so a change makes it trace again
    given = options.get("cross_attention_kwargs")
    scale = 1.0 if given is None else given.get("scale", 1.0)
    if scale != 1.0 and any(part.on for part in parts_of(unet).values()):
        raise InjectionError(
            'cross_attention_kwargs={"scale": ...} would scale LoRA and leave the rest of an adapter as it is. '
            "Call the adapter's set_scale() instead; set_adapters() with weights scales other LoRAs."
        )
    verify(unet)


# --- where modules are ---------------------------------------------------------------------------------------------


def places(unet: nn.Module, names: Iterable[str]) -> list[Place]:
    """Who holds whom, from the UNet down to each named module; what several have in common is there once."""
    found: dict[str, Place] = {}
    for name in names:
        at, path = unwrapped(unet), ""
        for key in name.split("."):
            path = f"{path}.{key}"
            child = unwrapped(at._modules[key])
            found.setdefault(path, (at, key, child))
            at = child
    return list(found.values())


def displaced(found: list[Place]) -> int:
    """How many of these modules are no longer where they were; one compiled in its place still is."""
    lost = 0
    for holder, key, child in found:
        now = holder._modules.get(key)
        if now is not child and getattr(now, "_orig_mod", None) is not child:
            lost += 1
    return lost


# --- methods that ask first ----------------------------------------------------------------------------------------


class Gate:
    """A method of one pipeline or model that first calls check(owner, *args, **kwargs), which may raise.

    It holds its owner weakly, and in a deep copy or a pickle it belongs to the copy.
    """

    def __init__(self, owner: Any, name: str, check: Callable[..., None], before: Any = None) -> None:
        self.owner, self.name, self.check, self.before = weakref.ref(owner), name, check, before

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        owner = self.owner()
        if owner is not None:
            self.check(owner, *args, **kwargs)
        if self.before is not None:
            return self.before(*args, **kwargs)
        return None if owner is None else getattr(type(owner), self.name)(owner, *args, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> Gate:
        owner = self.owner()
        return Gate(memo.get(id(owner), owner), self.name, self.check, self.before)

    def __reduce__(self) -> Any:
        return Gate, (self.owner(), self.name, self.check, self.before)


def gate(owner: Any, name: str, check: Callable[..., None]) -> None:
    """Let a method of this object ask `check` first, if the object has the method and no gate yet."""
    before = vars(owner).get(name)
    if isinstance(before, Gate):
        before.check = check
    elif hasattr(owner, name) and hasattr(owner, "__weakref__"):
        setattr(owner, name, Gate(owner, name, check, before))


def ungate(owner: Any, *names: str) -> None:
    for name in names:
        there = vars(owner).get(name)
        if isinstance(there, Gate):
            delattr(owner, name)
            if there.before is not None:
                setattr(owner, name, there.before)


# --- state that cannot be taken in part ----------------------------------------------------------------------------


def keep_state_whole(unet: nn.Module) -> None:
    """Refuse the state of a part of this UNet, as ControlNetModel.from_unet takes it: it would fit nowhere."""
    bare = unwrapped(unet)
    if getattr(bare, "_coeffdiff_state_hooks", None):
        return
    layers = [(name, module) for name, module in bare.named_modules() if isinstance(module, Attention)]
    bare._coeffdiff_state_hooks = [
        layer.register_state_dict_pre_hook(partial(_refuse_part, name)) for name, layer in layers
    ]


def free_state(unet: nn.Module) -> None:
    bare = unwrapped(unet)
    for handle in getattr(bare, "_coeffdiff_state_hooks", None) or ():
        handle.remove()
    bare._coeffdiff_state_hooks = None


def _refuse_part(name: str, _module: nn.Module, prefix: str, _keep: bool) -> None:
    if not prefix.endswith(f"{name}."):
        raise InjectionError(
            "The state of a part of this UNet was asked for, as ControlNetModel.from_unet does. An adapter is on it, "
            "whose numbers are among that state: remove() the adapter first, and load it again afterwards."
        )
