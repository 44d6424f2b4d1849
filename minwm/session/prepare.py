"""A model made ready for the options of an engine."""

from minwm.cameras.trajectory import parse
from minwm.session.engines import SceneEngine
from minwm.session.generate import sampling_inputs
from minwm.store.model import Model
from minwm.stream.accelerate import EngineConfig, Fp8Fidelity, Fp8Trial, KernelTimes, prepare_network


def prepare_model(model: Model, cfg: EngineConfig) -> tuple[EngineConfig, KernelTimes | None, Fp8Fidelity | None]:
    """`prepare_network` of the model's network, with a trial where FP8 has to be judged."""
    return prepare_network(cfg, model.net, model.config.geometry, fp8_trial(model) if cfg.fp8 != "none" else None)


def fp8_trial(model: Model, seed: int = 0) -> Fp8Trial:
    """Three chunks beyond the sinks, ahead and turning; from a procedural world if the model starts from an image."""
    cfg, image, prompt = model.config, None, "a room"
    latents = cfg.geometry.start(cfg.geometry.sink + 3)
    if cfg.image_start:
        turn = parse(f"l*{latents - 1}", stride=cfg.motion.stride).track(cfg.motion, cfg.intrinsics)
        world = SceneEngine.spawn(seed, turn, cfg)  # the way ahead may be blocked: only differences are judged
        image, prompt = world.start()[:1], world.scene.caption
    noise, cond = sampling_inputs(model, image, [prompt], [f"w+l*{latents - 1}"], seed)
    return Fp8Trial(cond, noise, cfg.sampler, model.codec.decode)
