"""The verbs of the `vidgen` command: what each is called with, and its module, imported only when called."""

from __future__ import annotations

import dataclasses
import os
import signal
from collections.abc import Callable
from typing import Any


@dataclasses.dataclass(frozen=True)
class Flag:
    """A flag: `kind` is str, int, float, bool, or a list of one of them for a flag that may be given several times."""

    name: str
    kind: Any
    help: str
    default: Any = None
    required: bool = False


@dataclasses.dataclass(frozen=True)
class Verb:
    """A verb. `call` gets the flags' values by name, and returns what --json prints, "exit" apart: the exit status.

    positional: name of the one argument without a flag, if the verb takes one.
    settings: whether --config.KEY=VALUE is taken; `call` gets them as `changes`.
    """

    call: Callable[..., dict[str, Any]]
    help: str
    flags: tuple[Flag, ...]
    positional: str = ""
    settings: bool = False


def _train(config: str, workdir: str, input: str | None, changes: dict[str, str]) -> dict[str, Any]:
    from vidgen import config as configs

    c = configs.load(config, changes | ({"data.source": input} if input else {}))
    from vidgen import train

    result = train.run(c, workdir)
    return dataclasses.asdict(result) | {"exit": 128 + signal.Signals[result.stopped_by] if result.stopped_by else 0}


def _sample(prompt: list[str], prompts_file: str | None, seed: list[int], **rest: Any) -> dict[str, Any]:
    from vidgen import config as configs
    from vidgen import sample

    prompts = [*prompt, *(configs.read_lines(prompts_file) if prompts_file else [])]
    result = sample.run(prompts=prompts, seeds=seed or [0], **rest)
    for path in result.files[:2]:
        print(path)
    return {"step": result.step, "prompts": result.prompts, "seeds": result.seeds, "files": result.files}


def _evaluate(tokenizer: list[str], input: list[str], size: list[str], **rest: Any) -> dict[str, Any]:
    from vidgen import evaluate

    results = evaluate.run(tokenizers=tokenizer, inputs=input, sizes=size, **rest)
    print(evaluate.table(results))
    return evaluate.brief(results)


def _replay(workdir: str, step: int) -> dict[str, Any]:
    from vidgen import replay

    found = replay.run(workdir, step)
    print(replay.table(found))
    return {name: value for name, value in found.items() if name != "rows"}


def _report(workdir: str) -> dict[str, Any]:
    from vidgen.studio import report

    path = report.run(workdir)
    print(path)
    return {"report": path}


def _ingest(**rest: Any) -> dict[str, Any]:
    from vidgen import ingest

    return dataclasses.asdict(ingest.run(**rest))


def _inspect(dataset: str, output: str) -> dict[str, Any]:
    from vidgen import inspect

    return inspect.run(dataset, output)


def _encode(config: str, output: str, passes: int, input: str | None, changes: dict[str, str]) -> dict[str, Any]:
    from vidgen import config as configs

    c = configs.load(config, changes | ({"data.source": input} if input else {}))
    from vidgen import encode

    result = encode.run(c, output, passes=passes)
    print(encode.summary(result))
    return dataclasses.asdict(result)


def _import(directory: str, **rest: Any) -> dict[str, Any]:
    from vidgen import import_weights

    return dataclasses.asdict(import_weights.run(directory, **rest))


def _export(weights: str, **rest: Any) -> dict[str, Any]:
    from vidgen import export_weights

    return dataclasses.asdict(export_weights.run(weights, **rest))


def _sweep(**rest: Any) -> dict[str, Any]:
    from vidgen import sweep

    result = sweep.run(**rest)
    return dataclasses.asdict(result) | {"exit": 1 if result.failed else 0}


def _fit(loss: str, **rest: Any) -> dict[str, Any]:
    os.environ["JAX_PLATFORMS"] = "cpu"  # as for a plan, whose estimates this may show
    from vidgen import fit

    return fit.run(loss=tuple(column.strip() for column in loss.split(",")), **rest)


def _plan(
    config: str | None, topology: str | None, all: bool, search: bool, changes: dict[str, str], **rest: Any
) -> dict[str, Any]:
    # Before JAX is imported: plans are made on a CPU, whatever the machine has.
    os.environ["JAX_PLATFORMS"] = "cpu"
    from vidgen import config as configs

    given = {"config": config, "topology": topology, "search": search, **rest, **{f"config.{k}": 1 for k in changes}}
    flags = {flag.name: flag.default for flag in VERBS["plan"].flags}
    given = [name for name, value in given.items() if value != flags.get(name)]
    # What one of these modes does not look at.
    ignored = set(given) - {"price"} if all else set(given) & {"mesh", "mode"} if search else ()
    for name in given:
        if name in ignored:
            raise configs.ConfigError(f"--{name} has no meaning with --{'all' if all else 'search'}; leave one out")
    if not all and not (config and topology):
        raise configs.ConfigError("expected --config FILE and --topology CHIP:SHAPE, such as v5p:4x8x8, or --all")
    c = configs.load(config, changes) if config else None
    from vidgen import plan

    if all:
        return plan.run_all(rest["price"])
    if search:
        return plan.search(c, topology, **{name: rest[name] for name in ("tokens", "price", "abstract")})
    return plan.run(c, topology, **rest)


_DRAWING = (
    Flag("step", int, "Which checkpoint; the newest unless given."),
    Flag("frames", int, "Frames of a clip; here and below, the config's unless given."),
    Flag("height", int, "Pixels."),
    Flag("width", int, "Pixels."),
    Flag("fps", float, "Frames a second of the files written."),
    Flag("solver", str, "euler, heun, ddim, unipc or flow_match_euler."),
    Flag("steps", int, "Steps of the solver."),
    Flag("guidance", float, "Classifier-free guidance; 1: none."),
    Flag("guidance_2", float, "Of the expert for low noise, where there are two."),
    Flag("eta", float, "Of ddim: share of the noise that each step draws anew, 0 to 1."),
)
_WORKDIR = Flag("workdir", str, "Directory of the run.", required=True)

VERBS = {
    "train": Verb(
        _train,
        "Trains, or goes on from the newest checkpoint of the workdir. Ctrl-C and SIGTERM save first. On several "
        "hosts, run it on each: srun and TPU pods are recognised, others set VIDGEN_COORDINATOR=HOST:PORT, "
        "VIDGEN_PROCESSES=N and VIDGEN_PROCESS=0…N-1.",
        (
            Flag("config", str, "Python file with get_config(arg) -> ConfigDict: FILE or FILE:arg.", required=True),
            _WORKDIR,
            Flag("input", str, "Clips to train on, instead of config.data.source: a directory of shards, tfds:NAME."),
        ),
        settings=True,
    ),
    "sample": Verb(
        _sample,
        "Draws a grid of prompts (rows) x seeds (columns) and writes it as MP4 and GIF.",
        (
            _WORKDIR,
            Flag("prompt", [str], "What to show; may be given several times."),
            Flag("prompts_file", str, "A text file with a prompt a line."),
            Flag("output", str, "FILE.mp4 or FILE.gif; the other one is written beside it.", required=True),
            Flag("seed", [int], "Seed of the noise; may be given several times. 0 unless given."),
            Flag("negative", str, "A prompt to lead away from.", ""),
            Flag("first_frame", str, "Image or video whose first frame the clips start from.", ""),
            Flag("last_frame", str, "Image or video whose last frame they end at, beside --first_frame.", ""),
            Flag("extend", str, "Video that the clips go on from.", ""),
            *_DRAWING,
        ),
    ),
    "evaluate": Verb(
        _evaluate,
        "Judges the model and writes WORKDIR/evaluation/SUITE.json: figures, and a scorecard of all that decides them, "
        "with the command that makes them again.",
        (
            _WORKDIR,
            Flag(
                "suite",
                str,
                "moving_shapes: unseen prompts, judged by parsing the clips; first_frame: the same, going on from a "
                "clip's first frame; memorised: PSNR, SSIM and LPIPS to training clips; heldout: loss by noise level "
                "and size; fvd: Fréchet video distance to held-out clips; vbench: flicker, smoothness and amount of "
                "motion, consistency; nearest: whether clips are copies of training clips; reconstruction: what a "
                "tokenizer loses. Several with commas between. What fits the run unless given.",
                "",
            ),
            Flag("prompts", int, "How many clips are drawn and judged.", 144),
            Flag("seed", int, "Of prompts and noise.", 0),
            Flag(
                "size",
                [str],
                "Of heldout: FRAMESxHEIGHTxWIDTH, may be given several times; the run's own unless given.",
            ),
            Flag(
                "levels",
                str,
                "Of heldout: noise levels, between 0 (clean) and 1 (noise), with commas between; unless given "
                "0.0625,0.1875,…,0.9375, the same for every run.",
                "",
            ),
            Flag(
                "features", str, "Of fvd: a file of other I3D weights, .safetensors or a pickle, which is not run.", ""
            ),
            Flag("tokenizer", [str], "Of reconstruction: one more to compare: weights, a workdir, patch or wavelet."),
            Flag("input", [str], "Of reconstruction: a data set to look at, instead of the run's own held-out clips."),
            Flag(
                "clips",
                int,
                "Clips looked at: of each data set in reconstruction, of each size in heldout (64 both), of the "
                "training set in nearest (4096).",
            ),
            Flag("fvd", bool, "Of reconstruction: FVD too, seconds a clip on a CPU; --nofvd leaves it out.", True),
            *_DRAWING,
        ),
    ),
    "replay": Verb(
        _replay,
        "Takes one step of a run again, from the newest checkpoint before it, and says what each row and clip of it "
        "did: for a step that was skipped, whose clips are in WORKDIR/bad_steps, or a loss that jumped. Writes "
        "WORKDIR/replay/STEP: replay.json, and the rows that stand out as clips.gif and .mp4.",
        (
            _WORKDIR,
            Flag("step", int, "Which, from 1; on the run's own mesh it has the same bits as then.", required=True),
        ),
    ),
    "report": Verb(_report, "Writes WORKDIR/report.html, one file with everything in it.", (_WORKDIR,)),
    "ingest": Verb(
        _ingest,
        "Cuts captioned videos into clips, re-encodes them for fast reading and writes shards to train on.",
        (
            Flag(
                "input",
                str,
                "A directory of videos with captions in .txt or .json beside them; CSV or JSONL.",
                required=True,
            ),
            Flag("output", str, "Directory of shards to make.", required=True),
            Flag("frames", int, "Frames of a clip at most; longer videos are cut into several.", 129),
            Flag("stride", int, "Frames from the start of a clip to the next; 0: frames, so that none is in two.", 0),
            Flag("height", int, "Pixels; with width: scaled to cover, and cropped at the centre. 0: follows.", 0),
            Flag("width", int, "Pixels.", 0),
            Flag("size", int, "Pixels of the shorter side, the other follows; 0: as stored.", 0),
            Flag("fps", float, "Frames a second to resample to; 0: the file's own.", 0.0),
            Flag("gop", int, "Frames from a key frame to the next: short ones are fast to seek in.", 8),
            Flag("crf", float, "Quality of the x264 encoding, 0 (best) to 51.", 16.0),
        ),
    ),
    "encode": Verb(
        _encode,
        "Encodes the clips that a config trains on with its VAE and keeps the latents; run again, it goes on where it "
        "stopped. Then train with --config.data.latents=DIR.",
        (
            Flag("config", str, "Of the denoiser, with tokenizer.name=vae: FILE or FILE:arg.", required=True),
            Flag("output", str, "Directory of the cache.", required=True),
            Flag("input", str, "Clips to encode, instead of config.data.source."),
            Flag("passes", int, "Over the clips; more than 1 where each pass shows new ones (moving_shapes).", 1),
        ),
        settings=True,
    ),
    "import": Verb(
        _import,
        "Reads weights of another project, safetensors only: one model, or a whole pipeline. `vidgen sample --workdir "
        "DIR` draws from that, and configs/finetune.py:DIR trains it.",
        (
            Flag("format", str, "Whose: diffusers.", "diffusers"),
            Flag("output", str, "Directory to make.", required=True),
        ),
        positional="directory",
    ),
    "export": Verb(
        _export,
        "Writes weights, a run's averaged ones, or a whole pipeline with those in it, for another project to load.",
        (
            Flag("format", str, "Whose: diffusers, or vidgen for a copy of ours.", "diffusers"),
            Flag("output", str, "Directory to make.", required=True),
            Flag("step", int, "Of a denoiser's run: which checkpoint; the newest unless given."),
            Flag("merge", bool, "Of a LoRA run: whole weights with its updates in them, and no LoRA file.", False),
        ),
        positional="weights",
    ),
    "sweep": Verb(
        _sweep,
        "Brings many runs of one config to their end, each once, and writes OUTPUT/results.csv and results.parquet. "
        "Stopped or killed, the same command goes on: runs that are done are left alone, those that failed are tried "
        "again.",
        (
            Flag(
                "sweep", str, "Python file with get_sweep(arg) -> vidgen.sweep.Sweep: FILE or FILE:arg.", required=True
            ),
            Flag("output", str, "Folder of the sweep; each run has its workdir in OUTPUT/runs/NAME.", required=True),
            Flag(
                "launcher", str, "local: processes here; slurm: jobs of a cluster, by submitit; jobset: GKE.", "local"
            ),
            Flag("width", int, "Runs at a time; of the launcher local, each has its share of the cores.", 1),
            Flag("retries", int, "How often a run that fails is tried again.", 1),
            Flag("dry_run", bool, "Only prints the runs, with their parameters, steps and FLOPs.", False),
        ),
    ),
    "fit": Verb(
        _fit,
        "Fits the scaling law L(N, D) = E + A/N^alpha + B/D^beta to a table of runs, predicts the largest from the "
        "others, and writes OUTPUT/report.html and OUTPUT/law.svg.",
        (
            Flag(
                "runs",
                str,
                "CSV or Parquet, a run a row: parameters, tokens, flops, loss; results.parquet of a sweep.",
                required=True,
            ),
            Flag("output", str, "Directory of the report; the table's own unless given.", ""),
            Flag(
                "loss",
                str,
                "Columns whose mean is fitted, with commas between: loss/level_0,loss/level_1 for low noise alone.",
                "loss",
            ),
            Flag("holdout", bool, "Also fits without the largest budget and predicts it; --noholdout: no.", True),
            Flag("topology", str, "v5p:8x8x8: adds days on it, by estimates, to what to train with more compute.", ""),
            Flag("family", str, "Config file with the SIZES to estimate; configs/dit_video.py unless given.", ""),
            Flag("price", float, "Of a chip-hour, in any currency."),
            Flag("seed", int, "Of the resampling that intervals come from.", 0),
        ),
    ),
    "plan": Verb(
        _plan,
        "Compiles the very step that trains for TPUs or GPUs that are not there, and says whether it fits, what it "
        "moves between devices and, by an estimate, how long it takes and what it costs.",
        (
            Flag("config", str, "Python file with get_config(arg) -> ConfigDict: FILE or FILE:arg."),
            Flag("topology", str, "v5p:4x8x8, 2*v6e:16x16 (two slices), h100:32x8 (hosts x GPUs)."),
            Flag(
                "mesh",
                str,
                "fsdp=32,context=8, -1 for what is left; the config's or the nearest to it; not with --search.",
                "",
            ),
            Flag("mode", str, "train, or sample: drawing a clip of config.sample's size; not with --search.", "train"),
            Flag("tokens", float, "To train on in all, for days and cost; config.train.steps' unless given.", 0.0),
            Flag("price", float, "Of a chip-hour, in any currency."),
            Flag("search", bool, "Ranks meshes x microbatches x remat x attention, and compiles the best six.", False),
            Flag("abstract", bool, "Arithmetic only, in seconds: nothing is compiled.", False),
            Flag(
                "all",
                bool,
                "Plans the large configs on the machines they are for, and prints a table; of the other "
                "flags it takes --price.",
                False,
            ),
        ),
        settings=True,
    ),
    "inspect": Verb(
        _inspect,
        "Prints what is in a data set and what was dropped and why, and writes a contact sheet; of a run's workdir, "
        "which clips it could not read, and why.",
        (Flag("output", str, "Directory of the contact sheet; the data set's own unless given.", ""),),
        positional="dataset",
    ),
}
