"""The methods and presets that exist, and for each method where it comes from."""

from __future__ import annotations

from dataclasses import dataclass

from .apet import ApET
from .autoprune import AutoPrune
from .base import Method
from .border import Border
from .cdpruner import CDPruner
from .dart import DART
from .divprune import DivPrune
from .fastervlm import FasterVLM
from .fastv import FastV
from .fitprune import FitPrune
from .flowcut import FlowCut
from .gprune import GPrune
from .grid import Grid
from .hand import Hand
from .hiprune import HiPrune
from .hired import HiRED
from .holov import HoloV
from .ivcprune import IVCPrune
from .mmtok import MMTok
from .mustdrop import MustDrop
from .nuwa import Nuwa
from .pool import Pool
from .prumerge import PruMerge
from .prumerge_plus import PruMergePlus
from .prunesid import PruneSID
from .pyramiddrop import PyramidDrop
from .random import Random
from .scope import SCOPE
from .simignore import Simignore
from .sparsevlm import SparseVLM
from .text_only import TextOnly
from .tome import ToMe
from .trim import TRIM
from .uniform import Uniform
from .v2drop import V2Drop
from .visionzip import VisionZip
from .vispruner import VisPruner
from .vlmpruner import VLMPruner
from .vscan import VScan
from .vtw import VTW

METHODS: dict[str, type[Method]] = {
    method.name: method
    for method in (
        FastV,
        Simignore,
        SparseVLM,
        PyramidDrop,
        VTW,
        DART,
        FitPrune,
        VisionZip,
        PruMerge,
        PruMergePlus,
        FasterVLM,
        HiRED,
        VisPruner,
        DivPrune,
        TRIM,
        CDPruner,
        HoloV,
        HiPrune,
        VScan,
        ToMe,
        SCOPE,
        GPrune,
        PruneSID,
        MMTok,
        V2Drop,
        Nuwa,
        ApET,
        FlowCut,
        MustDrop,
        VLMPruner,
        AutoPrune,
        IVCPrune,
        Random,
        Uniform,
        Grid,
        Pool,
        Border,
        TextOnly,
        Hand,
    )
}


@dataclass(frozen=True)
class Origin:
    """Where a method comes from."""

    paper: str
    acts: str  # where in the model
    checked: str  # against what
    source: str = ""  # the released code that it follows


CATALOGUE: dict[str, Origin] = {
    "fastv": Origin(
        "FastV, ECCV 2024, arXiv 2403.06764",
        "input of decoder layer K",
        "outputs of the released code in six modes (tests/goldens/fastv)",
        "pkunlp-icler/FastV, modeling_llama.py",
    ),
    "simignore": Origin(
        "Simignore, AAAI 2025, arXiv 2412.09817",
        "after the projector, before layer 0",
        "outputs of the released code, 7B and 13B (tests/goldens/simignore)",
        "FanshuoZeng/Simignore, llava_arch.py",
    ),
    "sparsevlm": Origin(
        "SparseVLM, ICML 2025, arXiv 2410.04417",
        "input of several decoder layers",
        "outputs of the released code, two runs of version 1 and six of version 2",
        "Gumpest/SparseVLMs 26a5f48, modelling_sparse_llama.py, score.py",
    ),
    "pyramiddrop": Origin(
        "PyramidDrop, CVPR 2025, arXiv 2410.17247",
        "input of several decoder layers",
        "outputs of the released code, four runs (tests/goldens/pyramiddrop)",
        "Cooperx521/PyramidDrop 6444f30, modeling_llama_pdrop.py",
    ),
    "vtw": Origin(
        "VTW, AAAI 2025, arXiv 2405.05803",
        "input of decoder layer K",
        "the released function, transcribed, on 210 random draws; a reference in the tests",
        "lzhxmu/VTW 34a4199, VTW.py",
    ),
    "dart": Origin(
        "DART, EMNLP 2025, arXiv 2502.11494",
        "input of decoder layer K",
        "the released function, transcribed, on 210 random draws; a reference in the tests",
        "xqy1111111/DART 0247657, modeling_llama_self.py",
    ),
    "fitprune": Origin(
        "FitPrune, AAAI 2025, arXiv 2409.10197",
        "after the attention of most decoder layers",
        "the released function, transcribed, on 210 random draws; a reference in the tests",
        "ywh187/FitPrune d28e418, LLaVA_1.5 modeling_llama.py",
    ),
    "visionzip": Origin(
        "VisionZip, CVPR 2025, arXiv 2412.04467",
        "after the vision tower, before the projector",
        "outputs of the released code (tests/goldens/visionzip)",
        "JIA-Lab-research/VisionZip 3151f6d, visionzip/clip_encoder.py",
    ),
    "prumerge": Origin(
        "PruMerge, ICCV 2025, arXiv 2403.15388",
        "after the vision tower, before the projector",
        "the released function, transcribed, on random draws; a reference in the tests",
        "42Shawn/LLaVA-PruMerge 097c041, clip_encoder.py",
    ),
    "prumerge-plus": Origin(
        "PruMerge+, ICCV 2025, arXiv 2403.15388",
        "after the vision tower, before the projector",
        "the released function, transcribed, on random draws; a reference in the tests",
        "42Shawn/LLaVA-PruMerge 097c041, clip_encoder.py",
    ),
    "fastervlm": Origin(
        "FasterVLM, arXiv 2412.01818 v1; VTC-CLS (blocks=), arXiv 2412.05819",
        "after the vision tower, before the projector",
        "the released function, transcribed, on random draws; a reference in the tests",
        "Theia-4869/FasterVLM f5d5f12, llava_arch.py",
    ),
    "hired": Origin(
        "HiRED, AAAI 2025, arXiv 2408.10945",
        "after the vision tower, before the projector",
        "the released function, transcribed, on random draws; a reference in the tests",
        "hasanar1f/HiRED 502d6dd, modeling_llava.py",
    ),
    "vispruner": Origin(
        "VisPruner, ICCV 2025, arXiv 2412.01818 v2",
        "after the vision tower, before the projector",
        "the released function, transcribed, on random draws; a reference in the tests",
        "Theia-4869/VisPruner aefa01a, llava_arch.py",
    ),
    "divprune": Origin(
        "DivPrune, CVPR 2025, arXiv 2503.02175",
        "after the projector, before layer 0",
        "outputs of the released code (tests/goldens/divprune)",
        "vbdi/divprune 799e2d9, llava_arch.py",
    ),
    "trim": Origin(
        "TRIM, COLING 2025, arXiv 2409.10994",
        "before the projector",
        "the released function, transcribed, on random draws; a reference in the tests",
        "FreedomIntelligence/TRIM f5a232d, clip_encoder.py",
    ),
    "cdpruner": Origin(
        "CDPruner, NeurIPS 2025, arXiv 2506.10967",
        "after the projector, before layer 0",
        "the released function, transcribed, on random draws; a reference in the tests",
        "Theia-4869/CDPruner 9541616, llava_arch.py, clip_encoder.py",
    ),
    "holov": Origin(
        "HoloV, NeurIPS 2025, arXiv 2510.02912",
        "after the projector, before layer 0",
        "the released function, transcribed, on random draws; a reference in the tests",
        "obananas/HoloV 1d2e65e, llava/model/utils.py",
    ),
    "hiprune": Origin(
        "HiPrune, ACL 2026 Findings, arXiv 2508.00553",
        "after the vision tower, before the projector",
        "the released function, transcribed, on random draws; a reference in the tests",
        "Danielement321/HiPrune, llava_arch.py (read in a fork, 78324f3)",
    ),
    "vscan": Origin(
        "VScan, TMLR 2026, arXiv 2505.22654",
        "after the projector, and input of decoder layer 16",
        "an independent reference, token by token",
        "Tencent/SelfEvolvingAgent, VScan/llava/model/llava_arch.py",
    ),
    "tome": Origin(
        "ToMe, ICLR 2023, arXiv 2210.09461",
        "in every block of the vision tower",
        "the released function, transcribed, on random draws; a reference in the tests",
        "facebookresearch/ToMe, tome/merge.py and tome/patch/clip.py",
    ),
    "scope": Origin(
        "SCOPE, NeurIPS 2025, arXiv 2510.24214",
        "after the vision tower, before the projector",
        "outputs of the released code, eight runs (tests/goldens/methods2026)",
        "kinredon/SCOPE 6bf7306, scope/clip_encoder.py",
    ),
    "gprune": Origin(
        "G-Prune, AAAI 2025, arXiv 2501.02268",
        "after the projector, before layer 0",
        "outputs of the released code, six runs (tests/goldens/methods2026)",
        "jytmelon/G-Prune 762c637, LLaVA-NeXT/llava/model/llava_arch.py",
    ),
    "prunesid": Origin(
        "PruneSID, ICLR 2026, arXiv 2603.09480",
        "after the vision tower, before the projector",
        "outputs of the released code, six runs (tests/goldens/methods2026)",
        "ZhengyaoFang/PruneSID 4ef17d9, prunesid/prunesid_llava/clip_encoder.py",
    ),
    "mmtok": Origin(
        "MMTok, ICLR 2026, arXiv 2508.18264",
        "after the projector, before layer 0",
        "outputs of the released code, eight runs (tests/goldens/methods2026)",
        "Ironieser/MMTok d1522cd, mmtok/core/semantic_selector.py, text_processor.py",
    ),
    "v2drop": Origin(
        "V2Drop, CVPR 2026, arXiv 2509.01552",
        "input of several decoder layers",
        "outputs of the released code, six runs (tests/goldens/methods2026)",
        "xuyang-liu16/V2Drop 219e03e, llava/model/language_model/V2Drop.py",
    ),
    "nuwa": Origin(
        "Nuwa, ICLR 2026",
        "after the vision tower, and input of decoder layer 16",
        "outputs of the released code, six runs (tests/goldens/methods2026)",
        "Man-PaperRejected/Nuwa 175b7d5, nuwa/clip_encoder.py, modeling_llama.py",
    ),
    "apet": Origin(
        "ApET, CVPR 2026, arXiv 2602.19870",
        "after the vision tower, and input of decoder layer 16",
        "outputs of the released code, five runs (tests/goldens/methods2026)",
        "MaQianKun0/ApET 70cc01b, llava/model/llava_arch.py, modeling_llama_x.py",
    ),
    "flowcut": Origin(
        "FlowCut, NeurIPS 2025, arXiv 2505.19536",
        "in every second block of the vision tower",
        "outputs of the released code, seven files (tests/goldens/methods2026)",
        "TungChintao/FlowCut a2ecd24, flowcut/modeling_clip_flowcut.py, utils_flowcut.py",
    ),
    "mustdrop": Origin(
        "MustDrop, arXiv 2411.10803",
        "in the vision tower, and input of several decoder layers",
        "outputs of the released code, five runs (tests/goldens/methods2026)",
        "liuting20/MustDrop 909afa5, clip_encoder.py, modelling_sparse_llama.py",
    ),
    "vlmpruner": Origin(
        "VLM-Pruner, arXiv 2512.02700",
        "input of decoder layer K",
        "outputs of the released function, four runs (tests/goldens/functions); a reference",
        "Casey-bit/VLMPruner 556a914, llava/model/language_model/modeling_llama_self.py",
    ),
    "autoprune": Origin(
        "AutoPrune, NeurIPS 2025, arXiv 2509.23931",
        "input of every decoder layer but the first",
        "outputs of the released functions, 40 draws (tests/goldens/functions); a reference",
        "AutoLab-SAI-SJTU/AutoPrune e4a9918, modelling_sparse_llama.py, score.py, llava_arch.py",
    ),
    "ivcprune": Origin(
        "IVC-Prune, ICLR 2026, arXiv 2602.03060",
        "input of decoder layer K",
        "outputs of the released function, four runs (tests/goldens/functions); a reference",
        "FireRedTeam/IVC-Prune 03afd9c, transformers/models/llama/modeling_llama.py",
    ),
    "random": Origin("baseline", "after the projector, before layer 0", "properties", ""),
    "uniform": Origin("baseline", "after the projector, before layer 0", "properties", ""),
    "grid": Origin(
        "baseline", "after the projector, before layer 0", "an independent reference", ""
    ),
    "pool": Origin(
        "baseline", "after the projector, before layer 0", "an independent reference", ""
    ),
    "border": Origin(
        "baseline", "after the projector, before layer 0", "an independent reference", ""
    ),
    "text-only": Origin("baseline", "after the projector, before layer 0", "properties", ""),
    "hand": Origin(
        "a person's choice", "after the projector, or input of decoder layer K", "properties", ""
    ),
}


@dataclass(frozen=True)
class Preset:
    """A plan by name. tokens, focus: what the processor is asked for (tokens: if released=1)."""

    plan: str
    source: str
    focus: str | None = None
    tokens: str | None = None


PRESETS: dict[str, Preset] = {
    "simignore-7b": Preset(
        "simignore:keep=452,step=1,i_index=1,mode=mask,until=5+fastv:layer=5,keep=144",
        "released ScienceQA script for LLaVA-1.5-7B, inference_sqa_llava_7b.py",
        focus="options",
        tokens="simignore",
    ),
    "simignore-13b": Preset(
        "simignore:keep=451,step=2,i_index=0,mode=mask,until=4+fastv:layer=4,keep=144",
        "released ScienceQA script for LLaVA-1.5-13B, inference_sqa_llava_13b.py",
        focus="options-lettered",
        tokens="simignore",
    ),
    **{
        f"sparsevlm-{budget}": Preset(
            f"sparsevlm:layers=3/7/16,keep={keep}", f"list of {budget} in the released score.py"
        )
        for budget, keep in {
            192: "300/200/110",
            128: "303/110/36",
            96: "238/48/26",
            64: "66/30/17",
        }.items()
    },
    **{
        f"sparsevlm-plus-{budget}": Preset(
            f"sparsevlm:version=2,layers=3/7/16,keep={keep}",
            f"list of {budget} for version 2 in the released score.py",
        )
        for budget, keep in {
            192: "300/200/118",
            128: "238/108/60",
            96: "246/54/28",
            64: "66/34/20",
        }.items()
    },
    "visionzip-64": Preset(
        "visionzip:dominant=54,contextual=10", "README of the released code, for 64 tokens"
    ),
    "visionzip-128": Preset(
        "visionzip:dominant=108,contextual=20",
        "128 tokens, split as the README's 54 + 10; the split itself is not in the released code",
    ),
    "visionzip-192": Preset(
        "visionzip:dominant=162,contextual=30",
        "192 tokens, split as the README's 54 + 10; the split itself is not in the released code",
    ),
    "divprune-56": Preset("divprune:keep=0.098", "the paper's ratio: 56 of 576 tokens"),
    **{
        f"nuwa-{budget}": Preset(
            f"nuwa:keep={112 * cell},cell={cell},final={16 * cell}",
            f"released settings for {budget} tokens, which is the mean over 32 layers",
        )
        for budget, cell in {192: 3, 128: 2, 64: 1}.items()
    },
    "apet-64": Preset(
        "apet:keep=96,layer=16,final=32",
        "README of the released code: 64 tokens in the mean over 32 layers",
    ),
    **{
        f"mustdrop-{budget}": Preset(
            f"mustdrop:global={share},individual={individual}",
            f"thresholds of the released scripts that are named {budget} tokens",
        )
        for budget, (share, individual) in {
            192: ("0.001", "0.001"),
            128: ("0.0012", "0.001"),
            64: ("0.011", "0.01"),
        }.items()
    },
    **{
        f"vlmpruner-{budget}": Preset(
            f"vlmpruner:keep={budget},layer=2,threshold=0.8,batch=16,pivots=4",
            f"README and scripts of the released code: reduction ratio {ratio}",
        )
        for budget, ratio in {192: 0.667, 128: 0.778, 64: 0.889}.items()
    },
    "autoprune-64": Preset(
        "autoprune:target=64,depth=32,x0=14.9,k0=0.4,gamma=0.2",
        "README and scripts of the released code; 13B needs depth=40",
    ),
    "ivcprune-7b": Preset(
        "ivcprune:layer=16,foreground=0.2,seeds=0.01,axes=0.05",
        "released evaluation of LLaVA-1.5-7B, vlmeval/config.py; its window with released=1",
    ),
    "vscan-64": Preset(
        "vscan:keep=96,layer=16,final=32", "released scripts: 64 tokens in the mean over 32 layers"
    ),
}
