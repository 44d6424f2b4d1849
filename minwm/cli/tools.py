"""Verbs about training clips."""

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

from tyro.conf import Positional, arg

from minwm.cli.base import (
    Count,
    Fields,
    Flag,
    Folder,
    Json,
    ModelFolder,
    Out,
    Show,
    command,
    echo,
    numbers,
    parse_fields,
    print_fields,
    read_track,
    write_numbers,
)
from minwm.core.config import UserError, dumps, lookup, override

RayFlag = Annotated[Flag, arg(help="on a Ray cluster: that of RAY_ADDRESS, else one on this machine")]


def list_render_fields(_words: list[str]) -> None:
    from minwm.data.rerender import RenderConfig

    print_fields(RenderConfig(), "data render")


def list_ingest_fields(_words: list[str]) -> None:
    from minwm.data.ingest import IngestConfig

    print_fields(IngestConfig(source_license="unknown"), "data ingest")


@command("data", "ingest", details=list_ingest_fields, resumable=True)
def data_ingest(
    videos: Folder,
    out: Out,
    source_license: Annotated[str, arg(metavar="NAME", help="licence of the videos, such as CC-BY-4.0")],
    ray: RayFlag = False,
    json: Json = None,
    show: Show = False,
    fields: Fields = (),
) -> None:
    """Turn videos into clips, with cameras from files or estimated; whatever is dropped is named, with its reason."""
    from minwm.data.ingest import IngestConfig, ingest

    cfg = override(IngestConfig(source_license=source_license), parse_fields(fields))
    if show:
        return echo(dumps(cfg))
    made = ingest(videos, out, cfg, ray)
    numbers({name: made[name] for name in ("videos", "clips", "estimated", "dropped", "examples")}, None)
    write_numbers(made, json)
    return report_refused(out, made["refused"], f"{made['videos']} videos")


def list_splat_fields(_words: list[str]) -> None:
    from minwm.data.splat import SplatConfig

    print_fields(SplatConfig(source_license="unknown"), "data splat")


@command("data", "splat", details=list_splat_fields, resumable=True)
def data_splat(
    captures: Annotated[Positional[tuple[Path, ...]], arg(metavar="DIR ...", help="pictures with a camera file")],
    out: Out,
    source_license: Annotated[str, arg(metavar="NAME", help="licence of the pictures, such as CC-BY-4.0")],
    ray: RayFlag = False,
    json: Json = None,
    show: Show = False,
    fields: Fields = (),
) -> None:
    """Turn captured scenes into 3D Gaussians, and render clips along prescribed cameras that stay in what was seen."""
    from minwm.data.splat import SplatConfig, splat_captures

    cfg = override(SplatConfig(source_license=source_license), parse_fields(fields))
    if show:
        return echo(dumps(cfg))
    made = splat_captures(captures, out, cfg, ray)
    numbers({"captures": made["videos"], **{name: made[name] for name in ("clips", "dropped", "examples")}}, None)
    write_numbers(made, json)
    return report_refused(out, made["refused"], f"{made['videos']} captures")


def report_refused(out: Path, reasons: list[str], every: str) -> None:
    """Print what could not be used, and raise UserError if there is any."""
    for reason in reasons:
        echo(f"refused: {reason}")
    if reasons:
        raise UserError(f"{out}: {len(reasons)} of {every} were refused (listed above)")


def list_record_fields(_words: list[str]) -> None:
    from minwm.data.doom import DoomConfig

    print_fields(DoomConfig(), "data record")


@command("data", "record", details=list_record_fields, resumable=True)
def data_record(
    out: Out,
    game: Annotated[str, arg(metavar="NAME", help="vizdoom")] = "vizdoom",
    clips: Count = 64,
    workers: Count = 1,
    show: Show = False,
    fields: Fields = (),
) -> None:
    """Record clips of a game, with the cameras that it reports."""
    from minwm.data.doom import DoomConfig
    from minwm.data.record import record

    cfg = override(lookup({"vizdoom": DoomConfig}, game, "game")(), parse_fields(fields))
    if show:
        return echo(dumps(cfg))
    folder = record(out, cfg, clips=clips, workers=workers)
    return echo(f"{out}: {len(folder.ids())} clips")


def list_generate_fields(_words: list[str]) -> None:
    from minwm.session.clips import GenerateConfig

    print_fields(GenerateConfig(), "data generate")


@command("data", "generate", details=list_generate_fields, resumable=True)
def data_generate(
    starts: Annotated[
        Positional[Path],
        arg(
            metavar="DIR|FILE.txt|FILE.json",
            help="pictures and videos with captions beside them; a prompt a line; or a list as of generate --list",
        ),
    ],
    model: ModelFolder,
    out: Out,
    source_license: Annotated[str, arg(metavar="NAME", help="licence of the starts, such as CC-BY-4.0")],
    batch: Annotated[int, arg(metavar="N", help="clips at once")] = 8,
    accept_limits: Annotated[Flag, arg(help="make clips that the weights' licence binds; each says so")] = False,
    json: Json = None,
    show: Show = False,
    fields: Fields = (),
) -> None:
    """Make clips with a model, along prescribed cameras, from pictures, videos or prompts."""
    from minwm.session.clips import GenerateConfig, Terms, generate_clips, plan_requests
    from minwm.store.folder import FILES, load_model
    from minwm.store.hub import resolve

    cfg = override(GenerateConfig(), parse_fields(fields))
    if show:
        return echo(dumps(cfg))
    if batch < 1:
        raise UserError(f"--batch {batch}: give at least 1")
    folder = resolve(model)
    terms = Terms.of(folder, source_license, accept_limits)
    loaded = load_model(folder).ready()
    made = generate_clips(
        loaded,
        folder / FILES[1],
        plan_requests(starts, loaded.config, cfg),
        lambda request: read_track(request.trajectory, loaded.config, request.image)[0],
        terms,
        out,
        batch,
    )
    echo(f"{out}: {made.wanted} clips, of which {made.made} are new; licence: {terms.license}")
    write_numbers(asdict(made), json)
    return report_refused(out, made.refused, f"{made.wanted} clips")


def list_encode_fields(_words: list[str]) -> None:
    from minwm.data.encode import EncodeConfig

    print_fields(EncodeConfig(), "data encode")


@command("data", "render", details=list_render_fields, resumable=True)
def data_render(out: Out, clips: Count = 64, workers: Count = 1, show: Show = False, fields: Fields = ()) -> None:
    """Render clips of procedural worlds, with exact cameras."""
    from minwm.data.rerender import RenderConfig, render_worlds

    cfg = override(RenderConfig(), parse_fields(fields))
    if show:
        return echo(dumps(cfg))
    folder = render_worlds(out, cfg, clips=clips, workers=workers)
    return echo(f"{out}: {len(folder.ids())} clips")


@command("data", "encode", details=list_encode_fields, resumable=True)
def data_encode(
    raw: Folder,
    codec: Annotated[Path, arg(metavar="DIR", help="codec folder, or model folder, whose text encoder is used too")],
    out: Out,
    ray: RayFlag = False,
    show: Show = False,
    fields: Fields = (),
) -> None:
    """Turn raw clips into latent shards. Under torchrun every process encodes its part of them."""
    from minwm.core.runtime import pick_device, rank
    from minwm.data.encode import EncodeConfig, encode_clips
    from minwm.nets.text import WordText
    from minwm.store.folder import load_codec, load_config

    cfg, device = override(EncodeConfig(), parse_fields(fields)), pick_device()
    if show:
        return echo(dumps(cfg))
    text = load_config(codec).text if (codec / "model.json").exists() else WordText()
    made = encode_clips(raw, out, load_codec(codec), text, device, cfg, ray)
    if not made["complete"]:
        return echo(f"{out}: process {rank()} has written its shards; others go on")
    return echo(f"{out}: {made['counts']} clips; the codec reaches {made['codec_psnr']:.2f} dB")


@command("data", "copy", resumable=True)
def data_copy(
    source: Annotated[Positional[str], arg(metavar="DIR|ADDRESS")],
    target: Annotated[Positional[str], arg(metavar="DIR|ADDRESS")],
) -> None:
    """Copy raw clips or shards between folders and stores (s3://bucket/x, hf://datasets/USER/NAME/x)."""
    from minwm.data.remote import copy

    echo(f"{target}: {copy(source, target)} files copied")


def list_trajectory_fields(_words: list[str]) -> None:
    from minwm.train.collect import CollectConfig

    print_fields(CollectConfig(), "data trajectories")


@command("data", "trajectories", details=list_trajectory_fields, resumable=True)
def data_trajectories(
    latents: Folder,
    teacher: Annotated[Path, arg(metavar="DIR|USER/NAME", help="autoregressive model, such as runs/demo/ar")],
    out: Out,
    show: Show = False,
    fields: Fields = (),
) -> None:
    """Collect a teacher's ODE trajectories along the clips of latent shards: the data of ODE distillation."""
    from minwm.store.hub import load
    from minwm.stream.solvers import FewStepSampler
    from minwm.train.collect import CollectConfig, collect

    model = load(teacher)
    default = CollectConfig(sampler=FewStepSampler(shift=model.config.sampler.shift))
    cfg = override(default, parse_fields(fields))
    if show:
        return echo(dumps(cfg))
    collect(model, latents, out, cfg)
    return echo(f"{out}: trajectories of {cfg.clips} clips")


@command("data", "prompts")
def data_prompts(
    files: Annotated[
        Positional[tuple[Path, ...]],
        arg(metavar="FILE", help=".txt, a prompt a line; .safetensors, one encoded before"),
    ],
    model: Annotated[Path, arg(metavar="DIR", help="model folder, which says what encodes them")],
) -> None:
    """Encode prompts ahead, or take encoded ones: training and play then never load the text encoder for them."""
    from minwm.core.files import read_text
    from minwm.store.folder import load_config

    text, lines = load_config(model).text, list[str]()
    if text.source is None:
        raise UserError(f"{model} reads prompts without an encoder: there is nothing to do ahead")
    for file in files:
        if file.suffix == ".safetensors":
            text.import_states(file)
        elif file.suffix == ".txt":
            lines += [line for line in read_text(file).splitlines() if line.strip()]
        else:
            raise UserError(f"{file}: give .txt or .safetensors files")
    if lines:
        text.encode(lines)
    echo(f"{len(lines)} prompts encoded, {sum(file.suffix == '.safetensors' for file in files)} taken as they are")


@command("data", "check")
def data_check(
    folder: Folder,
    model: Annotated[Path | None, arg(metavar="DIR", help="compare them with what this model is trained on")] = None,
    quality: Annotated[Flag, arg(help="also judge raw clips by the rules of data ingest")] = False,
    json: Json = None,
) -> None:
    """Look for anything wrong in raw clips or latent shards."""
    from minwm.data.clips import LATENT_SHARDS, ClipFolder, check, read_manifest
    from minwm.data.dataset import check_fit, check_shards
    from minwm.data.quality import QualityConfig, check_quality
    from minwm.data.rerender import check_renders
    from minwm.store.folder import load_config

    if read_manifest(folder, "minwm data render")["kind"] == LATENT_SHARDS:
        problems = check_shards(folder)
    else:
        problems = check(folder) or check_renders(ClipFolder(folder))
        if quality and not problems:
            problems = check_quality(ClipFolder(folder), QualityConfig())
    if model and not problems:
        problems = check_fit(folder, load_config(model).clip_spec)
    write_numbers({"problems": problems}, json)
    for problem in problems:
        echo(problem)
    if problems:
        raise UserError(f"{folder}: problems found, {len(problems)} in all (listed above)")
    echo(f"{folder}: nothing wrong")


@command("data", "report")
def data_report(
    folder: Folder,
    sheet: Annotated[Path | None, arg(metavar="PNG", help="draw some of the clips here")] = None,
    html: Annotated[Path | None, arg(metavar="FILE.html", help="write a page with clips that play")] = None,
    model: Annotated[Path | None, arg(metavar="DIR", help="with --html: show the speeds of its keys")] = None,
    json: Json = None,
) -> None:
    """Count what a folder of raw clips holds."""
    from minwm.core.media import write_image
    from minwm.data import clips, ingest

    values = clips.report(folder)
    if (folder / "ingested").is_dir():
        values["ingested"] = ingest.summary(folder)
    numbers(values, json)
    if sheet:
        write_image(sheet, clips.sheet(folder))
    if html:
        from minwm.eval.report.dataset import write_dataset_page
        from minwm.store.folder import load_config

        write_dataset_page(html, folder, values, load_config(model).motion if model else None)
