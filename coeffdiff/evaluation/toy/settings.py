"""The toy experiment's sizes, arms and targets."""

from __future__ import annotations

HEADS, PLANE, NODES = 2, 2, 9
SETTINGS = {
    "caption": "the caption's formula: a full W_v per head, which contains alpha",
    "real heads": "heads of width 1, output projection fixed: neither contains the other",
}
ARMS = {"qk": "W_q, W_k", "qkv": "W_q, W_k, W_v", "alpha": "W_q, W_k, alpha"}
TRAINED = {"qk": ("q", "k"), "qkv": ("q", "k", "v"), "alpha": ("q", "k", "alpha")}
TARGETS = {
    "inside": "made by other W_q and W_k",
    "outside": "the same kind, five times as large",
    "negative": "made by an alpha with negative weights",
    "fold": "nodes on a line, folded by an alpha",
    "values": "made by another W_v",
    "unread": "nodes on a line across what a head reads, made by another W_v",
    "permutation": "every node where another one was",
}
REACHED = 0.02  # a target counts as reached below this error, 2 % of its size
RATES = (0.003, 0.01, 0.03, 0.1)
POLISHING = 100  # Levenberg-Marquardt steps after Adam's
