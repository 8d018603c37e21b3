"""Every system is one file here and one line in this table."""

from polymodal.core.registry import Entry, Registry

TABLE = Registry(
    "system",
    (
        Entry(
            name="vit", module="polymodal.systems.vit", cls="VisionTransformer", model_types=("vit",),
            paper="An Image is Worth 16x16 Words", year=2020, url="https://arxiv.org/abs/2010.11929",
            modalities=("image",),
        ),
        Entry(
            name="mae", module="polymodal.systems.mae", cls="MAE", model_types=("vit_mae",),
            paper="Masked Autoencoders Are Scalable Vision Learners", year=2021, url="https://arxiv.org/abs/2111.06377",
            modalities=("image",),
        ),
        Entry(
            name="dinov2", module="polymodal.systems.dinov2", cls="DINOv2", model_types=("dinov2",),
            paper="DINOv2: Learning Robust Visual Features without Supervision", year=2023,
            url="https://arxiv.org/abs/2304.07193", modalities=("image",),
        ),
        Entry(
            name="clip", module="polymodal.systems.clip", cls="CLIP", model_types=("clip",),
            paper="Learning Transferable Visual Models From Natural Language Supervision", year=2021,
            url="https://arxiv.org/abs/2103.00020", modalities=("image", "text"),
        ),
        Entry(
            name="siglip", module="polymodal.systems.siglip", cls="SigLIP", model_types=("siglip",),
            paper="Sigmoid Loss for Language Image Pre-Training", year=2023, url="https://arxiv.org/abs/2303.15343",
            modalities=("image", "text"),
        ),
        Entry(
            name="siglip2", module="polymodal.systems.siglip2", cls="SigLIP2", model_types=("siglip2",),
            paper="SigLIP 2: Multilingual Vision-Language Encoders", year=2025, url="https://arxiv.org/abs/2502.14786",
            modalities=("image", "text"),
        ),
    ),
)  # fmt: skip
