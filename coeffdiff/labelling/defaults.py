"""The usual models and numbers of `caption` and `mask`, for their help too: no library is loaded for them."""

from __future__ import annotations

CAPTIONER = "Salesforce/blip-image-captioning-base"
SEGMENTER = "CIDAS/clipseg-rd64-refined"
THRESHOLD = 0.3  # of CLIPSeg's scores; OneTrainer's default too
CONFIDENCE = 0.5  # from which an instance or panoptic model is believed that it sees something
GROW = 1.0  # percent of the longer side: 10 pixels of 1024
