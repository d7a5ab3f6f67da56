"""The families of checkpoints that mmformer reads: one file for each group of relatives, a table each as data."""

from mmformer.checkpoints.families import (
    ast,
    bert,
    blip,
    clip,
    clip_open,
    gpt2,
    llama,
    modernbert,
    own,
    roberta,
    siglip,
    t5,
    vit,
    vit_timm,
    vit_torchvision,
    wav2vec2,
    whisper,
)
from mmformer.checkpoints.table import Family

FAMILIES: tuple[Family, ...] = (
    *own.FAMILIES,
    *bert.FAMILIES,
    *gpt2.FAMILIES,
    *llama.FAMILIES,
    *modernbert.FAMILIES,
    *roberta.FAMILIES,
    *t5.FAMILIES,
    *vit.FAMILIES,
    *clip.FAMILIES,
    *clip_open.FAMILIES,
    *siglip.FAMILIES,
    *blip.FAMILIES,
    *vit_timm.FAMILIES,
    *vit_torchvision.FAMILIES,
    *ast.FAMILIES,
    *whisper.FAMILIES,
    *wav2vec2.FAMILIES,
)  # fmt: skip
