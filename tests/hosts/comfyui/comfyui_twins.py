"""One UNet in diffusers and in ComfyUI, called alike."""

from __future__ import annotations

from types import SimpleNamespace

import torch

STEPS = 3  # of samplers


class Twins:
    """One UNet in diffusers and in ComfyUI, and equal inputs for both."""

    def __init__(self, sizes, dtype=torch.float32, side=(8, 16)):
        from narrow_sdxl import comfyui_model, make_unet

        self.unet = make_unet(sizes)
        self.model = comfyui_model(self.unet, sizes, dtype)
        draw = torch.Generator().manual_seed(1)

        def noise(*shape):
            return torch.randn(2, *shape, generator=draw)

        self.x, self.context, self.pooled = noise(4, *side), noise(77, sizes.text), noise(sizes.pooled)
        self.ids = torch.tensor([[128.0, 256, 0, 0, 128, 256]]).expand(2, -1)
        self.t = torch.tensor([700, 200])

    @torch.no_grad()
    def diffusers(self, *adapters, scale=1.0):
        """The prediction with these adapters, which are taken off again."""
        from coeffdiff.hosts.diffusers import load_adapter

        pipe = SimpleNamespace(unet=self.unet)
        loaded = [load_adapter(pipe, path, scale) for path in adapters]
        added = {"text_embeds": self.pooled, "time_ids": self.ids}
        out = self.unet(self.x, self.t, encoder_hidden_states=self.context, added_cond_kwargs=added).sample
        for adapter in reversed(loaded):
            adapter.remove()
        return out

    def comfyui(self, model=None, control=None):
        """The prediction of a ModelPatcher, its patches and wrappers applied as a sampler does."""
        import comfy.model_management

        model = model or self.model
        comfy.model_management.load_models_gpu([model])
        sizes = self.unet.add_time_proj(self.ids.flatten()).reshape(2, -1)
        options = {**model.model_options["transformer_options"], "wrappers": model.wrappers}
        with torch.inference_mode():
            return model.model.diffusion_model(
                self.x, self.t.float(), self.context, torch.cat([self.pooled, sizes], -1), control, options
            ).clone()

    def with_adapters(self, *paths, model=None, **strengths):
        from coeffdiff.hosts.comfyui.loading import apply_adapter

        model = model or self.model
        for path in paths:
            model, _ = apply_adapter(model, None, path, **strengths)
        return model

    def sampled(self, model, **options):
        """Latents of KSampler after STEPS steps at guidance 5."""
        import comfy.sample

        noise = comfy.sample.prepare_noise(self.x[:1], 7)
        positive = [[self.context[:1], {"pooled_output": self.pooled[:1]}]]
        negative = [[self.context[1:], {"pooled_output": self.pooled[1:]}]]
        with torch.inference_mode():
            return comfy.sample.sample(
                model,
                noise,
                STEPS,
                5.0,
                "euler",
                "ddim_uniform",
                positive,
                negative,
                0 * noise,
                disable_pbar=True,
                **options,
            ).clone()


def relative(one, other):
    return float((one.double() - other.double()).norm() / other.double().norm())
