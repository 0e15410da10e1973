"""`import mowmerge.hf` makes transformers' Auto classes load dynamic checkpoints."""

from mowmerge.dynamic.modeling import register

register()
