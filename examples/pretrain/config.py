"""What a run is made of: its settings, the presets and the command line. Imports no JAX."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import tyro

VOCABULARY = 256  # bytes
MAY_BE_NOTHING = ("seed", "redundants", "warmup_steps", "process", "checkpoint_every", "validate_every")


@dataclass(frozen=True)
class Model:
    """What is trained. A checkpoint only loads into the model that it is of."""

    d_model: int = 1024
    """Width of tokens."""
    layers: int = 6
    """Blocks of attention and experts."""
    heads: int = 16
    """Attention heads."""
    experts: int = 64
    """Logical experts of each layer."""
    top_k: int = 6
    """Experts of each token."""
    d_expert: int = 512
    """Hidden width of an expert."""
    router_bias: bool = False
    """Balances the router without a loss (DeepSeek-V3), by a bias of each expert."""
    route: Literal["learned", "even"] = "learned"
    """Even: to each expert equally often, at random, whatever the router says; the ceiling of the throughput, no
    training of use."""


@dataclass(frozen=True)
class Data:
    """What it is trained on."""

    data: tuple[Path, ...] = ()
    """Text files, and folders to look through. By default the Python standard library's sources and documentation."""
    suffixes: tuple[str, ...] = (".txt", ".md", ".rst", ".py")
    """Files of a folder that are read."""
    seq_len: int = 1024
    """Tokens (bytes) of a sequence."""
    batch: Annotated[int, tyro.conf.arg(aliases=["--batch-size"])] = 64
    """Sequences of a step, over all devices."""
    validation_batches: int = 4
    """Batches held out for validation."""


@dataclass(frozen=True)
class Optimiser:
    """AdamW, with linear warm-up and cosine decay."""

    learning_rate: Annotated[float, tyro.conf.arg(aliases=["--lr"])] = 6e-4
    """At the end of the warm-up."""
    final_fraction: float = 0.1
    """Of the learning rate, at the last step."""
    warmup_steps: int = 100
    """Steps up to the full learning rate."""
    weight_decay: float = 0.1
    """Of matrices."""
    clip_norm: float = 1.0
    """Largest norm of all gradients together."""
    aux_loss_weight: float = 0.0
    """Weight of the classic balancing loss."""
    router_bias_rate: float = 1e-3
    """A step's change of the router's bias, with --router-bias."""


@dataclass(frozen=True)
class Placing:
    """Where experts and their copies live."""

    expert_ranks: int | None = None
    """Ranks that share the experts; by default all devices. The others are data parallel."""
    copies: Literal["batch", "past", "none"] | None = None
    """Chosen by each batch, on the device; or by past load, for many steps, with experts that move; or none. By default
    by each batch, and with --distributed by the past: processes share memory only with --dispatch peer."""
    redundants: int = 2
    """Slots of each rank for copies."""
    placement: Literal["topology", "eplb"] = "topology"
    """With --copies past: along a topology chosen by the number of ranks, or EPLB's."""
    placement_every: int = 100
    """With --copies past: steps between placements, and the span of the moving average of loads that they go by."""


@dataclass(frozen=True)
class Compute:
    """How it is computed; changes nothing but speed, memory and rounding."""

    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """Of matrix multiplications; parameters are float32."""
    attention: Literal["cudnn", "xla"] | None = None
    """By default cuDNN's on GPUs, for bfloat16."""
    remat: bool = False
    """Computes each block again in the backward pass instead of keeping what it computed: slower, with less memory."""
    dispatch: Literal["peer", "all_to_all", "ring"] | None = None
    """How tokens travel to their experts. By default through peers' memory where the devices are one process's and can
    reach each other's, else by all_to_all. "peer" asks for it: for copies, too, and between processes of one host."""
    buffer_factor: float | None = None
    """Room of the dispatch's buffers over that of an even load. By default 1.05 with --copies batch, where the buffers
    are for all that a rank gets and not for each pair of ranks, and with --route even; else 1.25."""
    distributed: bool = False
    """Several processes; where no cluster manager such as SLURM tells JAX, with the three options below."""
    coordinator: str | None = None
    """HOST:PORT of process 0."""
    processes: int | None = None
    """Number of processes."""
    process: int | None = None
    """Number of this process, from 0."""


@dataclass(frozen=True)
class Config:
    """A run."""

    out: Annotated[Path, tyro.conf.arg(aliases=["--output"])] = Path("pretrain-run")
    """Folder of all that is written. With a checkpoint in it, the run goes on from there."""
    steps: int = 2000
    """Updates of the parameters."""
    seed: int = 0
    """Of the parameters and of the order of the data."""
    checkpoint_every: int = 500
    """Steps between checkpoints; there is one at the end too. 0: none at all."""
    keep: int = 2
    """Checkpoints kept."""
    validate_every: int = 500
    """Steps between validations; there is one at the end too. 0: none at all."""
    log_every: int = 10
    """Steps between lines of the log, where standard error is no terminal."""
    model: Model = field(default_factory=Model)
    data: Data = field(default_factory=Data)
    optimiser: Optimiser = field(default_factory=Optimiser)
    placing: Placing = field(default_factory=Placing)
    compute: Compute = field(default_factory=Compute)


PRESETS: dict[str, tuple[str, Config]] = {
    "tiny": (
        "0.5 million parameters, for 8 virtual devices of a CPU",
        Config(
            steps=300,
            checkpoint_every=100,
            validate_every=100,
            model=Model(d_model=64, layers=2, heads=4, experts=32, top_k=2, d_expert=32),
            data=Data(seq_len=128, batch=16, validation_batches=16),
            optimiser=Optimiser(learning_rate=4e-3, warmup_steps=30),
            placing=Placing(placement_every=50),
            compute=Compute(dtype="float32"),
        ),
    ),
    "tiny-gpu": (
        "80 million parameters, 32 experts, for one GPU: a few minutes",
        Config(
            model=Model(d_model=512, layers=6, heads=8, experts=32, top_k=4, d_expert=256),
            data=Data(seq_len=512, batch=64),
            optimiser=Optimiser(learning_rate=1e-3),
        ),
    ),
    "small": ("0.6 billion parameters, 64 experts, for 4 GPUs", Config()),
    "base": (
        "7.5 billion parameters, 128 experts, for 8 GPUs of 80 GB",
        Config(
            steps=20000,
            checkpoint_every=1000,
            model=Model(d_model=2048, layers=12, heads=16, experts=128, top_k=8, d_expert=768),
            data=Data(seq_len=2048, batch=64),
            optimiser=Optimiser(learning_rate=4e-4, warmup_steps=1000),
            compute=Compute(remat=True),
        ),
    ),
}


def parse(arguments: Sequence[str] | None = None) -> Config:
    """The settings that a command line asks for: a preset, and what differs from it."""
    config = tyro.extras.overridable_config_cli(
        PRESETS,
        prog="train.py",
        description="Pretrains a Mixture-of-Experts transformer whose experts are balanced by jax_lplb.",
        args=arguments,
        config=(tyro.conf.OmitArgPrefixes,),
    )
    return settle(config)


def settle(config: Config) -> Config:
    """The settings with what is left open decided."""
    compute = config.compute
    copies = config.placing.copies or ("past" if compute.distributed else "batch")
    # Where the batch chooses copies, what a rank gets is within a few percent of the mean. Not so what it gets from
    # each other rank, which is what buffers of all_to_all are for.
    of_ranks = compute.dispatch in ("peer", "ring") or (compute.dispatch is None and not compute.distributed)
    is_even = config.model.route == "even" or (copies == "batch" and of_ranks)
    factor = compute.buffer_factor
    if factor is None:
        factor = 1.05 if is_even else 1.25
    return dataclasses.replace(
        config,
        placing=dataclasses.replace(config.placing, copies=copies),
        compute=dataclasses.replace(compute, buffer_factor=factor),
    )


def check(config: Config, devices: int) -> int:
    """Returns the number of expert ranks; ends with one line where the settings do not fit the devices."""
    model, ranks = config.model, config.placing.expert_ranks or devices
    for section in (config, model, config.data, config.optimiser, config.placing, config.compute):
        for name, value in vars(section).items():
            least = 0 if name in MAY_BE_NOTHING else 1
            if isinstance(value, int) and not isinstance(value, bool) and value < least:
                raise SystemExit(f"train: --{name.replace('_', '-')} must be at least {least}, got {value}")
    for name, value, fits in (
        ("buffer-factor", config.compute.buffer_factor, (config.compute.buffer_factor or 0) > 0),
        ("learning-rate", config.optimiser.learning_rate, config.optimiser.learning_rate > 0),
        ("clip-norm", config.optimiser.clip_norm, config.optimiser.clip_norm > 0),
    ):
        if not fits:
            raise SystemExit(f"train: --{name} cannot be {value}")
    if devices % ranks:
        raise SystemExit(f"train: --expert-ranks {ranks} does not divide the {devices} devices")
    if model.experts % ranks:
        raise SystemExit(f"train: --experts {model.experts} cannot be divided over {ranks} expert ranks evenly")
    if model.top_k > model.experts:
        raise SystemExit(f"train: --top-k {model.top_k} is more than --experts {model.experts}")
    if model.d_model % (2 * model.heads):
        raise SystemExit(f"train: --d-model {model.d_model} must be an even multiple of --heads {model.heads}")
    if config.data.batch % devices:
        raise SystemExit(f"train: --batch {config.data.batch} cannot be divided over {devices} devices evenly")
    return ranks
