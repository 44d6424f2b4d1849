"""The parts of a self-test: commands of minwm with a time limit, and the targets that their numbers should reach."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from minwm.bench.target import Target


@dataclass(frozen=True)
class Part:
    name: str
    words: tuple[str, ...]
    """Of the command `python -m ...`. Where `writes`, it is followed by --json FILE."""
    seconds: float
    gib: float = 0.0
    """GPU memory that it needs."""
    targets: Mapping[str, Target] = field(default_factory=dict)
    """By the field of its JSON: names joined by dots (docs/performance.md)."""
    writes: bool = True
    planned_by: str = ""
    """The part whose `minwm plan` says what memory this one should need."""
    beside: str = ""
    """Of the reference's own inference: the part whose numbers stand beside it."""


FAST = ("--compile", "--kernels", "--graphs", "--attention", "fastest", "--decode", "compile", "--overlap")
REFERENCE = "REFERENCE"
"""Stands for the folder in the words of a part, which are committed with its numbers."""
LATENTS_12 = ("--window", "2")
"""Of chunks of 4 latents, besides a sink."""
FP8 = ("--fp8", "all", "--fp8-limit", "10")
"""Random weights say nothing of its error, and must not refuse it."""
DEVICE_TESTS = ("tests/test_kernels.py", "tests/test_engine.py", "tests/test_fp8.py", "tests/test_decode.py")


def _bench(preset: str, *options: str, repeats: int = 3) -> tuple[str, ...]:
    return ("minwm", "bench", "--preset", preset, "--random-weights", "--repeats", f"{repeats}", *options)


def _reference(preset: str) -> tuple[str, ...]:
    return ("minwm", "bench", "--preset", preset, "--reference", REFERENCE)


GPU = (
    Part(
        "wan-fast",
        _bench("wan2.1-1.3b", *FAST),
        120,
        20,
        {
            "first_chunk.median_ms": Target("T1: Wan M1, ms", 270),
            "chunk.median_ms": Target("T2: Wan M2, ms", 850),
            "fps": Target("T4: Wan M3, frames per second", 18, at_least=True),
            "first_pixel.median_ms": Target("T6: Wan M4, ms", 450),
            "recompiles": Target("T12: recompiles", 0),
            "allocated_gb": Target("T11: Wan memory, GB", 18),
        },
    ),
    Part("device-tests", ("pytest", "-q", "-x", "-p", "no:cacheprovider", *DEVICE_TESTS), 90, writes=False),
    Part(
        "self-forcing",
        _bench("self-forcing", *FAST),
        60,
        20,
        {"chunk.median_ms": Target("T7: Self-Forcing's setting, M2, ms", 300)},
    ),
    Part(
        "wan-window",
        _bench("wan2.1-1.3b", *FAST, *LATENTS_12),
        90,
        16,
        {
            "chunk.median_ms": Target("T3: Wan M2, 12 latents visible, ms", 590),
            "allocated_gb": Target("T11: Wan memory, 12 latents visible, GB", 13),
        },
    ),
    Part(
        "wan-tiny",
        _bench("wan2.1-1.3b", *FAST, "--decoder", "taew2_1"),
        90,
        20,
        {
            "fps": Target("T4: Wan M3, tiny decoder, frames per second", 24, at_least=True),
            "first_pixel.median_ms": Target("T6: Wan M4, tiny decoder, ms", 320),
        },
    ),
    Part(
        "hunyuan-fast",
        _bench("hunyuan1.5-8b", *FAST),
        120,
        60,
        {
            "first_chunk.median_ms": Target("T8: HunyuanVideo M1, ms", 640),
            "chunk.median_ms": Target("T9: HunyuanVideo M2, ms", 2050),
        },
        planned_by="hunyuan-plan",
    ),
    Part("wan-plain", _bench("wan2.1-1.3b", "--chunks", "5"), 60, 20, planned_by="wan-plan"),
    Part(
        "wan-training",
        ("minwm", "bench-train", "wan2.1-1.3b", "--steps", "1", "--warmup", "1", "--peak", "989"),
        120,
        80,
        planned_by="wan-plan",
    ),
    Part("wan-plan", ("minwm", "plan", "--preset", "wan2.1-1.3b"), 90),
    Part(
        "wan-fastest",
        _bench("wan2.1-1.3b", *FAST, *LATENTS_12, *FP8, "--decoder", "taew2_1"),
        90,
        16,
        {"fps": Target("T5: Wan M3, 12 latents visible, FP8, tiny decoder, frames per second", 36, at_least=True)},
    ),
    Part(
        "hunyuan-window",
        _bench("hunyuan1.5-8b", *FAST, *LATENTS_12),
        120,
        40,
        {
            "chunk.median_ms": Target("T9: HunyuanVideo M2, 12 latents visible, ms", 1400),
            "allocated_gb": Target("T11: HunyuanVideo memory, 12 latents visible, GB", 30),
        },
    ),
    Part(
        "hunyuan-fastest",
        _bench("hunyuan1.5-8b", *FAST, *LATENTS_12, *FP8, "--decoder", "taehv1_5"),
        120,
        40,
        {"fps": Target("T10: HunyuanVideo M3, 12 latents visible, FP8, tiny decoder, fps", 16, at_least=True)},
    ),
    Part("hunyuan-plan", ("minwm", "plan", "--preset", "hunyuan1.5-8b"), 90),
)
"""On a CUDA GPU; the first minutes give the most."""
GPU_REFERENCE = (
    Part("wan-reference", _reference("wan2.1-1.3b"), 240, 40, beside="wan-fast"),
    Part("hunyuan-reference", _reference("hunyuan1.5-8b"), 300, 72, beside="hunyuan-fast"),
)
"""After these, where there is a checkout of minWM."""
SMALL = (
    Part(
        "small",
        _bench("smoke", "--chunks", "2", *LATENTS_12, "--decoder", "taew2_1", repeats=1),
        150,
        targets={"fps": Target("frames per second", 1, at_least=True), "recompiles": Target("recompiles", 0)},
        planned_by="small-plan",
    ),
    Part("small-training", ("minwm", "bench-train", "smoke/ar", "--steps", "1", "--warmup", "1"), 150),
    Part("small-plan", ("minwm", "plan", "--preset", "smoke/dmd"), 150),
)
"""On a CPU: every kind of part, with a small model."""
SMALL_REFERENCE = (Part("small-reference", _reference("wan2.1-1.3b"), 150, beside="small"),)
