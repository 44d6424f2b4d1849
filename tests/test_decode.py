"""Decoding while one plays: its layouts, compiled form and order change no frame, and each is chosen by name."""

import subprocess
import sys
import textwrap
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import numpy as np
import pytest
import torch
from playing import SMALL, start_image, tiny_model
from safetensors.torch import save_file
from tiny_codecs import CODECS, HUNYUAN, VAES, randomise
from torch import Tensor, nn

from minwm.cameras.trajectory import Action
from minwm.cli import main
from minwm.cli.base import EngineFlags
from minwm.cli.models import _preset
from minwm.cli.play import _model_scenario, _warm_up
from minwm.core.config import ConfigError, UserError
from minwm.data.encode import identity
from minwm.experiments.presets.demo import model_to_play
from minwm.nets.chunks import StreamConfig
from minwm.nets.codec import TinyDecoder, VideoCodec, channels_last
from minwm.nets.small_codec import SmallCodecConfig
from minwm.nets.taehv import TAEHV, Taehv, TaehvConfig
from minwm.play.scenario import StartState, model_scenario
from minwm.session.engines import ModelEngine
from minwm.session.session import Session
from minwm.store.folder import tiny_decoder
from minwm.store.layouts import AnyCodec
from minwm.store.model import Model
from minwm.stream.accelerate import CudaSideStream, EngineConfig, attention_kernel, decoder, prepare_network
from minwm.stream.rollout import Stream

KEYS = [Action.of([key]) for key in "wjdsl"]


def codec_of(name: str) -> AnyCodec:
    return randomise(CODECS[name].build())


def streamed(decode: Callable[..., Any], channels: int) -> Tensor:
    generator, state, drawn = torch.Generator().manual_seed(1), None, []
    for _ in range(4):
        pixels, state = decode(torch.randn(1, 1, channels, 2, 3, generator=generator), state)
        drawn.append(pixels)
    return torch.cat(drawn, dim=1)


@pytest.mark.parametrize("name", CODECS)
def test_channels_last_changes_no_frame(name: str) -> None:
    codec = codec_of(name)
    plain = streamed(decoder(EngineConfig(), codec), codec.channels)
    laid_out = streamed(decoder(EngineConfig(decode="channels_last"), codec), codec.channels)
    assert plain.std() > 0.05
    torch.testing.assert_close(laid_out, plain, atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", CODECS)
def test_the_identity_of_a_codec_is_that_of_its_encoder(name: str) -> None:
    codec = codec_of(name)
    assert isinstance(codec, nn.Module)
    pixels = torch.rand(1, 5, 3, 2 * codec.scale, 2 * codec.scale)
    latents, before = codec.encode(pixels), identity(codec)
    for key, weight in codec.state_dict().items():
        kept = weight.clone()
        weight.copy_(1.5 * kept + 0.3)
        same = identity(codec) == before
        assert same == (key.partition(".")[0] in codec.decoding)
        assert not same or torch.equal(codec.encode(pixels), latents), key
        weight.copy_(kept)


def test_the_identity_of_a_codec_tells_its_variants_apart() -> None:
    """Of the same weights: what attention sees, and the scale, are part of what latents are."""
    codecs = [cfg.build() for cfg in (*list(VAES.values())[2:], replace(HUNYUAN, scaling=1.0))]
    for codec in codecs:
        codec.load_state_dict(codecs[0].state_dict())
    assert len({identity(codec)["hash"] for codec in codecs}) == len(codecs)
    tiny = TaehvConfig(channels=4, width=8).build()
    tiny.scale = HUNYUAN.scale
    both = [identity(TinyDecoder(codec, tiny))["hash"] for codec in codecs]
    assert len(set(both)) == len(codecs)


def test_a_state_that_grows_is_no_graph_and_it_is_said() -> None:
    compiled = EngineConfig(decode="compile")
    with pytest.raises(ConfigError, match=r"engine\.decode=compile.*HunyuanVae.*codec\.window"):
        decoder(compiled, HUNYUAN.build())
    for cfg in (replace(HUNYUAN, window=2), replace(HUNYUAN, attention="chunk")):
        assert callable(decoder(compiled, cfg.build()))


@pytest.mark.parametrize("name", VAES)
def test_what_a_convolution_makes_reaches_the_next_one_in_its_layout(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Convolutions answer here in the layout of their weights, as cuDNN's do and those of this CPU do not.

    Latents come as they are; no other convolution has to convert what it is given.
    """
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    codec, met = codec_of(name), []
    channels_last(codec)

    def answering(layer: type[nn.Conv2d] | type[nn.Conv3d]) -> Callable[[Any, Tensor], Tensor]:
        plain = layer.forward

        def forward(self: Any, x: Tensor) -> Tensor:
            met.append(x.is_contiguous(memory_format=formats[x.ndim]))
            y = plain(self, x)
            return torch.empty_like(y, memory_format=formats[y.ndim]).copy_(y)

        return forward

    for layer in (nn.Conv2d, nn.Conv3d):
        monkeypatch.setattr(layer, "forward", answering(layer))
    state = None
    for _ in range(3):
        met.clear()
        _, state = codec.decode_next(torch.randn(1, 1, codec.channels, 4, 6), state)
    assert len(met) > 20 and met == [False, *[True] * (len(met) - 1)]


@pytest.mark.slow  # a new process traces: many seconds on a busy machine
def test_a_compiled_stream_is_two_graphs_however_long_and_in_whatever_thread() -> None:
    """In a process of its own: the checks of shapes that tests install cannot be compiled."""
    script = """
    import functools, sys, threading
    from dataclasses import replace
    import numpy as np, torch
    from playing import SMALL, start_image, tiny_model
    from minwm.cameras.trajectory import Action
    from minwm.families.hunyuan.vae import HunyuanVaeConfig
    from minwm.families.wan.vae import WanVaeConfig
    from minwm.nets.taehv import TaehvConfig
    from minwm.session import engines
    from minwm.session.engines import ModelEngine
    from minwm.session.session import Session
    from minwm.stream.accelerate import EngineConfig, decoder

    graphs = []
    def backend(module, inputs):
        graphs.append(module)
        return module.forward

    engines.decoder = functools.partial(decoder, backend=backend)
    small = dict(base=2, decoder_base=2, channels=4, depth=1, mult=(1, 1, 1, 1), mean=(0.0,) * 4, std=(1.0,) * 4)
    causal = dict(channels=4, base=8, mult=(1, 1, 1, 1), depth=1, temporal=(False, True, True))
    # pixels of 8 x 8 to a latent, as the network has them
    codecs = {
        "wan2.1": WanVaeConfig(**small),
        "wan2.2": WanVaeConfig(**{**small, "mult": (1, 1, 1), "temporal": (True, True)}, residual=True, patch=2),
        "hunyuan1.5, window": HunyuanVaeConfig(**causal, window=2),
        "hunyuan1.5, chunk": HunyuanVaeConfig(**causal, attention="chunk"),
        "taehv": TaehvConfig(channels=4, width=4),
        "small": SMALL.codec,
    }
    image, plain_model, scenario = start_image(), tiny_model(), {}
    for name, cfg in codecs.items():
        torch.manual_seed(0)
        codec = cfg.build().eval().requires_grad_(False)
        config = replace(plain_model.config, codec=cfg, stream=replace(plain_model.config.stream, window=2))
        model = replace(plain_model, codec=codec, config=config)
        want = list(Session(ModelEngine(model, image, "a room")).play([Action.of("l")] * 20))
        graphs.clear()
        torch._dynamo.reset()
        engine = ModelEngine(model, image, "a room", engine=EngineConfig(decode="compile"))
        engine.warm_up()
        assert len(graphs) == 2, (name, len(graphs))
        made = []
        walk = threading.Thread(target=lambda: made.extend(Session(engine).play([Action.of("l")] * 20)))
        walk.start()
        walk.join()
        assert len(graphs) == 2, (name, len(graphs))
        assert max(np.abs(a.astype(int) - b).max() for a, b in zip(made, want, strict=True)) <= 1, name
        again = ModelEngine(model, image, "a room", engine=EngineConfig(decode="compile"))
        list(Session(again).play([Action.of("l")]))
        assert len(graphs) == 2, (name, "another engine", len(graphs))
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(script)], check=True, cwd="tests")


# ------------------------------------------------------------------------------------------------ the order


class Late:
    """A second stream whose work is as slow as can be: it is done when it is waited for."""

    def __init__(self, log: list[str]) -> None:
        self.log = log

    def __call__(self, work: Callable[[Tensor], Tensor], x: Tensor) -> Callable[[], Tensor]:
        self.log.append("decoder begun")

        def wait() -> Tensor:
            self.log.append("waited for frames")
            return work(x)

        return wait


class Quick(Late):
    """One that is done at once."""

    def __call__(self, work: Callable[[Tensor], Tensor], x: Tensor) -> Callable[[], Tensor]:
        done = work(x)
        return super().__call__(lambda _: done, x)


def logged(engine: ModelEngine, log: list[str]) -> ModelEngine:
    """Notes the network's chunks and commits, and the decoder."""
    engine.start()
    stream, decode = engine.stream, engine.decode_next
    make, commit = stream.next_chunk, stream.update_cache

    def noting(word: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any) -> Any:
            log.append(word)
            return function(*args)

        return run

    stream.next_chunk, stream.update_cache = noting("diffused", make), noting("committed", commit)  # type: ignore[method-assign]
    engine.decode_next = noting("decoded", decode)
    engine.update_cache()
    log.clear()
    return engine


def test_frames_are_handed_out_before_the_commit_or_beside_it() -> None:
    log: list[str] = []
    engine = logged(ModelEngine(tiny_model(), start_image(), "a room"), log)
    c2w = np.eye(4)[None].repeat(4, 0)
    list(engine.advance(c2w))
    assert log == ["diffused", "decoded"]
    engine.update_cache()
    assert log[2:] == ["committed"] and {"decode", "copy", "cache_update"} <= engine.timer.seconds.keys()
    log.clear()
    engine.submit = Quick(log)
    list(engine.advance(c2w))
    assert log == ["diffused", "decoded", "decoder begun", "committed", "waited for frames"]
    engine.update_cache()
    assert log.count("committed") == 1


def test_the_first_frames_wait_for_no_other_latent() -> None:
    """Beside the commit, all are begun before it, and yet handed out one by one."""
    log: list[str] = []
    engine = logged(
        ModelEngine(
            replace(
                tiny_model(), config=replace(tiny_model().config, stream=StreamConfig(chunk=2, first_chunk=1, window=2))
            ),
            start_image(),
            "a room",
        ),
        log,
    )
    c2w = np.eye(4)[None].repeat(8, 0)
    shown = engine.advance(c2w)
    assert len(next(shown)) == 4 and log == ["diffused", "decoded"]
    assert len(next(shown)) == 4 and log == ["diffused", "decoded", "decoded"]
    assert list(shown) == []
    engine.update_cache()
    log.clear()
    engine.submit = Late(log)
    log.extend("shown" for _ in engine.advance(c2w))
    pair = ["waited for frames", "decoded", "shown"]
    assert log == ["diffused", "decoder begun", "decoder begun", "committed", *pair, *pair]


@pytest.mark.parametrize("beside", [Late, Quick])
@pytest.mark.parametrize("image", [True, False], ids=["image", "text"])
def test_overlapped_frames_are_the_same_and_can_be_undone(beside: type[Late], image: bool) -> None:
    """However late the decoder is: it reads nothing that the commit, the next chunk or a rewind writes."""
    model = tiny_model()
    model = replace(
        model, config=replace(model.config, stream=StreamConfig(chunk=2, first_chunk=1 if image else 2, window=2))
    )
    plain, overlapped = (ModelEngine(model, start_image() if image else None, "a room", 3) for _ in range(2))
    overlapped.submit = beside([])
    walk = Session(overlapped)
    want, made = list(Session(plain).play(KEYS)), list(walk.play(KEYS))
    assert all(np.array_equal(a, b) for a, b in zip(want, made, strict=True))
    walk.rewind(3)
    again = [walk.step(action) for action in KEYS[2:]]
    assert all(np.array_equal(a, b) for a, b in zip(want[3:], again, strict=True))


def test_the_second_stream_waits_for_the_first_and_the_host_for_its_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    """Calls to CUDA, in order; no GPU is needed to see that none is missing."""
    cuda = MagicMock()
    cuda.stream.return_value = cuda.within
    for name in ("Stream", "current_stream", "stream"):
        monkeypatch.setattr(torch.cuda, name, getattr(cuda, name))
    latents, drawn = MagicMock(spec=Tensor), MagicMock(spec=Tensor)
    drawn.to.return_value.clone.return_value = torch.zeros(1)
    cuda.attach_mock(latents.record_stream, "record_stream")
    cuda.attach_mock(drawn.to, "copy")
    cuda.work.return_value = drawn
    begun = CudaSideStream(torch.device("cuda"))(cuda.work, latents)
    names = [name for name, _, _ in cuda.mock_calls]
    side = "Stream()"
    assert [name for name in names if "__" not in name or "within" in name] == [
        "Stream",
        "current_stream",
        f"{side}.wait_stream",
        "record_stream",
        "stream",
        "within.__enter__",
        "work",
        "copy",
        f"{side}.record_event",
        "within.__exit__",
    ]
    drawn.to.assert_called_once_with("cpu", non_blocking=True)
    cuda.stream.assert_called_once_with(cuda.Stream.return_value)
    latents.record_stream.assert_called_once_with(cuda.Stream.return_value)
    event = cuda.Stream.return_value.record_event.return_value
    event.synchronize.assert_not_called()
    assert begun() is drawn.to.return_value.clone.return_value
    event.synchronize.assert_called_once_with()


def test_without_a_gpu_nothing_overlaps_and_it_is_said() -> None:
    with pytest.raises(ConfigError, match=r"engine\.overlap needs a CUDA device, and the model is on cpu"):
        ModelEngine(tiny_model(), start_image(), "a room", engine=EngineConfig(overlap=True))


def test_a_kernel_of_attention_is_chosen_for_the_network_alone() -> None:
    """A codec's attention is wider than fast kernels are; kernels must have been timed."""
    model, flash = tiny_model(), torch.backends.cuda.flash_sdp_enabled
    seen: dict[str, set[bool]] = {"network": set(), "codec": set()}
    model.net.register_forward_pre_hook(lambda *_: seen["network"].add(flash()))
    engine = ModelEngine(model, start_image(), "a room", engine=EngineConfig(attention="math"))
    decode = engine.decode_next
    engine.decode_next = lambda *args: (seen["codec"].add(flash()), decode(*args))[1]
    list(Session(engine).play(KEYS[:2]))
    assert seen == {"network": {False}, "codec": {True}}
    with pytest.raises(ConfigError, match="no kernel was timed"):
        attention_kernel(EngineConfig(attention="fastest"))


# ------------------------------------------------------------------------------------------------ tiny decoders


def test_a_tiny_decoder_decodes_and_the_codec_encodes(tmp_path: Path) -> None:
    model = tiny_model()
    tiny = replace(TaehvConfig(), channels=4).build()
    both = TinyDecoder(model.codec, tiny)
    assert isinstance(both, VideoCodec)
    pixels, latents = torch.rand(1, 5, 3, 32, 32) * 2 - 1, torch.randn(1, 3, 4, 4, 4)
    assert torch.equal(both.encode(pixels), model.codec.encode(pixels))
    assert torch.equal(both.encode_next(pixels)[0], model.codec.encode_next(pixels)[0])
    assert torch.equal(both.decode(latents), tiny.decode(latents))
    assert torch.equal(both.decode_next(latents)[0], tiny.decode_next(latents)[0])
    with pytest.raises(ConfigError, match="their channels is 16, here it is 4"):
        TinyDecoder(model.codec, TaehvConfig().build())
    wide = replace(model, codec=SmallCodecConfig(channels=16, width=8, fine=8, finest=8).build())
    file, weights = tmp_path / "taew2_1.safetensors", TaehvConfig().build().state_dict()
    save_file(weights, file)
    loaded = tiny_decoder(wide, str(file)).codec
    assert isinstance(loaded, TinyDecoder) and isinstance(loaded.tiny, Taehv)
    torch.testing.assert_close(dict(loaded.tiny.state_dict()), dict(weights))


def test_bench_takes_a_tiny_decoder_by_name(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(TAEHV, "taew2_1", TaehvConfig(width=8))
    command = ["bench", "--preset", "smoke", "--random-weights", "--repeats", "1", "--chunks", "1", "--window", "1"]
    assert main([*command, "--decoder", "taew2_1", "--decode", "channels_last"]) == 0
    said = capsys.readouterr().out
    assert "first_pixel.median_ms" in said and "engine.decode: channels_last" in said
    assert main([*command, "--decoder", "taew2_9"]) == 2
    assert "there is no tiny codec 'taew2_9'; did you mean" in capsys.readouterr().err


def test_the_setting_of_self_forcing_has_its_published_numbers() -> None:
    """Chunks of 3 of 1560 tokens, no cameras, 4 passes; the 6th chunk sees 28,080 tokens, as do all after it."""
    cfg = _preset("self-forcing")
    geometry = cfg.geometry
    assert (geometry.tokens, geometry.chunk, cfg.network.camera, cfg.sampler.passes) == (1560, 3, "none", 4)
    assert [geometry.valid_rows(chunk) for chunk in (4, 5, 6, 50)] == [23_400, 28_080, 28_080, 28_080]
    assert geometry.chunks(cfg.latents)[-1] == (18, 21), "a published clip is 21 latents"


# ------------------------------------------------------------------------------------------------ play


def test_play_warms_up_with_the_winner_and_shows_the_same(capsys: pytest.CaptureFixture[str]) -> None:
    """The shipped model: its kernels are timed and named, and its frames are those of the plain form."""
    name = str(model_to_play())
    flags = EngineFlags(attention="fastest", decode="channels_last")
    scenarios = [
        _model_scenario(name, 7, (None, None), None, None, 0, None, chosen, None) for chosen in (flags, EngineFlags())
    ]
    _warm_up(scenarios[0])
    said = capsys.readouterr().out
    assert said.count("is used") == said.count("warm-up: the start in") == 1
    fast, plain = (scenario.engines(scenario.start)[0] for scenario in scenarios)
    assert isinstance(fast, ModelEngine) and fast.engine.attention in ("flash", "math")
    for a, b in zip(Session(fast).play(KEYS[:2]), Session(plain).play(KEYS[:2]), strict=True):
        assert np.abs(a.astype(int) - b).max() <= 2


def test_engines_with_graphs_serve_every_walk_and_a_refused_one_changes_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # as if they could be recorded
    monkeypatch.setattr("minwm.session.engines.open_stream", lambda _, *args: Stream(*args))
    model, start = tiny_model(), StartState(prompt="a room", image=start_image())
    fresh = model_scenario(model, "tiny", start)
    assert fresh.engines(start)[0] is not fresh.engines(start)[0]
    scenario = model_scenario(model, "tiny", start, other=model, engine=EngineConfig(graphs=True))
    engines = scenario.engines(scenario.start)
    first = list(Session(engines[0]).play(KEYS[:2]))
    arena = engines[0].stream.arena.kv.data_ptr()  # type: ignore[attr-defined]
    other = replace(scenario.start, seed=5, prompt="a blue hall")
    assert all(a is b for a, b in zip(scenario.engines(other), engines, strict=True))
    assert not np.array_equal(list(Session(engines[0]).play(KEYS[:2]))[-1], first[-1])
    with pytest.raises(UserError, match="the first image is"):
        scenario.engines(replace(scenario.start, image=np.zeros((8, 8, 3), np.uint8)))
    assert [one.inputs.seed for one in engines] == [5, 5]  # type: ignore[attr-defined]
    scenario.engines(scenario.start)
    again = list(Session(engines[0]).play(KEYS[:2]))
    assert all(np.array_equal(a, b) for a, b in zip(first, again, strict=True))
    assert engines[0].stream.arena.kv.data_ptr() == arena  # type: ignore[attr-defined]


def test_a_rendered_world_takes_no_engine_flags(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["play", "--world", "7", "--graphs"]) == 2
    assert "takes no other option of a model" in capsys.readouterr().err


def test_ready_puts_the_winner_in_place_of_the_race() -> None:
    model: Model = tiny_model()
    chosen, times, _ = prepare_network(EngineConfig(attention="fastest"), model.net, SMALL.geometry)
    assert times and chosen == EngineConfig(attention=times.fastest)  # type: ignore[arg-type]
    assert prepare_network(EngineConfig(), model.net, SMALL.geometry) == (EngineConfig(), None, None)
