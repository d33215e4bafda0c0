"""What every command can be told: a field is a flag, its docstring the help."""

from typing import Annotated, Literal

import tyro
from pydantic import Field

from mlsae.config import Config, Layers, Materials, Placement, Positive, TrainConfig
from mlsae.estimate import PlanConfig
from mlsae.recipes import FormatName

Seed = Annotated[int, Field(ge=-(2**63), lt=2**63)]
Sae = Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="SAE")]


class Output(Config):
    """What every command can be told about its output."""

    json_: Annotated[str | None, tyro.conf.arg(name="json", metavar="FILE")] = None
    """Also write the result as JSON to this file; `-` prints it instead of the table."""
    quiet: bool = False
    """No progress bars."""
    debug: bool = False
    """Show the traceback of an error."""
    offline: bool = False
    """Use no network: folders, and what is in the Hub's cache."""


class Demo(Output):
    """The whole story on a real model with no network: train, evaluate, analyze, report."""

    out: str | None = None
    """Folder to write; None: demo, or demo-2, demo-3 ... if that is taken."""
    minutes: Annotated[float, Field(gt=0)] = 7.0
    """Wall time to aim for; it sets how much text is read."""


class Train(Output, TrainConfig):
    """Train one sparse autoencoder on every layer of a language model."""

    config: str | None = None
    """YAML or JSON file of these same keys; flags win over it."""
    resume: bool = False
    """Go on from the newest checkpoint in the run directory."""
    dp: Positive | None = None
    """Under torchrun: processes that share out the tokens; None: as many as tp leaves."""
    tp: Positive | None = None
    """Under torchrun: processes that share out the latents; None: 1, or as many as dp leaves."""


class Rows(Config):
    """How rows become text; the fields of TrainConfig."""

    text_column: str = "text"
    """Column or key that holds the text."""
    skip_bad_rows: bool = False
    """Count rows whose text is no string instead of stopping."""
    streaming: bool = False
    """Read the text, a Hub dataset row by row, only as far as `tokens` needs."""


class Reader(Placement):
    """What evaluate and analyze read."""

    sae: Sae
    """Run directory, SAE folder or Hub id."""
    lm: str | None = None
    """Language model; None: the one the SAE was trained on."""
    data: str | None = None
    """Text file, folder or Hub dataset; None: the text the SAE was trained on."""
    split: str | None = None
    """Part of the data; None: what was held out from training, or all of any other text."""
    text_column: str | None = None
    """Column or key that holds the text; None: the run's, of the text it was trained on, else text."""
    skip_bad_rows: bool = False
    """Count rows whose text is no string instead of stopping; a run that did so does so again with its text."""
    streaming: bool = False
    """Read the text, a Hub dataset row by row, only as far as `tokens` needs; as the run did with its text."""
    context_length: Positive | None = None
    """Tokens in a sequence; None: 2048 or the language model's limit."""


class Part(Config):
    """What evaluate and analyze can be told about doing a part of the work."""

    shard: str | None = None
    """Do one of n parts, such as 2/4, in whatever process or machine; once all are done, `mlsae merge` puts them together."""


class Evaluate(Output, Reader, Part):
    """Measure how good an SAE is on held-out text, layer by layer."""

    out: str | None = None
    """Folder to write; None: the run directory."""
    tokens: Positive = 1_000_000
    """Tokens to read."""
    splice_tokens: Positive | None = None
    """Of these, how many also measure cross-entropy and KL, the costly part; None: all."""


class Analyze(Output, Reader, Part):
    """Read the layers of an SAE: where its latents live, as numbers, figures and a report."""

    out: str | None = None
    """Folder to write; None: analysis in the run directory."""
    tokens: Positive = 10_000_000
    """Tokens to read."""
    prompt: str | None = None
    """Text of the single-prompt heatmap; None: the paper's."""
    nulls: bool = True
    """Also analyze codes in which depth means nothing, to compare with."""
    directions: bool = True
    """Also compare decoder rows with each other and with embeddings; the time grows with the square of the latents."""
    examples: Annotated[int, Field(ge=0)] = 32
    """Strongest contexts to keep for every latent and layer, and half as many at random; 0: none."""


class Merge(Output):
    """Put together what `evaluate --shard i/n` or `analyze --shard i/n` left in a folder, as if one process had done it."""

    directory: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="DIR")]
    """Run directory, or the folder named with --out."""
    sae: str | None = None
    """Run directory, SAE folder or Hub id; None: where the shards found it."""
    lm: str | None = None
    """Language model; None: where the shards found it."""
    data: str | None = None
    """Text file, folder or Hub dataset; None: where the shards found it."""


class FitLens(Output, Rows, Placement, Materials):
    """Train a tuned lens, the map of each layer that best foretells what the model says, to put before an SAE."""

    out: str
    """Folder to write."""
    tokens: Positive = 1_000_000
    """Tokens to train on; past the end of the text it starts again."""
    held_out_tokens: Positive = 20_000
    """Tokens of the validation part to judge it by."""
    split: str = "train"
    """Part of the data to train on: a split it has, or `all`; data without splits is divided by document 96/2/2."""
    context_length: Positive | None = None
    """Tokens in a sequence; None: 2048 or the language model's limit."""
    seed: int = 42
    """Seed of the data order."""
    published: str | None = None
    """Train nothing: take this lens as the tuned-lens library writes it, a folder or a Hub id, and trust its pickle."""


class SweepGrid(Output, TrainConfig):
    """Train an SAE for every combination of k, expansion factor and seed off one reading of the text, and compare them."""

    out: str
    """Folder to write: a run directory for each, sweep.json, sweep.txt and figures/."""
    k: tuple[Annotated[int, Field(ge=1)], ...] | None = None  # ty: ignore[incompatible-attribute-override]
    """Active latents of each residual vector, one or several; None: 32."""
    expansion_factor: tuple[Annotated[float, Field(gt=0)], ...] | None = None  # ty: ignore[incompatible-attribute-override]
    """Latents of one dictionary as a multiple of d_model, one or several; None: 16."""
    seed: tuple[Seed, ...] | None = None  # ty: ignore[incompatible-attribute-override]
    """Seed of the initial weights, one or several; the order of the data is that of data_seed, or the first; None: 42."""
    evaluate_tokens: Positive = 1_000_000
    """Tokens of held-out text to evaluate each SAE on."""
    splice_tokens: Positive | None = None
    """Of these, how many also measure cross-entropy and KL, the costly part; None: all."""
    resume: bool = False
    """Go on with the sweep in that folder, each arm from its newest checkpoint."""


class Reproduce(Output, TrainConfig):
    """Every figure of the paper on your language model: SAEs of several k and sizes, behind a lens, and one per layer."""

    out: str
    """Folder to write: figures/, report.html, reproduction.json and .txt, and a run directory for each SAE."""
    k: Annotated[tuple[Annotated[int, Field(ge=1)], ...], Field(min_length=1)] = (16, 32, 64)  # ty: ignore[incompatible-attribute-override]
    """Active latents of each residual vector to try, at the middle size."""
    expansion_factor: Annotated[tuple[Annotated[float, Field(gt=0)], ...], Field(min_length=1)] = (4.0, 16.0, 64.0)  # ty: ignore[incompatible-attribute-override]
    """Sizes to try, at the middle k: latents as a multiple of d_model."""
    tuned_lens: bool = True
    """Also train a tuned lens, and an SAE behind it."""
    rival: bool = True
    """Also train one dictionary for each layer, together as many latents as the main SAE."""
    random_model: bool = True
    """Also train the main SAE on the same language model with random weights, to compare with."""
    lens_tokens: Positive | None = None
    """Tokens to train the lens on; None: as many as the SAEs."""
    evaluate_tokens: Positive = 1_000_000
    """Tokens of held-out text to evaluate each SAE on."""
    splice_tokens: Positive | None = None
    """Of these, how many also measure cross-entropy and KL, the costly part; None: all."""
    analyze_tokens: Positive = 10_000_000
    """Tokens of held-out text to analyze each SAE on."""
    prompt: str | None = None
    """Text of the single-prompt heatmap; None: the paper's."""
    resume: bool = False
    """Go on with what is in that folder."""


class Compare(Output):
    """Train and compare kinds of SAE at equal budget: multi-layer against groups of layers, or any recipes."""

    comparison: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="COMPARISON.yaml")]
    """YAML file of the comparison: the keys of train, `k: [16, 32, 64]` and `arms` (docs/quickstart.md has one)."""
    out: str | None = None
    """Folder to write; None: the file's."""
    resume: bool = False
    """Go on with the comparison in that folder."""


class Explore(Output, Placement):
    """See where each latent lives, in a browser: a page for the SAE, for any prompt and for every latent."""

    sae: Sae
    """Run directory, SAE folder or Hub id; a run that is still going shows its training curves."""
    analysis: str | None = None
    """Folder that analyze wrote; None: analysis in the run directory."""
    lm: str | None = None
    """Language model; None: the one the SAE was trained on. It is loaded when a prompt is first typed."""
    port: Annotated[int, Field(ge=0, le=65535)] = 8001
    """Port to listen on; 0: any that is free."""
    open: bool = False
    """Open the page in the browser."""
    host: str = "127.0.0.1"
    """Address to listen on; any but this machine's own also needs --allow-remote."""
    allow_remote: bool = False
    """Let other machines connect: whoever has the printed address can read and steer."""
    allow_host: tuple[str, ...] = ()
    """Further names by which the page may be asked for."""


class Convert(Output):
    """Write an SAE in the files of another library, and check that both give the same outputs."""

    source: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="SOURCE")]
    """SAE folder or Hub id, whatever library wrote it, or a folder of folders, one for each layer."""
    out: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="OUT")]
    """New folder to write."""
    to: FormatName = "mlsae"
    """Format to write; one with a dictionary for each layer gets a folder for each."""
    lm: str | None = None
    """Language model that the SAE reads, where its files do not say."""
    layers: Layers | None = None
    """Layers that it reads, where its files do not say."""
    revision: str | None = None
    """Branch, tag or commit on the Hub."""
    allow_pickle: bool = False
    """Read files that are pickles, in a process of its own and nothing but tensors and numbers of them."""


class Export(Output, Reader):
    """Write an SAE's activations for delphi, or its analysis for Neuronpedia, layer by layer."""

    out: str
    """New folder to write."""
    to: Literal["delphi", "neuronpedia"] = "delphi"
    """delphi: which latents are active where in the text. neuronpedia: what `mlsae analyze` wrote, its examples included."""
    layers: Layers | None = None
    """Layers of the language model; None: all the SAE's."""
    tokens: Positive = 10_000_000
    """For delphi: tokens to read."""
    n_splits: Positive = 5
    """For delphi: files for each layer."""
    analysis: str | None = None
    """For neuronpedia: folder that `mlsae analyze` wrote; None: analysis in the run directory."""
    creator_id: str | None = None
    """For neuronpedia, required: your id there."""
    creator: str | None = None
    """For neuronpedia: your name there; None: the id."""
    source_set: str = "mlsae-res"
    """For neuronpedia: what the SAE is called there, after the number of a layer."""
    release: str = "mlsae"
    """For neuronpedia: what the release is called there."""
    model: str | None = None
    """For neuronpedia: what the language model is called there; None: the last part of its name."""


class Push(Output):
    """Put an SAE on the Hugging Face Hub with a model card: what it is, how it was trained, how good it is, how to use it."""

    sae: Sae
    """Run directory, SAE folder or Hub id."""
    repo: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="USER/NAME")]
    """Repository on the Hub; it is made if it is not there."""
    to: FormatName = "mlsae"
    """Format to write; one with a dictionary for each layer gets a folder for each."""
    private: bool = False
    """Make the repository private."""
    revision: str | None = None
    """Branch; None: main."""
    license: str | None = None
    """Licence as the Hub spells it, such as mit or cc-by-4.0; None: the card says that none was chosen."""
    lm: str | None = None
    """The Hub's name of the language model, where the SAE was trained on one in a folder: names of folders are left out."""
    data: str | None = None
    """The Hub's name of the text, likewise."""
    dry_run: bool = False
    """Only list what would be uploaded, and show the card; nobody is asked."""


class Plan(Output, PlanConfig):
    """What a training run will take: memory, disk, traffic, a bound on its speed, and what would fit. Nothing is started."""


class Info(Output):
    """Say what is installed, which devices there are, and who computes the sparse operations."""
