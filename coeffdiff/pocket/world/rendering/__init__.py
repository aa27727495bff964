"""Scenes of the pocket world to pictures: sphere tracing, paint and light, many scenes in one call.

What is drawn is a Scene, and nothing else decides a picture: same scene, same pixels, whatever else is in the batch
(up to rounding).

How it is fast: rays are marched only inside an object's box, first a cone for 2 x 2 pixels, then one per pixel, then
its subsamples, each from where the cone before touched; shadow and occlusion are shared by the subsamples of a pixel;
rays that are done are taken out of the batch; and everything is elementwise over the scenes of one kind or one place.
"""

from __future__ import annotations

from coeffdiff.pocket.world.rendering.picture import render

__all__ = ["render"]
