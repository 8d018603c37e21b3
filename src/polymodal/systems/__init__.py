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
        Entry(
            name="language", module="polymodal.systems.language", cls="LanguageModel",
            model_types=(
                "llama", "mistral", "qwen", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "phi3", "opt", "gpt2",
            ),
            paper="LLaMA: Open and Efficient Foundation Language Models (and ten families more)", year=2023,
            url="https://arxiv.org/abs/2302.13971", modalities=("text",),
        ),
        Entry(
            name="t5", module="polymodal.systems.t5", cls="T5", model_types=("t5",),
            paper="Exploring the Limits of Transfer Learning with a Unified Text-to-Text Transformer", year=2019,
            url="https://arxiv.org/abs/1910.10683", modalities=("text",),
        ),
        Entry(
            name="bart", module="polymodal.systems.bart", cls="BART", model_types=("bart",),
            paper="BART: Denoising Sequence-to-Sequence Pre-training", year=2019,
            url="https://arxiv.org/abs/1910.13461", modalities=("text",),
        ),
        Entry(
            name="bert", module="polymodal.systems.bert", cls="BERT", model_types=("bert",),
            paper="BERT: Pre-training of Deep Bidirectional Transformers", year=2018,
            url="https://arxiv.org/abs/1810.04805", modalities=("text",),
        ),
        Entry(
            name="llava", module="polymodal.systems.llava", cls="Llava", model_types=("llava",),
            paper="Visual Instruction Tuning; Improved Baselines with Visual Instruction Tuning", year=2023,
            url="https://arxiv.org/abs/2304.08485", modalities=("image", "text"),
        ),
        Entry(
            name="llava_next", module="polymodal.systems.llava_next", cls="LlavaNext", model_types=("llava_next",),
            paper="LLaVA-NeXT: Improved reasoning, OCR, and world knowledge", year=2024,
            url="https://llava-vl.github.io/blog/2024-01-30-llava-next", modalities=("image", "text"),
        ),
        Entry(
            name="paligemma", module="polymodal.systems.paligemma", cls="PaliGemma", model_types=("paligemma",),
            paper="PaliGemma: A versatile 3B VLM for transfer; PaliGemma 2", year=2024,
            url="https://arxiv.org/abs/2407.07726", modalities=("image", "text"),
        ),
        Entry(
            name="prismatic", module="polymodal.systems.prismatic", cls="Prismatic", model_types=("prismatic",),
            paper="Prismatic VLMs: Investigating the Design Space of Visually-Conditioned Language Models", year=2024,
            url="https://arxiv.org/abs/2402.07865", modalities=("image", "text"),
        ),
        Entry(
            name="blip2", module="polymodal.systems.blip2", cls="BLIP2", model_types=("blip-2",),
            paper="BLIP-2: Language-Image Pre-training with Frozen Image Encoders and Large Language Models", year=2023,
            url="https://arxiv.org/abs/2301.12597", modalities=("image", "text"),
        ),
        Entry(
            name="blip2_qformer", module="polymodal.systems.blip2_qformer", cls="BLIP2QFormer",
            model_types=("blip-2",), architectures=("Blip2ForImageTextRetrieval", "Blip2Qformer"),
            paper="BLIP-2, stage 1: Vision-Language Representation Learning from a Frozen Image Encoder", year=2023,
            url="https://arxiv.org/abs/2301.12597", modalities=("image", "text"),
        ),
        Entry(
            name="flamingo", module="polymodal.systems.flamingo", cls="Flamingo", model_types=("open_flamingo",),
            paper="Flamingo: a Visual Language Model for Few-Shot Learning", year=2022,
            url="https://arxiv.org/abs/2204.14198", modalities=("image", "text"),
        ),
        Entry(
            name="idefics", module="polymodal.systems.idefics", cls="Idefics", model_types=("idefics",),
            paper="OBELICS: An Open Web-Scale Filtered Dataset of Interleaved Image-Text Documents", year=2023,
            url="https://arxiv.org/abs/2306.16527", modalities=("image", "text"),
        ),
        Entry(
            name="qwen2_vl", module="polymodal.systems.qwen2_vl", cls="Qwen2VL", model_types=("qwen2_vl",),
            paper="Qwen2-VL: Enhancing Vision-Language Model's Perception of the World at Any Resolution", year=2024,
            url="https://arxiv.org/abs/2409.12191", modalities=("image", "video", "text"),
        ),
        Entry(
            name="qwen2_5_vl", module="polymodal.systems.qwen2_5_vl", cls="Qwen2_5VL", model_types=("qwen2_5_vl",),
            paper="Qwen2.5-VL Technical Report", year=2025, url="https://arxiv.org/abs/2502.13923",
            modalities=("image", "video", "text"),
        ),
        Entry(
            name="pi0", module="polymodal.systems.pi0", cls="PI0", model_types=("pi0",),
            paper="pi0: A Vision-Language-Action Flow Model for General Robot Control", year=2024,
            url="https://arxiv.org/abs/2410.24164", modalities=("image", "text", "state", "action"),
        ),
        Entry(
            name="pi0_fast", module="polymodal.systems.pi0_fast", cls="PI0Fast", model_types=("polymodal_pi0_fast",),
            paper="FAST: Efficient Action Tokenization for Vision-Language-Action Models", year=2025,
            url="https://arxiv.org/abs/2501.09747", modalities=("image", "text", "state", "action"),
        ),
        Entry(
            name="pi05", module="polymodal.systems.pi05", cls="PI05", model_types=("pi05",),
            paper="pi0.5: a Vision-Language-Action Model with Open-World Generalization", year=2025,
            url="https://arxiv.org/abs/2504.16054", modalities=("image", "text", "state", "action"),
        ),
        Entry(
            name="composed", module="polymodal.systems.composed", cls="Composed", model_types=("polymodal_composed",),
            paper="A tower, a connector and a language model of your choice, after Visual Instruction Tuning",
            year=2023, url="https://arxiv.org/abs/2304.08485", modalities=("image", "text"),
        ),
        Entry(
            name="composed_crossed", module="polymodal.systems.composed_crossed", cls="ComposedCrossed",
            model_types=("polymodal_crossed",),
            paper="A tower and a language model of your choice, with gated cross-attention after Flamingo",
            year=2022, url="https://arxiv.org/abs/2204.14198", modalities=("image", "text"),
        ),
        Entry(
            name="act", module="polymodal.systems.act", cls="ACT", model_types=("act",),
            paper="Learning Fine-Grained Bimanual Manipulation with Low-Cost Hardware", year=2023,
            url="https://arxiv.org/abs/2304.13705", modalities=("image", "state", "action"),
        ),
        Entry(
            name="diffusion_policy", module="polymodal.systems.diffusion_policy", cls="DiffusionPolicy",
            model_types=("diffusion",), paper="Diffusion Policy: Visuomotor Policy Learning via Action Diffusion",
            year=2023, url="https://arxiv.org/abs/2303.04137", modalities=("image", "state", "action"),
        ),
        Entry(
            name="behaviour_cloning", module="polymodal.systems.behaviour", cls="BehaviourCloning",
            model_types=("polymodal_behaviour_cloning",),
            paper="Behaviour cloning: one trunk, and the heads of ACT, RT-1, FAST, pi0 and Diffusion Policy", year=2023,
            url="https://arxiv.org/abs/2304.13705", modalities=("image", "text", "state", "action"),
        ),
        Entry(
            name="screen", module="polymodal.systems.screen", cls="ScreenPolicy", model_types=("polymodal_screen",),
            paper="World of Bits: An Open-Domain Platform for Web-Based Agents", year=2017,
            url="https://proceedings.mlr.press/v70/shi17a.html", modalities=("image", "text", "state", "action"),
        ),
        Entry(
            name="rt1", module="polymodal.systems.rt1", cls="RT1", model_types=("polymodal_rt1",),
            paper="RT-1: Robotics Transformer for Real-World Control at Scale", year=2022,
            url="https://arxiv.org/abs/2212.06817", modalities=("image", "text", "action"),
        ),
        Entry(
            name="rt2", module="polymodal.systems.rt2", cls="RT2", model_types=("polymodal_rt2",), year=2023,
            url="https://arxiv.org/abs/2307.15818",
            paper="RT-2: Vision-Language-Action Models Transfer Web Knowledge to Robotic Control",
            modalities=("image", "text", "action"),
        ),
        Entry(
            name="openvla", module="polymodal.systems.openvla", cls="OpenVLA", model_types=("openvla",),
            paper="OpenVLA: An Open-Source Vision-Language-Action Model", year=2024,
            url="https://arxiv.org/abs/2406.09246", modalities=("image", "text", "action"),
        ),
        Entry(
            name="openvla_oft", module="polymodal.systems.openvla_oft", cls="OpenVLAOFT", model_types=("openvla_oft",),
            paper="Fine-Tuning Vision-Language-Action Models: Optimizing Speed and Success", year=2025,
            url="https://arxiv.org/abs/2502.19645", modalities=("image", "text", "state", "action"),
        ),
        Entry(
            name="octo", module="polymodal.systems.octo", cls="Octo", model_types=("polymodal_octo",),
            paper="Octo: An Open-Source Generalist Robot Policy", year=2024, url="https://arxiv.org/abs/2405.12213",
            modalities=("image", "text", "action"),
        ),
        Entry(
            name="encodec", module="polymodal.systems.encodec", cls="EnCodec", model_types=("encodec",),
            paper="High Fidelity Neural Audio Compression", year=2022, url="https://arxiv.org/abs/2210.13438",
            modalities=("audio",),
        ),
        Entry(
            name="dac", module="polymodal.systems.dac", cls="DAC", model_types=("dac",),
            paper="High-Fidelity Audio Compression with Improved RVQGAN", year=2023,
            url="https://arxiv.org/abs/2306.06546", modalities=("audio",),
        ),
        Entry(
            name="whisper", module="polymodal.systems.whisper", cls="Whisper", model_types=("whisper",),
            paper="Robust Speech Recognition via Large-Scale Weak Supervision", year=2022,
            url="https://arxiv.org/abs/2212.04356", modalities=("audio", "text"),
        ),
        Entry(
            name="musicgen", module="polymodal.systems.musicgen", cls="MusicGen", model_types=("musicgen",),
            paper="Simple and Controllable Music Generation", year=2023, url="https://arxiv.org/abs/2306.05284",
            modalities=("text", "audio"),
        ),
        Entry(
            name="wav2vec2", module="polymodal.systems.wav2vec2", cls="Wav2Vec2", model_types=("wav2vec2",),
            paper="wav2vec 2.0: A Framework for Self-Supervised Learning of Speech Representations", year=2020,
            url="https://arxiv.org/abs/2006.11477", modalities=("audio", "text"),
        ),
        Entry(
            name="qwen2_audio", module="polymodal.systems.qwen2_audio", cls="Qwen2Audio", model_types=("qwen2_audio",),
            paper="Qwen2-Audio Technical Report", year=2024, url="https://arxiv.org/abs/2407.10759",
            modalities=("audio", "text"),
        ),
        Entry(
            name="clap", module="polymodal.systems.clap", cls="CLAP", model_types=("clap",),
            paper="Large-scale Contrastive Language-Audio Pretraining with Feature Fusion", year=2022,
            url="https://arxiv.org/abs/2211.06687", modalities=("audio", "text"),
        ),
        Entry(
            name="valle", module="polymodal.systems.valle", cls="VALLE", model_types=("polymodal_valle",), year=2023,
            paper="Neural Codec Language Models are Zero-Shot Text to Speech Synthesizers",
            url="https://arxiv.org/abs/2301.02111", modalities=("text", "audio"),
        ),
        Entry(
            name="vqgan", module="polymodal.systems.vqgan", cls="VQGAN", model_types=("chameleon_vqgan",),
            paper="Taming Transformers for High-Resolution Image Synthesis", year=2020,
            url="https://arxiv.org/abs/2012.09841", modalities=("image",),
        ),
        Entry(
            name="stable_diffusion", module="polymodal.systems.stable_diffusion", cls="StableDiffusion",
            model_types=("StableDiffusionPipeline", "StableDiffusionImg2ImgPipeline"), year=2021,
            paper="High-Resolution Image Synthesis with Latent Diffusion Models",
            url="https://arxiv.org/abs/2112.10752", modalities=("text", "image"),
        ),
        Entry(
            name="controlnet", module="polymodal.systems.controlnet", cls="ControlNet",
            model_types=("StableDiffusionControlNetPipeline",), year=2023, url="https://arxiv.org/abs/2302.05543",
            paper="Adding Conditional Control to Text-to-Image Diffusion Models", modalities=("text", "image"),
        ),
        Entry(
            name="sdxl", module="polymodal.systems.sdxl", cls="SDXL", year=2023,
            model_types=("StableDiffusionXLPipeline", "StableDiffusionXLImg2ImgPipeline"),
            paper="SDXL: Improving Latent Diffusion Models for High-Resolution Image Synthesis",
            url="https://arxiv.org/abs/2307.01952", modalities=("text", "image"),
        ),
        Entry(
            name="chameleon", module="polymodal.systems.chameleon", cls="Chameleon", model_types=("chameleon",),
            paper="Chameleon: Mixed-Modal Early-Fusion Foundation Models", year=2024,
            url="https://arxiv.org/abs/2405.09818", modalities=("image", "text"),
        ),
        Entry(
            name="dit", module="polymodal.systems.dit", cls="DiT", model_types=("DiTPipeline",), year=2022,
            paper="Scalable Diffusion Models with Transformers", url="https://arxiv.org/abs/2212.09748",
            modalities=("image",),
        ),
        Entry(
            name="sd3", module="polymodal.systems.sd3", cls="SD3", model_types=("StableDiffusion3Pipeline",), year=2024,
            paper="Scaling Rectified Flow Transformers for High-Resolution Image Synthesis",
            url="https://arxiv.org/abs/2403.03206", modalities=("text", "image"),
        ),
        Entry(
            name="flux", module="polymodal.systems.flux", cls="Flux", model_types=("FluxPipeline",), year=2024,
            paper="FLUX.1 (Announcing Black Forest Labs)",
            url="https://blackforestlabs.ai/announcing-black-forest-labs/", modalities=("text", "image"),
        ),
        Entry(
            name="parti", module="polymodal.systems.parti", cls="Parti", model_types=("polymodal_parti",), year=2022,
            paper="Scaling Autoregressive Models for Content-Rich Text-to-Image Generation",
            url="https://arxiv.org/abs/2206.10789", modalities=("text", "image"),
        ),
        Entry(
            name="omni", module="polymodal.systems.omni", cls="Omni", model_types=("polymodal_omni",), year=2024,
            paper="GPT-4o System Card (in the style of GPT-4o)", url="https://arxiv.org/abs/2410.21276",
            modalities=("text", "image", "audio"),
        ),
        Entry(
            name="cosmos_tokenizer", module="polymodal.systems.cosmos_tokenizer", cls="CosmosTokenizer",
            model_types=("AutoencoderKLCosmos",), year=2025, url="https://arxiv.org/abs/2501.03575",
            paper="Cosmos World Foundation Model Platform for Physical AI", modalities=("image", "video"),
        ),
        Entry(
            name="stable_video", module="polymodal.systems.stable_video", cls="StableVideo", year=2023,
            model_types=("StableVideoDiffusionPipeline",), url="https://arxiv.org/abs/2311.15127",
            paper="Stable Video Diffusion: Scaling Latent Video Diffusion Models to Large Datasets",
            modalities=("image", "video"),
        ),
        Entry(
            name="sora", module="polymodal.systems.sora", cls="Sora", model_types=("sora",), year=2024,
            paper="Video generation models as world simulators (in the style of Sora)",
            url="https://openai.com/research/video-generation-models-as-world-simulators", modalities=("text", "video"),
        ),
        Entry(
            name="diamond", module="polymodal.systems.diamond", cls="Diamond", model_types=("polymodal_diamond",),
            paper="Diffusion for World Modeling: Visual Details Matter in Atari", year=2024,
            url="https://arxiv.org/abs/2405.12399", modalities=("video", "action"),
        ),
        Entry(
            name="iris", module="polymodal.systems.iris", cls="Iris", model_types=("polymodal_iris",),
            paper="Transformers are Sample-Efficient World Models", year=2022,
            url="https://arxiv.org/abs/2209.00588", modalities=("video", "action"),
        ),
    ),
)  # fmt: skip
