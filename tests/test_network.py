"""What a network does to us, and what we do with a network: hubserver.py stands in for the Hugging Face Hub.

Endpoint and cache are read when the libraries are imported, so everything here runs in processes of their own. This file
is also the program that starts them: it imports the libraries once and forks a process for every line it is sent. In
these, sleeping takes no time, and no address but 127.0.0.1 can be reached.
"""

import contextlib
import hashlib
import importlib
import io
import json
import os
import runpy
import signal
import subprocess
import sys
import time
import traceback
from pathlib import Path

# ---- the program that starts processes -------------------------------------------------------------------------------

WARM = ("datasets", "mlsae.train", "transformers.models.llama.modeling_llama", "transformers.models.auto")
destinations = []


def serve(*modules):
    """For each line of JSON {job, arguments, environment, folder}: fork a process, say its pid and, once it ended, how."""
    sys.addaudithook(watch)
    if modules:  # imported as a command imports them
        with contextlib.redirect_stdout(io.StringIO()):
            importlib.import_module("mlsae.cli").main(["info"])
    for name in modules:
        importlib.import_module(name)
    for line in sys.stdin:
        task = json.loads(line)
        if (child := os.fork()) == 0:
            work(**task)
        tell(child)
        tell(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))


def watch(event, arguments):
    """Note where this process wants to go, a name to be looked up or an address, and refuse what is not this machine."""
    if event in ("socket.getaddrinfo", "socket.gethostbyname"):
        host = arguments[0]
    elif event in ("socket.connect", "socket.sendto", "socket.sendmsg") and isinstance(arguments[1], tuple):
        host, port = arguments[1][:2]
        destinations.append(f"{host}:{port}")
    else:
        return
    if host != "127.0.0.1":
        destinations.append(str(host))
        raise ConnectionRefusedError(f"no test may reach {host}")


def work(job, arguments, environment, folder):
    """One job in this process, with what it says and where it went left in a folder."""
    folder = Path(folder)
    for descriptor, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(folder / name, os.O_WRONLY | os.O_CREAT, 0o600), descriptor)
    os.environ.update(environment)
    sleep_at_once(folder / "clock")
    code = 1
    try:
        code = JOBS[job](*arguments)
    except Exception:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        (folder / "destinations").write_text(json.dumps(destinations))
        os._exit(code)


def sleep_at_once(clock):
    """Sleep only moves the monotonic clock on; a file says how far, for a server whose outages last a while."""
    slept, monotonic = 0.0, time.monotonic

    def sleep(seconds):
        nonlocal slept
        slept += seconds
        clock.write_text(str(slept))

    time.sleep, time.monotonic = sleep, lambda: monotonic() + slept


def tell(number):
    os.write(1, b"%d\n" % number)


def commands(*lines):
    """`python -m mlsae` for each line of arguments, until one fails."""
    for line in lines:
        sys.argv = ["mlsae", *line]
        try:
            runpy.run_module("mlsae", run_name="__main__", alter_sys=True)
        except SystemExit as end:
            if end.code:
                return end.code
    return 0


def load(name, revision):
    """Say the weights and the commit of a language model."""
    from mlsae.errors import MlsaeError
    from mlsae.lm import LanguageModel

    try:
        lm = LanguageModel.from_pretrained(name, revision=revision, device="cpu", dtype="float32")
    except MlsaeError as error:
        print(error)
        return error.exit_code
    print(json.dumps({"weights": weights_of(lm), "revision": lm.revision}))
    return 0


def documents(data):
    """Say the SHA-256 of a streamed data set's documents."""
    from mlsae.text import TextSource

    texts = list(TextSource(data, streaming=True).documents())
    print(hashlib.sha256(json.dumps(texts).encode()).hexdigest())
    return 0


def training(reads, stop_after, line):
    """`mlsae train` that notes the tokens of every batch it reads, and asks itself to stop after a step."""
    module = importlib.import_module("mlsae.train")
    readings, step = module.Loop._readings, module.Loop._step

    def noted_readings(self):
        with open(reads, "a") as file:
            for reading in readings(self):
                file.write(f"{self.position} {hashlib.sha256(reading.tokens.numpy().tobytes()).hexdigest()}\n")
                yield reading

    def stopped_step(self):
        if self.trainer.steps + 1 == stop_after:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(self)

    module.Loop._readings, module.Loop._step = noted_readings, stopped_step
    return commands(line)


def weights_of(lm):
    """A SHA-256 of a language model's weights."""
    state = {name: tensor.numpy().tobytes() for name, tensor in lm.hf.state_dict().items()}
    return hashlib.sha256(b"".join(state[name] for name in sorted(state))).hexdigest()


JOBS = {job.__name__: job for job in (commands, load, documents, training)}

if __name__ == "__main__":
    serve(*sys.argv[1:])
    sys.exit()


# ---- the other end ---------------------------------------------------------------------------------------------------

import itertools  # noqa: E402
import random  # noqa: E402
import re  # noqa: E402
import shutil  # noqa: E402
from dataclasses import dataclass  # noqa: E402

import pyarrow as pa  # noqa: E402
import pyarrow.parquet  # noqa: E402
import pytest  # noqa: E402

from conftest import train_command  # noqa: E402
from hubserver import HubServer, Repository  # noqa: E402
from test_resume import consumed  # noqa: E402
from tiny import save_tiny_lm  # noqa: E402

CANARY = "hf_canaryCanaryCanaryCanaryCanary1"
"""An access token that must turn up nowhere."""
N_SHARDS, N_ROWS = 40, 8


@dataclass
class Outcome:
    """How a job ended, what it said, and where it went."""

    code: int
    folder: Path

    @property
    def out(self) -> str:
        return (self.folder / "out").read_text()

    @property
    def err(self) -> str:
        return (self.folder / "err").read_text()

    @property
    def slept(self) -> float:
        return clock(self.folder)

    @property
    def destinations(self) -> set[str]:
        return set(json.loads((self.folder / "destinations").read_text()))


def clock(folder: Path) -> float:
    """Seconds that the job in a folder has slept."""
    return float((folder / "clock").read_text() or 0) if (folder / "clock").exists() else 0.0


class Workers:
    """The other end of `serve`: a machine on which nothing is stored but what was downloaded there before."""

    def __init__(self, hub, folder, modules=WARM, **environment):
        self.folder, self.home, self.n_jobs = folder, folder / "home", 0
        known = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
        settings = {"HF_ENDPOINT": hub.url, "HF_HOME": str(self.home), "HF_HUB_DOWNLOAD_TIMEOUT": "2"}
        threads = {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
        self.process = subprocess.Popen(
            [sys.executable, "-u", __file__, *modules],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**known, **settings, **threads, "MLSAE_CACHE": str(folder / "cache"), **environment},
            text=True,
        )

    def next_folder(self) -> Path:
        """Where the next job leaves what it says."""
        return self.folder / f"job-{self.n_jobs}-{self.process.pid}"

    def run(self, job, *arguments, meanwhile=lambda pid: None, **environment) -> Outcome:
        folder = self.next_folder()
        folder.mkdir()
        self.n_jobs += 1
        task = {"job": job, "arguments": arguments, "environment": environment, "folder": str(folder)}
        self.process.stdin.write(json.dumps(task) + "\n")
        self.process.stdin.flush()
        meanwhile(int(self.process.stdout.readline()))
        return Outcome(int(self.process.stdout.readline()), folder)

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait()
        self.process.stdout.close()


@pytest.fixture(scope="module")
def texts(tmp_path_factory) -> Path:
    """A folder of many small shards: many requests."""
    folder = tmp_path_factory.mktemp("texts")
    draw = random.Random(0)
    for shard in range(N_SHARDS):
        rows = [{"text": " ".join(draw.choices(["ab", "cde", "f", "ghij"], k=12))} for _ in range(N_ROWS)]
        (folder / f"train-{shard:02}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "validation.jsonl").write_text(json.dumps({"text": "held out"}) + "\n")
    return folder


@pytest.fixture(scope="module")
def hub(tmp_path_factory, lm_folder, corpus, texts):
    made = tmp_path_factory.mktemp("repositories")
    (made / "pickle").mkdir()
    shutil.copy(lm_folder / "config.json", made / "pickle")
    (made / "pickle" / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    (made / "bodies").mkdir()
    (made / "bodies" / "train.jsonl").write_text('{"content": "words", "meta": 1}\n')
    (made / "parquet").mkdir()
    for shard in sorted(texts.glob("*.jsonl")):
        table = pa.Table.from_pylist([json.loads(line) for line in shard.read_text().splitlines()])
        pyarrow.parquet.write_table(table, made / "parquet" / f"{shard.stem}.parquet", row_group_size=N_ROWS // 2)
    repositories = {
        "models/org/tiny": Repository(lm_folder),
        "models/org/gated": Repository(lm_folder, "gated"),
        "models/org/private": Repository(lm_folder, "private"),
        "models/org/pickle": Repository(made / "pickle"),
        "datasets/org/corpus": Repository(corpus),
        "datasets/org/private": Repository(corpus, "private"),
        "datasets/org/gated": Repository(corpus, "gated"),
        "datasets/org/bodies": Repository(made / "bodies"),
        "datasets/org/jsonl": Repository(texts),
        "datasets/org/parquet": Repository(made / "parquet"),
    }
    with HubServer(repositories) as server:
        yield server


@pytest.fixture(autouse=True)
def _healthy(hub):
    hub.faults, hub.token = lambda request: None, "hf_good"
    hub.requests.clear()


@pytest.fixture(scope="module")
def workers(hub, tmp_path_factory):
    """One machine with a network, without it, and with processes that import for themselves; they start side by side."""
    folder = tmp_path_factory.mktemp("machine")
    made = {
        "online": Workers(hub, folder),
        "offline": Workers(hub, folder, HF_HUB_OFFLINE="1"),
        "fresh": Workers(hub, folder, modules=()),
    }
    yield made
    for each in made.values():
        each.close()


@pytest.fixture
def online(workers):
    return workers["online"]


@pytest.fixture
def offline(workers):
    return workers["offline"]


@pytest.fixture
def fresh(workers):
    return workers["fresh"]


def sentence(outcome: Outcome, code: int, warned: bool = False) -> str:
    """The one line that a refused command may say; `warned`: after what the libraries say when they try again."""
    *before, said = outcome.err.splitlines()
    assert outcome.code == code, said
    assert outcome.out == ""
    assert said.startswith("error: ")
    assert warned or not before
    assert "Traceback" not in outcome.err
    return said


# ---- language models -------------------------------------------------------------------------------------------------


def test_a_model_of_the_hub_is_the_folder_it_was_made_from(hub, online, lm):
    """And it is known by its commit, whether that, a branch or nothing was asked for."""
    commit = hub.repositories["models/org/tiny"].commit
    for revision in (None, "main", commit):
        found = json.loads(online.run("load", "org/tiny", revision).out)
        assert found == {"weights": weights_of(lm), "revision": commit}
    unknown = online.run("load", "org/tiny", "v2")
    assert unknown.code == 6
    assert unknown.out == "model: 'org/tiny' has no revision 'v2'; name a branch, tag or commit\n"


REFUSED = {
    "EleutherAI/pythia-70n": "not found on the Hub or as a folder; did you mean 'EleutherAI/pythia-70m'?",
    "org/nowhere": "not found on the Hub or as a folder; check the name, or run 'hf auth login' if it is private",
    "org/private": "not found on the Hub or as a folder; check the name, or run 'hf auth login' if it is private",
    "org/gated": "is gated; ask for access on huggingface.co/org/gated and run 'hf auth login'",
    "org/pickle": "has no safetensors weights; see 'mlsae convert'",
}


@pytest.mark.parametrize("token", ["", CANARY], ids=["no token", "a token without rights"])
@pytest.mark.parametrize("name", REFUSED)
def test_a_model_that_the_hub_refuses_is_one_sentence(online, corpus, tmp_path, name, token):
    line = train_command(lm=name, data=corpus, out=tmp_path / "run")
    outcome = online.run("commands", line, HF_TOKEN=token)
    assert sentence(outcome, 6) == f"error: model: '{name}' {REFUSED[name]}"
    assert CANARY not in outcome.err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["org/private", "org/gated"])
def test_a_token_opens_what_is_not_public(hub, online, name):
    assert online.run("load", name, None, HF_TOKEN=hub.token).code == 0


def test_offline_a_cached_model_loads(online, offline):
    cached = online.run("load", "org/tiny", None)
    assert offline.run("load", "org/tiny", None).out == cached.out


def test_offline_a_model_that_is_not_cached_is_named(offline, corpus, tmp_path):
    line = train_command(lm="org/other", data=corpus, out=tmp_path / "run")
    why = "is not in the local cache and offline mode is on; run 'hf download org/other' while online"
    outcome = offline.run("commands", line)
    assert sentence(outcome, 6) == f"error: model: 'org/other' {why}"
    assert outcome.destinations == set()


def test_a_download_killed_half_way_is_not_taken_for_the_whole(hub, online, offline, tmp_path):
    """Offline it is said to be missing; run again, it is whole. It is more than the client keeps in memory at once."""
    hub.repositories["models/org/big"] = Repository(
        save_tiny_lm(tmp_path / "big", vocab_size=200_000, tie_word_embeddings=True)
    )
    hub.faults = lambda request: "stall" if request.method == "GET" and "safetensors" in request.path else None

    def kill(pid):
        deadline = time.monotonic() + 60
        stored = online.home / "hub" / "models--org--big"
        while not any(path.stat().st_size for path in stored.rglob("*.incomplete")):
            assert time.monotonic() < deadline
            time.sleep(0.01)
        os.kill(pid, signal.SIGKILL)

    assert online.run("load", "org/big", None, meanwhile=kill).code == -signal.SIGKILL
    hub.faults = lambda request: None
    missing = offline.run("load", "org/big", None)
    assert missing.code == 6
    assert "not in the local cache" in missing.out or "model.safetensors" in missing.out
    again = json.loads(online.run("load", "org/big", None).out)
    assert again == json.loads(online.run("load", str(tmp_path / "big"), None).out) | {"revision": again["revision"]}


PARTS = ["config.json", "model.safetensors", "tokenizer.json"]


@pytest.mark.parametrize(
    ("part", "fault"),
    [
        *((part, fault) for part in PARTS for fault in (429, 503, "close", "short")),
        pytest.param("model.safetensors", "stall", marks=pytest.mark.slow),
    ],
)
def test_a_download_that_keeps_failing_ends_in_a_sentence(hub, online, corpus, tmp_path, part, fault):
    name = f"org/failing-{fault}-{part.split('.')[0]}"
    hub.repositories[f"models/{name}"] = hub.repositories["models/org/tiny"]
    hub.faults = lambda request: fault if request.path.endswith(part) and request.method == "GET" else None
    outcome = online.run("commands", train_command(lm=name, data=corpus, out=tmp_path / "run"))
    said = sentence(outcome, 6, warned=True)
    assert re.fullmatch(rf"error: model: '{name}' cannot be read from the Hub \(\w+\); try again", said)
    assert not list(tmp_path.iterdir())


# ---- data sets -------------------------------------------------------------------------------------------------------

REFUSED_DATA = {
    "org/nowhere": ("data: ", "'org/nowhere' not found as a file, a folder, or a dataset on the Hub; check the name"),
    "org/private": ("data: ", "'org/private' not found as a file, a folder, or a dataset on the Hub; check the name"),
    "org/gated": ("data: ", "'org/gated' is gated; accept its terms on the Hub, then run 'hf auth login'"),
    "org/bodies": ("org/bodies: ", "row 1: no column 'text'; columns are 'content', 'meta'; use --text-column"),
    "org/corpus": ("split: ", "no split 'tests' in 'org/corpus'; splits are train, validation, test, or all"),
}


@pytest.mark.parametrize("streaming", [[], ["--streaming"]], ids=["downloaded", "streamed"])
@pytest.mark.parametrize("name", REFUSED_DATA)
def test_a_data_set_that_the_hub_refuses_is_one_sentence(online, lm_folder, tmp_path, name, streaming):
    split = ["--split", "tests"] if name == "org/corpus" else []
    line = train_command(*split, *streaming, lm=lm_folder, data=name, out=tmp_path / "run")
    said = sentence(
        online.run("commands", line, HF_TOKEN=CANARY), 3, warned=not streaming
    )  # by bars; see --quiet below
    assert said.startswith("error: " + "".join(REFUSED_DATA[name]))
    assert CANARY not in said
    assert not list(tmp_path.iterdir())


def test_offline_a_cached_data_set_is_read_and_another_is_named(online, offline, lm_folder, tmp_path):
    train = lambda data, out, *flags: train_command(*flags, lm=lm_folder, data=data, out=tmp_path / out)  # noqa: E731
    assert online.run("commands", train("org/corpus", "first")).code == 0
    shutil.rmtree(online.folder / "cache")
    outcome = offline.run("commands", train("org/corpus", "second"))
    assert (outcome.code, outcome.destinations) == (0, set()), outcome.err
    why = (
        "is not in the local cache and offline mode is on; run 'hf download --repo-type dataset org/jsonl' while online"
    )
    for flags in ([], ["--streaming"]):
        assert (
            sentence(offline.run("commands", train("org/jsonl", "third", *flags)), 3)
            == f"error: data: 'org/jsonl' {why}"
        )


# ---- a network that fails now and then -------------------------------------------------------------------------------


WAYS_TO_FAIL = [429, 500, 502, 503, 504, "close", "short"]


def unreliable(seed, part):
    """Of the requests with this in their path, the first fails, and then every fifth."""
    draw = random.Random(seed)
    fates = (draw.choice(WAYS_TO_FAIL) if draw.random() < 0.2 else None for _ in itertools.count())
    fates = itertools.chain([503], fates)
    return lambda request: next(fates) if part in request.path else None


def local_hash(texts: Path) -> str:
    rows = itertools.chain(*(shard.read_text().splitlines() for shard in sorted(texts.glob("train-*.jsonl"))))
    return hashlib.sha256(json.dumps([json.loads(row)["text"] for row in rows]).encode()).hexdigest()


@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(1, 10))])
@pytest.mark.parametrize("form", ["jsonl", "parquet"])
@pytest.mark.parametrize("part", ["/train-", "/api/datasets/"], ids=["its rows", "its names"])
def test_a_stream_through_an_unreliable_network_is_the_same_stream(hub, online, texts, part, form, seed):
    hub.faults = unreliable(seed, part)
    outcome = online.run("documents", f"org/{form}")
    assert outcome.code == 0, outcome.err[-500:]
    assert outcome.out.strip() == local_hash(texts)
    assert outcome.slept > 0, "nothing failed"


def outage(folder: Path, fault, minutes: float):
    """Nothing is answered, from the third shard on, for a while of the client's clock."""
    began = []

    def faults(request):
        if not began and "train-02" in request.path:
            began.append(clock(folder))
        return fault if began and clock(folder) < began[0] + 60 * minutes else None

    return faults


@pytest.mark.parametrize("fault", ["close", 429, 503])
def test_an_outage_of_twenty_minutes_costs_nothing_but_time(hub, online, texts, fault):
    hub.faults = outage(online.next_folder(), fault, minutes=20)
    outcome = online.run("documents", "org/jsonl")
    assert outcome.code == 0, outcome.err[-500:]
    assert outcome.out.strip() == local_hash(texts)
    assert outcome.slept >= 20 * 60


@pytest.mark.parametrize("fault", ["close", 429, 503])
def test_an_outage_without_end_is_waited_out_for_half_an_hour(hub, online, lm_folder, tmp_path, fault):
    """After that the command says that it can be run again, and leaves nothing half-made behind."""
    hub.faults = outage(online.next_folder(), fault, minutes=float("inf"))
    line = train_command("--streaming", lm=lm_folder, data="org/jsonl", out=tmp_path / "run")
    outcome = online.run("commands", line, MLSAE_CACHE=str(tmp_path / "cache"))
    assert "org/jsonl: the network failed for" in sentence(outcome, 75, warned=True)
    assert 30 * 60 <= outcome.slept < 60 * 60
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("part", ["/api/datasets/", "/train-"], ids=["its names", "its rows"])
def test_asked_to_stop_while_the_network_stalls_it_stops_at_once(hub, online, lm_folder, tmp_path, part, number):
    asked = []
    hub.faults = lambda request: "stall" if part in request.path else None

    def stop(pid):
        deadline = time.monotonic() + 60
        while not any(part in request.path for request in hub.requests):
            assert time.monotonic() < deadline
            time.sleep(0.01)
        time.sleep(0.1)
        asked.append(time.monotonic())
        os.kill(pid, number)

    line = train_command("--streaming", lm=lm_folder, data="org/jsonl", out=tmp_path / "run")
    outcome = online.run("commands", line, meanwhile=stop, MLSAE_CACHE=str(tmp_path / "cache"))
    assert time.monotonic() - asked[0] < 5
    assert (
        sentence(outcome, 75, warned=True)
        == "error: train: stopped; nothing half-made is left; run the same command again"
    )
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


# ---- the same tokens -------------------------------------------------------------------------------------------------

STEPS = 24
KNOBS = {"--batch-size": 2, "--context-length": 16, "--accumulation-steps": 1, "--save-every-steps": 100}


def streamed(lm_folder, data, out, *flags):
    knobs = [str(word) for pair in KNOBS.items() for word in pair]
    return train_command(*knobs, "--tokens", str(32 * STEPS), "--streaming", *flags, lm=lm_folder, data=data, out=out)


@pytest.mark.parametrize("kept", [True, False], ids=["tokens kept", "tokens deleted"])
def test_a_stopped_run_on_a_stream_reads_what_a_run_on_the_same_file_reads(online, lm_folder, texts, tmp_path, kept):
    local, remote = tmp_path / "local", tmp_path / "remote"
    for folder in (local, remote):
        folder.mkdir()
    line = streamed(lm_folder, str(texts), local / "run")
    assert online.run("training", str(local / "reads"), 0, line).code == 0
    for attempt, stop in enumerate([5, 11, 17, 0]):
        resume = ["--resume"] if attempt else []
        line = streamed(lm_folder, "org/jsonl", remote / "run", *resume)
        cache = tmp_path / ("cache" if kept else f"cache-{attempt}")
        outcome = online.run("training", str(remote / "reads"), stop, line, MLSAE_CACHE=str(cache))
        assert outcome.code == (75 if stop else 0), outcome.err
    assert len(consumed(local / "run")) == STEPS
    assert consumed(remote / "run") == consumed(local / "run")


# ---- what leaves this machine ----------------------------------------------------------------------------------------


def four_commands(run: Path, *flags: str, lm, data) -> list[list[str]]:
    """Train, evaluate, analyze, info."""
    read = ["--tokens", "500", "--quiet", "--context-length", "64"]
    return [
        train_command(*flags, lm=lm, data=data, out=run),
        ["evaluate", str(run), *read, *flags],
        ["analyze", str(run), *read, *flags],
        ["info", *flags],
    ]


def test_local_folders_need_no_network(hub, online, lm_folder, corpus, tmp_path):
    outcome = online.run("commands", *four_commands(tmp_path / "run", lm=lm_folder, data=corpus))
    assert outcome.code == 0, outcome.err
    assert outcome.destinations == set()
    assert hub.requests == []


def test_the_offline_flag_cuts_every_command_off(hub, online, fresh, tmp_path):
    """In a process that has imported nothing, with a model and a data set that were downloaded before."""
    assert online.run("commands", *four_commands(tmp_path / "first", lm="org/tiny", data="org/corpus")[:1]).code == 0
    hub.requests.clear()
    outcome = fresh.run("commands", *four_commands(tmp_path / "run", "--offline", lm="org/tiny", data="org/corpus"))
    assert outcome.code == 0, outcome.err
    assert outcome.destinations == set()
    assert hub.requests == []


@pytest.mark.parametrize("streaming", [[], pytest.param(["--streaming"], marks=pytest.mark.slow)])
def test_only_the_hub_is_asked_and_only_for_what_was_named(hub, fresh, tmp_path, streaming):
    line = train_command(*streaming, lm="org/tiny", data="org/corpus", out=tmp_path / "run")
    outcome = fresh.run("commands", line, MLSAE_CACHE=str(tmp_path / "cache"), HF_HOME=str(tmp_path / "home"))
    assert outcome.code == 0, outcome.err
    assert outcome.destinations == {"{}:{}".format(*hub.address)}
    assert [r.path for r in hub.requests if "/org/tiny" not in r.path and "/org/corpus" not in r.path] == []
    assert outcome.err == "", "--quiet shows bars"


def test_a_token_goes_to_the_hub_and_nowhere_else(hub, online, tmp_path):
    hub.token = CANARY
    lines = four_commands(tmp_path / "run", lm="org/private", data="org/private")[:2]
    outcome = online.run("commands", *lines, HF_TOKEN=CANARY, MLSAE_CACHE=str(tmp_path / "cache"))
    assert outcome.code == 0, outcome.err
    assert any(CANARY in request.headers.get("authorization", "") for request in hub.requests)
    assert {request.method for request in hub.requests} == {"GET", "HEAD"}
    places = (tmp_path, online.home, online.folder)
    files = {path for place in places for path in place.rglob("*") if path.is_file()}
    assert [path for path in files if CANARY.encode() in path.read_bytes()] == []
